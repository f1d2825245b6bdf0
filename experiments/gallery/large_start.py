"""A large start of a classifier: it generalises at t = ln(α)/λ, in ℓ1.

The network β = u ⊙ u − v ⊙ v from u = v = α, with a logistic loss and weight decay,
stays a kernel method until λt = ln α, and then turns to the least of F + (λ/2)‖β‖₁
(Lyu, Jin, Li, Du, Lee, Hu, arXiv 2311.18817). That end is found by scikit-learn, too.
"""

from pathlib import Path

import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
from sklearn.linear_model import LogisticRegression

import gradflow as gf

gf.enable_float64()

SAMPLES, DIM, LAM = 40, 60, 1e-4
ALPHAS = [10.0, 100.0, 1000.0]


def main(out=Path("results/gallery")):
    x = jr.rademacher(jr.key(0), (SAMPLES, DIM), float)
    new = jr.rademacher(jr.key(1), (2000, DIM), float)
    sign = lambda x: jnp.sign(x[:, 0] + x[:, 1] + x[:, 2])
    flow = gf.GradientFlow(gf.SoftMargin(x, sign(x)))
    right = lambda model: jnp.mean(jnp.sign(new @ model.beta) == sign(new))

    fig, ax = plt.subplots(layout="constrained")
    times = []
    for alpha in ALPHAS:
        model = gf.models.DifferenceNetwork(*[jnp.full(DIM, alpha)] * 2)
        path = gf.simulate(
            flow, model, weight_decay=LAM, slow_time=np.log(alpha) + 12, saves=201,
            metrics={"test": gf.Metric(right, threshold=0.9, higher_is_better=True)},
        )  # fmt: skip
        times.append(path.crossing_time("test"))
        ax.plot(path.slow_time, path.metrics["test"], label=f"α = {alpha:g}")
        ax.axvline(np.log(alpha), color="grey", linestyle="dotted")

    # From one scale to the next it takes ln 10 longer in slow time.
    np.testing.assert_allclose(np.diff(times) * LAM, np.log(10), rtol=0.02)
    beta = path[-1].beta
    other = LogisticRegression(
        C=2 / (LAM * SAMPLES), l1_ratio=1, solver="liblinear", fit_intercept=False,
        tol=1e-10, max_iter=100_000,
    ).fit(x, sign(x))  # fmt: skip
    np.testing.assert_allclose(beta, other.coef_[0], atol=0.02 * np.abs(beta).max())

    ax.set(xlabel="slow time λt", ylabel="test accuracy", title="dotted: ln α")
    ax.legend()
    out.mkdir(parents=True, exist_ok=True)
    fig.savefig(out / "large_start.png")
    print(path, f"λt = {np.array(times) * LAM}", sep="\n")


if __name__ == "__main__":
    main()
