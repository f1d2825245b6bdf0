"""The tables of README.md, from the recorded runs in records/.

`python -m experiments.report` writes them; with folders of results, such as
`results/omnigrok/ts-l`, it records these runs first.
"""

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
VERDICTS = {True: "pass", False: "**misses**", None: ""}
PUBLISHED = ("MNIST", "Fashion-MNIST", "QM9", "QM9 (qm9pack)", "IMDb")
TABLES = {
    "beyond_l2": lambda record: record["study"] == "beyond_l2",
    "omnigrok": lambda record: record["study"] == "omnigrok" and "data" not in record,
    "images": lambda record: "data" in record,
    "transformer_flow": lambda record: record["study"] == "transformer_flow",
    "laws": lambda record: record["study"] == "laws",
}
LAWS = {True: "holds", False: "**refuted**", None: ""}


def records() -> list[dict[str, Any]]:
    """All that are recorded: whole settings before quick ones, and by their names."""
    found = [
        json.loads(f.read_text()) for f in sorted((HERE / "records").glob("*.json"))
    ]
    return sorted(found, key=lambda record: "--quick" in record["command"])


def number(x: float | str) -> str:
    """As one writes it: 3.7·10⁻⁶, 58 500, −0.95; what is words already, as it is."""
    if isinstance(x, str):
        words = x
    elif x == int(x):
        words = f"{int(x):,}".replace(",", " " if abs(x) >= 1e4 else "")
    else:
        mantissa, exponent = f"{x:.3e}".split("e")
        power = f"10{str(int(exponent)).translate(SUPERSCRIPT)}"
        mantissa = f"{float(mantissa):g}·" if float(mantissa) != 1 else ""
        words = f"{mantissa}{power}" if abs(x) < 1e-2 else f"{x:.4g}"
    return words.replace("-", "−")


def cells(record: dict[str, Any]) -> Iterable[list[str]]:
    """The lines of a record: command, data, criterion, what came out, verdict, s."""
    passed = ""
    if "judged" in record:
        passed = f" ({record['passed']} of {record['judged']} hold)"
    seconds = number(record["seconds"]) if "seconds" in record else ""
    if "cpu_seconds" in record:
        seconds += f" ({number(record['cpu_seconds'])} of a core)"
    if "note" in record:
        seconds += f" ({record['note']})"
    mark = "\\*" if "recorded_with" in record else ""
    first = [f"`{record['command']}`{mark}{passed}", record.get("data", "")]
    for row in record["rows"]:
        measured = row.get("measured", "").format(*map(number, row.get("values", ())))
        told = "; ".join(word for word in (measured, row.get("note", "")) if word)
        verdict = row.get("verdict", VERDICTS[row.get("ok")])
        yield [*first, row["asked"], told, verdict, seconds]
        first, seconds = ["", ""], ""


def table(name: str) -> str:
    """One table, in Markdown, without the columns in which nothing is."""
    heads = ["command", "data", "criterion", "measured", "verdict", "seconds"]
    lines = [
        [cell.replace("|", r"\|") for cell in line]
        for r in records()
        if TABLES[name](r)
        for line in cells(r)
    ]
    used = [i for i in range(len(heads)) if any(line[i] for line in lines)]
    rows = [[heads[i] for i in used], ["---"] * len(used)]
    rows += [[line[i] for i in used] for line in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def filled(text: str) -> str:
    """A text with its tables, each between two marks, made anew."""
    for name in TABLES:
        begin, end = f"<!-- table: {name} -->\n", "\n<!-- end -->"
        before, rest = text.split(begin)
        text = before + begin + table(name) + end + rest.split(end, 1)[1]
    return text


def row(check: dict[str, Any], study: str) -> dict[str, Any]:
    """The line of a check; of a law it is refuted, not missed."""
    if check["name"] == "verdict":
        return {"asked": "so the law", "measured": check["sentence"]}
    line = {
        "asked": f"{check['sentence']} {check['bound']}".strip(),
        "measured": f"{check['name']} {{}}",
        "values": [check["value"] if check["value"] is not None else "never"],
        "ok": check["ok"],
    }
    if study == "laws":
        line["verdict"] = LAWS[check["ok"]]
    return line


def record(folder: Path) -> None:
    """Keeps the rows of a run, from its summary."""
    told = json.loads((folder / "summary.json").read_text())
    words = told["command"].partition("experiments.")[2]
    study, *words = re.sub(r" --out \S+", "", words).split()
    name = "_".join(word.strip("-") for word in words) or told["experiment"]
    if told.get("data") in PUBLISHED:  # beside that of what stands in for them
        name += "_" + re.sub(r"\W+", "_", told["data"].lower()).strip("_")
    rows = [row(check, study) for check in told["checks"]]
    kept = {"study": study, "command": " ".join(words), "rows": rows}
    kept |= {
        key: told[key] for key in ("data", "seconds", "cpu_seconds") if key in told
    }
    path = HERE / "records" / f"{study}_{name}.json"
    path.write_text(json.dumps(kept, ensure_ascii=False, indent=2) + "\n")


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        record(Path(folder))
    readme = HERE / "README.md"
    readme.write_text(filled(readme.read_text()))
