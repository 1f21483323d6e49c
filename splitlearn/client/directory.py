"""Asks the directory of trunks on Ray, at `ray://host:port`, where the replicas are that take sessions.

It needs no Ray: the directory speaks gRPC, and shows and asks for what a trunk server does (TLS, token).
"""

import threading
from collections.abc import Sequence
from contextlib import closing

import grpc

from splitlearn.client.endpoint import Endpoint
from splitlearn.config import RAY_SCHEME, has_directory
from splitlearn.errors import TrunkError, TrunkRefused, TrunkUnavailable
from splitlearn.models.plan import SplitPlan
from splitlearn.wire import directory_pb2 as pb
from splitlearn.wire.channel import NONE, Credentials
from splitlearn.wire.status import error_of
from splitlearn.wire.stub import DirectoryStub

TIMEOUT_S = 10.0


class Directory:
    """The directory at `address` (`ray://host:port`). The connection stays open between questions."""

    def __init__(self, address: str, credentials: Credentials = NONE) -> None:
        self.address = address
        self._endpoint = Endpoint(address.removeprefix(RAY_SCHEME), credentials)
        self._lock = threading.Lock()

    def replicas(self, timeout_s: float = TIMEOUT_S) -> list[pb.Replica]:
        """The replicas that take sessions, the least full of each range of layers first. Raises TrunkError."""
        try:
            with self._lock, self._endpoint.channel() as channel:
                return list(DirectoryStub(channel).list(pb.ListRequest(), timeout=timeout_s).replicas)
        except grpc.RpcError as error:
            raise _error(error, self.address) from error

    def addresses(self, plan: SplitPlan, timeout_s: float = TIMEOUT_S) -> list[str]:
        """The trunk servers with the layers of `plan`, the least full first. Raises TrunkError if there is none."""
        listed = self.replicas(timeout_s)
        found = [each.address for each in listed if (each.start, each.end) == (plan.start, plan.end)]
        if not found:
            have = sorted({f"[{each.start}, {each.end})" for each in listed})
            others = f"; it has those of {' and '.join(have)}" if have else ""
            wanted = f"[{plan.start}, {plan.end})"
            raise TrunkUnavailable(f"The directory at {self.address} has no trunk server for layers {wanted}{others}.")
        return found

    def close(self) -> None:
        """Close the connection."""
        self._endpoint.close()


def resolved(addresses: Sequence[str], credentials: Credentials, plan: SplitPlan | None = None) -> tuple[str, ...]:
    """`addresses` of trunk servers; for that of a directory, those that it lists for `plan`, None for all. Raises
    TrunkError."""
    if not has_directory(addresses):
        return tuple(addresses)
    with closing(Directory(addresses[0], credentials)) as directory:
        return tuple([each.address for each in directory.replicas()] if plan is None else directory.addresses(plan))


def ranges_of(address: str, credentials: Credentials) -> list[tuple[int, int]]:
    """The layers [start, end) of each replica that a directory lists. Raises TrunkError."""
    with closing(Directory(address, credentials)) as directory:
        return [(each.start, each.end) for each in directory.replicas()]


def _error(error: grpc.RpcError, address: str) -> TrunkError:
    """The exception for a failed question to the directory at `address`."""
    details = error.details() or "no details"
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        wanted = "the address that `splitlearn serve-trunk --ray` prints is needed"
        return TrunkRefused(f"No directory of trunks answers at {address}, but another program: {wanted}.")
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        start = "Start it with `splitlearn serve-trunk --ray`, or set trunk.address."
        return TrunkUnavailable(f"The directory of trunks at {address} does not answer ({details}). {start}")
    return error_of(error, address)
