"""What a model is made of: its layers, parameters, FLOPs and KV cache, of the whole and of each part of a split.

    anatomy = read(files, "float32")            # a child process with torch reads it: half a second
    for part in parts_of(anatomy, plan, context=2048): ...

Records and formulas alone, so that the page's process needs no torch. Parameters are counted on the architecture as it
is built, and KV values are those that a forward of it leaves in a cache; docs/planning.md has the formulas' sources.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.models.plan import SplitPlan
from splitlearn.runtime import process

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Of one number, by the config's names of dtypes."""


@dataclass(frozen=True)
class Mlp:
    """A layer's feed-forward part. `gated` is act(gate(x)) * up(x) (SwiGLU and its like), otherwise act(up(x)).

    `width` is the size between the projections, of one expert where there are several. A token goes through `active` of
    `experts`; both are 1 without a mixture of experts.
    """

    gated: bool
    activation: str
    width: int
    experts: int
    active: int


@dataclass(frozen=True)
class Layer:
    """One layer. `attention` is MHA, MQA, GQA, MLA, or empty for a layer without.

    `key_size` and `value_size` are the sizes of a head, `kv_values` the numbers that one token leaves in the KV cache,
    `window` the tokens that attention sees (None: all). `matmul_parameters` are those that a token is multiplied with:
    of experts the active ones. `expanding_parameters` make keys and values of what MLA keeps of a token, for each token
    in the cache anew.
    """

    number: int
    attention: str
    heads: int
    kv_heads: int
    key_size: int
    value_size: int
    window: int | None
    mlp: Mlp
    norm: str
    parameters: int
    matmul_parameters: int
    expanding_parameters: int
    kv_values: int


@dataclass(frozen=True)
class Rope:
    """Rotary positions, by transformers' names; `layers` is the kind of layers that have them, empty for all.
    `factor` and `original_context` belong to a scaled type, `share` is the part of a head that is rotated."""

    layers: str
    type: str
    theta: float | None
    factor: float | None
    original_context: int | None
    share: float


@dataclass(frozen=True)
class Anatomy:
    """A whole model. `positions` is rotary, learned, ALiBi or other; `context` None is no limit.

    Parameters outside the layers: `entrance` (embeddings and what else runs before the layers), `exit` (final norm and
    LM head), `shared` by both (a tied embedding), and `everywhere` (in each part of a split). `exit_matmul_parameters`
    are those of the head, a tied one's too.
    """

    model: str
    family: str
    architecture: str
    dtype: str
    hidden_size: int
    vocabulary: int
    context: int | None
    positions: str
    rope: tuple[Rope, ...]
    tied: bool
    layers: tuple[Layer, ...]
    entrance: int
    exit: int
    shared: int
    everywhere: int
    entrance_matmul_parameters: int
    exit_matmul_parameters: int

    @property
    def n_layers(self) -> int:
        """Layers of the whole model."""
        return len(self.layers)

    @property
    def bytes_per_value(self) -> int:
        """Of a weight, an activation and a number in the KV cache."""
        return BYTES[self.dtype]

    @property
    def parameters(self) -> int:
        """Of the whole model; a tied embedding counts once."""
        return self.entrance + self.exit + self.shared + self.everywhere + sum(_parameters(self.layers))


@dataclass(frozen=True)
class Part:
    """Sizes of one part of a split. FLOPs are those of the next token after `context`, and of a prompt of `context`
    tokens; `kv_bytes` are those of `context` tokens. `wire_bytes_per_token` goes both ways together, without what is
    around it."""

    name: str
    layers: str
    n_layers: int
    parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    kv_bytes: int
    wire_bytes_per_token: int
    decode_flops: int
    prefill_flops: int


def read(files: ModelFiles, dtype: str) -> Anatomy:
    """The anatomy of a model, from a child process that has torch; no weights are read. Raises FamilyRefused for an
    architecture whose structure cannot be read."""
    found: Anatomy = process.ask(
        "The process that reads the model", "splitlearn.planning.anatomy_main:answer", files, dtype
    )
    return found


def parts_of(anatomy: Anatomy, plan: SplitPlan, context: int) -> tuple[Part, ...]:
    """The client's bottom and top, the whole client, the trunk, and the full model."""
    n, start, end = plan.n_layers, plan.start, plan.end
    bottom, trunk, top = anatomy.layers[:start], anatomy.layers[start:end], anatomy.layers[end:]
    a, hidden = anatomy, anatomy.hidden_size * anatomy.bytes_per_value
    entrance, head = a.entrance_matmul_parameters, a.exit_matmul_parameters

    def part(name: str, where: str, layers: tuple[Layer, ...], own: int, around: tuple[int, int], wire: int) -> Part:
        parameters = own + a.everywhere + sum(_parameters(layers))
        kv_bytes = kv_values(layers) * a.bytes_per_value
        return Part(
            name,
            where,
            len(layers),
            parameters,
            parameters * a.bytes_per_value,
            kv_bytes,
            kv_bytes * context,
            wire,
            decode_flops(layers, context) + 2 * sum(around),
            prefill_flops(layers, context) + 2 * (around[0] * context + around[1]),
        )

    whole = a.entrance + a.exit + a.shared
    ends = f"{_range(0, start)} {_range(end, n)}"
    return (
        part("client bottom", _range(0, start), bottom, a.entrance + a.shared, (entrance, 0), hidden),
        part("client top", _range(end, n), top, a.exit + a.shared, (0, head), hidden),
        part("client", ends, (*bottom, *top), whole, (entrance, head), 2 * hidden),
        part("trunk", _range(start, end), trunk, 0, (0, 0), 2 * hidden),
        part("full", _range(0, n), a.layers, whole, (entrance, head), 0),
    )


def kv_values(layers: Iterable[Layer]) -> int:
    """Numbers that one token leaves in the KV cache of `layers`.

    A layer with a window keeps every token too, since a session can be truncated to any of them.
    """
    return sum(layer.kv_values for layer in layers)


def decode_flops(layers: Iterable[Layer], context: int) -> int:
    """FLOPs of one token after `context` others: 2 * parameters of matrix products + 4 * context * heads * head size
    (Chowdhery et al. 2022, "PaLM", arXiv:2204.02311, appendix B, forward alone).

    With keys and values of two sizes the second term is 2 * context * heads * (key size + value size). The token sees
    itself, too. A window masks tokens and saves nothing here. MLA expands what it keeps of each token before.
    """
    return sum(
        2 * (layer.matmul_parameters + context * layer.expanding_parameters) + (context + 1) * _attention_flops(layer)
        for layer in layers
    )


def prefill_flops(layers: Iterable[Layer], tokens: int) -> int:
    """FLOPs of a prompt in one forward: matrix products as above, and attention of each token to those before it and to
    itself. A kernel that computes what the causal mask hides takes up to twice the attention."""
    pairs = tokens * (tokens + 1) // 2
    return sum(2 * tokens * layer.matmul_parameters + pairs * _attention_flops(layer) for layer in layers)


def _attention_flops(layer: Layer) -> int:
    """Of one token that sees one other."""
    return 2 * layer.heads * (layer.key_size + layer.value_size)


def _parameters(layers: Iterable[Layer]) -> Iterable[int]:
    return (layer.parameters for layer in layers)


def _range(start: int, end: int) -> str:
    return f"[{start}, {end})"
