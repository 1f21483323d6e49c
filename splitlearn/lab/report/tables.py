"""Findings as tables for people: text cells with their units, the same ones for the HTML report and for Markdown."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from splitlearn.lab.analysis.findings import METRIC_NAMES, Evidence, Findings, Row
from splitlearn.lab.analysis.pairing import UNATTRIBUTED_LIMIT, ArmFigures
from splitlearn.lab.published_claims import CLAIMS, claim, measured
from splitlearn.lab.stats import Effect

NOTHING = "\N{EN DASH}"
SHOWN_FROM = 0.001


@dataclass(frozen=True)
class Cell:
    """One cell; `style` is the kind of text in it, for the report's style sheet."""

    text: str
    style: str = ""


@dataclass(frozen=True)
class Shown:
    """A table: its column heads and its rows. The first cell of each row says what the row is about."""

    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def verdicts(findings: Findings) -> Shown:
    """What is said of each question and metric, and what it rests on."""
    head = ("Flag", "Arm", "Metric", "Verdict", "Ratio with / without [interval]", "Pairs (n)", "With, ms (median)")
    more = ("Without, ms (median)", "Changed most, ms per token", "Published earlier")
    return Shown(head + more, tuple(_verdict(findings, row) for row in findings.rows))


def _verdict(findings: Findings, row: Row) -> tuple[Cell, ...]:
    found = findings.evidence.get(row.question.key)
    decoding = row.metric == "tpot_s" and found and found.ledger.word
    ledger = f"{found.ledger.word} {found.ledger.change_s * 1e3:+.2f}" if found and decoding else NOTHING
    return (
        Cell(row.question.flag),
        Cell(row.question.kind),
        Cell(METRIC_NAMES[row.metric]),
        Cell(row.said, f"long {row.verdict.partition(' ')[0]}"),
        _number(effect(row.effect)),
        _number(str(row.effect.pairs) if row.effect else NOTHING),
        _number(milliseconds(row.treated_s)),
        _number(milliseconds(row.control_s)),
        Cell(ledger),
        Cell(claim(findings, row) or NOTHING, "long"),
    )


def work(findings: Findings) -> Shown:
    """Whether the two sides of each question did the same work."""
    head = ("Flag", "Arm", "Fidelity", "Token ids", "Equal tokens", "Largest logit difference", "Perplexity, ratio")
    return Shown((*head, "Pairs (n)", "Pairs not compared"), tuple(_work(one) for one in findings.evidence.values()))


def _work(found: Evidence) -> tuple[Cell, ...]:
    same, numbers = found.work, found.numbers
    if same.first_divergence is None:
        ids = "the same in every pair" if same.pairs else NOTHING
    else:
        ids = f"differ from token {same.first_divergence + 1} on, earliest in block {same.in_block}"
    return (
        Cell(found.question.flag),
        Cell(found.question.kind),
        Cell(found.fidelity),
        Cell(f"FAILED: {found.failure}" if found.failure else ids, "long FAILED" if found.failure else "long"),
        _number(NOTHING if same.equal_share is None else f"{same.equal_share:.1%}"),
        _number(f"{numbers['largest']:.3g}" if numbers.get("largest") is not None else NOTHING),
        _number(f"{numbers['perplexity_ratio']:.5f}" if numbers.get("perplexity_ratio") else NOTHING),
        _number(str(same.pairs)),
        Cell("; ".join(same.unequal) or "none"),
    )


def arms(findings: Findings) -> Shown:
    """The figures of each arm, and whether it meets the service level."""
    service = findings.service
    head = ("Arm", "Runs (n)", "TTFT, ms", "TTFT p95, ms", "TTFT p99, ms", "TPOT, ms", "ITL p95, ms", "ITL p99, ms")
    levels = (f"TTFT under {service.ttft_s * 1e3:g} ms", f"More than {service.decode_tps:g} tokens/s (decode)")
    more = ("Load, s", "Compile, s", "Added memory, MB", "Unattributed", "dtype", "Threads")
    return Shown(head + levels + more, tuple(_arm(arm) for arm in findings.arms))


def _arm(arm: ArmFigures) -> tuple[Cell, ...]:
    seconds = (arm.ttft_s, arm.ttft_p95_s, arm.ttft_p99_s, arm.tpot_s, arm.itl_p95_s, arm.itl_p99_s)
    share = NOTHING if arm.unattributed is None else f"{arm.unattributed:.2%}"
    return (
        Cell(arm.arm),
        _number(str(arm.runs)),
        *(_number(milliseconds(value)) for value in seconds),
        Cell(_yes(arm.meets_ttft)),
        Cell(_yes(arm.meets_decode_tps)),
        _number(f"{arm.load_s:.2f}"),
        _number(f"{arm.compile_s:.2f}"),
        _number(f"{arm.added_bytes / 1e6:.0f}"),
        Cell(f"{share}, above {UNATTRIBUTED_LIMIT:.1%}" if arm.unexplained else share, "FAILED" * arm.unexplained),
        Cell(arm.dtype),
        _number(str(arm.threads)),
    )


