"""A worker process: it loads one arm, then runs generations until its parent ends it.

The worker sends `ArmReady`, then answers each (flags, request) with events and an `ArmEnd`, or with an error. A request
may have other session flags than those that were loaded. The worker looks for a cancellation between two steps. It
sends `Reconnecting` within a step.
"""

import pickle
from collections import abc
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache, partial
from multiprocessing.connection import Connection

import torch

from splitlearn.arms import draft_model
from splitlearn.arms.serving import Send, Serving, sender
from splitlearn.arms.spec import (
    CANCEL,
    ArmEnd,
    ArmReady,
    ArmSpec,
    CandidatesRequest,
    ServeCancel,
    ServedItem,
    ServeRequest,
    TokenCandidates,
)
from splitlearn.arms.texts import texts_of
from splitlearn.checkpoints import chat_template
from splitlearn.checkpoints.folder import read_config
from splitlearn.client.forwarding_chain import ForwardingChain
from splitlearn.client.hop import Hop
from splitlearn.client.remote_stage import RemoteStage
from splitlearn.errors import InputError, as_error
from splitlearn.events import Event, Reconnecting
from splitlearn.flags.registry import SIDES, Settings, of_scope, settings
from splitlearn.flags.selection import FlagSet
from splitlearn.generation.candidates import LogitsOf, likeliest, token_at
from splitlearn.generation.chain import Link
from splitlearn.generation.forward import Forward
from splitlearn.generation.generator import Generator
from splitlearn.generation.prefix_cache import PrefixCache
from splitlearn.generation.speculation import Proposer
from splitlearn.generation.tokenizer import Tokens
from splitlearn.kvcache.prefix_files import secret_of, store_of
from splitlearn.models.plan import SplitPlan
from splitlearn.models.structure import active_experts
from splitlearn.runtime import process
from splitlearn.scheduling.batching import Batching
from splitlearn.stages import loading
from splitlearn.stages.base import Stage
from splitlearn.stages.layerwise import trunk_layer_by_layer
from splitlearn.stages.spot_checks import SpotChecks
from splitlearn.wire.codec import DTYPES

COMPILE_TIMEOUT_S = 1800.0
"""The least timeout for a trunk that compiles, or exports its layers for another engine. Its first step, or session,
waits until that is done, for 26 layers on two cores more than two minutes."""
SHARING = frozenset({"use_cache", "cache=reserved"})
"""The session flags with which steps share forwards."""
Watch = Callable[[Reconnecting], None]


@dataclass(frozen=True)
class Arm:
    """A loaded arm. `answers` generates under the flags it was loaded with, `under` makes the generator for others that
    differ in session flags. `trunks` are the servers of its remote trunk. `serving` makes what runs many at once."""

    answers: Generator
    under: Callable[[FlagSet], Generator]
    trunks: tuple[RemoteStage, ...]
    ready: ArmReady
    serving: Callable[[Send], Serving]


def work(connection: Connection, spec: ArmSpec) -> None:
    """Load the arm, then serve requests, until the parent closes `connection` or kills the process."""
    try:
        arm = load(spec, connection.send)
    except Exception as error:
        connection.send(as_error(error, "loading the model"))
        return
    connection.send(arm.ready)
    loading_peak = process.peak_resident_bytes()
    serving = cache(lambda: arm.serving(sender(connection)))
    while True:
        message = connection.recv()
        if message == CANCEL:  # the generation had ended before it came
            continue
        try:
            if isinstance(message, ServeRequest | ServeCancel):
                _serve(message, serving, connection)
                continue
            if isinstance(message, CandidatesRequest):
                connection.send(_candidates(arm.under(message.flags), message, connection))
                continue
            flags, request = message
            answers, events = arm.under(flags), list[Event]()
            process.reset_peak()
            for event in _until_cancelled(answers.stream(request), connection):
                # connection.send() pickles in Python: this takes a third less time.
                connection.send_bytes(pickle.dumps(event, pickle.HIGHEST_PROTOCOL))
                events.append(event)
            peak = max(loading_peak, process.peak_resident_bytes())
            facts = tuple(facts for trunk in arm.trunks for facts in trunk.facts_of_each)
            connection.send(ArmEnd(peak, facts, texts_of(answers.tokens, events, request)))
        except Exception as error:  # the run fails with its cause; the worker goes on
            connection.send(as_error(error, "generating"))


