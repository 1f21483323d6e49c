"""How busy the machine is, and with whose work: its clock, its throttling, and the CPU time of other programs.

before = reading(None)
...
reading(before).others_cpu     # cores that programs which are not ours used meanwhile
"""

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass

import psutil

from splitlearn.runtime import hardware


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


def reading(before: Reading | None, also: Iterable[int] = ()) -> Reading:
    """The machine now. Ours are this process, the processes `also`, and the children of all.

    `also` are trunk servers on this machine that were started by hand: their work is no disturbance.
    """
    clock_s, cpu = time.monotonic(), psutil.cpu_times()
    # Without interrupts: they serve every program, and those of the loopback network are ours.
    busy_s, stolen_s = cpu.user + cpu.system + getattr(cpu, "nice", 0.0), getattr(cpu, "steal", 0.0)
    ours_s = sum(map(_tree_s, (os.getpid(), *also)))
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
