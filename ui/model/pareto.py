"""An SVG of all cuts: TPOT against the client's memory. Pressing a point chooses its cut.

Coordinates are percentages, as in picture.py. Cuts whose figures agree to three digits are one point.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from splitlearn.models.plan import SplitPlan
from splitlearn.planning.costs import CutCost
from splitlearn.planning.report import CutReport
from ui.format import seconds, size

PRESS = """
const dots = () => [...element.querySelectorAll('[data-start]')];
let again = false;
const choose = (dot, keep) => {
  again = keep;
  element.dataset.picked = JSON.stringify([+dot.dataset.start, +dot.dataset.end]);
  trigger('cut');
};
element.addEventListener('click', event => {
  const dot = event.target.closest('[data-start]');
  if (dot) choose(dot, false);
});
element.addEventListener('keydown', event => {
  const all = dots(), at = all.indexOf(event.target.closest('[data-start]'));
  const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
  if (at < 0) return;
  if (step) {
    const next = all[(at + step + all.length) % all.length];
    all.forEach(each => each.setAttribute('tabindex', each === next ? '0' : '-1'));
    next.focus();
  } else if (event.key === 'Enter' || event.key === ' ') choose(all[at], true);
  else return;
  event.preventDefault();
});
watch('value', () => {
  const lost = [document.body, null].includes(document.activeElement);
  if (again && lost) element.querySelector('[data-start][tabindex="0"]')?.focus();
  again = false;
});
"""
"""Pressing a point triggers the event `cut`; its cut is in `data-picked`, see
picture.PICKED. The arrow keys move from point to point."""
LEFT, RIGHT, TOP, FOOT = 13.0, 97.0, 6.0, 84.0
Place = tuple[float, float]


@dataclass(frozen=True)
class Scale:
    """Maps memory and TPOT to a place in percent."""

    least_memory: float
    most_memory: float
    least_s: float
    most_s: float

    @classmethod
    def of(cls, points: Sequence[Place]) -> "Scale":
        """A scale that fits all `points`, with a margin."""
        memory, times = [point[0] for point in points], [point[1] for point in points]
        (left, right), (foot, top) = _around(memory), _around(times)
        return cls(left, right, max(0.0, foot), top)

    def place(self, memory: float, tpot_s: float) -> Place:
        """Percent from the left and from above."""
        x = (memory - self.least_memory) / (self.most_memory - self.least_memory)
        y = (tpot_s - self.least_s) / (self.most_s - self.least_s)
        return LEFT + (RIGHT - LEFT) * x, FOOT - (FOOT - TOP) * y


def _around(values: Sequence[float]) -> tuple[float, float]:
    """The range of `values` with a margin, also if all are equal."""
    least, most = min(values), max(values)
    room = 0.08 * (most - least) or 0.08 * most
    return least - room, most + room


def pareto(report: CutReport, chosen: SplitPlan) -> str:
    """The SVG of a report. A ring marks the chosen cut, a dashed one the cut in use."""
    rates = report.rates
    whole = (float(rates.full_memory_bytes), rates.full_tpot_s)
    runs = [(float(run.client_memory_bytes), run.tpot_s) for run in report.measured]
    scale = Scale.of([*map(_figures, report.costs), whole, *runs])
    marks = "".join(f'<circle class="sl-mark" {_at(scale.place(*run))} r="7"/>' for run in runs)
    full = f"The full model: {seconds(whole[1])} a token, {size(whole[0])}"
    label = (
        f"TPOT against the client's memory for {len(report.costs)} cuts. {report.advice.does_it_help} "
        f"{report.advice.where_to_cut}"
    )
    return (
        f'<div class="sl-pareto"><svg role="group" aria-label="{escape(label)}">{_axes(scale)}{_limit(report, scale)}'
        f'<circle class="sl-whole" {_at(scale.place(*whole))} r="6"><title>{full}</title></circle>'
        f"{_dots(report, chosen, scale)}{marks}"
        f"{_ring(report, report.plan, scale, 11, ' sl-now')}{_ring(report, chosen, scale, 8)}</svg>"
        f"{_legend(report)}</div>"
    )


def distinct(costs: Sequence[CutCost]) -> dict[Place, list[CutCost]]:
    """The cuts by their figures to three digits, smallest client first. Equal cuts stay in the order of costs.py."""
    found: dict[Place, list[CutCost]] = {}
    for cost in costs:
        memory, tpot_s = _figures(cost)
        found.setdefault((float(f"{memory:.3g}"), float(f"{tpot_s:.3g}")), []).append(cost)
    return dict(sorted(found.items()))


def _figures(cost: CutCost) -> Place:
    return cost.client_memory_bytes, cost.tpot_s


def _dots(report: CutReport, chosen: SplitPlan, scale: Scale) -> str:
    front = {(cost.start, cost.end) for cost in report.front}
    groups = list(distinct(report.costs).values())
    choice = (chosen.start, chosen.end)
    entry = next((number for number, group in enumerate(groups) if choice in map(_range, group)), 0)
    return "".join(
        _dot(group, choice, scale, number == entry, any(_range(cost) in front for cost in group))
        for number, group in enumerate(groups)
    )


def _dot(group: Sequence[CutCost], choice: tuple[int, int], scale: Scale, entry: bool, front: bool) -> str:
    """A point for cuts that cost the same. Pressing it chooses the first of them."""
    first = next((cost for cost in group if _range(cost) == choice), group[0])
    alike = f", and {len(group) - 1} others with these figures" if len(group) > 1 else ""
    label = (
        f"Trunk layers {first.start} to {first.end}: {seconds(first.tpot_s)} a token, "
        f"{size(first.client_memory_bytes)} at the client, {size(first.trunk_memory_bytes)} at the trunk{alike}"
        f"{'; Pareto-optimal' if front else ''}"
    )
    radius, style = (6, "sl-dot sl-front") if front else (4, "sl-dot")
    pressed = "true" if choice in map(_range, group) else "false"
    return (
        f'<circle class="{style}" {_at(scale.place(*_figures(first)))} r="{radius}" '
        f'data-start="{first.start}" data-end="{first.end}" role="button" aria-pressed="{pressed}" '
        f'tabindex="{0 if entry else -1}" aria-label="{label}"><title>{label}</title></circle>'
    )


def _range(cost: CutCost) -> tuple[int, int]:
    return cost.start, cost.end


def _ring(report: CutReport, plan: SplitPlan, scale: Scale, radius: int, style: str = "") -> str:
    place = scale.place(*_figures(report.cost(plan.start, plan.end)))
    return f'<circle class="sl-ring{style}" {_at(place)} r="{radius}"/>'


def _at(place: Place) -> str:
    return f'cx="{place[0]:.2f}%" cy="{place[1]:.2f}%"'


def _axes(scale: Scale) -> str:
    lines = "".join(_memory_tick(scale, value) for value in ticks(scale.least_memory, scale.most_memory, 4))
    lines += "".join(_time_tick(scale, value) for value in ticks(scale.least_s, scale.most_s, 5))
    names = f'<text x="{RIGHT}%" y="99%" text-anchor="end">peak memory of the client</text>'
    names += '<text x="0" y="3%">TPOT, ms</text>'
    return f"<g>{lines}{names}</g>"


def _memory_tick(scale: Scale, value: float) -> str:
    x = scale.place(value, scale.least_s)[0]
    return (
        f'<line x1="{x:.2f}%" x2="{x:.2f}%" y1="{TOP}%" y2="{FOOT}%"/>'
        f'<text x="{x:.2f}%" y="{FOOT + 6.5}%" text-anchor="middle">{size(value)}</text>'
    )


def _time_tick(scale: Scale, value: float) -> str:
    y = scale.place(scale.least_memory, value)[1]
    return (
        f'<line x1="{LEFT}%" x2="{RIGHT}%" y1="{y:.2f}%" y2="{y:.2f}%"/>'
        f'<text x="{LEFT - 1.5}%" y="{y:.2f}%" dy="4" text-anchor="end">{value * 1e3:.4g}</text>'
    )


def ticks(least: float, most: float, number: int) -> Iterator[float]:
    """At most `number` round values from `least` to `most`."""
    rough = (most - least) / number
    power = 10.0 ** (len(f"{rough:.0f}") - 1) if rough >= 1 else 10.0 ** -_zeros(rough)
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    at = -(-least // step)
    while at * step <= most:
        yield at * step
        at += 1


def _zeros(value: float) -> int:
    """Decimal places up to the first nonzero digit."""
    return -int(f"{value:e}".partition("e")[2])


def _limit(report: CutReport, scale: Scale) -> str:
    limit = report.client_memory_bytes
    if limit is None or not scale.least_memory <= limit <= scale.most_memory:
        return ""
    x = scale.place(limit, scale.least_s)[0]
    return f'<line class="sl-limit" x1="{x:.2f}%" x2="{x:.2f}%" y1="{TOP}%" y2="{FOOT}%"/>'


def _legend(report: CutReport) -> str:
    items = [
        ('<circle class="sl-dot sl-front" cx="8" cy="8" r="6"/>', "Pareto-optimal cut"),
        ('<circle class="sl-dot" cx="8" cy="8" r="4"/>', "another cut"),
        ('<circle class="sl-whole" cx="8" cy="8" r="6"/>', "the full model, in one process"),
        ('<circle class="sl-ring" cx="8" cy="8" r="7"/>', "chosen"),
        ('<circle class="sl-ring sl-now" cx="8" cy="8" r="7"/>', "in use"),
    ]
    if report.measured:
        items.append(('<circle class="sl-mark" cx="8" cy="8" r="7"/>', "measured"))
    if report.client_memory_bytes is not None:
        items.append(('<line class="sl-limit" x1="8" x2="8" y1="0" y2="16"/>', "the client's limit"))
    listed = "".join(
        f'<li><svg class="sl-sign" aria-hidden="true" width="16" height="16">{sign}</svg> {name}</li>'
        for sign, name in items
    )
    return f'<ul class="sl-key">{listed}</ul>'
