"""Measures the real link to a trunk server by gRPC calls: no tensors here, so no torch.

The round trip includes gRPC's and the server's own time, about 0.3 ms. The bandwidth is that of one call: on a link
with a long round trip HTTP/2's windows, which begin small, may allow less than the line. So both are conservative.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import grpc

from splitlearn.errors import TrunkFull, TrunkRefused
from splitlearn.wire import MAX_PADDING_BYTES
from splitlearn.wire import trunk_pb2 as pb
from splitlearn.wire.channel import NONE, Credentials, open_channel
from splitlearn.wire.status import error_of
from splitlearn.wire.stub import TrunkStub

ROUND_TRIPS, WARM_UP = 20, 5
TIMEOUT_S = 10.0
SIZES = (MAX_PADDING_BYTES >> 4, MAX_PADDING_BYTES >> 2, MAX_PADDING_BYTES)
# A transfer that takes ENOUGH_S is long enough to give the bandwidth. Less than LEAST_S is noise of the clock.
ENOUGH_S, LEAST_S = 0.05, 1e-5


@dataclass(frozen=True)
class RealLink:
    """Round trip in seconds, and bits per second to the trunk and back. None: it refuses messages of that size."""

    rtt_s: float
    up_bits_per_s: float | None
    down_bits_per_s: float | None

    @property
    def summary(self) -> str:
        """For people: "0.4 ms, 900 Mbit/s up, 900 Mbit/s down"."""
        rates = (("up", self.up_bits_per_s), ("down", self.down_bits_per_s))
        parts = [f"{float(f'{bits / 1e6:.2g}'):g} Mbit/s {way}" for way, bits in rates if bits is not None]
        return ", ".join([f"{self.rtt_s * 1e3:.1f} ms", *parts])


def round_trip_s(address: str, identity: Credentials = NONE) -> float:
    """The round trip to the trunk at `address` in seconds: a median over one open channel. Raises TrunkError."""
    with open_channel(address, identity) as channel:
        return statistics.median(_round_trips_s(partial(_describe_s, TrunkStub(channel), address)))


def real_link(address: str, identity: Credentials = NONE) -> RealLink:
    """Measure the link to the trunk at `address`, with at most some MiB each way. Raises TrunkError."""
    with open_channel(address, identity) as channel:
        ask = partial(_describe_s, TrunkStub(channel), address)
        trips_s = _round_trips_s(ask)
        least_s = min(trips_s)
        up = _bits_per_s(lambda size: ask(pb.DescribeRequest(padding=bytes(size))), least_s)
        down = _bits_per_s(lambda size: ask(pb.DescribeRequest(answer_padding=size)), least_s)
    return RealLink(statistics.median(trips_s), up, down)


def _describe_s(stub: TrunkStub, address: str, request: pb.DescribeRequest) -> float:
    started = time.perf_counter()
    try:
        stub.describe(request, timeout=TIMEOUT_S)
    except grpc.RpcError as error:
        raise error_of(error, address) from error
    return time.perf_counter() - started


def _round_trips_s(ask: Callable[[pb.DescribeRequest], float]) -> list[float]:
    return [ask(pb.DescribeRequest()) for _ in range(WARM_UP + ROUND_TRIPS)][WARM_UP:]


def _bits_per_s(spend: Callable[[int], float], least_s: float) -> float | None:
    """The bandwidth by the seconds that `spend` takes for growing sizes, less the least round trip. The median would
    not do: on a busy machine it can be longer than a transfer."""
    found = None
    for size in SIZES:
        try:
            beyond_s = max(min(spend(size), spend(size)) - least_s, LEAST_S)
        except (TrunkRefused, TrunkFull):  # over the trunk's limit on messages
            break
        found = 8 * size / beyond_s
        if beyond_s > ENOUGH_S:
            break
    return found
