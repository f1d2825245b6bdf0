"""What ends a run early: a criterion, which is looked at after each of its steps."""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree, Scalar

from .._checks import check_from_zero, is_concrete, word
from .._host import as_array
from .._norms import as_vector, norm
from .._typing import Given
from ..flow.term import AbstractFlowTerm, FlowTerm
from ..metrics import Metric
from ..penalties import least_norm


class Here(NamedTuple):
    """Where a run is. What a criterion does not ask for is not computed."""

    term: AbstractFlowTerm
    params: PyTree
    weight_decay: Scalar
    metric: Callable[[str], Scalar]
    """The value of a metric, by its name: as it would be recorded."""
    gradient: Callable[[], PyTree]
    """∇F, in the state."""

    @property
    def size(self) -> Scalar:
        """‖θ‖."""
        return norm(self.term.chart.place(self.params))

    @property
    def slope(self) -> Scalar:
        """‖∇F(θ)‖."""
        force, roots = as_vector(self.gradient()), self.term.chart.roots
        return norm(force if roots is None else force / roots)

    @property
    def speed(self) -> Scalar:
        """‖θ'‖, that of the element of least norm of −∇F − λ∂R."""
        force, lam = self.gradient(), self.weight_decay
        rise = as_vector(least_norm(self.term.penalty, self.params, force, lam))
        roots = self.term.chart.roots
        return norm(rise if roots is None else rise * roots)


class AbstractCriterion(eqx.Module):
    """When a run is to end."""

    @abc.abstractmethod
    def holds(self, here: Here) -> Bool[Array, ""]:
        """Whether it does now."""

    @property
    @abc.abstractmethod
    def words(self) -> str:
        """What is to hold."""


class SmallGradient(AbstractCriterion):
    """`until` ‖∇F(θ)‖ ≤ tol, F the loss without its penalty.

    Where a penalty pulls it does not go to zero: along the drift ‖∇F‖ ~ λ‖∇R‖. (Of a
    flow that holds the norm it is the gradient along the sphere.)
    """

    tol: Scalar

    def __init__(self, tol: float | Scalar):
        """**Arguments:** `tol`: 0 or more, in units of F/θ.

        **Raises:** `ValueError` for anything else.
        """
        self.tol = _as_tol(tol)

    def holds(self, here: Here) -> Bool[Array, ""]:
        size = here.slope
        return size <= self.tol.astype(size.dtype)

    @property
    def words(self) -> str:
        return f"‖∇F‖ ≤ {_shown(self.tol)}"


class SteadyState(AbstractCriterion):
    """`until` ‖θ'‖ ≤ tol; with `slow=True` until ‖dθ/ds‖ ≤ tol ‖θ‖, s = λt.

    θ' = −∇F − λ∇R is as small as λ from the moment the data are fitted, long before the
    drift begins; the speed in slow time, relative to ‖θ‖, is small where the drift has
    come to rest (see `Path.slow_speed`). With a KKT solver ∇F is computed from the
    multiplier, to about the relative accuracy of the parameters; with others it is a
    small difference along the drift, known to about L · `rtol` · ‖θ‖, L the largest
    curvature of F, and no smaller speed is seen.
    """

    tol: Scalar
    slow: bool = eqx.field(static=True)

    def __init__(self, tol: float | Scalar, *, slow: bool = False):
        """**Arguments:**

        - `tol`: 0 or more, in units of θ/t; without a unit if `slow`.
        - `slow`: whether the speed is that in slow time, relative to ‖θ‖.

        **Raises:** `ValueError` for another `tol`.
        """
        self.tol, self.slow = _as_tol(tol), slow

    def holds(self, here: Here) -> Bool[Array, ""]:
        speed = here.speed
        tol = self.tol.astype(speed.dtype)
        if self.slow:
            tol = tol * here.weight_decay * here.size
        return speed <= tol

    @property
    def words(self) -> str:
        speed = "‖dθ/ds‖/‖θ‖" if self.slow else "‖θ'‖"
        return f"{speed} ≤ {_shown(self.tol)}"


