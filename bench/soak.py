"""Two thousand sessions at one server process, most of them aborted at random: does the server leak anything?"""

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from statistics import fmean

import psutil
from prometheus_client.parser import text_string_to_metric_families

from bench.capacity import with_room
from bench.report import write
from splitlearn.arms.compare import environment
from splitlearn.arms.runs import Runs
from splitlearn.arms.spec import ArmSpec
from splitlearn.client.probe import TrunkProbe
from splitlearn.config import ServerConfig
from splitlearn.errors import TrunkError
from splitlearn.lab.environment import trunk_pid
from splitlearn.lab.request import read_prompts
from splitlearn.loadtest.plan import PROMPTS, LoadTest
from splitlearn.loadtest.recording import Recording, recordings_of
from splitlearn.loadtest.replay import Sender
from splitlearn.runtime.progress import silent

SESSIONS = 2000
WARM_UP = 100
CLIENTS = 12
PLACES = 8
TOKENS = 16
# How a session ends, with equal probability: closed after its whole answer; closed after some step; dropped between two
# steps; dropped at any time, also while it waits for admission or its prompt, or in a step.
WAYS = ("whole", "leaves", "breaks off", "breaks off at any time")
LONGEST_S = 3.0
KV_BLOCKS = "splitlearn_trunk_kv_blocks_used"
SETTLE_S = 30.0
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Held:
    """Resources of a server process: resident bytes, threads, file descriptors, KV blocks."""

    resident: int
    threads: int
    descriptors: int
    kv_blocks: int


@dataclass(frozen=True)
class Soaked:
    """The server before a round of sessions, its resident bytes after each, the server after the round, and how many
    sessions got their whole answer."""

    before: Held
    resident: tuple[int, ...]
    after: Held
    answered: int


def main(runs: Runs) -> None:
    """Measure and write docs/results/soak.md."""
    test = LoadTest(read_prompts(PROMPTS), max_new_tokens=TOKENS)
    with Runs(with_room(runs.config, ServerConfig(max_sessions=PLACES)), silent) as own:
        spec = replace(own.ready_spec("split", own.flags(own.config.flags)), timeout_s=30.0)
        recorded = recordings_of(test, spec, own.config.generation.chat, silent)
        soak(spec, recorded, WARM_UP, seed=0)
        halves = [soak(spec, recorded, SESSIONS // 2, seed=seed, say=_say) for seed in (1, 2)]
        machine = environment(own)
    one, other = (fmean(half.resident) for half in halves)
    text = (
        f"{SESSIONS} sessions from {CLIENTS} clients at a server with {PLACES} places; prompts of `python -m "
        f"splitlearn loadtest`, answers of up to {TOKENS} tokens; a session ends at random in one of {len(WAYS)} ways: "
        f"{', '.join(WAYS)}. Before them {WARM_UP} others, after which threads and descriptors are counted first.\n\n"
        f"**Mean resident memory in the second thousand: {other / one:.4f} times that in the first** "
        f"({one / 1e6:.1f} MB). Whole answers: {halves[0].answered + halves[1].answered}."
    )
    states = (("before", halves[0].before), ("after the first half", halves[0].after), ("after all", halves[1].after))
    write("soak", "What sessions leave behind", text, [_row(name, held) for name, held in states], machine)


def soak(
    spec: ArmSpec,
    recorded: Sequence[Recording],
    sessions: int,
    seed: int,
    longest_s: float = LONGEST_S,
    say: Callable[[int], None] = lambda count: None,
) -> Soaked:
    """Run `sessions` sessions at the trunk of `spec`, which must be on this machine."""
    before, server, resident = held(spec), _server(spec), list[int]()
    dice = random.Random(seed)
    draws = [(dice.choice(WAYS), random.Random(dice.random())) for _ in range(sessions)]

    def one(each: tuple[str, random.Random]) -> bool:
        whole = _session(spec, recorded, *each, longest_s)
        resident.append(server.memory_info().rss)
        say(len(resident))
        return whole

    with ThreadPoolExecutor(CLIENTS) as pool:
        answered = sum(pool.map(one, draws))
    return Soaked(before, tuple(resident), settled(spec, before), answered)


def _session(spec: ArmSpec, recorded: Sequence[Recording], way: str, dice: random.Random, longest_s: float) -> bool:
    """Run one session that ends in the way `way`. Returns whether it got its whole answer."""
    recording, tokens = dice.choice(recorded), dice.randint(2, TOKENS)
    steps = tokens if way == "whole" or way == WAYS[-1] else dice.randrange(tokens)
    sender = Sender(spec)
    timer = threading.Timer(dice.uniform(0, longest_s) if way == WAYS[-1] else TIMEOUT_S, sender.close)
    timer.start()
    try:
        stream = sender.open(recording.prompt_tokens + tokens)
        for position, x in islice(recording.steps(tokens, sender.use_cache), steps):
            stream.step(position, x, sender.wait_s)
        if way != "breaks off":
            sender.end(stream)
    except (TrunkError, ValueError):  # gRPC raises ValueError for a closed channel
        return False
    finally:
        timer.cancel()
        sender.close()
    return steps == tokens


def settled(spec: ArmSpec, before: Held) -> Held:
    """What the server holds once it is back to `before`, or after SETTLE_S.

    Threads do not count: the server's pool grows to the most that ran at once and stays that large.
    """
    deadline = time.monotonic() + SETTLE_S
    while True:
        now = held(spec)
        if (now.descriptors <= before.descriptors and not now.kv_blocks) or time.monotonic() > deadline:
            return now
        time.sleep(0.2)


def held(spec: ArmSpec) -> Held:
    """What the trunk of `spec`, a process on this machine, holds now."""
    server = _server(spec)
    return Held(server.memory_info().rss, server.num_threads(), server.num_fds(), kv_blocks(spec))


def kv_blocks(spec: ArmSpec) -> int:
    """KV blocks in use, by the server's own metrics."""
    (hop,) = spec.hops
    with closing(TrunkProbe(hop.credentials)) as probe:
        text = probe.snapshot(hop.addresses).metrics
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return next(int(sample.value) for sample in samples if sample.name == KV_BLOCKS)


def _server(spec: ArmSpec) -> psutil.Process:
    return psutil.Process(trunk_pid(spec.hops[0].addresses[0]))


def _row(name: str, now: Held) -> dict[str, str]:
    return {
        "when": name,
        "resident, MB": f"{now.resident / 1e6:.1f}",
        "threads": str(now.threads),
        "descriptors": str(now.descriptors),
        "KV blocks": str(now.kv_blocks),
    }


def _say(count: int) -> None:
    if count % 100 == 0:
        print(f"{count} sessions", flush=True)
