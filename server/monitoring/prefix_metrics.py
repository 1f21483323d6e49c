"""Metrics of kept prefixes, read from their store when metrics are collected."""

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from server.monitoring.metrics import PREFIX
from splitlearn.kvcache.prefix_store import PrefixStore

Family = CounterMetricFamily | GaugeMetricFamily


class PrefixCollector(Collector):
    """The metrics of the store that `store` returns. A tier is memory, file or, on a GPU, device."""

    def __init__(self, store: Callable[[], PrefixStore]) -> None:
        self._store = store

    def collect(self) -> Iterator[Family]:
        tokens = CounterMetricFamily(
            f"{PREFIX}prefix_tokens",
            "Prompt tokens that were looked for among kept prefixes, by the tier where they were found.",
            labels=["found"],
        )
        evictions = CounterMetricFamily(
            f"{PREFIX}prefix_evictions", "Blocks of kept prefixes that left a tier for lack of room.", labels=["tier"]
        )
        moved = CounterMetricFamily(
            f"{PREFIX}prefix_moved_bytes", "Bytes copied to a tier and from it.", labels=["direction", "tier"]
        )
        used = GaugeMetricFamily(f"{PREFIX}prefix_bytes", "Bytes of kept prefixes.", labels=["tier"])
        limit = GaugeMetricFamily(f"{PREFIX}prefix_bytes_limit", "Bytes that kept prefixes may take.", labels=["tier"])
        store = self._store()
        tokens.add_metric(["nowhere"], store.misses)
        for tier in store.tiers:
            tokens.add_metric([tier.name], tier.counts.hits)
            evictions.add_metric([tier.name], tier.counts.evictions)
            moved.add_metric(["in", tier.name], tier.counts.bytes_in)
            moved.add_metric(["out", tier.name], tier.counts.bytes_out)
            used.add_metric([tier.name], tier.nbytes)
            limit.add_metric([tier.name], tier.max_bytes)
        yield from (tokens, evictions, moved, used, limit)
