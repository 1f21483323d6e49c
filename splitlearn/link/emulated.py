"""What an emulated link is: round-trip time, jitter, bandwidth each way, loss.

The model, which proxy.py applies and prediction.py computes with. Bandwidth is that of TCP's payload: headers of IP and
Ethernet are not counted. Half of the RTT passes each way. Jitter changes each way's delay by up to half of `jitter_ms`,
evenly spread, and never the order. A lost segment is sent again, as by Linux' TCP: it comes one RTT late where three
segments follow (fast retransmission, RFC 5681), else one RTT and 200 ms late (retransmission timeout, RFC 6298 with
Linux' minimum). What is sent again is not lost again.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from splitlearn.errors import InputError

SEGMENT_BYTES = 1448
"""Payload of a TCP segment on Ethernet: 1500 bytes less the headers of IP, TCP and its timestamps."""
FOLLOWERS = 3
MIN_TIMEOUT_S = 0.2
NONE = "none"
WORDS: Mapping[str, tuple[str, str]] = {
    "rtt": ("rtt_ms", "ms"),
    "jitter": ("jitter_ms", "ms"),
    "up": ("up_mbit", "mbit"),
    "down": ("down_mbit", "mbit"),
    "loss": ("loss_percent", "%"),
}
"""Each word with the field that it sets and its unit."""


@dataclass(frozen=True)
class Way:
    """One direction of a link. Times in seconds; `bits_per_s` is None where bandwidth is not limited."""

    delay_s: float
    jitter_s: float
    bits_per_s: float | None
    loss: float
    rtt_s: float

    def transfer_s(self, size: int) -> float:
        """How long the line takes to accept `size` bytes."""
        return 8 * size / self.bits_per_s if self.bits_per_s else 0.0

    def chances(self, size: int, *, more: bool = False) -> tuple[float, float]:
        """The probabilities that `size` bytes, sent together, wait for a timeout, or else for a fast retransmission.
        Whether `more` follows at once."""
        segments = math.ceil(size / SEGMENT_BYTES)
        last = 0 if more else min(FOLLOWERS, segments)
        kept = 1 - self.loss
        return 1 - kept**last, kept**last * (1 - kept ** (segments - last))

    def late_s(self, draw: float, size: int, *, more: bool) -> float:
        """The delay by loss of `size` bytes, for a random number `draw` in [0, 1)."""
        if not self.loss:
            return 0.0
        timeout, fast = self.chances(size, more=more)
        return self.rtt_s + MIN_TIMEOUT_S if draw < timeout else self.rtt_s if draw < timeout + fast else 0.0

    def expected_s(self, size: int) -> float:
        """The mean time from the first byte's sending to the last one's arrival, for `size` bytes on an idle line."""
        timeout, fast = self.chances(size)
        lost_s = timeout * (self.rtt_s + MIN_TIMEOUT_S) + fast * self.rtt_s
        return self.delay_s + self.transfer_s(size) + lost_s


@dataclass(frozen=True)
class Link:
    """A link between client and trunk; `up` is from client to trunk. Without arguments it changes nothing.

    Bandwidths are in Mbit/s, None for no limit. Raises InputError for values out of range.
    """

    rtt_ms: float = 0.0
    jitter_ms: float = 0.0
    up_mbit: float | None = None
    down_mbit: float | None = None
    loss_percent: float = 0.0

    def __post_init__(self) -> None:
        _check("rtt_ms", self.rtt_ms, 0, 10_000)
        _check("jitter_ms", self.jitter_ms, 0, self.rtt_ms, "rtt_ms")
        for name, rate in (("up_mbit", self.up_mbit), ("down_mbit", self.down_mbit)):
            if rate is not None:
                _check(name, rate, 0.01, 10_000)
        _check("loss_percent", self.loss_percent, 0, 50)

    @property
    def up(self) -> Way:
        """From client to trunk."""
        return self._way(self.up_mbit)

    @property
    def down(self) -> Way:
        """From trunk to client."""
        return self._way(self.down_mbit)

    @property
    def summary(self) -> str:
        """For people: "50 ms +/- 5 ms, 10 Mbit/s up, 100 Mbit/s down, 0.1% loss"."""
        jitter = f" \u00b1 {_plain(self.jitter_ms)} ms" if self.jitter_ms else ""
        rates = (("up", self.up_mbit), ("down", self.down_mbit))
        said = [f"{_plain(self.rtt_ms)} ms{jitter}"]
        said += [f"{_plain(rate)} Mbit/s {name}" for name, rate in rates if rate is not None]
        said += [f"{_plain(self.loss_percent)}% loss"] if self.loss_percent else []
        return ", ".join(said)

    def as_json(self) -> dict[str, object]:
        """Its words and its figures."""
        return {"words": str(self), **asdict(self)}

    def __str__(self) -> str:
        """Its words: what differs from no link."""
        values = ((word, unit, getattr(self, field)) for word, (field, unit) in WORDS.items())
        return ",".join(f"{word}={_plain(value)}{unit}" for word, unit, value in values if value) or NONE

    def _way(self, rate: float | None) -> Way:
        rtt_s, bits = self.rtt_ms / 1e3, None if rate is None else rate * 1e6
        return Way(rtt_s / 2, self.jitter_ms / 2e3, bits, self.loss_percent / 100, rtt_s)


def _check(name: str, value: float, least: float, most: float, most_name: str = "") -> None:
    """Raise InputError unless `value` is a finite number from `least` to `most`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not least <= value <= most:
        limit = f"{most_name} ({most:g})" if most_name else f"{most:g}"
        raise InputError(name, value, f"a number from {least:g} to {limit}")


def _plain(value: float) -> str:
    """`value` as few digits as give it back."""
    return repr(float(value)).removesuffix(".0")
