"""The pages that are scripts, and what came out of them.

A page is a percent script, `# %%` before each cell, `# %% [markdown]` before text. What
it printed and drew is kept beside its source's hash in `executed/`, so that the site is
built without running anything; a hash that is not that of the source fails the build.
The programs of the gallery are kept alike: what they printed and drew, and how long that
took.
"""

import hashlib
import re
from pathlib import Path

DOCS = Path(__file__).parent
OUT = DOCS / "executed"
GALLERY = DOCS.parent / "experiments" / "gallery"
_OWN = {"constructors.py", "executed.py", "execute.py", "generated.py", "hooks.py"}


def scripts() -> list[Path]:
    """All pages that are scripts."""
    return sorted(p for p in DOCS.rglob("*.py") if p.name not in _OWN)


def programs() -> list[Path]:
    """All programs of the gallery."""
    return sorted(GALLERY.glob("[!_]*.py"))


def key(script: Path) -> str:
    return hashlib.sha256(script.read_bytes()).hexdigest()[:16]


def place(script: Path) -> Path:
    """The folder of what came out."""
    root = DOCS if script.is_relative_to(DOCS) else GALLERY.parent
    return OUT / script.relative_to(root).with_suffix("")


def stale(script: Path) -> str:
    """Why what is kept is not of this script; "" where it is."""
    page = place(script) / "page.md"
    if not page.exists():
        return "has not been run"
    first = page.read_text(encoding="utf-8").splitlines()[0]
    return "" if first == header(script) else "has changed since it was run"


def header(script: Path) -> str:
    return f"<!-- {script.name} {key(script)} -->"


def text(script: Path) -> str:
    page = (place(script) / "page.md").read_text(encoding="utf-8")
    return page.split("\n", 1)[1]


def figures(script: Path) -> list[Path]:
    return sorted(place(script).glob("*.png"))


def documented() -> list[str]:
    """The names in the reference, without `gradflow.`, in order."""
    pages = sorted((DOCS / "reference").glob("*.md"))
    entry = re.compile(r"^::: gradflow\.([\w.]+)$", re.M)
    return [name for page in pages for name in entry.findall(page.read_text("utf-8"))]
