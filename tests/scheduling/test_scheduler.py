"""What a forward takes, for any sessions: never over budget, decoders always, and everybody's turn comes."""

from collections.abc import Hashable

from hypothesis import given, settings
from hypothesis import strategies as st

from splitlearn.scheduling.scheduler import MIN_CHUNK, Limits, QueueEntry, Turns, next_batch


def step(group: int, holder: Hashable, left: int) -> QueueEntry:
    return QueueEntry(group=group, holder=holder, left=left)


class Run:
    """A scheduler's life: forwards one after the other, over steps that come and are done."""

    def __init__(self, steps: list[QueueEntry], budget: int, alone: int) -> None:
        self.steps, self.limits = steps, Limits(True, prompt_tokens=budget, alone_tokens=alone)
        self.number, self.turns = 0, Turns()

    def forward(self, awaited: bool = False) -> list[tuple[QueueEntry, int]]:
        batch = next_batch(self.steps, self.limits, self.turns, awaited=awaited)
        self.number += 1
        self.turns = self.turns.after(batch, self.number)
        for step, tokens in batch:
            step.ran, step.left = self.number, step.left - tokens
        self.steps = [step for step in self.steps if step.left]
        return batch


steps = st.builds(step, st.integers(0, 2), st.integers(0, 3), st.integers(1, 200))
budgets = st.integers(1, 64)
ANY_SPEED = settings(deadline=None)


@ANY_SPEED
@given(st.lists(steps, min_size=1, max_size=12), budgets, st.booleans())
def test_a_forward_has_one_group_all_its_decoders_and_no_more_prompt_than_its_budget(
    waiting: list[QueueEntry], budget: int, awaited: bool
) -> None:
    alone = 4 * budget
    limits = Limits(True, prompt_tokens=budget, alone_tokens=alone)
    batch = next_batch(waiting, limits, Turns(), awaited=awaited)
    assert batch and len({id(step) for step, _ in batch}) == len(batch)
    (group,) = {step.group for step, _ in batch}
    decoding = {id(step) for step in waiting if step.group == group and step.left == 1}
    assert decoding <= {id(step) for step, tokens in batch if tokens == 1}
    assert all(1 <= tokens <= step.left for step, tokens in batch)
    quiet = not awaited and all(step.left > 1 for step in waiting)
    assert sum(tokens for step, tokens in batch if step.left > 1) <= (alone if quiet else budget)


@ANY_SPEED
@given(st.lists(steps, min_size=1, max_size=12), budgets)
def test_every_step_is_done_after_a_bounded_number_of_forwards(waiting: list[QueueEntry], budget: int) -> None:
    run = Run(list(waiting), budget, budget)
    groups, tokens = len({step.group for step in waiting}), sum(step.left for step in waiting)
    for _ in range(groups * (tokens + len(waiting))):
        run.forward()
    assert not run.steps


@ANY_SPEED
@given(st.integers(1, 60), budgets)
def test_a_holder_of_one_prompt_waits_for_two_forwards_beside_a_holder_of_any_number(many: int, budget: int) -> None:
    run = Run([step(0, "many", 500) for _ in range(many)], budget, budget)
    run.forward()
    run.steps.append(one := step(0, "one", min(MIN_CHUNK, budget) + 1))
    before = one.left
    run.forward()
    run.forward()
    assert one.left < before


@ANY_SPEED
@given(st.integers(2, 20), st.integers(1, 1000))
def test_equal_prompts_of_one_holder_take_turns_in_the_order_of_their_arrival(count: int, length: int) -> None:
    waiting = [step(0, "same", length + 1) for _ in range(count)]
    run = Run(list(waiting), MIN_CHUNK, MIN_CHUNK)
    assert [run.forward()[-1][0] for _ in range(count)] == waiting  # behind those that have one token left


def test_a_short_prompt_behind_a_long_one_is_done_with_the_next_forward_but_one() -> None:
    run = Run([step(0, "same", 1500)], 16, 256)
    assert [tokens for _, tokens in run.forward()] == [256]
    run.steps.append(short := step(0, "same", 16))
    run.forward()
    assert short.left == 0


@ANY_SPEED
@given(st.lists(st.integers(1, 3), min_size=1, max_size=6), budgets)
def test_groups_take_turns_however_much_one_of_them_brings(others: list[int], budget: int) -> None:
    run = Run([step(group, "same", 300) for group in others for _ in range(4)], budget, budget)
    for _ in range(10):
        run.forward()
    run.steps.append(token := step(0, "late", 1))
    for _ in range(1 + len(set(others))):
        run.forward()
    assert token.left == 0
