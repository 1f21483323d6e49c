"""Where the time goes: a waterfall of one token, and the whole answer token by token.

The charts are SVG and plain HTML, so that they follow the theme and cost the browser little.
"""

from collections.abc import Iterator
from html import escape
from itertools import accumulate

from splitlearn.arms.compare import Pairs
from splitlearn.metrics import HOP_PARTS, LEDGER_ORDER, PARTS, RunMetrics
from splitlearn.reporting.charts import PART_COLOURS
from splitlearn.reporting.percentile import percentile
from ui.html import head_row, table, term

WIDTH = 1000
ROW, GAP = 26, 18
FULL, SPLIT = "#0072b2", "#009e73"


def picture(pairs: Pairs) -> str:
    """Both charts, of the typical runs."""
    full, split = pairs.typical("full").metrics, pairs.typical("split").metrics
    return (
        '<section class="sl-time" aria-label="Where the time goes"><h2>Where the time goes</h2>'
        f"{_waterfall(full, split)}{_answer(full, split)}</section>"
    )


def _waterfall(full: RunMetrics, split: RunMetrics) -> str:
    """A row for each part of a token's time. Its bar begins where the last one ends."""
    arms = [run.per_token for run in (full, split)]
    most = max((sum(parts.values()) for parts in arms), default=0.0)
    if not most:
        return ""
    began = [dict(_starts(parts)) for parts in arms]
    rows = []
    for name in LEDGER_ORDER:
        spent = [max(0.0, parts.get(name, 0.0)) for parts in arms]
        if any(spent):
            cells = [_cell(name, start[name] / most, each, most) for start, each in zip(began, spent, strict=True)]
            rows.append((term(name, PARTS[name], "time"), *cells))
        rows += [
            (f"&nbsp;{layers} {name}", "", _cell(name, start, spent, most))
            for layers, start, spent in _hops(split, name, began[1][name], most)
        ]
    total = [
        f'<span class="sl-part"><span></span><span>{sum(parts.values()) * 1e3:.2f} ms</span></span>' for parts in arms
    ]
    rows.append(("all (TPOT)", *total))
    head = head_row("Part", "Full", "Split")
    return f'<h3>One token after the first</h3><div class="sl-waterfall">{table(head, rows, "Time of one token")}</div>'


def _hops(run: RunMetrics, name: str, start: float, most: float) -> Iterator[tuple[str, float, float]]:
    """Of a part of the time, what each server of a chain has: its layers, where its bar begins, and its seconds."""
    for layers, parts in run.hops_per_token.items() if name in HOP_PARTS else ():
        spent = max(0.0, parts.get(name, 0.0))
        yield layers, start / most, spent
        start += spent


def _starts(parts: dict[str, float]) -> Iterator[tuple[str, float]]:
    spent = [max(0.0, parts.get(name, 0.0)) for name in LEDGER_ORDER]
    return zip(LEDGER_ORDER, accumulate(spent, initial=0.0), strict=False)


def _cell(name: str, start: float, spent: float, most: float) -> str:
    """A bar and its milliseconds. `start` is a share of the longest row."""
    if not spent:
        return ""
    style = f"margin-left:{start:.2%};width:{max(spent / most, 0.002):.2%};background:{PART_COLOURS[name]}"
    bar = f'<span class="sl-track"><span class="sl-bar" style="{style}"></span></span>'
    return f'<span class="sl-part">{bar}<span>{spent * 1e3:.2f} ms</span></span>'


def _answer(full: RunMetrics, split: RunMetrics) -> str:
    """Both answers on one time axis: TTFT, then a block for each token."""
    longest = max(full.e2el_s, split.e2el_s)
    rows = [("Full", full, FULL), ("Split", split, SPLIT)]
    inner = "".join(_row(at, name, run, colour, longest) for at, (name, run, colour) in enumerate(rows))
    height = len(rows) * (ROW + GAP)
    text = ". ".join(f"{name}: {_distribution(run)}" for name, run, _ in rows)
    return (
        f"<h3>The whole answer, {longest:.2f} s</h3>"
        f'<svg class="sl-answer-time" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'preserveAspectRatio="none" aria-label="{escape(text)}">{inner}</svg><p class="sl-small">{escape(text)}. '
        "The wide block is the first token. A block wider than its neighbours took longer.</p>"
    )


def _row(at: int, name: str, run: RunMetrics, colour: str, longest: float) -> str:
    top = at * (ROW + GAP)
    ends = [step.time_s for step in run.steps]
    blocks = []
    for number, (start, end) in enumerate(zip([0.0, *ends], ends, strict=False)):
        x, width = start / longest * WIDTH, max((end - start) / longest * WIDTH - 1, 0.8)
        label = f"{name}, {'TTFT' if number == 0 else f'token {number + 1}'}: {(end - start) * 1e3:.1f} ms"
        opacity = "" if number else ' opacity="0.45"'
        blocks.append(
            f'<rect x="{x:.1f}" y="{top}" width="{width:.1f}" height="{ROW}" fill="{colour}"{opacity}>'
            f"<title>{label}</title></rect>"
        )
    return "".join(blocks)


def _distribution(run: RunMetrics) -> str:
    """TTFT and inter-token latencies, in words."""
    if not run.itl_s:
        return f"TTFT {run.ttft_s * 1e3:.0f} ms, one token"
    text = f"TTFT {run.ttft_s * 1e3:.0f} ms, then {_ms(run.itl_p50_s or 0.0)} between tokens (median)"
    p95 = percentile(run.itl_s, 0.95)
    if p95 is not None:
        text += f", {_ms(p95)} (p95)"
    return f"{text}, {_ms(max(run.itl_s))} at most"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
