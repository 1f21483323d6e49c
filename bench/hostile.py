"""Hostile clients: what they send (hypothesis strategies), and how a server must react.

A `Script` is one stream: its messages, and whether the client then half-closes it or leaves it open. `Attacker` plays
scripts concurrently and returns how each one ended. `improper` says what is wrong with an end, if anything is.
"""

import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import torch
from hypothesis import strategies as st

from splitlearn.wire import PROTOCOL, SERVICE, codec
from splitlearn.wire import trunk_pb2 as pb
from splitlearn.wire.channel import Credentials, open_channel
from splitlearn.wire.hidden_states import Plain

ANSWER_TIMEOUT_S = 60.0
NUMBERS = st.sampled_from([0, 1, 2, 3, 7, 63, 64, 65, 511, 512, 8192, 2**16, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1])
SECONDS = st.sampled_from([0.0, 0.001, 1.0, -1.0, 1e300, float("inf"), float("-inf"), float("nan")])
VALUES = st.sampled_from([0.0, -0.0, 1e-45, 1.0, 3.0e38, -3.0e38, float("nan"), float("inf"), float("-inf")])
TEXTS = st.one_of(
    st.text(max_size=40), st.sampled_from(["float32", "bfloat16", "use_cache", "torch_compile", "x" * 5000])
)
# Statuses of a proper refusal. INTERNAL is proper only for numbers that overflow in the server's layers.
REFUSALS = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.ABORTED,
    }
)
METHODS = (
    *(f"/{SERVICE}/{name}" for name in ("Describe", "Metrics", "Drop")),
    "/grpc.health.v1.Health/Check",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
)
OVERFLOW = "first in layer"
# gRPC's own text for an exception that no handler mapped to a status. A proper refusal never begins with text of the
# client's.
UNCAUGHT = "Exception "


@dataclass(frozen=True)
class Target:
    """What a server accepts: a valid Open, and its limit on messages."""

    opening: pb.Open
    hidden_size: int
    max_message_bytes: int

    def open(self, **changes: Any) -> bytes:
        """The valid Open, with `changes`."""
        message = pb.Open()
        message.CopyFrom(self.opening)
        for name, value in changes.items():
            if name == "flags":
                del message.flags[:]
                message.flags.extend(value)
            else:
                setattr(message, name, value)
        return pb.ClientMessage(open=message).SerializeToString()

    def step(self, tokens: int, position: int, **changes: Any) -> bytes:
        """A valid Step of `tokens` tokens, with `changes`."""
        x = torch.full((1, tokens, self.hidden_size), 0.1)
        valid: dict[str, Any] = {"sequence_id": 1, "step_id": 1, "position": position, "hidden": _encoded(x)}
        return pb.ClientMessage(step=pb.Step(**{**valid, **changes})).SerializeToString()


def _encoded(x: torch.Tensor) -> pb.Tensor:
    """`x` [1, T, H] as a trunk without flags takes it."""
    rows = Plain(torch.float32)
    return pb.Tensor(**codec.fields(rows.to_bytes(x), rows, x.shape[2]))


@dataclass(frozen=True)
class Script:
    """One stream. `holds`: after its messages the client leaves the stream open."""

    kind: str
    messages: tuple[bytes, ...]
    holds: bool = False
    method: str = f"/{SERVICE}/Session"


@dataclass(frozen=True)
class End:
    """How a stream ended, after `answers` messages of the server."""

    script: Script
    code: grpc.StatusCode
    details: str
    answers: int


def target(description: pb.Description, flags: Iterable[str], max_message_bytes: int, max_length: int = 64) -> Target:
    """The target for a server that described itself. `flags`: those that this server itself applies."""
    said = description
    opening = pb.Open(
        protocol=PROTOCOL,
        model=said.model,
        digest=said.digest,
        start=said.start,
        end=said.end,
        n_layers=said.n_layers,
        dtype=said.dtype,
        max_length=max_length,
        flags=sorted(flags),
        timeout_s=30,
    )
    return Target(opening, said.hidden_size, max_message_bytes)


