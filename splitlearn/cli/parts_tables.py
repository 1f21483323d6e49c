"""What `splitlearn parts` prints to read."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from splitlearn.cli.tables import in_bytes
from splitlearn.planning.anatomy import Anatomy, Layer, Part, Rope
from splitlearn.planning.measure import CutRun
from splitlearn.planning.report import CutReport
from splitlearn.runtime.console import PlainTable, console
from splitlearn.runtime.terminal import say


def print_anatomy(model: Anatomy) -> None:
    """The whole model in a few lines, and a row for each run of equal layers."""
    context = f"{model.context:,} tokens" if model.context else "without a limit"
    tied = "tied embeddings" if model.tied else "embeddings and LM head apart"
    positions = "; ".join([f"{model.positions} positions", *map(_rope, model.rope)])
    say(f"{model.model}: {model.architecture}, {model.parameters:,} parameters in {model.dtype}")
    say(f"{model.n_layers} layers, hidden size {model.hidden_size:,}, vocabulary {model.vocabulary:,} ({tied})")
    say(f"context {context}; {positions}")
    table = PlainTable("layers", "attention", "heads", "window", "MLP", "norm", "parameters each")
    for start, end, layer in _runs(model.layers):
        window = f"{layer.window:,}" if layer.window else "all"
        where = f"[{start}, {end})"
        table.add_row(where, layer.attention, _heads(layer), window, _mlp(layer), layer.norm, f"{layer.parameters:,}")
    console().print(table)


def print_parts(found: Sequence[Part], context: int) -> None:
    """What each part holds, and computes for a token."""
    heads = ("part", "layers", "parameters", "weights", "KV per token", f"KV at {context:,}")
    table = PlainTable(*heads, "wire per token", f"FLOPs per token at {context:,}")
    for part in found:
        sizes = (part.weight_bytes, part.kv_bytes_per_token, part.kv_bytes, part.wire_bytes_per_token)
        table.add_row(
            part.name, part.layers, f"{part.parameters:,}", *map(in_bytes, sizes), f"{part.decode_flops / 1e6:,.0f} M"
        )
    console().print(table)


def print_cuts(report: CutReport) -> None:
    """The advice, and a row for each cut on the Pareto front, for the configured one and for each measured one.

    Cuts with as many layers in the trunk cost about the same, and are one row.
    """
    say(report.advice.does_it_help)
    say(report.advice.where_to_cut)
    say(f"Predicted for {report.context:,} tokens and the link: {report.link.summary}.")
    say("* marks the cuts of which no other one has both a lower TPOT and a smaller client.")
    heads = ["trunk layers", "TPOT", "TTFT", "client memory", "trunk memory", "trunk KV", "client computes"]
    runs = {(run.start, run.end): run for run in report.measured}
    table = PlainTable(*heads, *(["TPOT measured", "client measured", "trunk measured"] if runs else []))
    front = {(cost.start, cost.end) for cost in report.front}
    rows = front | set(runs) | {(report.plan.start, report.plan.end)}
    for start, end in sorted(rows, key=lambda each: (each[0] - each[1], each[0])):
        cost, run = report.cost(start, end), runs.get((start, end))
        table.add_row(
            f"[{start}, {end}){' *' if (start, end) in front else ''}",
            *(f"{seconds * 1e3:.1f} ms" for seconds in (cost.tpot_s, cost.ttft_s)),
            *map(in_bytes, (cost.client_memory_bytes, cost.trunk_memory_bytes, cost.trunk_kv_bytes)),
            f"{cost.client_compute_share:.0%}",
            *(_measured(run) if run else ()),
        )
    console().print(table)


def _measured(run: CutRun) -> tuple[str, ...]:
    return f"{run.tpot_s * 1e3:.1f} ms", in_bytes(run.client_memory_bytes), in_bytes(run.trunk_memory_bytes)


def _runs(layers: Sequence[Layer]) -> Iterator[tuple[int, int, Layer]]:
    """Neighbouring layers that are alike."""
    for _, alike in groupby(layers, key=lambda layer: {**vars(layer), "number": 0}):
        run = list(alike)
        yield run[0].number, run[-1].number + 1, run[0]


def _heads(layer: Layer) -> str:
    size = str(layer.key_size) if layer.key_size == layer.value_size else f"{layer.key_size} and {layer.value_size}"
    return f"{layer.heads} of size {size}, {layer.kv_heads} for KV"


def _mlp(layer: Layer) -> str:
    mlp = layer.mlp
    experts = f", {mlp.active} of {mlp.experts} experts" if mlp.experts > 1 else ""
    return f"{'gated ' if mlp.gated else ''}{mlp.activation} {mlp.width:,}{experts}"


def _rope(rope: Rope) -> str:
    factor = f" by {rope.factor:g}" if rope.factor else ""
    theta = f", theta {rope.theta:g}" if rope.theta else ""
    share = f", {rope.share:.0%} of a head" if rope.share < 1 else ""
    return f"{rope.layers + ': ' if rope.layers else ''}RoPE {rope.type}{factor}{theta}{share}"
