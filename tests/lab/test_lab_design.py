"""Which arms an experiment has, and which two of them answer a question."""

import pytest

from splitlearn.errors import InputError
from splitlearn.flags.registry import SIDES, Place
from splitlearn.flags.selection import FlagSet, availability, parse
from splitlearn.lab.design import AA, ALL, Design, Plan, plan

HERE = availability(dict.fromkeys(SIDES, Place("cpu", no_python_tokenizer="only one", has_compiler=True)))
DEFAULT = parse("default", HERE)


def _asked(design: Design, words: str) -> Plan:
    flags = parse(words, HERE)
    return plan(design, flags, flags.names())


@pytest.mark.parametrize("design", ["without", "alone"])
def test_the_arms_of_a_question_differ_in_its_flag_and_in_nothing_else(design: Design) -> None:
    made = plan(design, DEFAULT, DEFAULT.names())
    for question in made.questions:
        treated, control = made.arm(question.treated), made.arm(question.control)
        assert treated.kind == control.kind == question.kind
        assert treated.sampled == control.sampled
        if question.flag not in (AA, ALL):
            assert treated.flags.without(question.flag) == control.flags
            assert treated.flags != control.flags


def test_each_step_of_a_ladder_adds_one_flag_to_the_step_before() -> None:
    made = _asked("ladder", "cache-ladder")
    steps = [question for question in made.questions if question.kind == "full" and question.flag != AA]
    assert [question.flag for question in steps] == ["use_cache", "cache", "torch_compile"]
    for lower, upper in zip(steps, steps[1:], strict=False):
        assert upper.control == lower.treated
    assert made.arm(steps[0].control).flags == FlagSet()


def test_the_baseline_runs_once_more_in_a_worker_of_its_own() -> None:
    made = plan("without", DEFAULT, DEFAULT.names())
    for kind in ("full", "split"):
        checks = {q.flag: (made.arm(q.treated), made.arm(q.control)) for q in made.questions if q.kind == kind}
        again, baseline = checks[AA]
        assert again.flags == baseline.flags
        assert again.copy != baseline.copy


def test_alone_keeps_the_kv_cache_unless_it_is_the_question() -> None:
    made = plan("alone", DEFAULT, DEFAULT.names())
    for question in made.questions:
        control = made.arm(question.control)
        expected = [] if question.flag == "use_cache" else ["use_cache"]
        assert control.flags.names() == expected


def test_flags_that_act_only_when_sampling_are_asked_about_under_sampling() -> None:
    made = plan("without", DEFAULT, DEFAULT.names())
    for question in made.questions:
        sampled = question.flag == "fast_top_k"
        assert made.arm(question.treated).sampled == made.arm(question.control).sampled == sampled


def test_a_flag_on_one_side_only_is_asked_of_the_arms_that_have_it() -> None:
    flags = parse("full:use_cache client:use_cache,inference_mode trunk:use_cache", HERE)
    kinds = {q.kind for q in plan("without", flags, ["inference_mode"]).questions}
    assert kinds == {"split"}


@pytest.mark.parametrize(("asked", "words"), [([], "at least one flag"), (["torch_compile"], "a flag that is applied")])
def test_asking_about_nothing_or_about_a_flag_that_is_not_applied_is_refused(asked: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        plan("without", DEFAULT, asked, together=False)


def test_of_the_question_about_all_flags_together_alone_the_arms_are_both_baselines_and_none() -> None:
    made = plan("without", DEFAULT, [])
    assert {question.flag for question in made.questions} == {AA, ALL}
    with pytest.raises(InputError, match="at least one flag"):
        plan("without", FlagSet(), [])


def test_arm_names_are_unique() -> None:
    made = plan("without", DEFAULT, DEFAULT.names())
    assert len({arm.name for arm in made.arms}) == len(made.arms)
    assert len({question.key for question in made.questions}) == len(made.questions)


def test_all_flags_together_are_held_against_none_and_are_as_faithful_as_the_weakest_of_them() -> None:
    made = plan("without", DEFAULT, DEFAULT.names())
    for question in (question for question in made.questions if question.flag == ALL):
        assert made.arm(question.treated).flags == DEFAULT
        assert made.arm(question.control).flags == FlagSet()
        assert made.fidelity(question) == "rounding"
    exact = next(question for question in made.questions if question.flag == "inference_mode")
    assert made.fidelity(exact) == "exact"
    assert {made.fidelity(question) for question in made.questions if question.flag == AA} == {"exact"}