def scripts(aim: Target) -> st.SearchStrategy[Script]:
    """All kinds of hostile streams that cost their sender little."""
    after_open = {
        "garbage": st.lists(st.binary(max_size=500), min_size=1, max_size=3),
        "spoiled step": st.lists(_spoiled(st.just(aim.step(2, 0))), min_size=1, max_size=2),
        "tensor": st.lists(_tensors(aim).map(lambda tensor: aim.step(1, 0, hidden=tensor)), min_size=1, max_size=2),
        "numbers": _numbers(aim).map(lambda tensor: [aim.step(1, 0, hidden=tensor)]),
        "positions": st.lists(_positions(aim), min_size=1, max_size=6),
        "steps out of order": _walks(aim),
        "again open": st.just([aim.open()]),
        "chain": st.lists(_chained(aim), min_size=1, max_size=3),
        "unknown fields": st.integers(1, 200_000).map(lambda size: [aim.step(1, 0) + _unknown(size)]),
    }
    first = {
        "garbage first": st.binary(max_size=2000).map(lambda message: [message]),
        "step first": st.just([aim.step(1, 0)]),
        "spoiled open": _spoiled(st.just(aim.open())).map(lambda message: [message]),
        "odd open": _openings(aim).map(lambda message: [message, aim.step(1, 0)]),
        "chain first": st.lists(_chained(aim), min_size=1, max_size=2),
        "chain open": _chain_openings(aim).flatmap(
            lambda message: st.lists(_chained(aim), max_size=3).map(lambda after: [message, *after])
        ),
        "nothing": st.just([]),
    }
    return st.one_of(
        [_script(kind, messages, [aim.open()]) for kind, messages in after_open.items()]
        + [_script(kind, messages, []) for kind, messages in first.items()]
        + [_other_methods()]
    )


def feeds(aim: Target) -> st.SearchStrategy[list[bytes]]:
    """What a hostile server sends on its feed after Feed: steps, most of them valid, with fields that only a chain has,
    and what is no step."""
    changes = st.fixed_dictionaries(
        {}, optional={"hops": _hops(), "dropped": st.booleans(), "truncate": st.just(True), "more": st.booleans()}
    )
    odd = changes.map(lambda fields: aim.step(1, 0, **fields))
    message = st.one_of(odd, _spoiled(odd), _positions(aim), _chained(aim), st.binary(max_size=100))
    return st.one_of(_walks(aim), st.lists(message, min_size=1, max_size=4))


def silent(aim: Target) -> st.SearchStrategy[Script]:
    """Clients that keep a call open and send nothing more, at any stage of a session and in all methods."""
    begun = [(), (aim.open(),), (aim.open(), aim.step(1, 0, more=True)), (aim.open(), aim.step(1, 0))]
    sessions = [Script("silent", messages, holds=True) for messages in begun]
    return st.sampled_from([*sessions, *(Script("silent", (), holds=True, method=method) for method in METHODS)])


def oversized(aim: Target) -> st.SearchStrategy[Script]:
    """Messages at and over the limit; each costs its sender what it costs the server."""
    size = aim.max_message_bytes
    sizes = st.sampled_from([size - 1, size, size + 1, 2 * size])
    bodies = sizes.map(lambda length: bytes(length))
    unknown = sizes.map(lambda length: aim.step(1, 0) + _unknown(length - 4096))
    shapes = st.just(aim.step(1, 0, hidden=pb.Tensor(dtype=pb.FLOAT32, shape=[1] * (size - 1000), data=b"")))
    after = st.one_of(bodies, unknown, shapes).map(lambda body: Script("oversized", (aim.open(), body)))
    return st.one_of(after, bodies.map(lambda body: Script("oversized", (body,))))


def improper(end: End) -> str | None:
    """What is wrong with how a stream ended; None if it was answered, or refused properly."""
    said = f"{end.script.kind}: {end.code.name} {end.details!r}"
    if end.code is grpc.StatusCode.OK:
        return None if not end.script.holds else f"{said}: a stream that says nothing was ended without a word"
    if end.code is grpc.StatusCode.INTERNAL and OVERFLOW in end.details:
        return None
    if end.code not in REFUSALS or not end.details or end.details.startswith(UNCAUGHT):
        return f"{said} is no proper refusal"
    return None


