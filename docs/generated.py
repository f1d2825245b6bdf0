"""What pages are made of that is kept elsewhere: messages of the code, recorded runs,
results of benchmarks, files. A page asks for it in a line of its own, as
`<!-- made: work_precision -->` or `<!-- file: experiments/sweep.slurm -->`."""

import ast
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import executed

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def filled(page: str) -> str:
    """A page with what it asks for."""
    page = re.sub(r"^<!-- made: (\w+) -->$", lambda m: made(m[1]), page, flags=re.M)
    return re.sub(r"^<!-- file: (\S+) -->$", lambda m: file(m[1]), page, flags=re.M)


def made(name: str) -> str:
    return {
        "two_phase": lambda: verdicts("two_phase"),
        "results": results,
        "gallery": gallery_table,
        "work_precision": work_precision,
        "first_result": first_result,
        "stiff_cases": stiff_cases,
        "networks": networks,
        "missed": missed,
    }[name]()


def file(name: str) -> str:
    text = (ROOT / name).read_text(encoding="utf-8").strip()
    language = {".slurm": "sh", ".py": "python"}[Path(name).suffix]
    return f"```{language}\n{text}\n```"


def results() -> str:
    """The messages of `RESULTS`: every one is what a user has seen."""
    from gradflow.results import CODES, RESULTS

    lines = []
    for name, code in CODES.items():
        message = RESULTS[getattr(RESULTS, name)] or "The run reached its end."
        lines += [f"## `{name}` ({code})", "", message, ""]
    return "\n".join(lines)


# Gallery, experiments


def _words(path: Path) -> list[str]:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.splitlines()


def gallery() -> dict[str, str]:
    """The pages of the gallery, from its programs: title, words, figure, command, what
    came out, code."""
    pages = {}
    for path in executed.programs():
        words, name = _words(path), path.stem
        code = path.read_text(encoding="utf-8").split('"""', 2)[2].strip()
        pages[name] = (
            f"# {words[0].rstrip('.')}\n\n" + "\n".join(words[1:]).strip() + "\n\n"
            f"![{words[0]}]({name}.png)\n\n"
            f"```sh\npython -m experiments.gallery.{name}\n```\n\n"
            f"draws this, and fails unless the checks in it hold. {executed.text(path)}"
            f"\n\n```python\n{code}\n```\n"
        )
    return pages


def gallery_table() -> str:
    """The programs of the gallery, and what they show."""
    rows = [
        [f"[{path.stem}]({path.stem}.md)", _words(path)[0].rstrip(".")]
        for path in executed.programs()
    ]
    return _table(["program", "what it shows"], rows)


def section(title: str) -> str:
    """A section of experiments/README.md, without its heading; for a page of the
    gallery."""
    text = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert found, title
    body = re.sub(r"<!-- .*? -->\n?", "", found[1]).strip()
    return re.sub(
        r"^###", "##", body.replace("](figures/", "](../figures/"), flags=re.M
    )


STUDIES = {
    "transformer_flow": ("Networks in continuous time", "transformer_flow"),
    "beyond_l2": ("Beyond the Euclidean norm", "beyond_l2_cs1"),
    "omnigrok": ("Omnigrok", "omnigrok_ts_l"),
    "laws": ("Laws of grokking", "laws_delay"),
}


def studies() -> dict[str, str]:
    """The pages of experiments with sub-commands, from their words, and
    experiments/README.md."""
    pages = {}
    for name, (title, figure) in STUDIES.items():
        words = _words(ROOT / "experiments" / name / "__init__.py")
        body = section(f"{title}: `{name}`")
        first = f"![{words[0]}](../figures/{figure}.png)\n\n"
        pages[name] = (
            f"# {title}\n\n" + "\n".join(words).strip() + "\n\n"
            f"```sh\npython -m experiments.{name} NAME\npython -m experiments.{name} "
            "--help\n```\n\nThe first runs one experiment of the table, `--quick` "
            "less of it; the second tells the names, what each is about, and how long "
            f"it takes.\n\n{'' if figure in body else first}"
            "Those with a star were recorded with an earlier version. Seconds are of "
            f"two cores that had other work to do: upper bounds.\n\n{body}\n"
        )
    return pages


