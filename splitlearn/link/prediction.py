"""What a link makes of a run, computed from the same run without a link. No clock, no network: a pure function.

    TTFT over the link = TTFT + the trip that opens the session + the trip of the prompt
    TPOT over the link = TPOT + the trip of a step * steps / tokens

A trip is the RTT, and 8 * bytes / bandwidth each way; loss is in it by its expectation (emulated.py has the model), and
jitter has none. Both are upper bounds where the client works during a trip: with a speculative start, whose trip is
hidden by what is left of the LM head once the trunk is done, and with chunks of a prompt (prefill_overlap).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from splitlearn.link.emulated import Link
from splitlearn.metrics import RunMetrics

FRAME_BYTES = 14
"""Around a message: 9 bytes of HTTP/2's frame and 5 of gRPC's prefix."""
OPEN_BYTES, OPENED_BYTES = 600, 120
"""Of the messages that open a session, with the headers of their call."""


@dataclass(frozen=True)
class Prediction:
    """TTFT and TPOT in seconds; TPOT is None for a run of one token."""

    ttft_s: float
    tpot_s: float | None


def predict(samples: Sequence[RunMetrics], link: Link, hops: int = 1) -> Prediction:
    """What a split run whose samples have these figures without a link would take over `link`. Through a chain of
    `hops` servers it takes a trip to each."""
    first = samples[0]
    up, down = (sum(getattr(each, f"bytes_{way}") for each in samples) for way in ("up", "down"))
    decode_up, decode_down = (sum(getattr(each, f"decode_bytes_{way}") for each in samples) for way in ("up", "down"))
    opening_s = hops * _trip_s(link, OPEN_BYTES * len(samples), OPENED_BYTES * len(samples))
    ttft_s = first.ttft_s + opening_s + hops * _trip_s(link, (up - decode_up) / hops, (down - decode_down) / hops)
    steps = first.n_tokens - first.drafts_accepted - 1
    if first.tpot_s is None or steps < 1:
        return Prediction(ttft_s, first.tpot_s)
    trip_s = hops * _trip_s(link, decode_up / steps / hops, decode_down / steps / hops)
    return Prediction(ttft_s, first.tpot_s + trip_s * steps / (first.n_tokens - 1))


def _trip_s(link: Link, up: float, down: float) -> float:
    """The mean time of a trip with so many bytes each way, on idle lines."""
    return link.up.expected_s(round(up) + FRAME_BYTES) + link.down.expected_s(round(down) + FRAME_BYTES)
