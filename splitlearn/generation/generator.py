"""THE decode loop: one for both arms, over a list of stages.

    for event in Generator(links, tokens, context_length, settings).stream(request): ...

Full is one local stage; split is local stages, a remote one between them, and the LM head. The loop knows neither. It
yields facts (`TokenEvent`, then `Done`); its caller derives the rest. Several samples share one prefill and then go
through the stages in step: a forward has a token of each, and a trip to the trunk is waited for once. To cancel, close
the iterator: that closes the stages' sessions, and so frees the trunk's cache.
"""

import sys
from collections import abc
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property

from splitlearn.errors import InputError
from splitlearn.events import Done, Event, GenerationRequest
from splitlearn.generation import sequence
from splitlearn.generation.answer import Answer
from splitlearn.generation.chain import Chain, Link, open_chains
from splitlearn.generation.forward import ChunkedPrefill, Forward, InStep
from splitlearn.generation.head_overlap import overlapped
from splitlearn.generation.sampler import random_source
from splitlearn.generation.settings import GenerationSettings
from splitlearn.generation.speculation import Speculation
from splitlearn.generation.step_timing import Ledger
from splitlearn.generation.stop_strings import StopStrings
from splitlearn.generation.tokenizer import Tokens
from splitlearn.sampling import SEEDS
from splitlearn.stages.base import Stage
from splitlearn.stages.local import LocalStage
from splitlearn.stages.prefix import PrefixStage

Watch = Callable[[Forward], Forward]


@dataclass(frozen=True)
class Generator:
    """Runs a prompt at a time through a chain of stages. `context_length` is None for a model without a limit."""

    links: Sequence[Link]
    tokens: Tokens
    context_length: int | None
    settings: GenerationSettings

    def stream(
        self, request: GenerationRequest, watch: Watch = lambda forward: forward
    ) -> abc.Generator[Event, None, None]:
        """Yield a TokenEvent for each step and a Done at the end, of each sample.

        Raises InputError for a prompt that encodes to nothing (`Tokens.encode`) and when prompt and answer do not fit
        into the context, TrunkError for a trunk that fails. `watch` may wrap the forward.
        """
        ledger = Ledger()
        ids = self.tokens.encode(request.prompt, request.chat)
        self._check_length(len(ids), request.max_new_tokens)
        encoded = ledger.now()
        ledger.spend("tokenise", encoded)
        with ExitStack() as stack:
            length = len(ids) + request.max_new_tokens
            stages, chains = open_chains(stack, self.links, len(ids), length, request.samples)
            ledger.spend("open", ledger.now() - encoded)
            ends = () if request.ignore_eos else self.tokens.eos_ids
            answers = [self._answer(number, request, ids, chain, ends) for number, chain in enumerate(chains)]
            yield from _decode(answers, watch(self._forward(request, stages, ledger, ends)), ledger)

    def _answer(
        self, number: int, request: GenerationRequest, ids: Sequence[int], chain: Chain, ends: Collection[int]
    ) -> Answer:
        sampling, limit = request.sampling, self._rope_restart
        return Answer(
            number,
            request,
            len(ids),
            sequence.Sequence(list(ids)),
            chain,
            self.tokens.detokenizer(),
            StopStrings(request.stop),
            random_source(replace(sampling, seed=(sampling.seed + number) % SEEDS)),
            ends,
            self.settings.top_k,
            Speculation([make() for make in self.settings.proposers]) if self.settings.proposers else None,
            stays_within=sys.maxsize if limit is None or len(ids) > limit else limit,
        )

    @cached_property
    def _rope_restart(self) -> int | None:
        """The length past which a sequence is computed anew; the first stage, which is always local, has it."""
        first = self.links[0].stage
        return first.rope_restart if isinstance(first, LocalStage) else None

    def _forward(
        self, request: GenerationRequest, stages: Sequence[Stage], ledger: Ledger, ends: Collection[int]
    ) -> Forward:
        """How this generation's steps go through the stages."""
        if any(isinstance(stage, PrefixStage) for stage in stages):
            return InStep(stages, ledger)
        forward: Forward = InStep(stages, ledger)
        greedy = request.samples == 1 and request.sampling.takes_the_likeliest and not self.settings.proposers
        if self.settings.head_overlap and greedy:
            forward = overlapped(stages, ledger, ends) or forward
        chunk = self.settings.piece_tokens
        return forward if chunk is None else ChunkedPrefill(stages, ledger, chunk, forward)

    def _check_length(self, prompt: int, new: int) -> None:
        limit = self.context_length
        if limit is None or prompt + new <= limit:
            return
        if prompt >= limit:
            raise InputError("prompt", f"{prompt} tokens", f"at most {limit - 1} tokens: the context holds {limit}")
        raise InputError(
            "max_new_tokens", new, f"at most {limit - prompt}: the prompt has {prompt} of the context's {limit} tokens"
        )


def _decode(answers: Sequence[Answer], forward: Forward, ledger: Ledger) -> abc.Generator[Event, None, None]:
    """The loop: feed what is new and drafts, sample, emit, until each answer has a reason to end."""
    while live := [answer for answer in answers if answer.reason is None]:
        began, fed = ledger.now(), live if live[0].sequence.computed else live[:1]
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
                text, ids = answer.stops.flush(answer.text.flush()), tuple(answer.sequence.ids[: answer.prompt])
                yield Done(answer.reason, text, answer.prompt, answer.number, ids)
        ledger.spend("emit", ledger.now() - at)
