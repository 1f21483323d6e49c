"""What this process may use of the machine: cores and memory, by affinity and by the limits of its control groups.

A container's limits are in cgroup files: v1, v2, or both mounted side by side. The tightest limit of a group and of all
groups above it holds. A missing file, or a value that makes no sense, limits nothing. `root` stands for `/`: cgroup
files and /proc are read below it.
"""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path("/")
_ESCAPED = re.compile(r"\\([0-7]{3})")  # a space in a mount's path is \040
_MOST_CHARS = 1 << 22


@dataclass(frozen=True)
class _Version:
    """The names of one version's files, and of lines in memory.stat.

    The kernel gives away the `idle` file cache at once. `above` is the tightest limit of the group and of all above it,
    also of those that a container cannot see (a pod's, around its containers').
    """

    limits: tuple[str, ...]
    used: str
    idle: str
    above: str | None = None


_V1 = _Version(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file", "hierarchical_memory_limit")
_V2 = _Version(("memory.max", "memory.high"), "memory.current", "inactive_file")


@dataclass(frozen=True)
class Machine:
    """Cores and memory (bytes) of the machine, and the limits of this process; None for no limit."""

    cores: int
    memory: int
    quota: float | None = None
    """Of CPU time, in cores."""
    affinity: float | None = None
    """Cores that the process may run on."""
    memory_limit: float | None = None

    def __str__(self) -> str:
        """A short text: "0.5 of 2 cores (cgroup limit), 1.5 of 24 GB"."""
        cores = "1 core" if self.cores == 1 else f"{self.cores} cores"
        limits = [(self.quota, "cgroup limit"), (self.affinity, "affinity")]
        fewest, why = min(((limit, why) for limit, why in limits if limit), default=(None, ""))
        cores = f"{fewest:.3g} of {cores} ({why})" if fewest else cores
        limit = f"{self.memory_limit / 1e9:.3g} of " if self.memory_limit else ""
        return f"{cores}, {limit}{self.memory / 1e9:.3g} GB"


def machine(root: Path = ROOT) -> Machine:
    """This machine, and the limits of this process."""
    cores, memory = psutil.cpu_count() or 1, int(psutil.virtual_memory().total)
    quota, affinity, limit = cpu_quota(root), _affinity(), memory_limit(root)
    return Machine(
        cores,
        memory,
        quota if quota and quota < cores else None,
        affinity if affinity < cores else None,
        limit if limit and limit < memory else None,
    )


def cpus(root: Path = ROOT) -> float:
    """Cores that this process may use, by affinity and by its quota of CPU time. Half a core is 0.5."""
    return min(float(_affinity()), cpu_quota(root) or float("inf"))


def cpu_quota(root: Path = ROOT) -> float | None:
    """The quota of CPU time in cores, or None without one."""
    return min(_quotas(root), default=None)


def memory_limit(root: Path = ROOT) -> int | None:
    """The memory limit, in bytes, of this process together with those in its control groups, or None."""
    return min((limit for folder, names in _groups(root, "memory") for limit in _limits(folder, names)), default=None)


def available_memory(root: Path = ROOT) -> int:
    """Bytes that this process can allocate now: what the machine has free, or less if a control group says so."""
    left = [int(psutil.virtual_memory().available)]
    for folder, names in _groups(root, "memory"):
        used = _number(folder / names.used)
        if used is not None:
            held = max(0, used - _idle(folder, names))
            left += [max(0, limit - held) for limit in _limits(folder, names)]
    return min(left)


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quotas(root: Path) -> Iterator[float]:
    for folder, names in _groups(root, "cpu"):
        if names is _V2:
            quota, _, period = _text(folder / "cpu.max").partition(" ")
        else:
            quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        time, of = _positive(quota), _positive(period)
        if time is not None and of is not None:
            yield time / of


def _limits(folder: Path, names: _Version) -> Iterator[int]:
    for name in names.limits:
        limit = _number(folder / name)
        if limit is not None:
            yield limit
    above = _statistic(folder, names.above) if names.above else None
    if above is not None:
        yield above


def _idle(folder: Path, names: _Version) -> int:
    """Bytes of file cache that the kernel gives away first."""
    return _statistic(folder, names.idle) or 0


def _statistic(folder: Path, wanted: str) -> int | None:
    for line in _text(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == wanted:
            return _positive(value)
    return None


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, _Version]]:
    """The folders of this process's groups, and of all visible groups above them."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, colon, group = rest.partition(":")
        if colon and (not controllers or controller in controllers.split(",")):
            for mount, top in _mounts(root, controller if controllers else ""):
                yield from ((folder, _V1 if controllers else _V2) for folder in _upwards(mount, top, group))


def _mounts(root: Path, controller: str) -> Iterator[tuple[Path, str]]:
    """The mount points of the controller's hierarchy (of v2 for ""), each with the group at its top."""
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, dash, after = line.partition(" - ")
        fields, described = before.split(" "), after.split(" ")
        if not dash or len(fields) < 5 or len(described) < 3:
            continue
        kind, options = described[0], described[2].split(",")
        if kind == ("cgroup" if controller else "cgroup2") and (not controller or controller in options):
            yield root / _unescaped(fields[4]).lstrip("/"), _unescaped(fields[3])


def _upwards(mount: Path, top: str, group: str) -> Iterator[Path]:
    """The group's folder and those above it, up to the mount; the mount alone where the group is not below it."""
    inside = group.startswith(f"{top.rstrip('/')}/") and ".." not in Path(group).parts
    below = group.removeprefix(top.rstrip("/")).strip("/") if inside else ""
    parts = Path(below).parts
    for count in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:count])


def _unescaped(text: str) -> str:
    return _ESCAPED.sub(lambda found: chr(int(found[1], 8)), text)


def _number(path: Path) -> int | None:
    return _positive(_text(path))


def _positive(text: str) -> int | None:
    """A whole number above 0; None for anything else: `max`, -1, nothing, nonsense."""
    text = text.strip()
    return int(text) or None if text.isascii() and text.isdecimal() and len(text) < 25 else None


def _text(path: Path) -> str:
    """The file's text; empty where it cannot be read."""
    with suppress(OSError, ValueError), path.open(encoding="ascii") as file:
        return file.read(_MOST_CHARS)
    return ""
