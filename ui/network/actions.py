"""The actions of the Network panel: predict from a visitor's last comparison without a link; measure the real link."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from splitlearn.arms.startup import Startup
from splitlearn.client.real_link import RealLink, real_link
from splitlearn.errors import InputError, SetupError
from splitlearn.link import words
from splitlearn.link.emulated import Link
from splitlearn.link.prediction import Prediction, predict
from splitlearn.link.words import PRESETS
from splitlearn.metrics import RunMetrics
from splitlearn.models.plan import SplitPlan
from ui import inputs
from ui.compare.session import ComparisonView
from ui.history.record import Entry, Figures
from ui.network.view import Forecast
from ui.visitors import LeastRecent

MOST_BASES = 32
NUMBERS: Mapping[str, tuple[str, str]] = {
    "rtt_ms": ("RTT, ms", "Round-trip time."),
    "jitter_ms": ("Jitter, ms", "RTT varies by up to this."),
    "up_mbit": ("Up, Mbit/s", "Client to trunk. Empty: no limit."),
    "down_mbit": ("Down, Mbit/s", "Trunk to client. Empty: no limit."),
    "loss_percent": ("Loss, %", "Share of TCP segments."),
}
"""The fields of a link, each with its label and its help."""
BESIDE = ("Link", "Runs of each")


@dataclass(frozen=True)
class Base:
    """A comparison without a link, from which predictions are made while its model (by `digest`) and cut are in use."""

    digest: str
    plan: SplitPlan
    entry: Entry
    samples: tuple[RunMetrics, ...]


class Network:
    """The panel's actions. `measuring` returns why the real link cannot be measured now, or an empty text."""

    def __init__(self, startup: Startup, measuring: Callable[[], str]) -> None:
        self.runs = startup.runs
        self._startup, self._measuring = startup, measuring
        self._bases: LeastRecent[Base] = LeastRecent(MOST_BASES)

    def keep(self, shown: ComparisonView, entry: Entry, visitor: str) -> None:
        """Predict from this comparison from now on, if it had no link."""
        if shown.pairs is not None:
            split = shown.pairs.typical("split")
            if split.link == Link():
                self._bases.put(visitor, Base(self.runs.files.digest, self.runs.plan, entry, split.samples))

    def forecast(self, chosen: Link, entries: Sequence[Entry], visitor: str) -> Forecast | None:
        """Predict each preset and `chosen`; None before this model and cut were compared without a link."""
        base = self._bases.get(visitor)
        if base is None or (base.digest, base.plan) != (self.runs.files.digest, self.runs.plan):
            return None
        links = dict.fromkeys([*(preset.link for preset in PRESETS.values()), chosen])
        alike = [(link_of(each), each) for each in reversed(entries) if _same(each, base.entry)]
        measured = {link: _times(each.split) for link, each in alike if link is not None}
        return Forecast(_times(base.entry.full), {link: predict(base.samples, link) for link in links}, measured)

    def real(self) -> RealLink:
        """Measure the real link to the trunk. Raises SetupError while an experiment runs or the program loads, and
        TrunkError."""
        if reason := self._measuring():
            raise SetupError(reason)
        if self._startup.running:
            raise SetupError("Still loading. Press again when it is done.")
        first = self.runs.hops()[0]
        return real_link(first.address(), first.credentials)

    def leave(self, visitor: str) -> None:
        """Drop the data of a visitor who has left."""
        self._bases.forget(visitor)


def typed_link(typed: Mapping[str, object]) -> Link:
    """Parse the number fields. Raises InputError, which names the field's label."""
    found = {name: _number(label, typed[name], name) for name, (label, _) in NUMBERS.items()}
    try:
        return Link(**found)  # type: ignore[arg-type]  # only bandwidths are None
    except InputError as error:
        raise InputError(NUMBERS[error.field][0], error.value, error.expected) from None


def link_of(entry: Entry) -> Link | None:
    """The link of a comparison; None if its words, which come from a browser, are invalid."""
    try:
        return words.parse(entry.link)
    except InputError:
        return None


def _number(label: str, typed: object, name: str) -> float | None:
    if not str(typed if typed is not None else "").strip():
        return None if name.endswith("mbit") else 0.0
    return inputs.decimal(label, typed)


def _same(one: Entry, other: Entry) -> bool:
    """Whether all settings but the link and the number of runs are equal."""
    a, b = ({name: value for name, value in each.choices.items() if name not in BESIDE} for each in (one, other))
    return a == b


def _times(figures: Figures) -> Prediction:
    return Prediction(figures.ttft_s, figures.tpot_s)
