"""From the time breakdown and the memory of a few runs to the rates that costs.py computes with.

The whole model in one process at the client and one split tell all: the same layers take c in both, so that
c = (model - bottom - top) / layers of the trunk, and what remains of bottom and top are embeddings, norm and head. The
memory of these two processes differs by the weights of the trunk's layers.
"""

from collections.abc import Callable, Sequence
from statistics import median

from splitlearn.arms.runs import ArmReport
from splitlearn.metrics import RunMetrics
from splitlearn.models.plan import SplitPlan
from splitlearn.planning.anatomy import Anatomy
from splitlearn.planning.costs import Rates, layer_bytes, units

COMPUTING = ("model", "bottom", "trunk", "top")
Reports = Sequence[ArmReport]


def rates_of(anatomy: Anatomy, full: Reports, whole: Reports, split: Reports, plan: SplitPlan, *, alike: bool) -> Rates:
    """The rates of runs that all answered the same request: of the full model, of the `whole` model with the client's
    flags (the same runs where these are the full model's), and of the split `plan`.

    `alike`: whether the trunk's process keeps weights as the client's does. Otherwise, all that it holds beyond its
    imports counts as weights.
    """
    layers = anatomy.layers
    parts = (layers[: plan.start], layers[plan.start : plan.end], layers[plan.end :])
    bottom, trunk, top = (units(anatomy, part) for part in parts)
    layer_s = max(0.0, (_over(whole, _decode("model")) - _over(split, _client)) / trunk)
    bottom_s = max(0.0, _over(split, _decode("bottom")) - bottom * layer_s)
    top_s = max(0.0, _over(split, _decode("top")) - top * layer_s)
    trunk_layer_s = _over(split, _trunk) / trunk
    some = split[0].metrics
    more = max(1, some.prompt_tokens - 1)
    prompt_s = _over(whole, _first("model")) - _over(whole, _decode("model"))
    trunk_prompt_s = _over(split, _first("trunk")) - _over(split, _trunk)
    client_base, client_ratio = _client_memory(anatomy, whole, split, plan)
    trunk_base, trunk_ratio = _trunk_memory(anatomy, split, plan, client_ratio if alike else None)
    return Rates(
        client_layer_s=layer_s,
        trunk_layer_s=trunk_layer_s,
        bottom_s=bottom_s,
        top_s=top_s,
        around_s=_over(split, _around),
        overlapped_s=_over(split, _overlapped),
        client_prefill_s=max(0.0, prompt_s) / more / anatomy.n_layers,
        trunk_prefill_s=max(0.0, trunk_prompt_s) / more / trunk,
        start_s=_over(split, _start),
        bytes_up=_over(split, lambda metrics: metrics.decode_bytes_up / _steps(metrics)),
        bytes_down=_over(split, lambda metrics: metrics.decode_bytes_down / _steps(metrics)),
        prompt_token_bytes=(some.bytes_down - some.decode_bytes_down) / some.prompt_tokens,
        prompt_tokens=some.prompt_tokens,
        context=some.prompt_tokens + some.n_tokens,
        client_base_bytes=client_base,
        client_weight_ratio=client_ratio,
        trunk_base_bytes=trunk_base,
        trunk_weight_ratio=trunk_ratio,
        import_bytes=split[0].import_rss_bytes,
        full_tpot_s=_over(full, lambda metrics: metrics.tpot_s or 0.0),
        full_ttft_s=_over(full, lambda metrics: metrics.ttft_s),
        full_memory_bytes=_peak(full),
    )


def _steps(metrics: RunMetrics) -> int:
    return max(1, len(metrics.itl_s))


def _over(reports: Reports, of: Callable[[RunMetrics], float]) -> float:
    return median(of(report.metrics) for report in reports)


def _decode(word: str) -> Callable[[RunMetrics], float]:
    """Seconds per decoded token of a part of the time breakdown."""
    return lambda metrics: metrics.decode_ledger.get(word, 0.0) / _steps(metrics)


def _first(word: str) -> Callable[[RunMetrics], float]:
    """Seconds of a part of the time breakdown up to the first token."""
    return lambda metrics: metrics.ledger.get(word, 0.0) - metrics.decode_ledger.get(word, 0.0)


def _client(metrics: RunMetrics) -> float:
    return _decode("bottom")(metrics) + _decode("top")(metrics)


def _around(metrics: RunMetrics) -> float:
    return sum(_decode(word)(metrics) for word in metrics.decode_ledger if word not in COMPUTING)


def _start(metrics: RunMetrics) -> float:
    return sum(_first(word)(metrics) for word in metrics.ledger if word not in COMPUTING)


def _overlapped(metrics: RunMetrics) -> float:
    return metrics.overlapped_s / _steps(metrics)


def _trunk(metrics: RunMetrics) -> float:
    """The trunk's own time, with what passed while the client worked."""
    return _decode("trunk")(metrics) + _overlapped(metrics)


def _peak(reports: Reports) -> int:
    return max(report.peak_rss_bytes for report in reports)


def _client_memory(anatomy: Anatomy, whole: Reports, split: Reports, plan: SplitPlan) -> tuple[float, float]:
    """client_base_bytes and client_weight_ratio."""
    trunk = layer_bytes(anatomy, anatomy.layers[plan.start : plan.end])
    own = layer_bytes(anatomy, anatomy.layers) - trunk
    ratio = max(0.0, (_peak(whole) - _peak(split)) / trunk)
    return _peak(split) - ratio * own, ratio


def _trunk_memory(anatomy: Anatomy, split: Reports, plan: SplitPlan, ratio: float | None) -> tuple[float, float]:
    """trunk_base_bytes and trunk_weight_ratio."""
    said = [report.trunk for report in split if report.trunk]
    peak, imports = max(facts.peak_rss_bytes for facts in said), max(facts.import_rss_bytes for facts in said)
    weights = layer_bytes(anatomy, anatomy.layers[plan.start : plan.end])
    ratio = (peak - imports) / weights if ratio is None else ratio
    return peak - ratio * weights, ratio
