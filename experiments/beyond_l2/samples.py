"""P2-CS3, CS4 and CS5: how many measurements, which path, and why ℓ2 misleads."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import xarray as xr

import gradflow as gf

from ..shared.common import (
    bar,
    below,
    check,
    COLOURS,
    finish,
    near,
    Outcome,
    panels,
    relative,
    Settings,
    steps_until,
)
from .common import dataset, padded, story, trace
from .sparse import flow, METHODS


@dataclasses.dataclass(frozen=True)
class CS3(Settings):
    """Figures 12, 13, 27 and 28: sparser targets need fewer measurements."""

    features: int = 100
    sparsities: tuple[int, ...] = (1, 5, 10, 15)
    samples: tuple[int, ...] = (10, 20, 30, 40, 50, 60, 70, 80, 90, 100)
    alpha: float = 0.1
    beta: float = 1e-5
    zeta: float = 1e-6
    steps: int = 10**6
    flow_slow_time: float = 100.0
    """How far flows are run, s = βt; the descents reach αβ · steps."""

    def run(self) -> Outcome:
        sparsities = self.sparsities[:2] if self.quick else self.sparsities
        samples = self.samples[::2] if self.quick else self.samples
        methods = METHODS[1:2] if self.quick else METHODS
        shape = (len(sparsities), len(samples))
        errors = {name: np.full(shape, np.nan) for name in (*methods, "flow")}
        oracle, bias = np.full(shape, np.nan), np.full(shape, np.nan)
        first_fit = 0.0
        cells = [(i, j) for i in range(shape[0]) for j in range(shape[1])]
        for i, j in bar(cells, "s, N"):
            one = gf.tasks.sparse_recovery(
                jr.key(self.seed),
                features=self.features,
                sparsity=sparsities[i],
                samples=samples[j],
                scale=self.zeta,
            )
            target = one.truth.target
            oracle[i, j] = relative(one.truth.end_point(), target)
            bias[i, j] = relative(one.truth.lasso(self.beta), target)
            task = padded(one, self.features)
            for method in methods:
                path = gf.descent(
                    task.flow,
                    task.model,
                    weight_decay=self.beta,
                    learning_rate=self.alpha,
                    at=[0, 1, self.steps // 10, self.steps],
                    method=method,
                    metrics=task.metrics,
                )
                errors[method][i, j] = path.metrics["test"][-1]
                if method == "projected":
                    first_fit = max(first_fit, float(path.metrics["train"][1]))
            end = self.flow_slow_time / self.beta
            path = flow(task, self.beta, np.array([0.0, 0.1 * end, end]), 1e-6)
            errors["flow"][i, j] = path.metrics["test"][-1]

        recovers = oracle < 1e-6
        enough = np.flip(np.logical_and.accumulate(np.flip(recovers, 1), axis=1), 1)
        least = np.array([first(samples, row) for row in enough])
        checks = [
            check(
                "P2-CS3 N_min",
                np.diff(least).min(initial=0),
                "≥ 0",
                (np.diff(least) >= 0).all(),
                f"basis pursuit recovers from N = {least.tolist()} on, for s = "
                f"{list(sparsities)}",
            )  # fmt: skip
        ]
        measured = {}
        for name, found in errors.items():
            late = int((found[enough] >= 1e-3).sum())
            last = "the flow" if name == "flow" else f"{name} descent"
            where = f"{late} of {enough.sum()} instances above" if late else "all below"
            checks.append(
                below(
                    "P2-CS3 error",
                    found[enough].max(),
                    1e-3,
                    f"largest recovery error of {last} where N ≥ N_min; {where}",
                )  # fmt: skip
            )
            good = np.flip(np.logical_and.accumulate(np.flip(found < 1e-3, 1), 1), 1)
            measured[name] = np.array([first(samples, row) for row in good])
        away = np.abs(errors["flow"] - bias).max()
        checks.append(
            below("P2-CS3 LASSO", away, 1e-6, "|error of the flow − that of the LASSO|")
        )
        if "projected" in methods:
            row = below("P2-CS3 fit", first_fit, 1e-10, "train error after one step")
            checks.append(row)
        fig, axes = panels(len(errors))
        for ax, (name, found) in zip(axes, errors.items(), strict=True):
            for s, row, colour in zip(sparsities, found, COLOURS, strict=False):
                ax.plot(samples, row, "o-", color=colour, label=f"s = {s}")
            for n, colour in zip(least, COLOURS, strict=False):
                ax.axvline(n, color=colour, ls=":", lw=1)
            title = f"{name} (dotted: N that basis pursuit needs)"
            finish(ax, title, "measurements N", "recovery error", log="y")
        dims = ("s", "N")
        data = xr.Dataset(
            {
                **{f"error_{k}": (dims, v) for k, v in errors.items()},
                "basis_pursuit": (dims, oracle),
                "lasso": (dims, bias),
            },
            coords={"s": list(sparsities), "N": list(samples)},
        )
        numbers = {"n_min_oracle": least, "n_min": measured}
        return Outcome(numbers, checks, data, {"samples": fig})


def first(samples: tuple[int, ...], good: np.ndarray) -> int:
    """The least N from which all are good; one more than the largest if none is."""
    return int(samples[int(good.argmax())]) if good.any() else samples[-1] + 1


@dataclasses.dataclass(frozen=True)
class CS4(Settings):
    """Figure 24: from the start to the least squares solution, and on to the sparse."""

    features: int = 100
    sparsity: int = 5
    samples: tuple[int, ...] = (10, 20, 30, 40, 50, 60, 70, 80, 90, 100)
    alpha: float = 0.1
    beta: float = 1e-5
    zeta: float = 1e-6
    steps: int = 10**6

    def run(self) -> Outcome:
        samples = self.samples[1:7:2] if self.quick else self.samples
        fig, (ax, off) = panels(2)
        arrays: dict[str, Any] = {}
        near_fit, ends, recovered = [], [], []
        at = steps_until(self.steps, 257)
        for n, colour in zip(bar(samples, "N"), COLOURS * 2, strict=False):
            one = gf.tasks.sparse_recovery(
                jr.key(self.seed),
                features=self.features,
                sparsity=self.sparsity,
                samples=n,
                scale=self.zeta,
            )
            task, truth = padded(one, self.features), one.truth
            path = gf.descent(
                task.flow,
                task.model,
                weight_decay=self.beta,
                learning_rate=self.alpha,
                at=at,
                metrics=task.metrics,
            )
            a = np.asarray(path.params.weights)
            on = np.asarray(truth.target != 0)
            u, v = (np.linalg.norm(a[:, mask], axis=1) for mask in (on, ~on))
            fit = np.asarray(truth.least_squares())
            ax.plot(u, v, color=colour, lw=1.4, label=f"N = {n}")
            ax.plot(
                np.linalg.norm(fit[on]), np.linalg.norm(fit[~on]), "s", color=colour
            )
            off.plot(at[1:], v[1:], color=colour)
            near_fit.append(min(relative(w, fit) for w in a))
            sparse = truth.recovers_target()
            goal = truth.target if sparse else truth.end_point()
            ends.append(relative(a[-1], goal))
            recovered.append(sparse)
            arrays[f"u_{n}"], arrays[f"v_{n}"] = ("time", u), ("time", v)
        ax.plot(np.linalg.norm(np.asarray(truth.target)), 0, "k*", ms=12, label="$a^*$")
        words = "$\\|a_I\\|$ and $\\|a_{I^c}\\|$ (squares: least squares)"
        finish(ax, words, "on the support", "off the support", log="")
        finish(off, "off the support", y="$\\|a_{I^c}\\|$")
        # As N → n the least σ² of X falls to zero, and the fit takes until the drift.
        half = self.features // 2
        inner = [d for d, n in zip(near_fit, samples, strict=True) if n <= half]
        each = ", ".join(
            f"{n}: {d:.1g}" for n, d in zip(samples, near_fit, strict=True)
        )
        last, sparse = np.array(ends), np.array(recovered)
        checks = [
            below(
                "P2-CS4 fit", max(inner), 1e-2,
                f"paths with N ≤ n/2 pass by X⁺y, N and relative distance: {each}",
            ),
            below(
                "P2-CS4 end", last[sparse].max(), 1e-2,
                f"and end at a* where basis pursuit does, {sparse.sum()} of "
                f"{len(samples)}",
            ),
            check(
                "P2-CS4 end", last[~sparse].max(initial=0), "–", None,
                "distance of the others from the least ℓ1 norm after as many steps",
            ),
        ]  # fmt: skip
        numbers = {"nearest_to_fit": near_fit, "end": ends, "recovers": recovered}
        return Outcome(numbers, checks, xr.Dataset(arrays), {"paths": fig})


@dataclasses.dataclass(frozen=True)
class CS5(Settings):
    """Figures 7 and 16: with ℓ2 alone and a large start the error falls late, but the
    target is not recovered: grokking without understanding."""

    features: int = 100
    sparsity: int = 5
    samples: int = 30
    snr: float = 1e8
    alpha: float = 0.1
    beta: float = 1e-5
    zeta: float = 10.0
    steps: int = 10**8
    """What the flow runs to, t = α · steps; a descent checks the first 3 % of it."""

    def run(self) -> Outcome:
        task = gf.tasks.sparse_recovery(
            jr.key(self.seed),
            features=self.features,
            sparsity=self.sparsity,
            samples=self.samples,
            snr=self.snr,
            scale=self.zeta,
        )
        l2 = gf.GradientFlow(task.loss)
        truth = task.truth
        end = self.alpha * self.steps
        path = gf.simulate(
            l2,
            task.model,
            weight_decay=self.beta,
            ts=jnp.concatenate([jnp.zeros(1), jnp.geomspace(1e-3, end, 257)]),
            metrics=task.metrics,
            rtol=1e-8,
        )
        print(path)
        few = self.steps * 3 // (1000 if self.quick else 100)
        descent = gf.descent(
            l2,
            task.model,
            weight_decay=self.beta,
            learning_rate=self.alpha,
            at=steps_until(few, 257),
            metrics=task.metrics,
        )
        closed = gf.tasks.LinearTruth(
            truth.features, truth.targets, truth.target, task.model.weights,
            curvature=1.0,
        )  # fmt: skip
        exact = np.asarray(closed.path(path.t, self.beta))
        same = lambda a: a
        traces = {
            "flow": trace(path, truth, self.alpha, same),
            "descent": trace(descent, truth, self.alpha, same),
        }
        one, other = traces["flow"], traces["descent"]
        unseen = float(truth.unseen())
        # While what is not seen of the start dwarfs what is known of the target.
        window = (one.t * self.beta > 0.01) & (one.l2 > 20 * np.linalg.norm(exact[-1]))
        slope = np.polyfit(one.steps[window], np.log(one.l2[window]), 1)[0]
        rate = slope / (-self.alpha * self.beta)
        plateau = one.test[np.searchsorted(one.t, 0.01 / self.beta)]
        checks = [
            below(
                "P2-CS5 flow", relative(one.a, exact), 1e-6, "against the closed form"
            ),
            near(
                "P2-CS5 error", one.test[-1], unseen, 1e-3,
                "recovery error at the end: ‖P a*‖/‖a*‖, P onto ker X",
            ),
            near("P2-CS5 slope", rate, 1.0, 0.01, "d log‖a‖/d step in units of −αβ"),
            below(
                "P2-CS5 steps",
                max(relative(a, closed.path(t, self.beta))
                    for t, a in zip(other.t[1:], other.a[1:], strict=True) if t > 100),
                self.alpha * self.beta * (1 + self.alpha * self.beta * few),
                "descent against the flow's closed form, t > 100; bound αβ(1 + s)",
            ),
            check(
                "P2-CS5 late", plateau / one.test[-1], "≥ 10",
                plateau >= 10 * one.test[-1],
                "fall of the recovery error in the drift: what looks like grokking",
            ),
        ]  # fmt: skip
        numbers = {"unseen": unseen, "end": one.test[-1], "after_fit": plateau}
        # The norm halves when s = ln 2: the middle of the fall on a linear axis.
        times = {"$t_1$": path.crossing_time("train") / self.alpha}
        figure = story(traces, np.asarray(truth.target), times, "P2-CS5, ℓ2 only")
        figure.axes[0].set_ylim(1e-6, 1e4)
        return Outcome(numbers, checks, dataset(traces), {"story": figure})


EXPERIMENTS = {"cs3": CS3, "cs4": CS4, "cs5": CS5}
