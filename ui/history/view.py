"""The history of comparisons as HTML: the table, and two of them side by side. Pure functions."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import zip_longest

from ui.compare.candidates import listed
from ui.format import MISSING, rate, ratio, seconds
from ui.history.disk import Earlier
from ui.history.divergence import Divergence, kinds
from ui.history.record import Entry, Figures, Spread, shorter
from ui.html import head_row, small, table

EMPTY = "Comparisons are listed here. Your browser keeps the last 50, even after a reload."
PIN = "Choose two lines to see them side by side: settings that differ, figures, and where the answers diverge."
HEAD = (
    *("When (UTC)", "Prompt", "Flags", "Link", "Runs", "TPOT split / full", "Tokens"),
    *("TTFT full", "TTFT split", "TPOT full", "TPOT split", "TPS full", "TPS split"),
)
WHY = (
    "Each ran again up to the marked token, with its own flags. If the logits of two candidates differ by no more than "
    "rounding, it is a near tie; a wide gap means different computations."
)
CHANGED = (
    "In this run, an arm chose another token than in the history: another machine, or another version of the model or "
    "of this program, rounds differently."
)
EARLIER = (
    *("When (UTC)", "Prompt", "Model", "Trunk layers", "Flags", "TPOT split / full", "Tokens", "TPOT full"),
    "TPOT split",
)
FIGURES: Mapping[str, Callable[[Entry], float | None]] = {
    "TTFT, full": lambda entry: entry.full.ttft_s,
    "TTFT, split": lambda entry: entry.split.ttft_s,
    "TPOT, full": lambda entry: entry.full.tpot_s,
    "TPOT, split": lambda entry: entry.split.tpot_s,
    "TPS (request), full": lambda entry: entry.full.tps,
    "TPS (request), split": lambda entry: entry.split.tps,
}


def history(entries: Sequence[Entry]) -> str:
    """A table with a line for each comparison, newest first; a hint if there are none."""
    if not entries:
        return small(EMPTY)
    return f'<div class="sl-history">{table(head_row(*HEAD), map(_line, entries), "History of comparisons")}</div>'


def earlier(found: Earlier, kept: bool) -> str:
    """A table of the comparisons on disk, newest first. `kept` is whether new ones are added."""
    on = "Each comparison is added to it." if kept else "New comparisons are not added: ui.history_file in config.yaml."
    file = f"The file is {found.path}, one JSON object a line. {on}"
    skipped = f" Invalid lines left out: {found.skipped}." if found.skipped else ""
    rows = [
        [
            f"{each.when:%Y-%m-%d %H:%M:%S}",
            _written(each.asked),
            escape(shorter(each.model, 60)),
            f"[{each.split.start}, {each.split.end}) of {each.split.n_layers}",
            escape(shorter(", ".join(each.flags), 60)),
            MISSING if each.ratios.tpot is None else ratio(each.ratios.tpot.geometric_mean, 1),
            "identical" if each.identical_tokens else "differ",
            seconds(each.full.tpot_s),
            seconds(each.split_run.tpot_s),
        ]
        for each in found.records
    ]
    listed = table(head_row(*EARLIER), rows, "Earlier comparisons") if rows else small("None yet.")
    return f'<div class="sl-history">{listed}{small(file + skipped)}</div>'


def pinned(one: Entry | None, other: Entry | None) -> str:
    """Two comparisons side by side."""
    if one is None or other is None:
        return small(PIN)
    names = (one.name, other.name)
    return (
        f'<section class="sl-result sl-pinned" aria-label="Two comparisons side by side">'
        f"<h3>What differs</h3>{_settings(one, other, names)}<h3>Commands that repeat them</h3>{_commands(one, other)}"
        f"<h3>Figures</h3>{_figures(one, other, names)}<h3>Answers</h3>{_answers(one, other, names)}</section>"
    )


def candidates(one: Entry, other: Entry, found: Sequence[Divergence]) -> str:
    """The candidates of two comparisons where their answers diverge; empty if none were asked for."""
    if not found:
        return ""
    notes = small(WHY) + ("" if all(each.repeatable for each in found) else small(CHANGED))
    tables = "".join(_candidates(each, (one.name, other.name)) for each in found)
    return f'<section class="sl-result" aria-label="Candidates where they differ">{notes}{tables}</section>'


def both(one: Sequence[str], other: Sequence[str]) -> tuple[str, str]:
    """Two answers as HTML. The first piece that differs is marked, or the end of the shorter answer."""
    at = next((n for n, (a, b) in enumerate(zip_longest(one, other)) if a != b), None)
    return _marked(one, at), _marked(other, at)


def spread(found: Spread | None) -> str:
    """A ratio with its range."""
    if found is None:
        return MISSING
    pairs = "1 pair" if found.n == 1 else f"{found.least:.2f} to {found.most:.2f}"
    return f"{found.mean:.2f}\N{MULTIPLICATION SIGN} ({pairs})"


def verdict(entry: Entry) -> str:
    """Whether both arms gave the same tokens."""
    return "identical" if entry.differs_at is None else f"differ from token {entry.differs_at + 1} on"


def _line(entry: Entry) -> list[str]:
    cells = [f"{entry.when:%Y-%m-%d %H:%M:%S}", shorter(entry.flags, 60), entry.link]
    cells += [str(entry.pairs), spread(entry.tpot), verdict(entry)]
    cells += [*(seconds(each) for each in (entry.full.ttft_s, entry.split.ttft_s))]
    cells += [seconds(entry.full.tpot_s), seconds(entry.split.tpot_s), rate(entry.full.tps), rate(entry.split.tps)]
    when, *rest = map(escape, cells)
    return [when, _written(entry.prompt), *rest]


def _written(prompt: str) -> str:
    """A visitor's text: in its own direction, and never translated."""
    return f'<span dir="auto">{escape(shorter(prompt, 60))}</span>'


