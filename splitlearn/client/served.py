"""What a trunk serves, asked and checked before any session: no tensors here, so no torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import grpc

from splitlearn.errors import TrunkError, TrunkRefused, TrunkUnavailable
from splitlearn.flags import auto
from splitlearn.flags.selection import Availability
from splitlearn.models.plan import SplitPlan
from splitlearn.wire import PROTOCOL
from splitlearn.wire import trunk_pb2 as pb
from splitlearn.wire.channel import NONE, Credentials, open_channel
from splitlearn.wire.status import error_of
from splitlearn.wire.stub import TrunkStub

Found = TypeVar("Found")


@dataclass(frozen=True)
class Served:
    """What a trunk must serve to be of use: a model by name and digest, the layers of a plan, a dtype by its name."""

    model: str
    digest: str
    plan: SplitPlan
    dtype: str
    hidden_size: int


@dataclass(frozen=True)
class TrunkFacts:
    """What a trunk said of the process that serves a session; `address` is where the last session was in the end."""

    threads: int = 0
    load_s: float = 0.0
    import_rss_bytes: int = 0
    peak_rss_bytes: int = 0
    address: str = ""


def first_that_works(addresses: Sequence[str], ask: Callable[[str], Found]) -> Found:
    """What `ask` gives for the first address at which it raises no TrunkError; what it raised for the first if none."""
    first: TrunkError | None = None
    for address in addresses:
        try:
            return ask(address)
        except TrunkError as error:
            first = first or error
    raise first or TrunkUnavailable("No trunk server is known.")


def describe(address: str, shown: Credentials = NONE, timeout_s: float = 10.0) -> pb.Description:
    """What the trunk at `address` serves. Raises TrunkUnavailable when nobody answers there."""
    with open_channel(address, shown) as opened:
        try:
            return TrunkStub(opened).describe(pb.DescribeRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            raise error_of(error, address) from error


def check_served(description: pb.Description, served: Served, address: str) -> None:
    """Raise TrunkRefused that names each thing in which the trunk differs from what is wanted."""
    plan = served.plan
    differing = [
        f"{what}: it serves {theirs}, this client has {ours}"
        for what, theirs, ours in (
            ("protocol", description.protocol, PROTOCOL),
            ("model", description.model, served.model),
            ("weights digest", description.digest[:12], served.digest[:12]),
            ("layers", f"[{description.start}, {description.end})", f"[{plan.start}, {plan.end})"),
            ("dtype", description.dtype, served.dtype),
        )
        if theirs != ours
    ]
    if differing:
        raise TrunkRefused(f"The trunk server at {address} cannot be used. {'; '.join(differing)}.")


def with_trunk(here: Availability, said: pb.Description) -> Availability:
    """The flags that can be applied `here`, with those of a trunk server in the place of this machine's as a trunk."""
    reasons = {flag.name: flag.unavailable or None for flag in said.flags}
    known = {name: reasons.get(name, "unknown to this trunk server") for name in here["trunk"]}
    rule = auto.choose(said.machine.get("vector_instructions"), said.device, said.dtype)
    return here.with_side("trunk", known, rule)
