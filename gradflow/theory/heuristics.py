"""Rules of thumb for the two phases: widths, onset, radial law, transition time."""

import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from scipy.interpolate import CubicSpline

from .._checks import check_arguments, check_number, check_positive, word
from ..flow.flat import flatten
from ..flow.flow import check_flow, check_free, GradientFlow
from ..metrics import Metric
from ..runs.crossing import crossing_time
from ..runs.path import check_path, Path
from .second_order import Point
from .two_phase import TwoPhase


class Widths(eqx.Module):
    """How long plateau and drop of a metric are, on the logarithmic clock."""

    plateau: float
    """ln(t₁₀/t_memorised); as λ → 0 it grows as ln(1/λ)."""
    drop: float
    """ln(t₉₀/t₁₀), which does not depend on λ."""
    begin: float
    """t₁₀, the time at which 10 % of the fall is done."""
    end: float
    """t₉₀, the time at which 90 % is."""


def widths(path: Path, *, train: str = "train", test: str = "test") -> Widths:
    """The widths in ln t of the plateau between memorisation and grokking, and of the
    drop that ends it.

    The fall is that of the value, not of its logarithm (which has no end where a metric
    tends to zero): from where the metric is when `train` passes its threshold, to the
    last saved time; the drop is its part from 10 % to 90 %.

    **Arguments:**

    - `path`: with the two metrics, `train` with a threshold, run to where `test` has
        come to rest.
    - `train`, `test`: their names.

    **Returns:** a `Widths`; NaN where the path never memorises, or did at once.

    **Raises:** `ValueError` for a metric that the path does not have, or that is no
    single number.

    Source: Boursier, Pesme, Dragomir, arXiv 2505.20172, section 4: the drop is not
    sudden, it lasts as long on the logarithmic clock whatever λ.
    """
    check_path(path)
    for name in (train, test):
        if name not in path.metrics:
            raise ValueError(
                f"path: has no metric {name!r}, only {list(path.metrics)}."
            )
        if (shape := path.metrics[name].shape[1:]) != ():
            raise ValueError(
                f"path: expected one number for the metric {name!r}, got an array of "
                f"shape {shape}."
            )
    t, values = np.asarray(path.t), np.asarray(path.metrics[test])
    memorised = path.crossing_time(train)
    if not memorised > 0:
        return Widths(np.nan, np.nan, np.nan, np.nan)
    plateau, last = np.interp(memorised, t, values), values[-1]
    rises = bool(last > plateau)
    begin, end = (
        _crossing(t, values, float(plateau + share * (last - plateau)), rises)
        for share in (0.1, 0.9)
    )
    return Widths(
        float(np.log(begin / memorised)), float(np.log(end / begin)), begin, end
    )


class Onset(eqx.Module):
    """When the phases end and begin, by the size of the two forces."""

    t_gf: float
    """The time from which ‖∇F‖ ≤ ε‖∇F(θ₀)‖."""
    t_wd: float
    """The time from which ‖∇F‖ ≤ λ‖∇R‖."""
    balance: float
    """‖∇F(θ₀)‖/‖∇R‖, with ∇R at the end of the path: grokking asks for λ far below."""


def onset(flow: GradientFlow, path: Path, *, share: float = 0.01) -> Onset:
    """The times t_GF and t_WD: ‖∇F(θ)‖ = ε‖∇F(θ₀)‖ and ‖∇F(θ)‖ = λ‖∇R(θ)‖.

    With R = ½‖θ‖² the latter is λ‖θ‖. On the critical manifold ∇F balances the normal
    part of λ∇R alone, and is smaller than λ‖∇R‖: so t_WD ~ ln(1/λ)/η is where the fast
    phase has come down to the drift, not where the drift has gone far.

    **Arguments:**

    - `flow`: the flow.
    - `path`: a path of it, with λ > 0.
    - `share`: ε.

    **Returns:** an `Onset`, its times in t; NaN where they are not reached.

    **Raises:** `ValueError` where λ = 0, and for other arguments that make no sense.

    Source: Boursier, Pesme, Dragomir, arXiv 2505.20172, appendix E.
    """
    check_flow(flow)
    check_path(path)
    check_arguments(share=share)
    if not float(path.weight_decay) > 0:
        raise ValueError("path: expected one with weight decay.")
    bare = dataclasses.replace(path, again=None)  # which is another one each time
    force, decay = (np.asarray(x) for x in _forces(flow, bare))
    return Onset(
        t_gf=_crossing(path.t, force / force[0], share),
        t_wd=_crossing(path.t, force / (float(path.weight_decay) * decay), 1.0),
        balance=float(force[0] / decay[-1]),
    )


