"""What the README tells a reader to type."""

import collections
import pathlib
import re

import equinox as eqx
import jax
import pytest
from helpers import compiled
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

import gradflow as gf

# Programs that the first example compiles, 22 of them for the user's own lines.
MOST = 60

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.slow
def test_example_runs(tmp_path, monkeypatch, capsys):
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3  # each goes on where the one before ended
    run, drawn = blocks[0].split("print(report)")
    eqx.clear_caches()
    jax.clear_caches()  # of what other tests have compiled
    scope = {}
    with compiled() as names:
        exec(compile(run, "README.md", "exec"), scope)
    assert len(names) <= MOST, collections.Counter(names)
    with compiled() as names:
        exec("print(report)" + drawn, scope)
        print(scope["sweep"], scope["theory"], scope["theory"].drift)
    assert not names
    exec(compile("\n".join(blocks[1:]), "README.md", "exec"), scope)
    check_all_are_cached(run, tmp_path)
    assert (tmp_path / "report.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "rate of the error" in out and "order 2, theory holds up to" in out


def check_all_are_cached(code, folder):
    """That a process which finds them in JAX's cache compiles nothing."""
    names = ["jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"]
    before = {name: getattr(jax.config, name) for name in names}
    found = []
    note = lambda event, **_: found.append(event)
    try:
        assert gf.cache_programs(folder / "programs") == str(folder / "programs")
        for _ in range(2):
            eqx.clear_caches()
            jax.clear_caches()
            found.clear()
            monitoring.register_event_listener(note)
            with compiled() as programs:
                exec(compile(code, "README.md", "exec"), {})
            monitoring.unregister_event_listener(note)
        assert found.count("/jax/compilation_cache/cache_hits") == len(programs) > 40
        assert not found.count("/jax/compilation_cache/cache_misses")
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_links_exist():
    root = pathlib.Path(__file__).parent.parent
    for target in re.findall(r"\]\(((?!http)[^)]*)\)", README):
        assert (root / target).exists(), target
    # Nothing left to fill in, but for the names of environment variables.
    words = re.sub("JAX_ENABLE|GRADFLOW_DATA", "", README)
    assert not re.search(r"\b[A-Z]{3,}_[A-Z]{3,}\b", words)
