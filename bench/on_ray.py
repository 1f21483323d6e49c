"""Trunk servers on a Ray of this program's own, for measurements."""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from bench.chained import parts
from splitlearn.arms.ray_trunk import embedded
from splitlearn.arms.runs import Runs
from splitlearn.client.directory import resolved
from splitlearn.config import serving, with_trunk
from splitlearn.lab.environment import trunk_pid
from splitlearn.runtime.progress import silent
from splitlearn.wire.channel import NONE

LOOK_S = 0.1


@contextmanager
def on_ray(runs: Runs, links: int, each: int, flags: str) -> Iterator[tuple[Runs, str]]:
    """Runs through a chain of so many links with `each` replicas, and the directory's address. `flags` are those of
    the servers."""
    config, layers = serving(runs.config, runs.flags(flags).trunk), tuple(parts(runs.plan, links))
    changed = {"layers": layers, "min_replicas": each, "max_replicas": each, "num_cpus": 0.1}
    trunk = embedded(config.model_copy(update={"ray": config.ray.model_copy(update=changed)}), threading.Event())
    try:
        with Runs(with_trunk(runs.config, trunk.address), silent) as own:
            yield own, trunk.address
    finally:
        trunk.stop()


def kill_replica(address: str, order: random.Random) -> None:
    """Kill one of the replicas that the directory at `address` lists: its actor, or its trunk server."""
    while True:
        with suppress(psutil.NoSuchProcess):  # the directory lists one that has just been killed
            pids = [pid for each in resolved([address], NONE) if (pid := trunk_pid(each)) is not None]
            if pids:
                server = psutil.Process(order.choice(pids))
                order.choice([server, server.parent() or server]).kill()
                return
        time.sleep(LOOK_S)
