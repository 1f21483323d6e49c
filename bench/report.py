"""Write a results page: text, command, table, a picture of its ratios, and the machine."""

import json
from pathlib import Path
from typing import Any

from bench.plot import draw
from splitlearn.runtime.terminal import say

RESULTS = Path(__file__).parent.parent / "docs" / "results"


def write(
    name: str, title: str, text: str, rows: list[dict[str, Any]], environment: dict[str, Any], command: str = ""
) -> None:
    """Write docs/results/`name`.md and print it; and `name`.svg if `rows` have ratios. `command` names the measurement
    with its options, where that is not `name` alone."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    made = f"Made by `python -m bench {command or name}`; do not edit."
    lines = [f"# {title}", "", made, "", text.strip(), "", table(rows)]
    if draw(RESULTS / f"{name}.svg", rows):
        lines += ["", f"![The ratios with their intervals]({name}.svg)"]
    lines += ["", "## Environment", "", "```json", json.dumps(environment, indent=2), "```", ""]
    page = "\n".join(lines)
    (RESULTS / f"{name}.md").write_text(page, encoding="utf-8")
    say(page)


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table. All rows have the same keys."""
    heads = list(rows[0])
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    lines += ["| " + " | ".join(str(row[head]) for head in heads) + " |" for row in rows]
    return "\n".join(lines)
