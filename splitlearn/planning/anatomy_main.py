"""The child process behind `anatomy.read`: it builds the architecture without memory for its weights."""

from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from torch import nn

from splitlearn.checkpoints.folder import ModelFiles, read_config
from splitlearn.errors import as_error
from splitlearn.kvcache.architecture import Shapes, build, kv_values, shapes_of_architecture
from splitlearn.models.structure import NORM_WORDS, Structure, active_experts, structure_of
from splitlearn.planning.anatomy import Anatomy, Layer, Mlp, Rope

ACTIVATIONS = (
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "hidden_activation_function",
    "afn",
    "activation",
)


def answer(connection: Connection, files: ModelFiles, dtype: str) -> None:
    """Send the anatomy, or the error."""
    try:
        connection.send(anatomy_of(read_config(files.folder), files.name, dtype, files.facts.context_length))
    except Exception as error:
        connection.send(as_error(error, "reading the model's structure"))


def anatomy_of(config: Any, name: str, dtype: str, context: int | None) -> Anatomy:
    """The anatomy of the causal LM of a transformers configuration. Raises FamilyRefused where its structure cannot be
    read."""
    model, text = build(config), config.get_text_config(decoder=True)
    structure = structure_of(model)
    names, tied = _names(model, structure), bool(getattr(model, "all_tied_weights_keys", {}))
    size, outside = {key: value.numel() for key, value in model.named_parameters()}, _outside(model, structure)
    positions, modules = _positions(model, structure, text), list(model.get_submodule(structure.layers))
    layers = tuple(_layers(modules, text, shapes_of_architecture(model)))
    return Anatomy(
        model=name,
        family=str(config.model_type),
        architecture=type(model).__name__,
        dtype=dtype,
        hidden_size=int(text.hidden_size),
        vocabulary=int(text.vocab_size),
        context=context,
        positions=positions,
        rope=tuple(_rope(text)),
        tied=tied,
        layers=layers,
        entrance=sum(size[key] for key in names["entrance"]),
        exit=sum(size[key] for key in names["exit"]),
        shared=sum(size[key] for key in names["shared"]),
        everywhere=sum(size[key] for key in names["everywhere"]),
        entrance_matmul_parameters=_matmul(outside[0], text),
        exit_matmul_parameters=_matmul(outside[1], text),
    )


def _names(model: Any, structure: Structure) -> dict[str, list[str]]:
    """Names of the parameters outside the layers, by where they are needed: as `carve` leaves them to a part."""
    tied = dict(getattr(model, "all_tied_weights_keys", {}))
    entrance = (structure.embedding, *structure.before)
    exits = (*((structure.norm,) if structure.norm else ()), *structure.after)
    head_stores = {tied[name] for name in tied if _within(tied[name], entrance)}
    found: dict[str, list[str]] = {"entrance": [], "exit": [], "shared": [], "everywhere": []}
    for name, _ in model.named_parameters():
        if _within(name, (structure.layers,)):
            continue
        if _within(name, entrance):
            found["shared" if name in head_stores else "entrance"].append(name)
        elif _within(name, exits) or not _within(name, (structure.body,)):
            found["exit"].append(name)
        else:
            found["everywhere"].append(name)
    return found


def _within(name: str, paths: Iterable[str]) -> bool:
    return any(name.startswith(f"{path}.") for path in paths)


def _outside(model: Any, structure: Structure) -> tuple[list[nn.Module], list[nn.Module]]:
    """The modules before the layers and those after them, the head included."""
    after = [model.get_submodule(path) for path in structure.after]
    return [model.get_submodule(path) for path in structure.before], [*after, model.get_output_embeddings()]


def _layers(modules: Iterable[nn.Module], text: Any, shapes: Shapes) -> Iterator[Layer]:
    values = kv_values(shapes)
    for number, layer in enumerate(modules):
        children = dict(layer.named_children())
        attention: Any = next((child for name, child in children.items() if _attends(name, child)), None)
        norms = [child for name, child in children.items() if any(word in name for word in NORM_WORDS)]
        rest = [child for child in children.values() if child is not attention and child not in norms]
        key, value = shapes[number]
        heads = _heads(text, attention, key.heads)
        kind = _kind(text, heads, key.heads) if attention is not None else ""
        latent = kind == "MLA"
        yield Layer(
            number=number,
            attention=kind,
            heads=heads,
            kv_heads=key.heads,
            key_size=int(text.qk_head_dim) if latent else key.size,
            value_size=int(text.v_head_dim) if latent else value.size,
            window=_window(text, attention, number),
            mlp=_mlp(rest, text),
            norm=_norm_kind(norms),
            parameters=sum(parameter.numel() for parameter in layer.parameters()),
            matmul_parameters=_matmul([layer], text),
            expanding_parameters=_matmul([attention.kv_b_proj], text) if latent else 0,
            kv_values=values[number],
        )


