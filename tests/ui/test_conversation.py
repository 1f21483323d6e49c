"""What a conversation and the browser keep of its turns, and how they read."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from splitlearn.arms.compare import DivergentLogits
from splitlearn.arms.spec import TokenCandidates
from splitlearn.errors import InputError
from splitlearn.events import KINDS, Candidate, Message, Mismatch, Recovery, SpotCheckResult
from tests.ui.test_ui_view import both
from ui.chat import record, view
from ui.chat.conversation import MOST_TURNS, Conversation, Turn
from ui.compare.session import ArmView, ComparisonView


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


def prompted(shown: ComparisonView, *ids: int) -> ComparisonView:
    """`shown`, with such a prompt in both arms."""
    for kind in KINDS:
        (report,) = shown.of(kind).reports
        metrics = replace(report.metrics, prompt_ids=ids, prompt_tokens=len(ids))
        texts = replace(report.texts, prompt_tokens=tuple((f"<{each}>", each == 1) for each in ids))
        report = replace(report, metrics=metrics, texts=texts)
        shown = shown.with_arm(replace(shown.of(kind), metrics=metrics, reports=(report,)))
    return shown


def eventful() -> Conversation:
    """A conversation with a lost trunk, a wrong answer of one, tokens that differ, and an arm that failed."""
    listed = (Candidate(7, "<b>", 1.5, -0.1), Candidate(9, "so", 1.4, -0.2))
    logits = DivergentLogits(TokenCandidates(7, listed), TokenCandidates(9, listed), (7, 9))
    apart = replace(prompted(both([3, 7], [3, 9], "<i>x</i> \N{ROCKET}"), 1, 2), logits=logits)
    (report,) = apart.split.reports
    wrong = SpotCheckResult(4, (Mismatch((2, 4), 5, 1, 0.5, 1e-4),))
    lost = replace(report.metrics, recoveries=((2, Recovery(1.5, "a:1", "b:2", 7)),), spot_checks=wrong)
    apart = apart.with_arm(ArmView("split", "done", lost, (replace(report, metrics=lost),)))
    alone = prompted(both([1], [1]), 1, 2, 3).with_arm(ArmView("split", "failed", error="<b>gone"))
    return Conversation().ask("One").answered(apart).ask("<b>Two").answered(alone)


def test_a_conversation_that_comes_back_from_the_browser_reads_the_same_and_goes_on_the_same() -> None:
    talk = eventful()
    back, system = record.read(record.text(talk, "Be brief."))
    assert system == "Be brief."
    assert view.turns(back.turns) == view.turns(talk.turns)
    assert view.context(back.turns, 512) == view.context(talk.turns, 512)
    assert back.ask("On").messages(system) == talk.ask("On").messages("Be brief.")
    for number in (1, 2):
        assert view.token_ids(number, back.turns[number - 1]) == view.token_ids(number, talk.turns[number - 1])
    assert record.text(back, system) == record.text(talk, "Be brief.")
    assert record.text(Conversation(), "Be brief.") == record.EMPTY


def test_where_room_is_short_the_oldest_turns_lose_their_token_ids_and_no_turn_is_lost_alone() -> None:
    long = Turn("Hi", prompted(both([1], [1]), *range(record.MOST_CHARACTERS // 40)))
    talk = Conversation((long,) * 3)
    back, _ = record.read(record.text(talk, ""))
    assert back.ask("On").messages("") == talk.ask("On").messages("")
    assert [view.IDS_NOT_KEPT in view.token_ids(1, turn) for turn in back.turns] == [True, True, False]
    endless = Turn("x" * record.MOST_CHARACTERS, both([1], [1]))
    assert record.text(Conversation((long, endless)), "") == record.EMPTY


def changed(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda kept: kept["turns"][0]["full"].update(values)


@pytest.mark.parametrize(
    "spoil",
    [
        changed(e2el_s=0.0),
        changed(ttft_s="1"),
        changed(ttft_s=float("nan")),
        changed(token_ids=[], token_texts=[]),
        changed(token_ids=[1]),
        changed(finish_reason="cancelled"),
        changed(text=None),
        changed(other=1),
        changed(mismatches=[{"layers": "all"}]),
        lambda kept: kept["turns"][0].update(split_state="running"),
        lambda kept: kept["turns"][0]["prompts"][0]["ids"].append(3),
        lambda kept: kept["turns"][0]["logits"]["full"]["listed"][0].update(logprob=1e6),
        lambda kept: kept.update(turns=kept["turns"] * MOST_TURNS),
        lambda kept: kept.update(system=["Be brief."]),
    ],
)
def test_a_text_that_is_no_such_conversation_counts_as_none(spoil: Callable[[dict[str, Any]], object]) -> None:
    kept = json.loads(record.text(eventful(), ""))
    assert record.read(json.dumps(kept))[0].turns
    spoil(kept)
    assert record.read(json.dumps(kept)) == (Conversation(), "")


@pytest.mark.parametrize(
    "kept", [None, 7, [], {}, "", "{", "[" * 100_000, "null", '{"system": "\\ud800", "turns": []}']
)
def test_anything_else_from_the_browser_counts_as_none(kept: object) -> None:
    assert record.read(kept) == (Conversation(), "")
