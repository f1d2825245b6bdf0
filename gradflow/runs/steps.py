"""The compiled loop of a descent, and the verdict on it."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int, PRNGKeyArray, PyTree, Scalar

from ..flow.term import Flat, FlowTerm, Sphere, Tangential
from ..metrics import Metric
from ..penalties import prox
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
from .noise import Noise
from .parts import strong
from .path import Path
from .problem import check_values
from .stats import Stats


class Descend(eqx.Module):
    """One descent, checked: all that `descend` needs to know."""

    term: FlowTerm
    params: PyTree
    """Where it starts."""
    weight_decay: Scalar
    learning_rate: Scalar | Scheduled
    numbers: Int[Array, " saves"]
    """After how many steps to save; the last is its end."""
    watched: dict[str, Metric]
    method: Method = eqx.field(static=True)
    optimiser: Optimiser
    batch_size: int | None = eqx.field(static=True)
    key: PRNGKeyArray | None
    """Of the minibatches."""
    noise: Noise | None = None

    @property
    def saves(self) -> int:
        """How many times it saves."""
        return self.numbers.shape[0]


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
def descend(run: Descend) -> Path:
    """A descent from its start to its end."""
    return _descend(run)[0]


@eqx.filter_jit
def descend_part(
    run: Descend, before: Descended | None, steps: Int[Array, ""]
) -> tuple[Path, Descended, Bool[Array, ""]]:
    """So many `steps` of a descent, from its start (`None`) or from where the last part
    ended. Returns the path so far, the new state, and whether that is all."""
    path, done = _descend(run, before, steps)
    return path, strong(done), done.place >= path.t.shape[0]


def _descend(
    run: Descend, before: Descended | None = None, steps: Int[Array, ""] | None = None
) -> tuple[Path, Descended]:
    check_values(run.term.loss, run.watched, run.term.model(run.params))
    descent = _Descent.of(run)
    numbers = run.numbers
    zero, count = jnp.zeros_like(numbers[0]), run.saves
    if before is None:
        start = descent.start()

        def empty(x):
            return jnp.full((count, *x.shape), jnp.nan, x.dtype)

        none = jax.tree.map(empty, jax.eval_shape(lambda s: descent.record(s), start))
        before = Descended(zero, start, zero, none)
    last = numbers[-1]
    if steps is not None:
        last = jnp.minimum(before.steps + steps.astype(last.dtype), last)

    def more(done: Descended) -> Array:
        place = done.place
        return (place < count) & (numbers[jnp.minimum(place, count - 1)] <= last)

    def until_next_save(done: Descended) -> Descended:
        done = descent.until(done, numbers[done.place])

        def put(all, x):
            return all.at[done.place].set(x)

        saved = jax.tree.map(put, done.saved, descent.record(done.state))
        return Descended(done.steps, done.state, done.place + 1, saved)

    with jax.default_matmul_precision("highest"):
        done = jax.lax.while_loop(more, until_next_save, before)
        if steps is not None:
            done = descent.until(done, last)
    return _path(run, descent, done), done


class _Descent(eqx.Module):
    """What a descent does, made of what it is asked. Where the norm of θ is held, a
    step is taken as if it were free, and the result rescaled."""

    run: Descend
    term: FlowTerm
    sphere: Sphere | None
    optimiser: DescentOptimiser
    project: Projection | None

    @classmethod
    def of(cls, run: Descend) -> "_Descent":
        term, sphere = run.term, None
        if isinstance(term.chart, Sphere):
            sphere, penalty = term.chart, term.penalty
            assert isinstance(penalty, Tangential)
            # That of θ itself, not of the point that the sphere makes it.
            term = FlowTerm(term.loss, penalty.penalty, Flat(sphere.static))
        return cls(
            run=run,
            term=term,
            sphere=sphere,
            optimiser=as_optimiser(run.optimiser, run.learning_rate, run.params),
            project=projection(term, run.params) if run.method == "projected" else None,
        )

    def start(self) -> _State:
        run = self.run
        order = None
        if run.key is not None:
            order = epoch_order(self.term.loss, run.key, jnp.zeros((), int))
        return _State(run.params, self.optimiser.made.init(run.params), order)

    def step(self, i: Array, state: _State) -> _State:
        """Step number i."""
        run, order, loss = self.run, state.order, self.term.loss
        rate = run.learning_rate
        h = rate(i) if isinstance(rate, Scheduled) else rate
        key, size, noise = run.key, run.batch_size, run.noise
        if noise is not None:
            loss = noise.loss(loss, self.term.model(state.params), i)
        if key is not None and size is not None and order is not None:
            loss, order = minibatch(loss, order, key, i, size)
        moved, memory = self.move(loss, state, h, i)
        if self.sphere is not None:
            moved = self.sphere.place(moved)
        return _State(moved, memory, order)

    def move(
        self, loss: Callable, state: _State, h: Scalar, i: Array
    ) -> tuple[PyTree, PyTree]:
        """The parameters after step number i, of size h, and the optimiser's memory."""
        run, term = self.run, self.term
        params, penalty, lam = state.params, term.penalty, run.weight_decay

        def along(p, scale, v):
            return jax.tree.map(lambda a, b: a + scale * b, p, v)

        decay = -h * lam
        if self.project is not None:
            moved = along(params, decay, penalty.gradient(params))
            return self.project(moved), state.optimiser
        both = run.method == "subgradient"

        def value(p: PyTree) -> Scalar:
            size = loss(term.model(p))
            return size + lam * penalty(p) if both else size

        def force(p: PyTree) -> PyTree:
            slope = jax.grad(lambda p: loss(term.model(p)))(p)
            slope = slope if run.noise is None else run.noise.slope(slope, i)
            return along(slope, lam, penalty.gradient(p)) if both else slope

        update, memory = self.optimiser.update(value, force, state.optimiser, params)
        moved = optax.apply_updates(params, update)
        if run.method == "decoupled":
            moved = along(moved, decay, penalty.gradient(params))
        if run.method == "proximal":
            moved = prox(penalty, moved, -decay)
        return moved, memory

    def until(self, done: Descended, end: Array) -> Descended:
        """On to step number `end`, in blocks: what is lost after one ends it."""
        block = jnp.maximum(1, self.run.numbers[-1] // 200)

        def one_step(i: Array, state: _State) -> _State:
            return self.step(i, state)

        def block_of_steps(carry: tuple) -> tuple:
            i, state = carry
            # Blocks end at the same steps wherever a part begins.
            stop = jnp.minimum((i // block + 1) * block, end)
            stop = jnp.where(lost(state), end, stop)
            state = jax.lax.fori_loop(
                jnp.where(lost(state), stop, i), stop, one_step, state
            )
            return stop, state

        def unfinished(carry):
            return carry[0] < end

        begin = done.steps, done.state
        i, state = jax.lax.while_loop(unfinished, block_of_steps, begin)
        return Descended(i, state, done.place, done.saved)

    def record(self, state: _State) -> PyTree:
        """The parameters, the metrics, F and R."""
        params, term = state.params, self.term
        model = term.model(params)
        seen = {name: metric(model) for name, metric in self.run.watched.items()}
        values = (params, seen, term.loss(model), term.penalty(params))
        nothing = lost(state)
        return jax.tree.map(lambda x: jnp.where(nothing, jnp.nan, x), values)


def lost(state: _State) -> Array:
    """Whether a descent has left the finite range, to which no step leads back. (Its
    norm, a sum of squares, would leave it before.)"""
    finite = [jnp.all(jnp.isfinite(p)) for p in jax.tree.leaves(state.params)]
    return ~jnp.all(jnp.stack(finite))


def _path(run: Descend, descent: _Descent, done: Descended) -> Path:
    models, seen, train_loss, penalty = done.saved
    # The parameters may grow, in any unit, but what is descended on may not.
    height = train_loss + run.weight_decay * penalty
    # (From a minimum noise leads up, at once as far as it will lead in order.)
    start = height[:1] if run.noise is None else height[:2]
    most = jnp.max(jnp.abs(start)) / jnp.finfo(height.dtype).eps ** 0.5
    up = lost(done.state) | ~(height[-1] - height[0] <= most)
    up = up | ~jnp.isfinite(train_loss[-1])
    rate, numbers = run.learning_rate, run.numbers
    name = getattr(run.optimiser, "__name__", "an Optax optimiser")
    words = run.method if run.optimiser is optax.sgd else f"{run.method} with {name}"
    if isinstance(rate, Scheduled):
        words += ", on a schedule"
        t = rate.times
        mean = t[-1] / numbers[-1].astype(t.dtype)
    else:
        t, mean = rate * numbers.astype(rate.dtype), rate
    return Path(
        t=t,
        weight_decay=run.weight_decay,
        params=models,
        static=descent.term.static,
        metrics=seen,
        train_loss=train_loss,
        penalty=penalty,
        result=RESULTS.where(up, RESULTS.overshot, RESULTS.successful),
        stats=Stats(f"descent ({words})", numbers[-1], learning_rate=mean),
        watched=run.watched,
    )