def _serve(message: ServeRequest | ServeCancel, serving: Callable[[], Serving], connection: Connection) -> None:
    """Begin or cancel one of several generations."""
    try:
        if isinstance(message, ServeRequest):
            serving().start(message)
        else:
            serving().cancel(message.number)
    except Exception as error:  # no engine could be made
        connection.send(ServedItem(message.number, as_error(error, "preparing for many requests")))


def load(spec: ArmSpec, watch: Watch = lambda notice: None) -> Arm:
    """Load an arm into this process. Sets torch's threads and other settings of the whole process. `watch` sees each
    try to reach a lost trunk."""
    local = _local_settings(spec)
    threads = loading.prepare_process(local.process, spec.threads)
    before = process.resident_bytes()
    tokens = read_tokens(spec)
    tokenizer_bytes = process.resident_bytes() - before
    loaded = loading.load(spec.files, _specs(spec), local.load, loading.Placement.of(spec.device, spec.dtype))
    trunks = open_trunks(spec, watch)
    drafting, draft_load_s = _load_draft(spec)
    ready = ArmReady(loaded.load_s + draft_load_s, loaded.import_rss_bytes - tokenizer_bytes, threads)

    store = store_of(spec.prefix_cache, torch.device(spec.device), _context(spec.loaded(), ""))
    prefixes = PrefixCache(store, secret_of(spec.prefix_cache), b"")

    @cache
    def under(flags: FlagSet) -> Generator:
        return generator(replace(spec, flags=flags), loaded.chain, trunks, tokens, drafting, prefixes)

    def serving(send: Send) -> Serving:
        own = open_trunks(spec)  # a lost trunk is nobody's notice here: it would not say whose

        def over(asked: ServeRequest, stages: Sequence[Stage], trunks: Sequence[RemoteStage]) -> Generator:
            return generator(replace(spec, flags=asked.flags), stages, trunks, tokens, drafting, prefixes, asked.holder)

        usual = settings(_own_flags(spec) | SHARING).session
        return Serving(Batching.of(loaded.chain, usual, spec.kv_bytes, "api.kv_bytes"), own, over, send)

    return Arm(under(spec.flags), under, trunks, ready, serving)


def _until_cancelled(events: abc.Generator[Event, None, None], connection: Connection) -> Iterator[Event]:
    """The events up to a cancellation. Leaving closes the generation, which frees its sessions, also the trunk's."""
    with closing(events):
        for event in events:
            yield event
            if connection.poll():
                connection.recv()
                return


def _candidates(answers: Generator, asked: CandidatesRequest, connection: Connection) -> TokenCandidates:
    """Generate the answer again, as far as the token that is asked for."""
    found: list[LogitsOf] = []

    def watch(forward: Forward) -> Forward:
        found.append(LogitsOf(forward, asked.sample, asked.at))
        return found[0]

    token = token_at(_until_cancelled(answers.stream(asked.request, watch), connection), asked.sample, asked.at)
    if token is None or found[0].row is None:
        return TokenCandidates()
    return TokenCandidates(token, likeliest(found[0].row, answers.tokens, asked.also))


def _local_settings(spec: ArmSpec) -> Settings:
    return settings(_own_flags(spec))


def _own_flags(spec: ArmSpec) -> frozenset[str]:
    return spec.flags.full if spec.kind == "full" else spec.flags.client


def _specs(spec: ArmSpec) -> list[loading.StageSpec]:
    if spec.kind == "full":
        return loading.full_specs(spec.plan.n_layers)
    bottom, *rest = loading.client_specs(spec.plan)
    return [bottom, *rest] if spec.hops else [bottom, *loading.trunk_specs(spec.plan), *rest]


def open_trunks(spec: ArmSpec, watch: Watch = lambda notice: None) -> tuple[RemoteStage, ...]:
    """The stages of the remote trunk, none if the arm has none, one for a chain whose servers forward. A first session
    at each connects, and starts a variant if need be."""
    stages = [_forwarding(spec, watch)] if spec.forward else [_remote(spec, hop, watch) for hop in spec.hops]
    for stage in stages:
        stage.open(settings(spec.flags.trunk).session, max_length=1).close()
    return tuple(stages)


def _remote(spec: ArmSpec, hop: Hop, watch: Watch) -> RemoteStage:
    timeout_s, checks = step_timeout_s(spec), _spot_checks(spec, hop.plan)
    return RemoteStage(hop.addresses, hop.of(spec.served()), timeout_s, hop.credentials, hop.via, watch, checks)


