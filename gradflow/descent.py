"""The discrete counterpart of the flow: gradient descent, with any Optax optimiser."""

from collections.abc import Callable, Sequence
from typing import Any, get_args

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Int, PRNGKeyArray, PyTree, Scalar

from ._checks import (
    check_arguments,
    check_choice,
    check_integer,
    check_one,
    check_positive,
    is_concrete,
)
from ._descent_methods import (
    as_optimiser,
    check_optimiser,
    check_projection,
    DescentOptimiser,
    Method,
    Optimiser,
    Projection,
    projection,
    Schedule,
    Scheduled,
    scheduled,
)
from ._minibatch import check_batches, epoch_order, minibatch
from ._parts import strong
from .flow import check_flow, FlowTerm, GradientFlow, scaled, Sphere
from .metrics import Metric
from .path import Path
from .results import RESULTS
from .simulate import (
    as_metrics,
    check_problem,
    check_scalars,
    fail_unless_reached,
    named_wrong,
)


def descent(
    flow: GradientFlow,
    model: PyTree,
    *,
    weight_decay: float | Scalar,
    learning_rate: float | Scalar | Schedule,
    init_scale: float | Scalar = 1.0,
    steps: int | None = None,
    slow_time: float | None = None,
    t1: float | None = None,
    at: Sequence[int] | Int[Array | np.ndarray, " n"] | None = None,
    saves: int = 65,
    method: Method = "subgradient",
    optimiser: Optimiser | None = None,
    batch_size: int | None = None,
    key: PRNGKeyArray | None = None,
    metrics: dict[str, Callable | Metric] | None = None,
    throw: bool = True,
    progress: bool = False,
) -> Path:
    """Descends F + λR from `model` in steps of size h, instead of flowing.

    With G = ∇F(θ), or its estimate from a minibatch, H = ∇R(θ) (at a kink the
    subgradient of least norm: sign(0) = 0), and U the update of the optimiser, −hG for
    plain gradient descent, a step of each method is

    - `"subgradient"`: θ ← θ + U(G + λH);
    - `"decoupled"`: θ ← θ + U(G) − hλH. With Adam and R = ½‖θ‖² this is AdamW
      (Loshchilov & Hutter, arXiv 1711.05101);
    - `"proximal"`: θ ← prox_{hλR}(θ + U(G)). With plain gradient descent and the ℓ1
      norm this is ISTA (Daubechies, Defrise, De Mol, 2004);
    - `"projected"`: θ ← Π(θ − hλH), Π the orthogonal projection onto {z(θ) = y}: the
      squared error of a model that is linear in its parameters, without optimiser.

    The clock is that of the flow: t = h · steps, and s = λt, for all methods. A plain
    gradient descent follows the flow to O(h); other optimisers follow flows of their
    own, for which t is a unit of account. On a schedule h differs from step to step,
    and t = Σh. (Where the decay is decoupled, R = ½‖θ‖²
    alone shrinks the parameters by e^{−s}, whatever the optimiser.)

    **Arguments:**

    - `flow`: the loss, the penalty and what is trainable. Where it holds the norm, each
        step is rescaled to it (step, then rescale: Liu, Michaud, Tegmark, arXiv
        2210.01117); not with `"projected"`.
    - `model`: the initial model θ₀.
    - `weight_decay`: λ ≥ 0.
    - `learning_rate`: h > 0; or a schedule of Optax's, a function of the number of
        steps taken, with `steps` or `at`.
    - `init_scale`: the factor by which all initial parameters are multiplied. (A flow
        that holds the norm holds that of the scaled ones.)
    - `steps`, `slow_time`, `t1`, `at`: give one. Take so many steps; run to slow time
        s = λt, or to time t (to the nearest step); or take as many as the last of the
        given increasing numbers of steps, and save at each of them.
    - `saves`: how many steps are saved when `at` is not given: the first and the last,
        and between them evenly in the logarithm. Fewer where there are not as many.
    - `method`: what is done with the penalty, see above.
    - `optimiser`: an Optax optimiser as a function of its learning rate, `optax.adam`;
        or one that is ready, `optax.adam(1e-3)`, and then `learning_rate` is only what
        the clock and the penalty step take. `optax.sgd` unless given. What some ask
        for beside the gradient (line searches, Polyak's step, `reduce_on_plateau`) is
        that of F + λR for `"subgradient"`, and of F for the other methods; of the
        minibatch, where there is one.
    - `batch_size`: of minibatches, drawn anew each epoch without replacement (the last
        one of an epoch is filled up with its first samples). All samples unless given.
    - `key`: of the minibatches.
    - `metrics`: functions of the model, by name; `Metric` adds a threshold.
    - `throw`: raise if the descent overshoots: leaves the finite range, or ends at an
        F + λR larger by 1/√eps than it began; otherwise see `path.result`.
    - `progress`: show a progress bar.

    **Returns:** a `Path`, as `simulate` does. Its `train_loss` is that of all samples.

    **Raises:** `ValueError` for arguments that make no sense, before any compute;
    `NotImplementedError` where a proximal map is asked for that is not known;
    `RuntimeError` if the descent overshoots and `throw`.
    """
    check_flow(flow)
    check_one(weight_decay, "weight_decay")
    check_one(learning_rate, "learning_rate")
    wrong = check_arguments(
        weight_decay=weight_decay, learning_rate=learning_rate, init_scale=init_scale
    )
    args = prepare_descent(
        flow, model, as_metrics(metrics), weight_decay=weight_decay,
        learning_rate=learning_rate, init_scale=init_scale, steps=steps,
        slow_time=slow_time, t1=t1, at=at, saves=saves, method=method,
        optimiser=optimiser, batch_size=batch_size, key=key, progress=progress,
    )  # fmt: skip
    if wrong is not False:  # then nothing is run
        args = (*args[:4], jnp.where(wrong, 0, args[4]), *args[5:])
    path = named_wrong(descend(*args), wrong)
    path.stats["why"] = f"{method} steps were asked for"
    return fail_unless_reached(path, path) if throw else path


