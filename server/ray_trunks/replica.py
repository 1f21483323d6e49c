"""A replica: an actor of Ray's with a trunk server as its child process. No hidden state passes through the actor.

The server is `python -m server`'s own, in a fresh interpreter, so that it computes as one without Ray does. When it
dies, the actor's process ends, and Ray starts the actor again. When the actor's process is killed, the server ends.
"""

import os
import signal
import threading
from contextlib import suppress
from dataclasses import dataclass, replace

from server.ray_trunks import load, ray_api
from server.ray_trunks.load import Layers, Load
from splitlearn.address import Address, joined
from splitlearn.arms.embedded_server import WORK, Listening
from splitlearn.config import Config
from splitlearn.errors import SetupError, SplitlearnError
from splitlearn.runtime import ports
from splitlearn.runtime.piped import Piped
from splitlearn.runtime.process import raised

ANY = ("0.0.0.0", "::")
STOP_S = 5.0


@dataclass(frozen=True)
class Report:
    """How a replica is: where its server listens, the process, its layers and its load. `ended`: it has drained, and is
    gone. `failed` says why it did not start."""

    address: str = ""
    pid: int = 0
    layers: Layers = (0, 0)
    load: Load = Load()
    ended: bool = False
    failed: str = ""


class Replica:
    """The actor. It starts once the server serves, or cannot."""

    def __init__(self, settings: Config) -> None:
        # Ray sets OMP_NUM_THREADS in each actor; runs.threads decides here.
        self._server = Piped("The trunk server", WORK, _on_a_port(settings), variables={"OMP_NUM_THREADS": None})
        self._draining, self._last = False, Report(pid=self._server.pid)
        try:
            self._listening: Listening = raised(self._server.receive())
        except SplitlearnError as error:
            self._draining, self._last = True, Report(failed=str(error))
            self._server.stop(0)
            return
        found = Address.parse(self._listening.address)
        address = joined(ray_api.node_address(), found.port) if found.host in ANY else str(found)
        self._last = replace(self._last, address=address)
        threading.Thread(target=self._watch, daemon=True).start()

    def report(self) -> Report:
        """How it is now."""
        if self._draining and not self._server.alive():
            return replace(self._last, ended=True)
        with suppress(OSError, ValueError):  # it ends at this moment, or is too busy to say: as it was before
            found, layers = load.read(self._listening.metrics or "")
            self._last = replace(self._last, load=found, layers=layers)
        return self._last

    def drain(self) -> None:
        """Let the server refuse new sessions, and end when the open ones have; at most after server.drain_s."""
        self._draining = True
        self._server.signal(signal.SIGTERM)

    def _watch(self) -> None:
        self._server.wait()
        if not self._draining:
            os._exit(1)


def _on_a_port(settings: Config) -> Config:
    """The settings with the first port of ray.ports that is free here. If none is, with the last one: the server says
    what is wrong with it."""
    server, given = settings.server, settings.ray.ports
    if given is None:
        return settings
    port = next((each for each in range(given[0], given[1] + 1) if _free(server.host, each)), given[1])
    return settings.model_copy(update={"server": server.model_copy(update={"port": port})})


def _free(host: str, port: int) -> bool:
    try:
        ports.check("ray.", host, port)
    except SetupError:
        return False
    return True
