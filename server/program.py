"""The trunk server as a program: loads, listens, serves until it is stopped, and lets open sessions finish."""

import logging
import multiprocessing
import signal
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue

import grpc
from grpc_health.v1 import health, health_pb2

from server import endpoint
from server.auth.tls import Security
from server.build import build
from server.monitoring import exposition, gauges, logs
from server.service import TrunkService
from server.variants import Variants
from splitlearn import address
from splitlearn.arms.embedded_server import Listening
from splitlearn.config import Config, ServerConfig
from splitlearn.errors import SetupError, as_error
from splitlearn.runtime import ports
from splitlearn.runtime.progress import on_console
from splitlearn.runtime.terminal import say
from splitlearn.scheduling.admission import Admission
from splitlearn.wire import READY, SERVICE

DRAIN_LOOK_S, LOOK_S = 0.05, 0.5
STOP, ORPHANED = "stop", "orphaned"
log = logging.getLogger("server")


@dataclass(frozen=True)
class RunningServer:
    """A server that listens on `address`, and its health service."""

    server: grpc.Server
    address: str
    health: health.HealthServicer


def work(connection: Connection, settings: Config) -> None:
    """The main function of a server in a child process. It sends a `Listening`, or the error that keeps it from
    starting. Then it serves until SIGTERM, or until the parent closes its end of `connection`."""
    multiprocessing.current_process().daemon = False  # a daemon may not start variants
    try:
        # The parent reports the rest: the terminal gets warnings and errors only.
        logs.start(logging.WARNING)
        _serve(settings, Security.of(settings.server), _stops(signal.SIGTERM), connection)
    except Exception as error:
        connection.send(as_error(error, "starting the trunk server"))


def serve(settings: Config, security: Security) -> int:
    """Serve until a signal. Returns the exit status 0. Raises SplitlearnError or OSError if it cannot start."""
    logs.start(logging.INFO)
    _serve(settings, security, _stops(signal.SIGTERM, signal.SIGINT))
    return 0


def _stops(*signals: signal.Signals) -> SimpleQueue[str]:
    """A queue that gets a STOP for each of these signals."""
    stops: SimpleQueue[str] = SimpleQueue()  # safe in a signal handler
    for number in signals:
        signal.signal(number, lambda *_: stops.put(STOP))
    return stops


def _serve(settings: Config, security: Security, stops: SimpleQueue[str], parent: Connection | None = None) -> None:
    """Load, listen, tell `parent` or print where, and serve until `stops` has an entry or `parent` ends."""
    with on_console() as progress:
        runtime = build(settings, progress)
    variants = Variants(settings, runtime)
    service = TrunkService(runtime, variants, settings.server, security)
    metrics = exposition.listen(runtime.metrics, settings.server)
    running = listen(service, settings.server, security)
    if parent is None:
        say(f"{READY}{running.address}")
    else:
        parent.send(Listening(running.address, metrics))
        threading.Thread(target=_wait_for_parent, args=(parent, stops), daemon=True).start()
    logs.info(log, "serving", metrics=metrics, **gauges.build_info(runtime))
    if _wait_for_end(stops) == STOP:
        _drain(running, runtime.admission, variants, settings.server.drain_s, stops)
    logs.info(log, "stopping", sessions=runtime.admission.sessions)
    running.server.stop(grace=0).wait()
    security.next_servers.stop()
    variants.stop()


def _wait_for_end(stops: SimpleQueue[str]) -> str:
    """Wait for STOP or ORPHANED. The timeout is needed: a signal to another thread does not end the wait for a lock.
    The handler runs only once the main thread wakes up."""
    while True:
        with suppress(Empty):
            return stops.get(timeout=LOOK_S)


def _drain(
    running: RunningServer, admission: Admission, variants: Variants, grace_s: float, stops: SimpleQueue[str]
) -> None:
    """Refuse new sessions, fail health checks, and let open sessions finish: for `grace_s`, or a second signal."""
    logs.info(log, "draining", sessions=admission.sessions, at_most_s=grace_s)
    running.health.enter_graceful_shutdown()
    admission.drain()
    variants.drain()
    deadline = time.monotonic() + grace_s
    while admission.sessions and time.monotonic() < deadline:
        with suppress(Empty):
            stops.get(timeout=DRAIN_LOOK_S)
            return


def listen(service: TrunkService, settings: ServerConfig, security: Security) -> RunningServer:
    """Start a server with health and reflection. Raises SetupError if it cannot listen."""
    state = health.HealthServicer()
    server = endpoint.server(service, state, settings, security.access)
    host = address.loopback(settings.host) or settings.host
    ports.check("server.", host, settings.port)
    try:
        port = security.listen(server, address.joined(host, settings.port))
    except RuntimeError as error:
        raise SetupError(f"server.host: cannot listen on {address.joined(host, settings.port)}: {error}") from error
    server.start()
    for name in ("", SERVICE):
        state.set(name, health_pb2.HealthCheckResponse.SERVING)
    guarded = {"tls": security.credentials is not None, "tokens": settings.tokens is not None}
    where = address.joined(host, port)
    logs.info(log, "listening", address=where, **guarded)
    return RunningServer(server, where, state)


def _wait_for_parent(parent: Connection, stops: SimpleQueue[str]) -> None:
    """Wait until the parent, which sends nothing, closes its end of the connection."""
    with suppress(EOFError, OSError):
        parent.recv()
    stops.put(ORPHANED)
