"""Kill the trunk with SIGKILL at random tokens while clients generate: is every answer complete and unchanged?

The clients are worker processes of the split arm. The trunk is the embedded one, which its supervisor restarts on the
same port. A random token of any client triggers the kill; the next kill waits until every client has had a token since.
A request that arrives while no trunk runs fails at once and is retried. With `--chain N` the trunk is a chain of N
servers with a spare each, and each kill hits one of them at random. With `--ray N` it is a chain of N links on Ray with
two replicas each, and each kill hits a replica's actor or its server process.
"""

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

from bench.chained import chained
from bench.on_ray import kill_replica, on_ray
from bench.report import write
from splitlearn.arms.compare import environment
from splitlearn.arms.embedded_server import EmbeddedTrunk
from splitlearn.arms.runs import Runs
from splitlearn.arms.spec import ArmEnd
from splitlearn.arms.worker import start
from splitlearn.errors import SplitlearnError, TrunkUnavailable
from splitlearn.events import Event, GenerationRequest, Recovery, SpotCheckResult, TokenEvent
from splitlearn.flags.selection import FlagSet
from splitlearn.generation.tokenizer import Tokens
from splitlearn.lab.environment import trunk_pid
from splitlearn.lab.logit_fidelity import FixedInput, logits_in_subprocess
from splitlearn.metrics import RunMetrics, first_divergence
from splitlearn.runtime.process import Child

PROMPTS = (Path(__file__).parent / "prompts.txt").read_text(encoding="utf-8").splitlines()
KILLS = 100
CLIENTS = 4
TOKENS = 64
ASK_AGAIN_S = 0.5


@dataclass
class Found:
    """What became of the answers. `broken` has the errors of answers that began and were not completed."""

    kills: int = 0
    answers: int = 0
    asked_again: int = 0
    broken: list[str] = field(default_factory=list)
    different: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    recoveries: list[Recovery] = field(default_factory=list)
    spot_checks: list[SpotCheckResult] = field(default_factory=list)


def main(runs: Runs, chain: int = 1, ray: int = 0) -> None:
    """Measure and write docs/results/chaos.md, or chaos_chain.md for a chain of so many links, or chaos_ray.md for so
    many on Ray."""
    order = random.Random(1)
    if ray:
        with on_ray(runs, ray, 2, "default") as (own, directory):
            what = f"{ray} links on Ray, each with two replicas, whose actor or server process is hit"
            _measure(own, "chaos_ray", what, lambda: kill_replica(directory, order), f"chaos --ray {ray}")
        return
    if chain > 1:
        with chained(runs, chain, 2, "default") as (own, servers):
            what = f"a chain of {chain} servers, each with a spare"
            command = f"chaos --chain {chain}"
            _measure(own, "chaos_chain", what, lambda: _kill_one(servers, order), command)
        return
    (address,) = runs.ready_spec("split", runs.flags("default")).hops[0].addresses
    _measure(runs, "chaos", "their trunk", lambda: psutil.Process(trunk_pid(address)).kill())


def _kill_one(servers: Sequence[EmbeddedTrunk], order: random.Random) -> None:
    """Kill one that runs. The others have had the time to start again."""
    running = [server for server in servers if server.alive()]
    psutil.Process(order.choice(running).pid).kill()


def _measure(runs: Runs, name: str, what: str, kill: Callable[[], None], command: str = "") -> None:
    requests = [GenerationRequest(prompt, max_new_tokens=TOKENS, ignore_eos=True) for prompt in PROMPTS]
    found, expected = chaos(runs, runs.flags("default"), requests, KILLS, random.Random(0), kill)
    judged = [_judge(runs, prompt, expected[prompt], ids) for prompt, ids in found.different]
    lost = [recovery.seconds for recovery in found.recoveries]
    rows: list[dict[str, Any]] = [
        {"what": "kills", "": found.kills},
        {"what": f"answers, of {TOKENS} tokens each", "": found.answers},
        {"what": "answers that were not completed", "": f"{len(found.broken)} {' '.join(found.broken)}"},
        {"what": "answers with other token ids", "": len(found.different)},
        {"what": "of them by more than rounding", "": sum(not within for within, _ in judged)},
        {"what": "gaps of the two best logits, and largest difference, there", "": "; ".join(how for _, how in judged)},
        {"what": "losses recovered from", "": len(lost)},
        {"what": "seconds lost by one, median and most", "": f"{median(lost):.1f}, {max(lost):.1f}"},
        {"what": "tokens replayed", "": sum(recovery.replayed_tokens for recovery in found.recoveries)},
        {"what": "questions asked again, since no trunk was there to begin", "": found.asked_again},
    ]
    text = (
        f"{CLIENTS} clients generate through {what}. At random tokens a trunk server is killed with SIGKILL. Most of a "
        "loss is the time that a trunk takes to start. A token may differ where the gap of the two best logits is at "
        "most twice the largest difference that one step in the place of single ones makes. Connections that are cut, "
        "trunks that hang, are slow, or come back with another model: tests/client/test_faults.py."
    )
    write(name, "Trunk servers killed while clients generate", text, rows, environment(runs), command)


