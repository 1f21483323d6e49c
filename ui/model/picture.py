"""An SVG of the model: embeddings, layers, final norm and LM head, with cuts that can be dragged.

Coordinates are percentages of the width, so that letters keep their size on any screen.
"""

from html import escape

from splitlearn.models.plan import SplitPlan
from splitlearn.planning.anatomy import Anatomy, Layer
from ui.format import size

HEIGHT, TOP, TALL = 176, 44, 96
FIRST, LAST = 11.0, 83.0
"""Where the layers begin and end, in percent."""
GAP = 0.7
"""Between two layers, in percent, where there is room."""
DRAG = """
const drawing = () => element.querySelector('svg[data-layers]');
let held = null;
const move = event => {
  const svg = drawing(), data = svg.dataset, box = svg.getBoundingClientRect();
  const share = ((event.clientX - box.left) / box.width * 100 - data.first) / (data.last - data.first);
  const [least, most] = held === 'start' ? [0, data.end - 1] : [+data.start + 1, +data.layers];
  data[held] = Math.max(least, Math.min(most, Math.round(share * data.layers)));
  const x = +data.first + (data.last - data.first) * data[held] / data.layers;
  svg.querySelector(`[data-cut=${held}]`).setAttribute('x', `${x}%`);
  svg.querySelectorAll('[data-layer]').forEach(each => {
    const there = +each.dataset.layer >= +data.start && +each.dataset.layer < +data.end;
    each.setAttribute('class', there ? 'sl-trunk' : 'sl-client');
  });
};
element.addEventListener('pointerdown', event => {
  const cut = event.target.closest('[data-cut]');
  if (!cut) return;
  held = cut.dataset.cut;
  element.setPointerCapture(event.pointerId);
  event.preventDefault();
});
element.addEventListener('pointermove', event => { if (held) move(event); });
element.addEventListener('pointerup', event => {
  if (!held) return;
  move(event);
  held = null;
  element.dataset.picked = JSON.stringify([+drawing().dataset.start, +drawing().dataset.end]);
  trigger('cut');
});
element.addEventListener('pointercancel', () => { held = null; });
"""
"""Drags a cut with the pointer. Releasing it triggers the event `cut`; both cuts are in `data-picked`, see PICKED."""
PICKED = "() => JSON.parse(document.querySelector('#%s [data-picked]').dataset.picked)"
"""What the event `cut` of the component with this id chose: both cuts. In the browser: two answers of a server could
come in any order."""


def picture(anatomy: Anatomy, plan: SplitPlan, up: float, down: float) -> str:
    """The SVG of the model with the cuts of `plan`. `up` and `down` are the bytes per decoded token at the cuts."""
    n, ends = anatomy.n_layers, (FIRST, LAST)
    layers = "".join(_layer(layer, plan, n) for layer in anatomy.layers)
    outside = (
        _block(0, 9, "Embeddings", "Turns each token id into a hidden state")
        + _block(85, 3.5, "Norm", "The final norm")
        + _block(90, 10, "LM head", "Turns a hidden state into a logit for each token of the vocabulary")
    )
    cuts = _cut("start", plan.start, n, f"{size(up)} up", 14) + _cut("end", plan.end, n, f"{size(down)} down", 30)
    ticks = "".join(_tick(at, n) for at in sorted({0, n}))
    label = (
        f"{anatomy.model}: embeddings, {n} layers, final norm and LM head. The client has the layers 0 to {plan.start} "
        f"and {plan.end} to {n}, the trunk {plan.start} to {plan.end}. Each token takes {size(up)} up and {size(down)} "
        "down."
    )
    return (
        f'<div class="sl-parts"><svg role="img" aria-label="{escape(label)}" height="{HEIGHT}" data-layers="{n}" '
        f'data-start="{plan.start}" data-end="{plan.end}" data-first="{ends[0]}" data-last="{ends[1]}">'
        f"{outside}{layers}{ticks}{cuts}</svg>{_legend(plan)}</div>"
    )


def _place(at: int, n: int) -> float:
    return FIRST + (LAST - FIRST) * at / n


def _layer(layer: Layer, plan: SplitPlan, n: int) -> str:
    where = "trunk" if plan.start <= layer.number < plan.end else "client"
    kind = f"{layer.attention or 'no attention'}, {layer.parameters:,} parameters"
    room = (LAST - FIRST) / n
    gap = min(GAP, 0.3 * room)
    return (
        f'<rect data-layer="{layer.number}" class="sl-{where}" x="{_place(layer.number, n) + gap / 2:.3f}%" y="{TOP}" '
        f'width="{room - gap:.3f}%" height="{TALL}"><title>Layer {layer.number}: {escape(kind)}'
        "</title></rect>"
    )


def _block(x: float, width: float, name: str, what: str) -> str:
    return (
        f'<svg x="{x}%" y="{TOP}" width="{width}%" height="{TALL}"><title>{name}: {what}</title>'
        f'<rect class="sl-client" width="100%" height="100%"/>'
        f'<text class="sl-in" x="50%" y="50%" text-anchor="middle">{name}</text></svg>'
    )


def _cut(name: str, at: int, n: int, label: str, y: int) -> str:
    """A draggable line with `label`, which is on the side that has room."""
    anchor = "start" if _place(at, n) < 50 else "end"
    foot = TOP + TALL
    return (
        f'<svg class="sl-cut" data-cut="{name}" x="{_place(at, n):.3f}%" overflow="visible">'
        f'<line x1="0" x2="0" y1="{y + 4}" y2="{foot + 8}"/><circle cx="0" cy="{foot + 12}" r="6"/>'
        f'<rect class="sl-grip" x="-14" y="{TOP}" width="28" height="{TALL + 30}"/>'
        f'<text x="0" y="{y}" text-anchor="{anchor}">{escape(label)}</text>'
        f'<text x="0" y="{foot + 34}" text-anchor="middle">{at}</text></svg>'
    )


def _tick(at: int, n: int) -> str:
    return f'<text x="{_place(at, n):.3f}%" y="{TOP + TALL + 16}" text-anchor="middle" opacity=".75">{at}</text>'


def _legend(plan: SplitPlan) -> str:
    client = f"client: embeddings, layers [0, {plan.start}) and [{plan.end}, {plan.n_layers}), norm, LM head"
    trunk = f"trunk: layers [{plan.start}, {plan.end})"
    return (
        f'<ul class="sl-key"><li><span class="sl-swatch sl-client"></span>{client}</li>'
        f'<li><span class="sl-swatch sl-trunk"></span>{trunk}</li></ul>'
    )
