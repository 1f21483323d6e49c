"""The model's anatomy as HTML: facts with their definitions, and a table of the parts of a split."""

from collections import Counter
from collections.abc import Callable, Iterable
from html import escape

from splitlearn.models.plan import SplitPlan
from splitlearn.planning.anatomy import Anatomy, Layer, Rope, kv_values, parts_of
from ui import html
from ui.format import size

NO_LIMIT = 2048
"""Tokens for which sizes are shown if the model has no context limit."""
ATTENTION = (
    "How heads share keys and values. MHA: each has its own. MQA: all share one (Shazeer 2019, arXiv:1911.02150). GQA: "
    "a group shares one (Ainslie et al. 2023, arXiv:2305.13245). MLA: keys and values are made of one small vector "
    "(DeepSeek-AI 2024, arXiv:2405.04434). Fewer make a smaller KV cache."
)
FLOPS = (
    "Of the next token with a full context: 2 × parameters of matrix products + 4 × tokens × heads × head size for "
    "each layer (PaLM, Chowdhery et al. 2022, arXiv:2204.02311, appendix B, the forward alone)."
)
KV = (
    "What one token leaves in the caches of all layers: 2 × KV heads × head size × bytes of a number, for each layer "
    "(Pope et al. 2022, arXiv:2211.05102)."
)


def context_of(anatomy: Anatomy) -> int:
    """Tokens of a full context."""
    return anatomy.context or NO_LIMIT


def facts(anatomy: Anatomy) -> str:
    """Tiles with the model's figures and their definitions."""
    tiles = (html.tile(name, escape(value), definition, "model") for name, value, definition in _facts(anatomy))
    return f'<dl class="sl-tiles">{"".join(tiles)}</dl>'


def parts(anatomy: Anatomy, plan: SplitPlan) -> str:
    """A table of the parts of the split, at a full context."""
    full = f"{context_of(anatomy):,} tokens"
    head = html.head_row(
        "Part", "layers", "parameters", "weights", "KV cache per token", f"KV cache, {full}", f"FLOPs per token, {full}"
    )
    rows = [
        (
            part.name,
            part.layers,
            f"{part.parameters:,}",
            size(part.weight_bytes),
            size(part.kv_bytes_per_token),
            size(part.kv_bytes),
            count(part.decode_flops),
        )
        for part in parts_of(anatomy, plan, context_of(anatomy))
    ]
    return html.table(head, rows, "Parts of the split")


def count(number: float) -> str:
    """A large number in three digits: 134 M, 1.1 G."""
    for unit in ("", "k", "M"):
        if number < 1000:
            return f"{number:.3g} {unit}".strip()
        number /= 1000
    return f"{number:.3g} G" if number < 1000 else f"{number / 1000:.3g} T"


def _facts(a: Anatomy) -> Iterable[tuple[str, str, str]]:
    """Name, value and definition."""
    context, tied = context_of(a), "tied with the LM head" if a.tied else "and the LM head's apart"
    kv_bytes = kv_values(a.layers) * a.bytes_per_value
    *_, whole = parts_of(a, SplitPlan(0, a.n_layers, a.n_layers), context)
    yield "Parameters", f"{a.parameters:,}", f"Counted on {a.architecture} as it is built; tied ones count once."
    yield "Weights", size(a.parameters * a.bytes_per_value), f"Parameters × {a.bytes_per_value} bytes ({a.dtype})."
    yield "Layers", str(a.n_layers), "Attention and MLP, one after the other. A cut goes between two layers."
    yield "Hidden size", f"{a.hidden_size:,}", "Numbers in the hidden state of a token: all that crosses a cut."
    yield "Attention", _each(a.layers, _attention), ATTENTION
    yield "Positions", _positions(a), _rope_definition(a)
    yield "Norm", _each(a.layers, lambda layer: layer.norm or "none"), NORM
    yield "MLP", _each(a.layers, _mlp), MLP
    yield "Vocabulary", f"{a.vocabulary:,}", f"Different tokens. The embeddings are {tied}."
    yield "Context", f"{a.context:,} tokens" if a.context else "no limit", "Most tokens of prompt and answer together."
    yield "KV cache per token", size(kv_bytes), KV
    yield "KV cache, full context", size(kv_bytes * context), f"KV bytes per token × {context:,} tokens."
    yield "FLOPs per token", count(whole.decode_flops), FLOPS
    wire = f"Hidden size × {a.bytes_per_value} bytes, without 70 bytes around it. The flag wire_dtype makes it less."
    yield "A token on the wire", f"{size(a.hidden_size * a.bytes_per_value)} each way", wire


NORM = (
    "Keeps the hidden state's size in bounds. RMSNorm divides by the root mean square (Zhang and Sennrich 2019, "
    "arXiv:1910.07467), LayerNorm subtracts the mean first."
)
MLP = (
    "The layer's feed-forward part. Gated: act(gate(x)) × up(x), such as SwiGLU (Shazeer 2020, arXiv:2002.05202). Of "
    "several experts a token goes through the active ones alone."
)


def _each(layers: Iterable[Layer], of: Callable[[Layer], str]) -> str:
    """`of` of the layers; where they differ, each text with its number of layers."""
    found = Counter(map(of, layers))
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{text} ({number} layers)" for text, number in found.items())


def _attention(layer: Layer) -> str:
    if not layer.attention:
        return "none"
    sizes = f"{layer.key_size}" if layer.key_size == layer.value_size else f"{layer.key_size} and {layer.value_size}"
    window = f", window {layer.window:,}" if layer.window else ""
    return f"{layer.attention}: {layer.heads} heads of {sizes}, {layer.kv_heads} for keys and values{window}"


def _mlp(layer: Layer) -> str:
    mlp = layer.mlp
    experts = f", {mlp.active} of {mlp.experts} experts" if mlp.experts > 1 else ""
    return f"{'gated ' if mlp.gated else ''}{mlp.activation}, {mlp.width:,} wide{experts}"


def _positions(a: Anatomy) -> str:
    return "; ".join(map(_rope, a.rope)) if a.rope else a.positions


def _rope(rope: Rope) -> str:
    theta = f", theta {rope.theta:,.0f}" if rope.theta else ""
    scaled = "not scaled" if rope.type == "default" else f"scaled: {rope.type}"
    factor = f" by {rope.factor:g}" if rope.factor else ""
    share = f", {rope.share:.0%} of a head" if rope.share < 1 else ""
    return f"{rope.layers + ': ' if rope.layers else ''}RoPE{theta}, {scaled}{factor}{share}"


def _rope_definition(a: Anatomy) -> str:
    if not a.rope:
        return "How a layer knows the order of the tokens."
    return (
        "Rotary position embeddings turn queries and keys by their position (Su et al. 2021, arXiv:2104.09864). A "
        "scaled type stretches the turns over more tokens than the model was first trained with."
    )
