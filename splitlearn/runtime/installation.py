"""What is installed here: source, packages, processor, GPUs and the variables that libraries read, in one digest."""

import hashlib
import os
import platform
import sys
from pathlib import Path

from splitlearn.runtime import environment, hardware

SOURCE = Path(__file__).resolve().parents[1]
DEVICES = ("nvidia*", "nvidia-caps/*", "kfd", "dri/*", "dxg")
"""GPUs and their drivers, as Linux shows them in /dev."""
DRIVER = Path("/proc/driver/nvidia")
BOOT = Path("/proc/sys/kernel/random/boot_id")
VARIABLES = ("CUDA", "HIP", "ROC", "NVIDIA", "GPU", "DNNL", "ONEDNN", "ATEN", "MKL", "TORCH", "PYTORCH", "LD_")
"""How the names of variables begin that torch and its libraries read."""


def digest() -> str:
    """SHA-256 in hex of what decides what torch and transformers can do here, found without importing them."""
    parts = (sys.version, sys.prefix, platform.platform(), hardware.instruction_sets())
    state = (*parts, _variables(), _packages(), _source(), _gpus())
    return hashlib.sha256(repr(state).encode(errors="surrogateescape")).hexdigest()


def _variables() -> list[tuple[str, str]]:
    """Those that a person set: what this program sets itself follows from its source."""
    names = {name for name in os.environ if name.startswith(VARIABLES)} - environment.DEFAULTS.keys()
    return sorted((name, os.environ[name]) for name in names)


def _packages() -> list[tuple[str, int]]:
    """Name and version of each installed package, as its folder is called, and when it was installed."""
    found = (path for place in sys.path for path in Path(place).glob("*.dist-info"))
    return sorted((path.name, path.lstat().st_mtime_ns) for path in found)


def _source() -> str:
    """This program's own source."""
    hashed = hashlib.sha256()
    for path in sorted(SOURCE.rglob("*.py")):
        hashed.update(path.read_bytes())
    return hashed.hexdigest()


def _gpus() -> list[str]:
    """Device files, driver and cards. With the boot: a driver that failed works after the next one."""
    nodes = sorted(str(path) for pattern in DEVICES for path in Path("/dev").glob(pattern))
    if not nodes:
        return []
    cards = sorted(path.name for path in DRIVER.glob("gpus/*"))
    return [*nodes, *cards, *(path.read_text() for path in (DRIVER / "version", BOOT) if path.exists())]
