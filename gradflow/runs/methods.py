"""What the methods of `descent` are made of: rates, optimisers, the projection."""

import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree, Scalar

from .._checks import is_concrete, is_key, word
from .._typing import Given, Schedule
from ..flow.flat import FlatLoss, flatten_on
from ..flow.term import FlowTerm
from ..losses import SquaredError

Method = Literal["subgradient", "decoupled", "proximal", "projected"]
Optimiser: TypeAlias = (
    Callable[[Any], optax.GradientTransformation]
    | optax.GradientTransformation
    | optax.MultiSteps
)


class Scheduled(eqx.Module):
    """A learning rate that changes from step to step."""

    schedule: Schedule
    times: Float[Array, " saves"]
    """t = Σh at the saved steps."""

    def __call__(self, step: Int[Array, ""]) -> Scalar:
        with jax.numpy_dtype_promotion("standard"):
            # Optax counts in 32 bits, and so would divide in them.
            return jnp.asarray(self.schedule(step.astype(int)), self.times.dtype)

    def time(self, steps: Int[Array, ""], numbers: Int[Array, " saves"]) -> Scalar:
        """t after so many steps, `numbers` being those after which was saved: from the
        last of these on."""
        place = jnp.maximum(jnp.sum(numbers <= steps) - 1, 0)
        known = numbers[place] <= steps
        first = jnp.where(known, numbers[place], 0)
        some = jnp.arange(_AT_ONCE, dtype=numbers.dtype)

        def add(k: Array, t: Scalar) -> Scalar:
            these = first + k * _AT_ONCE + some
            return t + jnp.sum(jnp.where(these < steps, jax.vmap(self)(these), 0))

        begun = jnp.where(known, self.times[place], 0)
        blocks = -(-(steps - first) // _AT_ONCE)
        return jax.lax.fori_loop(jnp.zeros_like(blocks), blocks, add, begun)


_BLOCK = 2**16
_AT_ONCE = 2**10  # rates that are added up together, for their sum to be exact


def scheduled(schedule: Schedule, numbers: np.ndarray, dtype: DTypeLike) -> Scheduled:
    """The learning rate, and the times of the saved steps.

    **Raises:** `ValueError` for a schedule whose values are being traced.
    """
    with jax.ensure_compile_time_eval(), jax.numpy_dtype_promotion("standard"):
        rates = jax.jit(jax.vmap(lambda k: jnp.asarray(schedule(k), float)))
        times = np.zeros(len(numbers))
        begun = 0.0
        for first in range(0, int(numbers[-1]), _BLOCK):
            some = rates(first + jnp.arange(_BLOCK))
            if not is_concrete(some):
                raise ValueError(
                    "learning_rate: expected a schedule of known values, got one that "
                    "is being traced."
                )
            ends = begun + np.cumsum(np.asarray(some, float))
            here = (numbers > first) & (numbers <= first + _BLOCK)
            times[here] = ends[numbers[here] - first - 1]
            begun = ends[-1]
        return Scheduled(schedule, jnp.asarray(times, dtype))


def check_optimiser(optimiser: Given) -> None:
    """Raises `ValueError` for what is no optimiser, nor a function of a learning
    rate."""
    if isinstance(optimiser, optax.GradientTransformation | optax.MultiSteps):
        return
    if not callable(optimiser):
        raise ValueError(
            f"optimiser: expected one of Optax's, as optax.adam, got {word(optimiser)}."
        )
    name = getattr(optimiser, "__name__", "")
    if getattr(optimiser, "__module__", "").startswith("optax"):
        first = next(iter(inspect.signature(optimiser).parameters), "")
        if "learning_rate" not in first:
            raise ValueError(
                f"optimiser: optax.{name} is no function of a learning rate; give it "
                f"ready, as optax.{name}(…)."
            )


def as_optimiser(
    optimiser: Optimiser,
    learning_rate: Scalar | Scheduled,
    params: PyTree,
    *,
    rated: bool = False,
) -> "DescentOptimiser":
    """An optimiser that is given as a function of its learning rate, or ready. Where
    its updates are `rated`, one that knows their effect beforehand is none.

    **Raises:** `ValueError` where it has no update for such parameters.
    """
    if isinstance(optimiser, optax.MultiSteps):
        optimiser = optimiser.gradient_transformation()
    if not isinstance(optimiser, optax.GradientTransformation):
        optimiser = optimiser(learning_rate)
        if not isinstance(optimiser, optax.GradientTransformation):
            kind = type(optimiser).__name__
            raise ValueError(f"optimiser: expected one of Optax's, got {kind}.")
    made = optax.with_extra_args_support(optimiser)
    why: list[Exception] = []
    for names in ((),) if rated else _ASKED_FOR:
        one = DescentOptimiser(made, names)
        try:
            jax.eval_shape(one.try_on, params)
            return one
        except Exception as error:
            why.append(error)
    if rated:
        raise ValueError(
            "optimiser: expected one that asks for the gradient alone, for its step is "
            "multiplied by the rates of the flow, got: "
            + str(why[0]).strip().partition("\n")[0]
        ) from why[0]
    raise ValueError(
        "optimiser: expected one that makes updates of gradients like these parameters "
        "(and of value, grad and value_fn; or of obj_fn, or grad_fn), got: "
        + str(why[0]).strip().partition("\n")[0]
    ) from why[0]


_ASKED_FOR = (("value", "grad", "value_fn"), ("obj_fn",), ("grad_fn",))
"""What updates of Optax's want to know of the function that descends, beside its
gradient: line searches, Polyak's step, `reduce_on_plateau`, `momo`; `sophia`; `sam`.
Some take nothing else."""


class DescentOptimiser(NamedTuple):
    """An optimiser, and what its update wants to know."""

    made: optax.GradientTransformationExtraArgs
    asked: tuple[str, ...]

    def update(
        self,
        value_fn: Callable[[PyTree], Scalar],
        grad_fn: Callable[[PyTree], PyTree],
        state: PyTree,
        params: PyTree,
    ) -> tuple[PyTree, PyTree]:
        """The update for a function and its gradient, and the new state."""
        grads = grad_fn(params)
        known = {
            "value": lambda: value_fn(params),
            "grad": lambda: grads,
            "value_fn": lambda: value_fn,
            "obj_fn": lambda: value_fn,
            "grad_fn": lambda: lambda params, *_: grad_fn(params),
        }
        told = {name: known[name]() for name in self.asked}
        # Optax counts steps in integers, and mixes them with floats.
        with jax.numpy_dtype_promotion("standard"):
            updates, new = self.made.update(grads, state, params, **told)

        def like(old, new):
            return new if is_key(new) else jnp.asarray(new, old.dtype)

        return jax.tree.map(like, params, updates), jax.tree.map(like, state, new)

    def try_on(self, params: PyTree) -> PyTree:
        """The update from `params` of ½‖θ‖², or an error."""

        def size(p):
            return jnp.asarray(0.5 * sum(jnp.sum(x**2) for x in jax.tree.leaves(p)))

        moved, _ = self.update(size, lambda p: p, self.made.init(params), params)
        if jax.tree.map(jnp.shape, moved) != jax.tree.map(jnp.shape, params):
            raise ValueError("updates of another shape")
        return moved


class Projection(eqx.Module):
    """The orthogonal projection onto {z(θ) = y}, where z is affine:
    θ − J⁺(z(θ) − y); with rates G that in the metric G⁻¹."""

    flat: FlatLoss
    targets: Float[Array, " m"]
    inverse: Float[Array, "d m"]

    def __call__(self, params: PyTree) -> PyTree:
        chart = self.flat.chart
        theta, _ = ravel_pytree(chart.state(params))
        away = self.flat.outputs(theta) - self.targets
        return chart.place(self.flat.unravel(theta - self.inverse @ away))


def projection(term: FlowTerm, params: PyTree) -> Projection:
    """The projection onto the interpolants of a squared error.

    **Raises:** `ValueError` for another loss.
    """
    if not isinstance(term.loss, SquaredError):
        kind = type(term.loss).__name__
        raise ValueError(f"method: 'projected' needs a SquaredError, got {kind}.")
    theta, flat = flatten_on(term.loss, params, term.chart)
    targets = term.loss.y.reshape(-1)
    counts = term.loss.counted(jnp.ones_like(targets), 0.0)
    inverse = jnp.linalg.pinv(counts[:, None] * flat.jacobian(theta))
    return Projection(flat, targets, inverse)


def check_projection(
    term: FlowTerm, params: PyTree, optimiser: Given, batch_size: int | None
) -> None:
    """Raises where there is nothing to project onto."""
    if optimiser is not None or batch_size is not None:
        raise ValueError("method: 'projected' takes no optimiser and no minibatches.")
    theta, _ = ravel_pytree(params)
    miss = _miss(term, params)
    if is_concrete(miss) and not miss <= 1e5 * jnp.finfo(theta.dtype).eps:
        raise ValueError(
            "method: 'projected' needs outputs that are affine in the parameters, and "
            f"data that they can fit; the projection misses by {float(miss):.1g}."
        )


@eqx.filter_jit
def _miss(term: FlowTerm, params: PyTree) -> Scalar:
    """‖z(Πθ) − y‖/‖y‖, from a θ that is not the one at which J was taken."""
    theta, unravel = ravel_pytree(params)
    away = jnp.cos(jnp.arange(theta.size, dtype=theta.dtype))
    project = projection(term, params)
    on = project(unravel(theta + away * (1 + jnp.max(jnp.abs(theta)))))
    on, _ = ravel_pytree(term.chart.state(on))
    left = project.flat.outputs(on) - project.targets
    assert isinstance(term.loss, SquaredError)
    left = term.loss.counted(left, 0.0)
    size = jnp.linalg.norm(project.targets)
    return jnp.linalg.norm(left) / jnp.where(size > 0, size, 1.0)
