"""One finished comparison as the browser keeps it: a JSON text.

What comes back from the browser is outside input. Each text is checked; one that does not fit is dropped.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from splitlearn.arms.compare import Pairs
from splitlearn.arms.report import ArmReport
from splitlearn.breakdown import Ratio
from splitlearn.events import GenerationRequest
from splitlearn.models.plan import SplitPlan

MOST_ENTRIES = 50
MOST_CHARACTERS = 16_000  # of one entry
MOST_ALL = 300_000  # of all entries
LONG = 2000  # of a text in an entry
MOST_PIECES = 1000
Text = Annotated[str, Field(max_length=LONG)]
Pieces = Annotated[tuple[Text, ...], Field(max_length=MOST_PIECES)]
Seconds = Annotated[float, Field(ge=0, lt=1e6)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Figures(_Part):
    """Of the median run of an arm: seconds, and tokens per second of the request. `answer` is the first sample's text
    in pieces, a token each where tokens are whole characters."""

    ttft_s: Seconds
    tpot_s: Seconds | None
    tps: Seconds
    answer: Pieces


class Spread(_Part):
    """split / full over `n` pairs: the geometric mean, the least and the most."""

    mean: Seconds
    least: Seconds
    most: Seconds
    n: int = Field(ge=1, le=1000)

    @classmethod
    def of(cls, ratio: Ratio | None) -> "Spread | None":
        """`ratio`, to be kept."""
        return None if ratio is None else cls(mean=ratio.mean, least=ratio.least, most=ratio.most, n=ratio.n)


class Entry(_Part):
    """A comparison. `settings` has what decides its answer and its figures, by name; `link` is in the words of --link.
    `differs_at` is the first token (from 0) in which the arms differ. `command` repeats it; empty for one too long."""

    when: AwareDatetime
    model: Text
    cut: Text
    prompt: Text
    flags: Text
    link: Text
    pairs: int = Field(ge=1, le=1000)
    settings: Annotated[dict[Text, Text], Field(max_length=20)]
    full: Figures
    split: Figures
    ttft: Spread | None
    tpot: Spread | None
    differs_at: int | None = Field(ge=0, le=1_000_000)
    command: Annotated[str, Field(max_length=2 * LONG)]

    @property
    def label(self) -> str:
        """For a list: when, and the beginning of the prompt."""
        return f"{self.when:%m-%d %H:%M:%S} {shorter(self.prompt, 40)} ({shorter(self.flags, 24)}; {self.link})"

    @property
    def said(self) -> dict[str, str]:
        """Everything that was chosen, by name."""
        chosen = {"Model": self.model, "Trunk layers": self.cut, "Prompt": self.prompt, "Flags": self.flags}
        return {**chosen, "Link": self.link, "Runs of each": str(self.pairs), **self.settings}


def entry(
    pairs: Pairs, request: GenerationRequest, flags: str, model: str, plan: SplitPlan, link: str, command: str
) -> Entry:
    """What is kept of a comparison that has just ended. `link` and `flags` are in words."""
    differ = pairs.divergence
    return Entry(
        when=datetime.now(UTC),
        model=shorter(model),
        cut=f"[{plan.start}, {plan.end}) of {plan.n_layers}",
        prompt=shorter(request.prompt),
        flags=shorter(flags),
        link=shorter(link),
        pairs=len(pairs.full),
        settings=settings(request),
        full=_figures(pairs.typical("full")),
        split=_figures(pairs.typical("split")),
        ttft=Spread.of(pairs.ttft),
        tpot=Spread.of(pairs.tpot),
        differs_at=None if differ is None else differ.at,
        command=command if len(command) <= 2 * LONG else "",
    )


def settings(request: GenerationRequest) -> dict[str, str]:
    """The settings of `request`, by name."""
    chosen = request.sampling
    said: dict[str, object] = {
        "Max new tokens": request.max_new_tokens,
        "Chat template": request.chat,
        "Samples": request.samples,
    }
    said |= {"Ignore the end token": request.ignore_eos, "Stop strings": " ".join(map(repr, request.stop))}
    said |= {"Temperature": chosen.temperature, "Top-k": chosen.top_k, "Top-p": chosen.top_p}
    said |= {"Repetition penalty": chosen.repetition_penalty, "Seed": chosen.seed}
    return {name: shorter(str(value)) for name, value in said.items()}


def pieces(text: str, tokens: Sequence[str]) -> tuple[str, ...]:
    """`text` in its tokens, as far as they are whole characters, then in characters. At most MOST_PIECES."""
    found, at = [], 0
    for token in tokens:
        if not text.startswith(token, at):
            break
        found.append(token)
        at += len(token)
    return tuple(shorter(piece) for piece in (*found, *text[at : at + MOST_PIECES]) if piece)[:MOST_PIECES]


def read(kept: object) -> tuple[Entry, ...]:
    """The entries that a browser gave back, newest first: those that fit, and no more than it may keep."""
    texts = kept[:MOST_ENTRIES] if isinstance(kept, list) else []
    found = (_entry(text) for text in texts if isinstance(text, str) and len(text) <= MOST_CHARACTERS)
    entries = {each.when: each for each in found if each is not None}
    return tuple(sorted(entries.values(), key=lambda each: each.when, reverse=True))


def add(new: Entry, before: Sequence[Entry]) -> tuple[Entry, ...]:
    """`before` with `new` in front, without the oldest ones where they are too many or too long."""
    kept: list[Entry] = []
    room = MOST_ALL
    for each in (_short(new), *before)[:MOST_ENTRIES]:
        room -= len(each.model_dump_json())
        if room < 0:
            break
        kept.append(each)
    return tuple(kept)


def texts(entries: Sequence[Entry]) -> list[str]:
    """What the browser keeps."""
    return [each.model_dump_json() for each in entries]


def shorter(text: str, most: int = LONG) -> str:
    """`text` in one piece of at most `most` characters."""
    return text if len(text) <= most else f"{text[: most - 1]}\N{HORIZONTAL ELLIPSIS}"


def _entry(text: str) -> Entry | None:
    try:
        return Entry.model_validate_json(text)
    except ValidationError:
        return None


def _short(new: Entry) -> Entry:
    """`new` with answers that are short enough for an entry."""
    while len(new.model_dump_json()) > MOST_CHARACTERS:
        halves = {
            kind: (figures := getattr(new, kind)).model_copy(
                update={"answer": figures.answer[: len(figures.answer) // 2]}
            )
            for kind in ("full", "split")
        }
        if not any(figures.answer for figures in halves.values()):
            return new.model_copy(update={**halves, "prompt": shorter(new.prompt, 400), "command": ""})
        new = new.model_copy(update=halves)
    return new


def _figures(report: ArmReport) -> Figures:
    run = report.metrics
    tokens = report.texts.tokens[0] if report.texts.tokens else ()
    return Figures(ttft_s=run.ttft_s, tpot_s=run.tpot_s, tps=run.tps, answer=pieces(run.text, tokens))
