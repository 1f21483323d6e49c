"""Finds the parts of a transformers causal LM from its module tree.

`structure_of(model)` finds the embeddings, the layers, the final norm and the modules before the layers, without
knowing the family. The configuration gives the number of layers; the rest follows from where they are. If that is not
enough, a family gets one line in `RECORDS`, and nothing else changes. Nothing here shows that a cut is exact:
splitlearn/stages/equivalence/ does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from splitlearn.errors import FamilyRefused
from splitlearn.models.rope import GROWING

NORM_WORDS = ("norm", "ln_")
ACTIVE_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
"""A configuration's names for how many experts a token goes through."""


@dataclass(frozen=True)
class Record:
    """What a family's module tree does not show. Names are those of children of the module that owns the layers."""

    after: tuple[str, ...] = ()
    """Modules that run after the final norm; only the last stage needs them."""
    restarts: bool = False
    """Whether generate() drops the cache and recomputes the sequence when `longrope` changes its frequencies."""


RECORDS: dict[str, Record] = {
    # opt-350m projects to the width of its embeddings at the end, with a module that is registered before the layers.
    "opt": Record(after=("project_out",)),
    # Their prepare_inputs_for_generation does. In other families cached keys keep their frequencies.
    # (phi4_multimodal's, in transformers 5.23, then feeds the last token alone. What is meant is the result of
    # generate(use_cache=False), and that is computed here.)
    "phi3": Record(restarts=True),
    "phi4_multimodal": Record(restarts=True),
    "phimoe": Record(restarts=True),
}


@dataclass(frozen=True)
class Structure:
    """Paths of modules within the causal LM."""

    body: str
    """The module that owns the layers: the base model, or a decoder nested in it."""
    layers: str
    embedding: str
    before: tuple[str, ...]
    """Modules with weights that run between the embedding and the layers; only the first stage needs them."""
    norm: str | None
    after: tuple[str, ...]
    """Modules with weights that run after the norm within the body; only the last stage needs them."""
    n_layers: int


def no_truncation(config: Any) -> str | None:
    """Why a session of a model with this configuration cannot be truncated, or None if it can."""
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ())
    other = sorted(kind for kind in kinds if not kind.endswith("attention") or kind.startswith("linear"))
    return f"needs layers that keep keys and values alone; this model has {', '.join(other)}" if other else None


def no_prefixes(config: Any) -> str | None:
    """Why keys and values of a prefix cannot serve another sequence of this model, or None if they can."""
    if _rope_types(config).isdisjoint(GROWING):
        return no_truncation(config)
    return "needs keys that do not depend on the length of the prompt; this model's rotary embeddings change with it"


def active_experts(config: Any) -> int | None:
    """How many experts a token goes through in a mixture of experts; None for a model without."""
    text = config.get_text_config()
    return next((int(found) for name in ACTIVE_EXPERTS if (found := getattr(text, name, None))), None)


def _rope_types(config: Any) -> set[object]:
    """The types of rotary embeddings, which may differ by kind of layer."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return {each.get("rope_type") for each in (rope, *rope.values()) if isinstance(each, dict)}


def rope_restart(config: Any) -> int | None:
    """The length past which a model with this configuration recomputes the whole sequence; None for no such length.

    Past it the rotary embeddings change, so keys and values are not kept.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    if not RECORDS.get(text.model_type, Record()).restarts or rope.get("rope_type") != "longrope":
        return None
    length: int | None = getattr(text, "original_max_position_embeddings", None)
    return length


def structure_of(model: nn.Module) -> Structure:
    """The structure of a constructed causal LM (on any device, meta too), whole and not yet cut.

    Raises FamilyRefused if it has no list of `num_hidden_layers` layers or no input embedding.
    """
    n_layers = _count_layers(model)
    layers = _find_layers(model, n_layers)
    body = layers.rpartition(".")[0]
    record = RECORDS.get(_family(model), Record())
    children = dict(model.get_submodule(body).named_children())
    norm = _find_norm(children, layers)
    embedding = _find_embedding(model)
    before = [name for name in _registered_before(children, layers) if name not in (norm, *record.after)]
    return Structure(
        body=body,
        layers=layers,
        embedding=embedding,
        before=tuple(path for name in before if (path := join(body, name)) != embedding),
        norm=None if norm is None else join(body, norm),
        after=tuple(join(body, name) for name in record.after if name in children),
        n_layers=n_layers,
    )


def join(*parts: str) -> str:
    """A module path from its parts, any of which may be empty."""
    return ".".join(part for part in parts if part)


def _family(model: nn.Module) -> str:
    config: Any = getattr(model, "config", None)
    return str(getattr(config, "model_type", type(model).__name__))


def _count_layers(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    count = getattr(config.get_text_config(decoder=True) if config is not None else None, "num_hidden_layers", None)
    if not isinstance(count, int) or count < 1:
        raise FamilyRefused(f"{_family(model)}: its configuration does not say how many layers it has.")
    return count


def _find_layers(model: nn.Module, n_layers: int) -> str:
    """The path of the ModuleList with `n_layers` modules that is nearest to the root, and then has most weights.

    Depth comes first, since each layer may hold a list of as many experts.
    """
    found = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    }
    if not found:
        raise FamilyRefused(f"{_family(model)}: no list of its {n_layers} layers was found in its structure.")
    nearest: str = min(found, key=lambda path: (path.count("."), -_weights(found[path])))
    return nearest


def _find_embedding(model: Any) -> str:
    path = _path_of(model, model.get_input_embeddings())
    if path is None:
        raise FamilyRefused(f"{_family(model)}: no input embedding was found in its structure.")
    return path


def _find_norm(children: dict[str, nn.Module], layers: str) -> str | None:
    """The last norm registered after the layers, or one called final, or None.

    A norm before the layers that is not called final belongs to the embeddings (trocr, bloom).
    """
    names = list(children)
    after = names[names.index(layers.rpartition(".")[2]) + 1 :]
    norms = [name for name in names if any(word in name for word in NORM_WORDS)]
    final = [name for name in norms if name in after] or [name for name in norms if "final" in name]
    return final[-1] if final else None


def _registered_before(children: dict[str, nn.Module], layers: str) -> list[str]:
    names = list(children)
    return [name for name in names[: names.index(layers.rpartition(".")[2])] if _weights(children[name])]


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _path_of(model: nn.Module, wanted: nn.Module) -> str | None:
    return next((path for path, module in model.named_modules() if module is wanted), None)