def _settings(one: Entry, other: Entry, names: Sequence[str]) -> str:
    a, b = one.choices, other.choices
    differ = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    if not differ:
        return small("Nothing: the settings are the same.")
    rows = [[escape(name), *(escape(each.get(name, MISSING)) for each in (a, b))] for name in differ]
    return table(head_row("Setting", *names), rows, "Settings that differ")


def _figures(one: Entry, other: Entry, names: Sequence[str]) -> str:
    rows = []
    for name, figure in FIGURES.items():
        a, b = figure(one), figure(other)
        shown = rate if name.startswith("TPS") else seconds
        rows.append([name, shown(a), shown(b), ratio(b, a)])
    rows.append(["TPOT split / full", spread(one.tpot), spread(other.tpot), ""])
    rows.append(["Tokens of full and split", verdict(one), verdict(other), ""])
    return table(head_row("Figure", *names, "second / first"), rows, "Figures of both")


def _answers(one: Entry, other: Entry, names: Sequence[str]) -> str:
    """Full beside full; and split beside split if it differs from full."""
    shown = kinds(one, other)
    return "".join(
        _beside(kind.capitalize() if len(shown) > 1 else "Full and split", one.of(kind), other.of(kind), names)
        for kind in shown
    )


def _candidates(divergence: Divergence, names: Sequence[str]) -> str:
    arm = divergence.kind.capitalize()
    tables = "".join(
        f"<div>{listed(found, token, name, f'{arm}: candidates of {name}')}</div>"
        for name, found, token in zip(names, divergence.found, divergence.tokens, strict=True)
    )
    return f'{small(f"{arm}: token {divergence.at + 1}")}<div class="sl-two">{tables}</div>'


def _beside(kind: str, one: Figures, other: Figures, names: Sequence[str]) -> str:
    summary = "the same" if one.answer == other.answer else "the first token that differs is marked"
    shown = "".join(
        f'<div><b>{name}</b><div class="sl-seen" dir="auto" tabindex="0" role="region" '
        f'aria-label="{kind}, answer of {name}">{text}</div></div>'
        for name, text in zip(names, both(one.answer, other.answer), strict=True)
    )
    return f'{small(f"{kind}: {summary}.")}<div class="sl-two">{shown}</div>'


def _commands(one: Entry, other: Entry) -> str:
    return "".join(
        f"<pre>{escape(each.command)}</pre>" if each.command else small("The command was too long to be kept.")
        for each in (one, other)
    )


def _marked(pieces: Sequence[str], at: int | None) -> str:
    if at is None:
        return escape("".join(pieces))
    before, token, rest = "".join(pieces[:at]), "".join(pieces[at : at + 1]), "".join(pieces[at + 1 :])
    return f"{escape(before)}<mark>{escape(token) or '(ended)'}</mark>{escape(rest)}"
