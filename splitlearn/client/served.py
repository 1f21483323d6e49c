"""Asks what a trunk serves, and checks it before any session: no tensors here, so no torch."""

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

T = TypeVar("T")


@dataclass(frozen=True)
class ServedModel:
    """What the client needs a trunk to serve: a model by its digest, the layers of a plan, a dtype by its name.

    The name of the model, which may be a path, is for people. Of a server in a chain, `link` says which: "2 of 3".
    """

    model: str
    digest: str
    plan: SplitPlan
    dtype: str
    hidden_size: int
    link: str = ""

    def name(self, error: TrunkError) -> None:
        """Let the message of `error` begin with the link of the chain, if this is one."""
        if self.link:
            error.args = (f"Link {self.link}, layers {self.plan}: {error}",)


@dataclass(frozen=True)
class TrunkFacts:
    """A trunk's facts about the process that serves a session. `address` is that of the last session at its end."""

    threads: int = 0
    load_s: float = 0.0
    import_rss_bytes: int = 0
    peak_rss_bytes: int = 0
    address: str = ""

    @classmethod
    def together(cls, facts: "Sequence[TrunkFacts]") -> "TrunkFacts | None":
        """The facts of all servers of a chain as one's: memory in sum. None without any."""
        if len(facts) < 2:
            return next(iter(facts), None)
        return cls(
            max(each.threads for each in facts),
            max(each.load_s for each in facts),
            sum(each.import_rss_bytes for each in facts),
            sum(each.peak_rss_bytes for each in facts),
            ", ".join(each.address for each in facts),
        )


def first_that_works(addresses: Sequence[str], ask: Callable[[str], T]) -> T:
    """The result of `ask` for the first address at which it raises no TrunkError. If there is none, its first error."""
    first: TrunkError | None = None
    for address in addresses:
        try:
            return ask(address)
        except TrunkError as error:
            first = first or error
    raise first or TrunkUnavailable("No trunk server is known.")


def describe(
    address: str, credentials: Credentials = NONE, timeout_s: float = 10.0, *, costs: bool = False
) -> pb.Description:
    """What the trunk at `address` serves, and its `costs` if they are asked for. Raises TrunkUnavailable if it does not
    answer, or another TrunkError."""
    with open_channel(address, credentials) as channel:
        try:
            return TrunkStub(channel).describe(pb.DescribeRequest(costs=costs), timeout=timeout_s)
        except grpc.RpcError as error:
            raise error_of(error, address) from error


def check_served(description: pb.Description, served: ServedModel, address: str) -> None:
    """Raise TrunkRefused, which names every difference, if the trunk does not serve what the client needs."""
    plan = served.plan
    named = [("model", description.model, served.model)] if description.digest != served.digest else []
    differing = [
        f"{what}: it serves {theirs}, this client has {ours}"
        for what, theirs, ours in (
            ("protocol", description.protocol, PROTOCOL),
            *named,
            ("weights digest", description.digest[:12], served.digest[:12]),
            ("layers", f"[{description.start}, {description.end})", str(plan)),
            ("dtype", description.dtype, served.dtype),
        )
        if theirs != ours
    ]
    if differing:
        raise TrunkRefused(f"The trunk server at {address} cannot be used. {'; '.join(differing)}.")


def with_trunk(here: Availability, *described: pb.Description) -> Availability:
    """The flags available `here`, where the trunk side is that of the described server instead of this machine: of a
    chain, what all its servers can apply, and the last of their rules for `auto`."""
    known: dict[str, str | None] = {}
    for description in described:
        reasons = {flag.name: flag.unavailable or None for flag in description.flags}
        known = {name: known.get(name) or reasons.get(name, "unknown to this trunk server") for name in here["trunk"]}
    rules = [auto.choose(each.machine.get("vector_instructions"), each.device, each.dtype) for each in described]
    return here.with_side("trunk", known, max(rules, key=auto.RULES.index))
