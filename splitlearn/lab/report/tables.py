"""Findings as tables for people: text cells with units, for the HTML report and for Markdown."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from splitlearn.lab.analysis.findings import METRIC_NAMES, Evidence, Findings, Row
from splitlearn.lab.analysis.pairing import UNATTRIBUTED_LIMIT, ArmFigures
from splitlearn.lab.design import AA
from splitlearn.lab.published_claims import CLAIMS, measured
from splitlearn.lab.stats import Effect

NOTHING = "\N{EN DASH}"
SHOWN_FROM = 0.001
# From here on a multiple reads better than percent.
MOST_PERCENT = 3.0


@dataclass(frozen=True)
class Cell:
    """One cell. `style` is a class of the report's style sheet."""

    text: str
    style: str = ""


@dataclass(frozen=True)
class Table:
    """A table: column heads and rows. A row's first cell is its name."""

    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def verdicts(findings: Findings) -> Table:
    """The verdict on each flag and metric, what leaving the flag out costs, and the evidence."""
    return Table(_VERDICT_HEAD, tuple(_verdict(findings, row) for row in findings.rows if row.question.flag != AA))


def controls(findings: Findings) -> Table:
    """The A/A check: the baseline against itself, in the columns of `verdicts`."""
    return Table(_VERDICT_HEAD, tuple(_verdict(findings, row) for row in findings.rows if row.question.flag == AA))


_VERDICT_HEAD = (
    *("Flag", "Arm", "Metric", "Verdict", "Without it: time", "Ratio with / without [interval]", "Pairs (n)"),
    *("With, ms (median)", "Without, ms (median)", "Changed most, ms per token"),
)


def _cost(found: Effect | None) -> str:
    """What leaving the flag out costs: the time without it against the time with it."""
    if found is None:
        return NOTHING
    return f"{_percent(1 / found.ratio)} [{_percent(1 / found.high)}, {_percent(1 / found.low)}]"


def _percent(ratio: float) -> str:
    return f"{ratio - 1:+.1%}" if ratio < MOST_PERCENT else f"x{ratio:.1f}" if ratio < 1 / SHOWN_FROM else "very long"


def _verdict(findings: Findings, row: Row) -> tuple[Cell, ...]:
    found = findings.evidence.get(row.question.key)
    decoding = row.metric == "tpot_s" and found and found.ledger.word
    ledger = f"{found.ledger.word} {found.ledger.change_s * 1e3:+.2f}" if found and decoding else NOTHING
    return (
        Cell(row.question.flag),
        Cell(row.question.kind),
        Cell(METRIC_NAMES[row.metric]),
        Cell(row.text, f"long {row.verdict.partition(' ')[0]}"),
        _number(_cost(row.effect)),
        _number(effect(row.effect)),
        _number(str(row.effect.pairs) if row.effect else NOTHING),
        _number(milliseconds(row.treated_s)),
        _number(milliseconds(row.control_s)),
        Cell(ledger),
    )


def work(findings: Findings) -> Table:
    """Whether both sides of each question did the same work."""
    head = ("Flag", "Arm", "Fidelity", "Token ids", "Equal tokens", "Largest logit difference", "Perplexity, ratio")
    return Table((*head, "Pairs (n)", "Pairs not compared"), tuple(_work(one) for one in findings.evidence.values()))


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


def arms(findings: Findings) -> Table:
    """The figures of each arm, and whether it meets the service level."""
    service = findings.service
    head = (
        "Arm",
        "Runs (n)",
        "Others' load, cores",
        "TTFT, ms",
        "TTFT p95, ms",
        "TTFT p99, ms",
        "TPOT, ms",
        "ITL p95, ms",
        "ITL p99, ms",
    )
    levels = (f"TTFT under {service.ttft_s * 1e3:g} ms", f"More than {service.decode_tps:g} tokens/s (decode)")
    more = ("Load, s", "Compile, s", "Added memory, MB", "Unattributed", "dtype", "Threads")
    return Table(head + levels + more, tuple(_arm(arm) for arm in findings.arms))


