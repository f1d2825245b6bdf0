"""The site: it builds, has every public name, and shows what its code does."""

import copy
import inspect
import operator
import os
import pathlib
import re
import subprocess
import sys
import types

import pytest

import gradflow as gf

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import docstrings  # noqa: E402
import executed  # noqa: E402
import generated  # noqa: E402

ROOMS = ("data", "drifts", "manifold", "metrics", "models", "plot", "tasks")
ELSEWHERE = {"metrics.Accuracy", "metrics.Metric", "metrics.sharpness"}


def public(module, prefix=""):
    return {
        prefix + name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }


def test_every_public_name_is_in_the_reference_once():
    known = executed.documented()
    assert len(known) == len(set(known))
    wanted = public(gf).union(*(public(getattr(gf, r), f"{r}.") for r in ROOMS))
    assert wanted - ELSEWHERE - set(known) == set()
    for name in known:
        thing = gf
        for part in name.split("."):
            thing = getattr(thing, part)


def test_the_reference_tells_all():
    """Arguments, fields, what is returned and raised, of each public name."""
    left_out = [
        one for name in executed.documented() for one in docstrings.missing(name)
    ]
    assert not left_out, "\n".join(left_out)


@pytest.mark.parametrize(
    "old, new, found",
    [
        ("- `key`: of", "- of", "`key` is not described"),
        ("**Returns:**", "It gives", "what it returns"),
        ("`RuntimeError` if", "an error if", "that it raises RuntimeError"),
        ("t = h · steps, and", "θ* at h · steps, and", "a star, 'e flow: θ* at h · s'"),
    ],
)
def test_what_a_docstring_leaves_out_is_found(old, new, found):
    module, node = docstrings.found(gf.descent)
    assert not list(docstrings.of_function(module, node, "descent"))
    node = copy.deepcopy(node)
    text = node.body[0].value
    assert text.value.count(old) == 1
    text.value = text.value.replace(old, new)
    (told,) = docstrings.of_function(module, node, "descent")
    assert told.startswith(f"descent: {found}")


def test_remedies_name_what_there_is():
    """Arguments, fields and methods, of what a message says what to do with."""
    known = set()
    for name in executed.documented():
        known.add(name.rpartition(".")[2])
        thing = operator.attrgetter(name)(gf)
        if isinstance(thing, type):
            known |= {*dir(thing), *thing.__annotations__}
        if callable(thing) and not isinstance(thing, type(gf.plot.Clock)):
            known |= set(inspect.signature(thing).parameters)
    codes, told = gf.results.CODES, 0
    for message in (gf.RESULTS[getattr(gf.RESULTS, name)] for name in codes):
        names = re.findall(r"`(\w[\w.]*)", message) + re.findall(r"\b(\w+)=", message)
        assert {name.rpartition(".")[2] for name in names} <= known, message
        told += bool(names)
    assert told >= 14


def test_the_glossary_has_every_symbol_with_its_unit():
    text = (ROOT / "docs" / "glossary.md").read_text("utf-8")
    rows = [row[2:-2].split(" | ") for row in text.splitlines() if row.startswith("| ")]
    units = {symbol: row[-1].strip() for row in rows for symbol in row[0].split(", ")}
    wanted = "t, s = λt, λ, h, α, η, Φ(θ), P, M, J, R, F, G, ρ, κ, μ, σ".split(", ")
    assert {*wanted} <= {*units} and all(units.values())


def test_every_name_in_the_text_is_there():
    """Of gradflow, as `gf.manifold.limit_map`, on all pages and in the README."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *executed.scripts()]
    name = re.compile(r"\bgf((?:\.[A-Za-z_]\w*)+)")
    names = {n for page in pages for n in name.findall(page.read_text("utf-8"))}
    assert len(names) > 50
    for name in names:
        thing = gf
        for part in name.split(".")[1:]:
            thing = getattr(thing, part)


def test_outputs_are_of_the_pages_that_show_them():
    pages = executed.scripts()
    assert len(pages) >= 18 and len(executed.programs()) >= 10
    for page in pages + executed.programs():
        assert not executed.stale(page), page


def test_what_pages_are_made_of():
    """Each asks for what there is; and what is made says what is kept."""
    asked = "\n".join(p.read_text("utf-8") for p in (ROOT / "docs").rglob("*.md"))
    made = generated.filled(asked)
    assert "<!-- made" in asked and "<!-- made" not in made
    for name, code in gf.results.CODES.items():
        assert f"## `{name}` ({code})" in made
    kept = (ROOT / "benchmarks" / "results" / "work_precision.md").read_text("utf-8")
    assert all(line in made for line in kept.splitlines() if line.startswith("|"))
    rows = generated.stiff_cases().splitlines()[2:]
    assert len(rows) == 36 and rows[0].startswith("| tanh_17 | 17 | 1e-02 | 50 (1) |")
    for page in (generated.gallery() | generated.studies()).values():
        assert page.startswith("# ") and "```sh\npython -m experiments." in page


def run(*command, cwd):
    """What it ended with, and the end of what it said."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    out = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    return out.returncode, (out.stdout + out.stderr)[-3000:]


@pytest.mark.long
@pytest.mark.parametrize("page", [page.stem for page in executed.scripts()])
def test_page_runs(page, tmp_path):
    (script,) = (path for path in executed.scripts() if path.stem == page)
    status, said = run(sys.executable, script, cwd=tmp_path)
    assert status == 0, said
