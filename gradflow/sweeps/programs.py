"""Lanes as programs: one by one, in loops on all devices, or in lockstep."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from .._checks import is_key
from ..runs.outcome import wants_another
from ..runs.parts import FIRST, in_part
from ..runs.path import Path
from ..runs.solve import Solve, solve, solve_part
from ..runs.steps import Descend, descend, descend_part
from .checkpoints import Checkpoints
from .recipe import Lane

Batch = Literal["loop", "vmap"]
_WHOLE: dict[type, Callable] = {Solve: solve, Descend: descend}
_PARTS: dict[type, Callable] = {Solve: solve_part, Descend: descend_part}
Launch = Callable[[list[Lane], int], Callable[[], list[Any]]]
"""Starts lanes as one program, or a few; what is returned waits for what they give."""


def run_lanes(
    lanes: Iterable[Lane | Exception],
    batch: Batch,
    size: int | None = None,
    tell: Callable[[int, Path | Exception, int], None] = lambda *_: None,
    *,
    catch: tuple[type[Exception], ...] = (Exception,),
    checkpoints: Checkpoints | None = None,
    given_up: Callable[[Lane, Path], None] = lambda *_: None,
) -> list[Path | Exception]:
    """Runs lanes; one that fails with an error of those in `catch` gives it instead of
    a path, and leaves the others as they are.

    With one device and `batch` "loop" they run one by one, as they come. Otherwise
    `size` of them at a time (`None`: all that are alike) are one program, in which each
    device has as many lanes, and loops over them or runs them in lockstep. While it
    runs the next lanes are made. `tell` is called with the place of a lane, its result,
    and the number of its device; `given_up` with a lane whose solver was only tried,
    and its path, before it begins anew. With `checkpoints` they run in parts, and go on
    from the file where there is one.
    """
    alone = batch == "loop" and jax.local_device_count() == 1
    launch: Launch = _alone if alone else functools.partial(_together, batch=batch)
    found: dict[int, Path | Exception] = {}
    running: list[tuple[list[int], Callable]] = []

    def collect(most: int) -> None:
        """Waits for programs until no more than `most` are left."""
        while len(running) > most:
            numbers, ended = running.pop(0)
            for k, (i, path) in enumerate(zip(numbers, ended(), strict=True)):
                found[i] = path
                tell(i, path, k % jax.local_device_count())

    for numbers, some, count in _programs(lanes, 1 if alone else size, found, tell):
        running.append(
            (numbers, _start(some, count, launch, catch, checkpoints, given_up))
        )
        collect(1)
    collect(0)
    return [found[i] for i in sorted(found)]


_POOL = 4
"""So many programs' lanes are sorted by cost: a program takes as long as its longest
loop. Their problems are in memory together."""


def _programs(
    lanes: Iterable[Lane | Exception],
    size: int | None,
    found: dict[int, Path | Exception],
    tell: Callable[[int, Path | Exception, int], None],
) -> Iterator[tuple[list[int], list[Lane], int]]:
    """The lanes that run as one program: their places, and for how many it is."""
    pools: dict[tuple, list[tuple[int, Lane]]] = {}
    for i, lane in enumerate(lanes):
        if isinstance(lane, Exception):
            found[i] = lane
            tell(i, lane, 0)
            continue
        if size == 1:
            yield [i], [lane], 1
            continue
        pool = pools.setdefault(_signature(lane), [])
        pool.append((i, lane))
        if size is not None and len(pool) == _POOL * size:
            while pool:
                yield _taken(pool, size)
    for pool in pools.values():
        most = size or len(pool)
        # A loop over a lane that is there to fill it costs as much as any other.
        while pool:
            yield _taken(pool, most)


def _taken(
    pool: list[tuple[int, Lane]], size: int
) -> tuple[list[int], list[Lane], int]:
    pool.sort(key=lambda item: -item[1].cost)
    some, pool[:] = pool[:size], pool[size:]
    return [i for i, _ in some], [lane for _, lane in some], size


def _start(
    lanes: list[Lane],
    size: int,
    launch: Launch,
    catch: tuple[type[Exception], ...],
    checkpoints: Checkpoints | None,
    given_up: Callable[[Lane, Path], None],
) -> Callable[[], list[Path | Exception]]:
    """Starts lanes, without waiting for them; what is returned waits."""
    begin = lambda lanes: _start(lanes, size, launch, catch, checkpoints, given_up)

    def end(wait: Callable[[], list[Any]] | Exception) -> list[Path | Exception]:
        try:
            if isinstance(wait, Exception):
                raise wait
            if checkpoints is None:
                paths = wait()
            else:
                paths = _go_on(lanes, wait(), size, launch, checkpoints)
        except catch as error:
            if len(lanes) == 1:
                return [error]
            return [begin([lane])()[0] for lane in lanes]
        paths = [
            path.told(why=lane.why) for lane, path in zip(lanes, paths, strict=True)
        ]
        pairs = list(enumerate(zip(lanes, paths, strict=True)))
        tried = [i for i, (lane, _) in pairs if lane.again is not None]
        left = [i for i in tried if bool(wants_another(paths[i].result))]
        others: list[Any] = [lanes[i].again for i in left]
        for i in left:
            given_up(lanes[i], paths[i])
        out: list[Path | Exception] = list(paths)
        for i, path in zip(left, begin(others)() if left else [], strict=True):
            if isinstance(path, Path):
                path = path.told(trial_steps=paths[i].stats["steps"])
            out[i] = path
        return out

    try:
        whole = checkpoints is None
        first = lanes if whole else [_first_part(lane, checkpoints) for lane in lanes]
        with contextlib.nullcontext() if whole else in_part():
            wait: Any = launch(first, size)
    except catch as error:
        wait = error
    return lambda: end(wait)


def _first_part(lane: Lane, checkpoints: Checkpoints) -> Lane:
    """The first part of a lane; or the one after its checkpoint."""
    steps = checkpoints.count(FIRST)
    part = _PARTS[type(lane.run)]
    like = lambda: eqx.filter_eval_shape(part, lane.run, None, steps)[1]
    state = checkpoints.load(lane.name, like)
    if state is not None:
        steps = checkpoints.count()
    return lane._replace(state=state, steps=steps)


def _go_on(
    lanes: list[Lane],
    found: list[Any],
    size: int,
    launch: Launch,
    checkpoints: Checkpoints,
) -> list[Path]:
    """Part after part of all lanes, from what the first of each gave. The state of one
    that has reached its end is kept too: its chunk is written with the last of them."""
    left = list(range(len(lanes)))
    while True:
        for i in left:
            path, state, ended = found[i]
            if not ended:
                checkpoints.tell(lanes[i].name, path)
            # A failure is found again.
            if checkpoints.due(lanes[i].name) and (not ended or path.succeeded):
                checkpoints.save(lanes[i].name, state)
        left = [i for i in left if not found[i][2]]
        if not left:
            return [path for path, _, _ in found]
        parts = [
            lanes[i]._replace(state=found[i][1], steps=checkpoints.count())
            for i in left
        ]
        # What fills the program up in place of lanes that have ended takes one step.
        filler = parts[-1]._replace(steps=checkpoints.count(1))
        begun = time.monotonic()
        with in_part():
            outs = launch(parts + [filler] * (size - len(parts)), size)()
        for i, out in zip(left, outs[: len(left)], strict=True):
            found[i] = out
        checkpoints.took(time.monotonic() - begun)


def _alone(lanes: list[Lane], size: int) -> Callable[[], list[Any]]:
    calls = [_call(lane) for lane in lanes]
    out = [_without_shared(fn(*arguments)) for fn, arguments in calls]
    return lambda: jax.block_until_ready(out)


def _call(lane: Lane) -> tuple[Callable, tuple]:
    """The compiled function that runs a lane, or a part of it, and its arguments."""
    if lane.steps is None:
        return _WHOLE[type(lane.run)], (lane.run,)
    return _PARTS[type(lane.run)], (lane.run, lane.state, lane.steps)


def _together(lanes: list[Lane], size: int, batch: Batch) -> Callable[[], list[Any]]:
    """Programs for `size` lanes. Where there are fewer, the last is run again."""
    alike: dict[tuple, list[int]] = {}
    for i, lane in enumerate(lanes):
        alike.setdefault(_signature(lane), []).append(i)
    groups, waits = list(alike.values()), []
    for group in groups:
        some = [lanes[i] for i in group]
        waits.append(_mapped(some + some[-1:] * (size - len(some)), batch))

    def wait() -> list[Any]:
        out: dict[int, Any] = {}
        for group, each in zip(groups, waits, strict=True):
            stacked = each()
            out |= {i: _take(stacked, k) for k, i in enumerate(group)}
        return [out[i] for i in range(len(lanes))]

    return wait


def _mapped(lanes: list[Lane], batch: Batch) -> Callable[[], Any]:
    """Starts all lanes, on all devices; what they share is passed once. What is
    returned waits for them."""
    devices = jax.local_device_count()
    count = len(lanes)
    lanes = lanes + [lanes[-1]] * (-count % devices)
    # Lane k is run by device k modulo their number, and the first by the first.
    order = np.arange(len(lanes)).reshape(-1, devices).T.ravel()
    lanes = [lanes[k] for k in order]
    calls = [_call(lane) for lane in lanes]
    tree = jax.tree.structure(calls[0][1])
    columns = list(zip(*(jax.tree.leaves(args) for _, args in calls), strict=True))
    # Not by what the lanes at hand happen to share: a program is the same, to the last
    # bit, whichever lanes of a sweep are in it.
    common = len(jax.tree.leaves(lanes[0].run.term)) if lanes[0].shares else 0
    own = [
        eqx.is_array(column[0])
        and (k >= common or any(x is not column[0] for x in column))
        for k, column in enumerate(columns)
    ]
    stack = [
        _stacked(column) if mine else None
        for mine, column in zip(own, columns, strict=True)
    ]
    shared = [None if mine else c[0] for mine, c in zip(own, columns, strict=True)]
    static = Static((tree, batch, devices))
    number = jnp.arange(len(lanes))
    out = _program(calls[0][0], number, stack, shared, static)
    back = np.argsort(order)[:count]
    take = lambda x: x[back] if eqx.is_array(x) else x
    return lambda: jax.tree.map(take, jax.device_get(out))


def _stacked(column: Sequence[Any]) -> Any:
    if is_key(column[0]):
        return jnp.stack(column)
    return np.stack(jax.device_get(column))


class Static(NamedTuple):
    """Arguments that are not traced."""

    value: Any


@eqx.filter_jit
def _program(
    run: Callable,
    number: Array,
    stack: list,
    shared: list,
    how: Static,
) -> Any:
    tree, batch, devices = how.value
    shared, plain = eqx.partition(shared, eqx.is_array)
    rest = []

    def one(shared: list, mine: list) -> PyTree:
        leaves = eqx.combine(mine, shared, plain)
        out = _without_shared(run(*jax.tree.unflatten(tree, leaves)))
        arrays, others = eqx.partition(out, eqx.is_array)
        rest.append(others)
        return arrays

    def each(number: Array, stack: list, shared: list) -> PyTree:
        """What one device does: nothing in it waits for the others."""
        if batch == "vmap":
            return jax.vmap(lambda _, mine: one(shared, mine))(number, stack)
        return jax.lax.map(lambda x: one(shared, x[1]), (number, stack))

    if devices > 1:
        mesh = jax.sharding.Mesh(np.array(jax.local_devices()), ("lanes",))
        lanes, all_of_it = jax.P("lanes"), jax.P()
        each = jax.shard_map(
            each, mesh=mesh, in_specs=(lanes, lanes, all_of_it), out_specs=lanes,
            check_vma=False,
        )  # fmt: skip
    return eqx.combine(each(number, stack, shared), rest[0])


def _signature(lane: Lane) -> tuple:
    """What two lanes have in common that are calls of one program."""
    fn, arguments = _call(lane)
    leaves, tree = jax.tree.flatten(arguments)
    return fn, tree, tuple(map(_mark, leaves))


def _mark(leaf: Any) -> Hashable:
    """Of an array its shape; of anything else, which is part of the program, itself."""
    if eqx.is_array(leaf):
        return leaf.shape, leaf.dtype
    if isinstance(leaf, np.ndarray):
        return leaf.shape, leaf.dtype, leaf.tobytes()
    return leaf if isinstance(leaf, Hashable) else id(leaf)


def _without_shared(out: Any) -> Any:
    """What a lane gives, without what the lanes of a problem have in common."""
    if isinstance(out, Path):
        return dataclasses.replace(out, static=None, watched={})
    path, *rest = out
    return (_without_shared(path), *rest)


def _take(stacked: PyTree, index: int) -> PyTree:
    def take(x: Any) -> Any:
        if not eqx.is_array(x):
            return x
        return x[index] if is_key(x) else np.asarray(x[index])

    return jax.tree.map(take, stacked)
