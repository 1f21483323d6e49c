"""The environment of an experiment, and how busy other programs kept the machine.

`fingerprint` describes the environment; `differences` names what differs between two of them. `reading` is the machine
at one moment: its clock, its throttling, and the CPU time of other programs since the last reading.
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
# These vary by themselves: identity, never compared.
VARIES = frozenset({"rtt_s", "cpu_mhz"})


@dataclass(frozen=True)
class Reading:
    """The machine at one moment, and since the reading before.

    `at_s` is the wall time (seconds since the epoch), `cpu_mhz` the mean clock of the cores now. `throttled` counts how
    often they were throttled for heat since the machine started. Either is None if the machine does not report it.

    `others_cpu` is what programs that are not ours used since the reading before, in cores (0.3: a third of one).
    `stolen_cpu` is what the host of a virtual machine withheld, in cores. Both are 0 in a first reading. The `_s`
    fields are running counts in seconds, for the next reading.
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

    None for what the machine does not report. Starts the embedded trunk. Raises TrunkError if there is no trunk.
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
    """A line for each difference between two fingerprints, such as "trunk.threads: 2 and 4"."""
    first, second = dict(_flat(one)), dict(_flat(other))
    names = [name for name in {**first, **second} if name not in VARIES and first.get(name) != second.get(name)]
    return [f"{name}: {_text(first.get(name))} and {_text(second.get(name))}" for name in names]


def round_trip_s(address: str, identity: Credentials = NONE) -> float:
    """The round trip to the trunk at `address` in seconds: the median of 20 gRPC health checks over one open channel.

    Raises TrunkError.
    """
    request, spent = health_pb2.HealthCheckRequest(), []
    with open_channel(address, identity) as channel:
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
    """The process that listens at `address`; None if it is on another machine or hidden from this user."""
    found = Address.parse(address)
    here = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    if found.host not in here and not is_loopback(found.host):
        return None
    with suppress(psutil.AccessDenied):
        listening = (each for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN)
        return next((each.pid for each in listening if each.laddr and each.laddr.port == found.port), None)
    return None


def reading(before: Reading | None, also: int | None = None) -> Reading:
    """The machine now. Ours are this process, process `also`, and the children of both.

    `also` is a trunk server on this machine that was started by hand: its work is no disturbance.
    """
    clock_s, cpu = time.monotonic(), psutil.cpu_times()
    # Without interrupts: they serve every program, and those of the loopback network are ours.
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
    """CPU time of a process and all its descendants, in seconds. Ended ones are in their parents' counts."""
    while True:
        # If a child ends meanwhile, it is missing, and all are read again.
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


def _text(value: object) -> str:
    return "unknown" if value is None else str(value)
