"""How much curvature do the KKT solvers leave out, and does it cost steps?

Their matrix holds JᵀJ, not S = Σ μᵢ∇²zᵢ (μ = ∇ℓ(z)), whose modes ω the iteration of a
stage contracts by c|ω|/α only. Along paths by KKT4 at rtol 1e-4: how many modes are
above 0.3, and above 1, for the c of steps that accuracy allows (an eighth of the time
so far, or 0.05 of slow time); and how many steps were rejected.

    python benchmarks/left_out.py
    python benchmarks/left_out.py --problems logistic --places 20
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from choice import problem
from jax.flatten_util import ravel_pytree

import gradflow as gf
from gradflow.flow.flat import flatten

_GAMMA = 0.25  # of KKT4: c = γh


@dataclasses.dataclass(frozen=True)
class Config:
    problems: tuple[str, ...] = (
        "noisy_tanh", "noisy_silu", "attention", "logistic", "classes", "digits",
    )  # fmt: skip
    """Of `problems.py` and `shapes.py`."""
    weight_decay: tuple[float, ...] = (1e-2, 1e-4, 1e-6)
    places: int = 9
    """Along each path, where the modes are looked at."""


def main(config: Config) -> None:
    for name in config.problems:
        flow, model = problem(name)
        params, static = flow.partition(model)
        theta, loss = flatten(flow.loss, params, static)

        @jax.jit
        def modes(theta, loss=loss):
            mu = jax.lax.stop_gradient(loss.residuals(theta))
            weighted = lambda th: jnp.vdot(mu, loss.outputs(th))
            return jnp.linalg.eigvalsh(jax.jacfwd(jax.grad(weighted))(theta))

        for lam in config.weight_decay:
            path = gf.simulate(
                flow, model, weight_decay=lam, slow_time=2.0, saves=config.places + 1,
                rtol=1e-4, solver=gf.KKT4(), throw=False,
            )  # fmt: skip
            stats, told = path.stats, []
            for at in range(1, len(path)):
                here = ravel_pytree(jax.tree.map(lambda x, at=at: x[at], path.params))
                h = min(float(path.t[at]) / 8, 0.05 / lam)
                size = np.abs(modes(here[0])) * _GAMMA * h / (1 + _GAMMA * h * lam)
                told.append(f"{(size > 0.3).sum()}/{(size > 1).sum()}")
            print(
                f"{name}, d = {theta.size}, λ = {lam:g}: {int(stats.steps)} steps, "
                f"{int(stats.rejected)} rejected; modes > 0.3/> 1: {' '.join(told)}"
            )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
