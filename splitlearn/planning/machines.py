"""Measures what devices.yaml leaves out: this machine as the client, running servers by their addresses, their links.

What the file gives stays as it is.
"""

from splitlearn.arms.runs import Runs
from splitlearn.arms.setup import Setup
from splitlearn.client.served import describe
from splitlearn.client.served import with_trunk as served_flags
from splitlearn.config import Config, SplitConfig, TrunkConfig, with_trunk
from splitlearn.errors import SplitlearnError
from splitlearn.flags.selection import parse as parse_flags
from splitlearn.link.emulated import Link
from splitlearn.planning.anatomy import Anatomy
from splitlearn.planning.costs import Rates, layer_bytes, units
from splitlearn.planning.devices import FIGURES, DeviceEntry, DevicesFile, LinkEntry, links_of
from splitlearn.planning.measure import measure_rates, short_request
from splitlearn.planning.probe import ServerFacts, ask
from splitlearn.runtime import cgroups
from splitlearn.runtime.progress import Progress, Step


def measured(
    file: DevicesFile, config: Config, flags: str, anatomy: Anatomy, prompt_tokens: int, progress: Progress
) -> tuple[DevicesFile, float | None]:
    """The file with what it leaves out, and the bytes of a token's hidden state on the wire (None: no server was
    asked). Raises TrunkError, and what the runs of the client raise."""
    client, *servers = file.devices
    entries, links, row_bytes = dict(file.devices), list(file.links), None
    if is_open(entries[client]):
        free = cgroups.available_memory()
        rates = client_rates(config, flags, anatomy, progress)
        entries[client] = filled(entries[client], {**client_figures(anatomy, rates), "memory": free})
    asked = [name for name in servers if entries[name].address and is_open(entries[name])]
    with_links = {pair[1] for pair in links_of(file) if pair[0] == 0}
    for number, name in enumerate(servers, 1):
        if name in asked or (entries[name].address and number not in with_links):
            progress(Step(f"Measuring {name}"))
            found = _server(config, flags, entries[name].address or "", prompt_tokens, progress)
            entries[name] = filled(entries[name], server_figures(anatomy, found))
            row_bytes = found.row_bytes
            if number not in with_links:
                links.append(_entry(client, name, found.link))
    return file.model_copy(update={"devices": entries, "links": tuple(links)}), row_bytes


def client_figures(anatomy: Anatomy, rates: Rates) -> dict[str, float]:
    """The figures of the machine that the rates are of, as the client."""
    around = anatomy.entrance + anatomy.exit + anatomy.shared + anatomy.everywhere
    rest_s = max(0.0, rates.around_s - rates.hop_s)
    return {
        "base": max(0.0, rates.client_base_bytes - around * anatomy.bytes_per_value),
        "weight_ratio": rates.client_weight_ratio,
        "decode_ms": rates.client_layer_s * 1e3,
        "prefill_ms": rates.client_prefill_s * 1e3,
        "step_ms": (rates.bottom_s + rates.top_s + rest_s) * 1e3,
        "start_ms": max(0.0, rates.start_s - rates.hop_start_s - rest_s) * 1e3,
        "overlapped_ms": rates.overlapped_s * 1e3,
    }


def trunk_figures(rates: Rates) -> dict[str, float]:
    """The figures of the trunk that the rates are of, with the link to it."""
    return {
        "base": rates.trunk_base_bytes,
        "weight_ratio": rates.trunk_weight_ratio,
        "decode_ms": rates.trunk_layer_s * 1e3,
        "prefill_ms": rates.trunk_prefill_s * 1e3,
        "step_ms": rates.hop_s * 1e3,
        "start_ms": max(0.0, rates.hop_start_s - rates.hop_s) * 1e3,
        "overlap_share": rates.overlap_share,
    }


def server_figures(anatomy: Anatomy, found: ServerFacts) -> dict[str, float]:
    """The figures of a server that was asked."""
    layers = anatomy.layers[found.start : found.end]
    count = units(anatomy, layers)
    return {
        "memory": found.memory_bytes,
        "threads": found.threads,
        "base": found.base_bytes,
        "weight_ratio": found.weight_bytes / layer_bytes(anatomy, layers),
        "decode_ms": found.decode_s / count * 1e3,
        "prefill_ms": found.prefill_s / count * 1e3,
        "step_ms": found.step_s * 1e3,
        "start_ms": found.start_s * 1e3,
    }


def is_open(entry: DeviceEntry) -> bool:
    """Whether a figure of the entry is missing."""
    return any(getattr(entry, figure) is None for figure in FIGURES)


def filled(entry: DeviceEntry, figures: dict[str, float]) -> DeviceEntry:
    """The entry with the figures that it does not give itself."""
    given = {name for name in entry.model_fields_set if getattr(entry, name) is not None}
    return entry.model_copy(update={name: value for name, value in figures.items() if name not in given})


def _entry(client: str, server: str, link: Link) -> LinkEntry:
    return LinkEntry(between=(client, server), rtt_ms=link.rtt_ms, up_mbit=link.up_mbit, down_mbit=link.down_mbit)


def client_rates(config: Config, flags: str, anatomy: Anatomy, progress: Progress) -> Rates:
    """The rates of this machine, by short runs of the full model and of a split on it."""
    with Runs(alone(config), progress) as runs:
        request = short_request(config.generation.prompt)
        found = measure_rates(runs, anatomy, runs.flags(flags), request, progress)
    if found is None:  # nothing sets the cancellation here
        raise SplitlearnError("The measurement ended early.")
    return found


def alone(config: Config) -> Config:
    """The same settings with an embedded trunk at the usual cut, over no emulated link."""
    return config.model_copy(update={"trunk": TrunkConfig(), "split": SplitConfig()})


def _server(config: Config, flags: str, address: str, prompt_tokens: int, progress: Progress) -> ServerFacts:
    setup = Setup(with_trunk(config, address), progress)
    try:
        available = served_flags(setup.availability_here, describe(address, setup.credentials))
        return ask(address, setup.credentials, parse_flags(flags, available).trunk | {"use_cache"}, prompt_tokens)
    finally:
        setup.close()
