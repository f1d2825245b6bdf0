"""Networks with two and ten thousand outputs, on two cores: time and memory.

A multilayer perceptron 64-200-200-10 and a small convolutional network learn 1000 and
200 handwritten digits under the squared error, with GELU, in double precision. Each is
followed to slow time s = 3, in a process of its own, with all that is compiled: by the
solver that is chosen, by KKT4 without a matrix, by RKC2, and by gradient descent with
h = 1/L, L the curvature at the start: half of what is stable there. Of that a stretch
is measured, and the rest extrapolated.

    python benchmarks/networks.py
    python benchmarks/networks.py --problems cnn --weight-decay 1e-3
"""

import dataclasses
import json
import multiprocessing
import resource
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from jaxtyping import Array, Float, PRNGKeyArray
from shapes import Shape
from tqdm.auto import tqdm

import gradflow as gf
from gradflow.data import scikit_learn_digits

SOLVERS = {"chosen": None, "RKC2": gf.RKC2(), "matrix_free": gf.KKT4(matrix_free=True)}
SLOW_TIME = 3.0
STRETCH = 200  # steps of gradient descent


@dataclasses.dataclass(frozen=True)
class Config:
    problems: tuple[str, ...] = ("mlp", "cnn")
    solvers: tuple[str, ...] = ("chosen", "matrix_free", "RKC2")
    weight_decay: tuple[float, ...] = (1e-3, 1e-4, 1e-5)
    rtol: float = 1e-3
    out: Path = Path(__file__).parent / "results" / "networks.json"


class ConvNet(eqx.Module):
    """Two convolutions, each of which halves the sides of the image, and a layer."""

    first: eqx.nn.Conv2d
    second: eqx.nn.Conv2d
    last: eqx.nn.Linear

    def __init__(self, key: PRNGKeyArray):
        one, two, three = jr.split(key, 3)
        options = dict(kernel_size=3, stride=2, padding=1)
        self.first = eqx.nn.Conv2d(1, 8, **options, key=one)
        self.second = eqx.nn.Conv2d(8, 16, **options, key=two)
        self.last = eqx.nn.Linear(64, 10, key=three)

    def __call__(self, image: Float[Array, " 64"]) -> Float[Array, " 10"]:
        x = jax.nn.gelu(self.first(image.reshape(1, 8, 8)))
        return self.last(jax.nn.gelu(self.second(x)).reshape(-1))


def digits(samples: int) -> tuple[Array, Array]:
    """Images, and one-hot labels."""
    images, labels = scikit_learn_digits()
    images = jnp.asarray(np.reshape(images, (len(images), -1))[:samples])
    return images, jax.nn.one_hot(labels[:samples], 10, dtype=float)


def problem(name: str) -> Shape:
    """By its name."""
    if name == "mlp":
        layers = eqx.nn.MLP(64, 10, 200, 2, jax.nn.gelu, key=jr.key(0))
        return Shape(gf.GradientFlow(gf.SquaredError(*digits(1000))), layers)
    return Shape(gf.GradientFlow(gf.SquaredError(*digits(200))), ConvNet(jr.key(1)))


def followed(name: str, solver: str, lam: float, rtol: float) -> dict:
    """A run by one solver, in this process."""
    gf.enable_float64()
    flow, model = problem(name)
    begun = time.perf_counter()
    path = gf.simulate(
        flow, model, weight_decay=lam, slow_time=SLOW_TIME, saves=25, rtol=rtol,
        solver=SOLVERS[solver], throw=False,
    )  # fmt: skip
    jax.block_until_ready(path)
    stats = {
        k: path.stats[k] for k in ("steps", "iterations", "evaluations", "products")
    }
    return {
        "seconds": time.perf_counter() - begun,
        "solver": path.stats.solver,
        "result": path.verdict if not bool(path.succeeded) else "",
        "stats": {k: int(v) for k, v in stats.items() if v is not None},
        "train_loss": float(path.train_loss[-1]),
        "norm": float(np.sqrt(2 * path.penalty[-1])),
        "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def descended(name: str, lam: float) -> dict:
    """Gradient descent: the time of a step, by a stretch, and how many there would be
    with h = 1/L, L the curvature at the start."""
    gf.enable_float64()
    flow, model = problem(name)
    term, params = flow.term(model)
    largest = float(gf.solvers.measure_size(term, params, lam, 1.0).stiffness)

    def run() -> float:
        begun = time.perf_counter()
        path = gf.descent(
            flow, model, weight_decay=lam, learning_rate=1 / largest, at=[0, STRETCH]
        )
        jax.block_until_ready(path)
        return time.perf_counter() - begun

    run()
    each, steps = run() / STRETCH, SLOW_TIME / lam * largest
    return {"seconds": each * steps, "steps": steps, "extrapolated": True}


def main(config: Config) -> None:
    cases = [(p, lam) for p in config.problems for lam in config.weight_decay]
    config.out.parent.mkdir(exist_ok=True)
    rows = []
    # (Each by itself: what is compiled counts, and so does the most memory.)
    processes = multiprocessing.get_context("spawn")
    for name, lam in tqdm(cases, desc="networks"):
        for solver in (*config.solvers, "descent"):
            given = (
                (name, lam) if solver == "descent" else (name, solver, lam, config.rtol)
            )
            call = descended if solver == "descent" else followed
            with processes.Pool(1) as pool:
                found = pool.apply(call, given)
            rows.append({"problem": name, "weight_decay": lam, "by": solver, **found})
            tqdm.write(json.dumps(rows[-1]))
            config.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
