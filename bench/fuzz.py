"""Fuzz a server with hostile clients, while a regular client generates and must get its exact tokens.

The trunk is a server process with two layers of the configured model and two access tokens: one for the hostile
clients, one for the regular client. bench/hostile.py defines what the hostile clients send. Any improper reaction is an
error.
"""

import os
import random
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import hypothesis
import psutil
import yaml
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st

from bench.floods import PREFACE, SETTINGS, frame
from bench.hostile import Attacker, End, Script, Target, improper, oversized, scripts, silent, target
from bench.report import write
from splitlearn import config
from splitlearn.access import tokens
from splitlearn.arms.compare import environment
from splitlearn.arms.embedded_server import EmbeddedTrunk
from splitlearn.arms.runs import Runs
from splitlearn.client.served import describe
from splitlearn.config import Config
from splitlearn.errors import SplitlearnError
from splitlearn.events import GenerationRequest, TokenEvent
from splitlearn.runtime.progress import silent as without_progress
from splitlearn.wire.channel import NONE, Credentials

MESSAGES = 100_000
EXAMPLES, AT_ONCE = 100, 8
TOKENS = 32
VARIABLE = "SPLITLEARN_FUZZ_TOKEN"
HOSTILE_SESSIONS = 16
SILENT_EVERY = 10
STRANGER = "all of these without a token"
SERVER = {"open_s": 2.0, "idle_s": 4.0, "max_length": 1024, "kv_bytes": 64 << 20, "max_variants": 0}
# KV memory, and for each hostile session four copies of the largest message: received, parsed, joined, as a tensor.
MEMORY_LIMIT = (64 << 20) + HOSTILE_SESSIONS * 4 * config.ServerConfig().max_message_bytes


@dataclass
class Tally:
    """Messages sent, ends of the streams, and what was wrong."""

    messages: int = 0
    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def count(self, played: Sequence[Script], ends: Sequence[End]) -> None:
        """Add the streams that were sent, and the ends of those that have ended."""
        self.messages += sum(len(script.messages) for script in played)
        self.ends.update((end.script.kind, end.code.name) for end in ends)
        self.wrong += [why for end in ends if (why := improper(end)) is not None]


@dataclass
class Watch:
    """Resident bytes of the server's process: before, and at most."""

    before: int
    peak: int


def attack(attacker: Attacker, drawn: st.SearchStrategy[Script], examples: int, seed: int, tally: Tally) -> None:
    """Play `examples` groups of up to AT_ONCE concurrent scripts. The same `seed` draws the same scripts."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(st.lists(drawn, min_size=1, max_size=AT_ONCE))
    def play(group: list[Script]) -> None:
        tally.count(group, attacker.play(group))

    play()


def knock(address: str, dice: random.Random) -> None:
    """Connect, send bytes that are not gRPC, or invalid HTTP/2 frames, and disconnect."""
    host, _, port = address.rpartition(":")
    greeting = dice.choice([b"", b"GET / HTTP/1.1\r\n\r\n", PREFACE, PREFACE + frame(SETTINGS, 0, 0)])
    frames = b"".join(_odd_frame(dice) for _ in range(dice.randrange(100)))
    with suppress(OSError), socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(greeting + dice.choice([frames, dice.randbytes(dice.randrange(1, 2000))]))


def _odd_frame(dice: random.Random) -> bytes:
    """A frame of any kind, for any stream, with any flags."""
    return frame(dice.randrange(12), dice.randrange(256), dice.randrange(8), dice.randbytes(dice.randrange(40)))


def main(runs: Runs) -> None:
    """Send the messages and write docs/results/fuzz.md. Raises SplitlearnError if the server did anything wrong."""
    with tempfile.TemporaryDirectory() as folder:
        settings, secret = _settings(runs.config, Path(folder))
        trunk = EmbeddedTrunk(settings, settings.server.tokens)
        try:
            _report(runs, *_run(settings, trunk, Credentials(token=secret)))
        finally:
            trunk.stop()


def _settings(base: Config, folder: Path) -> tuple[Config, str]:
    """A trunk of two layers with two access tokens: the regular client's, in the environment, and the returned one."""
    hostile, other = tokens.make("hostile"), tokens.make("other")
    os.environ[VARIABLE] = other[0]
    limits = {"sessions": HOSTILE_SESSIONS, "tokens_per_second": 1e6}
    entries = [{**entry, **limits} for _, text in (hostile, other) for entry in yaml.safe_load(text)]
    (folder / "tokens.yaml").write_text(yaml.safe_dump(entries), encoding="utf-8")
    plain = base.model_dump()
    server = {**plain["server"], **SERVER, "tokens": folder / "tokens.yaml"}
    own = {"flags": "default", "split": {"start": 2, "end": 4}, "trunk": {"token": VARIABLE}}
    return config.parse({**plain, "server": server, **own}), hostile[0]


