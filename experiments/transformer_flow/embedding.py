"""An embedding and a network of one hidden layer on a + b mod p, and what an explicit
solver would take for the same path."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import xarray as xr
from jaxtyping import Array, Float, Int, PRNGKeyArray
from matplotlib.figure import Figure

import gradflow as gf

from ..shared.command import Settings
from ..shared.figures import COLOURS, finish, panels
from ..shared.record import variables
from ..shared.rows import check, Row


class EmbeddingMLP(eqx.Module):
    """Logits for a + b, from learned embeddings of both, one beside the other."""

    embedding: Float[Array, "p k"]
    layers: eqx.nn.MLP

    def __init__(self, modulus: int, width: int, hidden: int, key: PRNGKeyArray):
        first, second = jr.split(key)
        self.embedding = jr.normal(first, (modulus, width)) / width**0.5
        self.layers = eqx.nn.MLP(2 * width, modulus, hidden, 1, jax.nn.gelu, key=second)

    def __call__(self, pair: Int[Array, "2"]) -> Float[Array, " p"]:
        return self.layers(self.embedding[pair].reshape(-1))


@dataclasses.dataclass(frozen=True)
class Embedding(Settings):
    """The whole path to t = 1.5e6 at λ = 4e-6, against an explicit solver."""

    modulus: int = 47
    """p; 23 if quick."""
    fraction: float = 0.6
    """Of all pairs, that are seen."""
    width: int = 16
    """Of the embedding; twice as many hidden units as both have."""
    loss: Literal["cross_entropy", "squared_error"] = "cross_entropy"
    weight_decay: float = 4e-6
    t1: float = 1.5e6
    """How far to follow."""
    rtol: float = 1e-3
    """Of both solvers."""
    least_steps: int = 150
    """Of the explicit solver, on a stretch."""

    QUICK = dict(modulus=23)

    @property
    def problem(self) -> tuple[gf.GradientFlow, EmbeddingMLP, dict[str, gf.Metric]]:
        split, start = jr.split(jr.key(self.seed))
        order = jr.permutation(split, self.modulus**2)
        pairs = jnp.stack(jnp.divmod(order, self.modulus), axis=1)
        labels = jnp.sum(pairs, axis=1) % self.modulus
        seen = int(self.fraction * len(pairs))
        model = EmbeddingMLP(self.modulus, self.width, 4 * self.width, start)
        if self.loss == "cross_entropy":
            loss = gf.CrossEntropy(pairs[:seen], labels[:seen])
        else:
            right = jax.nn.one_hot(labels[:seen], self.modulus, dtype=float)
            loss = gf.SquaredError(pairs[:seen], right)
        metrics = {
            name: gf.Metric(
                gf.Accuracy(pairs[part], labels[part]), threshold=0.99,
                higher_is_better=True,
            )
            for name, part in (("train", slice(seen)), ("test", slice(seen, None)))
        }  # fmt: skip
        return gf.GradientFlow(loss), model, metrics

    def compute(self) -> xr.Dataset:
        flow, model, metrics = self.problem
        given = dict(weight_decay=self.weight_decay, rtol=self.rtol)

        def whole() -> gf.Path:
            path = gf.simulate(
                flow, model, **given, t1=self.t1, saves=129, metrics=metrics,
                solver=gf.RKC2(), progress=not self.quick,
            )  # fmt: skip
            return jax.block_until_ready(path)

        first, path = seconds(whole)
        again, path = seconds(whole)

        def explicit(start: Any, width: float) -> gf.Path:
            path = gf.simulate(
                flow, start, **given, t1=width, saves=3, solver=diffrax.Tsit5(),
                throw=False,  # as it runs at its stability limit, which is told
            )  # fmt: skip
            return jax.block_until_ready(path)

        # Of stretches from points along the path, each long enough to count steps in.
        t = np.asarray(path.t)
        places = [int(np.argmax(t >= self.t1 / 10**k)) for k in range(5, -1, -1)]
        density, price = [], []
        for place in places:
            width, steps = 1.0, 0
            while steps < self.least_steps:
                width *= 4
                steps = int(explicit(path[place], width).stats.steps)
            took, _ = seconds(lambda p=place, w=width: explicit(path[p], w))
            density.append(steps / width)
            price.append(took / steps)
        return variables(
            t=t,
            slow_time=path.slow_time,
            train=path.metrics["train"],
            test=path.metrics["test"],
            train_loss=path.train_loss,
            norm=np.sqrt(2 * np.asarray(path.penalty)),
            seconds=[first, again],
            place=t[places],
            density=density,
            price=price,
        ).assign_attrs(solver=str(path.stats))

    def judge(self, data: xr.Dataset) -> list[Row]:
        t, metric = data.t.values, gf.Metric(abs, threshold=0.99, higher_is_better=True)
        memorised, grokked = (
            gf.crossing_time(t, data[name].values, metric) for name in ("train", "test")
        )
        first, again = data.seconds.values
        steps, slow = explicit_cost(data)
        return [
            check("memorised", memorised, "", "time t of train 99 %"),
            check("grokked", grokked, "", "time t of test 99 %"),
            check("delay", grokked / memorised, "≥ 10", "ratio of both"),
            check(
                "seconds", first, "",
                f"of the whole path; {again:.1f} once compiled; {data.solver}",
            ),
            check(
                "Tsit5", slow / again, "",
                f"times as long, extrapolated: {steps:.2g} steps, {slow:.3g} s, from "
                f"{data.place.size} measured stretches",
            ),
        ]  # fmt: skip

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        fig, (left, right) = panels(2)
        t = data.t.values
        left.plot(t[1:], data.train.values[1:], "--", color=COLOURS[0], label="train")
        left.plot(t[1:], data.test.values[1:], color=COLOURS[1], label="test")
        finish(left, "(a) accuracy", "time $t$", log="x")
        place = data.place.values
        right.plot(
            place, 1 / data.density.values, "o-", color=COLOURS[0], label="Tsit5"
        )
        finish(right, "(b) its steps", "time $t$", "length of a step")
        again, slow = data.seconds.values[1], explicit_cost(data)[1]
        fig.suptitle(
            f"a + b mod {self.modulus}, $\\lambda$ = {self.weight_decay:g}: "
            f"{again:.0f} s; by Tsit5 {slow:.2g} s (extrapolated)"
        )
        return {"embedding_flow": fig}


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """How long it takes, and what it gives."""
    begun = time.perf_counter()
    out = run()
    return time.perf_counter() - begun, out


def explicit_cost(data: xr.Dataset) -> tuple[float, float]:
    """Steps, and seconds, of an explicit solver to the end: from those measured on
    stretches, by the trapezium rule in log t."""
    place, density, price = (data[k].values for k in ("place", "density", "price"))
    early = place[0] * density[0]
    logs = np.log(place)
    steps = early + np.trapezoid(place * density, logs)
    took = early * price[0] + np.trapezoid(place * density * price, logs)
    return float(steps), float(took)
