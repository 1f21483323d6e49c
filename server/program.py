"""The trunk server as a program: it loads, listens, waits for its end, and lets open sessions finish."""

import logging
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
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
from splitlearn.errors import SetupError
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


def serve(settings: Config, security: Security, embedded: bool) -> int:
    """Serve until a signal, or if `embedded` until stdin closes. Returns the exit status 0. Raises SplitlearnError and
    OSError where it cannot start."""
    # Its parent shows what an embedded server does; the terminal gets only what went wrong.
    logs.start(logging.WARNING if embedded else logging.INFO)
    stops: SimpleQueue[str] = SimpleQueue()  # safe in a signal handler
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stops.put(STOP))
    with on_console() as progress:
        runtime = build(settings, progress)
    variants = Variants(settings, runtime)
    service = TrunkService(runtime, variants, settings.server, security.access)
    metrics = gauges.listen(runtime.metrics, settings.server)
    running = listen(service, settings.server, security)
    if embedded:
        threading.Thread(target=_wait_for_parent, args=(stops,), daemon=True).start()
    logs.tell(log, "serving", metrics=metrics, **gauges.what(runtime))
    if _wait_for_end(stops) == STOP:
        _drain(running, runtime.admission, variants, settings.server.drain_s, stops)
    logs.tell(log, "stopping", sessions=runtime.admission.sessions)
    running.server.stop(grace=0).wait()
    variants.stop()
    return 0


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
    """A started server with health and reflection; prints its address. Raises SetupError when it cannot listen."""
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
    say(f"{READY}{where}")
    return Running(server, where, state)


def _wait_for_parent(stops: SimpleQueue[str]) -> None:
    """Reads stdin, whose other end the parent holds, to its end: which comes when the parent ends, however it ends."""
    sys.stdin.read()
    stops.put(ORPHANED)
