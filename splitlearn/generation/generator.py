"""THE decode loop: one for both arms, over a list of stages.

    for event in Generator(links, tokens, context_length, settings).stream(request): ...

Full is one local stage. Split is local stages with a remote one between them, and the LM head. The loop treats both
alike. It yields facts (`TokenEvent`, then `Done`), from which its caller derives the rest. Several samples share one
prefill. Then they go through the stages in step: a forward has a token of each, and they share one wait for the trunk.
To cancel, close the iterator. That closes the stages' sessions, which frees the trunk's cache.
"""

import sys
from collections import abc
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial

from splitlearn.errors import InputError
from splitlearn.events import Event, GenerationRequest
from splitlearn.generation import sequence
from splitlearn.generation.answer import Answer
from splitlearn.generation.candidates import with_likeliest
from splitlearn.generation.chain import Chain, Link, open_chains
from splitlearn.generation.forward import ChunkedPrefill, Forward, InStep
from splitlearn.generation.grammar import Grammar
from splitlearn.generation.head_overlap import overlapped
from splitlearn.generation.prefix_cache import Prefix, PrefixCache
from splitlearn.generation.sampler import random_source
from splitlearn.generation.settings import GenerationSettings
from splitlearn.generation.speculation import Speculation
from splitlearn.generation.step_timing import Ledger
from splitlearn.generation.stop_strings import StopStrings
from splitlearn.generation.tokenizer import Tokens
from splitlearn.sampling import SEEDS
from splitlearn.stages.base import RestartsRope, Stage
from splitlearn.stages.prefix import PrefixStage

MOST_ECHOED = 2048
"""Tokens of a prompt at most whose logits are all asked for: 4 bytes for each token of the vocabulary, each time."""
Watch = Callable[[Forward], Forward]


