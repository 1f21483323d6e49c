"""`python -m server --config config.yaml`: serve the trunk of the configured model."""

import argparse
import json
import logging
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from server import bearer, logs, sight
from server.access import Gate
from server.admission import Admission
from server.build import build
from server.door import Door
from server.others import Others
from server.service import TrunkService
from splitlearn import config
from splitlearn.config import Config, ServerConfig
from splitlearn.errors import SetupError, SplitlearnError
from splitlearn.progress import on_console
from splitlearn.wire import READY, SERVICE

# A client whose machine went away closes nothing: without pings its session would stay for ever.
# The third is for a ping of another kind, behind which a keepalive ping waits. The fourth permits the clients' pings
# (splitlearn/wire/channel.py): gRPC's default takes more than one in five minutes for an attack, and shuts the
# connection.
KEEP_ALIVE = (
    ("grpc.keepalive_time_ms", 15_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)
SPARE_THREADS = 16
DRAIN_LOOK_S, TOLD_LOOK_S = 0.05, 0.5
STOP, ORPHANED = "stop", "orphaned"
log = logging.getLogger("server")


@dataclass(frozen=True)
class Running:
    """A server that listens on `address`, and what it answers to health checks."""

    server: grpc.Server
    address: str
    health: health.HealthServicer


def main(arguments: list[str] | None = None) -> int:
    """Serve until told to stop. Returns the exit status: 2 when the server cannot start as asked."""
    options = _options(arguments)
    # What an embedded server does, its parent shows; on its terminal there is room for what went wrong only.
    logs.start(logging.WARNING if options.embedded else logging.INFO)
    told: SimpleQueue[str] = SimpleQueue()  # which a signal's handler may use at any moment
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.put(STOP))
    try:
        if options.command == "token":
            return _make_token(options.name)
        given = sys.stdin.readline() if options.embedded else ""
        if options.embedded and not given:
            return 0  # the parent has no use for it
        settings = _settings(options, given)
        door = Door.of(settings.server)
        with on_console() as progress:
            served = build(settings, progress)
        others = Others(settings)
        service = TrunkService(served, others, settings.server, door.access)
        metrics = sight.listen(served.metrics, settings.server)
        running = listen(service, settings.server, door)
    except SplitlearnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.embedded:
        threading.Thread(target=_wait_for_parent, args=(told,), daemon=True).start()
    logs.tell(log, "serving", metrics=metrics, **sight.what(served))
    if _told(told) == STOP:
        _drain(running, served.admission, others, settings.server.drain_s, told)
    logs.tell(log, "stopping", sessions=served.admission.sessions + others.sessions)
    running.server.stop(grace=0).wait()
    others.stop()
    return 0


def _told(told: SimpleQueue[str]) -> str:
    """What the server is told. A signal that another thread took does not end the wait for a lock: its handler runs
    when the main thread looks up."""
    while True:
        with suppress(Empty):
            return told.get(timeout=TOLD_LOOK_S)


def _drain(running: Running, admission: Admission, others: Others, grace_s: float, told: SimpleQueue[str]) -> None:
    """Let nobody in, say so to health checks, and let those who are in finish: for `grace_s`, or until told again."""
    logs.tell(log, "draining", sessions=admission.sessions + others.sessions, at_most_s=grace_s)
    running.health.enter_graceful_shutdown()
    admission.drain()
    others.drain()
    deadline = time.monotonic() + grace_s
    while admission.sessions + others.sessions and time.monotonic() < deadline:
        with suppress(Empty):
            told.get(timeout=DRAIN_LOOK_S)
            return


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m server", description="Serve the trunk of the configured model.")
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
    """The settings of a file, or those `given` by a parent, with what the command line changes."""
    settings = config.parse(json.loads(given)) if options.embedded else config.load(options.config)
    names = ("host", "port", "allow_open", "metrics_host", "metrics_port")
    changes = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.embedded:  # with the same settings there may be a server beside it, which has the port
        changes["metrics_port"] = None
    return config.parse({**settings.model_dump(), "server": {**settings.server.model_dump(), **changes}})


def _make_token(name: str) -> int:
    secret, entry = bearer.make(name)
    print(
        f"The token of {name}, shown this once; its client finds it in the variable that trunk.token names:\n{secret}",
        file=sys.stderr,
    )
    print(entry, end="")
    return 0


def listen(service: TrunkService, settings: ServerConfig, door: Door) -> Running:
    """A started server with health and reflection; says on stdout where. Raises SetupError when it cannot listen."""
    # Each session holds a thread, and so does each that waits; the others answer Describe, health checks and refusals.
    # Without a limit gRPC would keep what finds no thread waiting in silence.
    threads = settings.max_sessions + settings.max_waiting + SPARE_THREADS
    # They compute on one thread each, and lead no team of threads beside the engine's (build()).
    workers = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    # Without so_reuseport=0 a second server on the same port starts and gets half of the clients.
    options = (("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", settings.max_message_bytes), *KEEP_ALIVE)
    server = grpc.server(
        workers,
        handlers=[service.handler()],
        interceptors=[Gate(door.access, service.denied)],
        options=options,
        maximum_concurrent_rpcs=threads,
    )
    state = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(state, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        port = door.listen(server, f"{settings.host}:{settings.port}")
    except RuntimeError as error:
        address = f"{settings.host}:{settings.port}"
        raise SetupError(f"server.port: cannot listen on {address}; is another program using it?") from error
    server.start()
    for name in ("", SERVICE):
        state.set(name, health_pb2.HealthCheckResponse.SERVING)
    guarded = {"tls": door.credentials is not None, "tokens": settings.tokens is not None}
    address = f"{settings.host}:{port}"
    logs.tell(log, "listening", address=address, **guarded)
    print(f"{READY}{address}", flush=True)
    return Running(server, address, state)


def _wait_for_parent(told: SimpleQueue[str]) -> None:
    """The parent holds the other end of stdin: when it ends, however it ends, this reads the end of the file."""
    sys.stdin.read()
    told.put(ORPHANED)


if __name__ == "__main__":
    sys.exit(main())
