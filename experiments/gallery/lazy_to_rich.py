"""From lazy to rich: which interpolant the flow picks, by the scale of its start.

The network β = u ⊙ u − v ⊙ v from u = v = α ends at β = 2α² sinh(Xᵀν), the interpolant
that is the least ℓ2 norm for large α and the least ℓ1 norm for small ones (Woodworth et
al., arXiv 2002.09277). ν is found here by SciPy, the limit by gradflow.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import linprog, root

import gradflow as gf

gf.enable_float64()

SAMPLES, DIM = 8, 20
ALPHAS = np.geomspace(1e-3, 10.0, 13)


def exact(x, y, alpha, nu):
    """2α² sinh(Xᵀν) with Xβ = y, and ν, from a guess of it."""
    beta = lambda nu: 2 * alpha**2 * np.sinh(x.T @ nu)
    slope = lambda nu: 2 * alpha**2 * (x * np.cosh(x.T @ nu)) @ x.T
    found = root(lambda nu: x @ beta(nu) - y, nu, jac=slope, tol=1e-12)
    assert found.success
    return beta(found.x), found.x


def main(out=Path("results/gallery")):
    x = jr.normal(jr.key(0), (SAMPLES, DIM))
    y = x @ jnp.zeros(DIM).at[:2].set(jnp.array([1.0, -1.0]))
    loss = gf.SquaredError(x, y)

    @jax.jit
    @jax.vmap
    def end(alpha):
        start = jnp.full(DIM, alpha)
        return gf.manifold.limit_map(loss, gf.models.DifferenceNetwork(start, start))

    found, nu = end(jnp.asarray(ALPHAS)).model.beta, np.zeros(SAMPLES)
    for i in np.argsort(-ALPHAS):
        beta, nu = exact(np.asarray(x), np.asarray(y), ALPHAS[i], nu)
        np.testing.assert_allclose(found[i], beta, atol=1e-6)
    two = np.linalg.norm(np.linalg.pinv(x) @ y)
    both = np.concatenate([x, -x], axis=1)
    one = linprog(np.ones(2 * DIM), A_eq=both, b_eq=y).fun

    fig, ax = plt.subplots(layout="constrained")
    ax.semilogx(ALPHAS, np.abs(found).sum(1) / one, "o-", label="ℓ1 norm / the least")
    size = np.linalg.norm(found, axis=1)
    ax.semilogx(ALPHAS, size / two, "s-", label="ℓ2 norm / the least")
    ax.set(xlabel="scale α of the start", title="lazy on the right, rich on the left")
    ax.legend()
    out.mkdir(parents=True, exist_ok=True)
    fig.savefig(out / "lazy_to_rich.png")
    print(f"ℓ1: {np.abs(found[0]).sum() / one:.4f} of the least at α = {ALPHAS[0]:g}")


if __name__ == "__main__":
    main()
