"""Recall against the depth of the cut as an SVG, for a report in Markdown: a panel for each defence."""

from collections.abc import Iterator, Sequence
from html import escape

from splitlearn.privacy.summary import Line

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's palette, a colour for each attack. Dashes tell them apart, too."""
DASHES = ("", "6 3", "2 2", "8 3 2 3", "1 3", "10 2")
BASELINE, BASELINE_TEXT, GRID = "#808890", "#5a6068", "#dddddd"
WIDTH, HEIGHT = 230, 180
ACROSS, DOWN, IN_A_ROW = WIDTH + 90, HEIGHT + 80, 3
"""Pixels: the plot, a panel with what is around it, and panels side by side."""
LEGEND, ENTRY = 24, 100


def svg(lines: Sequence[Line]) -> str:
    """The picture: the share of prompt tokens with its 95% interval. Cuts are evenly spaced."""
    shown = [line for line in lines if line.cut and line.prompt is not None]
    cuts = sorted({line.cut for line in shown})
    defences, attacks = (list(dict.fromkeys(getattr(line, name) for line in shown)) for name in ("against", "attack"))
    parts = [_entry(10 + at * ENTRY, name, at) for at, name in enumerate(attacks)]
    for at, against in enumerate(defences):
        x, y = ACROSS * (at % IN_A_ROW) + 44, DOWN * (at // IN_A_ROW) + LEGEND + 24
        parts += [f'<g transform="translate({x} {y})">', *_frame(against, cuts), *_baselines(lines)]
        for number, attack in enumerate(attacks):
            own = sorted(
                (line for line in shown if (line.against, line.attack) == (against, attack)), key=lambda x: x.cut
            )
            parts += _curve(own, cuts, number)
        parts.append("</g>")
    width = max(ACROSS * min(len(defences), IN_A_ROW), 10 + ENTRY * len(attacks))
    height = LEGEND + DOWN * -(-len(defences) // IN_A_ROW)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return "\n".join([f'{head} font-family="sans-serif" font-size="11">', _ground(), *parts, "</svg>"]) + "\n"


def _ground() -> str:
    return '<rect width="100%" height="100%" fill="white"/>'


def _x(cut: int, cuts: Sequence[int]) -> float:
    return round(WIDTH * (cuts.index(cut) + 0.5) / len(cuts), 1)


def _y(share: float) -> float:
    return round(HEIGHT * (1 - share), 1)


def _line(path: str, number: int) -> str:
    style = f'stroke="{COLOURS[number % len(COLOURS)]}" stroke-dasharray="{DASHES[number % len(DASHES)]}"'
    return f'<path d="M{path}" {style} stroke-width="2" fill="none"/>'


def _text(x: float, y: float, text: object, anchor: str = "middle", fill: str = "black") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{fill}">{escape(str(text))}</text>'


def _entry(x: int, name: str, number: int) -> str:
    return _line(f"{x} 12h24", number) + _text(x + 30, 16, name, "start")


def _frame(against: str, cuts: Sequence[int]) -> Iterator[str]:
    yield _text(0, -10, f"recovered, {against}", "start")
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        yield f'<path d="M0 {_y(share)}h{WIDTH}" stroke="{GRID}"/>' + _text(-4, _y(share) + 4, f"{share:.0%}", "end")
    yield from (_text(_x(cut, cuts), HEIGHT + 14, cut) for cut in cuts)
    yield _text(WIDTH / 2, HEIGHT + 30, "layers before the trunk")


def _baselines(lines: Sequence[Line]) -> Iterator[str]:
    for line in lines:
        if line.prompt is not None and not line.cut:
            y = _y(line.prompt.value)
            yield f'<path d="M0 {y}h{WIDTH}" stroke="{BASELINE}" stroke-dasharray="3 3"/>'
            yield _text(WIDTH, y - 3, f"{line.attack}, no states", "end", BASELINE_TEXT)


def _curve(own: Sequence[Line], cuts: Sequence[int], number: int) -> Iterator[str]:
    points = [(_x(line.cut, cuts), line.prompt) for line in own if line.prompt is not None]
    if points:
        yield _line("L".join(f"{x} {_y(share.value)}" for x, share in points), number)
    colour = COLOURS[number % len(COLOURS)]
    for x, share in points:
        yield f'<path d="M{x} {_y(share.low)}V{_y(share.high)}" stroke="{colour}"/>'
        yield f'<circle cx="{x}" cy="{_y(share.value)}" r="3" fill="{colour}"/>'
