"""Lanes as programs: one by one, in loops on all devices, or in lockstep."""

import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from .._checks import is_key
from ..runs.outcome import wants_another
from ..runs.parts import FIRST, in_part
from ..runs.path import Path
from ..runs.solve import Solve, solve, solve_part
from ..runs.steps import Descend, descend, descend_part
from ..runs.until import words_of
from ..runs.windows import solve_through
from .checkpoints import Checkpoints
from .lanes import Lane
from .memory import AtOnce, is_out_of_memory, OutOfMemory

Batch = Literal["loop", "vmap"]
_WHOLE: dict[type, Callable] = {Solve: solve, Descend: descend}
_PARTS: dict[type, Callable] = {Solve: solve_part, Descend: descend_part}
Launch = Callable[[list[Lane], int], Callable[[], list[Any]]]
"""Starts lanes as one program, or a few; what is returned waits for what they give."""


class Program(NamedTuple):
    """Lanes that run as one program."""

    places: list[int]
    """Of the lanes, among all that are to be run."""
    lanes: list[Lane]
    size: int
    """For how many lanes it is compiled: the last fills up what is missing."""
    by_itself: bool = False
    """Whether no other is to be in memory while it runs."""


class Running(NamedTuple):
    """A program that has been launched."""

    program: Program
    wait: Callable[[], list[Any]]
    """Waits for what its lanes give, and raises what they raise."""
    beside: bool = False
    """Whether another was in memory meanwhile."""


class Part(NamedTuple):
    """What a part of a lane gives."""

    path: Path
    """So far."""
    state: PyTree
    ended: Bool[Array, ""]


def run_lanes(
    lanes: Iterable[Lane | Exception],
    batch: Batch,
    at_once: AtOnce,
    lane_done: Callable[[int, Path | Exception, int], None] = lambda *_: None,
    *,
    catch: tuple[type[Exception], ...] = (Exception,),
    checkpoints: Checkpoints | None = None,
    given_up: Callable[[Lane, Path], None] = lambda *_: None,
) -> list[Path | Exception]:
    """Runs lanes; one that fails with an error of those in `catch` gives it instead of
    a path, and leaves the others as they are.

    With one device and `batch` "loop" they run one by one, as they come. Otherwise so
    many `at_once` are one program, in which each device has as many lanes, and loops
    over them or runs them in lockstep; half as many, where that runs out of memory.
    While it runs the next lanes are made. `lane_done` is called with the place of a
    lane, its result, and the number of its device; `given_up` with a lane whose solver
    was only tried, and its path, before it begins anew. With `checkpoints` they run in
    parts, and go on from the file where there is one.
    """
    alone = batch == "loop" and jax.local_device_count() == 1
    launch: Launch = _alone if alone else functools.partial(_together, batch=batch)
    programs = _Programs(launch, catch, at_once, checkpoints, given_up)
    found: dict[int, Path | Exception] = {}

    def keep(place: int, path: Path | Exception, device: int) -> None:
        found[place] = path
        lane_done(place, path, device)

    new = _sorted_into_programs(lanes, at_once, keep)
    again: deque[Program] = deque()
    """Of lanes that are to be run once more; they come before new ones."""
    running: deque[Running] = deque()
    while True:
        program = again.popleft() if again else next(new, None)
        if program is not None:
            program, *rest = _cut(program, at_once.size)
            again.extendleft(reversed(rest))
            while program.by_itself and running:
                again += programs.finish(running.popleft(), keep)
            running.append(programs.start(program))
            if len(running) > 1:
                running = deque(one._replace(beside=True) for one in running)
            # The next are made while it runs.
            if len(running) == 1 and not program.by_itself:
                continue
        if not running:
            return [found[place] for place in sorted(found)]
        again += programs.finish(running.popleft(), keep)


_POOL = 4
"""So many programs' lanes are sorted by cost: a program takes as long as its longest
loop. Their problems are in memory together."""


