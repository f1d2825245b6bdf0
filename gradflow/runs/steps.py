"""The compiled loop of a descent."""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int, PRNGKeyArray, PyTree, Scalar

from ..flow.term import FlowTerm, Sphere
from ..metrics import Metric
from ..results import RESULTS
from .methods import (
    as_optimiser,
    DescentOptimiser,
    Method,
    Optimiser,
    Projection,
    projection,
    Scheduled,
)
from .minibatch import epoch_order, minibatch
from .parts import strong
from .path import Path
from .problem import check_scalars


class _State(eqx.Module):
    """Where a descent is: `order` is that of the samples in this epoch."""

    params: PyTree
    optimiser: PyTree
    order: Int[Array, " n"] | None


class Descended(eqx.Module):
    """What a descent has done after some of its steps."""

    steps: Int[Array, ""]
    state: _State
    place: Int[Array, ""]
    """Of the next to save."""
    saved: PyTree


@eqx.filter_jit
def descend(*arguments: Any) -> Path:
    """`descent` without its checks and defaults; see `prepare_descent`."""
    return _descend(*arguments)[0]


@eqx.filter_jit
def descend_part(*arguments: Any) -> tuple[Path, Descended, Bool[Array, ""]]:
    """The first or the next part of it: with the state after the last one, or `None`,
    and a number of steps as two more arguments. Returns the path so far, the state, and
    whether that is all."""
    path, done = _descend(*arguments)
    return path, strong(done), done.place >= path.t.shape[0]


