"""The numbers of results in stores, which never change their meaning."""

import os
import subprocess
import sys

import diffrax
import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf
from gradflow.results import CODES, codes, flags, from_codes, is_known

NUMBERS = """0 successful, 14 out_of_steps, 15 slid, 16 unstable, 17 stalled,
18 diverged, 19 overshot, 20 not_converged, 21 no_minimiser, 22 not_critical, 23 saddle,
24 ambiguous_rank, 25 unresolved, 26 second_order_lost, 27 singular_point,
28 rank_lost, 29 raised, 30 undefined_start, 31 wrong_argument, 32 criterion_met,
33 coarse"""


def test_numbers_are_what_they_were():
    """Add the next result with the next number; change none."""
    before = dict(reversed(one.split()) for one in NUMBERS.split(","))
    assert {name: str(number) for name, number in CODES.items()} == before
    own = set(gf.RESULTS._name_to_item) - set(diffrax.RESULTS._name_to_item)
    assert own | {"successful"} == set(CODES)


def test_there_and_back():
    names = sorted(CODES)
    stack = from_codes(np.array([CODES[name] for name in names]), flags())
    for i, name in enumerate(names):
        one = eqx.tree_at(lambda r: r._value, stack, stack._value[i])
        assert bool(one == getattr(gf.RESULTS, name))
    assert codes(stack).tolist() == [CODES[name] for name in names]
    assert codes(stack).dtype == np.int32 and is_known(stack)


def test_meanings_are_the_columns_own():
    column = {"flag_values": [3, 7], "flag_meanings": "slid successful"}
    read = from_codes(np.array([[7, 3]]), column)
    assert codes(read).tolist() == [[0, 15]]
    with pytest.raises(ValueError, match="number 5 is no result"):
        from_codes(np.array([5]), column)
    column = {"flag_values": jnp.array([1]), "flag_meanings": "melted"}
    with pytest.raises(ValueError, match="melted is no result"):
        from_codes(np.array([1]), column)


def test_what_is_traced_is_not_known():
    told = []

    @eqx.filter_jit
    def run(x):
        result = gf.RESULTS.where(x > 0, gf.RESULTS.successful, gf.RESULTS.saddle)
        told.append(is_known(result))
        return result

    assert bool(run(jnp.array(1.0)) == gf.RESULTS.successful) and told == [False]


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["off", "nan"])
def test_errors_are_raised_whatever_equinox_is_told(setting):
    """In a process of its own: Equinox reads it when it is imported."""
    code = """
import jax, jax.numpy as jnp, gradflow as gf
x = jnp.array([[1.0, 2.0, -1.0]])
flow = gf.GradientFlow(gf.SquaredError(x, jnp.ones(1)))
model = gf.models.DiagonalNetwork(*jnp.full((2, 3), 0.3).at[0].add(0.1))
few = dict(max_steps=2)
run = lambda lam: gf.simulate(flow, model, weight_decay=lam, t1=9.0, **few).params
for call in (
    lambda: run(0.1),
    lambda: jax.block_until_ready(jax.jit(run)(0.1)),
    lambda: gf.manifold.limit_map(flow, model, **few),
    lambda: gf.manifold.riemannian_flow(flow, model, slow_time=1.0, **few),
):
    try:
        call()
        print("no error")
    except RuntimeError as error:
        print("step budget" in str(error))
"""
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env=os.environ | {"EQX_ON_ERROR": setting},
    )  # fmt: skip
    assert out.stdout.split() == ["True"] * 4, out.stdout + out.stderr