def chaos(
    runs: Runs,
    flags: FlagSet,
    requests: Sequence[GenerationRequest],
    kills: int,
    order: random.Random,
    kill: Callable[[], None],
) -> tuple[Found, dict[str, tuple[int, ...]]]:
    """Call `kill` `kills` times while CLIENTS generate. Returns what was found, and each prompt's undisturbed token
    ids."""
    spec = runs.ready_spec("split", flags)
    children = [start(replace(spec, copy=number)) for number in range(CLIENTS)]
    try:
        for child in children:
            if isinstance(ready := child.receive(), SplitlearnError):
                raise ready
        expected = {request.text: _ask(children[0], spec.flags, request).token_ids for request in requests}
        trial = _Trial(spec.flags, expected, kills, order, kill)
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(lambda number: trial.client(number, children[number], requests), range(CLIENTS)))
    finally:
        for child in children:
            child.stop()
    return trial.found, expected


class _Trial:
    """State that the clients' threads share: when the next kill comes, and what was found."""

    def __init__(
        self,
        flags: FlagSet,
        expected: dict[str, tuple[int, ...]],
        kills: int,
        order: random.Random,
        kill: Callable[[], None],
    ) -> None:
        self.found = Found()
        self._flags = flags
        self._expected = expected
        self._kills = kills
        self._order = order
        self._kill = kill
        self._lock = threading.Lock()
        self._waiting_for: set[int] = set()
        self._left = order.randint(1, CLIENTS * TOKENS)

    def client(self, number: int, child: Child, requests: Sequence[GenerationRequest]) -> None:
        """Send requests until the kills are over. The last answer is completed."""
        for request in cycle(requests[number:] or requests):
            if self.found.kills == self._kills and not self._waiting_for:
                return
            began: list[Event] = []
            try:
                metrics = _ask(child, self._flags, request, began, lambda: self._token(number))
            except TrunkUnavailable as error:
                if began:
                    self.found.broken.append(str(error))
                self.found.asked_again += not began
                time.sleep(ASK_AGAIN_S)
            except SplitlearnError as error:
                self.found.broken.append(str(error))
                return
            else:
                self._answered(request.text, metrics)

    def _answered(self, prompt: str, metrics: RunMetrics) -> None:
        self.found.answers += 1
        self.found.spot_checks.append(metrics.spot_checks)
        self.found.recoveries += [recovery for _, recovery in metrics.recoveries]
        if metrics.token_ids != self._expected[prompt]:
            self.found.different.append((prompt, metrics.token_ids))

    def _token(self, number: int) -> None:
        """Client `number` has one more token, which may trigger the kill."""
        with self._lock:
            self._waiting_for.discard(number)
            if self._waiting_for or self.found.kills == self._kills:
                return
            self._left -= 1
            if self._left:
                return
            self._kill()
            self.found.kills += 1
            print(f"kill {self.found.kills} of {self._kills}; {self.found.answers} answers", flush=True)
            self._left = self._order.randint(1, CLIENTS * TOKENS)
            self._waiting_for = set(range(CLIENTS))


def _ask(
    child: Child, flags: FlagSet, request: GenerationRequest, events: list[Event] | None = None, token: Any = None
) -> RunMetrics:
    """Run one request in a worker. Appends its events to `events` as they come and calls `token()` for each token."""
    received: list[Event] = [] if events is None else events
    child.send((flags, request))
    while not isinstance(item := child.receive(), ArmEnd):
        if isinstance(item, SplitlearnError):
            raise item
        if isinstance(item, Event):  # a notice of a reconnect is none
            received.append(item)
        if isinstance(item, TokenEvent) and token is not None:
            token()
    metrics = RunMetrics.from_events(received)
    if metrics is None:
        raise SplitlearnError("An answer without tokens.")
    return metrics


def _judge(runs: Runs, prompt: str, expected: tuple[int, ...], ids: tuple[int, ...]) -> tuple[bool, str]:
    """Whether rounding explains the first token that differs; and the logit gap and largest difference there, as
    text."""
    at = first_divergence(expected, ids) or 0
    start = Tokens.load(runs.files.folder, use_fast=True).encode(prompt, chat=True)
    threads = runs.config.runs.threads
    fed = FixedInput(
        runs.files, runs.plan, "split", runs.flags("default"), (*start, *expected[:at]), len(start), threads
    )
    singly = logits_in_subprocess(fed)[-1]
    at_once = logits_in_subprocess(replace(fed, prompt_tokens=len(fed.ids)))[-1]
    second, best = np.sort(singly)[-2:].tolist()
    largest = float(np.abs(singly - at_once).max())
    return best - second <= 2 * largest, f"{best - second:.2g}, {largest:.2g}"
