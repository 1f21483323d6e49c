"""What the Server tab shows, as HTML, and its pictures."""

from collections.abc import Callable
from html import escape
from typing import Any

from splitlearn.reporting.charts import new_figure
from splitlearn.runtime import hardware
from ui import html
from ui.format import MISSING, rate, seconds, size
from ui.trunk.monitor import KEPT_S, Figures, ServerView

PAUSED = "Something is being timed, which a look at the trunk would disturb. This goes on when that is over."
Lines = dict[str, tuple[str, Callable[[Figures], float | None]]]
BLUE, GREEN, ORANGE = "#0072b2", "#009e73", "#d55e00"
CHARTS: dict[str, Lines] = {
    "Sessions": {
        "open": (BLUE, lambda at: at.now.get("sessions")),
        "waiting": (ORANGE, lambda at: at.now.get("sessions_waiting")),
        "in a forward": (GREEN, lambda at: at.batch),
    },
    "Tokens per second": {
        "prompt": (ORANGE, lambda at: at.rates.get("tokens_total_prompt")),
        "decode": (BLUE, lambda at: at.rates.get("tokens_total_decode")),
    },
    "Step time, ms": {
        "p50": (BLUE, lambda at: _ms(at.step_p50_s)),
        "p95": (ORANGE, lambda at: _ms(at.step_p95_s)),
    },
    "KV blocks used": {"used": (GREEN, lambda at: at.now.get("kv_blocks_used"))},
}


def card(shown: ServerView, paused: bool = False) -> str:
    """How the trunk is; or, in a sentence, that it does not answer."""
    if paused:
        return html.note(PAUSED)
    if shown.look is None:
        return html.error(shown.error) if shown.error else html.note("Asking the trunk server how it is.")
    look, at = shown.look, shown.figures[-1]
    said, state = look.description, "serving" if look.serving else "not serving: it lets nobody in"
    what = (
        f"<b>{escape(said.model)}</b>",
        f"layers [{said.start}, {said.end}) of {said.n_layers}",
        f"{escape(said.dtype)} on {escape(said.device)}",
        f"{said.threads} thread{'s' * (said.threads != 1)}",
        *(escape(said.machine[name]) for name in ("processor", "system") if said.machine.get(name)),
        *(escape(words) for words in (hardware.usable(said.machine),) if words),
        *(f"{name} {escape(said.machine[name])}" for name in ("torch", "transformers") if said.machine.get(name)),
    )
    tiles = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, (_, value) in _tiles(at).items())
    return (
        f'<section class="sl-card sl-split sl-server" aria-label="Trunk server" data-serving="{look.serving}">'
        f'<header><h2>Trunk server</h2><span class="sl-what">{escape(look.address)}</span>'
        f'<span class="sl-state" role="status">{state}</span></header>'
        f'<p class="sl-facts">{" &middot; ".join(what)}</p>'
        f'<dl class="sl-tiles">{tiles}</dl>{_refusals(at)}</section>'
    )


def meanings() -> str:
    """What each figure is. Beside the card and not in it: that is drawn again each second, under a reader's finger."""
    rows = [(name, why) for name, (why, _) in _tiles(Figures(0.0, {}, {})).items()]
    return html.folded("What these figures mean", html.table(html.head_row("Figure", "What it is"), rows, "Meanings"))


def picture(shown: ServerView, title: str) -> Any:
    """Lines over the last two minutes, on one axis from zero."""
    figure = new_figure(title, height=190, legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.22})
    now = shown.figures[-1].at if shown.figures else 0.0
    for name, (colour, read) in CHARTS[title].items():
        x = [at.at - now for at in shown.figures]
        y = [read(at) for at in shown.figures]
        figure.add_scatter(x=x, y=y, name=name, mode="lines", line={"color": colour, "width": 2})
    figure.update_xaxes(range=[-KEPT_S, 0], ticksuffix=" s")
    figure.update_yaxes(rangemode="tozero")
    return figure


def _tiles(at: Figures) -> dict[str, tuple[str, str]]:
    """Each figure's name, what it is, and its value."""
    now, rates = at.now, at.rates
    return {
        "Sessions": ("Open now, of those that may be", _of(at, "sessions", "sessions_limit")),
        "Waiting": ("Sessions that wait for room", _of(at, "sessions_waiting", "sessions_waiting_limit")),
        "Steps waiting": ("Steps that wait for a forward", f"{now.get('steps_waiting', 0):.0f}"),
        "Batch": ("Sessions that share a forward, mean", MISSING if at.batch is None else f"{at.batch:.1f}"),
        "TPS (prompt)": ("Prompt tokens a second, of all sessions", rate(rates.get("tokens_total_prompt"))),
        "TPS (decode)": ("Decoded tokens a second, of all sessions", rate(rates.get("tokens_total_decode"))),
        "Step p50": ("Half of the forwards took no longer", seconds(at.step_p50_s)),
        "Step p95": ("95% of the forwards took no longer", seconds(at.step_p95_s)),
        "KV blocks": ("Blocks of KV memory that sessions have, of all", _of(at, "kv_blocks_used", "kv_blocks")),
        "Bytes in": ("Of sessions' messages from clients", _speed(rates.get("received_bytes_total"))),
        "Bytes out": ("Of sessions' messages to clients", _speed(rates.get("sent_bytes_total"))),
        "Proxied": ("Sessions at servers with other flags, not in here", f"{now.get('sessions_proxied', 0):.0f}"),
    }


def _of(at: Figures, name: str, limit: str) -> str:
    return f"{at.now.get(name, 0):.0f} / {at.now.get(limit, 0):.0f}"


def _speed(value: float | None) -> str:
    return MISSING if value is None else f"{size(value)}/s"


def _ms(value: float | None) -> float | None:
    return None if value is None else value * 1e3


def _refusals(at: Figures) -> str:
    rows = [(escape(cause), escape(code), f"{count:.0f}") for (cause, code), count in at.refusals.items() if count]
    if not rows:
        return '<p class="sl-small">Nothing was refused since it started.</p>'
    return html.table(html.head_row("Refused for", "gRPC code", "since it started"), rows, "Refusals")
