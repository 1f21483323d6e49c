"""THE decode loop: one for both arms, over a list of stages.

    for event in Generator(links, tokens, context_length, top_k).stream(request): ...

Full is one local stage; split is a local stage, a remote one and a local one. The loop knows neither. It yields facts
(`TokenEvent`, then `Done`); whoever drives it derives the rest. To cancel is to close the iterator: that closes the
stages' sessions, and so frees the trunk's cache.
"""

import time
from collections import abc, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property

import torch

from splitlearn.drafts import Proposer, Speculation
from splitlearn.errors import InputError
from splitlearn.events import Done, Event, FinishReason, GenerationRequest, Recovery, TokenEvent
from splitlearn.metrics import UNATTRIBUTED
from splitlearn.sampling import TopK, random_source, sample
from splitlearn.stages import Session, Stage, StageInput, StageOutput, WorksAhead
from splitlearn.stop import StopStrings
from splitlearn.tokens import Tokens


@dataclass(frozen=True)
class Link:
    """One stage of the chain and the flags that its sessions are opened with."""

    stage: Stage
    applied: frozenset[str]


Piece = tuple[int, torch.Tensor]


@dataclass
class Feed:
    """What a stage's session is given: the new positions, or the whole prefix when it keeps nothing between steps."""

    stage: Stage
    session: Session
    length: int = 0
    prefix: torch.Tensor | None = None

    @cached_property
    def _elsewhere(self) -> WorksAhead | None:
        """The stage, if it is one to which more can be sent than it has answered."""
        return self.stage if isinstance(self.stage, WorksAhead) else None

    def step(self, position: int, x: torch.Tensor, logits: int = 1) -> tuple[int, StageOutput]:
        """Hand on `x`, which covers the positions from `position` on. Returns the output and its first position."""
        item = self._input(position, x, logits)
        return item.position, self.stage.step([item])[0]

    def flow(self, pieces: Iterable[Piece], logits: int, ledger: "_Ledger") -> Iterator[Piece]:
        """Hand on neighbouring pieces, each the first position and `x`, and give what comes out. A stage that works
        elsewhere has the next piece before it is asked for the last."""
        under_way: deque[tuple[int, Callable[[], StageOutput]]] = deque()

        def finished() -> Piece:
            position, finish = under_way.popleft()
            output = finish()
            ledger.add(output)
            return position, output.x

        for position, x in pieces:
            item = self._input(position, x, logits)
            if self._elsewhere is not None:
                under_way.append((item.position, self._elsewhere.begin(item)))
                if len(under_way) > 1:
                    yield finished()
            else:
                output = self.stage.step([item])[0]
                ledger.add(output)
                yield item.position, output.x
        while under_way:
            yield finished()

    def _input(self, position: int, x: torch.Tensor, logits: int) -> StageInput:
        if self.session.recomputes:
            known = self.prefix[:, :position] if self.prefix is not None and position else x[:, :0]
            self.prefix = x = torch.cat([known, x], dim=1)
            position = 0
        elif position < self.length:  # a stage before this one recomputed what this one has in its cache
            x, position = x[:, self.length - position :], self.length
        self.length = position + x.shape[1]
        return StageInput(self.session, position, x, logits)

    def roll_back(self, position: int) -> None:
        """The next step begins at `position`: what was fed from there on did not come true."""
        self.length = min(self.length, position)


@dataclass
class _Ledger:
    """Where the time since the last event went, in seconds by name, on one monotonic clock from t0."""

    t0: float = field(default_factory=time.perf_counter)
    since: float = 0.0
    parts: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    compile_s: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    recoveries: tuple[Recovery, ...] = ()
    overlapped_s: float = 0.0

    def now(self) -> float:
        return time.perf_counter() - self.t0

    def spend(self, name: str, seconds: float) -> None:
        self.parts[name] += seconds

    def add(self, output: StageOutput) -> None:
        timing = output.timing
        for name, spent in timing.ledger.items():
            self.spend(name, spent)
        self.compile_s += timing.compile_s
        self.bytes_up += timing.bytes_up
        self.bytes_down += timing.bytes_down
        self.recoveries += timing.recoveries
        self.overlapped_s += timing.overlapped_s

    def close_step(self, tokens: tuple[int, ...], text: str, at: float, drafts: int) -> TokenEvent:
        """The event of a step whose tokens were on the host at `at`; begins the next interval there."""
        parts = dict(self.parts)
        parts[UNATTRIBUTED] = at - self.since - sum(parts.values())
        event = TokenEvent(
            tokens,
            text,
            at,
            parts,
            self.compile_s,
            self.bytes_up,
            self.bytes_down,
            self.recoveries,
            drafts,
            self.overlapped_s,
        )
        self.since, self.parts, self.compile_s, self.bytes_up, self.bytes_down = at, defaultdict(float), 0.0, 0, 0
        self.recoveries, self.overlapped_s = (), 0.0
        return event


