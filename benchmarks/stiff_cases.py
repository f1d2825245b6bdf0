"""How many steps do KKT4 and KKT5 take beside SciPy's stiff solvers, where the outputs
are curved?

Small networks of many kinds, most of them with data that cannot be fitted, to slow time
s = λt = 3 with 17 saved times, at one rtol: steps, those rejected, the error in units
of rtol, and the same of Radau and BDF with a jitted gradient and Hessian. Errors are
from KKT5 at rtol 1e-10; those of SciPy's solvers say how far that can be trusted. Where
the flow leaves a saddle errors grow: how much the path moves where its start is moved
by one rtol, in a random direction, is told beside them.

    python benchmarks/stiff_cases.py
    python benchmarks/stiff_cases.py --cases gru two_heads --budget 60
"""

import one_core  # noqa: F401

# isort: split
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from jax.flatten_util import ravel_pytree
from jaxtyping import Array
from scipy.integrate import solve_ivp
from shapes import attention, Shape
from tqdm.auto import tqdm

import gradflow as gf

gf.enable_float64()
SOLVERS = {"KKT4": gf.KKT4(), "KKT5": gf.KKT5()}


def tanh(width: int, *, inputs: int = 2, samples: int = 60) -> Shape:
    """A noisy teacher of two neurons."""
    return _regression(width, jnp.tanh, inputs, samples, noise=0.03)


def silu() -> Shape:
    return _regression(40, jax.nn.silu, 2, 60, noise=0.2)


def _regression(
    width: int, activation: Callable, inputs: int, samples: int, noise: float
) -> Shape:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(samples, inputs))
    y = (
        np.tanh(2 * x[:, 0])
        - 0.5 * np.tanh(x[:, 1])
        + noise * draw.normal(size=samples)
    )
    model = eqx.nn.MLP(inputs, "scalar", width, 1, activation, key=jr.key(0))
    return Shape(gf.GradientFlow(gf.SquaredError(x, y)), model)


def logistic() -> Shape:
    """Which quadrant, with errors."""
    draw = np.random.default_rng(5)
    x = draw.normal(size=(40, 3))
    y = (x[:, 0] * x[:, 1] + 0.2 * draw.normal(size=40) > 0).astype(float)
    model = eqx.nn.MLP(3, "scalar", 6, 1, jax.nn.silu, key=jr.key(1))
    return Shape(gf.GradientFlow(gf.Logistic(x, y)), model)


class Convolution(eqx.Module):
    """One, normalised."""

    convolution: eqx.nn.Conv1d
    scale: eqx.nn.LayerNorm
    last: eqx.nn.Linear

    def __call__(self, x: Array) -> Array:
        z = self.scale(self.convolution(x[None]))
        return self.last(jax.nn.silu(z).ravel())


def convolution() -> Shape:
    """Probabilities as labels."""
    draw = np.random.default_rng(6)
    x = draw.normal(size=(30, 8))
    y = 1 / (1 + np.exp(-2 * x[:, 0] * x[:, 3] - x[:, 1]))
    first, last = jr.split(jr.key(2))
    model = Convolution(
        eqx.nn.Conv1d(1, 4, 3, key=first),
        eqx.nn.LayerNorm((4, 6)),
        eqx.nn.Linear(24, "scalar", key=last),
    )
    return Shape(gf.GradientFlow(gf.Logistic(x, y)), model)


class Recurrent(eqx.Module):
    """A gated unit, read off at its end."""

    cell: eqx.nn.GRUCell
    last: eqx.nn.Linear

    def __call__(self, x: Array) -> Array:
        step = lambda state, token: (self.cell(token, state), None)
        end, _ = jax.lax.scan(step, jnp.zeros(self.cell.hidden_size), x)
        return self.last(end)


def gru() -> Shape:
    """Sequences of 5 pairs: the product of two sums."""
    draw = np.random.default_rng(7)
    x = draw.normal(size=(30, 5, 2))
    y = np.tanh(x.sum(axis=1).prod(axis=1)) + 0.1 * draw.normal(size=30)
    cell, last = jr.split(jr.key(7))
    model = Recurrent(
        eqx.nn.GRUCell(2, 4, key=cell), eqx.nn.Linear(4, "scalar", key=last)
    )
    return Shape(gf.GradientFlow(gf.SquaredError(x, y)), model)


