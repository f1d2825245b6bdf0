"""Progress bars on the host: programs with one inside could not be cached."""

import time
from collections.abc import Callable
from typing import TypeVar

from jax import monitoring
from jaxtyping import Array
from tqdm.auto import tqdm

from .._host import as_array
from .parts import ALL, FIRST, in_part

_LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_COMPILED = "/jax/core/compile/backend_compile_duration"

Out = TypeVar("Out")
State = TypeVar("State")


class Bar:
    """A bar that says what is done, how far it is, and which program is being compiled
    for it; one that is not `shown` does nothing."""

    def __init__(self, name: str, *, shown: bool):
        form = "{desc}: {percentage:.2f}%|{bar}| [{elapsed}<{remaining}{postfix}]"
        self.tqdm = tqdm(total=100, desc=name, bar_format=form) if shown else None
        self.words = ""

    @property
    def hidden(self) -> bool:
        """Whether it is not shown."""
        return self.tqdm is None

    def tell(self, share: float, words: str) -> None:
        """How much of it is done, of 1, and what there is to say of that."""
        self.words = words
        if self.tqdm is not None:
            self.tqdm.n = round(100 * share, 2)
        self._show(words)

    def _show(self, words: str) -> None:
        if self.tqdm is not None:
            self.tqdm.set_postfix_str(words)

    def _note(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        name = str(kwargs.get("fun_name", "")).removeprefix("jit(").removesuffix(")")
        if event == _LOWERED:
            self._show(f"compiling {name}")
        elif event == _COMPILED:
            self._show(self.words)

    def __enter__(self) -> "Bar":
        if not self.hidden:
            monitoring.register_event_duration_secs_listener(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self.tqdm is not None:
            monitoring.unregister_event_duration_listener(self._note)
            self.tqdm.close()


def run_in_parts(
    part: Callable[[State | None, Array], tuple[Out, State, Array]],
    state: State | None,
    bar: Bar,
    far: Callable[[Out, State], tuple[float, str]],
    *,
    first: int = FIRST,
    seen: Callable[[Out, State], None] | None = None,
) -> tuple[Out, State]:
    """A run part after part, for a bar to tell how far it is.

    **Arguments:**

    - `part`: the run from a state, so many steps on: what there is so far, the state,
        and whether that is all.
    - `state`: where it is at first.
    - `first`: the steps of the first part. The next have so many that each takes about
        half a second; where no bar is shown, all, and if nobody is to see it the first
        has all.
    - `far`: the share of all that is done, and what there is to say of it.
    - `seen`: is given what the first part has come to, if that is not all.
    """
    steps = ALL if bar.hidden and seen is None else first
    while True:
        began = time.perf_counter()
        with in_part():
            out, state, ended = part(state, as_array(steps))
            ended = bool(ended)
        if seen is not None and not ended:
            seen(out, state)
            seen = None
        if bar.hidden:
            steps = ALL
        else:
            bar.tell(*far(out, state))
            took = time.perf_counter() - began
            steps = 2 * steps if took < 0.25 else steps
            steps = max(steps // 2, 1) if took > 1 else steps
        if ended:
            return out, state
