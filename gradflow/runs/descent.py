"""The discrete counterpart of the flow: gradient descent, with any Optax optimiser."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, PRNGKeyArray, PyTree, Scalar

from .._checks import (
    check_arguments,
    check_choice,
    check_given,
    check_one,
    is_concrete,
)
from .._typing import Given, Schedule
from ..flow.decay import DecaySchedule, InSlowTime
from ..flow.flow import check_flow, GradientFlow, scaled
from ..metrics import Metric
from ..results import named_wrong
from .methods import (
    check_optimiser,
    check_projection,
    Method,
    Optimiser,
    scheduled,
)
from .minibatch import check_batches
from .noise import as_noise
from .outcome import fail_unless_reached, recorded
from .path import Path
from .problem import as_metrics, check_problem
from .progress import Bar, run_in_parts
from .steps import Descend, descend, descend_part, Descended
from .times import check_decay, saved_steps
from .until import as_criterion, Until, words_of


def descent(
    flow: GradientFlow,
    model: PyTree,
    *,
    weight_decay: float | Scalar | Schedule | InSlowTime,
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
    label_noise: float | Scalar | None = None,
    gradient_noise: float | Scalar | None = None,
    key: PRNGKeyArray | None = None,
    metrics: dict[str, Callable | Metric] | None = None,
    until: Until | None = None,
    throw: bool = True,
    progress: bool = False,
) -> Path:
    """Descends F + λR from `model` in steps of size h, instead of flowing.

    With g = ∇F(θ), or its estimate from a minibatch, ∇R(θ) (at a kink the subgradient
    of least norm: sign(0) = 0), and U the update of the optimiser, −hg for plain
    gradient descent, a step of each method is

    - `"subgradient"`: θ ← θ + U(g + λ∇R);
    - `"decoupled"`: θ ← θ + U(g) − hλ∇R. With Adam and R = ½‖θ‖² this is AdamW
      (Loshchilov & Hutter, arXiv 1711.05101);
    - `"proximal"`: θ ← prox_{hλR}(θ + U(g)). With plain gradient descent and the ℓ1
      norm this is ISTA (Daubechies, Defrise, De Mol, 2004);
    - `"projected"`: θ ← Π(θ − hλ∇R), Π the orthogonal projection onto {z(θ) = y}: the
      squared error of a model that is linear in its parameters, without optimiser.

    A flow with `rates` G has a learning rate of its own for each layer: U is multiplied
    by G, hλ∇R too, and Π is orthogonal in the metric G⁻¹. (Optimisers that look at more
    than the gradient, as line searches, do not know of it and are refused, and so is
    `"proximal"`.)

    The clock is that of the flow: t = h · steps, and s = λt, for all methods. A plain
    gradient descent follows the flow to O(h); other optimisers follow flows of their
    own, for which t is a unit of account. On a schedule h differs from step to step,
    and t = Σh. (Where the decay is decoupled, R = ½‖θ‖² alone shrinks the parameters by
    e^{−s}, whatever the optimiser.)

    **Arguments:**

    - `flow`: the loss, the penalty and what is trainable. Where it holds the norm, each
        step is rescaled to it (step, then rescale: Liu, Michaud, Tegmark, arXiv
        2210.01117); not with `"projected"`.
    - `model`: the initial model θ₀.
    - `weight_decay`: λ ≥ 0; or a schedule, a function of t, or `gradflow.InSlowTime` of
        one of s, with `steps` or `at`. On a schedule s = Σhλ.
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
    - `label_noise`: each step has labels of its own. Of `SquaredError` and `Huber` they
        are y + σξ, ξ of standard normal numbers; of `CrossEntropy` each is with
        probability σ another one, any with the same chance, and of `Logistic` 1 − y.
        (Where the model fits the data this moves it along the manifold, towards
        smaller tr ∇²F: Blanc et al., arXiv 1904.09080.)
    - `gradient_noise`: σ; a step takes g + σξ instead of g, ξ of standard normal
        numbers. In time t that is a diffusion of variance hσ² in a unit of time, which
        vanishes with h; σ = (2T/h)^½ is the Langevin equation of temperature T,
        dθ = −∇F dt + (2T)^½ dW. (With minibatches it comes on top of theirs.)
    - `key`: of the minibatches and of all noise. What is drawn in a step depends on it
        and on the number of the step alone.
    - `metrics`: functions of the model, by name, that give a number or an array;
        `Metric` adds a threshold.
    - `until`: end after the first step at which a criterion holds, as for `simulate`;
        `path.stats.steps` is its number. It is computed after every step, of the model
        and all samples, whatever the minibatch; what a flow's θ' is at that model is
        the speed of `SteadyState`.
    - `throw`: raise if the descent overshoots: leaves the finite range, or ends at an
        F + λR larger by 1/√eps than it began; otherwise see `path.result`.
    - `progress`: show a progress bar (none while it is being traced).

    **Returns:** a `Path`, as `simulate` does. Its `train_loss` is that of all samples.

    **Raises:** `ValueError` for arguments that make no sense, before any compute;
    `NotImplementedError` where a proximal map is asked for that is not known;
    `RuntimeError` if the descent overshoots and `throw`.
    """
    check_flow(flow)
    check_one(weight_decay, "weight_decay")
    check_one(learning_rate, "learning_rate")
    wrong = check_arguments(
        learning_rate=learning_rate, init_scale=init_scale
    ) | check_given(label_noise=label_noise, gradient_noise=gradient_noise)
    if not callable(weight_decay):
        wrong = wrong | check_arguments(weight_decay=weight_decay)
    watched = as_metrics(metrics)
    run = prepare_descent(
        flow, model, watched, until, weight_decay=weight_decay,
        learning_rate=learning_rate, init_scale=init_scale, steps=steps,
        slow_time=slow_time, t1=t1, at=at, saves=saves, method=method,
        optimiser=optimiser, batch_size=batch_size, label_noise=label_noise,
        gradient_noise=gradient_noise, key=key,
    )  # fmt: skip
    if wrong is not False:  # then nothing is run
        none = jnp.where(wrong, 0, run.numbers)
        run = dataclasses.replace(run, numbers=none)
    arrays = jax.tree.leaves(eqx.filter((run, wrong), eqx.is_array))
    known = all(map(is_concrete, arrays))
    path = _descend_under_a_bar(run) if progress and known else descend(run)
    why = f"{method} steps were asked for"
    path = path.to_its_end().told(why=why, until=words_of(until))
    path = named_wrong(path, wrong, recorded)
    return fail_unless_reached(path, path) if throw else path


def _descend_under_a_bar(run: Descend) -> Path:
    def far(path: Path, done: Descended) -> tuple[float, str]:
        steps = int(done.steps)
        return steps / int(run.numbers[-1]), f"{steps} steps"

    with Bar("descent", shown=True) as bar:
        return run_in_parts(functools.partial(descend_part, run), None, bar, far)[0]


def prepare_descent(
    flow: GradientFlow,
    model: PyTree,
    watched: dict[str, Metric],
    until: Given = None,
    *,
    weight_decay: Given,
    learning_rate: Given,
    init_scale: Given,
    steps: Given,
    slow_time: float | None,
    t1: float | None,
    at: Given,
    saves: int,
    method: Given,
    optimiser: Given,
    batch_size: Given,
    key: PRNGKeyArray | None,
    label_noise: Given = None,
    gradient_noise: Given = None,
) -> Descend:
    """What is asked, checked."""
    check_choice(method, "method", get_args(Method))
    if optimiser is not None:
        check_optimiser(optimiser)
    model = scaled(model, init_scale, trainable=flow.trainable)
    term, params = flow.term(model)
    # A loss may well be computed in double precision for weights in single.
    check_problem(term, params, watched, mixed=True)
    if method == "proximal" and flow.rates is not None:
        raise ValueError(
            "method: 'proximal' has one step for all parameters, and the flow has rates"
            "; give 'subgradient' or 'decoupled'."
        )
    if method == "projected":
        if flow.hold_norm:
            raise ValueError("method: 'projected' cannot hold the norm as well.")
        check_projection(term, params, optimiser, batch_size)
        if not (label_noise is None and gradient_noise is None):
            raise ValueError("method: 'projected' has no gradient that could be noisy.")
    samples = check_batches(term.loss, batch_size, key)
    dtype = jax.tree.leaves(params)[0].dtype
    noise = as_noise(term.loss, key, label_noise, gradient_noise, dtype)
    if key is not None and samples is None and noise is None:
        raise ValueError(
            "key: it is for minibatches and noise; give batch_size, label_noise or "
            "gradient_noise too."
        )
    numbers = saved_steps(steps, slow_time, t1, at, saves, weight_decay, learning_rate)

    if callable(learning_rate):
        learning_rate = scheduled(learning_rate, numbers, dtype)
        times = learning_rate.times
    else:
        learning_rate = jnp.asarray(learning_rate, dtype)
        times = learning_rate * jnp.asarray(numbers).astype(dtype)
    if callable(weight_decay):
        schedule = weight_decay
        if isinstance(weight_decay, InSlowTime):  # of which the first s alone is known
            schedule, times = weight_decay.schedule, jnp.zeros(2, dtype)
        check_decay(DecaySchedule(schedule, jnp.zeros((), dtype)), times)
    return Descend(
        term=term,
        params=params,
        weight_decay=weight_decay
        if callable(weight_decay)
        else jnp.asarray(weight_decay, dtype),
        learning_rate=learning_rate,
        numbers=jnp.asarray(numbers),
        watched=watched,
        method=method,
        optimiser=optax.sgd if optimiser is None else optimiser,
        batch_size=batch_size if samples is not None else None,
        key=key if samples is not None else None,
        until=as_criterion(until, term, params, watched),
        noise=noise,
    )
