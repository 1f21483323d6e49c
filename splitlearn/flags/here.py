"""What this process, which has torch, can say of where it runs."""

from splitlearn.flags.registry import Place
from splitlearn.layers import onednn_linear


def here(device: str, dtype: str) -> Place:
    """The place of weights of `dtype` on `device`, as far as torch knows it; of the model nothing."""
    return Place(device, dtype=dtype, no_onednn=onednn_linear.why_not(dtype))