def _descend(
    term: FlowTerm,
    params: PyTree,
    weight_decay: Scalar,
    learning_rate: Scalar | Scheduled,
    numbers: Int[Array, " saves"],
    watched: dict[str, Metric],
    method: Method,
    optimiser: Optimiser,
    batch_size: int | None,
    key: PRNGKeyArray | None,
    progress: bool,
    before: Descended | None = None,
    steps: Int[Array, ""] | None = None,
) -> tuple[Path, Descended]:
    sphere = term.static if isinstance(term.static, Sphere) else None
    if sphere is not None:
        # The step is taken as if the norm were free, and the result rescaled.
        penalty: Any = term.penalty
        term = FlowTerm(term.loss, penalty.penalty, sphere.static)
    check_scalars(term.loss, watched, term.model(params))
    rate = learning_rate
    h = rate if isinstance(rate, Scheduled) else lambda _: rate
    t = rate.times if isinstance(rate, Scheduled) else rate * numbers.astype(rate.dtype)
    optax_one = as_optimiser(optimiser, rate, params)
    project = projection(term, params) if method == "projected" else None
    order = None if key is None else epoch_order(term.loss, key, jnp.zeros((), int))
    start = _State(params, optax_one.made.init(params), order)
    meter = diffrax.TqdmProgressMeter() if progress else diffrax.NoProgressMeter()
    block = jnp.maximum(1, numbers[-1] // 200)

    def step(i: Array, state: _State) -> _State:
        order = state.order
        if key is None or batch_size is None:
            loss = term.loss
        else:
            loss, order = minibatch(term.loss, order, key, i, batch_size)
        state = _step(
            term, loss, _State(state.params, state.optimiser, order),
            weight_decay, h(i), method, optax_one, project,
        )  # fmt: skip
        if sphere is None:
            return state
        return eqx.tree_at(lambda s: s.params, state, sphere.place(state.params))

    def lost(state: _State) -> Array:
        """Whether it has left the finite range, to which no step leads back. (Its norm,
        a sum of squares, would leave it before.)"""
        finite = [jnp.all(jnp.isfinite(p)) for p in jax.tree.leaves(state.params)]
        return ~jnp.all(jnp.stack(finite))

    def until(done: Descended, shown: PyTree, end: Array) -> tuple[Descended, PyTree]:
        def block_of_steps(carry):
            i, state, shown = carry
            # Blocks end at the same steps wherever a part begins.
            stop = jnp.minimum((i // block + 1) * block, end)
            stop = jnp.where(lost(state), end, stop)
            state = jax.lax.fori_loop(
                jnp.where(lost(state), stop, i), stop, step, state
            )
            shown = meter.step(shown, stop / numbers[-1])
            return stop, state, shown

        carry = (done.steps, done.state, shown)
        unfinished = lambda carry: carry[0] < end
        i, state, shown = jax.lax.while_loop(unfinished, block_of_steps, carry)
        return Descended(i, state, done.place, done.saved), shown

    def record(state: _State) -> PyTree:
        params = state.params
        model = term.model(params)
        seen = {name: metric(model) for name, metric in watched.items()}
        values = (params, seen, term.loss(model), term.penalty(params))
        nothing = lost(state)
        return jax.tree.map(lambda x: jnp.where(nothing, jnp.nan, x), values)

    def until_next_save(carry: tuple) -> tuple:
        done, shown = carry
        done, shown = until(done, shown, numbers[done.place])
        put = lambda all, x: all.at[done.place].set(x)
        saved = jax.tree.map(put, done.saved, record(done.state))
        return Descended(done.steps, done.state, done.place + 1, saved), shown

    zero, count = jnp.zeros_like(numbers[0]), numbers.shape[0]
    if before is None:
        empty = lambda x: jnp.full((count, *x.shape), jnp.nan, x.dtype)
        none = jax.tree.map(empty, jax.eval_shape(record, start))
        before = Descended(zero, start, zero, none)
    last = numbers[-1]
    if steps is not None:
        last = jnp.minimum(before.steps + steps.astype(last.dtype), last)

    def more(carry: tuple) -> Array:
        place = carry[0].place
        return (place < count) & (numbers[jnp.minimum(place, count - 1)] <= last)

    with jax.default_matmul_precision("highest"):
        done, shown = jax.lax.while_loop(more, until_next_save, (before, meter.init()))
        if steps is not None:
            done, shown = until(done, shown, last)
    meter.close(shown)
    models, seen, train_loss, penalty = done.saved
    # The parameters may grow, in any unit, but what is descended on may not.
    height = train_loss + weight_decay * penalty
    most = jnp.abs(height[0]) / jnp.finfo(height.dtype).eps ** 0.5
    up = lost(done.state) | ~(height[-1] - height[0] <= most)
    up = up | ~jnp.isfinite(train_loss[-1])
    result = RESULTS.where(up, RESULTS.overshot, RESULTS.successful)
    name = getattr(optimiser, "__name__", "an Optax optimiser")
    words = method if optimiser is optax.sgd else f"{method} with {name}"
    if isinstance(rate, Scheduled):
        words += ", on a schedule"
    path = Path(
        t=t,
        weight_decay=weight_decay,
        params=models,
        static=term.static,
        metrics=seen,
        train_loss=train_loss,
        penalty=penalty,
        result=result,
        stats={
            "solver": f"descent ({words})",
            # On a schedule, its mean.
            "learning_rate": t[-1] / numbers[-1].astype(t.dtype)
            if isinstance(rate, Scheduled)
            else rate,
            "steps": numbers[-1],
        },
        watched=watched,
    )
    return path, done


def _step(
    term: FlowTerm,
    loss: Callable,
    state: _State,
    weight_decay: Scalar,
    learning_rate: Scalar,
    method: Method,
    optimiser: DescentOptimiser,
    project: Projection | None,
) -> _State:
    params, penalty = state.params, term.penalty
    along = lambda p, scale, v: jax.tree.map(lambda a, b: a + scale * b, p, v)
    decay = -learning_rate * weight_decay
    if project is not None:
        moved = along(params, decay, penalty.gradient(params))
        return _State(project(moved), state.optimiser, state.order)
    both = method == "subgradient"

    def value(p: PyTree) -> Scalar:
        size = loss(term.model(p))
        return size + weight_decay * penalty(p) if both else size

    def force(p: PyTree) -> PyTree:
        slope = jax.grad(lambda p: loss(term.model(p)))(p)
        return along(slope, weight_decay, penalty.gradient(p)) if both else slope

    update, memory = optimiser.update(value, force, state.optimiser, params)
    moved = optax.apply_updates(params, update)
    if method == "decoupled":
        moved = along(moved, decay, penalty.gradient(params))
    if method == "proximal":
        moved = penalty.prox(moved, -decay)
    return _State(moved, memory, state.order)
