"""What this process, which has torch, can say of where it runs."""

from typing import Any

from splitlearn.engines.reasons import no_jax, no_onnxruntime
from splitlearn.flags.registry import Place
from splitlearn.layers import onednn_linear


def here(device: str, dtype: str, config: Any | None = None) -> Place:
    """The place of weights of `dtype` on `device`, as far as torch knows it; of the model only which engines can
    compute it, if its configuration is given."""
    no_onnx, without_jax = (why_not(device, dtype, config) for why_not in (no_onnxruntime, no_jax))
    no_onednn = onednn_linear.why_not(dtype)
    return Place(device, dtype=dtype, no_onednn=no_onednn, no_onnxruntime=no_onnx, no_jax=without_jax)
