"""The split plan: which layers of a model the trunk has."""

from __future__ import annotations

from dataclasses import dataclass

from splitlearn.config import AUTO, Config, SplitConfig, has_directory
from splitlearn.errors import InputError

DEFAULT_MARGIN = 2


@dataclass(frozen=True)
class SplitPlan:
    """The trunk has the layers `[start, end)` of `n_layers`; the client has the others, the embeddings and the head.

    Raises InputError unless `0 <= start < end <= n_layers`.
    """

    start: int
    end: int
    n_layers: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.n_layers:
            raise InputError("split.start", self.start, f"0 to {self.n_layers - 1} for {self.n_layers} layers")
        if not self.start < self.end <= self.n_layers:
            raise InputError("split.end", self.end, f"{self.start + 1} to {self.n_layers}, past split.start")

    @classmethod
    def of(cls, start: int | None, end: int | None, n_layers: int) -> SplitPlan:
        """The plan for the user's settings. None leaves two layers at that end, fewer if the trunk would have none."""
        margin = min(DEFAULT_MARGIN, max(0, n_layers - 1) // 2)
        if start is None:
            start = margin if end is None else max(0, min(margin, end - 1))
        if end is None:
            end = max(n_layers - margin, start + 1)
        return cls(start, end, n_layers)

    def __str__(self) -> str:
        return f"[{self.start}, {self.end})"


def plan_of(config: Config, n_layers: int) -> SplitPlan:
    """The configured plan; of a chain, from its first layer to its last. Raises InputError for other split settings
    beside a chain, and for a chain with more layers than the model."""
    if not (chain := _chain(config)):
        return SplitPlan.of(config.cut.start, config.cut.end, n_layers)
    start, end = chain[0].layers[0], chain[-1].layers[1]
    if end > n_layers:
        expected = f"layers up to {n_layers}: the model has no more"
        raise InputError(f"{chain[-1].field}, link {len(chain)}", chain[-1].text, expected)
    cut = config.cut if config.split != AUTO else SplitConfig()
    for field, given, its_own in (("split.start", cut.start, start), ("split.end", cut.end, end)):
        if given not in (None, its_own):
            raise InputError(field, given, f"{its_own} or null: the chain in {chain[0].field} has it so")
    return SplitPlan(start, end, n_layers)


@dataclass(frozen=True)
class _Link:
    """A link of a chain: its layers, the setting that has it, and how it is written there."""

    layers: tuple[int, int]
    field: str
    text: str


def _chain(config: Config) -> list[_Link]:
    """The links of the configured chain, that of trunk.address or, of trunk servers on Ray, of ray.layers."""
    if config.trunk.on_ray or has_directory(config.trunk.addresses):
        return [_Link(layers, "ray.layers", str(list(layers))) for layers in config.ray.layers or ()]
    return [_Link(link.layers, "trunk.address", str(link)) for link in config.trunk.chain]
