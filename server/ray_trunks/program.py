"""`splitlearn serve-trunk --ray`: trunk servers on Ray until a signal, which drains them."""

import logging
import signal
import threading

from splitlearn.arms.ray_trunk import RayTrunk
from splitlearn.config import Config
from splitlearn.errors import SetupError
from splitlearn.runtime.terminal import say
from splitlearn.wire import READY

LOOK_S = 0.25


def serve(settings: Config, address: str) -> int:
    """Serve until SIGTERM or SIGINT; a second one ends it at once. Returns the exit status 0. Raises SetupError if it
    cannot start, or if Ray has ended."""
    stop, at_once = threading.Event(), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: (at_once if stop.is_set() else stop).set())
    trunk = RayTrunk(settings, address, stop, logging.INFO)
    try:
        say(f"{READY}{trunk.address}")
        while not stop.wait(LOOK_S):
            if not trunk.usable():
                raise SetupError("Ray has ended, and the trunk servers with it.")
        trunk.drain(at_once)
    finally:
        trunk.stop()
    return 0
