"""What a simulation of trunk servers says, beside what was measured: 1, 4 and 16 clients of one server and of two.

The simulation (bench/simulation.py) knows what a forward takes at other sizes than those, from measurements in the same
block. Where it agrees, it is asked for more clients and servers than this machine has.
"""

import math
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from threading import Event

from bench.batched import Run
from bench.capacity import FLAGS, recorded
from bench.report import table, write
from bench.simulation import Costs, Scenario, simulate
from bench.stepping import Trunk, Walk, mixed, side_by_side
from splitlearn.arms.compare import environment
from splitlearn.arms.runs import Runs
from splitlearn.arms.spec import ArmSpec
from splitlearn.checkpoints.folder import read_config
from splitlearn.config import Config
from splitlearn.kvcache.architecture import build, kv_values, shapes_of_architecture
from splitlearn.lab.stats import effect
from splitlearn.link.emulated import Link
from splitlearn.loadtest.clients import Client
from splitlearn.loadtest.driver import drive
from splitlearn.loadtest.plan import LoadTest
from splitlearn.loadtest.recording import Recording, recordings_of
from splitlearn.loadtest.replay import Sender
from splitlearn.loadtest.summary import Summary
from splitlearn.loadtest.trunk_clients import replay_clients
from splitlearn.runtime.progress import silent
from splitlearn.scheduling.scheduler import Limits
from splitlearn.wire.codec import DTYPES
from splitlearn.wire.hidden_states import Plain

LINK = Link(rtt_ms=20)
CLIENTS, REPLICAS = (1, 4, 16), (1, 2)
# Where forwards are timed. But for 1, other numbers of sessions than those of CLIENTS.
DECODE, PROMPT = (1, 2, 8, 24), (16, 64, 256)
LENGTH, STEPS = 80, 20
PROMPT_TOKENS = 64
LOAD_S = 20.0
RATE, TPOT_S, CONTEXT = 8.0, 0.1, 2048
USERS = (1, 100, 10_000, 1_000_000)
MORE = ((16, 1), (64, 1), (64, 4), (256, 4), (256, 16), (1024, 16), (1024, 64))
PROMPTS = (Path(__file__).parent / "prompts.txt").read_text(encoding="utf-8").splitlines()[:8]


@dataclass(frozen=True)
class Point:
    """One load, measured and simulated."""

    measured: Summary
    simulated: Summary


def main(runs: Runs, blocks: int = 4) -> None:
    """Measure and write docs/results/scale.md."""
    with ExitStack() as stack:
        servers = [stack.enter_context(Runs(_config(runs.config), silent)) for _ in range(max(REPLICAS))]
        trunks = [recorded(server, max(PROMPT)) for server in servers]
        load = LoadTest(tuple(PROMPTS), duration_s=LOAD_S, replay=True)
        recordings = recordings_of(load, trunks[0].spec, servers[0].config.generation.chat, silent)
        found = [_block(trunks, load, recordings, random.Random(number)) for number in range(blocks)]
        machine = environment(servers[0])
    costs, tokens = found[-1][0], [each.prompt_tokens for each in recordings]
    best = max(_at_level(load, tokens, costs))
    kv_bytes = _kv_bytes(trunks[0].spec) * CONTEXT
    needs = [_needs(users, best, kv_bytes, machine["memory_bytes"] / 4, costs) for users in USERS]
    text = (
        f"Servers with one thread each, the trunk's layers in float32, behind links of {LINK.summary}. Closed loops of "
        f"{LOAD_S:g} s by clients without layers (`loadtest --replay`); prompts of {len(PROMPTS)} sentences, answers "
        f"of 16 to 64 tokens. In each of {blocks} blocks the forwards are timed at {DECODE} sessions and at {PROMPT} "
        "tokens of a prompt, for one server at work and for two beside each other, and the loads run in random order. "
        "Ratios measured / simulated: geometric means with 95% intervals over the blocks.\n\n"
        f"{table(_agreement(found))}\n\n"
        f"What {RATE:g} tokens a second for each of so many users need, at a TPOT of at most {TPOT_S:g} s, each with "
        f"{CONTEXT:,} tokens of context: servers by their forwards (the most tokens a second of one, simulated), by KV "
        "memory (a quarter of this machine's memory each, as a server takes by default), by messages (one process "
        "passes at most a step in the time that a step takes beside forward and link, the client's half included), and "
        f"the network of all.\n\n{table(needs)}\n\n"
        "More than was measured, simulated with the costs of one server at work (last block). Each server is a machine "
        "of its own, and has room for all its sessions:"
    )
    write("scale", "A simulation of many clients and servers", text, list(_more(load, tokens, costs)), machine)


