"""Runs the pages that are scripts and the programs of the gallery, those that have
changed or all (`--all`), or those that are named, and keeps what came out:
`python docs/execute.py [--all] [NAME ...]`."""

import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jupytext
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from nbformat import NotebookNode
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parent))

import executed  # noqa: E402

# Figures at twice the resolution; no progress bars; and what is compiled is kept.
SETUP = """
import matplotlib, matplotlib_inline
matplotlib_inline.backend_inline.set_matplotlib_formats("png")
matplotlib.rcParams |= {"figure.figsize": (6.4, 3.8), "figure.dpi": 110}
import gradflow
gradflow.cache_programs()
"""


def run(script: Path) -> None:
    notebook = jupytext.read(script)
    setup = jupytext.reads(f"# %%{SETUP}", fmt="py:percent").cells[0]
    notebook.cells.insert(0, setup)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3")
    client.execute(cwd=tempfile.gettempdir())  # beside no page that hides a module
    notebook.cells.pop(0)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if not _noise(o)]
    keep(script, notebook)


def run_program(program: Path) -> None:
    """Runs a program of the gallery as a reader would; its figure is beside."""
    name = f"experiments.gallery.{program.stem}"
    root = str(executed.DOCS.parent)
    env = os.environ | {"PYTHONPATH": root, "MPLBACKEND": "Agg", "TQDM_DISABLE": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", name]
        done = subprocess.run(
            command, cwd=folder, env=env, check=True, stdout=subprocess.PIPE, text=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        out = _emptied(executed.place(program))
        figure = Path(folder) / "results" / "gallery" / f"{program.stem}.png"
        shutil.copy(figure, out)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    told = done.stdout.strip().replace("\n", "\n    ")
    told = f"It prints\n\n    {told}\n\n" if told else ""
    text = f"{executed.header(program)}\n{told}It takes {seconds:.0f} s of a core."
    (out / "page.md").write_text(f"{text}\n", encoding="utf-8")


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _noise(output: NotebookNode) -> bool:
    """Progress and warnings, which are no part of a page."""
    if output.output_type == "stream":
        return output.name == "stderr"
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def keep(script: Path, notebook: NotebookNode) -> None:
    out = _emptied(executed.place(script))
    page, resources = MarkdownExporter().from_notebook_node(notebook)
    for number, (name, data) in enumerate(sorted(resources["outputs"].items())):
        own = f"{script.stem}_{number}.png"  # beside those of other pages
        page = page.replace(name, own)
        (out / own).write_bytes(data)
    page = page.replace("![png]", "![What the code above draws]").strip()
    text = f"{executed.header(script)}\n{page}\n"
    (out / "page.md").write_text(text, encoding="utf-8")


def main() -> None:
    names = [name for name in sys.argv[1:] if name != "--all"]
    some = [
        script
        for script in executed.scripts() + executed.programs()
        if script.stem in names
        or (not names and ("--all" in sys.argv or executed.stale(script)))
    ]
    for script in (bar := tqdm(some, unit="page")):
        bar.set_postfix_str(script.stem)
        (run_program if script in executed.programs() else run)(script)


if __name__ == "__main__":
    main()
