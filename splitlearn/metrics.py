"""The metrics of one generation, computed from its events. Each metric is defined once, here.

With t0 when the prompt was submitted and t_i when token i was on the host (docs/metrics.md):
TTFT = t_1 - t0; TPOT = (t_n - t_1) / (n - 1); E2EL = t_n - t0 = TTFT + (n - 1) TPOT; TPS (request) = n / E2EL;
TPS (decode) = 1 / TPOT; ITL_i = t_i - t_(i-1).
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

from splitlearn.events import Done, Event, FinishReason, Hops, Mismatch, Recovery, SpotCheckResult, TokenEvent

UNATTRIBUTED = "unattributed"
PARTS: Mapping[str, str] = {
    "tokenise": "chat template and tokenizer",
    "open": "opening the stages' sessions, with one round trip to the trunk",
    "draft": "guessing the next tokens",
    "model": "all layers and the LM head, in the full arm's one process",
    "bottom": "embeddings and the first layers, at the client",
    "encode": "hidden states to bytes, at both ends",
    "wire": "the round trip without the server's own time: gRPC, kernel and network",
    "queue": "waiting for other sessions' steps, most often in the server",
    "trunk": "the layers of the trunk server",
    "decode": "bytes to hidden states, at both ends",
    "recover": "a step in which the trunk was lost, until another one answered it",
    "top": "the last layers and the LM head, at the client",
    "sample": "choosing the token",
    "emit": "detokenising and handing the token on",
    UNATTRIBUTED: "what happens between two measured spans",
}
"""The parts of a time breakdown, in the order in which they happen, each with what it is."""
LEDGER_ORDER = tuple(PARTS)
HOP_PARTS = ("wire", "queue", "trunk")
"""The parts that are shown of each server of a chain."""


@dataclass(frozen=True)
class RunMetrics:
    """The figures of one generation. Times are in seconds; None if undefined (TPOT of a single token).

    `ledger` is the time breakdown summed over the whole run, so it sums to `e2el_s`; `decode_ledger` is without the
    steps up to the first token. Bytes are those on the wire, up (to the trunk) and down. `recoveries` has each loss of
    the trunk, with the number (from 1) of the token under way. `overlapped_s` is the trunk's time while the client
    worked itself. Of `drafts` fed, `drafts_accepted` came true. Of `head_starts` speculative starts,
    `head_starts_right` guessed the right token. `cached_tokens` of the prompt were reused, so that TTFT is that of the
    others.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    ttft_s: float
    tpot_s: float | None
    e2el_s: float
    itl_s: tuple[float, ...]
    ledger: dict[str, float]
    decode_ledger: dict[str, float]
    compile_s: float
    bytes_up: int
    bytes_down: int
    decode_bytes_up: int
    decode_bytes_down: int
    recoveries: tuple[tuple[int, Recovery], ...]
    overlapped_s: float
    drafts: int
    drafts_accepted: int
    head_starts: int
    head_starts_right: int
    prompt_ids: tuple[int, ...] = ()
    """The ids of the prompt as the model saw it; empty before the answer's end."""
    steps: tuple[TokenEvent, ...] = ()
    """The steps that the figures were computed from."""
    cached_tokens: int = 0
    spot_checks: SpotCheckResult = SpotCheckResult()
    hops: Hops = field(default_factory=dict)
    """What of `ledger` each server of a chain has; empty for a trunk of one server."""
    decode_hops: Hops = field(default_factory=dict)
    """The same of `decode_ledger`."""

    @classmethod
    def from_events(cls, events: Iterable[Event], sample: int = 0) -> "RunMetrics | None":
        """The metrics of one answer, from a generation's events so far; None before the first token."""
        listed = [event for event in events if event.sample == sample]
        steps = [event for event in listed if isinstance(event, TokenEvent)]
        done = next((event for event in listed if isinstance(event, Done)), Done("cancelled", "", 0))
        if not steps:
            return None
        first, last = steps[0].time_s, steps[-1].time_s
        token_ids = tuple(token for step in steps for token in step.token_ids)
        after = len(token_ids) - len(steps[0].token_ids)
        return cls(
            token_ids=token_ids,
            text="".join(event.text for event in listed),
            finish_reason=done.reason,
            prompt_tokens=done.prompt_tokens,
            ttft_s=first,
            tpot_s=(last - first) / after if after else None,
            e2el_s=last,
            itl_s=tuple(_between(steps)),
            ledger=_sum(steps),
            decode_ledger=_sum(steps[1:]),
            compile_s=sum(step.compile_s for step in steps),
            bytes_up=sum(step.bytes_up for step in steps),
            bytes_down=sum(step.bytes_down for step in steps),
            decode_bytes_up=sum(step.bytes_up for step in steps[1:]),
            decode_bytes_down=sum(step.bytes_down for step in steps[1:]),
            recoveries=tuple(_recoveries(steps)),
            overlapped_s=sum(step.overlapped_s for step in steps),
            drafts=sum(step.drafts for step in steps),
            drafts_accepted=sum(len(step.token_ids) - 1 for step in steps),
            head_starts=sum(step.head_start is not None for step in steps),
            head_starts_right=sum(step.head_start is True for step in steps),
            prompt_ids=done.prompt_ids,
            steps=tuple(steps),
            cached_tokens=done.cached_tokens,
            spot_checks=done.spot_checks,
            hops=_sum_hops(steps),
            decode_hops=_sum_hops(steps[1:]),
        )

    @property
    def n_tokens(self) -> int:
        """Tokens generated: a count of token ids."""
        return len(self.token_ids)

    @property
    def tps(self) -> float:
        """TPS (request): tokens per second of the whole request."""
        return self.n_tokens / self.e2el_s

    @property
    def decode_tps(self) -> float | None:
        """TPS (decode): tokens per second after the first."""
        return 1 / self.tpot_s if self.tpot_s else None

    @property
    def per_token(self) -> dict[str, float]:
        """The time breakdown of a token after the first, in seconds: it sums to TPOT. Empty for a single token."""
        return self._per_token(self.decode_ledger)

    @property
    def hops_per_token(self) -> dict[str, dict[str, float]]:
        """What of `per_token` each server of a chain has, by its layers in words."""
        return {f"[{start}, {end})": self._per_token(own) for (start, end), own in self.decode_hops.items()}

    def _per_token(self, parts: Mapping[str, float]) -> dict[str, float]:
        after = self.n_tokens - len(self.steps[0].token_ids) if self.steps else 0
        return {name: spent / after for name, spent in parts.items()} if after else {}

    @property
    def itl_p50_s(self) -> float | None:
        """The median time between tokens."""
        return median(self.itl_s) if self.itl_s else None


