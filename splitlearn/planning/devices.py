"""devices.yaml: the machines that a plan may use, and the links between them (docs/planning.md).

    found = load(Path("devices.yaml"))
    network = network_of(found)

Figures of a machine may be left out of the file, to be measured. What is neither given nor measured is an InputError
that names it: nothing is assumed.
"""

import re
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from splitlearn import config
from splitlearn.address import Address
from splitlearn.errors import InputError
from splitlearn.link.emulated import Link
from splitlearn.planning.network import Device, Network

UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9}
SIZE = "a size such as 300MB or 1.5GB"
FIGURES = {
    "memory": "the memory that its process may take, such as 2GB",
    "base": "the memory of its process without weights, such as 300MB",
    "weight_ratio": "its process's memory for weights / their bytes in model.dtype, 1 where it keeps them as they are",
    "decode_ms": "milliseconds of one layer for a decoded token",
    "prefill_ms": "milliseconds of one layer for each token of a prompt",
    "step_ms": "milliseconds of a step beside the layers",
    "start_ms": "milliseconds that the first step takes more",
}
"""What must be known of each device, and what each figure is."""


def size_of(text: object) -> float:
    """Bytes of a size such as 300MB. Raises ValueError."""
    found = re.fullmatch(r"(\d+\.?\d*)\s*([kmg]b)", str(text).strip().lower(), re.ASCII)
    if found is None or not float(found[1]):
        raise ValueError(SIZE)
    return float(found[1]) * UNITS[found[2]]


def _address(text: object) -> str:
    return str(Address.parse(str(text)))


Size = Annotated[float, BeforeValidator(size_of)]
Figure = Annotated[float, Field(ge=0, lt=1e6)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class DeviceEntry(_Section):
    """A machine of the file; figures that are None are to be measured."""

    memory: Size | None = None
    address: Annotated[str, BeforeValidator(_address)] | None = None
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    base: Size | None = None
    weight_ratio: Figure | None = None
    decode_ms: Annotated[float, Field(gt=0, lt=1e6)] | None = None
    prefill_ms: Figure | None = None
    step_ms: Figure | None = None
    start_ms: Figure | None = None
    overlapped_ms: Figure = 0.0
    overlap_share: Annotated[float, Field(ge=0, le=1)] = 1.0


class LinkEntry(_Section):
    """A link between two machines, `up` from the first to the second. No limit of bandwidth is said by null."""

    between: Annotated[tuple[str, str], Field(strict=False)]
    rtt_ms: float
    up_mbit: float | None
    down_mbit: float | None


class DevicesFile(_Section):
    """The whole file; the first device is the client."""

    devices: Annotated[dict[str, DeviceEntry], Field(min_length=1, max_length=16)]
    links: Annotated[tuple[LinkEntry, ...], Field(strict=False)] = ()
    forward: bool = True


def load(path: Path) -> DevicesFile:
    """Read the file. Raises InputError that names the first wrong key."""
    data = config.read(path, "devices", "'devices:' and 'links:'")
    return config.checked(DevicesFile, data, "devices key")


def network_of(file: DevicesFile) -> Network:
    """The machines and links, complete. Raises InputError that names the first figure that is missing."""
    devices = tuple(device_of(name, entry) for name, entry in file.devices.items())
    return Network(devices, links_of(file), file.forward)


def device_of(name: str, entry: DeviceEntry) -> Device:
    """One machine. Raises InputError for a figure that is missing."""
    found: dict[str, float] = {}
    for figure, what in FIGURES.items():
        value = getattr(entry, figure)
        if value is None:
            raise InputError(f"devices.{name}.{figure}", None, f"{what}: give it, or let --measure find it")
        found[figure] = value
    return Device(
        name,
        found["memory"],
        found["base"],
        found["weight_ratio"],
        layer_s=found["decode_ms"] / 1e3,
        prefill_s=found["prefill_ms"] / 1e3,
        step_s=found["step_ms"] / 1e3,
        start_s=found["start_ms"] / 1e3,
        overlapped_s=entry.overlapped_ms / 1e3,
        overlap_share=entry.overlap_share,
        address=entry.address or "",
        threads=entry.threads,
    )


def links_of(file: DevicesFile) -> dict[tuple[int, int], Link]:
    """The links by the numbers of their machines. Raises InputError for a link that is none between two of them."""
    numbers, found = {name: number for number, name in enumerate(file.devices)}, {}
    for at, entry in enumerate(file.links):
        pair = tuple(numbers.get(name, -1) for name in entry.between)
        if -1 in pair or pair[0] == pair[1]:
            expected = f"two different ones of: {', '.join(numbers)}"
            raise InputError(f"links.{at}.between", ", ".join(entry.between), expected)
        turned = pair[0] > pair[1]
        key = (pair[1], pair[0]) if turned else (pair[0], pair[1])
        if key in found:
            raise InputError(f"links.{at}.between", ", ".join(entry.between), "each pair of devices once")
        up, down = (entry.down_mbit, entry.up_mbit) if turned else (entry.up_mbit, entry.down_mbit)
        try:
            found[key] = Link(entry.rtt_ms, 0.0, up, down)
        except InputError as error:
            raise InputError(f"links.{at}.{error.field}", error.value, error.expected) from error
    return found
