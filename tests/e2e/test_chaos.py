"""The short form of `python -m bench chaos`: worker processes as clients, and a trunk that starts quickly."""

import random
from pathlib import Path

from bench.chaos import CLIENTS, chaos
from splitlearn import config
from splitlearn.arms.runs import Runs
from splitlearn.events import GenerationRequest
from splitlearn.flags.selection import FlagSet
from splitlearn.runtime.progress import silent
from tests.conftest import TinyFactory
from tests.support.forked import forked
from tests.support.trunk import settings

KILLS = 8
CACHED = frozenset({"use_cache", "inference_mode"})
FLAGS = FlagSet(CACHED, CACHED, CACHED)


def test_answers_are_complete_and_equal_however_often_the_trunk_is_killed(
    tiny_model: TinyFactory, tmp_path: Path
) -> None:
    requests = [GenerationRequest(f"Why is the sky blue, {n}?", 64, ignore_eos=True) for n in range(CLIENTS)]
    sections = settings(tiny_model("llama"))
    with forked(sections, tmp_path) as trunk:

        def kill() -> None:
            trunk.kill()
            trunk.start()

        with Runs(config.with_trunk(config.parse(sections), trunk.address), silent) as runs:
            found, wanted = chaos(runs, FLAGS, requests, KILLS, random.Random(4), kill)
    assert (found.kills, found.broken, found.different) == (KILLS, [], [])
    assert found.answers >= CLIENTS
    assert len(found.recoveries) >= KILLS
    assert all(len(set(ids)) > 5 for ids in wanted.values())