def claims(findings: Findings) -> Shown:
    """All that was published, beside what was measured of it."""
    of = {**{str(metric): name for metric, name in METRIC_NAMES.items()}, "memory": "memory"}
    rows = [
        (
            Cell(one.words),
            Cell(", ".join(one.kinds)),
            Cell(of[one.metric]),
            _number(one.shown),
            Cell(measured(findings, one) or NOTHING),
        )
        for one in CLAIMS
    ]
    return Shown(("Claim", "Arm", "Of", "As a ratio", "Measured here"), tuple(rows))


def left_out(findings: Findings) -> Shown:
    """The turns of blocks that do not count."""
    rows = [(Cell(str(turn.block)), _number(str(turn.attempt)), Cell(turn.why)) for turn in findings.left_out]
    return Shown(("Block", "Attempt", "Why"), tuple(rows))


def warnings(findings: Findings) -> list[str]:
    """What a reader has to know before the verdicts: withheld ones, broken promises, time that nothing explains."""
    found = [
        f"{METRIC_NAMES[floor.metric]}, {floor.kind}: verdicts are withheld: {floor.withheld}."
        for floor in findings.noise
        if floor.withheld
    ]
    found += [f"{key}: FAILED: {one.failure}." for key, one in findings.evidence.items() if one.failure]
    found += [
        f"{arm.arm}: {arm.unattributed:.2%} of the time is unattributed, above {UNATTRIBUTED_LIMIT:.1%}."
        for arm in findings.arms
        if arm.unexplained
    ]
    return found


def markdown_table(table: Shown) -> str:
    """As a Markdown table."""
    lines = [table.head, ["---"] * len(table.head), *([cell.text for cell in row] for row in table.rows)]
    return "\n".join(_line(line) for line in lines)


def effect(found: Effect | None) -> str:
    """A ratio with its interval and level."""
    if found is None:
        return NOTHING
    return f"{found.ratio:.3f} {interval(found)}"


def interval(found: Effect | None) -> str:
    """The interval of a ratio; an end that two pairs leave nearly open is not spelled out."""
    if found is None:
        return NOTHING
    low = f"{found.low:.3f}" if found.low >= SHOWN_FROM else f"<{SHOWN_FROM:g}"
    high = f"{found.high:.3f}" if found.high <= 1 / SHOWN_FROM else f">{1 / SHOWN_FROM:.0f}"
    return f"[{low}, {high}]"


def milliseconds(value: float | None) -> str:
    """Seconds as a number of milliseconds with four digits or so."""
    return NOTHING if value is None else f"{value * 1e3:.2f}" if value < 0.1 else f"{value * 1e3:.0f}"


def plain(text: str) -> str:
    """Text that Markdown shows as it is, also inside a table: no column, tag or second line begins in it."""
    escaped = re.sub(r"[\\|`*~$]|(?<=\])\(", r"\\\g<0>", text.replace("&", "&amp;").replace("<", "&lt;"))
    return " ".join(escaped.splitlines())


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(plain(cell) for cell in cells)} |"


def _number(text: str) -> Cell:
    return Cell(text, "number")


def _yes(met: bool | None) -> str:
    return NOTHING if met is None else "yes" if met else "no"


def side_by_side(one: Sequence[Row], other: Sequence[Row]) -> Shown:
    """The verdicts of two experiments, question by question; a question that one did not ask is empty there."""
    first, second = ({(row.question.key, row.metric): row for row in rows} for rows in (one, other))
    rows = []
    for key in dict.fromkeys([*first, *second]):
        row, pair = first.get(key) or second[key], (first.get(key), second.get(key))
        names = (Cell(row.question.flag), Cell(row.question.kind), Cell(METRIC_NAMES[row.metric]))
        rows.append((*names, *(cell for found in pair for cell in _side(found))))
    head = ("Flag", "Arm", "Metric", "A: verdict", "A: ratio with / without", "A: pairs (n)")
    return Shown((*head, "B: verdict", "B: ratio with / without", "B: pairs (n)"), tuple(rows))


def _side(row: Row | None) -> tuple[Cell, ...]:
    if row is None:
        return Cell(NOTHING), Cell(NOTHING), Cell(NOTHING)
    return Cell(row.said), _number(effect(row.effect)), _number(str(row.effect.pairs) if row.effect else NOTHING)
