"""Machines of one's own on one Linux machine: programs that each have a network of their own, joined by a switch.

Network namespaces, which only root may make. `inside` runs a command where they can be made without touching this
machine's network.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO

from splitlearn.errors import SetupError

OUTSIDE = "10.77.0.1"
"""This process's address on the switch."""
SWITCH = "switch"


def inside(command: Sequence[str], **environment: str) -> int:
    """Run `command` in a new network namespace, in which `machines` works. Returns its exit status. Raises SetupError
    if this machine or this user cannot."""
    missing = [name for name in ("ip", "unshare") if shutil.which(name) is None]
    if missing or os.geteuid():
        raise SetupError(f"network namespaces need root, and the programs ip and unshare ({', '.join(missing)})")
    shell = ["unshare", "--net", "--mount", "--propagation", "private"]
    return subprocess.run([*shell, *command], stdin=subprocess.DEVNULL, env={**os.environ, **environment}).returncode


class Machine:
    """A network namespace with an `address`."""

    def __init__(self, name: str, number: int) -> None:
        self.name, self.address = name, f"10.77.0.{10 + number}"
        self._port = f"port{number}"
        _ip(f"netns add {name}")
        _ip(f"link add {self._port} type veth peer name eth0 netns {name}")
        _ip(f"link set {self._port} master {SWITCH} up")
        for command in ("link set lo up", f"addr add {self.address}/24 dev eth0", "link set eth0 up"):
            _ip(f"-n {name} {command}")

    def start(self, command: Sequence[str], errors: IO[str], **environment: str) -> subprocess.Popen[str]:
        """Start a program on it, whose output can be read."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **environment},
        )

    def isolate(self, *, on: bool) -> None:
        """Let nothing through between this machine and others that are isolated; and nobody hears of it."""
        _ip(f"link set {self._port} type bridge_slave isolated {'on' if on else 'off'}")

    def vanish(self, *, on: bool) -> None:
        """Let nothing at all through; and nobody hears of it."""
        _ip(f"-n {self.name} link set eth0 {'down' if on else 'up'}")

    def remove(self) -> None:
        """Remove the namespace and its link. Its programs have to be ended."""
        _ip(f"netns del {self.name}")


@contextmanager
def machines(*names: str) -> Iterator[list[Machine]]:
    """New machines on a switch, on which this process is, too."""
    made: list[Machine] = []
    _ip("link set lo up")
    _ip(f"link add {SWITCH} type bridge")
    _ip(f"addr add {OUTSIDE}/24 dev {SWITCH}")
    _ip(f"link set {SWITCH} up")
    try:
        for number, name in enumerate(names):
            made.append(Machine(f"splitlearn-{name}", number))
        yield made
    finally:
        for machine in made:
            with suppress(SetupError):
                machine.remove()


def _ip(arguments: str) -> None:
    done = subprocess.run(["ip", *arguments.split()], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise SetupError(f"ip {arguments}: {done.stderr.strip()}")
