"""What the README tells a reader to type, and what it says."""

import collections
import json
import pathlib
import re
import tomllib

import equinox as eqx
import jax
import pytest
from helpers import compiled
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

import gradflow as gf

pytest.importorskip("tyro")
from experiments.report import cells, number  # noqa: E402
from experiments.two_phase.study import TwoPhase  # noqa: E402

# Programs that the first example compiles, 22 of them for the user's own lines.
MOST = 60

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
TIMES = (ROOT / "benchmarks" / "results" / "work_precision.md").read_text("utf-8")


@pytest.mark.slow
def test_example_runs(tmp_path, monkeypatch, capsys):
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    (block,) = listings("python")
    run, drawn = block.split("print(report)")
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


def listings(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_what_the_example_prints_is_what_its_page_does():
    """The same lines as on the page, of which what came out is kept."""
    page = (ROOT / "docs" / "executed" / "start" / "page.md").read_text("utf-8")
    printed = {line.strip() for line in page.splitlines()}
    (told,) = listings("text")
    lines = told.splitlines()
    assert len(lines) == 5 and {line.strip() for line in lines} <= printed


def test_every_number_is_kept_somewhere():
    """In a record, a result of a benchmark, or a setting; and it is that number."""
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)", "]", text)  # addresses
    text = " ".join(re.sub(r"`[^`]*`", "", text).split())
    for words in (*phrases(), *claims(), *times()):
        if words in text:
            text = text.replace(words, "")
        else:
            assert words.startswith("|"), words  # not all rows of a table are there
    text = re.sub(r"\bP[1-4]\b|1/λ", "", text)  # names, and formulas
    assert not re.findall(r".{0,30}\d.{0,30}", text)
    words = "three|four|five|six|seven|eight|nine|ten|half|hundred|thousand|million"
    assert not re.findall(rf".{{0,30}}\b(?:{words})\b.{{0,30}}", text)
    assert len([row for row in claims() if row in README]) == 5
    assert len([row for row in times() if row in README]) == 2 + 8  # with its head


def phrases():
    """Whatever has a number in it, outside of tables."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    yield f"Python {settings['requires-python'].removeprefix('>=')} or later"
    yield f"Licence: {settings['license'].replace('-', ' ')}"

    lams = TwoPhase().lams
    first, last = number(lams[0]), number(lams[-1])
    yield f"{len(lams)} weight decays from {first} to {last}"
    yield f"({kept('experiments/records/two_phase')['cpu_seconds']:.0f} s of a core"

    waited = kept("benchmarks/results/first_result")
    once = waited["simulate"]["simulate"]
    yield (
        f"{once:.1f} s for the first path, {waited['block']['fresh']:.0f} s for all of "
        f"this example, {waited['block']['cached']:.1f} s in the next process"
    )

    page = (ROOT / "docs" / "executed" / "start" / "page.md").read_text("utf-8")
    (crossed,) = re.findall(r"^ +measured: ([\d.]+)$", page, re.MULTILINE)
    yield f"it is {crossed}."

    found = re.search(r"error of (\S+) at λ = (\S+), slow time (\d+), one core", TIMES)
    error, lam = (number(float(x)) for x in found.groups()[:2])
    yield f"error of {error} along the whole path, at λ = {lam}, to s = {found[3]}, on"
    d, memory = re.search(r"P4, .*: a (\d+) × \1 matrix takes (\S+ GB)", TIMES).groups()
    yield f'P4 of {number(int(d))} parameters: "does not fit" is a matrix of {memory}.'


def claims():
    """Of the main experiment, and what came out, as rows of a table."""
    for _, _, asked, measured, *_ in cells(kept("experiments/records/two_phase")):
        yield f"| {asked} | {measured} |"


def times():
    """Of all methods, as rows of a table, without the ratio to gradflow."""
    for line in TIMES.splitlines():
        if line.startswith("|"):
            yield re.sub(r" \([^()]* ×\)", "", line)


def kept(name):
    return json.loads((ROOT / f"{name}.json").read_text("utf-8"))


def test_links_exist():
    for target in re.findall(r"\]\(((?!http)[^)]*)\)", README):
        assert (ROOT / target.partition("#")[0]).exists(), target
    # Nothing left to fill in, but for the names of environment variables.
    words = re.sub("JAX_ENABLE|GRADFLOW_DATA", "", README)
    assert not re.search(r"\b[A-Z]{3,}_[A-Z]{3,}\b", words)
