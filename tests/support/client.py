"""A split client in this process: its own bottom and top, and a trunk behind a real socket."""

from collections.abc import Callable, Iterator, Sequence
from collections.abc import Generator as Generating
from contextlib import contextmanager
from dataclasses import replace

import torch

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.client.forwarding_chain import ForwardingChain
from splitlearn.client.hop import Hop
from splitlearn.client.remote_stage import RemoteStage
from splitlearn.events import Event, GenerationRequest, TokenEvent
from splitlearn.generation.chain import Link
from splitlearn.generation.generator import Generator
from splitlearn.generation.prefix_cache import PrefixCache
from splitlearn.generation.tokenizer import Tokens
from splitlearn.metrics import RunMetrics
from splitlearn.models.plan import SplitPlan
from splitlearn.stages import loading
from tests.support.trunk import PLAN, served
from tests.support.words import generation_of, load_of, session_of

CACHED = frozenset({"use_cache", "inference_mode"})
At = Callable[[int], object]


class Client:
    """A client that runs prompts one after the other. `stages` are the servers of its trunk, and `stage` is the first.
    With `hops` it has a chain of them, which may `forward`, and `addresses` are not used."""

    def __init__(
        self,
        files: ModelFiles,
        addresses: Sequence[str],
        timeout_s: float = 60,
        trunk: frozenset[str] = CACHED,
        own: frozenset[str] = CACHED,
        hops: Sequence[Hop] = (),
        forward: bool = False,
    ) -> None:
        placement = loading.Placement(torch.device("cpu"), torch.float32)
        hops = hops or [Hop(PLAN, tuple(addresses))]
        plan = SplitPlan(hops[0].plan.start, hops[-1].plan.end, files.n_layers)
        bottom, *rest = loading.load(files, loading.client_specs(plan), load_of(own), placement).chain
        if forward:
            whole = served(files, plan)
            self.stages = [RemoteStage((), whole, timeout_s, chain=ForwardingChain(hops, whole, timeout_s))]
        else:
            self.stages = [RemoteStage(hop.addresses, hop.of(served(files)), timeout_s) for hop in hops]
        self.stage = self.stages[0]
        links = [Link(bottom, session_of(own)), *(Link(stage, session_of(trunk)) for stage in self.stages)]
        links += [Link(stage, session_of(own)) for stage in rest]
        tokens = Tokens.load(files.folder, use_fast=True)
        self._generator = Generator(links, tokens, files.facts.context_length, generation_of(own))

    def keep(self, prefixes: PrefixCache) -> None:
        """Reuse and keep `prefixes` from now on, if the flags say so."""
        self._generator = replace(self._generator, prefixes=prefixes)

    def stream(self, request: GenerationRequest) -> Generating[Event, None, None]:
        """The events of the answer."""
        return self._generator.stream(request)

    def ask(self, request: GenerationRequest, at: At = lambda token: None) -> RunMetrics:
        """Run `request` to its end. Calls `at(n)` when there are n tokens."""
        events = []
        for event in self.stream(request):
            events.append(event)
            if isinstance(event, TokenEvent):
                at(len(events))
        metrics = RunMetrics.from_events(events)
        assert metrics is not None
        return metrics


@contextmanager
def client(
    files: ModelFiles,
    *addresses: str,
    timeout_s: float = 60,
    trunk: frozenset[str] = CACHED,
    own: frozenset[str] = CACHED,
    hops: Sequence[Hop] = (),
    forward: bool = False,
) -> Iterator[Client]:
    """A client of the trunks at `addresses`, or of the chain of `hops`."""
    made = Client(files, addresses, timeout_s, trunk, own, hops, forward)
    try:
        yield made
    finally:
        for stage in made.stages:
            stage.close()
