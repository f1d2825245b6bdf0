"""The theory, and what comparing it gives, as labelled datasets."""

from typing import Any

import numpy as np

from ..results import codes
from ..runs.columns import described, own_dims, TIME, xarray

_RELATIVE = {"units": "1", "long_name": "relative to the norm of Phi"}


def of_theory(theory: Any) -> Any:
    """See `TwoPhase.to_xarray`."""
    parts = {"fast": theory.fast.to_xarray(), "drift": theory.drift.to_xarray()}
    parts["fast"] = parts["fast"].drop_vars("slow_time")  # all zero
    out = xarray().Dataset(attrs={"orders": list(theory.orders), "where": theory.where})
    for phase, data in parts.items():
        names = [*map(str, data.variables), *map(str, data.dims)]
        own = data.rename({name: f"{phase}_{name}" for name in names})
        out = out.merge(own)
        out.attrs |= {f"{phase}_{k}": v for k, v in data.attrs.items()}
    for name in ("interpolation_error", "fast_shift"):
        out[name] = ((), np.asarray(getattr(theory, name)), _RELATIVE)
    out["fast_scale"] = ((), np.asarray(theory.fast_scale), TIME["t"])
    for name in ("rank", "dimension"):
        out[name] = ((), np.asarray(getattr(theory.spectrum, name)))
    if theory.second is not None:
        ratio = np.asarray(theory.second.ratio)
        unknown = np.full(len(theory.drift) - ratio.size, np.nan)
        out["drift_ratio"] = ("drift_time", np.append(ratio, unknown))
    out["result"] = ((), codes(theory.result))
    return described(out)


def of_report(report: Any) -> Any:
    """See `Report.to_xarray`."""
    sweep, orders = report.sweep, list(report.orders.values())
    out = sweep.to_xarray()
    dims, shape = sweep.dims, sweep.shape

    def of_lanes(values: np.ndarray, units: dict[str, str], *more: str) -> Any:
        """Of the lanes, and along more dimensions."""
        return (*dims, *more), values.reshape(*shape, *values.shape[1:]), units

    def of_orders(name: str, units: dict[str, str], *more: str) -> Any:
        """The same of each order."""
        values = np.stack([getattr(order, name) for order in orders], axis=1)
        return of_lanes(values, units, "order", *more)

    rates = [order.rate for order in orders]
    used = np.stack([rate.used for rate in rates], axis=1)
    out = out.assign(
        error=of_orders("error", _RELATIVE, "time"),
        sup_all=of_orders("sup_all", _RELATIVE),
        sup=of_orders("sup", _RELATIVE),
        next_term=of_orders("next_term", _RELATIVE),
        rate=("order", [rate.exponent for rate in rates]),
        rate_stderr=("order", [rate.stderr for rate in rates]),
        rate_used=of_lanes(used, {}, "order"),
        drift_error=of_lanes(report.drift.error, _RELATIVE, "time"),
        drift_sup=of_lanes(report.drift.sup, _RELATIVE),
        valid_until=of_lanes(report.valid_until, TIME["slow_time"]),
        delay=of_lanes(report.delay, TIME["t"]),
        predicted_t=of_lanes(report.curves.t, TIME["t"], "predicted_time"),
    )
    for name, values in report.curves.metrics.items():
        own = "predicted_time", *own_dims(f"metric_{name}", values)
        out[f"predicted_metric_{name}"] = of_lanes(values, {}, *own)
    for name in ("memorised", "grokked"):
        times = getattr(report, name)
        out[name] = of_lanes(times.measured, TIME["t"])
        out[f"{name}_predicted"] = of_lanes(times.predicted, TIME["t"])
        out[f"{name}_error"] = of_lanes(times.error, TIME["t"])
        if times.measured_error is not None:
            bar = of_lanes(times.measured_error, TIME["t"])
            out[f"{name}_measured_error"] = bar
    out.attrs |= {"after": report.drift.after, "regular_until": report.regular_until}
    return out.assign_coords(order=list(report.orders))