def _sorted_into_programs(
    lanes: Iterable[Lane | Exception],
    at_once: AtOnce,
    keep: Callable[[int, Exception, int], None],
) -> Iterator[Program]:
    """Those that run as one program: they differ in numbers only. Errors are kept."""
    pools: dict[tuple, list[tuple[int, Lane]]] = {}
    for i, lane in enumerate(lanes):
        if isinstance(lane, Exception):
            keep(i, lane, 0)
            continue
        if at_once.size == 1:
            yield Program([i], [lane], 1)
            continue
        pool = pools.setdefault(_signature(lane), [])
        pool.append((i, lane))
        if len(pool) >= _POOL * at_once.size:
            while pool:
                yield _taken(pool, at_once.size)
    for pool in pools.values():
        while pool:
            yield _taken(pool, at_once.size)


def _taken(pool: list[tuple[int, Lane]], size: int) -> Program:
    """A program for the lanes of a pool that cost most, which are taken out of it."""
    pool.sort(key=lambda item: -item[1].cost)
    some, pool[:] = pool[:size], pool[size:]
    return Program([i for i, _ in some], [lane for _, lane in some], size)


def _cut(program: Program, size: int) -> list[Program]:
    """The same lanes in programs of at most `size`."""
    places, lanes, whole, by_itself = program
    size = min(size, whole)
    cuts = [slice(k, k + size) for k in range(0, len(lanes), size)]
    return [Program(places[cut], lanes[cut], size, by_itself) for cut in cuts]


class _Programs(NamedTuple):
    """How programs are started and finished; see `run_lanes`."""

    launch: Launch
    catch: tuple[type[Exception], ...]
    at_once: AtOnce
    checkpoints: Checkpoints | None
    given_up: Callable[[Lane, Path], None]

    def start(self, program: Program) -> Running:
        """Starts lanes, or their first parts, without waiting for them (but for those
        that are run one by one)."""
        lanes, size = program.lanes, program.size
        try:
            if self.checkpoints is None:
                return Running(program, self.launch(lanes, size))
            first = [_first_part(lane, self.checkpoints) for lane in lanes]
            with in_part():
                return Running(program, self.launch(first, size))
        except (*self.catch, MemoryError) as error:
            return Running(program, functools.partial(_raise, error))

    def finish(
        self, running: Running, keep: Callable[[int, Path | Exception, int], None]
    ) -> list[Program]:
        """Waits for lanes, and keeps what they give. Returns which to run once more."""
        program = running.program
        places, lanes, size, by_itself = program
        try:
            paths = running.wait()
            if self.checkpoints is not None:
                parts = [Part(*out) for out in paths]
                paths = _run_on(program, parts, self.launch, self.checkpoints)
        except (*self.catch, MemoryError) as error:
            too_many = is_out_of_memory(error)
            if too_many and running.beside:  # both may fit, one by one
                return [program._replace(by_itself=True)]
            if too_many and self.at_once.halve(size):
                return [program]  # which is cut when it is started
            if len(lanes) > 1:  # of which lane it is shows when each runs by itself
                one_by_one = zip(places, lanes, strict=True)
                return [Program([i], [lane], size, by_itself) for i, lane in one_by_one]
            told = OutOfMemory.of(error, lanes[0]) if too_many else error
            keep(places[0], told, 0)
            return []
        left: list[tuple[int, Lane]] = []
        for k, (i, lane, path) in enumerate(zip(places, lanes, paths, strict=True)):
            path = path.told(why=lane.why, until=words_of(lane.run.until))
            if lane.trial_steps is not None:
                path = path.told(trial_steps=lane.trial_steps)
            if lane.again is not None and bool(wants_another(path.result)):
                self.given_up(lane, path)
                steps = path.stats.steps
                left.append((i, lane.again._replace(trial_steps=steps)))
            else:
                keep(i, path, k % jax.local_device_count())
        if not left:
            return []
        return [Program([i for i, _ in left], [lane for _, lane in left], size)]


def _raise(error: Exception) -> Any:
    raise error


