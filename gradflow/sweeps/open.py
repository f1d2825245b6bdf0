"""A store, or a dataset, read again."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path as File

import numpy as np
from jaxtyping import PyTree

from ..flow.flow import check_flow, GradientFlow
from ..metrics import Metric
from ..runs.columns import xarray
from ..runs.problem import as_metrics
from .axes import make_axes
from .columns import Dataset
from .on_disk import parameter_names, read_paths, settings
from .plan import RUN
from .result import Sweep
from .stack import OfProblem
from .store import are, UNREADABLE, ZarrStore


def as_sweep(
    results: Dataset,
    flow: GradientFlow,
    model: PyTree,
    *,
    metrics: dict[str, Callable | Metric] | None = None,
) -> Sweep:
    """The `Sweep` of one problem, from what was stored of it with its parameters.

    **Arguments:**

    - `results`: from `gradflow.open_results`, or a selection of its lanes, all of which
        are read.
    - `flow`, `model`, `metrics`: those that were run.

    **Raises:** `ValueError` where lanes are yet to be run, or are of many problems, or
    their parameters were not stored.
    """
    check_flow(flow)
    watched = as_metrics(metrics)
    if (results["result"] < 0).any():
        raise ValueError("results: some lanes are yet to be run.")
    config = results.attrs["config"]
    known = [name for name in config["axes"] if name in results.coords]
    if not results["result"].dims:  # one lane
        results = results.expand_dims(known[-1])
    dims = list(results["result"].dims)
    if own := [k for k in known if k not in RUN and results[k].size > 1]:
        raise ValueError(f"results: of many problems; select one value of {own[0]}.")
    groups = [_along(results, known, dim) for dim in dims]
    axes = make_axes(
        {name: results[name].values for group in groups for name in group},
        [group for group in groups if len(group) > 1],
    )
    fixed = config | {
        k: results[k].item() for k in known if k in RUN and results[k].ndim == 0
    }
    term, params = flow.term(model)
    if missing := [name for name in parameter_names(params) if name not in results]:
        raise ValueError(
            f"results: {missing} not stored; sweep with store=gf.Store(path, "
            "parameters=True)."
        )
    of_problem = OfProblem(term.static, watched)
    given = settings(axes, fixed)
    paths = read_paths(results, given, watched, params, of_problem)
    told = results.attrs["causes"]
    lanes = np.ravel(results["lane"]).tolist() if "lane" in results.coords else []
    causes = {i: told[str(k)] for i, k in enumerate(lanes) if str(k) in told}
    alike = {k: fixed[k] for k in RUN if isinstance(fixed.get(k), int | float)}
    return Sweep(paths, axes, (), causes, alike)


def _along(results: Dataset, names: list[str], dim: str) -> list[str]:
    """Those along a dimension, of which the one that names it is the first."""
    there = [name for name in names if results[name].dims == (dim,)]
    return sorted(there, key=dim.__ne__)


def open_results(path: str | os.PathLike, *, check: bool = True) -> Dataset:
    """The results of `gf.sweep(..., store=path)`, as far as they are there.

    **Arguments:**

    - `path`: of the store.
    - `check`: compare the checksums of all chunks, for which every file is read once.

    **Returns:** an `xarray.Dataset` with a dimension for each of the sweep, and `time`;
    see `Sweep.to_xarray`. Arrays are read when they are used. Where a lane has not been
    run `result` is −1 and all else NaN. Its `attrs` tell the configuration, versions,
    device, how many chunks are finished, and in `causes` the errors of lanes that
    raised one, by their numbers, which are the coordinate `lane`. (Some are
    dictionaries, which netCDF does not hold: `drop_attrs()` before `to_netcdf`.)

    **Raises:** `FileNotFoundError` where there is no store; `ValueError` that names
    the chunks whose checksums are wrong, or that `path` holds something else.
    """
    store = ZarrStore(File(path))
    found = store.attributes()
    finished = store.finished(check=check)
    broken = [f"{n} ({file})" for n, file in finished.items() if file is not None]
    told = f"chunks of {path} are corrupted: {', '.join(broken)}" if broken else ""
    if damaged := store.damaged() if check else []:
        told = f"{', '.join(damaged)} of {path} {are(damaged)} corrupted"
        told += f", and so are chunks: {', '.join(broken)}" if broken else ""
    if told:
        raise ValueError(
            f"store: {told}. Run the same sweep with this store again, and they are "
            "made anew; or open it with check=False."
        )
    data = xarray().open_zarr(str(path), chunks=None, consolidated=False)
    data = data[sorted(map(str, data.data_vars))]
    found.pop("coordinates", None)
    causes: dict[str, str] = {}
    solvers: set[str] = set()
    for number in sorted(finished):
        # Without a check, one that can't be read is passed over.
        with contextlib.suppress(*UNREADABLE):
            marker = store.marker(number)
            causes |= marker["causes"]
            solvers |= set(marker["solver"])
    data.attrs = found | {
        "finished": len(finished),
        "causes": causes,
        "solver": " or ".join(sorted(solvers)),
    }
    # Zipped axes are along the dimension of another one.
    names = ("t", "slow_time", *found["config"]["axes"])
    data = data.set_coords([name for name in names if name in data])
    if "lane" not in data.coords:
        lanes = np.arange(data.result.size).reshape(data.result.shape)
        data = data.assign_coords(lane=(data.result.dims, lanes))
    return data
