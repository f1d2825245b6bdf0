"""Strict numerics, shapes checked at run time, and fresh random keys."""

import atexit
import gc
import importlib.metadata
import os
import random
import shutil
import tempfile

# Most of the time goes into compiling small programs: let that be quick. XLA ends the
# process for a flag that it does not know.
flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    flags += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", flags)
# What one worker has compiled, others need not, nor processes that tests start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    programs = tempfile.mkdtemp(prefix="gradflow-")
    atexit.register(shutil.rmtree, programs, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Before anything imports gradflow: every annotation of the library is checked.
install_import_hook("gradflow", "beartype.beartype")


def pytest_configure(config):
    """Workers take files as they come, the notebooks first. (By default those of few
    tests would be last, and these take longest: all but one worker would wait.)"""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")


def cpu_seconds():
    """Of this process and of those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


# What a test may take of one core, unless it is marked `slow` or `long`. Nearly all of
# it is compilation, and many hundred tests are to end within minutes.
MOST_SECONDS = 5.0
# What `reference_seconds` took on the idle machine for which that was set.
REFERENCE = 0.11


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    begin = cpu_seconds()
    result = yield
    seconds = cpu_seconds() - begin
    record(item, "call", seconds)
    marked = any(map(item.get_closest_marker, ("slow", "long")))
    if not marked and seconds > MOST_SECONDS:
        # A machine that is slower, or does other work too, may take longer.
        limit = 2 * MOST_SECONDS * max(1.0, reference_seconds() / REFERENCE)
        if seconds > limit:
            pytest.fail(
                f"took {seconds:.1f} s of a core, {limit:.1f} are allowed here: make "
                "it shorter, share a program with its neighbours, or mark it slow."
            )
    return result


def reference_seconds():
    """What a small program takes to be compiled, which was not before."""

    def program(x):
        for i in range(15):
            x = jnp.sin(x) * i + jnp.sum(x)
        return x

    def once():
        begin = cpu_seconds()
        jax.jit(lambda x: program(x))(jnp.ones(7)).block_until_ready()
        return cpu_seconds() - begin

    return min(once() for _ in range(3))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    begin = cpu_seconds()
    result = yield
    record(item, "setup", cpu_seconds() - begin)
    return result


def record(item, what, seconds):
    """Into the file that `GRADFLOW_TIMES` names, to see what the suite waits for."""
    if name := os.environ.get("GRADFLOW_TIMES"):
        with open(name, "a", encoding="utf-8") as file:
            print(f"{seconds:.2f}", what, item.nodeid, file=file)


@pytest.fixture(scope="module", autouse=True)
def forget():
    """Now and then what was compiled is dropped, after a file: it takes memory maps, of
    which Linux grants a process 65530, and beyond them it ends in a segmentation
    fault."""
    yield
    drop_programs()


def drop_programs(most=25_000):
    """Drops what was compiled, where the process has more memory maps than `most`."""
    if memory_maps() > most:
        eqx.clear_caches()
        jax.clear_caches()
        gc.collect()


def memory_maps():
    """How many this process has; 0 where they can't be counted."""
    try:
        with open("/proc/self/maps") as file:
            return sum(1 for _ in file)
    except OSError:
        return 0


@pytest.fixture
def getkey():
    """A function that returns a new random key at each call, the same ones in every
    run of the same test."""
    generator = random.Random(0)

    def _getkey():
        return jax.random.key(generator.randint(0, 2**31 - 1))

    return _getkey


# What several files of tests share; made anew for each. (gradflow is imported late,
# with its annotations checked.)


@pytest.fixture(scope="module")
def diagonal():
    """A diagonal network with 6 samples and 15 features, at an interpolating point."""
    from helpers import diagonal_problem

    from gradflow.manifold import limit_map

    loss, model = diagonal_problem(jax.random.key(7), samples=6, features=15)
    return loss, model, limit_map(loss, model).model


@pytest.fixture(scope="module")
def tanh_net():
    """A generic network, interpolating 8 samples: no symmetry helps."""
    import gradflow as gf

    kx, ky, km = jax.random.split(jax.random.key(11), 3)
    x, y = jax.random.normal(kx, (8, 3)), jax.random.normal(ky, (8, 1))
    loss = gf.SquaredError(x, y)
    model = eqx.nn.MLP(3, 1, 12, 1, activation=jnp.tanh, key=km)
    return loss, model, gf.manifold.limit_map(loss, model).model


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A store of a small sweep, and what is in it."""
    from stores import run

    path = tmp_path_factory.mktemp("whole") / "sweep.zarr"
    return path, run(path, parameters=True)


@pytest.fixture(scope="module")
def browser():
    """A Chromium of the system, by Playwright."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="no Playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = [path for path in map(shutil.which, names) if path]
    if not found:
        pytest.skip(f"no browser is installed: none of {names}")
    options = dict(executable_path=found[0], args=["--no-sandbox"])
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(**options)
        yield browser
        browser.close()