class Attacker:
    """A client that plays scripts at `address`. The scripts of one `play` run concurrently."""

    def __init__(self, address: str, credentials: Credentials) -> None:
        self._channel = open_channel(address, credentials)
        self._over = threading.Event()
        self._held: list[tuple[Script, Any]] = []

    def play(self, scripts: Sequence[Script]) -> list[End]:
        """Play `scripts` and return their ends. Those that hold stay open until `let_go`."""
        calls = [(script, self._start(script)) for script in scripts]
        self._held += [(script, call) for script, call in calls if script.holds]
        return [_end(script, call) for script, call in calls if not script.holds]

    def let_go(self) -> list[End]:
        """Wait until the server has ended the held streams, and return their ends."""
        held, self._held = self._held, []
        return [_end(script, call) for script, call in held]

    def close(self) -> None:
        """Cancel all streams."""
        self._over.set()
        self._channel.close()

    def _start(self, script: Script) -> Any:
        method: Any = self._channel.stream_stream(script.method)
        return method(self._send(script), timeout=ANSWER_TIMEOUT_S)

    def _send(self, script: Script) -> Iterator[bytes]:
        yield from script.messages
        if script.holds:
            self._over.wait(2 * ANSWER_TIMEOUT_S)


def _end(script: Script, call: Any) -> End:
    answers = 0
    try:
        for _ in call:
            answers += 1
    except grpc.RpcError as error:
        failed: Any = error
        return End(script, failed.code(), failed.details() or "", answers)
    return End(script, call.code(), call.details() or "", answers)


def _script(kind: str, messages: st.SearchStrategy[list[bytes]], before: Sequence[bytes]) -> st.SearchStrategy[Script]:
    return messages.map(lambda drawn: Script(kind, (*before, *drawn)))


@st.composite
def _spoiled(draw: st.DrawFn, right: st.SearchStrategy[bytes]) -> bytes:
    """A message cut short, with bytes changed, or with others put in."""
    message = bytearray(draw(right))
    how = draw(st.sampled_from(["cut", "change", "insert", "twice"]))
    at = draw(st.integers(0, min(len(message) - 1, 200)))
    if how == "cut":
        return bytes(message[: draw(st.integers(0, len(message) - 1))])
    if how == "twice":
        return bytes(message + message[at:])
    other = draw(st.binary(min_size=1, max_size=8))
    message[at : at + (len(other) if how == "change" else 0)] = other
    return bytes(message)


def _hops() -> st.SearchStrategy[list[pb.HopTiming]]:
    """Durations of other servers, some of which are none."""
    seconds = st.one_of(SECONDS, st.just(1.0)).map(lambda value: min(value, 3e38) if value == value else value)
    timing = st.builds(lambda first, last: pb.HopTiming(decode_s=first, compile_s=last), seconds, seconds)
    return st.one_of(st.lists(timing, max_size=3), st.sampled_from([15, 16, 5000]).map(lambda n: [pb.HopTiming()] * n))


def _chain_openings(aim: Target) -> st.SearchStrategy[bytes]:
    """Sessions that are part of a chain."""
    return st.builds(lambda forwards, fed: aim.open(forwards=forwards, fed=fed), st.booleans(), st.booleans())


def _chained(aim: Target) -> st.SearchStrategy[bytes]:
    """Messages that only the sessions and servers of a chain send, each at the wrong place or with wrong values."""
    key = st.one_of(st.binary(max_size=40), st.just(bytes(70_000)))
    forward = st.builds(
        lambda address, key, size: pb.ClientMessage(
            forward=pb.Forward(address=address, key=key, max_tensor_bytes=size)
        ),
        st.one_of(TEXTS, st.sampled_from(["127.0.0.1:1", "localhost:50051", "[::1]:50051"])),
        key,
        NUMBERS,
    )
    feed = st.builds(
        lambda protocol, key: pb.ClientMessage(feed=pb.Feed(protocol=protocol, key=key)),
        st.one_of(st.just(PROTOCOL), NUMBERS),
        key,
    )
    done = st.just(pb.ClientMessage(done=pb.Done()))
    message = st.one_of(forward, feed, done).map(lambda made: made.SerializeToString())
    step = st.builds(lambda hops, dropped: aim.step(1, 0, hops=hops, dropped=dropped), _hops(), st.booleans())
    return st.one_of(message, _spoiled(message.filter(bool)), step)


