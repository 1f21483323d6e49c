"""Checks a model's config.json before its weights are fetched or read: of which kind of model it is, and in which way
the weights are quantized."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitlearn.checkpoints.inspection import read_json
from splitlearn.errors import ModelError

GPTQ, GPTQ_V2, AWQ = "gptq", "gptq_v2", "awq"
BY_TRANSFORMERS = ("fp8", "mxfp8", "mxfp4")
"""Quantizations that transformers converts back to floating point, on a CPU and without other packages."""
BITS = 4
_INSTEAD = (
    f"What works: {GPTQ} and {AWQ} of {BITS} bits, {', '.join(BY_TRANSFORMERS)}, or a .gguf file. Or load the model "
    "with transformers where that method's package is installed, call dequantize() and save_pretrained(FOLDER) of it, "
    "and set model.name to FOLDER."
)


@dataclass(frozen=True)
class Quantization:
    """Matrices of 4 bits in the `layout` GPTQ, GPTQ_V2 or AWQ. `group_size` neighbouring inputs share a scale; None is
    all of them."""

    layout: str
    group_size: int | None


def refuse_unusable(config: Path) -> None:
    """Raise ModelError unless `config` (a config.json) is of a decoder-only causal language model of transformers, with
    weights in a form that is read here."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    settings = read_json(config)
    kind, classes = settings.get("model_type"), settings.get("architectures") or []
    if not isinstance(kind, str) or kind not in KNOWN:
        raise ModelError(f"{config}: model_type {kind!r} is no causal language model of the installed transformers.")
    if settings.get("is_encoder_decoder"):
        raise ModelError(f"{config}: an encoder-decoder model ({kind}) cannot be split here; use a decoder-only one.")
    if not isinstance(classes, list) or (classes and not {str(name) for name in classes} & set(KNOWN.values())):
        named = ", ".join(map(str, classes)) if isinstance(classes, list) else repr(classes)
        raise ModelError(f"{config}: {named} is no causal language model, so it cannot be used.")
    quantization(config)


def quantization(config: Path) -> Quantization | None:
    """How the weights are quantized; None for plain ones, and for those that transformers converts. Raises ModelError
    for a quantization that is not read here."""
    settings = read_json(config).get("quantization_config")
    if settings is None:
        return None
    method = _method(settings) if isinstance(settings, dict) else settings
    if method in BY_TRANSFORMERS:
        return None
    if method not in (GPTQ, AWQ):
        raise ModelError(f"{config}: the quantization {method!r} is not read here. {_INSTEAD}")
    _require(config, "bits", settings.get("bits"), settings.get("bits") == BITS, str(BITS))
    if method == GPTQ:
        layout = settings.get("checkpoint_format") or settings.get("format") or GPTQ
        _require(config, "checkpoint_format", layout, layout in (GPTQ, GPTQ_V2), f"{GPTQ} or {GPTQ_V2}")
    else:
        layout, version = AWQ, settings.get("version") or settings.get("format") or "gemm"
        _require(config, "version", version, str(version).lower() == "gemm", "gemm")
    size = settings.get("group_size", 128)
    _require(config, "group_size", size, type(size) is int and (size == -1 or size > 0), "a whole number from 1, or -1")
    return Quantization(layout, None if size == -1 else size)


def _method(settings: dict[str, Any]) -> object:
    """The method's name; the first versions of bitsandbytes wrote none."""
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    return settings.get("quant_method")


def _require(config: Path, key: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ModelError(f"{config}: {key} {value!r} of its quantization_config cannot be read; expected {expected}.")
