"""A client with a token that generates while strangers flood its trunk: its tokens' rhythm before and under each.

The trunk is a server process of its own with the configured model's layers and one token. Each flood is a process that
shows no valid token (bench/floods.py). Its client asks for the same tokens before and under each flood, by turns, so
that each flood is compared with its own moments of peace. Beside that, somebody without a token asks for health.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench.floods import FLOODS, flood
from bench.report import write
from server.auth import tokens
from splitlearn import config
from splitlearn.arms.compare import environment
from splitlearn.arms.embedded_server import EmbeddedTrunk
from splitlearn.arms.runs import Runs
from splitlearn.config import Config
from splitlearn.errors import SplitlearnError
from splitlearn.events import Event, GenerationRequest, TokenEvent
from splitlearn.metrics import RunMetrics
from splitlearn.runtime import process
from splitlearn.runtime.progress import silent

TOKENS, ROUNDS = 128, 2
VARIABLE = "SPLITLEARN_FLOODED_TOKEN"


@dataclass(frozen=True)
class Measurement:
    """What a client and the server's process saw in one stretch: milliseconds, answers, bytes."""

    itl_ms: Sequence[float]
    ttft_ms: float
    health_ms: float | None
    rss: int
    error: str = ""


def main(runs: Runs) -> None:
    """Run each flood and write docs/results/flooded.md."""
    with tempfile.TemporaryDirectory() as folder:
        settings = _settings(runs.config, Path(folder))
        trunk = EmbeddedTrunk(settings, settings.server.tokens)
        try:
            with Runs(config.with_trunk(settings, trunk.address), silent) as own:
                _look(own, trunk)  # what is loaded at first use is loaded
                rows = [_row(name, own, trunk) for name in FLOODS]
        finally:
            trunk.stop()
    text = (
        f"{ROUNDS} times by turns: {TOKENS} tokens in peace, {TOKENS} under the flood. Milliseconds, before / under: "
        "times between tokens (ITL) of all rounds together; memory is the server's process, after the flood."
    )
    write("flooded", "A client with a token under floods of strangers", text, rows, environment(runs))


def _settings(base: Config, folder: Path) -> Config:
    """A trunk that knows one token, which is in the environment."""
    secret, text = tokens.make("client")
    os.environ[VARIABLE] = secret
    entries = [{**entry, "tokens_per_second": 1e6} for entry in yaml.safe_load(text)]
    (folder / "tokens.yaml").write_text(yaml.safe_dump(entries), encoding="utf-8")
    plain = base.model_dump()
    server = {**plain["server"], "tokens": folder / "tokens.yaml"}
    return config.parse({**plain, "server": server, "trunk": {"token": VARIABLE}})


def _row(name: str, own: Runs, trunk: EmbeddedTrunk) -> dict[str, object]:
    peace, war = [], []
    for _ in range(ROUNDS):
        peace.append(_look(own, trunk))
        with flooding(name, trunk.address):
            war.append(_look(own, trunk))
    itls = [[itl for seen in stretch for itl in seen.itl_ms] for stretch in (peace, war)]
    before, under = map(_p99, itls)
    health = [seen.health_ms for seen in war]
    row = {
        "flood": name,
        "p50 ITL": " / ".join(f"{statistics.median(itl):.0f}" if itl else "none" for itl in itls),
        "p99 ITL": f"{before:.0f} / {under:.0f}",
        "ratio of p99": round(under / before, 2),
        "TTFT": " / ".join(f"{statistics.mean(seen.ttft_ms for seen in stretch):.0f}" for stretch in (peace, war)),
        "health": "refused" if None in health else f"{max(filter(None, health)):.0f} ms",
        "memory, MiB": war[-1].rss >> 20,
        "errors": "; ".join(sorted({seen.error for seen in war if seen.error})) or "none",
    }
    print(row, flush=True)
    return row


def _p99(found: Sequence[float]) -> float:
    return statistics.quantiles(found, n=100)[-1] if len(found) > 1 else float("nan")


@contextmanager
def flooding(name: str, address: str) -> Iterator[None]:
    """A process that floods `address` for as long as the context is open."""
    child = process.start("The flood", flood, name, address)
    child.receive()
    time.sleep(2.0)  # until it is at its height
    try:
        yield
    finally:
        child.process.kill()
        child.stop()


def _look(own: Runs, trunk: EmbeddedTrunk) -> Measurement:
    request = GenerationRequest(own.config.generation.prompt, max_new_tokens=TOKENS, ignore_eos=True)
    health_ms, error, events = _health_ms(trunk.address), "", list[Event]()
    try:
        for event in own.stream("split", own.flags("default"), request):
            if isinstance(event, TokenEvent):
                events.append(event)
    except SplitlearnError as broke:
        error = str(broke)[:200]
    metrics, rss = RunMetrics.from_events(events), psutil.Process(trunk.pid).memory_info().rss
    if metrics is None:
        return Measurement((), float("nan"), health_ms, rss, error)
    return Measurement([1e3 * itl for itl in metrics.itl_s], 1e3 * metrics.ttft_s, health_ms, rss, error)


def _health_ms(address: str) -> float | None:
    """How long a health check takes that shows no token; None where it is not answered."""
    began = time.perf_counter()
    with grpc.insecure_channel(address) as channel:
        try:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        except grpc.RpcError:
            return None
    return 1e3 * (time.perf_counter() - began)