@st.composite
def _openings(draw: st.DrawFn, aim: Target) -> bytes:
    fields = {
        "protocol": NUMBERS,
        "model": TEXTS,
        "digest": TEXTS,
        "start": NUMBERS,
        "end": NUMBERS,
        "n_layers": NUMBERS,
        "dtype": TEXTS,
        "max_length": NUMBERS,
        "flags": st.lists(TEXTS, max_size=5),
        "timeout_s": SECONDS,
    }
    names = draw(st.sets(st.sampled_from(sorted(fields)), min_size=1, max_size=3))
    return aim.open(**{name: draw(fields[name]) for name in sorted(names)})


@st.composite
def _tensors(draw: st.DrawFn, aim: Target) -> pb.Tensor:
    """A dtype, a shape and a size that need not match."""
    shape = draw(st.one_of(st.just([1, 1, aim.hidden_size]), st.lists(NUMBERS, max_size=5)))
    size = draw(st.sampled_from([0, 1, 4, 4 * aim.hidden_size - 1, 4 * aim.hidden_size, 4 * aim.hidden_size + 1, 9999]))
    dtype: Any = draw(st.sampled_from([-(2**31), -1, 0, 1, 2, 3, 4, 99, 2**31 - 1]))
    return pb.Tensor(dtype=dtype, shape=shape, data=bytes(size))


@st.composite
def _numbers(draw: st.DrawFn, aim: Target) -> pb.Tensor:
    """The right shape, with values that no layer outputs."""
    values = draw(st.lists(VALUES, min_size=1, max_size=4))
    row = [values[index % len(values)] for index in range(aim.hidden_size)]
    data = b"".join(struct.pack("<f", min(max(value, -3.4e38), 3.4e38) if value == value else value) for value in row)
    if draw(st.booleans()):
        data = data[:-4] + struct.pack("<f", draw(VALUES))
    return pb.Tensor(dtype=pb.FLOAT32, shape=[1, 1, aim.hidden_size], data=data)


@st.composite
def _positions(draw: st.DrawFn, aim: Target) -> bytes:
    """Steps forward, back, beyond, and with a position of ten bytes, which is a negative one."""
    if draw(st.integers(0, 7)) == 0:
        negative = b"\x18" + b"\xff" * 9 + b"\x01"
        hidden = _encoded(torch.full((1, 1, aim.hidden_size), 0.1)).SerializeToString()
        body = negative + b"\x22" + _varint(len(hidden)) + hidden
        return b"\x12" + _varint(len(body)) + body
    changes: dict[str, Any] = {"truncate": draw(st.booleans()), "step_id": draw(NUMBERS), "answer_last": draw(NUMBERS)}
    changes["fork_of"] = draw(st.one_of(st.just(b""), st.binary(max_size=40)))
    changes["rope_length"] = draw(st.one_of(st.just(0), NUMBERS))
    return aim.step(draw(st.integers(1, 3)), draw(st.one_of(st.integers(0, 4), NUMBERS)), **changes)


@st.composite
def _walks(draw: st.DrawFn, aim: Target) -> list[bytes]:
    """Steps and chunks of steps, most of them valid, so that the invalid ones meet a session in any state."""
    messages, at, step_id = [], 0, 1
    for _ in range(draw(st.integers(2, 8))):
        tokens, more = draw(st.integers(1, 20)), draw(st.booleans())
        kind = draw(st.sampled_from(["right", "right", "right", "back", "gap", "other step", "open"]))
        position = {"back": draw(st.integers(0, at)), "gap": at + draw(st.integers(1, 3))}.get(kind, at)
        if kind == "open":
            messages.append(aim.open())
            continue
        changes = {"step_id": step_id + (kind == "other step"), "more": more, "truncate": kind == "back"}
        messages.append(aim.step(tokens, position, sequence_id=draw(NUMBERS), **changes))
        at, step_id = position + tokens, step_id if more else step_id + 1
    return messages


def _other_methods() -> st.SearchStrategy[Script]:
    names = st.sampled_from([f"/{SERVICE}/Describe", f"/{SERVICE}/NoSuch", "/nobody.Knows/It", "/x"])
    return st.builds(
        lambda name, message: Script("other method", (message,), method=name),
        names,
        st.binary(min_size=1, max_size=200),
    )


def _unknown(size: int) -> bytes:
    """An unknown field of `size` bytes."""
    return b"\xfa\x7f" + _varint(size) + bytes(size)


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes([*encoded, number])
