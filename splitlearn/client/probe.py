"""A trunk server seen from outside: does it serve, what does it serve, what has it counted.

One channel stays open from look to look, since to connect anew costs more than to ask.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from splitlearn.client.served import first_that_works
from splitlearn.wire import SERVICE
from splitlearn.wire import trunk_pb2 as pb
from splitlearn.wire.channel import NONE, Credentials, open_channel
from splitlearn.wire.status import error_of
from splitlearn.wire.stub import TrunkStub

TIMEOUT_S = 3.0


@dataclass(frozen=True)
class Look:
    """A trunk at one moment, `at` by the monotonic clock; `metrics` is in Prometheus' text format."""

    address: str
    at: float
    serving: bool
    description: pb.Description
    metrics: str


class Watch:
    """Looks at the first of some trunks that answers."""

    def __init__(self, shown: Credentials = NONE) -> None:
        self._shown = shown
        self._lock = threading.Lock()
        self._trunk: _Trunk | None = None

    def look(self, addresses: Sequence[str]) -> Look:
        """The first trunk that answers; the one that did before is asked first. Raises TrunkError if none does."""
        with self._lock:
            before = self._trunk.address if self._trunk else ""
            return first_that_works(sorted(addresses, key=lambda address: address != before), self._look)

    def close(self) -> None:
        """Close the connection; a later look opens another."""
        with self._lock:
            self._drop()

    def _look(self, address: str) -> Look:
        if self._trunk is None or self._trunk.address != address:
            self._drop()
            self._trunk = _Trunk(address, self._shown)
        try:
            return self._trunk.look()
        except grpc.RpcError as error:
            self._drop()  # gRPC would go on giving this error for a while after the trunk is back
            raise error_of(error, address) from error

    def _drop(self) -> None:
        if self._trunk is not None:
            self._trunk.channel.close()
        self._trunk = None


class _Trunk:
    """The connection to one of them, and what is asked over it."""

    def __init__(self, address: str, shown: Credentials) -> None:
        self.address = address
        self.channel = open_channel(address, shown)
        self._health = health_pb2_grpc.HealthStub(self.channel)
        self._stub = TrunkStub(self.channel)

    def look(self) -> Look:
        """Ask; raises grpc.RpcError."""
        description = self._stub.describe(pb.DescribeRequest(), timeout=TIMEOUT_S)
        text = self._stub.metrics(pb.MetricsRequest(), timeout=TIMEOUT_S).text
        at = time.monotonic()
        health = self._health.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=TIMEOUT_S)
        serving = health.status == health_pb2.HealthCheckResponse.SERVING
        return Look(self.address, at, serving, description, text)