def _config(config: Config) -> Config:
    server = config.server.model_copy(update={"prompt_tokens": PROMPT_TOKENS})
    changes = {"flags": FLAGS, "server": server, "runs": config.runs.model_copy(update={"threads": 1})}
    return config.model_copy(
        update={**changes, "trunk": config.trunk.model_copy(update={"address": ("embedded",), "link": str(LINK)})}
    )


def _block(
    trunks: Sequence[Trunk], load: LoadTest, recordings: Sequence[Recording], order: random.Random
) -> tuple[Costs, dict[tuple[int, int], Point]]:
    """The costs of one server at work, and all loads."""
    alone, beside = _costs(trunks[:1]), _costs(trunks)
    tokens = [each.prompt_tokens for each in recordings]
    points = [(clients, replicas) for clients in CLIENTS for replicas in REPLICAS]
    found = {}
    for clients, replicas in order.sample(points, len(points)):
        asked = replace(load, clients=clients)
        measured = _measured(trunks[:replicas], asked, recordings)
        costs = beside if min(clients, replicas) > 1 else alone
        simulated = simulate(Scenario(asked, tokens, LINK, replicas), costs, _limits(costs))
        found[clients, replicas] = Point(measured, simulated)
        print(clients, replicas, f"{measured.tps_system:.1f} {simulated.tps_system:.1f} tokens/s", flush=True)
    return alone, found


def _limits(costs: Costs) -> Limits:
    return Limits(shared=True, gather_s=costs.forward_s(1, 0), prompt_tokens=PROMPT_TOKENS)


def _costs(trunks: Sequence[Trunk]) -> Costs:
    """What forwards take while all `trunks` are at work."""
    decode = {count: _each(trunks, count) for count in DECODE}
    one = decode[1]
    spec = trunks[0].spec
    return Costs(
        decode=[(count, fmean(run.trunk_s or run.tpot_s for run in decode[count])) for count in DECODE],
        prompt=[(tokens, _prompt_s(trunks, tokens)) for tokens in PROMPT],
        step_s=fmean(run.tpot_s - (run.trunk_s or 0.0) for run in one) - LINK.rtt_ms / 1e3,
        open_s=_open_s(trunks[0]) - LINK.rtt_ms / 1e3,
        row_bytes=Plain(DTYPES[spec.dtype]).row_bytes(spec.files.facts.hidden_size),
    )


def _each(trunks: Sequence[Trunk], count: int) -> list[Run]:
    """`count` sessions at each of `trunks`, at the same time."""
    with ThreadPoolExecutor(len(trunks)) as pool:
        return list(pool.map(lambda trunk: side_by_side(trunk, mixed(count, LENGTH), STEPS), trunks))


def _prompt_s(trunks: Sequence[Trunk], tokens: int) -> float:
    """The trunk's own seconds for a prompt of so many tokens, the median of three."""

    def once(trunk: Trunk) -> float:
        walk = Walk(trunk, tokens, 1)
        try:
            return walk.prompt(tokens)
        finally:
            walk.close()

    with ThreadPoolExecutor(len(trunks)) as pool:
        return fmean(median(each) for each in zip(*(pool.map(once, trunks) for _ in range(3)), strict=True))


def _open_s(trunk: Trunk) -> float:
    """The seconds of opening a session on a connection that is there, the median of five."""
    sender, found = Sender(trunk.spec), []
    try:
        for _ in range(6):
            began = time.perf_counter()
            stream = sender.open(1)
            found.append(time.perf_counter() - began)
            sender.end(stream)
    finally:
        sender.close()
    return median(found[1:])


