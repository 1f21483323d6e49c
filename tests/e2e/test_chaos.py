"""The short form of `python -m bench chaos`: worker processes as clients, and a trunk that starts quickly."""

import random
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from bench.chaos import CLIENTS, chaos
from splitlearn import config
from splitlearn.arms.runs import Runs
from splitlearn.events import GenerationRequest
from splitlearn.flags.selection import FlagSet
from splitlearn.models.plan import SplitPlan
from splitlearn.runtime.progress import silent
from tests.conftest import TinyFactory
from tests.support.chain import TWO
from tests.support.forked import ForkedTrunk, forked
from tests.support.trunk import settings

KILLS, KILLS_OF_CHAIN = 8, 4
CACHED = frozenset({"use_cache", "inference_mode"})
FLAGS = FlagSet(CACHED, CACHED, CACHED)
REQUESTS = [GenerationRequest(f"Why is the sky blue, {n}?", 64, ignore_eos=True) for n in range(CLIENTS)]


def test_answers_are_complete_and_equal_however_often_the_trunk_is_killed(
    tiny_model: TinyFactory, tmp_path: Path
) -> None:
    sections = settings(tiny_model("llama"))
    with forked(sections, tmp_path) as trunk:

        def kill() -> None:
            trunk.kill()
            trunk.start()

        with Runs(config.with_trunk(config.parse(sections), trunk.address), silent) as runs:
            found, wanted = chaos(runs, FLAGS, REQUESTS, KILLS, random.Random(4), kill)
    assert (found.kills, found.broken, found.different) == (KILLS, [], [])
    assert found.answers >= CLIENTS
    assert len(found.recoveries) >= KILLS
    assert all(len(set(ids)) > 5 for ids in wanted.values())


def test_answers_through_a_chain_are_complete_and_equal_whichever_server_is_killed(
    tiny_model: TinyFactory, tmp_path: Path
) -> None:
    """A chain of two that forward, each with a spare."""
    files, order = tiny_model("llama"), random.Random(5)
    with ExitStack() as stack:

        def start(plan: SplitPlan, after: Sequence[str]) -> list[ForkedTrunk]:
            section = {"drain_s": 0, "forward_to": {"addresses": list(after)}}
            own = settings(files, split={"start": plan.start, "end": plan.end}, server=section)
            return [stack.enter_context(forked(own, tmp_path)) for _ in range(2)]

        second = start(TWO[1], ())
        servers = [start(TWO[0], [each.address for each in second]), second]

        def kill() -> None:
            server = order.choice([each for link in servers for each in link])
            server.kill()
            server.start()

        chain = [
            {"layers": [plan.start, plan.end], "address": [each.address for each in link]}
            for plan, link in zip(TWO, servers, strict=True)
        ]
        with Runs(config.parse(settings(files, trunk={"address": chain})), silent) as runs:
            found, wanted = chaos(runs, FLAGS, REQUESTS, KILLS_OF_CHAIN, random.Random(4), kill)
    assert (found.kills, found.broken, found.different) == (KILLS_OF_CHAIN, [], [])
    assert found.answers >= CLIENTS
    assert found.recoveries
    assert all(len(set(ids)) > 5 for ids in wanted.values())
