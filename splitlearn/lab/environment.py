"""Where an experiment ran, and how quiet the machine was meanwhile.

`fingerprint` is what a reader needs to place the figures; `differences` names what is not the same in two of them.
`reading` is the machine at one moment: its clock, its throttling, and what other programs took of it since the last.
"""

import os
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from splitlearn.address import Address, is_loopback
from splitlearn.arms.compare import environment
from splitlearn.arms.runs import Runs
from splitlearn.config import EMBEDDED
from splitlearn.runtime import hardware
from splitlearn.runtime.process import default_threads
from splitlearn.wire.channel import NONE, Credentials, open_channel
from splitlearn.wire.status import error_of

ROUND_TRIPS, WARM_UP = 20, 5
TIMEOUT_S = 10.0
# What varies by itself from one moment to the next: shown, never compared.
VARIES = frozenset({"rtt_s", "cpu_mhz"})


@dataclass(frozen=True)
class Reading:
    """The machine at one moment, and since the reading before.

    `at_s` is the wall time (seconds since the epoch), `cpu_mhz` the mean clock of the cores now, `throttled` how often
    they have been throttled for heat since the machine started: None where the machine does not tell. `others_cpu` is
    what programs that are not ours used of it since the reading before, in cores (0.3: a third of one), `stolen_cpu`
    what the host of a virtual machine withheld, in cores; both are 0 in a first reading. The `_s` fields below them
    are the running counts, in seconds, from which the next reading's are taken.
    """

    at_s: float
    cpu_mhz: float | None
    throttled: int | None
    others_cpu: float
    stolen_cpu: float
    clock_s: float
    busy_s: float
    ours_s: float
    stolen_s: float


def fingerprint(runs: Runs) -> dict[str, Any]:
    """The machine, the software and the trunk, as JSON; memory in bytes, clock in MHz, round trip in seconds.

    None for what the machine does not tell. Starts the embedded trunk; raises TrunkError when the trunk is not there.
    """
    known, plan, config = environment(runs), runs.plan, runs.config
    return {
        **known,
        "scipy": version("scipy"),
        "cpu_mhz": hardware.clock_mhz("current"),
        "threads": config.runs.threads or default_threads(),
        "model": runs.files.name,
        "dtype": config.model.dtype,
        "split": {"start": plan.start, "end": plan.end, "n_layers": plan.n_layers},
        "trunk": {**known["trunk"], "address": EMBEDDED if config.trunk.embedded else "host"},
        "rtt_s": round_trip_s(runs.trunk_address(), runs.credentials),
    }


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """One line for each thing in which two fingerprints differ, such as "trunk.threads: 2 and 4"."""
    first, second = dict(_flat(one)), dict(_flat(other))
    names = [name for name in {**first, **second} if name not in VARIES and first.get(name) != second.get(name)]
    return [f"{name}: {_said(first.get(name))} and {_said(second.get(name))}" for name in names]


def round_trip_s(address: str, shown: Credentials = NONE) -> float:
    """The time for asking the trunk at `address` the least there is to ask, in seconds: the median of 20 gRPC health
    checks over one channel that is open. Raises TrunkError."""
    request, spent = health_pb2.HealthCheckRequest(), []
    with open_channel(address, shown) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        for _ in range(WARM_UP + ROUND_TRIPS):
            started = time.perf_counter()
            try:
                check(request, timeout=TIMEOUT_S)
            except grpc.RpcError as error:
                raise error_of(error, address) from error
            spent.append(time.perf_counter() - started)
    return statistics.median(spent[WARM_UP:])


def trunk_pid(address: str) -> int | None:
    """The process of this machine that listens at `address`; None for another machine's and for one that is hidden."""
    found = Address.parse(address)
    here = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    if found.host not in here and not is_loopback(found.host):
        return None
    with suppress(psutil.AccessDenied):
        listening = (each for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN)
        return next((each.pid for each in listening if each.laddr and each.laddr.port == found.port), None)
    return None


def reading(before: Reading | None, also: int | None = None) -> Reading:
    """The machine now. Ours are this process and all that it started, and process `also` with what that started (a
    trunk server on this machine that was started by hand: its work is no disturbance)."""
    clock_s, cpu = time.monotonic(), psutil.cpu_times()
    # Interrupts are left out: they are served for anybody, and those of the loopback network are our own.
    busy_s, stolen_s = cpu.user + cpu.system + getattr(cpu, "nice", 0.0), getattr(cpu, "steal", 0.0)
    ours_s = _tree_s(os.getpid()) + (_tree_s(also) if also is not None else 0.0)
    others_cpu = stolen_cpu = 0.0
    if before is not None and clock_s > before.clock_s:
        elapsed_s = clock_s - before.clock_s
        others_cpu = max(0.0, busy_s - before.busy_s - (ours_s - before.ours_s)) / elapsed_s
        stolen_cpu = max(0.0, stolen_s - before.stolen_s) / elapsed_s
    return Reading(
        time.time(),
        hardware.clock_mhz("current"),
        hardware.throttled(),
        others_cpu,
        stolen_cpu,
        clock_s,
        busy_s,
        ours_s,
        stolen_s,
    )


def _tree_s(pid: int) -> float:
    """CPU time of a process and all below it, in seconds; that of those that ended is in their parents' counts."""
    while True:
        # A parent comes before its children. One that ends between is not lost: it is missing, and all are read again.
        try:
            process = psutil.Process(pid)
            return sum(sum(each.cpu_times()[:4]) for each in (process, *process.children(recursive=True)))
        except psutil.NoSuchProcess:
            if not psutil.pid_exists(pid):
                return 0.0


def _flat(found: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _said(value: object) -> str:
    return "unknown" if value is None else str(value)