@dataclass(frozen=True)
class Generator:
    """Runs one prompt at a time through a chain of stages. `context_length` is None for a model without a limit.
    `prefixes` are kept if the settings of all links keep them."""

    links: Sequence[Link]
    tokens: Tokens
    context_length: int | None
    settings: GenerationSettings
    prefixes: PrefixCache | None = None

    def stream(
        self, request: GenerationRequest, watch: Watch = lambda forward: forward
    ) -> abc.Generator[Event, None, None]:
        """Yield for each sample a TokenEvent per step and a Done at the end.

        `watch` may wrap the forward. Raises InputError for a prompt without tokens (`Tokens.encode`), and if prompt and
        answer do not fit into the context, or a schema cannot be followed. Raises TrunkError if the trunk fails.
        """
        ledger = Ledger()
        ids = self.tokens.encode(request.prompt, request.chat, request.tools)
        request, grammar = self._fitted(request, len(ids)), self._grammar(request)
        encoded = ledger.now()
        ledger.spend("tokenise", encoded)
        with ExitStack() as stack:
            length, prefix = len(ids) + request.max_new_tokens, self._prefix(request, ids)
            keys = () if prefix is None else prefix.keys
            stages, chains = open_chains(
                stack, self.links, len(ids), length, request.samples, keys, request.sampling.seed
            )
            ends = () if request.ignore_eos else self.tokens.eos_ids
            answers = [self._answer(number, request, ids, chain, ends) for number, chain in enumerate(chains)]
            for answer in answers:
                answer.grammar = grammar and grammar.copy()
            if prefix is not None:
                stack.enter_context(prefix.reused(chains[0], answers[0].sequence, request.kept))
                for answer in answers:
                    answer.cached = answers[0].sequence.computed
            ledger.spend("open", ledger.now() - encoded)
            yield from _decode(answers, watch(self._forward(request, stages, ledger, ends)), ledger)

    def _answer(
        self, number: int, request: GenerationRequest, ids: Sequence[int], chain: Chain, ends: Collection[int]
    ) -> Answer:
        sampling, limit, top = request.sampling, self._rope_restart, request.top_logprobs
        text, calls = self.tokens.readers(request, ids)
        return Answer(
            number,
            request,
            len(ids),
            sequence.Sequence(list(ids)),
            chain,
            text,
            StopStrings(request.stop),
            random_source(replace(sampling, seed=(sampling.seed + number) % SEEDS)),
            ends,
            self.settings.top_k,
            Speculation([make() for make in self.settings.proposers]) if self.settings.proposers else None,
            stays_within=sys.maxsize if limit is None or len(ids) > limit else limit,
            logprobs=None if top is None else partial(with_likeliest, tokens=self.tokens, count=top),
            calls=calls,
        )

    def _grammar(self, request: GenerationRequest) -> Grammar | None:
        """What the answer is held to, if to anything. Raises InputError for what it cannot be held to."""
        if request.response_format is not None:
            return Grammar.compile(request.response_format, self.tokens)
        if not request.must_call:
            return None
        form = self.tokens.call_syntax(request.chat).form
        if form is None:
            expected = "auto or none: this model does not write the arguments of a call in JSON"
            raise InputError("tool_choice", "required", expected)
        return Grammar.of_call(form, [tool for tool in request.tools if tool.name in request.must_call], self.tokens)

    def _prefix(self, request: GenerationRequest, ids: Sequence[int]) -> Prefix | None:
        """What is kept of the prompt `ids`. None if nothing is to be reused: an echo needs the logits of all tokens."""
        if self.prefixes is None or request.echo:
            return None
        return self.prefixes.find(ids) if all(link.settings.reuses_prefixes for link in self.links) else None

    @cached_property
    def _rope_restart(self) -> int | None:
        """The length beyond which a sequence is computed again. The first stage, which is never remote, knows it."""
        first = self.links[0].stage
        return first.rope_restart if isinstance(first, RestartsRope) else None

    def _forward(
        self, request: GenerationRequest, stages: Sequence[Stage], ledger: Ledger, ends: Collection[int]
    ) -> Forward:
        """Choose the way of this generation's steps through the stages."""
        if request.echo or any(isinstance(stage, PrefixStage) for stage in stages):
            return InStep(stages, ledger)
        forward: Forward = InStep(stages, ledger)
        free = not request.is_held and request.sampling.takes_the_likeliest  # by the model's own logits
        if self.settings.head_overlap and free and request.samples == 1 and not self.settings.proposers:
            forward = overlapped(stages, ledger, ends) or forward
        chunk = self.settings.chunk_tokens
        return forward if chunk is None else ChunkedPrefill(stages, ledger, chunk, forward)

    def _fitted(self, request: GenerationRequest, prompt: int) -> GenerationRequest:
        """`request` for a prompt of so many tokens. Raises InputError where it does not fit into the context."""
        limit, new = self.context_length, request.max_new_tokens
        if request.echo and prompt > MOST_ECHOED:
            raise InputError("prompt", f"{prompt} tokens", f"at most {MOST_ECHOED} for an echo")
        if limit is None or prompt + new <= limit:
            return request
        if prompt >= limit:
            raise InputError("prompt", f"{prompt} tokens", f"at most {limit - 1} tokens: the context holds {limit}")
        if request.fit_context:
            return replace(request, max_new_tokens=limit - prompt)
        raise InputError(
            "max_new_tokens", new, f"at most {limit - prompt}: the prompt has {prompt} of the context's {limit} tokens"
        )


def _decode(answers: Sequence[Answer], forward: Forward, ledger: Ledger) -> abc.Generator[Event, None, None]:
    """The loop: feed new ids and drafts, sample, emit, until each answer has a reason to end."""
    while live := [answer for answer in answers if answer.reason is None]:
        began, fed = ledger.now(), live[:1] if live[0].prefills else live
        steps = [answer.step() for answer in fed]
        if live[0].speculation is not None:
            ledger.spend("draft", ledger.now() - began)
        logits = forward(steps)
        before = ledger.now()
        for answer in live[len(fed) :]:  # the prompt was fed once
            answer.fork(fed[0])
            logits.append(logits[0])
        for answer, rows in zip(live, logits, strict=True):
            answer.sample(rows)
        at = ledger.now()
        ledger.spend("sample", at - before)
        yield from ledger.close_step([answer.end_step(at - began, at) for answer in live], at)
        for answer in live:
            if answer.reason is not None:
                yield replace(answer.end(answer.reason), spot_checks=answer.chain.spot_checks())
        ledger.spend("emit", ledger.now() - at)
