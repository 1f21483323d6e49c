"""The decode loop against a plain one, over stages of whole numbers: whatever is guessed, dropped or lost on the way,
the tokens are those of feeding the whole sequence to the whole model for each of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast
from unittest.mock import patch

from hypothesis import event, given, settings
from hypothesis import strategies as st

from splitlearn.events import GenerationRequest, TokenEvent
from splitlearn.generation.chain import Link
from splitlearn.generation.generator import Generator
from splitlearn.generation.head_overlap import OverlapPolicy
from splitlearn.generation.sampler import random_source, sample, top_k_by_sort
from splitlearn.generation.settings import GenerationSettings
from splitlearn.sampling import SamplingParams
from splitlearn.stages.settings import SessionSettings
from tests.support import integers
from tests.support.integers import VOCABULARY, Head, Local, Remote, Servers, Text, choices

CACHED, UNCACHED = SessionSettings(new_cache=cast(Any, lambda layers, length: None)), SessionSettings()
TOKEN = st.integers(0, VOCABULARY - 1)
FLAGS = st.lists(st.booleans(), max_size=12)


@dataclass(frozen=True)
class Guesses:
    """Proposes the `right` likeliest next tokens, and after them others, whatever was said."""

    right: int
    others: Sequence[int]
    costs: bool

    def propose(self, sequence: Sequence[int]) -> tuple[Sequence[int], int]:
        ids = list(sequence)
        for _ in range(self.right):
            ids.append(int(integers.logits(ids).argmax()))
        return [*ids[len(sequence) :], *self.others], self.right


@dataclass(frozen=True)
class Course:
    """All that may happen in a generation. `first` is the size of the head's first part. `pays`, `lost` and `in_time`
    say each time whether to start early, whether the trunk is lost, and whether a drop comes in time.
    """

    prompt: tuple[int, ...]
    new: int
    first: int
    overlap: bool
    chunk: int | None
    guesses: Guesses | None
    cached: tuple[bool, bool, bool]
    pays: tuple[bool, ...]
    lost: tuple[bool, ...]
    in_time: tuple[bool, ...]
    ends: frozenset[int]
    sampling: SamplingParams
    samples: int = 1


GREEDY = SamplingParams()
GUESSES = st.builds(Guesses, st.integers(0, 5), st.lists(TOKEN, max_size=4).map(tuple), st.booleans())
SAMPLING = st.builds(SamplingParams, temperature=st.just(0.8), seed=st.integers(0, 9))


def _courses(
    overlap: st.SearchStrategy[bool],
    guesses: st.SearchStrategy[Guesses | None],
    cached: st.SearchStrategy[bool],
    sampling: st.SearchStrategy[SamplingParams],
) -> st.SearchStrategy[Course]:
    return st.builds(
        Course,
        prompt=st.lists(TOKEN, min_size=1, max_size=9).map(tuple),
        new=st.integers(1, 14),
        first=st.integers(1, VOCABULARY),
        overlap=overlap,
        chunk=st.none() | st.integers(1, 4),
        guesses=guesses,
        cached=st.tuples(cached, cached, cached),
        pays=FLAGS.map(tuple),
        lost=FLAGS.map(tuple),
        in_time=FLAGS.map(tuple),
        ends=st.frozensets(TOKEN, max_size=1),
        sampling=sampling,
    )


YES, GREEDILY = st.just(value=True), st.just(GREEDY)
OVERLAPPED = _courses(YES, st.none(), YES, GREEDILY)
DRAFTED = _courses(st.booleans(), GUESSES, YES, GREEDILY | SAMPLING)
ANY = _courses(st.booleans(), st.none() | GUESSES, st.booleans(), GREEDILY | SAMPLING)
COURSES = OVERLAPPED | DRAFTED | ANY


def _plain(course: Course, sampling: SamplingParams) -> list[int]:
    """The tokens of an answer, each by the whole model from the whole sequence."""
    ids, rng = list(course.prompt), random_source(sampling)
    while len(ids) < len(course.prompt) + course.new:
        ids.append(sample(integers.logits(ids), sampling, ids, rng, top_k_by_sort))
        if ids[-1] in course.ends:
            break
    return ids[len(course.prompt) :]


def _events(course: Course) -> list[TokenEvent]:
    pays, lost, in_time = (iter(each) for each in (course.pays, course.lost, course.in_time))
    bottom, trunk, top = (CACHED if cached else UNCACHED for cached in course.cached)
    servers = Servers(choices(lost, otherwise=False), choices(in_time, otherwise=True), course.cached[1])
    links = [
        Link(Local(integers.BOTTOM), bottom),
        Link(Remote(servers), trunk),
        Link(Local(integers.TOP), top),
        Link(Head(course.first), top),
    ]
    guesses = course.guesses
    proposers = () if guesses is None else (lambda: guesses,)
    wanted = GenerationSettings(proposers=proposers, head_overlap=course.overlap, chunk_tokens=course.chunk)
    made = Generator(links, cast(Any, Text(course.ends)), None, wanted)
    request = GenerationRequest(
        " ".join(map(str, course.prompt)), course.new, sampling=course.sampling, samples=course.samples
    )
    paying = choices(pays, otherwise=True)
    with patch.object(OverlapPolicy, "pays", lambda self: paying()):
        return [event for event in made.stream(request) if isinstance(event, TokenEvent)]


def _said(events: Sequence[TokenEvent], number: int = 0) -> list[int]:
    return [token for each in events if each.sample == number for token in each.token_ids]


@settings(max_examples=250)
@given(COURSES)
def test_the_tokens_are_those_of_a_plain_loop(course: Course) -> None:
    events = _events(course)
    assert _said(events) == _plain(course, course.sampling)
    event(f"started early: {any(each.head_start is not None for each in events)}")
    event(f"started with a wrong token: {any(each.head_start is False for each in events)}")
    event(f"draft accepted: {any(len(each.token_ids) > 1 for each in events)}")
    event(f"lost: {any(each.recoveries for each in events)}")


@settings(max_examples=40)
@given(COURSES, st.integers(2, 4))
def test_each_of_several_samples_is_that_of_its_seed_alone(course: Course, samples: int) -> None:
    sampling = SamplingParams(temperature=0.8, seed=course.sampling.seed)
    course = replace(course, sampling=sampling, samples=samples, lost=())  # a fork begins with a session that is there
    events = _events(course)
    for number in range(samples):
        assert _said(events, number) == _plain(course, replace(sampling, seed=sampling.seed + number))


EVERY = Course((1, 2, 3), 14, 3, True, None, None, (True, True, True), (), (), (), frozenset(), GREEDY)


def test_every_step_but_the_first_is_started_early_where_that_pays() -> None:
    early = [each.head_start for each in _events(EVERY)]
    assert early[0] is None and None not in early[1:]
    assert {True, False} <= set(early), "guesses that are all alike show little"


def test_no_step_is_started_early_where_that_does_not_pay() -> None:
    early = [each.head_start for each in _events(replace(EVERY, pays=(False,) * 20))]
    assert early[2:] == [None] * (len(early) - 2)


def test_a_trunk_that_is_lost_at_every_second_answer_is_replayed() -> None:
    course = replace(EVERY, lost=(False, True) * 10, in_time=(True, False) * 10)
    events = _events(course)
    assert _said(events) == _plain(course, GREEDY)
    assert sum(len(each.recoveries) for each in events) > 3
