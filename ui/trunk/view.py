"""The Server tab's view of the trunk: HTML and charts."""

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from splitlearn.reporting.charts import new_figure
from splitlearn.runtime import hardware
from ui import html
from ui.format import MISSING, rate, seconds, size
from ui.trunk.monitor import HISTORY_S, WINDOW_S, Figures, ServerView

PAUSED = "Paused: a run is being timed, and polling the trunk would disturb it."
CHAIN = "The charts are those of the first server of the chain."
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


def cards(servers: Sequence[ServerView], paused: bool = False) -> str:
    """The state of the trunk; of a chain, that of each server."""
    if paused:
        return html.note(PAUSED)
    several = html.small(CHAIN) if len(servers) > 1 else ""
    return "".join(map(card, servers)) + several


def card(shown: ServerView) -> str:
    """A server's state; or a sentence if there is none."""
    if shown.snapshot is None:
        return html.error(shown.error) if shown.error else html.note("Connecting to the trunk server.")
    snapshot, at = shown.snapshot, shown.figures[-1]
    description, state = snapshot.description, "serving" if snapshot.serving else "not serving: it admits no sessions"
    machine = description.machine
    what = (
        f"<b>{escape(description.model)}</b>",
        f"layers [{description.start}, {description.end}) of {description.n_layers}",
        f"{escape(description.dtype)} on {escape(description.device)}",
        f"{description.threads} thread{'s' * (description.threads != 1)}",
        *(_named(machine[name]) for name in ("processor", "system") if machine.get(name)),
        *(escape(words) for words in (hardware.usable(machine),) if words),
        *(f"{name} {escape(machine[name])}" for name in ("torch", "transformers") if machine.get(name)),
    )
    tiles = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, (_, value) in _tiles(at).items())
    return (
        f'<section class="sl-card sl-split sl-server" aria-label="Trunk server" data-serving="{snapshot.serving}">'
        f'<header><h2>Trunk server</h2><span class="sl-what">{escape(snapshot.address)}</span>'
        f'<span class="sl-state" role="status">{state}</span></header>'
        f'<p class="sl-facts">{" &middot; ".join(f"<span>{each}</span>" for each in what)}</p>'
        f'<dl class="sl-tiles">{tiles}</dl>{_over(at)}{_refusals(at)}</section>'
    )


def meanings() -> str:
    """What each figure means. It is not part of the card, which is redrawn each second and would fold it."""
    rows = [(name, why) for name, (why, _) in _tiles(Figures(0.0, {}, {})).items()]
    return html.folded("What these figures mean", html.table(html.head_row("Figure", "What it is"), rows, "Meanings"))


def picture(shown: ServerView, title: str) -> Any:
    """A line chart of the last two minutes, with its axis from zero."""
    figure = new_figure(title, height=190, legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.22})
    now = shown.figures[-1].at if shown.figures else 0.0
    for name, (colour, read) in CHARTS[title].items():
        x, y = _points(shown.figures, now, read)
        figure.add_scatter(x=x, y=y, name=name, mode="lines", line={"color": colour, "width": 2})
    figure.update_xaxes(range=[-HISTORY_S, 0], ticksuffix=" s")
    figure.update_yaxes(rangemode="tozero")
    return figure


def _points(
    figures: Sequence[Figures], now: float, read: Callable[[Figures], float | None]
) -> tuple[list[float | None], list[float | None]]:
    """A line's points. It is broken where nothing was asked for longer than WINDOW_S: what was between is not known."""
    x: list[float | None] = []
    y: list[float | None] = []
    for number, at in enumerate(figures):
        if number and at.at - figures[number - 1].at > WINDOW_S:
            x, y = [*x, None], [*y, None]
        x, y = [*x, at.at - now], [*y, read(at)]
    return x, y


def _over(at: Figures) -> str:
    return html.small(f"Rates, means and percentiles are of the last {at.over_s:.0f} s.") if at.over_s else ""


def _tiles(at: Figures) -> dict[str, tuple[str, str]]:
    """By name: what each figure is, and its value."""
    now, rates = at.now, at.rates
    return {
        "Sessions": ("Open sessions, of the most allowed", _of(at, "sessions", "sessions_limit")),
        "Waiting": ("Sessions in the queue", _of(at, "sessions_waiting", "sessions_waiting_limit")),
        "Steps waiting": ("Steps waiting for a forward", f"{now.get('steps_waiting', 0):.0f}"),
        "Batch": ("Mean sessions per forward", MISSING if at.batch is None else f"{at.batch:.1f}"),
        "TPS (prompt)": ("Prompt tokens a second, of all sessions", rate(rates.get("tokens_total_prompt"))),
        "TPS (decode)": ("Decoded tokens a second, of all sessions", rate(rates.get("tokens_total_decode"))),
        "Step p50": ("Median time of a forward", seconds(at.step_p50_s)),
        "Step p95": ("95th percentile of a forward's time", seconds(at.step_p95_s)),
        "KV blocks": ("KV cache blocks in use, of all", _of(at, "kv_blocks_used", "kv_blocks")),
        "Bytes in": ("Session messages received from clients", _speed(rates.get("received_bytes_total"))),
        "Bytes out": ("Session messages sent to clients", _speed(rates.get("sent_bytes_total"))),
        "Prefix hits": ("Prompt tokens found among kept prefixes, of those looked for", _hits(at)),
        "Prefixes kept": ("Memory and files of kept prefixes, of the most allowed", _kept(at)),
        "Prefixes moved": ("Bytes copied to kept prefixes and from them", size(_sum(at, "prefix_moved_bytes_total"))),
        "Prefixes let go": (
            "Blocks of 16 tokens that left memory or a file for lack of room",
            f"{_sum(at, 'prefix_evictions_total'):.0f}",
        ),
        "Proxied": (
            "Sessions passed on to servers with other flags, not counted here",
            f"{now.get('sessions_proxied', 0):.0f}",
        ),
    }


def _sum(at: Figures, name: str) -> float:
    """The sum of the series of `name` over the values of its labels."""
    return sum(value for series, value in at.now.items() if series.startswith(f"{name}_"))


def _hits(at: Figures) -> str:
    asked = _sum(at, "prefix_tokens_total")
    return f"{asked - at.now.get('prefix_tokens_total_nowhere', 0):.0f} / {asked:.0f}"


def _kept(at: Figures) -> str:
    limit = _sum(at, "prefix_bytes_limit")  # its series are among those that begin with prefix_bytes, too
    return f"{size(_sum(at, 'prefix_bytes') - limit)} / {size(limit)}"


def _of(at: Figures, name: str, limit: str) -> str:
    return f"{at.now.get(name, 0):.0f} / {at.now.get(limit, 0):.0f}"


def _speed(value: float | None) -> str:
    return MISSING if value is None else f"{size(value)}/s"


def _ms(value: float | None) -> float | None:
    return None if value is None else value * 1e3


def _refusals(at: Figures) -> str:
    rows = [(escape(cause), escape(code), f"{count:.0f}") for (cause, code), count in at.refusals.items() if count]
    if not rows:
        return '<p class="sl-small">No refusals since it started.</p>'
    return html.table(html.head_row("Refused for", "gRPC code", "since it started"), rows, "Refusals")


def _named(name: str) -> str:
    """A name that no language has in other words."""
    return f'<bdi dir="auto">{escape(name)}</bdi>'