def _first_part(lane: Lane, checkpoints: Checkpoints) -> Lane:
    """The first part of a lane; or the one after its checkpoint."""
    steps = checkpoints.count(FIRST)
    part = _PARTS[type(lane.run)]

    def like() -> PyTree:
        return eqx.filter_eval_shape(part, lane.run, None, steps)[1]

    state = checkpoints.load(lane.name, like)
    if state is not None:
        steps = checkpoints.count()
    return lane._replace(state=state, steps=steps)


def _run_on(
    program: Program, parts: list[Part], launch: Launch, checkpoints: Checkpoints
) -> list[Path]:
    """Part after part of all lanes, from what the first of each gave. The state of one
    that has reached its end is kept too: its chunk is written with the last of them."""
    lanes, size, parts = program.lanes, program.size, list(parts)
    left = list(range(len(lanes)))
    while True:
        for i in left:
            name, part = lanes[i].name, parts[i]
            if not part.ended:
                checkpoints.part_done(name, part.path)
            # A failure is found again.
            if checkpoints.due(name) and (not part.ended or part.path.succeeded):
                checkpoints.save(name, part.state)
        left = [i for i in left if not parts[i].ended]
        if not left:
            return [part.path for part in parts]
        steps = checkpoints.count()
        todo = [lanes[i]._replace(state=parts[i].state, steps=steps) for i in left]
        # What fills the program up in place of lanes that have ended takes one step.
        filler = todo[-1]._replace(steps=checkpoints.count(1))
        begun = time.monotonic()
        with in_part():
            outs = launch(todo + [filler] * (size - len(todo)), size)()
        for i, out in zip(left, outs[: len(left)], strict=True):
            parts[i] = Part(*out)
        checkpoints.part_took(time.monotonic() - begun)


def _alone(lanes: list[Lane], size: int) -> Callable[[], list[Any]]:
    calls = [_call(lane) for lane in lanes]
    # What `simulate` runs, too.
    runs = [(solve_through if fn is solve else fn, given) for fn, given in calls]
    out = [_without_shared(fn(*given)) for fn, given in runs]
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
    static = Static(tree, batch, devices)
    number = jnp.arange(len(lanes))
    out = _program(calls[0][0], number, stack, shared, static)
    back = np.argsort(order)[:count]

    def take(x: PyTree) -> PyTree:
        return x[back] if eqx.is_array(x) else x

    return lambda: jax.tree.map(take, jax.device_get(out))


def _stacked(column: Sequence[Any]) -> Any:
    if is_key(column[0]):
        return jnp.stack(column)
    return np.stack(jax.device_get(column))


class Static(NamedTuple):
    """Arguments that are not traced."""

    tree: jax.tree_util.PyTreeDef  # pyright: ignore[reportInvalidTypeForm]
    """Of the arguments of a lane."""
    batch: Batch
    devices: int


@eqx.filter_jit
def _program(
    run: Callable,
    number: Array,
    stack: list,
    shared: list,
    how: Static,
) -> Any:
    tree, batch, devices = how
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


def _mark(leaf: PyTree) -> Hashable:
    """Of an array its shape; of anything else, which is part of the program, itself."""
    if eqx.is_array(leaf):
        return leaf.shape, leaf.dtype
    if isinstance(leaf, np.ndarray):
        return leaf.shape, leaf.dtype, leaf.tobytes()
    return leaf if isinstance(leaf, Hashable) else id(leaf)


def _without_shared(out: Path | tuple) -> Path | tuple:
    """What a lane gives, without what the lanes of a problem have in common."""
    if isinstance(out, Path):
        return dataclasses.replace(out, static=None, watched={})
    path, *rest = out
    return (_without_shared(path), *rest)


def _take(stacked: PyTree, index: int) -> PyTree:
    def take(x: PyTree) -> PyTree:
        if not eqx.is_array(x):
            return x
        return x[index] if is_key(x) else np.asarray(x[index])

    return jax.tree.map(take, stacked)
