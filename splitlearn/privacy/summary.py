"""What a sweep's rows say together: a line for each cut, defence, attacker and attack, as figures and Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from splitlearn.privacy.defences import words
from splitlearn.privacy.results import Row
from splitlearn.privacy.scores import Estimate, Hits, exact, perplexity, recall

HEADS = (
    *("cut", "defence", "known", "attack", "prompts", "prompt tokens", "whole prompts", "answer tokens", "flips"),
    *("perplexity", "bytes a token", "ms a token"),
)
WHERE = 4
"""The first so many of HEADS say what a line is about."""
NO_STATES = "no states"


@dataclass(frozen=True)
class Line:
    """An attack at a cut with a defence, which it `knows` or not, None where that makes no difference. Shares of
    tokens, and of whole prompts and answers; None of what the attack does not look at. `by_kind` is the recall of
    prompt tokens for each kind of text. `flips` is the share of the answers' tokens that are others than without a
    defence, `perplexity` that of the prompts for the split model, None of a baseline. `token_bytes` cross the wire for
    a token, both ways."""

    cut: int
    defence: str
    knows: bool | None
    attack: str
    prompts: int
    prompt: Estimate | None
    whole_prompts: Estimate | None
    answer: Estimate | None
    whole_answers: Estimate | None
    by_kind: Mapping[str, Estimate]
    flips: Estimate | None
    perplexity: float | None
    token_bytes: int
    seconds_per_token: float
    prepare_s: float
    peak_rss_bytes: int

    @property
    def against(self) -> str:
        """The defence, and whether the attacker knows it, where that makes a difference."""
        return self.defence + {None: "", True: ", known", False: ", not known"}[self.knows]

    def cells(self) -> tuple[str, ...]:
        """It as text, under HEADS."""
        known = {None: "", True: "yes", False: "no"}[self.knows]
        where = (str(self.cut), self.defence, known) if self.cut else ("", NO_STATES, "")
        loss = "" if self.perplexity is None else f"{self.perplexity:.1f}"
        costs = (loss, str(self.token_bytes), f"{self.seconds_per_token * 1e3:.1f}") if self.cut else ("", "", "")
        shares = map(percent, (self.prompt, self.whole_prompts, self.answer, self.flips))
        return (*where, self.attack, str(self.prompts), *shares, *costs)


def summary(rows: Iterable[Row]) -> list[Line]:
    """The lines, baselines first, then in the order of the cuts, and of the defences at each."""
    groups: dict[tuple[int, str, bool | None, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.cut, row.defence, row.knows, row.attack), []).append(row)
    place = {word: at for at, word in enumerate(words())}
    ordered = sorted(groups, key=lambda key: (key[0], place.get(key[1], len(place)), key[2] is True))
    return [_line(*key, groups[key]) for key in ordered]


def percent(share: Estimate | None) -> str:
    """A share with its interval, such as 99.4% [98.9, 99.8]."""
    return "" if share is None else f"{share.value:.1%} [{share.low * 100:.1f}, {share.high * 100:.1f}]"


def as_json(header: Mapping[str, Any], lines: Sequence[Line], environment: Mapping[str, Any]) -> dict[str, Any]:
    """It as one object. Seconds and bytes."""
    return {**header, "results": [asdict(line) for line in lines], "environment": dict(environment)}


def kind_rows(lines: Sequence[Line]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The recall of prompt tokens by kind of text: heads and rows."""
    kinds = list(dict.fromkeys(kind for line in lines for kind in line.by_kind))
    shown = [line for line in lines if line.by_kind]
    rows = [(*line.cells()[:WHERE], *(percent(line.by_kind.get(kind)) for kind in kinds)) for line in shown]
    return (*HEADS[:WHERE], *kinds), rows


def _line(cut: int, defence: str, knows: bool | None, attack: str, rows: Sequence[Row]) -> Line:
    prompts, answers = [row.prompt for row in rows], [row.answer for row in rows]
    tokens = sum(each.tokens for each in (*prompts, *answers))
    kinds = dict.fromkeys(row.kind for row in rows)
    by_kind = {kind: recall([row.prompt for row in rows if row.kind == kind]) for kind in kinds}
    return Line(
        cut,
        defence,
        knows,
        attack,
        len(rows),
        recall(prompts),
        exact(prompts),
        recall(answers),
        exact(answers),
        {kind: found for kind, found in by_kind.items() if found is not None},
        recall([Hits(row.same.tokens - row.same.right, row.same.tokens) for row in rows]),
        perplexity([row.loss for row in rows]),
        max(row.token_bytes for row in rows),
        sum(row.seconds for row in rows) / max(1, tokens),
        max(row.prepare_s for row in rows),
        max(row.peak_rss_bytes for row in rows),
    )
