"""The candidates of two pinned comparisons at the token where they diverge.

An arm runs again up to that token, with the flags, link and request of its comparison. Nothing of Gradio here.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

from splitlearn.arms.runs import Runs
from splitlearn.arms.spec import CandidatesRequest, TokenCandidates
from splitlearn.errors import SetupError
from splitlearn.events import KINDS, Kind
from splitlearn.flags.selection import parse
from splitlearn.link import words
from splitlearn.runtime.progress import Step
from ui.flags import flag_words
from ui.history.record import Entry, cut, shorter
from ui.model.actions import Planner

OTHER_PROMPT = "The two comparisons have different prompts: candidates can be compared only after the same beginning."
NOT_KEPT = (
    "The token ids or the request of one of them were not kept: its prompt is too long, or it is of an earlier version "
    "of this program. Compare again, and pin that line."
)
ENDED = "One of the answers ends, or was not kept, where they diverge: there is no token to compare."


@dataclass(frozen=True)
class Divergence:
    """Where arm `kind` diverges in two comparisons: at token `at` (from 0). `tokens` are the ids that they chose;
    `found` are the candidates so far."""

    kind: Kind
    at: int
    tokens: tuple[int, int]
    found: tuple[TokenCandidates, ...] = ()

    @property
    def repeatable(self) -> bool:
        """Whether both runs chose the same token again."""
        return tuple(each.token_id for each in self.found) == self.tokens


def kinds(one: Entry, other: Entry) -> tuple[Kind, ...]:
    """The arms whose answers are shown: full, and split if its answer differs from full."""
    apart = one.differs_at is not None or other.differs_at is not None
    return KINDS if apart else ("full",)


def differ(one: Entry, other: Entry) -> bool:
    """Whether any answers that are shown differ."""
    return any(one.of(kind).answer != other.of(kind).answer for kind in kinds(one, other))


def divergences(one: Entry, other: Entry) -> tuple[Divergence, ...]:
    """Where the shown answers diverge, for each arm that does. Raises SetupError if there is no such token."""
    if (one.prompt, one.settings.get("Chat template")) != (other.prompt, other.settings.get("Chat template")):
        raise SetupError(OTHER_PROMPT)
    if not all(entry.request and entry.full.token_ids and entry.split.token_ids for entry in (one, other)):
        raise SetupError(NOT_KEPT)
    found = tuple(each for kind in kinds(one, other) if (each := _divergence(one, other, kind)) is not None)
    if not found:
        raise SetupError(ENDED)
    return found


def candidates(planner: Planner, one: Entry, other: Entry, visitor: str) -> Iterator[Step | Divergence]:
    """Run the arms again. Yields progress, and each divergence with the candidates of both comparisons.

    Ends early when the visitor stops it. Raises SetupError if a comparison cannot be repeated here now, and what
    running raises.
    """
    found, runs = divergences(one, other), planner.runs
    stop = yield from planner.ready(visitor)
    for divergence in found:
        for entry in (one, other):
            check(runs, entry, divergence.kind)
    for divergence in found:
        for entry in (one, other):
            where = f"{divergence.kind}, comparison of {entry.name}"
            yield Step(f"Running again as far as token {divergence.at + 1}: {where}")
            listed = _again(runs, entry, divergence, stop)
            if stop.is_set():
                return
            divergence = replace(divergence, found=(*divergence.found, listed))
        yield divergence


def check(runs: Runs, entry: Entry, kind: Kind) -> None:
    """Raise SetupError if the model, or the cut for a split arm, is not that of `entry`."""
    used, plan = shorter(runs.files.name), cut(runs.plan)
    if entry.model != used:
        raise SetupError(
            f"Both must be of the model in use, {used}. The comparison of {entry.name} was made with {entry.model}."
        )
    if kind == "split" and entry.cut != plan:
        raise SetupError(
            f"The trunk has the layers {plan} now. In the comparison of {entry.name} it had {entry.cut}: adopt that "
            "cut in the tab Model and cut first."
        )


def _again(runs: Runs, entry: Entry, divergence: Divergence, stop: threading.Event) -> TokenCandidates:
    assert entry.request is not None
    flags = parse(entry.flags, flag_words.available(runs))
    asked = CandidatesRequest(flags, entry.request, 0, divergence.at, frozenset(divergence.tokens))
    return runs.candidates(divergence.kind, asked, stop, words.parse(entry.link))


def _divergence(one: Entry, other: Entry, kind: Kind) -> Divergence | None:
    pairs = enumerate(zip(one.of(kind).token_ids, other.of(kind).token_ids, strict=False))
    return next((Divergence(kind, at, pair) for at, pair in pairs if pair[0] != pair[1]), None)
