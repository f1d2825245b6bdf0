"""How a run was made, and what it took."""

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import gradflow as gf
from gradflow.sweeps.stack import stack

ONE = gf.Stats(
    "KKT4", jnp.asarray(7), jnp.asarray(5), jnp.asarray(2), rtol=1e-6, why="small",
    conditioning=jnp.asarray(0.5),
)  # fmt: skip


def test_work_adds_up_and_the_rest_is_that_of_the_first():
    other = gf.Stats("Tsit5", jnp.asarray(3), trial_steps=jnp.asarray(9), rtol=1e-3)
    both = ONE.with_work_of(other, other)
    assert (both.steps, both.accepted, both.rejected) == (13, 5, 2)
    assert both.trial_steps == 18
    assert both.solver == "KKT4" and both.why == "small" and both.rtol == 1e-6
    assert both.conditioning == 0.5 and both.sliding is None


def test_in_words():
    assert str(ONE) == "KKT4, rtol 1e-06: 7 steps, 2 rejected"
    descent = gf.Stats("descent (subgradient)", 50, learning_rate=0.01)
    assert str(descent) == "descent (subgradient), 50 steps of 0.01"


def test_fields_by_name():
    assert ONE["steps"] == 7 and ONE["solver"] == "KKT4" and ONE["sliding"] is None
    for name in ("of", "step", "__str__"):
        with pytest.raises(KeyError):
            ONE[name]


def test_words_are_no_arguments():
    """So that what a run gives may come out of `jax.jit`, too."""
    assert str(jax.jit(lambda stats: stats)(ONE)) == str(ONE)


@pytest.mark.slow
def test_lanes_by_different_solvers():
    """A number that some solvers do not have is NaN in their lanes."""
    task = gf.tasks.diagonal_network(jr.key(0), samples=3, dim=6)
    options = dict(weight_decay=1e-2, t1=0.1, saves=3)
    paths = [
        gf.simulate(task.flow, task.model, solver=solver, **options)
        for solver in (diffrax.Tsit5(), gf.KKT4())
    ]
    paths[1] = paths[1].told(why="stiff", trial_steps=jnp.asarray(30))
    stats = stack(paths).stats
    assert stats.solver == ("Tsit5", "KKT4") and stats.why == ("given", "stiff")
    assert stats.learning_rate is None and stats.trial_steps.tolist() == [0, 30]
    first, second = stats.lane(0), stats.lane(1)
    assert (first.solver, second.solver, second.why) == ("Tsit5", "KKT4", "stiff")
    assert np.isnan(first.conditioning)
    for name in ("steps", "rejected", "conditioning", "rtol", "trial_steps"):
        assert getattr(second, name) == getattr(paths[1].stats, name)
