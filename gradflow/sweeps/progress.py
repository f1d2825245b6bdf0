"""The progress bars of a sweep."""

import sys
import time
from collections.abc import Mapping
from functools import partial

import jax
import numpy as np
from tqdm.auto import tqdm

from ..runs.outcome import given_up
from ..runs.path import Path
from ..runs.solve import Solve
from .axes import Axes
from .lanes import Lane


class ProgressBars:
    """A line for each device of this process: lanes done and failed, steps a second,
    the time that is left, and the lane that took most.

    **Arguments:**

    - `progress`: whether to show them; or symbols of axes, to be shown in place of
        their own.
    """

    def __init__(self, axes: Axes, total: int, progress: bool | Mapping[str, str]):
        devices, process = jax.local_devices(), jax.process_index()
        where = f"process {process}, " if jax.process_count() > 1 else ""
        many = len(devices) > 1 or bool(where)
        # A log file gets whole lines, and those now and then only.
        log = not sys.stderr.isatty() and "ipykernel" not in sys.modules
        symbols = progress if isinstance(progress, Mapping) else None
        self.words = partial(axes.words, symbols=symbols)
        self.failed, self.steps = [0] * len(devices), [0.0] * len(devices)
        self.worst = [(0.0, -1)] * len(devices)
        self.start = self.shown = time.perf_counter()
        self.bars = [
            tqdm(
                total=total // len(devices) + (k < total % len(devices)),
                desc=f"{where}{device.platform} {k}" if many else None,
                unit="lane",
                position=k if many and not log else None,
                mininterval=10.0 if log else 0.1,
                bar_format="{l_bar}{r_bar}\n" if log else None,
                disable=symbols is None and not progress,
            )
            for k, device in enumerate(devices)
        ]

    def lane_done(self, lane: int, path: Path | Exception, device: int) -> None:
        """Counts a lane, and shows how its device does."""
        bar = self.bars[device]
        if isinstance(path, Exception):
            self.failed[device] += 1
        else:
            self.failed[device] += not bool(path.succeeded)
            steps = float(path.stats.steps)
            self.steps[device] += steps
            self.worst[device] = max(self.worst[device], (steps, lane))
        if not bar.disable:
            rate = self.steps[device] / (time.perf_counter() - self.start)
            worst = self.worst[device][1]
            where = f", most at {self.words(worst)}" if worst >= 0 else ""
            bar.set_postfix_str(
                f"{self.failed[device]} failed, {rate:.3g} steps/s{where}",
                refresh=False,
            )
        bar.update()

    def given_up(self, lane: Lane, path: Path) -> None:
        """Says that the solver of a lane, which was only tried, has failed."""
        again = None if lane.again is None else lane.again.run
        if self.bars[0].disable or not isinstance(again, Solve):
            return
        where = self.words(int(lane.name))
        tqdm.write(f"{where}: {given_up(path, again.solver)}", file=sys.stderr)

    def part_done(self, name: str, path: Path) -> None:
        """Shows how far a lane is that takes long. `name` is that of its checkpoint."""
        bar, now = self.bars[0], time.perf_counter()
        if bar.disable or now - self.shown < max(bar.mininterval, 1.0):
            return
        self.shown = now
        lane = int(name.partition("-")[0])
        done = int(np.isfinite(np.asarray(path.train_loss)).sum())
        words = f"{self.words(lane)}: {done} of {len(path.t)} saved times"
        bar.set_postfix_str(words)

    def __enter__(self) -> "ProgressBars":
        return self

    def __exit__(self, *_: object) -> None:
        for bar in self.bars:
            bar.close()
