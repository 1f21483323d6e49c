"""What each cut of a model costs: time, bytes and memory of every trunk range [start, end), from measured rates.

    found = cut_costs(anatomy, rates, Link(rtt_ms=20), context=2048)
    front = pareto(found)                           # no other cut is both faster and smaller at the client
    chosen = best(found, client_memory_bytes=700e6)

Pure functions on records: no torch, and no clock. docs/planning.md has the formulas and how far off they are.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from splitlearn.link.emulated import Link
from splitlearn.link.prediction import OPEN_BYTES, OPENED_BYTES
from splitlearn.planning.anatomy import Anatomy, Layer, decode_flops, kv_values


@dataclass(frozen=True)
class Rates:
    """What was measured on the client's and the trunk's machine, with some flags. Times in seconds.

    A decode step takes `bottom_s` (embeddings), `top_s` (norm, head), `*_layer_s` for each layer, and `around_s` for
    the rest: encoding, the measured link, sampling. For `overlapped_s` the client still works itself when a step has
    left it. While the trunk computes, it gains `overlap_share` of that: less than 1 where both share processors. The
    first step takes `start_s` for the rest, and `*_prefill_s` for each layer and each token of the prompt after the
    first. Of the rest, `hop_s` and `hop_start_s` are messages and the measured link.

    Peak memory of a process is `*_base_bytes` and `*_weight_ratio` times the weights of its layers. `full_*` are those
    of the whole model in one process at the client. `context` tokens were in the cache in the end. Other programs used
    `others_cpu` cores meanwhile: with more than a fraction of one, times are longer than on a quiet machine.
    """

    client_layer_s: float
    trunk_layer_s: float
    bottom_s: float
    top_s: float
    around_s: float
    overlapped_s: float
    overlap_share: float
    client_prefill_s: float
    trunk_prefill_s: float
    start_s: float
    bytes_up: float
    bytes_down: float
    prompt_token_bytes: float
    prompt_tokens: int
    context: int
    client_base_bytes: float
    client_weight_ratio: float
    trunk_base_bytes: float
    trunk_weight_ratio: float
    import_bytes: int
    full_tpot_s: float
    full_ttft_s: float
    full_memory_bytes: int
    others_cpu: float = 0.0
    hop_s: float = 0.0
    hop_start_s: float = 0.0


@dataclass(frozen=True)
class CutCost:
    """What a trunk of the layers `[start, end)` costs. Memory is the peak of a process, its imports included.

    Bytes up and down are those of a decoded token. `client_compute_share` is the client's part of a token's FLOPs.
    """

    start: int
    end: int
    tpot_s: float
    ttft_s: float
    bytes_up: float
    bytes_down: float
    client_weight_bytes: int
    client_memory_bytes: float
    client_kv_bytes: int
    trunk_weight_bytes: int
    trunk_memory_bytes: float
    trunk_kv_bytes: int
    client_compute_share: float


def cut_costs(anatomy: Anatomy, rates: Rates, link: Link, context: int) -> tuple[CutCost, ...]:
    """The costs of every cut, over `link` in addition to the one that was measured; memory for `context` tokens.

    Cuts with as many layers on either side come first, so that of equal ones these are chosen.
    """
    n = anatomy.n_layers
    ranges = [(start, end) for start in range(n) for end in range(start + 1, n + 1)]
    ranges.sort(key=lambda each: abs(each[0] - (n - each[1])))
    return tuple(cut_cost(anatomy, rates, link, context, start, end) for start, end in ranges)


def cut_cost(anatomy: Anatomy, rates: Rates, link: Link, context: int, start: int, end: int) -> CutCost:
    """The costs of one cut."""
    bottom, trunk, top = anatomy.layers[:start], anatomy.layers[start:end], anatomy.layers[end:]
    client, size = (*bottom, *top), anatomy.bytes_per_value
    around = anatomy.entrance + anatomy.exit + anatomy.shared + anatomy.everywhere
    weights, trunk_weights = layer_bytes(anatomy, client), layer_bytes(anatomy, trunk)
    kv, trunk_kv = kv_values(client) * size, kv_values(trunk) * size
    more = max(0, context - rates.context)
    head = 2 * (anatomy.entrance_matmul_parameters + anatomy.exit_matmul_parameters)
    return CutCost(
        start=start,
        end=end,
        tpot_s=tpot_s(anatomy, rates, link, start, end),
        ttft_s=_ttft_s(anatomy, rates, link, start, end),
        bytes_up=rates.bytes_up,
        bytes_down=rates.bytes_down,
        client_weight_bytes=weights + around * size,
        client_memory_bytes=rates.client_base_bytes + rates.client_weight_ratio * weights + kv * more,
        client_kv_bytes=kv * context,
        trunk_weight_bytes=trunk_weights + anatomy.everywhere * size,
        trunk_memory_bytes=rates.trunk_base_bytes + rates.trunk_weight_ratio * trunk_weights + trunk_kv * more,
        trunk_kv_bytes=trunk_kv * context,
        client_compute_share=(decode_flops(client, context) + head) / (decode_flops(anatomy.layers, context) + head),
    )


def tpot_s(anatomy: Anatomy, rates: Rates, link: Link, start: int, end: int) -> float:
    """TPOT = client + link + trunk - hidden + around. The link's time is RTT + 8 * bytes / bandwidth
    (docs/results/links.md)."""
    trunk_s = trunk_step_s(anatomy, rates, start, end)
    link_s = link.up.expected_s(round(rates.bytes_up)) + link.down.expected_s(round(rates.bytes_down))
    away_s = link_s + trunk_s - hidden_s(rates.overlapped_s, link_s, [(trunk_s, rates.overlap_share)])
    return client_step_s(anatomy, rates, start, end) + away_s + rates.around_s


def hidden_s(overlapped_s: float, link_s: float, servers: Iterable[tuple[float, float]]) -> float:
    """How much of a step's time away from the client its own work hides: of the links all of it, then of each server's
    time the server's share."""
    hidden = min(overlapped_s, link_s)
    left = overlapped_s - hidden
    for time_s, share in servers:
        beside = min(left, time_s)
        hidden, left = hidden + share * beside, left - beside
    return hidden