def of_samples(events: Iterable[Event], samples: int) -> tuple[RunMetrics, ...]:
    """The metrics of each of `samples` answers that has a token."""
    listed = list(events)
    found = (RunMetrics.from_events(listed, sample) for sample in range(samples))
    return tuple(metrics for metrics in found if metrics is not None)


def tps_of_all(samples: Sequence[RunMetrics]) -> float:
    """TPS (all samples): the tokens of all answers of a generation / the seconds until the last one."""
    return sum(each.n_tokens for each in samples) / max(each.e2el_s for each in samples)


def first_difference(one: Sequence[RunMetrics], other: Sequence[RunMetrics]) -> tuple[int, int] | None:
    """The first sample with other tokens in `other`, and the index of the first one; None if all are equal."""
    for sample, (a, b) in enumerate(zip(one, other, strict=True)):
        at = first_divergence(a.token_ids, b.token_ids)
        if at is not None:
            return sample, at
    return None


def recovery_sentence(token: int, recovery: Recovery) -> str:
    """The sentence for people about a trunk that was lost at token number `token`."""
    where = f"reconnected to {recovery.found}" if recovery.found != recovery.lost else "reconnected"
    tokens = "1 token" if recovery.replayed_tokens == 1 else f"{recovery.replayed_tokens} tokens"
    return (
        f"The trunk at {recovery.lost} was lost at token {token}; {where} in {recovery.seconds:.1f} s, "
        f"with {tokens} replayed."
    )


def mismatch_sentence(found: Mismatch) -> str:
    """The sentence for people about an answer of the trunk that a spot check found wrong."""
    start, end = found.layers
    return (
        f"Spot check: the trunk's answer at position {found.position} is not that of the layers [{start}, {end}): "
        f"it is off by {found.error:.1e}, where rounding explains {found.allowed:.1e}."
    )


def first_divergence(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The index of the first differing token id, or None if both are identical, also in length."""
    differing = (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    shorter = min(len(one), len(other))
    return next(differing, None if len(one) == len(other) else shorter)


def _between(steps: Sequence[TokenEvent]) -> Iterator[float]:
    """The time between each token and the one before; the tokens of one step come at once."""
    times = [step.time_s for step in steps for _ in step.token_ids]
    return (after - before for before, after in pairwise(times))


def _recoveries(steps: Iterable[TokenEvent]) -> Iterator[tuple[int, Recovery]]:
    before = 0
    for step in steps:
        yield from ((before + 1, recovery) for recovery in step.recoveries)
        before += len(step.token_ids)


def _sum(steps: Iterable[TokenEvent]) -> dict[str, float]:
    total: Counter[str] = Counter()
    for step in steps:
        total.update(step.ledger)
    return dict(total)


def _sum_hops(steps: Sequence[TokenEvent]) -> Hops:
    layers = sorted({each for step in steps for each in step.hops})
    total = {each: Counter[str]() for each in layers}
    for step in steps:
        for each, own in step.hops.items():
            total[each].update(own)
    return {each: dict(own) for each, own in total.items()}
