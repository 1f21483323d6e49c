"""A chain of three trunk servers over links: servers that forward against a client that passes each answer on.

Every link of the chain is emulated, also those between servers: a proxy stands before each server, and both the client
and the server before it connect there. The shares of the trunk's layers are as equal as they can be.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from bench.answer import answer, text_of
from bench.chained import chain_config, parts
from bench.pairs import warm_blocks
from bench.report import write
from splitlearn.arms.compare import environment
from splitlearn.arms.embedded_server import EmbeddedTrunk
from splitlearn.arms.runs import Runs
from splitlearn.config import Config, RunsConfig, SplitConfig, serving
from splitlearn.events import GenerationRequest
from splitlearn.generation.tokenizer import Tokens
from splitlearn.lab.stats import effect
from splitlearn.link.emulated import Link
from splitlearn.link.proxy import Proxy
from splitlearn.metrics import RunMetrics
from splitlearn.runtime.progress import silent

BLOCKS, LINKS, TOKENS, PROMPT_TOKENS = 6, 3, 48, 2000
FAR, NARROW = Link(rtt_ms=20), Link(rtt_ms=20, up_mbit=50, down_mbit=50)
FLAGS = "fast"
PROMPT = "Explain in two sentences why the sky is blue."


def main(runs: Runs, blocks: int = BLOCKS) -> None:
    """Measure and write docs/results/chain.md."""
    config = runs.config.model_copy(update={"runs": RunsConfig(threads=1), "flags": FLAGS})
    layers = parts(runs.plan, LINKS)
    with chained_over(config, runs, layers) as (addresses, proxies):
        forwarding, driven = (chain_config(config, layers, addresses, forward=each) for each in (True, False))
        with Runs(forwarding, silent) as one, Runs(driven, silent) as other:
            rows = [*_tpot(one, other, proxies, blocks), *_ttft(one, proxies, blocks)]
    ranges = ", ".join(f"[{start}, {end})" for start, end in layers)
    text = (
        f"Flags `{FLAGS}`, one thread for each process, a chain of {LINKS} servers with the layers {ranges}; all "
        f"processes share this machine. TPOT: answers of {TOKENS} tokens over links of {FAR.summary}. TTFT: a prompt "
        f"of {PROMPT_TOKENS} tokens over links of {NARROW.summary}, each with its own bandwidth. {blocks} blocks, the "
        "arms of a row in random order in each; geometric mean ratios with 95% intervals.\n\nA token of three servers "
        "that forward crosses four times half a round trip, 40 ms; where the client passes answers on it is three "
        "round trips, 60 ms. With c ms of computing and of gRPC a token the ratio is (40 + c) / (60 + c): 0.667 if "
        "computing were free, at most 0.7 while c is at most 6.7 ms."
    )
    write("chain", "A chain of trunk servers over links", text, rows, environment(runs))


def _tpot(forwarding: Runs, driven: Runs, proxies: list[Proxy], blocks: int) -> list[dict[str, Any]]:
    _shape(proxies, FAR)
    request = GenerationRequest(PROMPT, max_new_tokens=TOKENS, ignore_eos=True)
    arms = {
        name: partial(answer, runs, "split", runs.flags(FLAGS), request)
        for name, runs in (("forwarding", forwarding), ("driven", driven))
    }
    found = warm_blocks(arms, blocks)
    one, other = ([run.tpot_s or 0.0 for run in found[name]] for name in arms)
    return [_row("TPOT, the servers forward / the client passes answers on", one, other, found)]


def _ttft(runs: Runs, proxies: list[Proxy], blocks: int) -> list[dict[str, Any]]:
    _shape(proxies, NARROW)
    prompt = text_of(Tokens.load(runs.files.folder, use_fast=True), PROMPT_TOKENS)
    request = GenerationRequest(prompt, max_new_tokens=2, chat=False, ignore_eos=True)
    whole = runs.flags(FLAGS)
    chunked = whole.with_side("client", whole.client | {"prefill_overlap"})
    arms = {
        name: partial(answer, runs, "split", flags, request) for name, flags in (("chunks", chunked), ("whole", whole))
    }
    found = warm_blocks(arms, blocks)
    one, other = ([run.ttft_s for run in found[name]] for name in arms)
    return [_row("TTFT, the prompt in chunks / as a whole, the servers forward", one, other, found)]


def _row(what: str, one: list[float], other: list[float], found: dict[str, list[RunMetrics]]) -> dict[str, Any]:
    answers = [run.token_ids for runs in found.values() for run in runs]
    return {
        "what": what,
        "means, ms": " / ".join(f"{sum(each) / len(each) * 1e3:.1f}" for each in (one, other)),
        "ratio": str(effect(one, other)),
        "the same token ids": f"{sum(ids == answers[0] for ids in answers)} of {len(answers)}",
    }


def _shape(proxies: list[Proxy], link: Link) -> None:
    for proxy in proxies:
        proxy.shape(link)


@contextmanager
def chained_over(
    config: Config, runs: Runs, layers: list[tuple[int, int]]
) -> Iterator[tuple[list[list[str]], list[Proxy]]]:
    """Servers with these layers, each behind a proxy of its own: where to connect, and the proxies."""
    with ExitStack() as stack:
        addresses, proxies = list[str](), list[Proxy]()
        applied = runs.flags(FLAGS).trunk
        for start, end in reversed(layers):
            to = config.server.forward_to.model_copy(update={"addresses": tuple(addresses[:1])})
            server = config.server.model_copy(update={"forward_to": to})
            own = config.model_copy(update={"split": SplitConfig(start=start, end=end), "server": server})
            trunk = EmbeddedTrunk(serving(own, applied))
            stack.callback(trunk.stop)
            proxies.insert(0, stack.enter_context(Proxy()))
            addresses.insert(0, proxies[0].route(trunk.address))
        yield [[address] for address in addresses], proxies
