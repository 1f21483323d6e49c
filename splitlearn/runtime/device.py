"""Which of this machine's devices computes."""

import torch

from splitlearn.errors import InputError


def resolve(name: str) -> torch.device:
    """The device called `name` in the config; `auto` is cuda where there is one, else cpu.

    Raises InputError for a device that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise InputError("model.device", name, f"a device of this machine, which has {count} for CUDA")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("model.device", name, "a device of this machine, which has none for Metal")
    return device
