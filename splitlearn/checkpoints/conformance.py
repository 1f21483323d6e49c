"""Checks that a loaded model is what its folder says: transformers fills gaps and drops the rest."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from splitlearn.checkpoints.folder import CONFIG
from splitlearn.checkpoints.inspection import ADAPTER_CONFIG, unused_weights
from splitlearn.errors import ModelError

# Settings of generation_config.json that change even the greedy tokens of transformers' generate().
_CHOOSING = (
    *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"),
    *("sequence_bias", "min_length", "min_new_tokens", "forced_bos_token_id", "forced_eos_token_id", "num_beams"),
)


def first_few(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def refuse_missing(source: Path, report: Mapping[str, Any]) -> None:
    """Raise ModelError if weights are missing or have another shape; transformers would use random ones."""
    missing = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    if missing:
        others = sorted(report["unexpected_keys"])
        instead = f"; it has {first_few(others)}, which the model has no place for" if others else ""
        raise ModelError(
            f"{source} lacks {len(missing)} of its model's tensors, among them {first_few(missing)}{instead}."
        )


def other_shapes(folder: Path) -> list[str]:
    """The tensors in `folder` that have another shape than its config says, each with both shapes."""
    from safetensors import safe_open
    from transformers import AutoConfig

    wanted = plain_model(
        AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    ).state_dict()
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as weights:
            shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
        for name, shape in shapes.items():
            if name in wanted and tuple(wanted[name].shape) != shape:
                found.append(f"{name} {list(shape)} in the place of {list(wanted[name].shape)}")
    return found


def refuse_unused(source: Path, model: Any, report: Mapping[str, Any]) -> None:
    """Raise ModelError for tensors that belong to the model and have no place in it."""
    prefix = f"{model.base_model_prefix}."
    inside = {name for name, _ in (*model.named_children(), *model.base_model.named_children())}
    unused = sorted(report["unexpected_keys"])
    wrong = [name for name in unused if name.removeprefix(prefix).split(".")[0] in inside or "lora_" in name]
    if wrong:
        raise ModelError(
            f"{source} has {len(wrong)} tensors that {CONFIG} has no place for, among them {first_few(wrong)}: what is "
            "computed without them is not this model."
        )


def not_applied(source: Path, model: Any, report: Mapping[str, Any]) -> Iterator[str]:
    """A line for each thing in the folder that has no effect here.

    These are tensors of a second head or of a part for images, other weights, adapters in folders of their own, code,
    and rules for choosing tokens (here a request sets those).
    """
    if unused := sorted(report["unexpected_keys"]):
        yield f"Not used, since they are no part of the language model: {first_few(unused)}"
    if others := [path.name for path in unused_weights(source)]:
        yield f"Not used, beside the weights that are: {first_few(others)}"
    if adapters := sorted(path.parent.name for path in source.glob(f"*/{ADAPTER_CONFIG}")):
        yield f"Not applied, since they are in folders of their own: the adapters {first_few(adapters)}"
    if getattr(model.config, "auto_map", None):
        yield f"The model's own Python code is not run; {type(model).__name__} of transformers takes its place"
    settings = {name: getattr(model.generation_config, name, None) for name in _CHOOSING}
    if rules := [f"{name} {value}" for name, value in settings.items() if value not in (None, 0, 1, [], {})]:
        yield f"Not applied, of generation_config.json: {', '.join(rules)}"


def untie(model: Any) -> None:
    """Correct `tie_word_embeddings` in the configuration if the LM head and the embedding are different weights.

    transformers goes by the weights. A model built from the configuration alone would lose one of the two.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and embedding is not None and head.weight.data_ptr() != embedding.weight.data_ptr():
        for config in (model.config, model.config.get_text_config()):
            if getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False


def refuse_other_tensors(source: Path, model: Any) -> None:
    """Raise ModelError unless the model has the tensors of its architecture, in floating point.

    Weights that stay quantized, or have an adapter's parts between them, would later be read as something else.
    """
    have, wanted = model.state_dict(), plain_model(copy.deepcopy(model.config)).state_dict()
    wrong = [name for name in sorted({*have, *wanted}) if not _alike(have.get(name), wanted.get(name))]
    if wrong:
        how = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
        method = f" ({getattr(how, 'quant_method', how)})" if how is not None else ""
        raise ModelError(
            f"{source}: its quantized weights{method} are not supported; {first_few(wrong)} are not what {CONFIG} says."
        )


def plain_model(config: Any) -> Any:
    """The architecture of `config`, without any memory: its sizes may be those of no model."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, attn_implementation="eager")


def _alike(one: Any, other: Any) -> bool:
    if one is None or other is None or one.shape != other.shape:
        return False
    floating = bool(one.is_floating_point())
    return floating == other.is_floating_point() and (not floating or one.element_size() > 1)
