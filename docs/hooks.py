"""What the pages are made with beside Markdown: outputs of scripts, pages made from the
code, formulas, and links from a name in the text to its reference."""

import ast
import re
import sys
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))

import executed  # noqa: E402

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are scripts, with their outputs; those made from the code;
    and the figures of the experiments."""

    def add(uri: str, content: str | bytes) -> None:
        files.append(File.generated(config, uri, content=content))

    for script in executed.scripts():
        stale = executed.stale(script)
        if stale:
            raise PluginError(f"{script}: {stale}; run python docs/execute.py")
        page = script.relative_to(executed.DOCS).with_suffix(".md")
        add(page.as_posix(), executed.text(script))
        for figure in executed.figures(script):
            add((page.parent / figure.name).as_posix(), figure.read_bytes())
    for figure in (ROOT / "experiments" / "figures").glob("*.png"):
        add(f"figures/{figure.name}", figure.read_bytes())
    for figure in (ROOT / "benchmarks" / "results").glob("*.png"):
        add(f"figures/{figure.name}", figure.read_bytes())
    add("what-can-go-wrong.md", results())
    for name, text in gallery().items():
        add(f"gallery/{name}.md", text)
    return files


def results() -> str:
    """The page of `RESULTS`: every message is one a user has seen."""
    from gradflow.results import CODES, RESULTS

    lines = [
        "# What can go wrong",
        "",
        "Every run says how it ended: `path.result`, or `sweep.result` with one for "
        "each lane. What is printed, or raised, is the cause and a remedy; with "
        "`throw=False` nothing is raised. A store keeps the number.",
        "",
    ]
    for name, code in CODES.items():
        message = RESULTS[getattr(RESULTS, name)] or "The run reached its end."
        lines += [f"## `{name}` ({code})", "", message, ""]
    return "\n".join(lines)


def gallery() -> dict[str, str]:
    """The pages of the gallery, from its files: title, words, figure, code."""
    pages = {}
    for path in sorted((ROOT / "experiments" / "gallery").glob("[!_]*.py")):
        code = path.read_text(encoding="utf-8")
        words = (ast.get_docstring(ast.parse(code)) or "").splitlines()
        body = code.split('"""', 2)[2].strip()
        figure = ""
        if (ROOT / "experiments" / "figures" / f"gallery_{path.stem}.png").exists():
            figure = f"![{words[0]}](../figures/gallery_{path.stem}.png)\n\n"
        pages[path.stem] = (
            f"# {words[0].rstrip('.')}\n\n" + "\n".join(words[1:]).strip() + "\n\n"
            f"{figure}```sh\npython -m experiments.gallery.{path.stem}\n```\n\n"
            f"```python\n{body}\n```\n"
        )
    return pages


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    html = _FORMULA.sub(_formula, html)
    return _CODE.sub(_linked, html)


_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)
# Code that is text: none that is a heading, a listing or a link already.
_CODE = re.compile(
    r"<(h\d|pre|a|autoref)\b.*?</\1>|<code>(?:gf\.|gradflow\.)?([\w.]+)(?:\(\))?</code>",
    re.S,
)


def _formula(found: re.Match) -> str:
    how = "block" if found[1] == "div" else "inline"
    return convert(unescape(found[2]), display=how)


def _linked(found: re.Match) -> str:
    """A name of the library in the text, as a link to its reference."""
    name, whole = found[2], found[0]
    if name is None or name not in _names():
        return whole
    if name[0].islower() and "gf." not in whole and "gradflow." not in whole:
        return whole  # `load`, `sweep`: often the name of an argument
    return f'<autoref identifier="gradflow.{name}" optional>{whole}</autoref>'


def _names() -> frozenset[str]:
    """All that the reference has."""
    return frozenset(executed.documented())
