"""What a run of an arm gives: events as they come, then its report."""

from dataclasses import dataclass

from splitlearn.arms.spec import Kind, Texts
from splitlearn.client.served import TrunkFacts
from splitlearn.events import Event, Reconnecting, SpotCheckResult
from splitlearn.link.emulated import Link
from splitlearn.metrics import RunMetrics


@dataclass(frozen=True)
class ArmReport:
    """One arm's run: its figures, and what its process (and the trunk's) took. `compile_s` includes discarded runs.
    `kv_bytes_per_token` is what a token takes in the trunk's KV cache; 0 for the full arm."""

    kind: Kind
    metrics: RunMetrics
    load_s: float
    compile_s: float
    import_rss_bytes: int
    peak_rss_bytes: int
    dtype: str
    device: str
    threads: int
    trunk_address: str | None
    trunk: TrunkFacts | None
    kv_bytes_per_token: int = 0
    texts: Texts = Texts()
    others: tuple[RunMetrics, ...] = ()
    """Of the samples after the first."""
    link: Link = Link()
    """The emulated link to the trunk."""
    hops: tuple[TrunkFacts, ...] = ()
    """What each server of a chain said of itself; `trunk` has all together."""

    @property
    def samples(self) -> tuple[RunMetrics, ...]:
        """The figures of every sample."""
        return (self.metrics, *self.others)

    @property
    def spot_checks(self) -> SpotCheckResult:
        """Those of every sample."""
        return SpotCheckResult.of(sample.spot_checks for sample in self.samples)

    @property
    def kv_shipped_bytes(self) -> float:
        """What each decoded token would cost each way on the wire, if the trunk kept no KV cache and it were shipped at
        each step: the trunk's KV bytes per token * the mean context, prompt_tokens + n_tokens / 2."""
        return self.kv_bytes_per_token * (self.metrics.prompt_tokens + self.metrics.n_tokens / 2)

    @property
    def added_bytes(self) -> int:
        """Peak memory beyond the imports, of the arm's process and of the trunk's process."""
        there = self.trunk.peak_rss_bytes - self.trunk.import_rss_bytes if self.trunk else 0
        return self.peak_rss_bytes - self.import_rss_bytes + there


@dataclass(frozen=True)
class Restart:
    """The run that was under way compiled something: what it showed is void, and it begins again."""


Item = Event | Reconnecting | Restart | ArmReport