def softplus_classes() -> Shape:
    """Three overlapping classes."""
    draw = np.random.default_rng(8)
    x, y = draw.normal(size=(40, 2)), draw.integers(0, 3, 40)
    x[:, 0] += y
    model = eqx.nn.MLP(2, 3, 30, 1, jax.nn.softplus, key=jr.key(8))
    return Shape(gf.GradientFlow(gf.CrossEntropy(x, y)), model)


class TwoHeads(eqx.Module):
    """Linear attention, bilinear in its tokens."""

    query: Array
    value: Array

    def __call__(self, x: Array) -> Array:
        weights = jnp.einsum("i,hij,tj->ht", x[-1], self.query, x) / len(x)
        return jnp.einsum("ht,tj,hj->", weights, x, self.value)


def two_heads() -> Shape:
    """A product of entries of the last token and the first."""
    draw = np.random.default_rng(9)
    x = draw.normal(size=(50, 5, 4))
    y = x[:, -1, 0] * x[:, 0, 1] + 0.3 * draw.normal(size=50)
    model = TwoHeads(
        0.5 * draw.normal(size=(2, 4, 4)), 0.5 * draw.normal(size=(2, 4))
    )  # fmt: skip
    model = jax.tree.map(jnp.asarray, model)
    return Shape(gf.GradientFlow(gf.SquaredError(x, y)), model)


def noisy_diagonal() -> Shape:
    """Noise that a diagonal network of 20 features cannot fit."""
    draw = np.random.default_rng(10)
    x = draw.normal(size=(30, 20))
    y = x[:, :3].sum(axis=1) + 0.3 * draw.normal(size=30)
    model = gf.tasks.diagonal_network(jr.key(0), samples=20, dim=20).model
    return Shape(gf.GradientFlow(gf.SquaredError(x, y)), model)


CASES: dict[str, Callable[[], Shape]] = {
    "tanh_17": lambda: tanh(4),
    "tanh_161": lambda: tanh(40),
    "tanh_301": lambda: tanh(60, inputs=3, samples=400),
    "silu": silu,
    "attention_12": lambda: attention(17, 3),
    "attention_156": attention,
    "logistic": logistic,
    "convolution": convolution,
    "gru": gru,
    "softplus_classes": softplus_classes,
    "two_heads": two_heads,
    "noisy_diagonal": noisy_diagonal,
}


@dataclasses.dataclass(frozen=True)
class Config:
    cases: tuple[str, ...] = tuple(CASES)
    weight_decay: tuple[float, ...] = (1e-2, 1e-4, 1e-6)
    rtol: float = 1e-5
    reference: float = 1e-10
    """Its rtol."""
    budget: float = 15.0
    """Seconds after which a solve by SciPy is given up."""
    out: Path = Path(__file__).parent / "results" / "stiff_cases.json"


class _GivenUp(Exception):
    pass


