"""Why an engine beside torch cannot compute a model here. Imports no engine."""

from importlib.util import find_spec
from typing import Any

from splitlearn.models.structure import no_prefixes, no_truncation

ONNX_PACKAGES = ("onnxruntime", "onnx", "onnxscript")
ONNX_FAMILIES = frozenset({"gemma2", "gpt2", "gpt_neox", "llama", "mistral", "olmo2", "opt", "phi3", "qwen2", "qwen3"})
"""Model types that tests/engines shows to agree with torch."""


JAX_PACKAGES = ("jax", "torchax")
JAX_FAMILIES = frozenset({"bloom", "gemma2", "gpt2", "gpt_neox", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3"})
"""Model types that tests/engines shows to agree with torch."""


def no_onnxruntime(device: str, dtype: str, config: Any | None = None) -> str | None:
    """Why ONNX Runtime cannot compute in `dtype` on `device`, or the model of this configuration; None if it can."""
    if missing := [name for name in ONNX_PACKAGES if find_spec(name) is None]:
        return f"needs {missing[0]}: pip install -r requirements-onnx.txt, or pip install 'splitlearn[onnx]'"
    if device != "cpu" or dtype != "float32":
        return f"computes in float32 on the CPU here; this is {dtype} on {device}"
    if config is None:
        return None
    if (family := config.get_text_config().model_type) not in ONNX_FAMILIES:
        return f"has not been shown to compute {family} as torch does (docs/engines.md)"
    return no_truncation(config) or no_prefixes(config)


def no_jax(device: str, dtype: str, config: Any | None = None) -> str | None:
    """Why JAX cannot compute in `dtype` on `device`, or the model of this configuration; None if it can."""
    if missing := [name for name in JAX_PACKAGES if find_spec(name) is None]:
        return f"needs {missing[0]}: pip install -r requirements-jax.txt, or pip install 'splitlearn[jax]'"
    if device != "cpu" or dtype != "float32":
        return f"computes in float32 on the CPU here; this is {dtype} on {device}"
    if config is None:
        return None
    if (family := config.get_text_config().model_type) not in JAX_FAMILIES:
        return f"has not been shown to compute {family} as torch does (docs/engines.md)"
    return no_truncation(config) or no_prefixes(config)
