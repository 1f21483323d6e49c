"""The hardware and software of this process that decide its figures."""

import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from splitlearn.runtime import cgroups, environment

CPUINFO = Path("/proc/cpuinfo")
CPU_FOLDER = Path("/sys/devices/system/cpu")
CHECKOUT = Path(__file__).resolve().parents[2]


def describe() -> dict[str, Any]:
    """Hardware, system, libraries and this project's commit, as JSON; memory in bytes, clock in MHz, the quota
    of CPU time in cores.

    None for what the machine does not report, and for a limit that does not exist.
    """
    found = cgroups.machine()
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "vector_instructions": vector_instructions(),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": found.cores,
        "cpu_quota": found.quota,
        "cpu_affinity": found.affinity,
        "memory_bytes": found.memory,
        "memory_limit_bytes": found.memory_limit,
        "governor": ", ".join(sorted(set(_texts("cpu[0-9]*/cpufreq/scaling_governor")))) or None,
        "cpu_max_mhz": clock_mhz("max"),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "grpcio", "numpy")},
        "commit": commit(CHECKOUT),
        "omp_wait_policy": wait_policy(),
    }


def vector_instructions(cpuinfo: Path = CPUINFO) -> str | None:
    """The widest vector instructions of this processor: avx512 or avx2; None for another one, or where Linux's
    /proc/cpuinfo does not say."""
    flags = set(instruction_sets(cpuinfo).split())
    return "avx512" if "avx512f" in flags else "avx2" if "avx2" in flags else None


def instruction_sets(cpuinfo: Path = CPUINFO) -> str:
    """The processor's instruction sets, as Linux names them; empty where it does not say."""
    return _line_of(cpuinfo, "flags") or _line_of(cpuinfo, "Features")  # x86, Arm


def usable(found: Mapping[str, Any]) -> str:
    """The cores and memory that may be used, as a sentence, from the result of `describe`.

    Values may be text, as a trunk sends them. Empty where they are missing or no numbers.
    """

    def number(name: str) -> float | None:
        return float(found[name]) if found.get(name) is not None else None

    with suppress(KeyError, ValueError, OverflowError):
        cores, memory = int(float(found["logical_cores"])), int(float(found["memory_bytes"]))
        limits = number("cpu_quota"), number("cpu_affinity"), number("memory_limit_bytes")
        return str(cgroups.Machine(cores, memory, *limits))
    return ""


def clock_mhz(which: str) -> float | None:
    """The cores' mean clock, "current" or "max"; None where the machine does not report it (psutil returns 0 there)."""
    with suppress(OSError, NotImplementedError, AttributeError):
        return float(getattr(psutil.cpu_freq(), which)) or None
    return None


def throttled() -> int | None:
    """How often Linux throttled cores and packages since boot, in total. Only a rise means anything."""
    counts = [int(text) for text in _texts("cpu[0-9]*/thermal_throttle/*_throttle_count") if text.isdecimal()]
    return sum(counts) if counts else None


def wait_policy() -> str:
    """OpenMP's wait policy in the workers: the user's, or runtime/environment.py's default."""
    return os.environ.get("OMP_WAIT_POLICY", environment.DEFAULTS["OMP_WAIT_POLICY"])


def commit(checkout: Path) -> str | None:
    """The commit of the folder, with "-dirty" if tracked files have changed; None where there is no git."""
    # The folder's own repository, not one around it. Without locks, so that no other git has to wait.
    command = ["git", f"--git-dir={checkout / '.git'}", f"--work-tree={checkout}"]
    command += ["--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError):
        found = subprocess.run(command, cwd=checkout, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        return found.stdout.strip() or None
    return None


def _processor() -> str:
    """The processor's name; platform.processor() is empty on most Linux machines."""
    return _line_of(CPUINFO, "model name") or platform.processor()


def _line_of(cpuinfo: Path, name: str) -> str:
    """The value of the first line called `name`; empty where there is none."""
    try:
        with cpuinfo.open(encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith(name))
    except (OSError, StopIteration):
        return ""


def _texts(pattern: str) -> Iterator[str]:
    for path in CPU_FOLDER.glob(pattern):
        with suppress(OSError):
            yield path.read_text(encoding="ascii").strip()