class Passing(AbstractCriterion):
    """Until a metric passes its threshold, for the first time."""

    name: str = eqx.field(static=True)
    level: Scalar
    higher_is_better: bool = eqx.field(static=True)

    def holds(self, here: Here) -> Bool[Array, ""]:
        value = here.metric(self.name)
        return value >= self.level if self.higher_is_better else value <= self.level

    @property
    def words(self) -> str:
        return passing(self.name)


class Predicate(AbstractCriterion):
    """Until a function of the model says so."""

    fn: Callable[[Any], Any]

    def holds(self, here: Here) -> Bool[Array, ""]:
        return jnp.asarray(self.fn(here.term.model(here.params)))

    @property
    def words(self) -> str:
        name = getattr(self.fn, "__name__", type(self.fn).__name__)
        return f"{name}(model)"


Until: TypeAlias = str | AbstractCriterion | Callable[[Any], Any]
"""The name of a metric, a criterion, or a function of the model."""


def passing(name: str) -> str:
    """What is said of the criterion that metric `name` passes its threshold."""
    return f"{name} past its threshold"


def words_of(until: Until | None) -> str:
    """What is to hold; nothing where nothing is."""
    if until is None or isinstance(until, str):
        return "" if until is None else passing(until)
    return (until if isinstance(until, AbstractCriterion) else Predicate(until)).words


def as_criterion(
    until: Given, term: FlowTerm, params: PyTree, watched: dict[str, Metric]
) -> AbstractCriterion | None:
    """What was given as `until`, checked; `watched` are the metrics with their
    thresholds. Nothing is computed.

    **Raises:** `ValueError` for what is no criterion here.
    """
    if until is None or isinstance(until, AbstractCriterion):
        return until
    if isinstance(until, str):
        if until not in watched:
            raise ValueError(
                f"until: expected one of the metrics {list(watched)}, got {until!r}."
            )
        metric = watched[until]
        if metric.threshold is None:
            raise ValueError(
                f"until: the metric {until!r} has no threshold; give "
                "gradflow.Metric(fn, threshold=…)."
            )
        value = eqx.filter_eval_shape(metric.fn, term.model(params))
        level = _least_good(metric, value.dtype)
        return Passing(until, level, metric.higher_is_better)
    if not callable(until) or isinstance(until, type):
        raise ValueError(
            "until: expected the name of a metric, a function of the model, "
            f"gradflow.SmallGradient(tol) or gradflow.SteadyState(tol), got "
            f"{word(until)}."
        )
    try:
        out = eqx.filter_eval_shape(lambda p: until(term.model(p)), params)
    except jax.errors.ConcretizationTypeError as error:
        raise ValueError(
            "until: expected a function of the model that JAX can trace: no bool(), "
            "float() or if of what it computes."
        ) from error
    shape, kind = getattr(out, "shape", None), getattr(out, "dtype", None)
    if not (isinstance(out, bool) or (shape == () and kind == np.bool_)):
        got = type(out).__name__ if shape is None else f"{kind} of shape {shape}"
        raise ValueError(f"until: expected one boolean of the model, got {got}.")
    return Predicate(until)


def _least_good(metric: Metric, dtype: Any) -> Array:
    """The threshold in the precision of the metric, on its good side: what passes this
    passes the other."""
    assert metric.threshold is not None
    level, good = np.asarray(metric.threshold, dtype), -np.inf
    if metric.higher_is_better:
        good = np.inf
    away = float(level) - metric.threshold
    if away * good < 0:
        level = np.nextafter(level, np.asarray(good, dtype))
    return as_array(level, dtype)


def _as_tol(tol: Given) -> Array:
    check_from_zero(tol, "tol")
    with jax.ensure_compile_time_eval():  # inside of what is traced it is known, too
        return as_array(tol, None if hasattr(tol, "dtype") else float)


def _shown(tol: Scalar) -> str:
    return f"{float(tol):.3g}" if is_concrete(tol) else "tol"
