"""The way to a trunk server, or to each of a chain: its layers, its addresses, and what is shown to it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from splitlearn.client.served import ServedModel, check_served, describe, first_that_works
from splitlearn.config import TrunkConfig
from splitlearn.errors import TrunkError
from splitlearn.models.plan import SplitPlan
from splitlearn.wire import channel
from splitlearn.wire import trunk_pb2 as pb
from splitlearn.wire.channel import NONE, Credentials

T = TypeVar("T")


@dataclass(frozen=True)
class Hop:
    """The layers of `plan` are at the first of `addresses` that works. Over an emulated link, `via` says where to
    connect for each. Of a chain, `link` says which hop it is: "2 of 3". Methods raise TrunkError, which names it."""

    plan: SplitPlan
    addresses: tuple[str, ...]
    credentials: Credentials = NONE
    via: tuple[str, ...] = ()
    link: str = ""

    def of(self, whole: ServedModel) -> ServedModel:
        """What this hop must serve of the `whole` trunk."""
        return replace(whole, plan=self.plan, link=self.link)

    def address(self) -> str:
        """The first address at which a trunk answers; a single address without asking."""
        first, *others = self.addresses
        return self._first(lambda address, _: address) if others else first

    def describe(self) -> pb.Description:
        """What the first trunk that answers says of itself."""
        return self._first(lambda _, description: description)

    def check(self, whole: ServedModel) -> None:
        """Raise unless a trunk answers and serves its part of `whole`."""
        self._first(lambda address, description: check_served(description, self.of(whole), address))

    def check_each(self, whole: ServedModel) -> list[pb.Description]:
        """What the trunks at all addresses say of themselves. Raise unless each serves its part of `whole`."""
        each = [replace(self, addresses=(address,)) for address in self.addresses]
        for one in each:
            one.check(whole)
        return [one.describe() for one in each]

    def _first(self, use: Callable[[str, pb.Description], T]) -> T:
        try:
            return first_that_works(self.addresses, lambda each: use(each, describe(each, self.credentials)))
        except TrunkError as error:
            if self.link:
                error.args = (f"Link {self.link}, layers {self.plan}: {error}",)
            raise


def hops_of(trunk: TrunkConfig, plan: SplitPlan) -> tuple[Hop, ...]:
    """The hops to running servers, none to an embedded one. Raises InputError for credentials that cannot be used."""
    if trunk.embedded:
        return ()
    if not trunk.chain:
        return (Hop(plan, trunk.addresses, channel.credentials(trunk)),)
    return tuple(_link(trunk, plan, number) for number in range(len(trunk.chain)))


def _link(trunk: TrunkConfig, plan: SplitPlan, number: int) -> Hop:
    link = trunk.chain[number]
    own = trunk.model_copy(update={"tls": link.tls or trunk.tls, "token": link.token or trunk.token})
    layers = SplitPlan(*link.layers, plan.n_layers)
    shown = channel.credentials(own, f"trunk.address, link {number + 1}" if link.tls or link.token else "trunk")
    return Hop(layers, link.address, shown, link=f"{number + 1} of {len(trunk.chain)}")