def _forwarding(spec: ArmSpec, watch: Watch) -> RemoteStage:
    served, timeout_s = spec.served(), step_timeout_s(spec)
    if spec.verify and any(flag.startswith("wire_dtype") for flag in spec.flags.trunk):
        expected = "0 with wire_dtype in a chain that forwards, where each link rounds; or set trunk.forward: false"
        raise InputError("trunk.verify", spec.verify, expected)
    chain = ForwardingChain(spec.hops, served, timeout_s)
    return RemoteStage((), served, timeout_s, watch=watch, checks=_spot_checks(spec, spec.plan), chain=chain)


def _spot_checks(spec: ArmSpec, plan: SplitPlan) -> SpotChecks | None:
    """What checks the answers of the layers of `plan`, None for nothing. Raises InputError for weights that are not the
    file's, and for a model of which honest answers may differ by more than rounding."""
    if not spec.verify:
        return None
    applied, dtype = settings(spec.flags.trunk), DTYPES[spec.dtype]
    if (applied.load.weight_bits or 32) < 32:
        expected = "0 with weight_dtype at the trunk: its weights are not the file's"
        raise InputError("trunk.verify", spec.verify, expected)
    if active_experts(read_config(spec.files.folder)) is not None:
        expected = f"0 for {spec.files.name}, a mixture of experts: rounding may choose other experts"
        raise InputError("trunk.verify", spec.verify, expected)
    reference = partial(trunk_layer_by_layer, spec.files, plan, dtype)
    # A flag of process scope may let the trunk, or the reference in this process, multiply float32 in bfloat16.
    rounds = any(of_scope(spec.flags.of(side), "process") for side in ("client", "trunk"))
    least = torch.bfloat16 if rounds and dtype == torch.float32 else dtype
    return SpotChecks(spec.verify, plan, reference, least)


def step_timeout_s(spec: ArmSpec) -> float:
    """How long a step may take at the trunk, in seconds."""
    load = settings(spec.flags.trunk).load
    prepares = load.compile_stage is not None or load.engine is not None
    return max(spec.timeout_s, COMPILE_TIMEOUT_S) if prepares else spec.timeout_s


def read_tokens(spec: ArmSpec) -> Tokens:
    """The arm's tokenizer. Reading it takes 80 MB, of which a sixth stays, so it is read before the weights."""
    use_fast = _local_settings(spec).generation.use_fast_tokenizer
    tokens = Tokens.load(spec.files.folder, use_fast=use_fast)
    if tokens.chat_templates:
        chat_template.prepare()  # which goes on while the weights are loaded
    process.trim_heap()
    return tokens


def _load_draft(spec: ArmSpec) -> tuple[list[Callable[[], Proposer]], float]:
    """Functions that make the draft model's proposers, none if the flags ask for no drafts; the seconds of loading."""
    if spec.draft is None or not _local_settings(spec).generation.draft_model:
        return [], 0.0
    make, load_s = draft_model.load(spec.draft, loading.Placement.of(spec.device, spec.dtype))
    return [make], load_s


def generator(
    spec: ArmSpec,
    stages: Sequence[Stage],
    trunks: Sequence[RemoteStage],
    tokens: Tokens,
    drafting: Sequence[Callable[[], Proposer]] = (),
    prefixes: PrefixCache | None = None,
    holder: str = "",
) -> Generator:
    """The decode loop over the arm's local stages. The remote `trunks` come after the first stage, the proposers of
    `drafting` after those of the flags. `prefixes` are the process's kept ones, of which it sees those of `holder`."""
    local = _local_settings(spec)
    links = [Link(stage, local.session) for stage in stages]
    links[1:1] = [Link(trunk, settings(spec.flags.trunk).session) for trunk in trunks]
    generation = replace(local.generation, proposers=(*local.generation.proposers, *drafting))
    limit = spec.files.facts.context_length
    own = None if prefixes is None else replace(prefixes, context=_context(spec, holder))
    return Generator(links, tokens, limit, generation, own)


def _context(spec: ArmSpec, holder: str) -> bytes:
    """All that the arm's keys and values depend on besides token ids, and whose they are."""
    flags = [sorted(spec.flags.of(side)) for side in SIDES]
    cuts = [spec.plan, *(hop.plan for hop in spec.hops)]
    return repr((spec.kind, spec.files.digest, cuts, spec.device, spec.dtype, flags, holder)).encode()
