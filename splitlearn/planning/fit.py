"""From the time breakdown and the memory of a few runs to the rates that costs.py computes with.

The whole model in one process at the client and one split tell all: the same layers take c in both, so that
c = (model - bottom - top) / layers of the trunk, and what remains of bottom and top are embeddings, norm and head. The
memory of these two processes differs by the weights of the trunk's layers.

Of several runs the quickest counts: other programs can only make one slower.
"""

from collections.abc import Mapping, Sequence

from splitlearn.arms.report import ArmReport
from splitlearn.metrics import RunMetrics
from splitlearn.models.plan import SplitPlan
from splitlearn.planning.anatomy import Anatomy
from splitlearn.planning.costs import Rates, layer_bytes, units

COMPUTING = ("model", "bottom", "trunk", "top")
HOP = ("open", "encode", "wire", "queue", "decode")
"""What goes to and comes from a trunk takes."""
Reports = Sequence[ArmReport]


def rates_of(anatomy: Anatomy, found: Mapping[str, Reports], plan: SplitPlan, *, alike: bool) -> Rates:
    """The rates of runs that all answered the same request: `full` is the full model, `split` has the trunk of `plan`.

    `whole` is the whole model with the client's flags, where these are others than the full model's. `in_turn` is the
    split without `head_overlap`, where it has that flag: client and trunk never work at once.

    `alike`: whether the trunk's process keeps weights as the client's does. Otherwise, all that it holds beyond its
    imports counts as weights.
    """
    full, split = found["full"], found["split"]
    whole, in_turn = found.get("whole", full), found.get("in_turn", split)
    layers = anatomy.layers
    parts = (layers[: plan.start], layers[plan.start : plan.end], layers[plan.end :])
    bottom, trunk, top = (units(anatomy, part) for part in parts)
    one, other, full_run = _quickest(whole), _quickest(in_turn), _quickest(full)
    layer_s = max(0.0, (_decode(one, "model") - _decode(other, "bottom") - _decode(other, "top")) / trunk)
    start, more = _first_quickest(split), max(1, other.prompt_tokens - 1)
    prompt_s = _first(_first_quickest(whole), "model") - _decode(one, "model")
    trunk_prompt_s = _first(start, "trunk") - _trunk(other)
    client_base, client_ratio = _client_memory(anatomy, whole, split, plan)
    trunk_base, trunk_ratio = _trunk_memory(anatomy, split, plan, client_ratio if alike else None)
    overlapped_s, overlap_share = _overlap(_quickest(split), other)
    return Rates(
        client_layer_s=layer_s,
        trunk_layer_s=_trunk(other) / trunk,
        bottom_s=max(0.0, _decode(other, "bottom") - bottom * layer_s),
        top_s=max(0.0, _decode(other, "top") - top * layer_s),
        around_s=sum(_decode(other, word) for word in other.decode_ledger if word not in COMPUTING),
        overlapped_s=overlapped_s,
        overlap_share=overlap_share,
        client_prefill_s=max(0.0, prompt_s) / more / anatomy.n_layers,
        trunk_prefill_s=max(0.0, trunk_prompt_s) / more / trunk,
        start_s=sum(_first(start, word) for word in start.ledger if word not in COMPUTING),
        bytes_up=other.decode_bytes_up / _steps(other),
        bytes_down=other.decode_bytes_down / _steps(other),
        prompt_token_bytes=(other.bytes_down - other.decode_bytes_down) / other.prompt_tokens,
        prompt_tokens=other.prompt_tokens,
        context=other.prompt_tokens + other.n_tokens,
        client_base_bytes=client_base,
        client_weight_ratio=client_ratio,
        trunk_base_bytes=trunk_base,
        trunk_weight_ratio=trunk_ratio,
        import_bytes=split[0].import_rss_bytes,
        full_tpot_s=full_run.tpot_s or 0.0,
        full_ttft_s=_first_quickest(full).ttft_s,
        full_memory_bytes=_peak(full),
        hop_s=sum(_decode(other, word) for word in HOP),
        hop_start_s=sum(_first(start, word) for word in HOP),
    )


def _overlap(split: RunMetrics, in_turn: RunMetrics) -> tuple[float, float]:
    """overlapped_s and overlap_share.

    What the client does beside the trunk takes it longer there, where both share processors; in turn it takes what the
    top does without the part of it that is not beside the trunk.
    """
    alone_s = max(0.0, _decode(in_turn, "top") - _decode(split, "top") + _overlapped(split))
    gained_s = (in_turn.tpot_s or 0.0) + _overlapped(in_turn) - (split.tpot_s or 0.0)
    return alone_s, min(1.0, max(0.0, gained_s / alone_s)) if alone_s else 1.0


def _quickest(reports: Reports) -> RunMetrics:
    return min((report.metrics for report in reports), key=lambda metrics: metrics.tpot_s or 0.0)


def _first_quickest(reports: Reports) -> RunMetrics:
    """The run with the least TTFT."""
    return min((report.metrics for report in reports), key=lambda metrics: metrics.ttft_s)


def _steps(metrics: RunMetrics) -> int:
    return max(1, len(metrics.itl_s))


def _decode(metrics: RunMetrics, word: str) -> float:
    """Seconds per decoded token of a part of the time breakdown."""
    return metrics.decode_ledger.get(word, 0.0) / _steps(metrics)


def _first(metrics: RunMetrics, word: str) -> float:
    """Seconds of a part of the time breakdown up to the first token."""
    return metrics.ledger.get(word, 0.0) - metrics.decode_ledger.get(word, 0.0)


def _overlapped(metrics: RunMetrics) -> float:
    return metrics.overlapped_s / _steps(metrics)


def _trunk(metrics: RunMetrics) -> float:
    """The trunk's own time, with what passed while the client worked."""
    return _decode(metrics, "trunk") + _overlapped(metrics)


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
