"""`python -m server --config config.yaml`: serve the trunk of the configured model."""

import argparse
import json
import logging
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

import grpc
from grpc_health.v1 import health, health_pb2

from server import endpoint
from server.auth import tokens
from server.auth.tls import Security
from server.build import build
from server.monitoring import gauges, logs
from server.scheduling.admission import Admission
from server.service import TrunkService
from server.variants import Variants
from splitlearn import address, config
from splitlearn.config import Config, ServerConfig
from splitlearn.errors import SetupError, SplitlearnError
from splitlearn.runtime import ports, proxies
from splitlearn.runtime.arguments import OneLineParser
from splitlearn.runtime.progress import on_console
from splitlearn.runtime.terminal import guarded, say
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


def main(arguments: list[str] | None = None) -> int:
    """Serve until a signal. Returns the exit status: 2 when it cannot start as asked, 141 where stdout is closed."""
    return guarded(lambda: _run(arguments))


def _run(arguments: list[str] | None) -> int:
    try:
        options = _options(arguments)
    except SplitlearnError as error:
        say(f"error: {error}", stderr=True)
        return 2
    # Its parent shows what an embedded server does; the terminal gets only what went wrong.
    logs.start(logging.WARNING if options.embedded else logging.INFO)
    stops: SimpleQueue[str] = SimpleQueue()  # safe in a signal handler
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stops.put(STOP))
    try:
        if options.command == "token":
            return _make_token(options.name)
        given = sys.stdin.readline() if options.embedded else ""
        if options.embedded and not given:
            return 0  # the parent does not need it
        settings = _settings(options, given)
        proxies.settle()
        security = Security.of(settings.server)
        with on_console() as progress:
            runtime = build(settings, progress)
        variants = Variants(settings, runtime)
        service = TrunkService(runtime, variants, settings.server, security.access)
        metrics = gauges.listen(runtime.metrics, settings.server)
        running = listen(service, settings.server, security)
    except BrokenPipeError:
        raise  # of stdout: `guarded` ends quietly
    except (SplitlearnError, OSError) as error:  # of the system: no space, no permission
        say(f"error: {error}", stderr=True)
        return 2
    if options.embedded:
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


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser("python -m server", description="Serve the trunk of the configured model.")
    parser.add_argument("--config", type=Path, help="a config.yaml (default: every setting at its default)")
    parser.add_argument("--host", help="overrides server.host")
    parser.add_argument("--port", type=int, help="overrides server.port; 0 takes a free one")
    parser.add_argument("--metrics-host", metavar="HOST", help="overrides server.metrics_host")
    parser.add_argument("--metrics-port", type=int, metavar="PORT", help="overrides server.metrics_port")
    parser.add_argument(
        "--allow-open",
        action="store_true",
        default=None,
        help="listen beyond loopback without access control: whoever reaches the port uses the trunk",
    )
    parser.add_argument(
        "--embedded",
        action="store_true",
        help="for the program that starts this one: settings come as one line of JSON on stdin, and the server ends "
        "when stdin closes",
    )
    words = "make a token: the secret for a client, shown once (stderr), and the entry for server.tokens (stdout)"
    token = parser.add_subparsers(dest="command", metavar="token").add_parser("token", help=words, description=words)
    token.add_argument("name", metavar="NAME", help="whom it is for")
    return parser.parse_args(arguments)


def _settings(options: argparse.Namespace, given: str) -> Config:
    """The settings of a file, or those `given` by a parent, changed by the command line."""
    settings = config.parse(json.loads(given)) if options.embedded else config.load(options.config)
    names = ("host", "port", "allow_open", "metrics_host", "metrics_port")
    changes = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.embedded:  # a server with the same settings may run beside it, and has the port
        changes["metrics_port"] = None
    return config.parse({**settings.model_dump(), "server": {**settings.server.model_dump(), **changes}})


def _make_token(name: str) -> int:
    secret, entry = tokens.make(name)
    say(
        f"The token of {name}, shown this once; its client finds it in the variable that trunk.token names:\n{secret}",
        stderr=True,
    )
    say(entry, end="")
    return 0


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


if __name__ == "__main__":
    sys.exit(main())
