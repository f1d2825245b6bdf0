"""Makes the reference paths in tests/data: SciPy's Radau on tasks of default size.

    python tests/make_references.py            # all of them, some minutes
    python tests/make_references.py diagonal   # one

Each task gets one file, `data/radau_<name>.npz`, with, for each λ of `DECAYS`, all
parameters at `TIMES` times evenly spaced in log t from 0.1 to 5/λ (s = 5), by Radau
with rtol 1e-11 and atol 1e-13, the jitted gradient and the dense jitted Hessian.
`about` is a JSON string: how the task was made, the settings, the versions of the
packages. `theta0` and `loss0` tell whether the task made today is still the one that
was solved.
"""

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import jax
import jax.random as jr
import numpy as np
from jax.flatten_util import ravel_pytree

jax.config.update("jax_enable_x64", True)

from helpers import radau_path  # noqa: E402

from gradflow import tasks  # noqa: E402

DATA = Path(__file__).parent / "data"
DECAYS = (1e-2, 1e-4)
TIMES = 12
TASKS = {
    "diagonal": (tasks.diagonal_network, {"form": "difference"}),
    "completion": (tasks.matrix_completion, {}),
    "tanh": (tasks.teacher_student, {"activation": "tanh"}),
}


def make_task(name):
    maker, settings = TASKS[name]
    return maker(jr.key(0), **settings)


def make(name):
    maker, settings = TASKS[name]
    task = make_task(name)
    arrays = {
        "theta0": np.asarray(ravel_pytree(task.model)[0]),
        "loss0": np.asarray(task.loss(task.model)),
    }
    for decay in DECAYS:
        ts = np.geomspace(0.1, 5 / decay, TIMES)
        theta, evaluations = radau_path(task, decay, ts)
        arrays[f"ts_{decay:.0e}"] = ts
        arrays[f"theta_{decay:.0e}"] = theta
        print(f"{name}, λ = {decay:.0e}: {evaluations} evaluations", flush=True)
    packages = ("jax", "jaxlib", "scipy", "numpy", "equinox")
    about = {
        "task": maker.__name__,
        "key": 0,
        "settings": settings,
        "method": "scipy.integrate.solve_ivp, Radau, rtol 1e-11, atol 1e-13",
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }
    DATA.mkdir(exist_ok=True)
    np.savez_compressed(
        DATA / f"radau_{name}.npz", about=np.array(json.dumps(about)), **arrays
    )


if __name__ == "__main__":
    for each in sys.argv[1:] or TASKS:
        make(each)
