"""How many measurements, which path, and why ℓ2 misleads."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import xarray as xr
from matplotlib.figure import Figure

import gradflow as gf

from ..shared.figures import COLOURS, finish, panels
from ..shared.record import table, variables
from ..shared.rows import check, relative, Row
from ..shared.runs import steps_until
from .common import (
    dataset,
    descend,
    flow,
    from_there_on,
    least,
    METHODS,
    padded,
    Sparse,
    story,
    trace,
    traces_of,
)

SAMPLES = (10, 20, 30, 40, 50, 60, 70, 80, 90, 100)


@dataclasses.dataclass(frozen=True)
class CS3(Sparse):
    """Figures 12, 13, 27 and 28: sparser targets need fewer measurements.

    No files. Time: a quarter of an hour of a core; quick, two minutes.
    """

    sparsities: tuple[int, ...] = (1, 5, 10, 15)
    samples: tuple[int, ...] = SAMPLES
    steps: int = 10**6
    flow_slow_time: float = 100.0
    """How far flows are run, s = βt; the descents reach αβ · steps."""

    QUICK = dict(sparsities=sparsities[:2], samples=samples[::2])

    def compute(self) -> xr.Dataset:
        sparsities, samples = self.sparsities, self.samples
        methods = METHODS[1:2] if self.quick else METHODS
        at, end = [0, 1, self.steps // 10, self.steps], self.flow_slow_time / self.beta

        def cell(sparsity: int, n: int) -> dict[str, Any]:
            one = self.task(sparsity=sparsity, samples=n)
            truth, task = one.truth, padded(one, self.features)
            found = {
                "basis_pursuit": relative(truth.end_point(), truth.target),
                "lasso": relative(truth.lasso(self.beta), truth.target),
            }
            for method in methods:
                path = descend(task, self.alpha, self.beta, at, method)
                found[f"error_{method}"] = path.metrics["test"][-1]
                found["first_fit"] = path.metrics["train"][1]  # of the last: projected
            path = flow(task, self.beta, np.array([0.0, 0.1 * end, end]), 1e-6)
            return found | {"error_flow": path.metrics["test"][-1]}

        return table({"s": sparsities, "N": samples}, cell, "s, N")

    def judge(self, data: xr.Dataset) -> list[Row]:
        samples, errors = data.N.values, errors_of(data)
        recovers = data.basis_pursuit.values < 1e-6
        enough, few = from_there_on(recovers), least(samples, recovers)
        sentence = f"basis pursuit recovers from N = {few.tolist()} on, for s = "
        sentence += f"{data.s.values.tolist()}"
        rows = [check("N_min", np.diff(few).min(initial=0), "≥ 0", sentence)]
        for name, found in errors.items():
            late = int((found[enough] >= 1e-3).sum())
            last = "the flow" if name == "flow" else f"{name} descent"
            where = f"{late} of {enough.sum()} instances above" if late else "all below"
            own = least(samples, found < 1e-3).tolist()
            sentence = f"largest recovery error of {last} where N ≥ N_min; {where}; "
            sentence += f"its own N_min {own}"
            rows.append(check("error", found[enough].max(), "≤ 1e-3", sentence))
        away = np.abs(errors["flow"] - data.lasso.values).max()
        sentence = "|error of the flow − that of the LASSO|"
        rows.append(check("LASSO", away, "≤ 1e-6", sentence))
        if "projected" in errors:
            sentence = "train error of projected descent after one step"
            rows.append(check("fit", data.first_fit.max(), "≤ 1e-10", sentence))
        return rows

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        errors, samples = errors_of(data), data.N.values
        few = least(samples, data.basis_pursuit.values < 1e-6)
        fig, axes = panels(len(errors))
        for ax, (name, found) in zip(axes, errors.items(), strict=True):
            for s, row, n, colour in zip(
                data.s.values, found, few, COLOURS, strict=False
            ):
                ax.plot(samples, row, "o-", color=colour, label=f"s = {s}")
                ax.axvline(n, color=colour, ls=":", lw=1)
            title = f"{name} (dotted: N that basis pursuit needs)"
            finish(ax, title, "measurements N", "recovery error", log="y")
        return {"samples": fig}


def errors_of(data: xr.Dataset) -> dict[str, np.ndarray]:
    """Recovery errors of each method, for s and N."""
    names = [str(name) for name in data if str(name).startswith("error_")]
    return {name.removeprefix("error_"): data[name].values for name in names}


@dataclasses.dataclass(frozen=True)
class CS4(Sparse):
    """Figure 24: from the start to the least squares solution, and on to the sparse.

    No files. Time: forty seconds of a core; quick, ten.
    """

    samples: tuple[int, ...] = SAMPLES
    steps: int = 10**6

    QUICK = dict(samples=samples[1:7:2])

    def compute(self) -> xr.Dataset:
        at = steps_until(self.steps, 257)

        def cell(n: int) -> dict[str, Any]:
            one = self.task(samples=n)
            truth = one.truth
            path = descend(padded(one, self.features), self.alpha, self.beta, at)
            a, fit = np.asarray(path.params.weights), np.asarray(truth.least_squares())
            on, recovers = np.asarray(truth.target != 0), truth.recovers_target()
            norm = lambda a, part: np.linalg.norm(a[..., part], axis=-1)
            return {
                "norms": [norm(a, on), norm(a, ~on)],
                "fit": [norm(fit, on), norm(fit, ~on)],
                "target": np.linalg.norm(np.asarray(truth.target)),
                "nearest_to_fit": min(relative(w, fit) for w in a),
                "end": relative(a[-1], truth.target if recovers else truth.end_point()),
                "recovers": recovers,
            }

        return table({"N": self.samples}, cell, "N").assign(step=("norms_1", at))

    def judge(self, data: xr.Dataset) -> list[Row]:
        near, last = data.nearest_to_fit.values, data.end.values
        sparse, samples = data.recovers.values.astype(bool), data.N.values
        # As N → n the least σ² of X falls to zero, and the fit takes until the drift.
        inner = near[samples <= self.features // 2]
        each = ", ".join(f"{n}: {d:.1g}" for n, d in zip(samples, near, strict=True))
        return [
            check("fit", max(inner), "≤ 1e-2", "paths with N ≤ n/2 pass by X⁺y, N and "
                  f"relative distance: {each}"),
            check("end", last[sparse].max(), "≤ 1e-2", "and end at a* where basis "
                  f"pursuit does, {sparse.sum()} of {len(samples)}"),
            check("end", last[~sparse].max(initial=0), "",
                  "distance of the others from the least ℓ1 norm after as many steps"),
        ]  # fmt: skip

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        fig, (ax, off) = panels(2)
        for i, colour in zip(range(data.sizes["N"]), COLOURS * 2, strict=False):
            one = data.isel(N=i)
            ax.plot(*one.norms.values, color=colour, lw=1.4, label=f"N = {int(one.N)}")
            ax.plot(*one.fit.values, "s", color=colour)
            off.plot(one.step[1:], one.norms[1, 1:], color=colour)
        ax.plot(data.target.values[-1], 0, "k*", ms=12, label="$a^*$")
        words = "$\\|a_I\\|$ and $\\|a_{I^c}\\|$ (squares: least squares)"
        finish(ax, words, "on the support", "off the support", log="")
        finish(off, "off the support", y="$\\|a_{I^c}\\|$")
        return {"paths": fig}


@dataclasses.dataclass(frozen=True)
class CS5(Sparse):
    """Figures 7 and 16: with ℓ2 alone and a large start the error falls late, but the
    target is not recovered: grokking without understanding.

    No files. Time: a few seconds of a core, quick or not.
    """

    samples: int = 30
    snr: float = 1e8
    zeta: float = 10.0
    steps: int = 10**8
    """What the flow runs to, t = α · steps; a descent checks the first 3 % of it."""

    @property
    def few(self) -> int:
        """Steps of the descent."""
        return self.steps * 3 // (1000 if self.quick else 100)

    def compute(self) -> xr.Dataset:
        task = self.task(samples=self.samples, snr=self.snr)
        l2 = dataclasses.replace(task, penalty=gf.L2())
        truth, end = task.truth, self.alpha * self.steps
        ts = jnp.concatenate([jnp.zeros(1), jnp.geomspace(1e-3, end, 257)])
        path = gf.simulate(
            l2.flow, task.model, weight_decay=self.beta, metrics=task.metrics, ts=ts,
            rtol=1e-8,
        )  # fmt: skip
        print(path)
        descent = descend(l2, self.alpha, self.beta, steps_until(self.few, 257))
        closed = gf.tasks.LinearTruth(
            truth.features, truth.targets, truth.target, task.model.weights,
            curvature=1.0,
        )  # fmt: skip
        same = lambda a: a
        traces = {
            "flow": trace(path, truth, self.alpha, same),
            "descent": trace(descent, truth, self.alpha, same),
        }
        data = variables(
            target=truth.target,
            unseen=truth.unseen(),
            t1=path.crossing_time("train") / self.alpha,
            exact_flow=closed.path(path.t, self.beta),
            exact_descent=[closed.path(t, self.beta) for t in traces["descent"].t],
        )
        return data.merge(dataset(traces))

    def judge(self, data: xr.Dataset) -> list[Row]:
        one, other = traces_of(data).values()
        exact, also = data.exact_flow.values, data.exact_descent.values
        unit = self.alpha * self.beta
        # While what is not seen of the start dwarfs what is known of the target.
        window = (one.t * self.beta > 0.01) & (one.l2 > 20 * np.linalg.norm(exact[-1]))
        slope = np.polyfit(one.steps[window], np.log(one.l2[window]), 1)[0]
        plateau = one.test[np.searchsorted(one.t, 0.01 / self.beta)]
        late = np.flatnonzero(other.t > 100)
        apart = max(relative(other.a[i], also[i]) for i in late)
        bound = f"≤ {unit * (1 + unit * self.few):.2e}"
        end = f"{float(data.unseen):.10g} ± 1e-3"
        return [
            check("flow", relative(one.a, exact), "≤ 1e-6", "against the closed form"),
            check("error", one.test[-1], end,
                  "recovery error at the end: ‖P a*‖/‖a*‖, P onto ker X"),
            check("slope", -slope / unit, "1 ± 0.01", "d log‖a‖/d step in units of "
                  "−αβ"),
            check("steps", apart, bound,
                  "descent against the flow's closed form, t > 100; bound αβ(1 + s)"),
            check("late", plateau / one.test[-1], "≥ 10",
                  "fall of the recovery error in the drift: what looks like grokking"),
        ]  # fmt: skip

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        times = {"$t_1$": float(data.t1)}
        figure = story(traces_of(data), data.target.values, times, "ℓ2 only")
        # The norm halves when s = ln 2: the middle of the fall on a linear axis.
        figure.axes[0].set_ylim(1e-6, 1e4)
        return {"story": figure}


EXPERIMENTS = {"cs3": CS3, "cs4": CS4, "cs5": CS5}
