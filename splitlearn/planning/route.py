"""What a way through several machines costs: TPOT, TTFT, memory and throughput, and where the time goes.

    found = predict(work, network, (Span(1, 2, 15), Span(2, 15, 28)))

The client has the layers before the first span and after the last one. Without spans it has them all. Formulas:
docs/planning.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from splitlearn.link.prediction import OPEN_BYTES, OPENED_BYTES
from splitlearn.planning.costs import hidden_s
from splitlearn.planning.network import CLIENT, Network, Work


@dataclass(frozen=True)
class Span:
    """The layers `[start, end)` at the device of that number."""

    device: int
    start: int
    end: int


@dataclass(frozen=True)
class Share:
    """A line of the time breakdown: seconds of a decoded token, and of the first one."""

    where: str
    layers: str
    token_s: float
    first_s: float


@dataclass(frozen=True)
class Use:
    """The memory that a device needs, and what it has."""

    device: str
    layers: str
    needed_bytes: float
    memory_bytes: float


@dataclass(frozen=True)
class Route:
    """Spans in order, and what they cost. `breakdown` sums to TPOT and to TTFT, `uses` has the client first.

    `tokens_per_s` is what many sessions can have together, one token in a step: the slowest machine or link decides.
    """

    spans: tuple[Span, ...]
    tpot_s: float
    ttft_s: float
    tokens_per_s: float
    slowest: str
    breakdown: tuple[Share, ...]
    uses: tuple[Use, ...]

    @property
    def client_memory_bytes(self) -> float:
        """What the client needs."""
        return self.uses[0].needed_bytes

    @property
    def fits(self) -> bool:
        """Every device has the memory that it needs."""
        return all(use.needed_bytes <= use.memory_bytes for use in self.uses)


def predict(work: Work, network: Network, spans: tuple[Span, ...]) -> Route:
    """The costs of a route."""
    shares = tuple(_breakdown(work, network, spans))
    busy = dict(_busy(work, network, spans))
    slowest = max(busy, key=lambda name: busy[name])
    return Route(
        spans,
        sum(share.token_s for share in shares),
        sum(share.first_s for share in shares),
        1 / busy[slowest] if busy[slowest] else float("inf"),
        slowest,
        shares,
        tuple(_uses(work, network, spans)),
    )


def step_s(work: Work, network: Network, span: Span) -> float:
    """A machine's time for the layers of a decoded token."""
    return (work.units[span.end] - work.units[span.start]) * network.devices[span.device].layer_s


def prompt_s(work: Work, network: Network, span: Span) -> float:
    """A machine's time for the layers of a prompt."""
    device, more = network.devices[span.device], max(0, work.prompt_tokens - 1)
    return (work.units[span.end] - work.units[span.start]) * (device.layer_s + more * device.prefill_s)


def needed_bytes(work: Work, network: Network, span: Span) -> float:
    """The memory of a machine's process that has one range of layers."""
    device = network.devices[span.device]
    weights = work.weight_bytes[span.end] - work.weight_bytes[span.start]
    return device.base_bytes + device.weight_ratio * weights + work.kv_bytes[span.end] - work.kv_bytes[span.start]


def trip_s(network: Network, a: int, b: int, size: int) -> float:
    """From one machine to the next: delay, transfer, and what loss costs on average."""
    return sum(way.expected_s(size) for way in network.ways(a, b))


def open_s(network: Network, device: int) -> float:
    """The round trip that opens a session at a server."""
    link = network.links[CLIENT, device]
    return link.up.expected_s(OPEN_BYTES) + link.down.expected_s(OPENED_BYTES)


def _ends(work: Work, spans: tuple[Span, ...]) -> tuple[Span, Span]:
    """The client's bottom and top; without spans the bottom is everything."""
    n = work.n_layers
    start, end = (spans[0].start, spans[-1].end) if spans else (n, n)
    return Span(CLIENT, 0, start), Span(CLIENT, end, n)


def _breakdown(work: Work, network: Network, spans: tuple[Span, ...]) -> Iterator[Share]:
    client, (bottom, top) = network.devices[CLIENT], _ends(work, spans)
    yield Share(client.name, "around the layers", client.step_s, client.step_s + client.start_s)
    if spans:
        yield Share("open sessions", "", 0.0, max(open_s(network, span.device) for span in spans))
    yield _layers(work, network, bottom)
    far, before = [], bottom
    for span in spans:
        far += [_wire(work, network, before.device, span.device), _server(work, network, span)]
        before = span
    if spans:
        far.append(_wire(work, network, before.device, CLIENT))
        yield from far
        links_s = sum(share.token_s for share in far if not share.layers)
        servers = [(step_s(work, network, span), network.devices[span.device].overlap_share) for span in spans]
        hidden = hidden_s(client.overlapped_s, links_s, servers)
        yield Share("beside the client's own work", "", -hidden, 0.0)
        yield _layers(work, network, top)


def _layers(work: Work, network: Network, span: Span) -> Share:
    name = network.devices[span.device].name
    return Share(name, _range(span), step_s(work, network, span), prompt_s(work, network, span))


def _server(work: Work, network: Network, span: Span) -> Share:
    """A server's layers, with what a step takes beside them."""
    device, own = network.devices[span.device], _layers(work, network, span)
    first_s = own.first_s + device.step_s + device.start_s
    return Share(own.where, own.layers, own.token_s + device.step_s, first_s)


def _wire(work: Work, network: Network, a: int, b: int) -> Share:
    name = f"{network.devices[a].name} > {network.devices[b].name}"
    return Share(name, "", trip_s(network, a, b, work.step_bytes), trip_s(network, a, b, work.prompt_bytes))


def _busy(work: Work, network: Network, spans: tuple[Span, ...]) -> Iterator[tuple[str, float]]:
    """How long each machine and each way is busy with one token."""
    client, ends = network.devices[CLIENT], _ends(work, spans)
    yield client.name, client.step_s + sum(step_s(work, network, span) for span in ends)
    numbers = (CLIENT, *(span.device for span in spans), CLIENT)
    for span in spans:
        yield network.devices[span.device].name, network.devices[span.device].step_s + step_s(work, network, span)
    for a, b in zip(numbers, numbers[1:], strict=False) if spans else ():
        yield f"{network.devices[a].name} > {network.devices[b].name}", busy_s(work, network, a, b)


def busy_s(work: Work, network: Network, a: int, b: int) -> float:
    """How long the way from one machine to the next is busy with one token."""
    return max(way.transfer_s(work.step_bytes) for way in network.ways(a, b))


def _uses(work: Work, network: Network, spans: tuple[Span, ...]) -> Iterator[Use]:
    client, (bottom, top) = network.devices[CLIENT], _ends(work, spans)
    own = needed_bytes(work, network, bottom) + needed_bytes(work, network, top) - client.base_bytes
    layers = " ".join(_range(span) for span in (bottom, top) if span.start < span.end)
    yield Use(client.name, layers, own + work.around_bytes, client.memory_bytes)
    for span in spans:
        device = network.devices[span.device]
        yield Use(device.name, _range(span), needed_bytes(work, network, span), device.memory_bytes)


def _range(span: Span) -> str:
    return f"[{span.start}, {span.end})"
