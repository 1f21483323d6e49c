"""A sweep's results as a page in Markdown with a picture: report.md and recall.svg beside them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from splitlearn.privacy.picture import svg
from splitlearn.privacy.registry import ATTACKS
from splitlearn.privacy.summary import HEADS, Line, kind_rows
from splitlearn.reporting.files import write_texts

FILE, PICTURE = "report.md", "recall.svg"
TEXT = """\
Each attack has what a trunk server has: the public checkpoint and the hidden states on the wire. *Cut* is the number of
layers at the client before the trunk. Shares are of tokens with the right id at their place, and of prompts recovered
whole; 95% intervals over prompts (docs/privacy.md). *Answer tokens* are those of a greedy answer; an attack on what
was sent sees all but the last. *Known* says whether the attacker knows the defence, where that makes a difference.
*Flips* are tokens of the answer that are others than without the defence. *Perplexity* is that of these prompts for the
split model. *Bytes a token* are those of the hidden states, both ways. *ms a token* is the attack's time for a token,
without what it learns once for a cut.\
"""


def write(
    folder: Path, header: Mapping[str, Any], lines: Sequence[Line], environment: Mapping[str, Any], command: str
) -> Path:
    """Write the page and the picture. Gives the page's path. Raises InputError for a folder that cannot be written."""
    return write_texts(folder, {FILE: page(header, lines, environment, command), PICTURE: svg(lines)})[0]


def page(header: Mapping[str, Any], lines: Sequence[Line], environment: Mapping[str, Any], command: str) -> str:
    """The page."""
    model = f"{header['model']}, {header['dtype']}, trunk up to layer {header['end']}"
    parts = [
        "# What the trunk server can read",
        f"Made by `{command}`, of all results in its folder.",
        f"{model}; answers of {header['answer_tokens']} tokens. {TEXT}",
        f"![Recall by the depth of the cut]({PICTURE})",
        _table(HEADS, [line.cells() for line in lines]),
        "## By kind of text, recall of prompt tokens",
        _table(*kind_rows(lines)),
        "## What an attack needs once for a cut",
        _table(("cut", "attack", "s", "peak MB of the process"), _once(lines)),
        "\n".join(f"- **{attack.name}**: {attack.help}" for attack in ATTACKS.values()),
        "## Environment",
        f"```json\n{json.dumps(dict(environment), indent=2)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _once(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    """The longest preparation of each attack at each cut, and the most memory."""
    found: dict[tuple[int, str], tuple[float, int]] = {}
    for line in lines:
        if line.cut:
            key = (line.cut, line.attack)
            seconds, peak = found.get(key, (0.0, 0))
            found[key] = max(seconds, line.prepare_s), max(peak, line.peak_rss_bytes)
    return [(str(cut), name, f"{s:.1f}", f"{peak / 1e6:.0f}") for (cut, name), (s, peak) in found.items()]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
