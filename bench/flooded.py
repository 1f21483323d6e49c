"""Inter-token latency of an authenticated client, before and during floods by strangers.

The trunk is a server process with the configured model's layers and one access token. Each flood is a process without a
valid token (bench/floods.py). The client generates the same tokens before and during each flood, in turns, so that each
flood has its own baseline. A client without a token also calls the health check.
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
from splitlearn import config
from splitlearn.access import tokens
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
    """One generation: the client's latencies in milliseconds, and the server's resident bytes after it."""

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
                _measure(own, trunk)  # loads what the first use loads
                rows = [_row(name, own, trunk) for name in FLOODS]
        finally:
            trunk.stop()
    text = (
        f"{ROUNDS} times by turns: {TOKENS} tokens in peace, {TOKENS} under the flood. Milliseconds, before / under: "
        "times between tokens (ITL) of all rounds together; memory is the server's process, after the flood."
    )
    write("flooded", "A client with a token under floods of strangers", text, rows, environment(runs))


def _settings(base: Config, folder: Path) -> Config:
    """The configuration of a trunk with one access token, which it puts into the environment."""
    secret, text = tokens.make("client")
    os.environ[VARIABLE] = secret
    entries = [{**entry, "tokens_per_second": 1e6} for entry in yaml.safe_load(text)]
    (folder / "tokens.yaml").write_text(yaml.safe_dump(entries), encoding="utf-8")
    plain = base.model_dump()
    server = {**plain["server"], "tokens": folder / "tokens.yaml"}
    return config.parse({**plain, "server": server, "trunk": {"token": VARIABLE}})


def _row(name: str, own: Runs, trunk: EmbeddedTrunk) -> dict[str, object]:
    before, under = [], []
    for _ in range(ROUNDS):
        before.append(_measure(own, trunk))
        with flooding(name, trunk.address):
            under.append(_measure(own, trunk))
    itls = [[itl for each in part for itl in each.itl_ms] for part in (before, under)]
    p99_before, p99_under = map(_p99, itls)
    health = [each.health_ms for each in under]
    row = {
        "flood": name,
        "p50 ITL": " / ".join(f"{statistics.median(itl):.0f}" if itl else "none" for itl in itls),
        "p99 ITL": f"{p99_before:.0f} / {p99_under:.0f}",
        "ratio of p99": round(p99_under / p99_before, 2),
        "TTFT": " / ".join(f"{statistics.mean(each.ttft_ms for each in part):.0f}" for part in (before, under)),
        "health": "refused" if None in health else f"{max(filter(None, health)):.0f} ms",
        "memory, MiB": under[-1].rss >> 20,
        "errors": "; ".join(sorted({each.error for each in under if each.error})) or "none",
    }
    print(row, flush=True)
    return row


def _p99(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=100)[-1] if len(values) > 1 else float("nan")


@contextmanager
def flooding(name: str, address: str) -> Iterator[None]:
    """Flood `address` from another process while the context is open."""
    child = process.start("The flood", flood, name, address)
    child.receive()
    time.sleep(2.0)  # until it is at its peak
    try:
        yield
    finally:
        child.process.kill()
        child.stop()


def _measure(own: Runs, trunk: EmbeddedTrunk) -> Measurement:
    request = GenerationRequest(own.config.generation.prompt, max_new_tokens=TOKENS, ignore_eos=True)
    health_ms, error, events = _health_ms(trunk.address), "", list[Event]()
    try:
        for event in own.stream("split", own.flags("default"), request):
            if isinstance(event, TokenEvent):
                events.append(event)
    except SplitlearnError as failure:
        error = str(failure)[:200]
    metrics, rss = RunMetrics.from_events(events), psutil.Process(trunk.pid).memory_info().rss
    if metrics is None:
        return Measurement((), float("nan"), health_ms, rss, error)
    return Measurement([1e3 * itl for itl in metrics.itl_s], 1e3 * metrics.ttft_s, health_ms, rss, error)


def _health_ms(address: str) -> float | None:
    """Milliseconds of a health check without a token; None if it is not answered."""
    began = time.perf_counter()
    with grpc.insecure_channel(address) as channel:
        try:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        except grpc.RpcError:
            return None
    return 1e3 * (time.perf_counter() - began)
