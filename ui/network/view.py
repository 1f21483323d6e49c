"""The Network panel as HTML: a link's figures and its cost. Pure functions."""

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

from splitlearn.link.emulated import NONE, Link
from splitlearn.link.prediction import Prediction
from splitlearn.link.words import PRESETS, preset_of
from ui.format import MISSING, ratio, seconds
from ui.html import head_row, small, table

EMPTY = (
    "Compare once over Loopback to predict TTFT and TPOT for every link. Then choose another link and compare again to "
    "measure them."
)
HOW = (
    "Predicted: the figures without a link, and for each trip the RTT and the bytes / bandwidth. An upper bound where "
    "a flag hides the trip. Measured: the last comparison over that link, with the same prompt, flags and settings."
)


@dataclass(frozen=True)
class Forecast:
    """TTFT and TPOT: of full, and predicted and measured for each link."""

    full: Prediction
    predicted: Mapping[Link, Prediction]
    measured: Mapping[Link, Prediction]


def about(link: Link) -> str:
    """The figures of `link`; for a preset also their source."""
    name = preset_of(link)
    source = f" {PRESETS[name].source}" if name else ""
    text = "No delay is added." if link == Link() else f"{link.summary}."
    return f'<p class="sl-small">{escape(text + source)}</p>'


def label(link: Link) -> str:
    """The name of a link."""
    name = preset_of(link)
    return PRESETS[name].label if name else link.summary


def answer(forecast: Forecast | None, link: Link) -> str:
    """One sentence on TPOT and TTFT of split over `link`."""
    if forecast is None or link == Link():
        return ""
    found = forecast.predicted[link]
    longer = ratio(found.tpot_s, forecast.full.tpot_s)
    return (
        f'<p class="sl-why">Over {escape(label(link))}, split would take about <b>{seconds(found.tpot_s)}</b> for each '
        f"token, {longer} what full takes, and <b>{seconds(found.ttft_s)}</b> to the first token.</p>"
    )


def costs(forecast: Forecast | None, chosen: Link) -> str:
    """A table of predicted and measured TTFT and TPOT by link; a hint before a comparison."""
    if forecast is None:
        return small(EMPTY)
    head = head_row("Link", "TTFT predicted", "TTFT measured", "TPOT predicted", "TPOT measured", "TPOT, split / full")
    rows = [_row(forecast, link, link == chosen) for link in forecast.predicted]
    return f"{answer(forecast, chosen)}{table(head, rows, 'What each link costs')}{small(HOW)}"


def _row(forecast: Forecast, link: Link, chosen: bool) -> list[str]:
    predicted, measured = forecast.predicted[link], forecast.measured.get(link)
    name = escape(label(link))
    times = (seconds(predicted.ttft_s), seconds(measured.ttft_s) if measured else MISSING)
    tokens = (seconds(predicted.tpot_s), seconds(measured.tpot_s) if measured else MISSING)
    longer = ratio((measured or predicted).tpot_s, forecast.full.tpot_s)
    return [f"<b>{name} (chosen)</b>" if chosen else name, *times, *tokens, longer]


def fields(link: Link) -> dict[str, str]:
    """The values of the number fields for `link`. Empty is no limit."""
    return {
        "rtt_ms": f"{link.rtt_ms:g}",
        "jitter_ms": f"{link.jitter_ms:g}",
        "up_mbit": "" if link.up_mbit is None else f"{link.up_mbit:g}",
        "down_mbit": "" if link.down_mbit is None else f"{link.down_mbit:g}",
        "loss_percent": f"{link.loss_percent:g}",
    }


def words(link: Link) -> str:
    """The value of the dropdown for `link`: a preset's name, or words."""
    return preset_of(link) or (NONE if link == Link() else str(link))
