"""THE decode loop: one for both arms, over a list of stages.

    for event in Generator(links, tokens, context_length, settings).stream(request): ...

Full is one local stage; split is a local stage, a remote one and a local one. The loop knows neither. It yields facts
(`TokenEvent`, then `Done`); whoever drives it derives the rest. Several samples of a prompt, which is fed once, go
through the stages in step: a forward has a token of each, and a trip to the trunk is waited for once. To cancel is to
close the iterator: that closes the stages' sessions, and so frees the trunk's cache.
"""

import sys
from collections import abc, deque
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch

from splitlearn.errors import InputError
from splitlearn.events import Done, Event, FinishReason, GenerationRequest
from splitlearn.generation.chain import Feed, Link, Piece, sessions
from splitlearn.generation.head_overlap import HeadStart
from splitlearn.generation.sampler import random_source, sample
from splitlearn.generation.settings import GenerationSettings
from splitlearn.generation.speculation import Speculation
from splitlearn.generation.step_timing import Ledger, Outcome
from splitlearn.generation.stop_strings import StopStrings
from splitlearn.generation.tokenizer import Detokenizer, Tokens
from splitlearn.sampling import SEEDS
from splitlearn.stages.head import Early
from splitlearn.stages.local import LocalStage


@dataclass
class _Answer:
    """One sample under way: what it has so far, the step that it takes, and why it ended."""

    number: int
    sequence: list[int]
    feeds: Sequence[Feed]
    text: Detokenizer
    stops: StopStrings
    rng: torch.Generator
    speculation: Speculation | None
    head_start: HeadStart | None
    stays_within: int
    """A sequence that grows past so many tokens is computed anew, once, from its first token on."""
    left: int = 0
    """Tokens that may still come, with that of the step under way."""
    position: int = 0
    """Tokens that the stages have, before the step that comes."""
    known: int = 0
    """Tokens before that step."""
    drafts: list[int] = field(default_factory=list)
    reason: FinishReason | None = None

    def begin(self, left: int, ledger: Ledger) -> torch.Tensor:
        """The ids [1, T] of the next step: what the stages do not have yet and drafts, less than the `left` tokens
        that may still come."""
        began, self.known, self.left = ledger.now(), len(self.sequence), left
        if self.position and self.known > self.stays_within:
            self._restart()
        if self.speculation is not None:
            most = min(left - 1, self._room)
            self.drafts = self.speculation.drafts(self.sequence, most) if self.position else []
            ledger.spend("draft", ledger.now() - began)
        return torch.tensor([[*self.sequence[self.position :], *self.drafts]], dtype=torch.long)

    @property
    def rows(self) -> int:
        """Of how many last positions the logits are needed."""
        return 1 + len(self.drafts)

    @property
    def early(self) -> Early | None:
        """What is told the first of a step's logits: nothing where no step comes after it."""
        return self.head_start.guess if self.head_start is not None and self.left > 1 and self._room else None

    @property
    def _room(self) -> int:
        """How many tokens may be fed on trial behind those that are known: none beyond which all is computed anew."""
        return max(0, self.stays_within - self.known)

    def _restart(self) -> None:
        """The step to come has the whole sequence."""
        self.position, self.stays_within = 0, sys.maxsize
        for feed in self.feeds:
            feed.restart(self.known)

    def branch(self, other: "_Answer") -> None:
        """Go on from the prompt, which `other` has fed."""
        self.known = len(self.sequence)
        for own, theirs in zip(self.feeds, other.feeds, strict=True):
            own.branch(theirs, self.known)

    def end_step(self, seconds: float) -> None:
        """The sequence has the step's tokens, which took `seconds`: the next one begins behind them."""
        if self.speculation is not None and self.position:
            self.speculation.came(self.sequence[self.known :], len(self.drafts), seconds)
        self.position = len(self.sequence) - 1
        for feed in self.feeds:
            feed.roll_back(self.position)


