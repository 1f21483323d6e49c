"""A conversation with both arms: its turns, and the messages of the next prompt. Nothing of Gradio here.

Both arms share one history, with the full arm's answers: if each kept its own, the prompts of later turns would differ,
and their tokens could not be compared.
"""

from dataclasses import dataclass, replace

from splitlearn.arms.report import ArmReport
from splitlearn.errors import InputError
from splitlearn.events import KINDS, Message
from ui.compare.session import ArmView, ComparisonView

MOST_TURNS = 50


@dataclass(frozen=True)
class Turn:
    """A message, and what both arms answered."""

    said: str
    shown: ComparisonView

    @property
    def answer(self) -> ArmReport | None:
        """The full arm's answer, with which the conversation goes on; None if there is no whole one."""
        return self.shown.full.reports[0] if self.shown.full.reports else None


@dataclass(frozen=True)
class Conversation:
    """The answered turns, each with an `answer`.

    `at` is the turn (from 0) that the next one replaces, together with all that come after it; None goes on at the end.
    `asked` is the next turn's message, while it runs and if it was not answered.
    """

    turns: tuple[Turn, ...] = ()
    at: int | None = None
    asked: str | None = None

    @property
    def before(self) -> tuple[Turn, ...]:
        """The turns before the next one."""
        return self.turns[: self.at]

    def index(self, number: object) -> int:
        """Where turn `number` is, which the browser counts from 1. Raises InputError if there is none."""
        if not isinstance(number, int) or not 1 <= number <= len(self.turns):
            raise InputError("turn", number, "the number of an answered turn")
        return number - 1

    def edit(self, number: object) -> "Conversation":
        """The conversation in which the next turn replaces turn `number`. Raises InputError."""
        return replace(self, at=self.index(number), asked=None)

    def ask(self, message: str) -> "Conversation":
        """The conversation with its next message."""
        return replace(self, asked=message)

    def messages(self, system: str) -> tuple[Message, ...]:
        """The messages of the next prompt. Raises InputError after MOST_TURNS turns, and for an empty message."""
        if not self.asked or not self.asked.strip():
            raise InputError("message", self.asked, "some text")
        if len(self.before) >= MOST_TURNS:
            raise InputError("turns", len(self.before), f"at most {MOST_TURNS}; begin a new conversation")
        found = [Message("system", system)] if system.strip() else []
        for turn in self.before:
            if turn.answer is not None:
                found += [Message("user", turn.said), Message("assistant", turn.answer.metrics.text)]
        return (*found, Message("user", self.asked))

    def answered(self, shown: ComparisonView) -> "Conversation":
        """The conversation after `shown` has ended. Without the full arm's answer it stays as it was."""
        turn = Turn(self.asked or "", _without_steps(shown))
        return self if turn.answer is None else Conversation((*self.before, turn))


def _without_steps(shown: ComparisonView) -> ComparisonView:
    """`shown` without what each token took, which is most of its memory and is not shown of a turn."""
    for kind in KINDS:
        shown = shown.with_arm(_arm_without_steps(shown.of(kind)))
    return shown


def _arm_without_steps(arm: ArmView) -> ArmView:
    reports = tuple(replace(each, metrics=replace(each.metrics, steps=(), itl_s=())) for each in arm.reports)
    return replace(arm, reports=reports, metrics=reports[0].metrics if reports else arm.metrics)
