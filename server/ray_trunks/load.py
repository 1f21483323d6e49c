"""How full a trunk server is, by its own metrics."""

import re
from dataclasses import dataclass, fields
from urllib.request import ProxyHandler, build_opener

from prometheus_client.parser import text_string_to_metric_families

from server.monitoring.metrics import PREFIX

TIMEOUT_S = 5.0
_LAYERS = re.compile(r"(\d+)-(\d+) of")
Layers = tuple[int, int]
"""[start, end)."""


@dataclass(frozen=True)
class Load:
    """Sessions that are open, may be open and wait for room; blocks of KV memory that sessions have, and all."""

    sessions: int = 0
    sessions_limit: int = 1
    sessions_waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks: int = 1

    @property
    def full(self) -> float:
        """The share that is taken of what is scarcer, sessions or KV memory. More than 1 if sessions wait."""
        share = max(self.sessions / max(1, self.sessions_limit), self.kv_blocks_used / max(1, self.kv_blocks))
        return share + self.sessions_waiting


FIELDS = tuple(field.name for field in fields(Load))


def read(address: str) -> tuple[Load, Layers]:
    """The load and the layers of the server whose metrics are at `address`. Raises OSError, ValueError."""
    opener = build_opener(ProxyHandler({}))
    with opener.open(f"http://{address}/metrics", timeout=TIMEOUT_S) as answer:
        return parse(answer.read().decode())


def parse(text: str) -> tuple[Load, Layers]:
    """The load and the layers in a server's metrics. Raises ValueError for other metrics."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    found = {sample.name.removeprefix(PREFIX): sample.value for sample in samples if not sample.labels}
    build = next((sample.labels for sample in samples if sample.name == f"{PREFIX}build_info"), {})
    layers = _LAYERS.match(build.get("layers", ""))
    if layers is None or not found.keys() >= set(FIELDS):
        raise ValueError("these are not the metrics of a trunk server")
    return Load(**{name: int(found[name]) for name in FIELDS}), (int(layers[1]), int(layers[2]))
