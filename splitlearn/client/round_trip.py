"""The round trip to a trunk server, by gRPC's own health checks: no tensors here, so no torch."""

import statistics
import time

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from splitlearn.wire.channel import NONE, Credentials, open_channel
from splitlearn.wire.status import error_of

ROUND_TRIPS, WARM_UP = 20, 5
TIMEOUT_S = 10.0


def round_trip_s(address: str, identity: Credentials = NONE) -> float:
    """The round trip to the trunk at `address` in seconds: the median of 20 gRPC health checks over one open channel.

    Raises TrunkError.
    """
    request, spent = health_pb2.HealthCheckRequest(), []
    with open_channel(address, identity) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        for _ in range(WARM_UP + ROUND_TRIPS):
            started = time.perf_counter()
            try:
                check(request, timeout=TIMEOUT_S)
            except grpc.RpcError as error:
                raise error_of(error, address) from error
            spent.append(time.perf_counter() - started)
    return statistics.median(spent[WARM_UP:])
