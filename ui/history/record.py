"""A finished comparison as JSON, which the browser keeps.

What the browser sends back is untrusted input: invalid entries are dropped.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from splitlearn.arms.compare import Pairs
from splitlearn.arms.report import ArmReport
from splitlearn.breakdown import Ratio
from splitlearn.errors import InputError
from splitlearn.events import GenerationRequest, Kind
from splitlearn.models.plan import SplitPlan

MOST_ENTRIES = 50
MOST_CHARACTERS = 16_000  # of one entry
MOST_ALL = 300_000  # of all entries
LONG = 2000  # of a text in an entry
MOST_PIECES = 1000
Text = Annotated[str, Field(max_length=LONG)]
Pieces = Annotated[tuple[Text, ...], Field(max_length=MOST_PIECES)]
TokenId = Annotated[int, Field(ge=0)]
TokenIds = Annotated[tuple[TokenId, ...], Field(max_length=MOST_PIECES)]
Seconds = Annotated[float, Field(ge=0, lt=1e6)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Figures(_Part):
    """Figures of the median run of an arm, in seconds and tokens per second.

    `answer` is the first sample's text, in its tokens where those are whole characters. `token_ids` are the ids of its
    first tokens; empty in an entry of an earlier version.
    """

    ttft_s: Seconds
    tpot_s: Seconds | None
    tps: Seconds
    answer: Pieces
    token_ids: TokenIds = ()


class Spread(_Part):
    """split / full over `n` pairs: geometric mean, minimum and maximum."""

    mean: Seconds
    least: Seconds
    most: Seconds
    n: int = Field(ge=1, le=1000)

    @classmethod
    def of(cls, ratio: Ratio | None) -> "Spread | None":
        """The spread of `ratio`."""
        return None if ratio is None else cls(mean=ratio.mean, least=ratio.least, most=ratio.most, n=ratio.n)


class Entry(_Part):
    """A comparison.

    `settings` are all that decide its answer and figures, by name; `link` is in the words of --link. `differs_at` is
    the first token (from 0) in which the arms differ. `command` repeats the comparison; empty if it was too long.
    `request` is None if it was too long, and in an entry of an earlier version.
    """

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
    request: GenerationRequest | None = None

    @property
    def name(self) -> str:
        """The time of the comparison, which identifies it."""
        return f"{self.when:%m-%d %H:%M:%S}"

    def of(self, kind: Kind) -> Figures:
        """The figures of one arm."""
        return self.full if kind == "full" else self.split

    @property
    def label(self) -> str:
        """Its name in a list: time, start of the prompt, flags and link."""
        return f"{self.name} {shorter(self.prompt, 40)} ({shorter(self.flags, 24)}; {self.link})"

    @property
    def choices(self) -> dict[str, str]:
        """All settings, by name."""
        chosen = {"Model": self.model, "Trunk layers": self.cut, "Prompt": self.prompt, "Flags": self.flags}
        return {**chosen, "Link": self.link, "Runs of each": str(self.pairs), **self.settings}


def entry(
    pairs: Pairs, request: GenerationRequest, flags: str, model: str, plan: SplitPlan, link: str, command: str
) -> Entry:
    """Make the entry of a finished comparison. `link` and `flags` are in words."""
    differ = pairs.divergence
    return Entry(
        when=datetime.now(UTC),
        model=shorter(model),
        cut=cut(plan),
        prompt=shorter(request.text),
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
        request=request if len(request.prompt) + sum(map(len, request.stop)) <= LONG else None,
    )


def cut(plan: SplitPlan) -> str:
    """The trunk's layers in words."""
    return f"[{plan.start}, {plan.end}) of {plan.n_layers}"


def settings(request: GenerationRequest) -> dict[str, str]:
    """The settings of `request`, by name."""
    chosen = request.sampling
    values: dict[str, object] = {
        "Max new tokens": request.max_new_tokens,
        "Chat template": request.chat,
        "Samples": request.samples,
    }
    values |= {"Ignore the end token": request.ignore_eos, "Stop strings": " ".join(map(repr, request.stop))}
    values |= {"Temperature": chosen.temperature, "Top-k": chosen.top_k, "Top-p": chosen.top_p}
    values |= {"Repetition penalty": chosen.repetition_penalty, "Seed": chosen.seed}
    return {name: shorter(str(value)) for name, value in values.items()}


def pieces(text: str, tokens: Sequence[str]) -> tuple[str, ...]:
    """`text` split into its tokens as far as they are whole characters, then into characters. At most MOST_PIECES."""
    found, at = [], 0
    for token in tokens:
        if not text.startswith(token, at):
            break
        found.append(token)
        at += len(token)
    return tuple(shorter(piece) for piece in (*found, *text[at : at + MOST_PIECES]) if piece)[:MOST_PIECES]


def read(kept: object) -> tuple[Entry, ...]:
    """The valid entries that a browser sent back, newest first, at most MOST_ENTRIES."""
    texts = kept[:MOST_ENTRIES] if isinstance(kept, list) else []
    found = (_entry(text) for text in texts if isinstance(text, str) and len(text) <= MOST_CHARACTERS)
    entries = {each.when: each for each in found if each is not None}
    return tuple(sorted(entries.values(), key=lambda each: each.when, reverse=True))


def find(kept: object, *names: object) -> list[Entry | None]:
    """The entries called `names`, of those that a browser sent back; None for an unknown name."""
    known = {entry.when.isoformat(): entry for entry in read(kept)}
    return [known.get(name) if isinstance(name, str) else None for name in names]


def add(new: Entry, before: Sequence[Entry]) -> tuple[Entry, ...]:
    """`new` and `before`, without the oldest ones over the limits."""
    kept: list[Entry] = []
    room = MOST_ALL
    for each in (_short(new), *before)[:MOST_ENTRIES]:
        room -= len(each.model_dump_json())
        if room < 0:
            break
        kept.append(each)
    return tuple(kept)


def texts(entries: Sequence[Entry]) -> list[str]:
    """The entries as JSON, for the browser."""
    return [each.model_dump_json() for each in entries]


def shorter(text: str, most: int = LONG) -> str:
    """`text`, cut to at most `most` characters."""
    return text if len(text) <= most else f"{text[: most - 1]}\N{HORIZONTAL ELLIPSIS}"


def _entry(text: str) -> Entry | None:
    try:
        return Entry.model_validate_json(text)
    except (ValidationError, InputError):
        return None


def _short(new: Entry) -> Entry:
    """`new` with its answers cut so that it fits into MOST_CHARACTERS."""
    while len(new.model_dump_json()) > MOST_CHARACTERS:
        halves = {
            kind: (figures := getattr(new, kind)).model_copy(
                update={name: getattr(figures, name)[: len(figures.answer) // 2] for name in ("answer", "token_ids")}
            )
            for kind in ("full", "split")
        }
        if not any(figures.answer for figures in halves.values()):
            gone = {"prompt": shorter(new.prompt, 400), "command": "", "request": None}
            return new.model_copy(update={**halves, **gone})
        new = new.model_copy(update=halves)
    return new


def _figures(report: ArmReport) -> Figures:
    run = report.metrics
    tokens = report.texts.tokens[0] if report.texts.tokens else ()
    answer, ids = pieces(run.text, tokens), tuple(run.token_ids[:MOST_PIECES])
    return Figures(ttft_s=run.ttft_s, tpot_s=run.tpot_s, tps=run.tps, answer=answer, token_ids=ids)
