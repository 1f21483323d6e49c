"""What a conversation keeps of its turns, and how they read."""

import pytest

from splitlearn.errors import InputError
from splitlearn.events import Message
from tests.ui.test_ui_view import both
from ui.chat import view
from ui.chat.conversation import MOST_TURNS, Conversation, Turn
from ui.compare.session import ArmView


def test_later_prompts_have_the_full_arms_answers_and_those_of_dropped_turns_no_more() -> None:
    talk = Conversation().ask("One").answered(both([1], [1], "first")).ask("Two").answered(both([1], [2], "second"))
    talk = talk.ask("Three")
    first = (Message("user", "One"), Message("assistant", "first"))
    second = (Message("user", "Two"), Message("assistant", "second"))
    assert talk.messages("") == (*first, *second, Message("user", "Three"))
    assert talk.messages("Be brief.")[0] == Message("system", "Be brief.")
    changed = talk.edit(2).ask("Zwei")
    assert changed.messages("") == (*first, Message("user", "Zwei"))
    assert len(changed.turns) == 2, "nothing is dropped before the answer is there"
    assert [turn.said for turn in changed.answered(both([1], [1])).turns] == ["One", "Zwei"]


def test_a_turn_without_the_full_arms_answer_leaves_the_conversation_as_it_was() -> None:
    shown = both([1], [1])
    talk = Conversation().ask("One").answered(shown)
    stopped = shown.with_arm(ArmView("full", "stopped"))
    assert talk.ask("Two").answered(stopped) == talk.ask("Two")
    alone = shown.with_arm(ArmView("split", "failed", error="<b>gone"))
    kept = talk.ask("Two").answered(alone)
    assert len(kept.turns) == 2
    drawn = view.turns(kept.turns)
    assert view.NOT_COMPARED in drawn and "Split: &lt;b&gt;gone" in drawn


@pytest.mark.parametrize("number", [0, 2, -1, None, "1", 1.5])
def test_a_turn_that_is_not_there_is_refused(number: object) -> None:
    talk = Conversation().ask("One").answered(both([1], [1]))
    with pytest.raises(InputError, match="turn"):
        talk.edit(number)


def test_a_conversation_has_a_last_turn() -> None:
    shown = both([1], [1])
    with pytest.raises(InputError, match="begin a new conversation"):
        Conversation((Turn("Hi", shown),) * MOST_TURNS, asked="More").messages("")
