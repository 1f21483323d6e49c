"""Ten times a trunk server's capacity, offered for a minute: goodput, and how soon the rest is refused.

Capacity is the goodput of the fewest closed-loop clients that reach nearly the maximum. A server that admits as many
sessions is then offered ten times that load by open-loop arrivals. All clients replay hidden states.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from bench.capacity import with_room
from bench.report import table, write
from splitlearn.arms.compare import environment
from splitlearn.arms.runs import Runs
from splitlearn.arms.spec import ArmSpec
from splitlearn.config import ServerConfig
from splitlearn.loadtest.driver import Measurement, drive
from splitlearn.loadtest.plan import SHORTEST, Levels, LoadTest
from splitlearn.loadtest.recording import Recording, recordings_of
from splitlearn.loadtest.summary import Spread, Summary
from splitlearn.loadtest.trunk_clients import replay_clients
from splitlearn.reporting.percentile import percentile
from splitlearn.runtime.progress import silent

FACTOR = 10.0
OFFERED_S = 60.0
CAPACITY_S = 40.0
LADDER = (4, 8, 16, 32)
LADDER_S = 20.0
# Share of the best goodput that counts as capacity: beyond it more clients only wait longer.
NEARLY = 0.95
LEVELS = Levels(ttft_s=10.0, tpot_s=0.25)
# How long a client waits to be admitted, and then for each step. Long enough for the prompts of all sessions at once,
# and short enough to leave time for the prompt within the TTFT level.
WAIT_S = 5.0
PROMPTS = (Path(__file__).parent / "prompts.txt").read_text(encoding="utf-8").splitlines()[:8]
# Concurrent requests of the open-loop clients: more than the server admits and queues.
CLIENTS = 256
# In the text of a refusal after a wait, and not in that of a full queue.
WAITED = "there was no room within"


@dataclass(frozen=True)
class Phase:
    """One load of the trunk."""

    name: str
    measured: Measurement

    @property
    def summary(self) -> Summary:
        """Its figures under LEVELS."""
        return Summary.of(self.measured, LEVELS)


def main(runs: Runs) -> None:
    """Measure and write docs/results/overload.md."""
    test = LoadTest(tuple(PROMPTS), levels=LEVELS, duration_s=LADDER_S, replay=True)
    with Runs(with_room(runs.config, ServerConfig(max_sessions=2 * max(LADDER))), silent) as roomy:
        spec = _spec(roomy)
        recorded = recordings_of(test, spec, roomy.config.generation.chat, silent)
        ladder = [_load(f"{n} clients", spec, replace(test, clients=n), recorded) for n in LADDER]
    enough = NEARLY * max(phase.summary.goodput_per_s for phase in ladder)
    best = next(n for n, phase in zip(LADDER, ladder, strict=True) if phase.summary.goodput_per_s >= enough)
    server = ServerConfig(max_sessions=best)
    with Runs(with_room(runs.config, server), silent) as limited:
        spec, closed = _spec(limited), replace(test, clients=best, duration_s=CAPACITY_S)
        before = _load("capacity, before", spec, closed, recorded)
        rate = FACTOR * before.summary.goodput_per_s
        flood = replace(test, clients=CLIENTS, rate=rate, duration_s=OFFERED_S)
        over = _load(f"{FACTOR:g} times that", spec, flood, recorded)
        after = _load("capacity, after", spec, closed, recorded)
        machine = environment(limited)
    kept = over.summary.goodput_per_s / fmean(phase.summary.goodput_per_s for phase in (before, after))
    text = (
        f"Service levels: TTFT {LEVELS.ttft_s:g} s, TPOT {LEVELS.tpot_s:g} s; a client waits {WAIT_S:g} s for a place. "
        f"{len(PROMPTS)} prompts of one sentence, answers of {test.max_new_tokens // SHORTEST} to "
        f"{test.max_new_tokens} tokens. {best} closed-loop clients are the fewest that gave {NEARLY:.0%} of the most "
        f"goodput, so that the server was given {best} places, and a line of {server.max_waiting}.\n\n"
        f"**Goodput under {FACTOR:g} times the capacity for {OFFERED_S:g} s: {kept:.1%} of that at capacity** (the "
        f"mean of before and after). Requests that never ended: {over.summary.incomplete}. The clients' process, on "
        f"the same cores, had {over.summary.busy:.0%} of a core busy.\n\n"
        f"How those were told that got no place:\n\n{table(refusals(over.measured))}\n\n"
        f"How the number of places was found:\n\n{table([_row(phase) for phase in ladder])}\n\n"
        "The same server at capacity and beyond:"
    )
    rows = [_row(each) for each in (before, over, after)]
    write("overload", "A trunk server under ten times its load", text, rows, machine)


def _spec(runs: Runs) -> ArmSpec:
    return replace(runs.ready_spec("split", runs.flags(runs.config.flags)), timeout_s=WAIT_S)


def _load(name: str, spec: ArmSpec, test: LoadTest, recorded: Sequence[Recording]) -> Phase:
    with replay_clients(spec, test, recorded, silent) as clients:
        found = Phase(name, drive(clients, test, silent, threading.Event()))
    print(f"{name}: goodput {found.summary.goodput_per_s:.2f} requests/s", flush=True)
    return found


def _row(phase: Phase) -> dict[str, str]:
    found = phase.summary
    return {
        "load": phase.name,
        "offered /s": f"{found.offered / found.duration_s:.2f}",
        "goodput /s": f"{found.goodput_per_s:.2f}",
        "TPS (system)": f"{found.tps_system:.1f}",
        "TTFT p50, p95": _percentiles(found.ttft),
        "TPOT p50, p95": _percentiles(found.tpot),
        "done": str(found.done),
        "rejected": str(found.rejected),
        "failed": str(found.failed),
        "incomplete": str(found.incomplete),
    }


def _percentiles(spread: Spread) -> str:
    return ", ".join("" if value is None else f"{value * 1e3:.0f} ms" for value in (spread.p50_s, spread.p95_s))


def refusals(measured: Measurement) -> list[dict[str, str]]:
    """How late refusals came: after the request where the queue was full, after the deadline where it waited."""
    refused = [each for each in measured.outcomes if each.state == "rejected" and each.begun_s is not None]
    took = [(each.ended_s - (each.begun_s or 0.0), WAITED in each.reason) for each in refused]
    return [
        _late("full line: from asking to the refusal", [seconds for seconds, waited in took if not waited]),
        _late("waited: after its deadline", [seconds - WAIT_S for seconds, waited in took if waited]),
    ]


def _late(what: str, seconds: Sequence[float]) -> dict[str, str]:
    def ms(value: float | None) -> str:
        return "" if value is None else f"{value * 1e3:.0f} ms"

    return {
        "refusal": what,
        "n": str(len(seconds)),
        "p50": ms(percentile(seconds, 0.5)),
        "p95": ms(percentile(seconds, 0.95)),
        "largest": ms(max(seconds, default=None)),
    }