@dataclass(frozen=True)
class Generator:
    """Runs a prompt at a time through a chain of stages. `context_length` is None for a model without a limit."""

    links: Sequence[Link]
    tokens: Tokens
    context_length: int | None
    settings: GenerationSettings

    def stream(self, request: GenerationRequest) -> abc.Generator[Event, None, None]:
        """Yield a TokenEvent for each step and a Done at the end, of each sample.

        Raises InputError for a prompt of which nothing comes (`Tokens.encode`) and when prompt and answer do not fit
        into the context, TrunkError for a trunk that fails.
        """
        ledger = Ledger()
        ids = self.tokens.encode(request.prompt, request.chat)
        self._check_length(len(ids), request.max_new_tokens)
        encoded = ledger.now()
        ledger.spend("tokenise", encoded)
        with ExitStack() as stack:
            chains = self._open(stack, len(ids), request)
            ledger.spend("open", ledger.now() - encoded)
            answers = [self._answer(number, request, ids, feeds, ledger) for number, feeds in enumerate(chains)]
            yield from self._decode(request, len(ids), answers, ledger)

    def _answer(
        self, number: int, request: GenerationRequest, ids: Sequence[int], feeds: Sequence[Feed], ledger: Ledger
    ) -> _Answer:
        sampling = request.sampling
        rng = random_source(replace(sampling, seed=(sampling.seed + number) % SEEDS))
        speculation = Speculation([make() for make in self.settings.proposers]) if self.settings.proposers else None
        text, stops = self.tokens.detokenizer(), StopStrings(request.stop)
        start = self._head_start(request, feeds, ledger) if speculation is None else None
        return _Answer(number, list(ids), feeds, text, stops, rng, speculation, start, self._stays_within(len(ids)))

    def _stays_within(self, prompt: int) -> int:
        """The length past which an answer to a prompt of so many tokens has its whole sequence computed anew."""
        limit = self._rope_restart
        return sys.maxsize if limit is None or prompt > limit else limit

    @cached_property
    def _rope_restart(self) -> int | None:
        """As the first stage, which is always here, has it of its model."""
        first = self.links[0].stage
        return first.rope_restart if isinstance(first, LocalStage) else None

    def _head_start(self, request: GenerationRequest, feeds: Sequence[Feed], ledger: Ledger) -> HeadStart | None:
        """What begins steps before their token is sure, where it is the likeliest one of a single answer."""
        elsewhere = next((at for at, feed in enumerate(feeds) if feed.elsewhere is not None), None)
        wanted = self.settings.head_overlap and request.samples == 1 and request.sampling.takes_the_likeliest
        if not wanted or elsewhere is None or any(feed.session.recomputes for feed in feeds):
            return None
        ends = () if request.ignore_eos else self.tokens.eos_ids
        return HeadStart(feeds[: elsewhere + 1], ledger, ends)

    def _decode(
        self, request: GenerationRequest, prompt: int, answers: Sequence[_Answer], ledger: Ledger
    ) -> abc.Generator[Event, None, None]:
        """The loop: feed what is new and what may come, sample, emit, until each answer has a reason to end."""
        while live := [answer for answer in answers if answer.reason is None]:
            began, fed = ledger.now(), live if answers[0].known else live[:1]
            new = [answer.begin(request.max_new_tokens - len(answer.sequence) + prompt, ledger) for answer in fed]
            logits = self._forward(fed, new, ledger)
            before = ledger.now()
            for answer in live[len(fed) :]:  # the prompt was fed once
                answer.branch(fed[0])
                logits.append(logits[0])
            for answer, rows in zip(live, logits, strict=True):
                self._sample(rows, request, answer)
            at = ledger.now()
            ledger.spend("sample", at - before)
            outcomes = []
            for answer in live:
                answer.end_step(at - began)
                outcomes.append(self._outcome(request, prompt, answer))
            yield from ledger.close_step(outcomes, at)
            for answer in live:
                if answer.reason is not None:
                    text, ids = answer.stops.flush(answer.text.flush()), tuple(answer.sequence[:prompt])
                    yield Done(answer.reason, text, prompt, answer.number, ids)
            ledger.spend("emit", ledger.now() - at)

    def _sample(self, logits: torch.Tensor, request: GenerationRequest, answer: _Answer) -> None:
        """Add to the answer's sequence a token for each row of `logits` [1 + drafts, V], up to the first that is not
        the draft fed at its place, and that does not end the answer."""
        for row, draft in zip(logits, [*answer.drafts, None], strict=True):
            token = sample(row, request.sampling, answer.sequence, answer.rng, self.settings.top_k)
            answer.sequence.append(token)
            if token != draft or (token in self.tokens.eos_ids and not request.ignore_eos):
                return

    def _outcome(self, request: GenerationRequest, prompt: int, answer: _Answer) -> Outcome:
        """What the step brought that `answer` has just ended, up to a reason to end the answer."""
        new, shown, kept = answer.sequence[answer.known :], "", 0
        while answer.reason is None and kept < len(new):
            shown += answer.stops.feed(answer.text.feed(new[kept]))
            kept += 1
            generated = answer.known + kept - prompt
            answer.reason = self._reason(request, new[kept - 1], generated, answer.stops.found)
        early = None if answer.head_start is None else answer.head_start.came_true
        return Outcome(answer.number, tuple(new[:kept]), shown, len(answer.drafts), early)

    def _forward(self, live: Sequence[_Answer], new: Sequence[torch.Tensor], ledger: Ledger) -> list[torch.Tensor]:
        """For each answer the logits [rows, V] after the last of its `new` ids [1, T], through every stage in step."""
        feeds = [feed for answer in live for feed in answer.feeds]
        if any(self._too_long(x) for x in new) and not any(feed.session.recomputes for feed in feeds):
            return [self._in_pieces(answer, x, ledger) for answer, x in zip(live, new, strict=True)]
        given = [(answer.position, x) for answer, x in zip(live, new, strict=True)]
        start, done = live[0].head_start, 0
        if start is not None:  # of the only answer
            given, done = [start.step(*given[0])], len(start.near)
        for at, link in enumerate(self.links[done:], done):
            items = [
                answer.feeds[at].input(*each, answer.rows, answer.early)
                for answer, each in zip(live, given, strict=True)
            ]
            outputs = link.stage.step(items)
            for answer, output in zip(live, outputs, strict=True):
                ledger.add(answer.number, output.timing)
            given = [(item.position, output.x) for item, output in zip(items, outputs, strict=True)]
        return [x[0, -answer.rows :] for answer, (_, x) in zip(live, given, strict=True)]

    def _too_long(self, x: torch.Tensor) -> bool:
        return self.settings.piece_tokens is not None and x.shape[1] > self.settings.piece_tokens

    def _in_pieces(self, answer: _Answer, ids: torch.Tensor, ledger: Ledger) -> torch.Tensor:
        """The logits [rows, V] after the last of `ids` [1, T], which go through the stages some at a time."""
        size = self.settings.piece_tokens or ids.shape[1]
        starts = range(0, ids.shape[1], size)
        pieces: Iterable[Piece] = ((answer.position + at, ids[:, at : at + size]) for at in starts)
        for feed in answer.feeds:
            pieces = feed.flow(pieces, answer.rows, partial(ledger.add, answer.number))
        last = deque(pieces, maxlen=1)
        return last[0][1][0, -answer.rows :]

    def _open(self, stack: ExitStack, prompt: int, request: GenerationRequest) -> list[list[Feed]]:
        """For each sample of an answer to a prompt of so many tokens a session of every stage."""
        chains: list[list[Feed]] = [[] for _ in range(request.samples)]
        for link in self.links:
            opened = sessions(link, prompt + request.max_new_tokens, request.samples)
            for chain, session in zip(chains, opened, strict=True):
                stack.callback(session.close)
                chain.append(Feed(link.stage, session, rope_length=prompt))
        return chains

    def _check_length(self, prompt: int, new: int) -> None:
        limit = self.context_length
        if limit is None or prompt + new <= limit:
            return
        if prompt >= limit:
            raise InputError("prompt", f"{prompt} tokens", f"at most {limit - 1} tokens: the context holds {limit}")
        raise InputError(
            "max_new_tokens", new, f"at most {limit - prompt}: the prompt has {prompt} of the context's {limit} tokens"
        )

    def _reason(self, request: GenerationRequest, token: int, generated: int, stopped: bool) -> FinishReason | None:
        if stopped:
            return "stop"
        if token in self.tokens.eos_ids and not request.ignore_eos:
            return "eos"
        return "length" if generated >= request.max_new_tokens else None
