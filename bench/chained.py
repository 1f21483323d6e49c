"""Chains of trunk servers on this machine, for measurements."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from splitlearn.arms.embedded_server import EmbeddedTrunk
from splitlearn.arms.runs import Runs
from splitlearn.config import Config, SplitConfig, parse, serving
from splitlearn.models.plan import SplitPlan
from splitlearn.runtime.progress import silent


def parts(plan: SplitPlan, links: int) -> list[tuple[int, int]]:
    """The layers of `plan` for so many links, as evenly as can be."""
    count = plan.end - plan.start
    bounds = [plan.start + count * at // links for at in range(links + 1)]
    return list(zip(bounds, bounds[1:], strict=False))


@contextmanager
def servers(config: Config, layers: list[tuple[int, int]], each: int) -> Iterator[list[list[EmbeddedTrunk]]]:
    """`each` servers for each of the ranges `layers`, which may forward to those of the next range. Those that die are
    started again."""
    started: list[list[EmbeddedTrunk]] = []
    try:
        for start, end in reversed(layers):
            after = tuple(trunk.address for trunk in started[0]) if started else ()
            to = config.server.forward_to.model_copy(update={"addresses": after})
            server = config.server.model_copy(update={"forward_to": to})
            own = config.model_copy(update={"split": SplitConfig(start=start, end=end), "server": server})
            started.insert(0, [])
            for _ in range(each):
                started[0].append(EmbeddedTrunk(own))
        yield started
    finally:
        for trunk in (each for link in started for each in link):
            trunk.stop()


def chain_config(config: Config, layers: list[tuple[int, int]], addresses: list[list[str]], **trunk: Any) -> Config:
    """The settings of a client of the chain whose servers listen at `addresses`."""
    links = [{"layers": each, "address": at} for each, at in zip(layers, addresses, strict=True)]
    plain = {**config.model_dump(), "split": {}}
    return parse({**plain, "trunk": {**plain["trunk"], **trunk, "address": links}})


@contextmanager
def chained(runs: Runs, links: int, each: int, flags: str) -> Iterator[tuple[Runs, list[EmbeddedTrunk]]]:
    """Runs through a chain of so many links with `each` servers, and the servers. `flags` are those of the servers."""
    layers = parts(runs.plan, links)
    with servers(serving(runs.config, runs.flags(flags).trunk), layers, each) as found:
        addresses = [[trunk.address for trunk in link] for link in found]
        with Runs(chain_config(runs.config, layers, addresses), silent) as own:
            yield own, [trunk for link in found for trunk in link]