def _arm(arm: ArmFigures) -> tuple[Cell, ...]:
    seconds = (arm.ttft_s, arm.ttft_p95_s, arm.ttft_p99_s, arm.tpot_s, arm.itl_p95_s, arm.itl_p99_s)
    share = NOTHING if arm.unattributed is None else f"{arm.unattributed:.2%}"
    return (
        Cell(arm.arm),
        _number(str(arm.runs)),
        _number(f"{arm.others_cpu:.2f}"),
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


def claims(findings: Findings) -> Table:
    """The published claims beside what was measured."""
    of = {**{str(metric): name for metric, name in METRIC_NAMES.items()}, "memory": "memory"}
    rows = [
        (
            Cell(one.words),
            Cell(", ".join(one.kinds)),
            Cell(of[one.metric]),
            _number(one.text),
            Cell(measured(findings, one) or NOTHING),
        )
        for one in CLAIMS
    ]
    return Table(("Claim", "Arm", "Of", "As a ratio", "Measured here"), tuple(rows))


def left_out(findings: Findings) -> Table:
    """The attempts that do not count."""
    rows = [(Cell(str(turn.block)), _number(str(turn.attempt)), Cell(turn.why)) for turn in findings.left_out]
    return Table(("Block", "Attempt", "Why"), tuple(rows))


def warnings(findings: Findings) -> list[str]:
    """Warnings before the verdicts: withheld ones, broken promises, unattributed time."""
    found = [
        f"{METRIC_NAMES[floor.metric]}, {floor.kind}: only effects beyond the noise get a verdict: {floor.withheld}."
        for floor in findings.noise
        if floor.withheld and floor.effect
    ]
    found += [f"{key}: FAILED: {one.failure}." for key, one in findings.evidence.items() if one.failure]
    found += [
        f"{arm.arm}: {arm.unattributed:.2%} of the time is unattributed, above {UNATTRIBUTED_LIMIT:.1%}."
        for arm in findings.arms
        if arm.unexplained
    ]
    return found


def markdown_table(table: Table) -> str:
    """`table` in Markdown."""
    lines = [table.head, ["---"] * len(table.head), *([cell.text for cell in row] for row in table.rows)]
    return "\n".join(_line(line) for line in lines)


def effect(found: Effect | None) -> str:
    """A ratio with its interval and level."""
    if found is None:
        return NOTHING
    return f"{found.ratio:.3f} {interval(found)}"


def interval(found: Effect | None) -> str:
    """The interval of a ratio; extreme ends, from two pairs, are abbreviated."""
    if found is None:
        return NOTHING
    low = f"{found.low:.3f}" if found.low >= SHOWN_FROM else f"<{SHOWN_FROM:g}"
    high = f"{found.high:.3f}" if found.high <= 1 / SHOWN_FROM else f">{1 / SHOWN_FROM:.0f}"
    return f"[{low}, {high}]"


def milliseconds(value: float | None) -> str:
    """Seconds as text in milliseconds, with about four digits."""
    return NOTHING if value is None else f"{value * 1e3:.2f}" if value < 0.1 else f"{value * 1e3:.0f}"


def plain(text: str) -> str:
    """Text escaped for Markdown, also inside a table: it begins no column, tag or second line."""
    escaped = re.sub(r"[\\|`*~$]|(?<=\])\(", r"\\\g<0>", text.replace("&", "&amp;").replace("<", "&lt;"))
    return " ".join(escaped.splitlines())


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(plain(cell) for cell in cells)} |"


def _number(text: str) -> Cell:
    return Cell(text, "number")


def _yes(met: bool | None) -> str:
    return NOTHING if met is None else "yes" if met else "no"


def side_by_side(one: Sequence[Row], other: Sequence[Row]) -> Table:
    """The verdicts of two experiments, question by question. Cells are empty for a question that one did not ask."""
    first, second = ({(row.question.key, row.metric): row for row in rows} for rows in (one, other))
    rows = []
    for key in dict.fromkeys([*first, *second]):
        row, pair = first.get(key) or second[key], (first.get(key), second.get(key))
        names = (Cell(row.question.flag), Cell(row.question.kind), Cell(METRIC_NAMES[row.metric]))
        rows.append((*names, *(cell for found in pair for cell in _side(found))))
    head = ("Flag", "Arm", "Metric", "A: verdict", "A: ratio with / without", "A: pairs (n)")
    return Table((*head, "B: verdict", "B: ratio with / without", "B: pairs (n)"), tuple(rows))


def _side(row: Row | None) -> tuple[Cell, ...]:
    if row is None:
        return Cell(NOTHING), Cell(NOTHING), Cell(NOTHING)
    return Cell(row.text), _number(effect(row.effect)), _number(str(row.effect.pairs) if row.effect else NOTHING)
