"""What `splitlearn parts` prints for people."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from splitlearn.cli.tables import in_bytes
from splitlearn.planning.anatomy import Anatomy, Layer, Part, Rope
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


def _runs(layers: Sequence[Layer]) -> Iterator[tuple[int, int, Layer]]:
    """Neighbouring layers that are alike."""
    for _, alike in groupby(layers, key=lambda layer: {**vars(layer), "number": 0}):
        run = list(alike)
        yield run[0].number, run[-1].number + 1, run[0]


def _heads(layer: Layer) -> str:
    size = str(layer.key_size) if layer.key_size == layer.value_size else f"{layer.key_size} and {layer.value_size}"
    return f"{layer.heads} of {size}, {layer.kv_heads} for KV"


def _mlp(layer: Layer) -> str:
    mlp = layer.mlp
    experts = f", {mlp.active} of {mlp.experts} experts" if mlp.experts > 1 else ""
    return f"{'gated ' if mlp.gated else ''}{mlp.activation} {mlp.width:,}{experts}"


def _rope(rope: Rope) -> str:
    factor = f" by {rope.factor:g}" if rope.factor else ""
    theta = f", theta {rope.theta:g}" if rope.theta else ""
    share = f", {rope.share:.0%} of a head" if rope.share < 1 else ""
    return f"{rope.layers + ': ' if rope.layers else ''}RoPE {rope.type}{factor}{theta}{share}"
