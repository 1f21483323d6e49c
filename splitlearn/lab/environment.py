"""The environment of an experiment: `fingerprint` describes it, `differences` says what differs between two."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from typing import Any

import psutil

from splitlearn.address import Address, is_loopback
from splitlearn.arms.compare import environment
from splitlearn.arms.runs import Runs
from splitlearn.client.real_link import round_trip_s
from splitlearn.config import EMBEDDED
from splitlearn.runtime import hardware
from splitlearn.runtime.process import default_threads

# These vary by themselves: identity, never compared.
VARIES = frozenset({"rtt_s", "cpu_mhz"})


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
        "link": str(runs.link),
        "rtt_s": sum(round_trip_s(hop.address(), hop.credentials) for hop in runs.hops()),
    }


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """A line for each difference between two fingerprints, such as "trunk.threads: 2 and 4"."""
    first, second = dict(_flat(one)), dict(_flat(other))
    names = [name for name in {**first, **second} if name not in VARIES and first.get(name) != second.get(name)]
    return [f"{name}: {_text(first.get(name))} and {_text(second.get(name))}" for name in names]


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


def _flat(found: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _text(value: object) -> str:
    return "unknown" if value is None else str(value)
