"""When two sweeps are one and the same, as a store has to know."""

import json
import threading

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from stores import in_threads

import gradflow as gf
from gradflow.sweeps.identity import describe, difference


def described(value):
    return json.loads(json.dumps(describe(value)))


def inside(k):
    def metric(model, power=2):
        return k * model**power

    return metric


class Norm:
    def __init__(self, p):
        self.p = p

    def __call__(self, model):
        return self.p

    def method(self, model):
        return self.p


@pytest.mark.parametrize(
    "one, two, same",
    [
        (lambda m: m + 1, lambda m: m + 2, lambda m: m + 1),
        (inside(1), inside(2), inside(1)),
        (Norm(1), Norm(2), Norm(1)),
        (Norm(1).method, Norm(2).method, Norm(1).method),
        (optax.sgd(0.1), optax.sgd(0.2), optax.sgd(0.1)),
        (gf.L2(where=lambda m: m[0]), gf.L2(where=lambda m: m[1]), None),
        ({"a", "b"}, {"a", "c"}, {"b", "a"}),
        (np.array([np.nan, 1.0]), np.array([np.nan, 2.0]), np.array([np.nan, 1.0])),
        (np.array(["a", None]), np.array(["b", None]), np.array(["a", None])),
    ],
)
def test_what_differs_is_told_apart(one, two, same):
    assert difference(described(one), described(two)) != []
    if same is not None:
        assert difference(described(one), described(same)) == []


def test_what_is_described_is_not_itself_a_trap():
    def again(n):
        return again(n - 1) if n else 0

    assert "again" in str(described(again))  # which closes over itself
    assert difference({"a": np.nan}, {"a": np.nan}) == []
    # What another version of Python compiled tells nothing.
    here = described(lambda m: m)
    assert difference(here | {"code": "code of cpython-30 1234"}, here) == []


class Meets:
    """Is described only while another thread describes it too."""

    barrier = threading.Barrier(2, timeout=20)

    @property
    def __dict__(self):
        self.barrier.wait()
        return {}


def test_what_two_threads_describe_at_a_time():
    shared = Norm({"p": 3, "q": Meets()})
    found = in_threads(lambda: describe(shared), lambda: describe([shared]))
    assert found[0] == {"type": "Norm", "p": {"p": 3, "q": "Meets"}}
    assert found[1] == [found[0]]


def test_what_a_later_version_added_and_is_not_used_tells_nothing():
    x, y = np.ones((3, 2)), np.zeros(3)
    x, y = jnp.asarray(x), jnp.asarray(y)
    now = described(gf.SquaredError(x, y))
    before = {key: value for key, value in now.items() if key != "weights"}
    assert before != now and not difference(before, now)
    assert difference(before, described(gf.SquaredError(x, y, weights=y + 1)))