class Case:
    """One problem, its compiled programs, and the same for SciPy."""

    def __init__(self, name: str, config: Config):
        self.name, self.config = name, config
        self.flow, self.model = CASES[name]()
        term, params = self.flow.term(self.model)
        theta, self.unravel = ravel_pytree(params)
        self.start = np.asarray(theta)

        def velocity(theta, lam):
            return ravel_pytree(term.vf(0.0, self.unravel(theta), lam))[0]

        self.velocity = jax.jit(velocity)
        self.jacobian = jax.jit(jax.jacfwd(velocity))

    def path(self, solver: str, lam: float, rtol: float, moved: float = 0.0) -> gf.Path:
        """The start may be moved, relative to its size."""
        way = np.random.default_rng(0).normal(size=self.start.size)
        way *= np.linalg.norm(self.start) / np.linalg.norm(way)
        params = self.unravel(self.start + moved * way)
        model = eqx.combine(params, self.flow.partition(self.model)[1])
        return gf.simulate(
            self.flow, model, weight_decay=lam, slow_time=3.0, saves=17,
            rtol=rtol, solver=SOLVERS[solver], max_steps=30_000, throw=False,
        )  # fmt: skip

    def rows(self, lam: float) -> dict:
        """What every solver took, and how exact it was."""
        rtol = self.config.rtol
        exact = self.path("KKT5", lam, self.config.reference)
        reached = _flat(exact)
        moved = self.path("KKT5", lam, self.config.reference, moved=rtol)

        def error(thetas: np.ndarray) -> float:
            gaps = np.linalg.norm(thetas - reached, axis=1)
            return float(np.max(gaps / np.linalg.norm(reached, axis=1)) / rtol)

        found: dict = dict(reference=_verdict(exact), moved=error(_flat(moved)))
        for solver in SOLVERS:
            path = self.path(solver, lam, rtol)
            stats = path.stats
            counts = {
                name: int(stats[name])  # pyright: ignore[reportArgumentType]
                for name in ("steps", "rejected", "iterations", "kernels")
            }
            found[solver] = dict(
                **counts, error=error(_flat(path)), result=_verdict(path)
            )
        for method in ("Radau", "BDF"):
            found[method] = self.scipy(method, lam, np.asarray(exact.t), error)
        return found

    def scipy(self, method: str, lam: float, ts: np.ndarray, error: Callable) -> dict:
        rtol, begun = self.config.rtol, time.perf_counter()

        def force(t, theta):
            if time.perf_counter() - begun > self.config.budget:
                raise _GivenUp
            return np.asarray(self.velocity(theta, lam))

        def jacobian(t, theta):
            return np.asarray(self.jacobian(theta, lam))

        # Of a coordinate far below the others, as gradflow's own.
        atol = 0.02 * rtol * np.sqrt(np.mean(self.start**2))
        try:
            out = solve_ivp(
                force, (0.0, ts[-1]), self.start, method=method, jac=jacobian,
                rtol=rtol, atol=atol, dense_output=True,
            )  # fmt: skip
        except _GivenUp:
            return dict(steps=None, error=None)
        assert out.sol is not None
        return dict(steps=len(out.t) - 1, error=error(out.sol(ts).T))


def _flat(path: gf.Path) -> np.ndarray:
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(path.params)]
    return np.concatenate([leaf.reshape(len(path), -1) for leaf in leaves], axis=1)


def _verdict(path: gf.Path) -> str:
    ended = bool(path.result == gf.RESULTS.successful)
    return "" if ended else str(gf.RESULTS[path.result])


def table(rows: list[dict], config: Config) -> str:
    """As Markdown. In bold what misses the targets: twice the steps of Radau and one
    for each saved time, 15 % of them rejected, an error of 5 rtol, or of 5 times what
    the start moves."""
    lines = [
        "| | d | λ | KKT4: steps, rejected | iterations, kernels | error/rtol | KKT5 | "
        "error/rtol | Radau | error/rtol | BDF | error/rtol | start moved |",
        "|" + "---|" * 13,
    ]

    def bold(text: str, missed: bool) -> str:
        return f"**{text}**" if missed else text

    for row in rows:
        radau = row["Radau"]["steps"]
        cells = [row["case"], str(row["d"]), f"{row['weight_decay']:.0e}"]
        for solver in SOLVERS:
            took = row[solver]
            steps, rejected, error = took["steps"], took["rejected"], took["error"]
            many = radau is not None and steps > 2 * (radau + 17)
            told = bold(str(steps), many) + ", "
            told += bold(str(rejected), rejected > 0.15 * steps) + took["result"]
            cells.append(told)
            if solver == "KKT4":
                cells.append(f"{took['iterations']}, {took['kernels']}")
            cells.append(bold(f"{error:.2g}", not error <= 5 * max(1, row["moved"])))
        for method in ("Radau", "BDF"):
            steps, error = row[method]["steps"], row[method]["error"]
            late = f"> {config.budget:g} s"
            cells += [late, "–"] if steps is None else [str(steps), f"{error:.2g}"]
        cells.append(f"{row['moved']:.2g}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(config: Config) -> None:
    rows = []
    bar = tqdm(total=len(config.cases) * len(config.weight_decay))
    for name in config.cases:
        case = Case(name, config)
        for lam in config.weight_decay:
            bar.set_postfix_str(f"{name}, λ = {lam:g}")
            row = dict(case=name, d=case.start.size, weight_decay=lam, rtol=config.rtol)
            rows.append({**row, **case.rows(lam)})
            config.out.write_text(json.dumps(rows, indent=1) + "\n")
            bar.update()
    bar.close()
    print(table(rows, config))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
