"""A conversation as JSON, which the browser keeps: what is shown of each turn, and the system prompt.

What the browser sends back is untrusted input. A text that is not such a conversation counts as none: with some of its
turns alone, the next prompt would be another one.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from splitlearn.arms.compare import DivergentLogits
from splitlearn.arms.report import ArmReport
from splitlearn.arms.spec import Texts
from splitlearn.events import Kind, Mismatch, Recovery, SpotCheckResult
from splitlearn.metrics import RunMetrics
from ui.chat.conversation import MOST_TURNS, Conversation, Turn
from ui.compare.session import ArmView, ComparisonView, State

MOST_CHARACTERS = 300_000
MOST_TOKENS = 1_000_000
Count = Annotated[int, Field(ge=0, lt=1 << 53)]
TokenIds = Annotated[tuple[Count, ...], Field(max_length=MOST_TOKENS)]
Seconds = Annotated[float, Field(ge=0, lt=1e6)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class PromptTokens(_Part):
    """The token ids that were sent, each with its text and whether it is a control token."""

    ids: TokenIds
    texts: tuple[tuple[str, bool], ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.ids) != len(self.texts):
            raise ValueError("a text for each id")
        return self


class Answer(_Part):
    """An arm's answer and its figures, with the text of each of its tokens."""

    text: str
    finish_reason: Literal["eos", "length", "stop"]
    prompt_tokens: Count
    ttft_s: Seconds
    tpot_s: Seconds | None
    e2el_s: Annotated[float, Field(gt=1e-6, lt=1e6)]
    token_ids: Annotated[TokenIds, Field(min_length=1)]
    token_texts: tuple[str, ...]
    drafts: Count
    drafts_accepted: Count
    head_starts: Count
    head_starts_right: Count
    recoveries: tuple[tuple[Count, Recovery], ...]
    mismatches: tuple[Mismatch, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.token_ids) != len(self.token_texts):
            raise ValueError("a text for each token")
        return self

    @classmethod
    def of(cls, report: ArmReport) -> "Answer":
        """The answer of `report`."""
        run = report.metrics
        copied = {name: getattr(run, name) for name in cls.model_fields if hasattr(run, name)}
        return cls(**copied, token_texts=report.texts.tokens[0], mismatches=run.spot_checks.mismatches)

    def report(self, kind: Kind, prompt: PromptTokens | None) -> ArmReport:
        """The report of this answer. It is zero where nothing of it is shown of a turn."""
        own = {name: getattr(self, name) for name in type(self).model_fields}
        texts = Texts(tokens=(own.pop("token_texts"),), prompt_tokens=prompt.texts if prompt else ())
        checks = SpotCheckResult(mismatches=own.pop("mismatches"))
        run = RunMetrics(
            **own,
            spot_checks=checks,
            prompt_ids=prompt.ids if prompt else (),
            itl_s=(),
            ledger={},
            decode_ledger={},
            compile_s=0.0,
            bytes_up=0,
            bytes_down=0,
            decode_bytes_up=0,
            decode_bytes_down=0,
            overlapped_s=0.0,
        )
        return ArmReport(kind, run, 0.0, 0.0, 0, 0, "", "", 0, None, None, texts=texts)


class KeptTurn(_Part):
    """An answered turn. `split` is None without a whole answer of that arm, whose state and error say why.

    `prompts` has what was sent: once for both arms, or once for each; nothing if there was no room for it.
    """

    said: str
    full: Answer
    split: Answer | None
    split_state: State
    split_error: str
    logits: DivergentLogits | None
    prompts: Annotated[tuple[PromptTokens, ...], Field(max_length=2)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        candidates = (*self.logits.full.listed, *self.logits.split.listed) if self.logits else ()
        if not all(each.logprob <= 1 for each in candidates):
            raise ValueError("logarithms of probabilities")
        if self.split_state not in ("done", "stopped", "failed"):
            raise ValueError("an arm that has ended")
        return self

    @classmethod
    def of(cls, turn: Turn) -> "KeptTurn":
        """What is kept of `turn`."""
        (full,), split, arm = turn.shown.full.reports, turn.shown.split.reports, turn.shown.split
        prompts = [PromptTokens(ids=each.metrics.prompt_ids, texts=each.texts.prompt_tokens) for each in (full, *split)]
        return cls(
            said=turn.said,
            full=Answer.of(full),
            split=Answer.of(split[0]) if split else None,
            split_state=arm.state,
            split_error=arm.error,
            logits=turn.shown.logits,
            prompts=tuple(prompts[:1] if all(each == prompts[0] for each in prompts) else prompts),
        )

    def turn(self) -> Turn:
        """The turn, with what is shown of it."""
        first, last = (self.prompts[0], self.prompts[-1]) if self.prompts else (None, None)
        full = self.full.report("full", first)
        split = (self.split.report("split", last),) if self.split else ()
        arms = (
            ArmView("full", "done", full.metrics, (full,)),
            ArmView("split", self.split_state, split[0].metrics if split else None, split, self.split_error),
        )
        return Turn(self.said, ComparisonView(*arms, logits=self.logits))


class Kept(_Part):
    """A conversation with its system prompt."""

    system: str
    turns: Annotated[tuple[KeptTurn, ...], Field(max_length=MOST_TURNS)]


EMPTY = Kept(system="", turns=()).model_dump_json()
"""No conversation. Gradio's browser state does not take "" over what is there."""


def text(talk: Conversation, system: str) -> str:
    """The conversation for the browser, without the oldest turns' token ids where they have no room. EMPTY for one
    without turns, and for one of more than MOST_CHARACTERS."""
    try:
        turns = [KeptTurn.of(turn) for turn in talk.turns]
        sizes = [len(turn.model_dump_json()) for turn in turns]
        for at, turn in enumerate(turns):
            if sum(sizes) <= MOST_CHARACTERS - len(system):
                break
            turns[at] = turn.model_copy(update={"prompts": ()})
            sizes[at] = len(turns[at].model_dump_json())
        found = Kept(system=system, turns=tuple(turns)).model_dump_json() if turns else EMPTY
    except ValidationError:
        return EMPTY
    return found if len(found) <= MOST_CHARACTERS else EMPTY


def read(kept: object) -> tuple[Conversation, str]:
    """The conversation that a browser sent back, and its system prompt; an empty one for any other text."""
    if not isinstance(kept, str) or len(kept) > MOST_CHARACTERS:
        return Conversation(), ""
    try:
        found = Kept.model_validate_json(kept)
    except ValidationError:
        return Conversation(), ""
    return Conversation(tuple(turn.turn() for turn in found.turns)), found.system
