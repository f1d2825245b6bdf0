"""The compiled loop of a descent, and the verdict on it."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Scalar

from .._typing import Schedule
from ..flow.decay import decay_of, InSlowTime
from ..flow.term import Flat, FlowTerm, OfStretched, Sphere, Stretched, Tangential
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
from .until import AbstractCriterion, Here


class Descend(eqx.Module):
    """One descent, checked: all that `descend` needs to know."""

    term: FlowTerm
    params: PyTree
    """Where it starts."""
    weight_decay: Scalar | Schedule | InSlowTime
    learning_rate: Scalar | Scheduled
    numbers: Int[Array, " saves"]
    """After how many steps to save; the last is its end."""
    watched: dict[str, Metric]
    method: Method = eqx.field(static=True)
    optimiser: Optimiser
    batch_size: int | None = eqx.field(static=True)
    key: PRNGKeyArray | None
    """Of the minibatches."""
    until: AbstractCriterion | None = None
    """When it is to end before."""
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
    met: Bool[Array, ""]
    """Whether what it is to run `until` has come."""
    clocks: Float[Array, " 2"] | None
    """t and s, where the weight decay is on a schedule."""


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
        near = numbers[jnp.minimum(place, count - 1)] <= last
        return (place < count) & (near | done.state.met)

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
    step is taken as if it were free, and the result rescaled; where θ has rates, it is
    multiplied by them."""

    run: Descend
    term: FlowTerm
    """Of which the state is θ itself."""
    sphere: Sphere | None
    rated: Stretched | None
    optimiser: DescentOptimiser
    project: Projection | None

    @classmethod
    def of(cls, run: Descend) -> "_Descent":
        term, chart, penalty = run.term, run.term.chart, run.term.penalty
        if isinstance(penalty, Tangential | OfStretched):
            # That of θ itself, not of the state that makes it.
            term = FlowTerm(term.loss, penalty.penalty, Flat(chart.static))
        rated = chart if isinstance(chart, Stretched) else None
        project = None
        if run.method == "projected":
            project = projection(run.term, run.params)
        return cls(
            run=run,
            term=term,
            sphere=chart if isinstance(chart, Sphere) else None,
            rated=rated,
            optimiser=as_optimiser(
                run.optimiser,
                run.learning_rate,
                run.params,
                rated=rated is not None,
            ),
            project=project,
        )

    def start(self) -> _State:
        run = self.run
        order = None
        if run.key is not None:
            order = epoch_order(self.term.loss, run.key, jnp.zeros((), int))
        params = run.params if self.rated is None else self.rated.place(run.params)
        memory = self.optimiser.made.init(params)
        clocks = jnp.zeros(2) if callable(run.weight_decay) else None
        return _State(params, memory, order, self.met(params, clocks), clocks)

    def decay(self, clocks: Float[Array, " 2"] | None) -> Scalar:
        """λ now."""
        lam, params = self.run.weight_decay, jax.tree.leaves(self.run.params)
        if not callable(lam):
            return lam
        assert clocks is not None
        t, s = clocks.astype(params[0].dtype)
        return lam(s) if isinstance(lam, InSlowTime) else decay_of(lam, t)

    def met(self, params: PyTree, clocks: Float[Array, " 2"] | None) -> Bool[Array, ""]:
        """Whether what it is to run `until` has come."""
        run, until = self.run, self.run.until
        if until is None:
            return jnp.array(False)
        term = run.term
        state = term.chart.state(params)

        def loss(p: PyTree) -> Scalar:
            return term.loss(term.model(p))

        here = Here(
            term=term,
            params=state,
            weight_decay=self.decay(clocks),
            metric=lambda name: run.watched[name](term.model(state)),
            gradient=lambda: jax.grad(loss)(state),
        )
        return until.holds(here) & ~lost(params)

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
        lam, clocks = self.decay(state.clocks), state.clocks
        if clocks is not None:
            s = clocks[1] + (h * lam).astype(clocks.dtype)
            t = clocks[0] + h.astype(clocks.dtype)
            if not isinstance(rate, Scheduled):  # without the rounding of a sum
                t = (i + 1).astype(clocks.dtype) * h.astype(clocks.dtype)
            clocks = jnp.stack([t, s])
        moved, memory = self.move(loss, state, h, lam, i)
        if self.sphere is not None:
            moved = self.sphere.place(moved)
        return _State(moved, memory, order, self.met(moved, clocks), clocks)

    def move(
        self, loss: Callable, state: _State, h: Scalar, lam: Scalar, i: Array
    ) -> tuple[PyTree, PyTree]:
        """The parameters after step number i, of size h, and the optimiser's memory."""
        run, term = self.run, self.term
        params, penalty = state.params, term.penalty

        def along(p, scale, v):
            return jax.tree.map(lambda a, b: a + scale * b, p, v)

        def rated(v: PyTree) -> PyTree:
            """G v."""
            rates = self.rated
            return v if rates is None else rates.place(rates.place(v))

        decay = -h * lam
        if self.project is not None:
            moved = along(params, decay, rated(penalty.gradient(params)))
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
        moved = optax.apply_updates(params, rated(update))
        if run.method == "decoupled":
            moved = along(moved, decay, rated(penalty.gradient(params)))
        if run.method == "proximal":
            moved = prox(penalty, moved, -decay)
        return moved, memory

    def until(self, done: Descended, end: Array) -> Descended:
        """On to step number `end`, or until what it waits for has come; in blocks: what
        is lost after one ends it."""
        block = jnp.maximum(1, self.run.numbers[-1] // 200)

        def one_step(i: Array, state: _State) -> _State:
            return self.step(i, state)

        def steps_to(i: Array, stop: Array, state: _State) -> tuple[Array, _State]:
            if self.run.until is None:
                return stop, jax.lax.fori_loop(i, stop, one_step, state)
            return jax.lax.while_loop(
                lambda carry: (carry[0] < stop) & ~carry[1].met,
                lambda carry: (carry[0] + 1, self.step(*carry)),
                (i, state),
            )

        def block_of_steps(carry: tuple) -> tuple:
            i, state = carry
            # Blocks end at the same steps wherever a part begins.
            stop = jnp.minimum((i // block + 1) * block, end)
            nothing = lost(state.params)
            stop = jnp.where(nothing, end, stop)
            return steps_to(jnp.where(nothing, stop, i), stop, state)

        def unfinished(carry):
            return (carry[0] < end) & ~carry[1].met

        begin = done.steps, done.state
        i, state = jax.lax.while_loop(unfinished, block_of_steps, begin)
        return Descended(i, state, done.place, done.saved)

    def record(self, state: _State) -> PyTree:
        """The parameters, the metrics, F and R."""
        params, term = state.params, self.term
        model = term.model(params)
        seen = {name: metric(model) for name, metric in self.run.watched.items()}
        values = (params, seen, term.loss(model), term.penalty(params), state.clocks)
        nothing = lost(params)
        return jax.tree.map(lambda x: jnp.where(nothing, jnp.nan, x), values)


def lost(params: PyTree) -> Array:
    """Whether a descent has left the finite range, to which no step leads back. (Its
    norm, a sum of squares, would leave it before.)"""
    finite = [jnp.all(jnp.isfinite(p)) for p in jax.tree.leaves(params)]
    return ~jnp.all(jnp.stack(finite))


def _path(run: Descend, descent: _Descent, done: Descended) -> Path:
    models, seen, train_loss, penalty, clocks = done.saved
    decay, slow = run.weight_decay, None
    if callable(decay):
        passed, slow = clocks.T.astype(train_loss.dtype)
        # (Of a descent that ends at its start there is no mean.)
        mean = slow[-1] / jnp.where(passed[-1] > 0, passed[-1], 1)
        decay = jnp.where(passed[-1] > 0, mean, descent.decay(jnp.zeros(2)))
    # The parameters may grow, in any unit, but what is descended on may not.
    height = train_loss + decay * penalty
    # (From a minimum noise leads up, at once as far as it will lead in order.)
    start = height[:1] if run.noise is None else height[:2]
    most = jnp.max(jnp.abs(start)) / jnp.finfo(height.dtype).eps ** 0.5
    up = lost(done.state.params) | ~(height[-1] - height[0] <= most)
    up = up | ~jnp.isfinite(train_loss[-1])
    rate, met = run.learning_rate, done.state.met
    # What comes after its end is its end.
    numbers = jnp.where(met, jnp.minimum(run.numbers, done.steps), run.numbers)
    name = getattr(run.optimiser, "__name__", "an Optax optimiser")
    words = run.method if run.optimiser is optax.sgd else f"{run.method} with {name}"
    if isinstance(rate, Scheduled):
        words += ", on a schedule"
        t = rate.times
        if run.until is not None:
            t = jnp.where(run.numbers > numbers, rate.time(done.steps, run.numbers), t)
        steps = numbers[-1]
        mean = t[-1] / jnp.maximum(steps, 1).astype(t.dtype)
        mean = jnp.where(steps > 0, mean, rate(steps))
    else:
        t, mean = rate * numbers.astype(rate.dtype), rate
    ended = RESULTS.where(met, RESULTS.criterion_met, RESULTS.successful)
    return Path(
        t=t,
        weight_decay=decay,
        clock=slow,
        params=models,
        static=descent.term.static,
        metrics=seen,
        train_loss=train_loss,
        penalty=penalty,
        result=RESULTS.where(up, RESULTS.overshot, ended),
        stats=Stats(f"descent ({words})", numbers[-1], learning_rate=mean),
        watched=run.watched,
    )
