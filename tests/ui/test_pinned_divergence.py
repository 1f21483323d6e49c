"""Where two pinned comparisons part, without a browser: the token of each arm, the reasons, and what is drawn."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest

from splitlearn.arms.runs import Runs
from splitlearn.arms.spec import TokenCandidates
from splitlearn.errors import SetupError
from splitlearn.events import Candidate
from splitlearn.models.plan import SplitPlan
from tests.ui.test_history_view import entry
from ui.history import divergence, record, view
from ui.history.divergence import Divergence
from ui.history.record import LONG, Entry

HOSTILE = "<b>cat"


def runs(model: str = "tiny", start: int = 2) -> Runs:
    return cast(Runs, SimpleNamespace(files=SimpleNamespace(name=model), plan=SplitPlan(start, 4, 6)))


def changed(of: Entry, **values: object) -> Entry:
    """What a browser gave back that had other values."""
    (found,) = record.read([json.dumps({**of.model_dump(mode="json"), **values})])
    return found


def test_each_arm_that_is_shown_parts_at_its_first_other_token() -> None:
    same, other, split_apart = entry(), entry(full=(1, 7, 3), split=(1, 7, 3)), entry(split=(1, 2, 4))
    assert divergence.divergences(same, other) == (Divergence("full", 1, (2, 7)),)
    assert divergence.divergences(same, split_apart) == (Divergence("split", 2, (3, 4)),)
    assert divergence.divergences(other, split_apart) == (Divergence("full", 1, (7, 2)), Divergence("split", 1, (7, 2)))


def test_only_answers_that_differ_can_be_asked_for_their_candidates() -> None:
    assert divergence.differ(entry(), entry(text="124"))
    assert not divergence.differ(entry(), entry())


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (entry("Who?", full=(1, 7, 3)), divergence.OTHER_PROMPT),
        (entry(full=(1, 2), split=(1, 2)), divergence.ENDED),
        (changed(entry(full=(1, 7, 3)), request=None), divergence.NOT_KEPT),
    ],
)
def test_what_cannot_be_asked_has_its_reason(other: Entry, said: str) -> None:
    with pytest.raises(SetupError) as caught:
        divergence.divergences(entry(), other)
    assert str(caught.value) == said


def test_a_prompt_that_is_too_long_to_be_kept_is_not_asked_in_its_shorter_form() -> None:
    one, other = entry("x" * (LONG + 1)), entry("x" * (LONG + 1), full=(1, 7, 3))
    with pytest.raises(SetupError, match="not kept"):
        divergence.divergences(one, other)


def test_an_entry_of_an_earlier_version_is_read_and_has_no_candidates() -> None:
    old = entry(full=(1, 7, 3)).model_dump(mode="json")
    del old["request"], old["full"]["token_ids"], old["split"]["token_ids"]
    (found,) = record.read([json.dumps(old)])
    with pytest.raises(SetupError, match="earlier version"):
        divergence.divergences(entry(), found)


def test_another_model_is_refused_and_another_cut_where_the_trunk_computes() -> None:
    other = entry(split=(1, 2, 4))
    divergence.check(runs(), other, "split")
    divergence.check(runs(start=1), other, "full")
    with pytest.raises(SetupError, match=r"layers \[1, 4\) of 6 now"):
        divergence.check(runs(start=1), other, "split")
    with pytest.raises(SetupError, match="the model in use, big"):
        divergence.check(runs(model="big"), other, "full")


def test_the_candidates_of_both_stand_side_by_side_with_what_each_chose_and_a_change_is_said() -> None:
    listed = (Candidate(3, HOSTILE, 12.5, -0.6931), Candidate(4, " dog", 12.4999, -0.6932))
    asked = Divergence("split", 2, (3, 4), (TokenCandidates(3, listed), TokenCandidates(4, listed)))
    one, other = entry(), entry(split=(1, 2, 4))
    drawn = view.candidates(one, other, [asked])
    assert "Split: token 3" in drawn and HOSTILE not in drawn
    first, second = drawn.split("(chosen)")[:2]
    assert "12.5000" not in first and "12.5000" in second and drawn.count("(chosen)") == 2
    assert view.CHANGED not in drawn
    assert view.CHANGED in view.candidates(one, other, [replace(asked, tokens=(4, 4))])
    assert view.candidates(one, other, []) == ""