def prepare_descent(
    flow: GradientFlow,
    model: PyTree,
    watched: dict[str, Metric],
    *,
    weight_decay: Any,
    learning_rate: Any,
    init_scale: Any,
    steps: Any,
    slow_time: float | None,
    t1: float | None,
    at: Any,
    saves: int,
    method: Any,
    optimiser: Any,
    batch_size: Any,
    key: PRNGKeyArray | None,
    progress: bool = False,
) -> tuple:
    """The arguments of `descend`, checked."""
    check_choice(method, "method", get_args(Method))
    if optimiser is not None:
        check_optimiser(optimiser)
    model = scaled(model, init_scale, trainable=flow.trainable)
    term, params = flow.term(model)
    # A loss may well be computed in double precision for weights in single.
    check_problem(term, params, watched, mixed=True)
    if method == "projected":
        if flow.hold_norm:
            raise ValueError("method: 'projected' cannot hold the norm as well.")
        check_projection(term, params, optimiser, batch_size)
    samples = check_batches(term.loss, batch_size, key)
    numbers = _saved_steps(steps, slow_time, t1, at, saves, weight_decay, learning_rate)

    dtype = jax.tree.leaves(params)[0].dtype
    if callable(learning_rate):
        learning_rate = scheduled(learning_rate, numbers, dtype)
    else:
        learning_rate = jnp.asarray(learning_rate, dtype)
    return (
        term,
        params,
        jnp.asarray(weight_decay, dtype),
        learning_rate,
        jnp.asarray(numbers),
        watched,
        method,
        optax.sgd if optimiser is None else optimiser,
        batch_size if samples is not None else None,
        key if samples is not None else None,
        progress,
    )


_MOST_STEPS = 2**62  # of an integer of 64 bits


def _saved_steps(
    steps: Any,
    slow_time: float | None,
    t1: float | None,
    at: Any,
    saves: int,
    weight_decay: Any,
    learning_rate: Any,
) -> np.ndarray:
    """The numbers of steps after which to save."""
    lengths = dict(steps=steps, slow_time=slow_time, t1=t1, at=at)
    given = [name for name, value in lengths.items() if value is not None]
    if len(given) != 1:
        expected = "steps, slow_time, t1, at"
        raise ValueError(f"{expected}: give exactly one, got {given or 'none'}.")
    if at is not None:
        numbers = np.asarray(at)
        integers = numbers.ndim == 1 and np.issubdtype(numbers.dtype, np.integer)
        if not integers or numbers.size < 2:
            raise ValueError("at: expected a vector of two or more integers.")
        if numbers[0] < 0 or (np.diff(numbers) <= 0).any():
            raise ValueError("at: expected increasing numbers of steps from 0 on.")
        return numbers
    check_integer(saves, "saves", 3)
    for name, value in (("slow_time", slow_time), ("t1", t1)):
        if value is None:
            continue
        if callable(learning_rate):
            raise ValueError(
                f"{name}: give steps or at where learning_rate is a schedule."
            )
        if not is_concrete(learning_rate) or not is_concrete(weight_decay):
            raise ValueError(
                f"{name}: give steps where λ or learning_rate is being traced."
            )
        check_positive(value, name)
        if name == "slow_time" and weight_decay == 0:
            raise ValueError("slow_time: s = λt needs weight_decay > 0; give steps.")
        unit = float(learning_rate) * float(weight_decay if name == "slow_time" else 1)
        count = float(value) / unit if unit > 0 else np.inf
        if not count < _MOST_STEPS:
            raise ValueError(
                f"{name}: that would take {count:.3g} steps, more than can be counted; "
                "raise learning_rate."
            )
        steps = max(1, round(count))
    check_integer(steps, "steps", 1)
    return log_spaced_steps(int(steps), saves)


def log_spaced_steps(steps: int, saves: int = 65) -> np.ndarray:
    """0, and up to `saves` − 1 integers from 1 to `steps`, evenly in the logarithm as
    far as integers can be."""
    if saves > steps:
        return np.arange(steps + 1)
    few, many = saves - 1, 64 * saves
    spaced = lambda k: np.unique(np.rint(np.geomspace(1, steps, k)).astype(np.int64))
    # Where integers coincide, finer spacing makes up for those that are lost.
    while few < many:
        middle = (few + many) // 2
        if spaced(middle).size < saves - 1:
            few = middle + 1
        else:
            many = middle
    return np.concatenate([[0], spaced(few)])


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
