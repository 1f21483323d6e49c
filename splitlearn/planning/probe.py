"""Measures a running trunk server and the link to it, by ordinary sessions of this client.

The server says by Describe what its layers take and what memory it has and needs. What a step takes beside the layers
and the link is the rest of what the client waits.
"""

from dataclasses import dataclass, replace

from splitlearn.client.real_link import real_link
from splitlearn.client.served import ServedModel, describe
from splitlearn.errors import InputError
from splitlearn.link.emulated import Link
from splitlearn.models.plan import SplitPlan
from splitlearn.planning.network import MESSAGE_BYTES
from splitlearn.runtime import process
from splitlearn.wire import trunk_pb2 as pb
from splitlearn.wire.channel import Credentials

STEPS, REPEATS = 16, 3
"""Decoded tokens of a session, and sessions, of which the quickest counts."""
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Request:
    """What the child process needs to run sessions at `address`, each with a prompt of `prompt_tokens`."""

    address: str
    credentials: Credentials
    served: ServedModel
    flags: frozenset[str]
    prompt_tokens: int


@dataclass(frozen=True)
class Waits:
    """The least seconds from a step's hidden state to its answer, and the bytes of a token's hidden state."""

    first_s: float
    step_s: float
    row_bytes: float


@dataclass(frozen=True)
class ServerFacts:
    """A server's own figures, for the layers `[start, end)`: `decode_s` and `prefill_s` are those of all of them."""

    start: int
    end: int
    threads: int
    link: Link
    decode_s: float
    prefill_s: float
    step_s: float
    start_s: float
    memory_bytes: int
    base_bytes: int
    weight_bytes: int
    row_bytes: float


def link_to(address: str, credentials: Credentials) -> Link:
    """The link to a server. Raises TrunkError, and InputError for one that refuses to measure its bandwidth."""
    found = real_link(address, credentials)
    if found.up_bits_per_s is None or found.down_bits_per_s is None:
        raise InputError("links", address, "a link with its figures given: the server refuses what would measure it")
    up, down = (round(min(10_000.0, bits / 1e6), 1) for bits in (found.up_bits_per_s, found.down_bits_per_s))
    return Link(round(found.rtt_s * 1e3, 3), 0.0, up, down)


def ask(address: str, credentials: Credentials, flags: frozenset[str], prompt_tokens: int) -> ServerFacts:
    """Measure the server at `address` with the trunk's `flags`. Raises TrunkError, and InputError for a server whose
    own flags are others."""
    said = describe(address, credentials)
    plan = SplitPlan(said.start, said.end, said.n_layers)
    served = ServedModel(said.model, said.digest, plan, said.dtype, said.hidden_size)
    request = Request(address, credentials, served, flags, prompt_tokens)
    link = link_to(address, credentials)
    waits: Waits = process.ask("The process that asks a server", "splitlearn.planning.probe_main:answer", request)
    return facts_of(describe(address, credentials, costs=True), link, waits, prompt_tokens)


def facts_of(said: pb.Description, link: Link, waits: Waits, prompt_tokens: int) -> ServerFacts:
    """A server's figures: what it says of itself, and the rest of what the client waited.

    A call of Describe takes longer than a message of an open session. So the round trip is at most what a step leaves.
    """
    costs = said.costs
    if not costs.decode_s:
        raise InputError(
            "flags", f"layers [{said.start}, {said.end})", "the server's own flags, so that it can say more"
        )
    link = replace(link, rtt_ms=min(link.rtt_ms, round(max(0.0, waits.step_s - costs.decode_s) * 1e3, 3)))
    size, prompt = round(waits.row_bytes + MESSAGE_BYTES), round(waits.row_bytes * prompt_tokens + MESSAGE_BYTES)
    step_s = max(0.0, waits.step_s - costs.decode_s - _trip_s(link, size))
    layers_s = costs.decode_s + (prompt_tokens - 1) * costs.prefill_s
    return ServerFacts(
        said.start,
        said.end,
        said.threads,
        link,
        costs.decode_s,
        costs.prefill_s,
        step_s,
        max(0.0, waits.first_s - layers_s - _trip_s(link, prompt) - step_s),
        costs.memory_bytes,
        costs.base_bytes,
        costs.weight_bytes,
        waits.row_bytes,
    )


def _trip_s(link: Link, size: int) -> float:
    return link.up.expected_s(size) + link.down.expected_s(size)