def missed() -> str:
    """What is missed, with links into the pages of the experiments."""
    text = section("What is missed, and why")
    for name, (title, _) in STUDIES.items():
        anchor = f"{title.lower().replace(' ', '-')}-{name}"
        text = text.replace(f"](#{anchor})", f"]({name}.md)")
    return text.replace("](#images", "](omnigrok.md#images")


def verdicts(study: str) -> str:
    """What a recorded run was asked, and what came of it."""
    sys.path.insert(0, str(ROOT))
    from experiments.report import cells, records

    heads = ["command", "", "criterion", "measured", "verdict", "seconds"]
    rows = [row for r in records() if r["study"] == study for row in cells(r)]
    used = [i for i in range(len(heads)) if any(row[i] for row in rows)]
    return _table([heads[i] for i in used], [[row[i] for i in used] for row in rows])


# Benchmarks


def work_precision() -> str:
    """What `benchmarks/work_precision.py` has written, under smaller headings."""
    text = (RESULTS / "work_precision.md").read_text(encoding="utf-8")
    return re.sub(r"^#", "##", text.split("\n", 1)[1].strip(), flags=re.M)


def first_result() -> str:
    told = _json("first_result")
    one, block = told["simulate"], told["block"]
    rows = [
        ["Diffrax Tsit5 on y' = −y", one["bare"]],
        ["**first `simulate`, the model of the README**", one["simulate"]],
        ["Diffrax Kvaerno5, the same flow", one["kvaerno"]],
        ["SciPy LSODA with a jitted gradient, the same flow", one["lsoda"]],
        [f"**all of that example** ({block['programs']} programs)", block["fresh"]],
        ["the same with `gf.cache_programs()`, the second time", block["cached"]],
    ]
    rows += [
        [f"first `simulate` of a task: {name}, d = {task['parameters']}, by "
         f"{task['solver']}; {task['compiling']:.2g} s of it compilation",
         task["seconds"]]
        for name, task in told["tasks"].items()
    ]  # fmt: skip
    return _table(["", "seconds"], [[name, f"{s:.2g}"] for name, s in rows])


def stiff_cases() -> str:
    heads = ["", "d", "λ", "KKT4: steps (rejected)", "error", "KKT5: steps", "error",
             "Radau: steps", "error", "BDF: steps", "error", "start moved"]  # fmt: skip
    rows = []
    for row in _json("stiff_cases"):
        cells = [row["case"], row["d"], f"{row['weight_decay']:.0e}"]
        for method in ("KKT4", "KKT5", "Radau", "BDF"):
            took = row[method]
            more = f" ({took['rejected']})" if method == "KKT4" else ""
            given_up = took["steps"] is None
            cells.append("given up" if given_up else f"{took['steps']}{more}")
            cells.append("" if given_up else f"{took['error']:.2g}")
        rows.append([*cells, f"{row['moved']:.2g}"])
    return _table(heads, rows)


def networks() -> str:
    rows = []
    for row in _json("networks"):
        stats = row.get(
            "stats", {"steps": round(row["steps"])} if "steps" in row else {}
        )
        took = ", ".join(f"{count} {name}" for name, count in stats.items())
        about = "≈ " if row.get("extrapolated") else ""
        by = row.get("solver", "gradient descent")
        by += "" if row["by"] != "chosen" else ", as chosen"
        memory = f"{row['gigabytes']:.2g} GB" if "gigabytes" in row else ""
        rows.append([row["problem"], f"{row['weight_decay']:.0e}", by, took,
                     f"{about}{row['seconds']:.0f} s", memory])  # fmt: skip
    return _table(["network", "λ", "by", "work", "time", "memory"], rows)


def _json(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _table(heads: list[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [heads, ["---"] * len(heads), *(map(str, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
