"""The operations of a program: which, and how many."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jaxtyping import PyTree


def operations(jaxpr: Jaxpr | ClosedJaxpr) -> Iterator[JaxprEqn]:
    """All equations of a program, and of those inside of it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in _inside(equation):
            yield from operations(inner)


def _inside(equation: JaxprEqn) -> list[Jaxpr | ClosedJaxpr]:
    """The programs that an equation is made of."""

    def program(p):
        return hasattr(p, "eqns")

    # (Not how a scatter puts two numbers together.)
    params = [p for name, p in equation.params.items() if name != "update_jaxpr"]
    return [p for p in jax.tree.leaves(params, is_leaf=program) if program(p)]


def price(fn: Callable, *args: PyTree) -> float:
    """How many operations with numbers fn(*args) takes, about: two for each term of a
    product of matrices, or of a convolution, and one for each number that anything else
    brings out. A loop that ends on a condition counts as one round."""
    return _price(jax.make_jaxpr(fn)(*args))


def numbers(fn: Callable, *args: PyTree) -> int:
    """How many numbers fn(*args) brings out, in all its operations; in a loop, those of
    one round and of the whole."""
    jaxpr = jax.make_jaxpr(fn)(*args)
    return sum(math.prod(_shape(o)) for e in operations(jaxpr) for o in e.outvars)


def _price(jaxpr: Jaxpr | ClosedJaxpr) -> float:
    return math.fsum(map(_price_of, jaxpr.eqns))


def _price_of(equation: JaxprEqn) -> float:
    kind, inside = equation.primitive.name, _inside(equation)
    if inside:
        each = map(_price, inside)
        if kind == "cond":
            return max(each)
        return equation.params.get("length", 1) * math.fsum(each)
    size = sum(math.prod(_shape(out)) for out in equation.outvars)
    if kind == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        shape = _shape(equation.invars[0])
        return 2.0 * size * math.prod(shape[i] for i in contracted)
    if kind == "conv_general_dilated":
        shape = _shape(equation.invars[1])
        features = equation.params["dimension_numbers"].rhs_spec[0]
        return 2.0 * size * math.prod(shape) / shape[features]
    return float(size)


def _shape(var: Any) -> tuple[int, ...]:
    return var.aval.shape
