"""What is asked of loss and metrics, before any compute."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .._checks import (
    check_callable,
    check_logits,
    is_concrete,
    word,
)
from ..flow.term import FlowTerm
from ..losses import AbstractCompositeLoss, AbstractLoss, CrossEntropy
from ..metrics import AbstractOfLogits, Metric, without_thresholds

Shapes: TypeAlias = dict[str, tuple[int, ...]]
"""By name."""


def as_metrics(metrics: dict[str, Callable | Metric] | None) -> dict[str, Metric]:
    """Plain functions of the model, as metrics without a threshold.

    **Raises:** `ValueError` where they are no functions by name.
    """
    metrics = {} if metrics is None else metrics
    if not isinstance(metrics, Mapping):
        raise ValueError(
            "metrics: expected functions of the model by name, such as "
            f"{{'test': loss}}, got {word(metrics)}."
        )
    for name, fn in metrics.items():
        if not isinstance(name, str):
            raise ValueError(f"metrics: expected strings for names, got {word(name)}.")
        check_callable(fn, f"metrics[{name!r}]")
    return {
        name: fn if isinstance(fn, Metric) else Metric(fn)
        for name, fn in metrics.items()
    }


def check_problem(
    term: FlowTerm,
    params: PyTree,
    watched: dict[str, Metric] | None = None,
    *,
    mixed: bool = False,
) -> Shapes:
    """Raises unless the loss is a real scalar of the model, in its precision (or
    another, where that may be `mixed`), and metrics are real numbers, one where there
    is a threshold; with a logit for each label. Nothing is computed, and it is traced
    once only.

    **Returns:** the shapes of the metrics.
    """
    watched = {} if watched is None else watched
    bare = without_thresholds(watched)
    values, shapes = _look(term, params, bare, mixed)
    for name, metric in watched.items():
        if metric.threshold is not None and values[name] != ():
            raise ValueError(
                f"metrics[{name!r}]: a threshold is for one number, and this gives an "
                f"array of shape {values[name]}; watch one of its numbers by itself."
            )
    for name, fn in _watching(term.loss, bare).items():
        if name in shapes and is_concrete(fn.labels):
            with _named(name):
                check_logits(fn.labels, shapes[name])
    return values


@eqx.filter_jit
def _look(
    term: FlowTerm, params: PyTree, watched: dict[str, Metric], mixed: bool
) -> tuple[Shapes, Shapes]:
    """Checks all but labels, which are not known here; returns the shapes of the
    metrics, and those of the logits that labels go with, by the names of loss and
    metrics."""
    model = term.model(params)
    values = check_values(term.loss, watched, model)
    dtype = jax.tree.leaves(params)[0].dtype
    loss, functions = term.loss, []
    if isinstance(loss, AbstractCompositeLoss) and not mixed:
        functions = [loss.outputs, loss]
    for fn in functions:
        found = eqx.filter_eval_shape(fn, model).dtype
        if found != dtype:
            held = {a.dtype.name for a in jax.tree.leaves(term.loss) if eqx.is_array(a)}
            raise ValueError(
                f"model: its parameters are {dtype}, and the loss, with data of "
                f"{', '.join(sorted(held)) or 'none'}, gives {found}; cast the data to "
                f"{dtype}, or the model to {found}."
            )
    shapes = {}
    for name, fn in _watching(term.loss, watched).items():
        if isinstance(fn, CrossEntropy):
            n = fn.labels.shape[0]
            shapes[name] = (n, eqx.filter_eval_shape(fn.outputs, model).size // n)
        elif isinstance(fn, AbstractOfLogits):
            shapes[name] = eqx.filter_eval_shape(fn.logits, model).shape
    return values, shapes


def _watching(loss: AbstractLoss, watched: dict[str, Metric]) -> dict[str, Any]:
    """What is evaluated, by the name of its argument."""
    return {"loss": loss} | {f"metrics[{k!r}]": m.fn for k, m in watched.items()}


@contextlib.contextmanager
def _named(name: str):
    """Says of which metric an error is."""
    try:
        yield
    except ValueError as error:
        if name == "loss":
            raise
        first = str(error).partition("\n")[0]
        raise ValueError(f"{name}: {first}") from error


def check_values(
    loss: AbstractLoss, watched: dict[str, Metric], model: PyTree
) -> Shapes:
    """Raises unless the loss is a real scalar, and metrics are real numbers; nothing is
    computed. Where it is called while tracing it costs nothing in later calls.

    **Returns:** the shapes of the metrics.
    """
    shapes = {}
    for name, fn in _watching(loss, watched).items():
        with _named(name):
            out = eqx.filter_eval_shape(fn, model)
        shapes[name] = shape = getattr(out, "shape", None)
        fits = shape == () or (name != "loss" and shape is not None and 0 not in shape)
        if not fits or not jnp.issubdtype(out.dtype, jnp.floating):
            told = f"shape {shape}" if shape is not None else type(out).__name__
            kind = "a real scalar" if name == "loss" else "real numbers"
            raise ValueError(
                f"{name}: expected {kind}, got {str(out.dtype) if fits else told}."
            )
    return {name: shapes[f"metrics[{name!r}]"] for name in watched}
