"""The gallery: each page runs as its reader would run it, and says that it is right."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted(
    path.stem
    for path in (ROOT / "experiments" / "gallery").glob("*.py")
    if path.stem != "__init__"
)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_page(page, tmp_path):
    out = subprocess.run(
        [sys.executable, "-m", f"experiments.gallery.{page}"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert not out.returncode, out.stderr[-2000:]
    assert out.stdout
    figure = tmp_path / "results" / "gallery" / f"{page}.png"
    assert figure.stat().st_size > 10_000


def test_pages_are_short():
    """Of what is new to a reader a page holds no more than a screen or two."""
    assert len(PAGES) >= 10
    for page in PAGES:
        path = ROOT / "experiments" / "gallery" / f"{page}.py"
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 80, page
