"""The best route through machines in a row: dynamic programming over contiguous ranges of layers.

The client has the first layers and the last ones, so the row is a ring: for each first layer of the servers, the best
chain of servers to each last layer is built up device by device. A chain costs the sum or the maximum of its parts, so
the best one is made of best ones. A server may be left out. Messages are what the client cannot hide, so for TPOT a
slower chain with fewer of them is kept, too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

from splitlearn.config import Objective
from splitlearn.planning.network import CLIENT, Network, Work
from splitlearn.planning.route import (
    Route,
    Span,
    busy_s,
    needed_bytes,
    open_s,
    predict,
    prompt_s,
    step_s,
    trip_s,
)

OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
_Chain = tuple[float, float, float, tuple[Span, ...]]
"""What it costs for the objective, its part of TPOT, the messages in that, and its spans."""


def rank(route: Route, objective: Objective) -> tuple[float, float]:
    """What is least in the best route. Of equal ones that with the smaller client or the lower TPOT wins."""
    return {
        "tpot": (route.tpot_s, route.client_memory_bytes),
        "ttft": (route.ttft_s, route.tpot_s),
        "memory": (route.client_memory_bytes, route.tpot_s),
        "throughput": (-route.tokens_per_s, route.tpot_s),
    }[objective]


def best_split(work: Work, network: Network, objective: Objective) -> Route | None:
    """The best route with servers that fits; None if none does."""
    routes = (predict(work, network, spans) for spans in _chains(work, network, objective))
    return min((route for route in routes if route.fits), key=lambda route: rank(route, objective), default=None)


def _chains(work: Work, network: Network, objective: Objective) -> Iterator[tuple[Span, ...]]:
    """The best chain for each first and last layer.

    Sessions open at all servers at once, so that the slowest round trip counts for TTFT, which is no sum: there, each
    server's round trip is taken as the limit for the others.
    """
    servers = range(1, len(network.devices))
    limits = {open_s(network, each) for each in servers} if objective == "ttft" else {float("inf")}
    for limit in limits:
        search = _Search(work, network, objective, [each for each in servers if open_s(network, each) <= limit])
        for start in range(work.n_layers):
            yield from search.ending(start)


def _cost(chain: _Chain) -> tuple[float, float, float]:
    return chain[:3]


@dataclass(frozen=True)
class _Search:
    """The chains of some servers, in order, for one objective; of equal ones those with the lower TPOT."""

    work: Work
    network: Network
    objective: Objective
    servers: list[int]

    def ending(self, start: int) -> Iterator[tuple[Span, ...]]:
        """The best chain from `start` to each last layer."""
        found: dict[tuple[int, int], list[_Chain]] = {}
        for device in self.servers:
            entered = self._entered(found, device, start)
            for end in range(start + 1, self.work.n_layers + 1):
                spans = (
                    (chain, Span(device, before, end))
                    for before, chains in entered.items()
                    if before < end
                    for chain in chains
                )
                if chains := [self._with_span(chain, span) for chain, span in spans if self._fits(span)]:
                    found[device, end] = self._best(chains)
        yield from (chain[3] for chains in self._entered(found, CLIENT, None).values() for chain in chains)

    def _entered(
        self, found: dict[tuple[int, int], list[_Chain]], device: int, start: int | None
    ) -> dict[int, list[_Chain]]:
        """By the layer that comes next, the best chains that arrive at `device`; from `start` the client comes."""
        entered = {} if start is None else {start: [self._with_trip((self._bottom(start), 0.0, 0.0, ()), device)]}
        for (_, end), chains in found.items():
            arrived = [self._with_trip(chain, device) for chain in chains]
            entered[end] = self._best([*entered.get(end, ()), *arrived])
        return entered

    def _best(self, chains: list[_Chain]) -> list[_Chain]:
        """The best chain; and those with fewer messages, among equals or, for TPOT, among all."""
        first, *others = sorted(chains, key=_cost)
        kept = [first]
        for chain in others:
            if chain[2] < kept[-1][2] and (self.objective == "tpot" or chain[0] == first[0]):
                kept.append(chain)
        return kept

    def _bottom(self, start: int) -> float:
        """What a chain costs at least: of many sessions, the client may be the slowest machine itself."""
        own = self.network.devices[CLIENT].step_s + step_s(self.work, self.network, Span(CLIENT, 0, start))
        return own if self.objective == "throughput" else 0.0

    def _fits(self, span: Span) -> bool:
        return needed_bytes(self.work, self.network, span) <= self.network.devices[span.device].memory_bytes

    def _with_trip(self, chain: _Chain, device: int) -> _Chain:
        before = chain[3][-1].device if chain[3] else CLIENT
        cost = token_s = trip_s(self.network, before, device, self.work.step_bytes)
        if self.objective == "throughput":
            cost = busy_s(self.work, self.network, before, device)
        elif self.objective == "ttft":
            cost = trip_s(self.network, before, device, self.work.prompt_bytes)
        return self._joined(chain[0], cost), chain[1] + token_s, chain[2], chain[3]

    def _with_span(self, chain: _Chain, span: Span) -> _Chain:
        device = self.network.devices[span.device]
        token_s = step_s(self.work, self.network, span) + device.step_s
        first_s = prompt_s(self.work, self.network, span) + device.step_s + device.start_s
        cost = first_s if self.objective == "ttft" else token_s
        return self._joined(chain[0], cost), chain[1] + token_s, chain[2] + device.step_s, (*chain[3], span)

    def _joined(self, a: float, b: float) -> float:
        return max(a, b) if self.objective == "throughput" else a + b
