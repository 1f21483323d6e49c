"""The way to a trunk server, or to each of a chain: its layers, its addresses, and what is shown to it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from splitlearn.client.directory import ranges_of, resolved
from splitlearn.client.served import ServedModel, check_served, describe, first_that_works
from splitlearn.config import TrunkConfig, has_directory
from splitlearn.errors import TrunkError
from splitlearn.models.plan import SplitPlan
from splitlearn.wire import channel
from splitlearn.wire import trunk_pb2 as pb
from splitlearn.wire.channel import NONE, Credentials

T = TypeVar("T")


@dataclass(frozen=True)
class Hop:
    """The layers of `plan` are at the first of `addresses` that works, or at those that the directory at `ray://...`
    lists. Over an emulated link, `via` says where to
    connect for each. Of a chain, `link` says which hop it is: "2 of 3". Methods raise TrunkError, which names it."""

    plan: SplitPlan
    addresses: tuple[str, ...]
    credentials: Credentials = NONE
    via: tuple[str, ...] = ()
    link: str = ""

    def of(self, whole: ServedModel) -> ServedModel:
        """What this hop must serve of the `whole` trunk."""
        return replace(whole, plan=self.plan, link=self.link)

    def listed(self) -> tuple[str, ...]:
        """The addresses of the trunks; from a directory, those of now."""
        return resolved(self.addresses, self.credentials, self.plan)

    def address(self) -> str:
        """The first address at which a trunk answers; a single address without asking."""
        first, *others = self.listed()
        return self._first(lambda address, _: address) if others else first

    def describe(self) -> pb.Description:
        """What the first trunk that answers says of itself."""
        return self._first(lambda _, description: description)

    def check(self, whole: ServedModel) -> None:
        """Raise unless a trunk answers and serves its part of `whole`."""
        self._first(lambda address, description: check_served(description, self.of(whole), address))

    def check_each(self, whole: ServedModel) -> list[pb.Description]:
        """What the trunks at all addresses say of themselves. Raise unless each serves its part of `whole`."""
        each = [replace(self, addresses=(address,)) for address in self.listed()]
        for one in each:
            one.check(whole)
        return [one.describe() for one in each]

    def _first(self, use: Callable[[str, pb.Description], T]) -> T:
        try:
            return first_that_works(self.listed(), lambda each: use(each, describe(each, self.credentials)))
        except TrunkError as error:
            if self.link:
                error.args = (f"Link {self.link}, layers {self.plan}: {error}",)
            raise


def hops_of(trunk: TrunkConfig, plan: SplitPlan) -> tuple[Hop, ...]:
    """The hops to running servers, none to an embedded one. Raises InputError for credentials that cannot be used."""
    if trunk.embedded:
        return ()
    if not trunk.chain:
        return hops_at(trunk.addresses, plan, channel.credentials(trunk))
    return tuple(_link(trunk, plan, number) for number in range(len(trunk.chain)))


def hops_at(addresses: tuple[str, ...], plan: SplitPlan, shown: Credentials = NONE) -> tuple[Hop, ...]:
    """The hop to the trunk at `addresses`; from a directory, the hops of the chain that it lists. Raises TrunkError."""
    if not has_directory(addresses):
        return (Hop(plan, addresses, shown),)
    ranges = sorted(set(ranges_of(addresses[0], shown)))
    inside = [(start, end) for start, end in ranges if plan.start <= start and end <= plan.end]
    ends = (plan.start, *(end for _, end in inside))
    if len(inside) < 2 or [start for start, _ in inside] != list(ends[:-1]) or ends[-1] != plan.end:
        return (Hop(plan, addresses, shown),)  # a single trunk; what it lacks is said when it is asked
    layers = [SplitPlan(start, end, plan.n_layers) for start, end in inside]
    return tuple(Hop(each, addresses, shown, link=f"{at} of {len(layers)}") for at, each in enumerate(layers, 1))


def _link(trunk: TrunkConfig, plan: SplitPlan, number: int) -> Hop:
    link = trunk.chain[number]
    own = trunk.model_copy(update={"tls": link.tls or trunk.tls, "token": link.token or trunk.token})
    layers = SplitPlan(*link.layers, plan.n_layers)
    shown = channel.credentials(own, f"trunk.address, link {number + 1}" if link.tls or link.token else "trunk")
    return Hop(layers, link.address, shown, link=f"{number + 1} of {len(trunk.chain)}")
