"""What the pages are made with beside Markdown: outputs of scripts, pages made from the
code, formulas, and links from a name in the text to its reference."""

import functools
import re
import sys
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from plotly.offline import get_plotlyjs

sys.path.insert(0, str(Path(__file__).parent))

import executed  # noqa: E402
import generated  # noqa: E402

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are scripts, with their outputs; those made from the code;
    and the figures of the experiments."""

    def add(uri: str, content: str | bytes) -> None:
        files.append(File.generated(config, uri, content=content))

    for script in executed.scripts() + executed.programs():
        stale = executed.stale(script)
        if stale:
            raise PluginError(f"{script}: {stale}; run python docs/execute.py")
        folder = executed.place(script).relative_to(executed.OUT).parent
        if script in executed.scripts():
            page = (folder / script.stem).with_suffix(".md")
            add(page.as_posix(), executed.text(script))
        for figure in executed.figures(script):
            add((folder / figure.name).as_posix(), figure.read_bytes())
    for kept in ("experiments/figures", "benchmarks/results"):
        for figure in (ROOT / kept).glob("*.png"):
            add(f"figures/{figure.name}", figure.read_bytes())
    # Interactive figures are kept without Plotly's own code, which is that installed.
    for page in (ROOT / "experiments/figures").glob("*.html"):
        add(f"figures/{page.name}", page.read_bytes())
    add("figures/plotly.min.js", get_plotlyjs())
    for name, text in (generated.gallery() | generated.studies()).items():
        add(f"gallery/{name}.md", text)
    return files


def on_page_markdown(
    markdown: str, page: Page, config: MkDocsConfig, files: Files
) -> str:
    return generated.filled(markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    html = _FORMULA.sub(_formula, html)
    html = _FIGURE.sub(r'<a href="\2">\1</a>', html)
    if page.file.src_uri.startswith("reference/"):
        html = _SHAPE.sub(r"\1", _SMALL.sub(_raised, html))
    return _CODE.sub(_linked, html)


_FIGURE = re.compile(r'(<img [^>]*src="([^"]+\.png)"[^>]*>)')  # to be looked at alone
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)
_ONE = r"<m[in]>[^<]*</m[in]>"
_PRIME = re.compile(
    rf"<msu(?:p|bsup)>(?P<base>{_ONE})(?P<sub>(?:{_ONE})?)"
    r"<mi>(?P<prime>&#x0203[234];)</mi></msu(?:p|bsup)>"
)
# Code that is text: none that is a heading, a listing or a link already.
_CODE = re.compile(
    r"<(h\d|pre|a|autoref)\b.*?</\1>|<code>(?:gf\.|gradflow\.)?([\w.]+)(?:\(\))?</code>",
    re.S,
)
_SHAPE = re.compile(r"""(<span class="s[12]">(?:['"]|&#39;|&quot;)) """)  # " n": "n"
# Formulas of docstrings, which are text: e^{−λt}, eps^⅔, w_c, but not snake_case.
_SMALL = re.compile(
    r"<(h\d|pre|code|math)\b.*?</\1>|<[^>]*>"
    r"|\^(?P<up>\{[^{}<]+\}|\([^()<]+\)|[½⅔⅓]|\d+(?:\.\d+)?)"
    r"|_(?P<down>\{[^{}<]+\})"
    r"|(?:(?<=min)|(?<=[\w‖])(?<![A-Za-z]\w))_(?P<short>[A-Za-z0-9]+|\w)",
    re.S,
)


def _formula(found: re.Match) -> str:
    how = "block" if found[1] == "div" else "inline"
    return _PRIME.sub(_primed, convert(unescape(found[2]), display=how))


def _primed(found: re.Match) -> str:
    """A prime is raised already: as a superscript it would be raised, and small, twice."""
    sub, prime = found["sub"], found["prime"]
    base = f"<msub>{found['base']}{sub}</msub>" if sub else found["base"]
    return f'<mrow>{base}<mo lspace="0" rspace="0">{prime}</mo></mrow>'


def _raised(found: re.Match) -> str:
    up, down = found["up"], found["down"] or found["short"]
    if up:
        return f"<sup>{up.strip('{}')}</sup>"
    return f"<sub>{down.strip('{}')}</sub>" if down else found[0]


def _linked(found: re.Match) -> str:
    """A name of the library in the text, as a link to its reference."""
    name, whole = found[2], found[0]
    if name is None:
        return whole
    first, _, member = name.partition(".")
    full = _names().get(name) or (member and _names().get(first))
    if not full:
        return whole
    if name[0].islower() and "gf." not in whole and "gradflow." not in whole:
        return whole  # `load`, `sweep`: often the name of an argument
    if name not in _names():  # of a class, where it has that
        full += f".{member}"
    return f'<autoref identifier="gradflow.{full}" optional>{whole}</autoref>'


@functools.cache
def _names() -> dict[str, str]:
    """All that the reference has, by its name, and classes without that of their room
    too where no two have it."""
    full = executed.documented()
    last = [name.rpartition(".")[2] for name in full]
    short = {b: a for a, b in zip(full, last, strict=True) if last.count(b) == 1}
    return {b: a for b, a in short.items() if b[0].isupper()} | {a: a for a in full}
