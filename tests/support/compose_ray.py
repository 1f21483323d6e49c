"""Drives the compose stack with its profile ray for test_compose.py, as compose_drive.py does without.

`python -m tests.support.compose_ray OUT` writes its observations to OUT, as one JSON object.
"""

import json
import shlex
import sys
import time
from contextlib import suppress
from pathlib import Path
from subprocess import CalledProcessError

from tests.support.compose_drive import compose

DIRECTORY = "ray://ray-head:50051"
COMPARE = f"python -m splitlearn compare --trunk {DIRECTORY} --max-new-tokens 16 --ignore-eos --json"
LISTED = f"""
from splitlearn.client.directory import resolved
from splitlearn.wire.channel import NONE
print(*resolved(["{DIRECTORY}"], NONE))
"""
KILL_NODE = """
import psutil
for each in psutil.process_iter():
    if each.name() == "raylet":
        each.kill()
"""
DRIVE = 'import ray; ray.init(address="ray-head:6379", log_to_driver=False)'
REPLICA_S = 300.0


def inside(service: str, *words: str, number: int = 1) -> str:
    """The stdout of a command in that container of a service."""
    return compose("exec", "-T", "--index", str(number), service, *words).strip()


def replica(not_at: str = "") -> str:
    """The address of the replica, once the directory lists one that is not at that address."""
    end = time.monotonic() + REPLICA_S
    while time.monotonic() < end:
        with suppress(CalledProcessError):  # the directory is not there yet
            for address in inside("app", "python", "-c", LISTED).split():
                if address != not_at:
                    return address
        time.sleep(1)
    return ""


def worker_at(address: str) -> int:
    """The number of the worker's container that has the host of `address`."""
    host = address.rpartition(":")[0]
    return next(each for each in (1, 2) if host in inside("ray-worker", "hostname", "-I", number=each).split())


def drives(**environment: str) -> bool:
    """Whether a program on a worker may use Ray, with that change of its environment."""
    changed = [f"{name}={value}" for name, value in environment.items()]
    try:
        inside("ray-worker", "env", *changed, "timeout", "120", "python", "-c", DRIVE)
    except CalledProcessError:
        return False
    return True


def main(out: Path) -> None:
    """Observe the stack and write the result to `out`."""
    seen: dict[str, object] = {"first": (first := replica())}
    seen["user"] = inside("ray-worker", "id", "-u")
    seen["comparison"] = json.loads(inside("app", *shlex.split(COMPARE)))
    seen["drivers"] = [drives(), drives(RAY_AUTH_TOKEN="0" * 64)]
    inside("ray-worker", "python", "-c", KILL_NODE, number=worker_at(first))
    seen["second"] = replica(not_at=first)
    seen["again"] = json.loads(inside("app", *shlex.split(COMPARE)))
    began = time.monotonic()
    compose("stop", "ray-head")
    seen["stop_s"] = time.monotonic() - began
    seen["logs"] = compose("logs", "--no-log-prefix", "ray-head")
    out.write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