class _NoLedger(_Ledger):
    """Keeps nothing but the tokens and their times: what the ledger costs is seen against it."""

    def spend(self, name: str, seconds: float) -> None:
        return

    def add(self, output: StageOutput) -> None:
        self.compile_s += output.timing.compile_s
        self.recoveries += output.timing.recoveries

    def close_step(self, tokens: tuple[int, ...], text: str, at: float, drafts: int) -> TokenEvent:
        event = TokenEvent(tokens, text, at, {}, self.compile_s, recoveries=self.recoveries, drafts=drafts)
        self.compile_s, self.recoveries = 0.0, ()
        return event


@dataclass(frozen=True)
class Generator:
    """Runs prompts through a chain of stages, one at a time. `context_length` is None for a model without a limit."""

    links: Sequence[Link]
    tokens: Tokens
    context_length: int | None
    top_k: TopK
    proposers: Sequence[Callable[[], Proposer]] = ()
    piece_tokens: int | None = None
    """Prompts go through the stages in pieces of so many tokens; None: whole."""

    def stream(self, request: GenerationRequest) -> abc.Generator[Event, None, None]:
        """Yield a TokenEvent for each step and a Done at the end.

        Raises InputError when prompt and answer do not fit into the context, TrunkError for a trunk that fails.
        """
        ledger = _Ledger() if request.ledger else _NoLedger()
        ids = self.tokens.encode(request.prompt, request.chat)
        self._check_length(len(ids), request.max_new_tokens)
        encoded = ledger.now()
        ledger.spend("tokenise", encoded)
        with ExitStack() as stack:
            feeds = self._open(stack, len(ids) + request.max_new_tokens)
            ledger.spend("open", ledger.now() - encoded)
            yield from self._decode(request, ids, feeds, ledger)

    def _decode(
        self, request: GenerationRequest, ids: list[int], feeds: Sequence[Feed], ledger: _Ledger
    ) -> abc.Generator[Event, None, None]:
        """The loop: feed what is new and what may come, sample, emit, until a reason to end."""
        text, stops, rng = self.tokens.detokenizer(), StopStrings(request.stop), random_source(request.sampling)
        speculation = Speculation([make() for make in self.proposers]) if self.proposers else None
        sequence, position, reason = list(ids), 0, None
        while reason is None:
            began, known = ledger.now(), len(sequence)
            left = request.max_new_tokens - (known - len(ids))
            drafts = speculation.drafts(sequence, left - 1) if speculation and position else []
            if speculation:
                ledger.spend("draft", ledger.now() - began)
            logits = self._forward(feeds, [*sequence[position:], *drafts], position, 1 + len(drafts), ledger)
            before = ledger.now()
            self._sample(logits, drafts, request, sequence, rng)
            at = ledger.now()
            ledger.spend("sample", at - before)
            new = sequence[known:]
            if speculation and position:
                speculation.came(new, len(drafts), at - began)
            position = len(sequence) - 1
            for feed in feeds:
                feed.roll_back(position)
            shown, kept = "", 0
            while reason is None and kept < len(new):
                shown += stops.feed(text.feed(new[kept]))
                kept += 1
                reason = self._reason(request, new[kept - 1], known + kept - len(ids), stops.found)
            yield ledger.close_step(tuple(new[:kept]), shown, at, len(drafts))
            ledger.spend("emit", ledger.now() - at)
        yield Done(reason, stops.flush(text.flush()), len(ids))

    def _sample(
        self,
        logits: torch.Tensor,
        drafts: Sequence[int],
        request: GenerationRequest,
        sequence: list[int],
        rng: torch.Generator,
    ) -> None:
        """Add to `sequence` a token for each row of `logits` [1 + drafts, V], up to the first that is not the draft fed
        at its place, and that does not end the answer."""
        for row, draft in zip(logits, [*drafts, None], strict=True):
            token = sample(row, request.sampling, sequence, rng, self.top_k)
            sequence.append(token)
            if token != draft or (token in self.tokens.eos_ids and not request.ignore_eos):
                return

    def _forward(
        self, feeds: Sequence[Feed], new: Sequence[int], position: int, count: int, ledger: _Ledger
    ) -> torch.Tensor:
        """The logits [count, V] after the last `count` of `new`, the ids from `position` on, through every stage."""
        x, size = torch.tensor([new], dtype=torch.long), self.piece_tokens or len(new)
        if size < len(new) and not any(feed.session.recomputes for feed in feeds):
            return self._in_pieces(feeds, x, size, position, ledger)
        for feed in feeds:
            position, output = feed.step(position, x, count)
            ledger.add(output)
            x = output.x
        return x[0, -count:]

    def _in_pieces(
        self, feeds: Sequence[Feed], ids: torch.Tensor, size: int, position: int, ledger: _Ledger
    ) -> torch.Tensor:
        """The logits [1, V] after the last of a prompt's `ids` [1, T], which go through the stages `size` at a time."""
        starts = range(0, ids.shape[1], size)
        pieces: Iterable[Piece] = ((position + at, ids[:, at : at + size]) for at in starts)
        for feed in feeds:
            pieces = feed.flow(pieces, 1, ledger)
        last = deque(pieces, maxlen=1)
        return last[0][1][0, -1:]

    def _open(self, stack: ExitStack, max_length: int) -> list[Feed]:
        feeds = []
        for link in self.links:
            session = link.stage.open(link.applied, max_length)
            stack.callback(session.close)
            feeds.append(Feed(link.stage, session))
        return feeds

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