def _run(settings: Config, trunk: EmbeddedTrunk, credentials: Credentials) -> tuple[Tally, Watch, int, float]:
    with Runs(config.with_trunk(settings, trunk.address), without_progress) as own:
        expected, description = _answer(own), describe(trunk.address, credentials)
        aim = target(description, own.flags("default").trunk, settings.server.max_message_bytes)
        with _watching(trunk.pid) as watch, _generating(own) as answers:
            began = time.monotonic()
            tally = _attack_until(trunk.address, credentials, aim)
            spent = time.monotonic() - began
    last = Attacker(trunk.address, credentials)
    ends = last.play([Script("all sessions again", (aim.open(), aim.step(1, 0)))] * HOSTILE_SESSIONS)
    last.close()
    tally.wrong += [f"a session is left over: {end.details}" for end in ends if end.answers != 3]
    tally.wrong += [f"the other client got {answer}, not {expected}" for answer in answers if answer != expected]
    if watch.peak - watch.before > MEMORY_LIMIT:
        tally.wrong.append(f"memory grew by {watch.peak - watch.before} bytes, over {MEMORY_LIMIT}")
    return tally, watch, len(answers), spent


def _attack_until(address: str, credentials: Credentials, aim: Target) -> Tally:
    """Run all kinds of attacks in turn until MESSAGES were sent."""
    tally, dice, round_number = Tally(), random.Random(0), 0
    attacker, stranger = Attacker(address, credentials), Attacker(address, NONE)
    while tally.messages < MESSAGES:
        round_number += 1
        if round_number % SILENT_EVERY == 1:  # each of them takes as long as the server's timeout
            attack(attacker, silent(aim), 2, round_number, tally)
        attack(attacker, scripts(aim), EXAMPLES, round_number, tally)
        attack(attacker, oversized(aim), 2, round_number, tally)
        attack(stranger, scripts(aim).map(_without_a_token), 5, round_number, tally)
        for _ in range(5):
            knock(address, dice)
        print(f"{tally.messages} messages, {len(tally.wrong)} wrong", flush=True)
        if round_number % SILENT_EVERY == 1:
            tally.count([], attacker.let_go())
    attacker.close()
    stranger.close()
    let_in = [code for kind, code in tally.ends if kind == STRANGER and code != "UNAUTHENTICATED"]
    tally.wrong += [f"without a token: {code}" for code in let_in]
    return tally


def _without_a_token(script: Script) -> Script:
    return replace(script, kind=STRANGER)


def _answer(own: Runs) -> list[int]:
    """The token ids of the regular client's prompt."""
    request = GenerationRequest(own.config.generation.prompt, max_new_tokens=TOKENS, ignore_eos=True)
    events = own.stream("split", own.flags("default"), request)
    return [token for event in events if isinstance(event, TokenEvent) for token in event.token_ids]


@contextmanager
def _generating(own: Runs) -> Iterator[list[list[int] | str]]:
    """The regular client, generating in a loop. Yields its answers, or its errors."""
    answers: list[list[int] | str] = []
    over = threading.Event()

    def generate() -> None:
        while not over.is_set():
            try:
                answers.append(_answer(own))
            except SplitlearnError as error:
                answers.append(str(error))

    thread = threading.Thread(target=generate)
    thread.start()
    try:
        yield answers
    finally:
        over.set()
        thread.join()


@contextmanager
def _watching(pid: int) -> Iterator[Watch]:
    """Sample the memory of a process twenty times a second."""
    process, over = psutil.Process(pid), threading.Event()
    watch = Watch(process.memory_info().rss, 0)

    def sample() -> None:
        while not over.wait(0.05):
            watch.peak = max(watch.peak, process.memory_info().rss)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield watch
    finally:
        over.set()
        thread.join()


def _report(runs: Runs, tally: Tally, watch: Watch, n_answers: int, spent_s: float) -> None:
    rows = [{"what was sent": kind, "status": code, "streams": n} for (kind, code), n in sorted(tally.ends.items())]
    text = (
        f"{tally.messages} messages in {sum(tally.ends.values())} streams, up to {AT_ONCE} at a time, in "
        f"{spent_s:.0f} s. Meanwhile another client asked {n_answers} times for {TOKENS} tokens and got its exact ones "
        f"each time. "
        f"The server's memory was {watch.before >> 20} MiB before and {watch.peak >> 20} MiB at most (limit for the "
        f"difference: {MEMORY_LIMIT >> 20} MiB). Not as it should be: {len(tally.wrong)}."
    )
    write("fuzz", "A server under hostile clients", text, rows, environment(runs))
    if tally.wrong:
        raise SplitlearnError(f"{len(tally.wrong)} ends were not as they should be, the first: {tally.wrong[0]}")
