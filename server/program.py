"""The trunk server as a program: it loads, listens, waits for its end, and lets open sessions finish."""

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
from server.monitoring import gauges, logs
from server.scheduling.admission import Admission
from server.service import TrunkService
from server.variants import Variants
from splitlearn import address
from splitlearn.config import Config, ServerConfig
from splitlearn.errors import SetupError, as_error
from splitlearn.runtime import ports
from splitlearn.runtime.progress import on_console
from splitlearn.runtime.terminal import say
from splitlearn.wire import READY, SERVICE

DRAIN_LOOK_S, LOOK_S = 0.05, 0.5
STOP, ORPHANED = "stop", "orphaned"
log = logging.getLogger("server")


@dataclass(frozen=True)
class Running:
    """A server that listens on `address`, and what it answers to health checks."""

    server: grpc.Server
    address: str
    health: health.HealthServicer


def work(connection: Connection, settings: Config) -> None:
    """The life of a server as a child process: it sends its address, or the error that it cannot start with, and serves
    until SIGTERM or until the other end of `connection` is gone."""
    multiprocessing.current_process().daemon = False  # a daemon may not start variants
    try:
        # Its parent shows what it does; the terminal gets only what went wrong.
        logs.start(logging.WARNING)
        _serve(settings, Security.of(settings.server), _stops(signal.SIGTERM), connection)
    except Exception as error:
        connection.send(as_error(error, "starting the trunk server"))


def serve(settings: Config, security: Security) -> int:
    """Serve until a signal. Returns the exit status 0. Raises SplitlearnError and OSError where it cannot start."""
    logs.start(logging.INFO)
    _serve(settings, security, _stops(signal.SIGTERM, signal.SIGINT))
    return 0


def _stops(*signals: signal.Signals) -> SimpleQueue[str]:
    """Gets a STOP with each of these signals."""
    stops: SimpleQueue[str] = SimpleQueue()  # safe in a signal handler
    for number in signals:
        signal.signal(number, lambda *_: stops.put(STOP))
    return stops


def _serve(settings: Config, security: Security, stops: SimpleQueue[str], parent: Connection | None = None) -> None:
    """Load, listen, say where (to `parent`, or on stdout), and serve until something is in `stops` or `parent` ends."""
    with on_console() as progress:
        runtime = build(settings, progress)
    variants = Variants(settings, runtime)
    service = TrunkService(runtime, variants, settings.server, security.access)
    metrics = gauges.listen(runtime.metrics, settings.server)
    running = listen(service, settings.server, security)
    if parent is None:
        say(f"{READY}{running.address}")
    else:
        parent.send(running.address)
        threading.Thread(target=_wait_for_parent, args=(parent, stops), daemon=True).start()
    logs.tell(log, "serving", metrics=metrics, **gauges.what(runtime))
    if _wait_for_end(stops) == STOP:
        _drain(running, runtime.admission, variants, settings.server.drain_s, stops)
    logs.tell(log, "stopping", sessions=runtime.admission.sessions)
    running.server.stop(grace=0).wait()
    variants.stop()


def _wait_for_end(stops: SimpleQueue[str]) -> str:
    """Wait for STOP or ORPHANED. A signal that another thread got does not end the wait for a lock: its handler runs
    when the main thread wakes up."""
    while True:
        with suppress(Empty):
            return stops.get(timeout=LOOK_S)


def _drain(running: Running, admission: Admission, variants: Variants, grace_s: float, stops: SimpleQueue[str]) -> None:
    """Admit no session, say so to health checks, and let open ones finish: for `grace_s`, or until a second signal."""
    logs.tell(log, "draining", sessions=admission.sessions, at_most_s=grace_s)
    running.health.enter_graceful_shutdown()
    admission.drain()
    variants.drain()
    deadline = time.monotonic() + grace_s
    while admission.sessions and time.monotonic() < deadline:
        with suppress(Empty):
            stops.get(timeout=DRAIN_LOOK_S)
            return


def listen(service: TrunkService, settings: ServerConfig, security: Security) -> Running:
    """A started server with health and reflection. Raises SetupError when it cannot listen."""
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
    logs.tell(log, "listening", address=where, **guarded)
    return Running(server, where, state)


def _wait_for_parent(parent: Connection, stops: SimpleQueue[str]) -> None:
    """Wait until the parent closes its end of the connection: it sends nothing."""
    with suppress(EOFError, OSError):
        parent.recv()
    stops.put(ORPHANED)
