"""What a release is made of: its version, what it packs, and what is run for it."""

import pathlib
import re
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
pathspec = pytest.importorskip("pathspec")
yaml = pytest.importorskip("yaml")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
HATCH = PYPROJECT["tool"]["hatch"]


def text(name):
    return (ROOT / name).read_text("utf-8")


def test_versions_agree():
    version = PYPROJECT["project"]["version"]
    cited = yaml.safe_load(text("CITATION.cff"))
    latest = re.search(r"^## (\S+) \((\S+)\)$", text("CHANGELOG.md"), re.MULTILINE)
    assert cited["version"] == latest[1] == version
    assert str(cited["date-released"]) == latest[2]


def test_what_is_linked_is_in_the_source_distribution():
    packed = HATCH["build"]["targets"]["sdist"]["include"]
    assert all((ROOT / name).exists() for name in packed)
    for page in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(((?!http)[^)#]+)", text(page)):
            assert (ROOT / target).exists(), target
            assert pathlib.Path(target).parts[0] in packed, target


def test_no_result_is_ignored():
    """What git ignores is left out of the source distribution too."""
    lines = text(".gitignore").splitlines()
    ignored = pathspec.GitIgnoreSpec.from_lines(lines)
    kept = ["benchmarks/results", "experiments/records", "docs/executed"]
    files = [p for name in kept for p in (ROOT / name).rglob("*.*") if p.is_file()]
    names = [p.relative_to(ROOT).as_posix() for p in files]
    assert len(names) > 100 and ignored.match_file("results/two_phase/report.png")
    assert not list(ignored.match_files(names))


def test_an_index_is_shown_no_relative_link():
    shown = text("README.md")
    hook = HATCH["metadata"]["hooks"]["fancy-pypi-readme"]
    for change in hook["substitutions"]:
        shown = re.sub(change["pattern"], change["replacement"], shown)
    assert "](https://docs.kidger.site/equinox)" in shown
    assert "(A figure: Time against 1/λ" in shown
    assert not re.findall(r"!\[|\]\((?!https?:)", shown)


def test_the_public_workflow_runs_what_is_promised():
    """The Pythons of the classifiers, and the line of the README that stands there."""
    file = text(".github/workflows/tests.yml")
    flow = yaml.safe_load(file)
    pythons = flow["jobs"]["quick"]["strategy"]["matrix"]["python"]
    minor = re.compile(r"Python :: (3\.\d+)$")
    named = [minor.search(c) for c in PYPROJECT["project"]["classifiers"]]
    assert pythons == [found[1] for found in named if found]
    assert PYPROJECT["project"]["requires-python"] == f">={pythons[0]}"
    (asked,) = set(re.findall(r"grep -E '([^']+)' README.md", file))
    assert len(re.findall(asked, text("README.md"), re.MULTILINE)) == 1
    runs = [s.get("run", "") for job in flow["jobs"].values() for s in job["steps"]]
    slow = "pytest -q -n auto --dist loadfile -m slow"
    assert any(slow in run for run in runs) and slow in text(".ci/run")
    assert flow["permissions"] == {"contents": "read"} and "secrets" not in file
