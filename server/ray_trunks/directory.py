"""The directory: a small gRPC server that tells clients where the replicas are, the least full first.

It is an actor of Ray's, and knows what the controller says. It imports no torch.
"""

import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2
from prometheus_client import Gauge

from server import connections
from server.auth.tls import Security
from server.connections import CHECK, HEALTH_THREADS
from server.dispatch import CallThreads, Dispatch, Method, unary
from server.idle_timeout import IdleTimeout
from server.monitoring import exposition
from server.monitoring.metrics import Metrics
from server.ray_trunks.load import Layers, Load
from splitlearn import address
from splitlearn.config import ServerConfig
from splitlearn.wire import DIRECTORY, directory_pb2
from splitlearn.wire.stub import LIST

LIST_THREADS = 64
STATES = ("serving", "starting", "draining")
PREFIX = "splitlearn_ray_"


@dataclass(frozen=True)
class Entry:
    """A replica: the number of its link in the chain, its state (of STATES), and of one that serves: where it listens,
    its layers, and how full it is."""

    link: int
    state: str
    address: str = ""
    layers: Layers = (0, 0)
    load: Load = Load()


class Table:
    """The replicas as of the last update, and how many sessions they have been given since."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: tuple[Entry, ...] = ()
        self._given: Counter[str] = Counter()

    def update(self, entries: Sequence[Entry]) -> None:
        """From now on, these are the replicas."""
        with self._lock:
            self._entries = tuple(entries)
            self._given.clear()

    def listing(self) -> list[Entry]:
        """The replicas that take sessions, the least full of each range of layers first. Those count as given to the
        client that asked: of clients that ask between two updates, each gets the next replica."""
        with self._lock:
            serving = [entry for entry in self._entries if entry.state == "serving" and entry.address]
            found = sorted(serving, key=lambda entry: (entry.layers, self._full(entry)))
            first = {entry.layers: entry.address for entry in reversed(found)}
            self._given.update(first.values())
            return found

    def count(self, link: int, state: str) -> int:
        """How many replicas of that link are in that state."""
        return sum((entry.link, entry.state) == (link, state) for entry in self._entries)

    def sessions(self, link: int) -> int:
        """The open sessions at the replicas of that link."""
        return sum(entry.load.sessions for entry in self._entries if entry.link == link)

    def _full(self, entry: Entry) -> float:
        return entry.load.full + self._given[entry.address] / max(1, entry.load.sessions_limit)


class Directory:
    """The directory's server. It listens from the start. Raises InputError, SetupError."""

    def __init__(self, settings: ServerConfig, links: int) -> None:
        self._table = Table()
        security, metrics, state = Security.of(settings), Metrics(), health.HealthServicer()
        _show(metrics, self._table, links)
        timeout = IdleTimeout(settings.open_s, settings.open_s)
        methods = {
            LIST: Method(unary(self._list), CallThreads(LIST_THREADS), timeout),
            CHECK: Method(unary(connections.check(state)), CallThreads(HEALTH_THREADS), timeout, open=True),
        }
        dispatch = Dispatch(methods, security.access, metrics)
        unused = ThreadPoolExecutor(1)  # gRPC requires a pool but does not use it for these methods
        options = connections.options(settings, LIST_THREADS)
        self._server = grpc.server(unused, handlers=[dispatch], options=options)
        host = address.loopback(settings.host) or settings.host
        self._port = security.listen(self._server, address.joined(host, settings.port))
        self._server.start()
        for name in ("", DIRECTORY):
            state.set(name, health_pb2.HealthCheckResponse.SERVING)
        exposition.listen(metrics, settings)

    def port(self) -> int:
        """Where it listens."""
        return self._port

    def update(self, entries: Sequence[Entry]) -> None:
        """From now on, these are the replicas."""
        self._table.update(entries)

    def stop(self) -> None:
        """Stop listening."""
        self._server.stop(grace=0).wait()

    def _list(self, request: bytes, context: grpc.ServicerContext) -> Message:
        connections.parse(directory_pb2.ListRequest, request, context)
        replicas = [
            directory_pb2.Replica(address=entry.address, start=entry.layers[0], end=entry.layers[1])
            for entry in self._table.listing()
        ]
        return directory_pb2.Listing(replicas=replicas)


def _show(metrics: Metrics, table: Table, links: int) -> None:
    """Add the gauges of the replicas to `metrics`."""
    registry = metrics.registry
    replicas = Gauge(f"{PREFIX}replicas", "Trunk servers on Ray.", ["link", "state"], registry=registry)
    sessions = Gauge(f"{PREFIX}sessions", "Open sessions at the replicas.", ["link"], registry=registry)
    for link in range(1, links + 1):
        sessions.labels(link).set_function(partial(table.sessions, link))
        for state in STATES:
            replicas.labels(link, state).set_function(partial(table.count, link, state))
