"""Sweeps as labelled arrays, with xarray."""

from collections.abc import Callable
from typing import Any, TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ._axes import make_axes
from ._lanes import Ragged, RUN
from .flow import check_flow, GradientFlow, place
from .metrics import Metric
from .path import Path
from .results import RESULTS
from .simulate import as_metrics

if TYPE_CHECKING:
    from .sweep import Sweep


def xarray() -> Any:
    """The package, imported when it is first needed.

    **Raises:** `ImportError` that says how to install it.
    """
    try:
        import xarray
    except ImportError as error:
        raise ImportError(
            "labelled results need xarray: pip install xarray."
        ) from error
    return xarray


def result_attributes() -> dict[str, Any]:
    """The names of the numbers in `result`, as climate scientists write them; those
    above zero and not `slid` are failures."""
    names = RESULTS._name_to_item
    return {
        "flag_values": [int(item._value) for item in names.values()],
        "flag_meanings": " ".join(names),
    }


def columns(paths: Path, watched: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """What is kept of the paths of some lanes, by name: arrays with the lanes as first
    axis and, where they have two, the times as second.

    `watched` are the metrics of each lane, for their thresholds.
    """
    levels = {
        name: [lane[name].threshold if name in lane else None for lane in watched]
        for name in paths.metrics
    }
    numbers = {
        k: np.asarray(v)
        for k, v in paths.stats.items()
        if not isinstance(v, str | tuple)
    }
    return {
        "t": np.asarray(paths.t),
        "slow_time": np.asarray(paths.slow_time),
        "train_loss": np.asarray(paths.train_loss),
        "penalty": np.asarray(paths.penalty),
        **{f"metric_{k}": np.asarray(v) for k, v in paths.metrics.items()},
        **{
            f"threshold_{k}": np.array([np.nan if x is None else x for x in v], float)
            for k, v in levels.items()
            if any(x is not None for x in v)
        },
        **{k: v for k, v in numbers.items() if v.ndim == 1 and k not in _AXES},
        "result": np.asarray(paths.result._value, np.int32),
    }


def parameter_columns(
    paths: Path,
) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """The parameters of some lanes at all times, by their places in the model, with the
    names of the dimensions after those of the lanes."""
    if isinstance(paths.params, Ragged):
        raise ValueError("parameters: their shapes differ from lane to lane.")
    out = {}
    for at, leaf in jax.tree_util.tree_leaves_with_path(paths.params):
        name = _parameter_name(at)
        more = tuple(f"{name}_{k}" for k in range(leaf.ndim - 2))
        out[name] = (("time", *more), np.asarray(leaf))
    return out


def as_sweep(
    results: Any,
    flow: GradientFlow,
    model: PyTree,
    *,
    metrics: dict[str, Callable | Metric] | None = None,
) -> "Sweep":
    """The `Sweep` of one problem, from what was stored of it with `parameters=True`.

    **Arguments:**

    - `results`: from `gradflow.open_results`, or a selection of its lanes, all of which
        are read.
    - `flow`, `model`, `metrics`: those that were run.

    **Raises:** `ValueError` where lanes are yet to be run, or are of many problems, or
    their parameters were not stored.
    """
    from .sweep import Sweep

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
    # Those along a dimension, of which the one that names it is the first.
    along = lambda d: sorted(
        (k for k in known if results[k].dims == (d,)), key=d.__ne__
    )
    groups = [along(d) for d in dims]
    axes = make_axes(
        {name: results[name].values for group in groups for name in group},
        [group for group in groups if len(group) > 1],
    )
    fixed = config | {
        k: results[k].item() for k in known if k in RUN and results[k].ndim == 0
    }
    rest = lambda name: [results.sizes[d] for d in results[name].dims if d not in dims]
    flat = lambda name: jnp.asarray(
        results[name].values.reshape(len(axes), *rest(name))
    )
    term, params = flow.term(model)
    places, tree = jax.tree_util.tree_flatten_with_path(params)
    names = [_parameter_name(at) for at, _ in places]
    if missing := [name for name in names if name not in results]:
        raise ValueError(f"results: {missing} not stored; sweep with parameters=True.")
    numbers = [n for n in results.data_vars if results[n].ndim == len(dims)]
    lams = [at.get("weight_decay", fixed.get("weight_decay")) for at in axes]
    tolerances = [at.get("rtol", fixed.get("rtol")) for at in axes]
    paths = Path(
        t=flat("t"),
        weight_decay=jnp.asarray(lams, flat("t").dtype),
        params=tree.unflatten([flat(name) for name in names]),
        static=place(params, term.static)[1],
        metrics={name: flat(f"metric_{name}") for name in sorted(watched)},
        train_loss=flat("train_loss"),
        penalty=flat("penalty"),
        result=eqx.tree_at(
            lambda r: r._value, RESULTS.successful, flat("result").astype(jnp.int32)
        ),
        stats={
            "solver": results.attrs["solver"],
            **({} if None in tolerances else {"rtol": jnp.asarray(tolerances)}),
            **{
                n: flat(n) for n in numbers if not n.startswith(("threshold", "result"))
            },
        },
        watched=watched,
    )
    told = results.attrs["causes"]
    lanes = np.ravel(results["lane"]).tolist() if "lane" in results.coords else []
    causes = {i: told[str(k)] for i, k in enumerate(lanes) if str(k) in told}
    alike = {k: fixed[k] for k in RUN if isinstance(fixed.get(k), int | float)}
    return Sweep(paths, axes, (), causes, alike)


def _parameter_name(at: Any) -> str:
    # No folders of their own in a store.
    name = jax.tree_util.keystr(at, simple=True, separator=".").replace("/", ".")
    return f"params_{name}"


_AXES = ("rtol", "learning_rate")  # coordinates, where they vary


def dataset(sweep: "Sweep") -> Any:
    """All lanes, in the shape of the dimensions; see `Sweep.to_xarray`."""
    dims, shape = sweep.dims, sweep.shape
    lanes = len(sweep)
    watched = [o.watched for o in sweep.owned] or [sweep.paths.watched] * lanes
    variables = {}
    for name, values in columns(sweep.paths, watched).items():
        own = dims + ("time",) * (values.ndim - 1)
        variables[name] = (own, values.reshape(*shape, *values.shape[1:]))
    out = xarray().Dataset(variables, coords=sweep.axes.coords)
    out["t"].attrs["long_name"] = "time t"
    out["slow_time"].attrs["long_name"] = "slow time s = lambda t"
    out["result"].attrs.update(result_attributes())
    out.attrs.update(sweep.fixed)
    return out.set_coords(["t", "slow_time"])
