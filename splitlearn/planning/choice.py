"""Which route to take, in words and as lines of config.yaml: what `splitlearn plan` says."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from splitlearn.config import Objective
from splitlearn.planning.advice import ERROR
from splitlearn.planning.network import CLIENT, Network, Work
from splitlearn.planning.route import Route, Span, predict
from splitlearn.planning.search import best_split

WORDS: dict[Objective, str] = {
    "tpot": "TPOT",
    "ttft": "TTFT",
    "memory": "memory of the client",
    "throughput": "tokens a second of many sessions",
}


@dataclass(frozen=True)
class Choice:
    """The client alone (`alone`, whether it fits or not), and the best route with servers; None if none fits."""

    work: Work
    network: Network
    objective: Objective
    alone: Route
    split: Route | None

    @property
    def best(self) -> Route | None:
        """The better one of those that fit."""
        if self.split is None or not self.alone.fits:
            return self.alone if self.alone.fits else self.split
        return self.split if self.cost(self.split) < self.cost(self.alone) else self.alone

    def cost(self, route: Route) -> float:
        """What the objective has least of."""
        return {
            "tpot": route.tpot_s,
            "ttft": route.ttft_s,
            "memory": route.client_memory_bytes,
            "throughput": 1 / route.tokens_per_s,
        }[self.objective]

    def as_json(self) -> dict[str, Any]:
        """The object of `plan --json`: seconds and bytes."""
        links = [
            {"between": [self.network.devices[each].name for each in pair], **link.as_json()}
            for pair, link in self.network.links.items()
        ]
        best = self.best
        return {
            "objective": self.objective,
            "says": sentence(self),
            "forward": self.network.forward,
            "prompt_tokens": self.work.prompt_tokens,
            "devices": [asdict(device) for device in self.network.devices],
            "links": links,
            "best": _json(self, best),
            "alone": _json(self, self.alone),
            "split": _json(self, self.split),
            "config": config_lines(self, best) if best else None,
        }


def choose(work: Work, network: Network, objective: Objective) -> Choice:
    """The choice between the client alone and the best route with servers."""
    return Choice(work, network, objective, predict(work, network, ()), best_split(work, network, objective))


def sentence(choice: Choice) -> str:
    """Whether one machine alone is better, with figures."""
    client, need = choice.network.devices[CLIENT].name, choice.alone.client_memory_bytes
    has = choice.alone.uses[0].memory_bytes
    if not choice.alone.fits:
        short = f"{client} alone needs {_mb(need)} and has {_mb(has)}"
        said = f"the best split: {path(choice, choice.split)}, {value(choice, choice.split)}" if choice.split else ""
        return f"The model must be split: {short}; {said}." if said else f"Nothing fits: {short}, and no split fits."
    if choice.split is None:
        return f"{client} alone it is, {value(choice, choice.alone)}: no split fits the memory of these machines."
    ratio = choice.cost(choice.split) / choice.cost(choice.alone)
    both = (
        f"{value(choice, choice.alone)} with {client} alone, {value(choice, choice.split)} with the best split "
        f"{path(choice, choice.split)} ({ratio:.2f} times the {'time' if choice.objective != 'memory' else 'memory'})"
    )
    if choice.objective != "memory" and 1 / ERROR < ratio < ERROR:
        return f"About the same, since predictions may be {ERROR - 1:.0%} off: {both}."
    return f"{'One machine alone is better' if ratio >= 1 else 'Splitting is better'}: {both}."


def value(choice: Choice, route: Route) -> str:
    """A route's figure for the objective."""
    figure = {
        "tpot": f"{route.tpot_s * 1e3:.1f} ms",
        "ttft": f"{route.ttft_s * 1e3:.0f} ms",
        "memory": _mb(route.client_memory_bytes),
        "throughput": f"{route.tokens_per_s:.1f}",
    }[choice.objective]
    return f"{WORDS[choice.objective]} {figure}"


def path(choice: Choice, route: Route) -> str:
    """The way of a token: laptop [0, 2) > desk [2, 28) > laptop [28, 30)."""
    n, names = choice.work.n_layers, [device.name for device in choice.network.devices]
    start, end = (route.spans[0].start, route.spans[-1].end) if route.spans else (n, n)
    spans = (Span(CLIENT, 0, start), *route.spans, *([Span(CLIENT, end, n)] if route.spans else []))
    return " > ".join(
        f"{names[span.device]} [{span.start}, {span.end})" if span.start < span.end else names[span.device]
        for span in spans
    )


def config_lines(choice: Choice, route: Route) -> str:
    """The lines of config.yaml, for the client and for each server. Empty for the client alone, which needs none."""
    return "\n".join(_lines(choice, route))


def _lines(choice: Choice, route: Route) -> Iterator[str]:
    devices, spans = choice.network.devices, route.spans
    if not spans:
        return
    servers = [devices[span.device] for span in spans]
    addresses = [server.address or f"{server.name}:50051" for server in servers]
    splits = [f"split: {{start: {span.start}, end: {span.end}}}" for span in spans]
    yield f"# {devices[CLIENT].name}, the client"
    if len(spans) == 1:
        yield from (splits[0], f"trunk: {{address: '{addresses[0]}'}}")
    else:
        yield from _chain(spans, addresses, forward=choice.network.forward)
    for server, split, following in zip(servers, splits, [*addresses[1:], None], strict=True):
        yield from (f"# {server.name}, a trunk server", split)
        if following and choice.network.forward:
            yield f"server: {{forward_to: {{addresses: ['{following}']}}}}"


def _chain(spans: Sequence[Span], addresses: Sequence[str], *, forward: bool) -> Iterator[str]:
    """The client's links to several servers, one after the other (docs/chain.md)."""
    yield from ("trunk:", "  address:")
    for span, address in zip(spans, addresses, strict=True):
        yield f"    - {{layers: [{span.start}, {span.end}], address: '{address}'}}"
    if not forward:
        yield "  forward: false"


def _json(choice: Choice, route: Route | None) -> dict[str, Any] | None:
    return {**asdict(route), "fits": route.fits, "path": path(choice, route)} if route else None


def _mb(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"
