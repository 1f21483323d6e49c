"""Many generations at once in one worker: each ends by itself, and none is under way while an arm is measured."""

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import psutil
import pytest

from splitlearn import config
from splitlearn.arms.report import ArmReport
from splitlearn.arms.runs import Runs
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.errors import InputError, WorkerDied
from splitlearn.events import GenerationRequest
from splitlearn.flags.selection import FlagSet
from splitlearn.runtime.progress import silent
from tests.support.trunk import settings

CACHED = frozenset({"use_cache", "cache=reserved"})
KINDS = [FlagSet(full=CACHED), FlagSet(full=CACHED | {"inference_mode"})]
SHORT = GenerationRequest("Why is the sky blue?", max_new_tokens=6, ignore_eos=True)
LONG = GenerationRequest("Why is the sky blue?", max_new_tokens=480, ignore_eos=True)


@pytest.fixture(scope="module")
def runs(files: ModelFiles) -> Iterator[Runs]:
    with Runs(config.parse(settings(files)), silent) as made:
        yield made


def served(runs: Runs, flags: FlagSet = KINDS[0], request: GenerationRequest = SHORT) -> ArmReport:
    """The report of a request that goes well."""
    *_, last = runs.serve("full", flags, request, threading.Event())
    assert isinstance(last, ArmReport)
    return last


def test_requests_with_other_session_flags_share_a_worker_and_give_what_a_measured_run_gives(runs: Runs) -> None:
    *_, measured = runs.stream("full", KINDS[0], SHORT)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda flags: served(runs, flags), KINDS * 4))
    assert isinstance(measured, ArmReport)
    assert {each.metrics.token_ids for each in found} == {measured.metrics.token_ids}
    assert {each.texts for each in found} == {measured.texts}
    assert len(runs.pids()) == 1


def test_an_arm_is_measured_only_once_the_requests_before_it_have_ended(runs: Runs) -> None:
    with ThreadPoolExecutor(1) as thread, closing(_begun(runs)) as going:
        measured = thread.submit(lambda: list(runs.stream("full", KINDS[0], SHORT)))
        for _ in range(20):
            next(going)
            assert not measured.done()
        going.close()  # the client leaves in the middle
        assert isinstance(measured.result()[-1], ArmReport)
    assert served(runs).metrics.n_tokens == SHORT.max_new_tokens


def test_a_request_that_cannot_be_answered_ends_alone(runs: Runs) -> None:
    too_long = GenerationRequest("Why?", max_new_tokens=600)
    with closing(_begun(runs)) as going:
        with pytest.raises(InputError, match="max_new_tokens"):
            served(runs, request=too_long)
        next(going)


def test_all_hear_of_a_worker_that_dies_and_the_next_request_has_a_new_one(runs: Runs) -> None:
    both = [_begun(runs), _begun(runs)]
    psutil.Process(runs.pids()[0]).send_signal(signal.SIGKILL)
    for going in both:
        with pytest.raises(WorkerDied):
            list(going)
    assert served(runs).metrics.n_tokens == SHORT.max_new_tokens


def _begun(runs: Runs) -> Any:
    """A long answer, which has begun."""
    going = runs.serve("full", KINDS[0], LONG, threading.Event())
    next(going)
    return going