def _crossing(
    t: Array | np.ndarray, values: np.ndarray, level: float, rises: bool = False
) -> float:
    """When `values` have passed a level for good, from above unless they rise."""
    metric = Metric(lambda model: model, threshold=level, higher_is_better=rises)
    return crossing_time(t, values, metric)


@eqx.filter_jit
def _forces(flow: GradientFlow, path: Path) -> tuple[Array, Array]:
    def at(params):
        theta, loss = flatten(flow.loss, params, path.static)
        size = optax.tree.norm(flow.penalty.gradient(params))
        return jnp.linalg.norm(loss.gradient(theta)), size

    return jax.lax.map(at, path.params)


class RadialLaw(eqx.Module):
    """How the norm falls along the drift, by itself and by its law."""

    slow_time: Float[np.ndarray, " n"]
    """s, at the nodes of the drift."""
    log_norm: Float[np.ndarray, " n"]
    """ln ‖w(s)‖/‖w(0)‖."""
    integral: Float[np.ndarray, " n"]
    """∫₀ˢ of the right-hand side; equal to `log_norm` but for errors."""


def radial_law(flow: GradientFlow, theory: TwoPhase) -> RadialLaw:
    """The law d ln‖w‖/ds = −⟨ŵ, P∇R⟩/‖w‖, ŵ = w/‖w‖, along the drift; for R = ½‖θ‖² it
    is −‖Pŵ‖²: the norm falls by what of it is tangent. With `rates` G it is
    −⟨ŵ, P G∇R⟩/‖w‖.

    **Arguments:**

    - `flow`: the flow.
    - `theory`: that of it.

    **Returns:** a `RadialLaw` at the nodes of the drift, integrated by a cubic spline.

    **Raises:** `ValueError` where they are none, or the flow holds the norm.
    """
    check_free(flow)
    if not isinstance(theory, TwoPhase):
        raise ValueError(f"theory: expected a gradflow.TwoPhase, got {word(theory)}.")
    norm, rate = (np.asarray(x) for x in _radial(flow, theory))
    s = np.asarray(theory.drift.s)
    integral = CubicSpline(s, rate).antiderivative()(s)
    return RadialLaw(s, np.log(norm / norm[0]), integral)


@eqx.filter_jit
def _radial(flow: GradientFlow, theory: TwoPhase) -> tuple[Array, Array]:
    term, _ = flow.term(eqx.combine(theory.limit, theory.drift.static))

    def at(params):
        here = Point(term, term.chart.state(params), theory.spectrum)
        w, drift, roots = here.w, here.drift, term.chart.roots
        if roots is not None:
            w, drift = roots * w, roots * drift
        return jnp.linalg.norm(w), -(w @ drift) / (w @ w)

    return jax.lax.map(at, theory.drift.params)


def transition_time(scale: float, weight_decay: float) -> float:
    """t = (ln α)/λ: when a homogeneous network that starts from α θ̄, with a large α and
    an output of zero, leaves the interpolant of the kernel regime, along which
    θ ≈ α e^{−λt} θ̄.

    **Arguments:**

    - `scale`: α > 1.
    - `weight_decay`: λ > 0.

    **Returns:** the time t, exact to leading order in ln α.

    **Raises:** `ValueError` unless α > 1 and λ > 0.

    Source: Lyu, Jin, Li, Du, Lee, Hu, arXiv 2311.18817, theorems 3.1 and 3.3.
    """
    check_number(scale, "scale", "a number α > 1", lambda v: v > 1)
    check_positive(weight_decay, "weight_decay")
    return math.log(scale) / weight_decay