def client_step_s(anatomy: Anatomy, rates: Rates, start: int, end: int) -> float:
    """The client's computing for a token: embeddings, its layers, norm and head."""
    layers = units(anatomy, anatomy.layers[:start]) + units(anatomy, anatomy.layers[end:])
    return rates.bottom_s + rates.top_s + layers * rates.client_layer_s


def trunk_step_s(anatomy: Anatomy, rates: Rates, start: int, end: int) -> float:
    """The trunk's computing for a token."""
    return units(anatomy, anatomy.layers[start:end]) * rates.trunk_layer_s


def _ttft_s(anatomy: Anatomy, rates: Rates, link: Link, start: int, end: int) -> float:
    """Opening a session takes a round trip, and the prompt another one, with a hidden state for each of its tokens."""
    prompt, more = round(rates.prompt_tokens * rates.prompt_token_bytes), rates.prompt_tokens - 1
    trunk = units(anatomy, anatomy.layers[start:end])
    near = client_step_s(anatomy, rates, start, end)
    near += (units(anatomy, anatomy.layers) - trunk) * more * rates.client_prefill_s
    far = trunk_step_s(anatomy, rates, start, end) + trunk * more * rates.trunk_prefill_s
    opening = link.up.expected_s(OPEN_BYTES) + link.down.expected_s(OPENED_BYTES)
    wire = opening + link.up.expected_s(prompt) + link.down.expected_s(prompt)
    return near + far + wire + rates.start_s


def units(anatomy: Anatomy, layers: Iterable[Layer]) -> float:
    """How many layers these are, counted by what is multiplied in each: 1 is the model's mean layer."""
    mean = sum(layer.matmul_parameters for layer in anatomy.layers) / anatomy.n_layers
    return sum(layer.matmul_parameters for layer in layers) / mean


def layer_bytes(anatomy: Anatomy, layers: Iterable[Layer]) -> int:
    """Bytes of the weights of these layers, as the dtype has them."""
    return sum(layer.parameters for layer in layers) * anatomy.bytes_per_value


def pareto(found: Iterable[CutCost]) -> tuple[CutCost, ...]:
    """The cuts of which no other one has both less TPOT and less client memory, from the smallest client on."""
    front: list[CutCost] = []
    for each in sorted(found, key=lambda cost: (cost.client_memory_bytes, cost.tpot_s)):
        if not front or each.tpot_s < front[-1].tpot_s:
            front.append(each)
    return tuple(front)


def best(found: Sequence[CutCost], client_memory_bytes: float) -> CutCost | None:
    """The fastest cut whose client fits in so much memory, of equal ones the smallest; None if none fits."""
    fits = [cost for cost in found if cost.client_memory_bytes <= client_memory_bytes]
    return min(fits, key=lambda cost: (cost.tpot_s, cost.client_memory_bytes), default=None)
