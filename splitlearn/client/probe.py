"""Probes a trunk server from outside: its health, its description and its metrics."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from splitlearn.client.endpoint import Endpoint
from splitlearn.client.served import first_that_works
from splitlearn.wire import SERVICE
from splitlearn.wire import trunk_pb2 as pb
from splitlearn.wire.channel import NONE, Credentials
from splitlearn.wire.status import error_of
from splitlearn.wire.stub import TrunkStub

TIMEOUT_S = 3.0


@dataclass(frozen=True)
class Snapshot:
    """A trunk at one moment, `at` by the monotonic clock. `metrics` is in Prometheus' text format."""

    address: str
    at: float
    serving: bool
    description: pb.Description
    metrics: str


class TrunkProbe:
    """Probes the first trunk that answers. The connection stays open between probes, since connecting costs more than a
    probe."""

    def __init__(self, credentials: Credentials = NONE) -> None:
        self._credentials = credentials
        self._lock = threading.Lock()
        self._endpoint: Endpoint | None = None

    def snapshot(self, addresses: Sequence[str]) -> Snapshot:
        """A snapshot of the first trunk that answers. The last one that did is tried first. Raises TrunkError."""
        with self._lock:
            before = self._endpoint.address if self._endpoint else ""
            return first_that_works(sorted(addresses, key=lambda address: address != before), self._ask)

    def close(self) -> None:
        """Close the connection. A later probe opens another."""
        with self._lock:
            self._close_locked()

    def _ask(self, address: str) -> Snapshot:
        if self._endpoint is None or self._endpoint.address != address:
            self._close_locked()
            self._endpoint = Endpoint(address, self._credentials)
        try:
            with self._endpoint.channel() as channel:
                return _snapshot(address, channel)
        except grpc.RpcError as error:
            raise error_of(error, address) from error

    def _close_locked(self) -> None:
        if self._endpoint is not None:
            self._endpoint.close()
        self._endpoint = None


def _snapshot(address: str, channel: grpc.Channel) -> Snapshot:
    stub, health = TrunkStub(channel), health_pb2_grpc.HealthStub(channel)
    description = stub.describe(pb.DescribeRequest(), timeout=TIMEOUT_S)
    text = stub.metrics(pb.MetricsRequest(), timeout=TIMEOUT_S).text
    at = time.monotonic()
    state = health.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=TIMEOUT_S)
    return Snapshot(address, at, state.status == health_pb2.HealthCheckResponse.SERVING, description, text)
