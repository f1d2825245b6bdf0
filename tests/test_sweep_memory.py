"""Sweeps of more lanes than fit into memory together."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.random as jr
import numpy as np
import pytest

import gradflow as gf
from gradflow.sweeps import memory, programs

ROOT = pathlib.Path(__file__).parents[1]
TASK = gf.tasks.linear_regression(jr.key(0), samples=3, dim=6)
LAMS = np.geomspace(1.0, 1e-2, 11)
TOLD = "RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes."


def run(batch="vmap", lams=LAMS, **options):
    return gf.sweep(
        TASK.flow, TASK.model, weight_decay=lams, saves=5, progress=False,
        run=gf.Descent(0.05, steps=600), metrics=TASK.metrics, batch=batch, **options,
    )  # fmt: skip


class Full:
    """A result whose program has run out of memory."""

    def __array__(self, *args, **kwargs):
        raise jax.errors.JaxRuntimeError(TOLD)


@pytest.fixture
def small(monkeypatch):
    """Makes a memory that holds so many lanes; returns the sizes of all programs."""

    def hold(most, error=None, *, late=False):
        made, program = [], programs._program

        def counted(run, number, *args):
            made.append(len(number))
            if len(number) <= most:
                return program(run, number, *args)
            if late:
                return Full()
            raise error or jax.errors.JaxRuntimeError(TOLD)

        monkeypatch.setattr(programs, "_program", counted)
        return made

    return hold


@pytest.fixture(scope="module")
def whole():
    return run()


def same(a, b):
    """(Lockstep of another number of lanes may round in another way.)"""
    np.testing.assert_array_equal(gf.results.codes(a.result), [0] * len(LAMS))
    for name in ("t", "train_loss", "penalty"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-12)


@pytest.mark.parametrize("late", [False, True])
def test_half_as_many_lanes(small, whole, late):
    """And again, and never more than those that fit."""
    made = small(3, late=late)
    with pytest.warns(UserWarning, match="11 lanes at once do not fit .* they are 6"):
        lanes = run()
    assert made == [11, 6, 6, 3, 3, 3, 3] or made == [11, 6, 3, 3, 3, 3]
    same(lanes, whole)