def _attends(name: str, module: nn.Module) -> bool:
    """Whether a layer's child is its attention, and no norm beside it."""
    words = f"{name} {type(module).__name__}".lower()
    is_norm = any(word in name for word in NORM_WORDS)
    return "att" in words and not is_norm and any(True for _ in module.parameters())


def _heads(text: Any, attention: Any, kv_heads: int) -> int:
    """Of queries: by the module, since layers may differ, or by the configuration."""
    if isinstance(heads := getattr(attention, "num_heads", None), int):
        return heads
    if groups := getattr(attention, "num_key_value_groups", None):
        return int(groups) * kv_heads
    return int(text.num_attention_heads)


def _kind(text: Any, heads: int, kv_heads: int) -> str:
    """MLA: DeepSeek-AI 2024, arXiv:2405.04434. MQA: Shazeer 2019, arXiv:1911.02150. GQA: Ainslie et al. 2023,
    arXiv:2305.13245."""
    if getattr(text, "kv_lora_rank", None):
        return "MLA"
    if kv_heads == heads:
        return "MHA"
    return "MQA" if kv_heads == 1 else "GQA"


def _window(text: Any, attention: nn.Module | None, number: int) -> int | None:
    """Tokens that a layer's attention sees: a sliding window, or a chunk."""
    own = getattr(attention, "sliding_window", None)
    if isinstance(own, int):
        return own
    types = getattr(text, "layer_types", None) or getattr(text, "attention_layers", None) or ()
    kind = types[number] if number < len(types) else ""
    name = {"chunked_attention": "attention_chunk_size", "local": "window_size"}.get(kind)
    return getattr(text, name, None) if name else None


def _mlp(modules: Iterable[nn.Module], text: Any) -> Mlp:
    """By the shapes of its matrices, of one expert where there are several."""
    matrices = [value for module in modules for value in module.parameters() if value.dim() > 1]
    stacked = [value for value in matrices if value.dim() == 3]
    shapes = [tuple(value.shape[-2:]) for value in stacked or matrices]
    hidden = text.hidden_size
    width = min((max(shape) if min(shape) == hidden else min(shape) for shape in shapes if hidden in shape), default=0)
    size = sum(rows * columns for rows, columns in shapes)
    act = next((found for name in ACTIVATIONS if isinstance(found := getattr(text, name, None), str)), "")
    experts = stacked[0].shape[0] if stacked else 1
    return Mlp(
        gated=bool(width) and size > 2.5 * width * hidden,
        activation=act,
        width=width,
        experts=experts,
        active=min(experts, (active_experts(text) or 1)) if stacked else 1,
    )


def _matmul(modules: Iterable[nn.Module], text: Any) -> int:
    """Parameters of matrices that a token is multiplied with; tables that rows are looked up in are not."""
    count = 0
    for module in modules:
        for inner in module.modules():
            if isinstance(inner, nn.Embedding):
                continue
            for value in inner.parameters(recurse=False):
                if value.dim() == 3:
                    count += value.numel() * min(value.shape[0], (active_experts(text) or 1)) // value.shape[0]
                elif value.dim() == 2:
                    count += value.numel()
    return count


def _norm_kind(norms: list[nn.Module]) -> str:
    """The class without its family's name."""
    name = type(norms[0]).__name__ if norms else ""
    return next((kind for kind in ("RMSNorm", "LayerNorm") if kind in name), name)


def _positions(model: nn.Module, structure: Structure, text: Any) -> str:
    """How a token knows where it stands."""
    if any(isinstance(model.get_submodule(path), nn.Embedding) for path in structure.before):
        return "learned"
    if getattr(text, "alibi", False) or text.model_type in ("bloom", "mpt"):
        return "ALiBi"
    rotary = getattr(text, "rope_parameters", None) or getattr(text, "rotary_dim", None)
    return "rotary" if rotary else "other"


def _rope(text: Any) -> Iterator[Rope]:
    """One record, or one for each kind of layers that the configuration tells apart."""
    found = getattr(text, "rope_parameters", None) or {}
    nested = {name: value for name, value in found.items() if isinstance(value, dict)}
    for layers, own in (nested or ({"": found} if found else {})).items():
        share = own.get("partial_rotary_factor") or getattr(text, "partial_rotary_factor", None)
        yield Rope(
            layers=layers,
            type=str(own.get("rope_type", "default")),
            theta=own.get("rope_theta"),
            factor=own.get("factor"),
            original_context=own.get("original_max_position_embeddings"),
            share=float(share or 1.0),
        )