def _measured(trunks: Sequence[Trunk], load: LoadTest, recordings: Sequence[Recording]) -> Summary:
    with _clients(trunks, load, recordings) as clients:
        return Summary.of(drive(clients, load, silent, Event()), load.levels)


@contextmanager
def _clients(trunks: Sequence[Trunk], load: LoadTest, recordings: Sequence[Recording]) -> Iterator[list[Client]]:
    """Clients of which number n is at trunk n modulo their count, as in the simulation."""
    with ExitStack() as stack:
        lists = []
        for at, trunk in enumerate(trunks):
            if count := len(range(at, load.clients, len(trunks))):
                own = replace(load, clients=count)
                lists.append(stack.enter_context(replay_clients(trunk.spec, own, recordings, silent)))
        yield [lists[number % len(trunks)][number // len(trunks)] for number in range(load.clients)]


def _agreement(found: Sequence[tuple[Costs, dict[tuple[int, int], Point]]]) -> list[dict[str, str]]:
    rows = []
    for clients, replicas in found[0][1]:
        points = [points[clients, replicas] for _, points in found]
        rows.append({"clients": str(clients), "servers": str(replicas), **_ratios(points)})
    return sorted(rows, key=lambda row: (int(row["servers"]), int(row["clients"])))


def _ratios(points: Sequence[Point]) -> dict[str, str]:
    tps = [(point.measured.tps_system, point.simulated.tps_system) for point in points]
    tpot = [(point.measured.tpot.mean_s or 0.0, point.simulated.tpot.mean_s or 0.0) for point in points]
    ttft = [(point.measured.ttft.mean_s or 0.0, point.simulated.ttft.mean_s or 0.0) for point in points]
    columns = {"TPS (system)": (tps, 1.0), "TPOT, ms": (tpot, 1e3), "TTFT, ms": (ttft, 1e3)}
    row = {}
    for name, (pairs, unit) in columns.items():
        measured, simulated = (median(side) * unit for side in zip(*pairs, strict=True))
        row[name] = f"{measured:.1f} / {simulated:.1f}"
        row[f"{name.partition(',')[0]}, ratio"] = str(effect([one for one, _ in pairs], [other for _, other in pairs]))
    return row


def _more(load: LoadTest, tokens: Sequence[int], costs: Costs) -> Iterator[dict[str, str]]:
    for clients, replicas in MORE:
        scenario = Scenario(replace(load, clients=clients), tokens, LINK, replicas)
        found = simulate(scenario, costs, _limits(costs))
        yield {
            "clients": str(clients),
            "servers": str(replicas),
            "TPS (system)": f"{found.tps_system:.0f}",
            "TPS of a client": f"{found.tps_system / clients:.1f}",
            "TPOT, mean, ms": f"{(found.tpot.mean_s or 0.0) * 1e3:.0f}",
            "TTFT, mean, ms": f"{(found.ttft.mean_s or 0.0) * 1e3:.0f}",
        }


def _at_level(load: LoadTest, tokens: Sequence[int], costs: Costs) -> Iterator[float]:
    """Tokens per second of one server, for each number of clients with which TPOT is at most TPOT_S."""
    for clients in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        found = simulate(Scenario(replace(load, clients=clients), tokens, LINK), costs, _limits(costs))
        if (found.tpot.mean_s or 0.0) <= TPOT_S:
            yield found.tps_system


def _kv_bytes(spec: ArmSpec) -> int:
    """Bytes of keys and values of one token in the trunk's layers."""
    values = kv_values(shapes_of_architecture(build(read_config(spec.files.folder))))
    return sum(values[spec.plan.start : spec.plan.end]) * DTYPES[spec.dtype].itemsize


def _needs(users: int, best_tps: float, kv_bytes: int, memory: float, costs: Costs) -> dict[str, str]:
    tps = users * RATE
    return {
        "users": f"{users:,}",
        "servers by forwards": f"{math.ceil(tps / best_tps):,}",
        "servers by KV memory": f"{math.ceil(users * kv_bytes / memory):,}",
        "processes by messages": f"{math.ceil(tps * costs.step_s):,}",
        "network each way, Mbit/s": f"{8e-6 * tps * costs.row_bytes:,.1f}",
    }
