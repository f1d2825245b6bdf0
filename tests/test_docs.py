"""The site: it builds, has every public name, and shows what its code does."""

import os
import pathlib
import subprocess
import sys
import types

import pytest

import gradflow as gf

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import executed  # noqa: E402

ROOMS = ("data", "manifold", "metrics", "models", "plot", "tasks")
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


def test_outputs_are_of_the_pages_that_show_them():
    pages = executed.scripts()
    assert len(pages) >= 6
    for page in pages:
        assert not executed.stale(page), page


def run(*command, cwd):
    env = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    out = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert not out.returncode, (out.stdout + out.stderr)[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page.stem for page in executed.scripts()])
def test_page_runs(page, tmp_path):
    (script,) = (path for path in executed.scripts() if path.stem == page)
    run(sys.executable, script, cwd=tmp_path)


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path):
    """No page, link, anchor or name that leads nowhere."""
    site = tmp_path / "site"
    run(sys.executable, "-m", "mkdocs", "build", "--strict", "-d", site, cwd=ROOT)
    pages = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    assert {"index.html", "start.html", "reference/flows.html"} <= pages
    text = (site / "reference" / "flows.html").read_text("utf-8")
    assert 'id="gradflow.simulate"' in text and 'href="#gradflow.Path"' in text
    concepts = (site / "concepts.html").read_text("utf-8")
    assert "<math" in concepts and "arithmatex" not in concepts
