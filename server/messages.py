"""Parses a client's messages and checks what no session is needed for."""

import math

from google.protobuf.message import DecodeError

from splitlearn.errors import InputError
from splitlearn.wire import MAX_HOPS
from splitlearn.wire import trunk_pb2 as pb


def parse(raw: bytes, *kinds: str) -> pb.ClientMessage:
    """The message, which is of one of `kinds`. Raises InputError for any other."""
    try:
        message = pb.ClientMessage.FromString(raw)
    except DecodeError as error:
        raise InputError("message", f"{len(raw)} bytes", "a serialized splitlearn.v1.ClientMessage") from error
    if message.WhichOneof("kind") not in kinds:
        expected = f"one of kind {' or '.join(map(repr, kinds))}"
        raise InputError("message", message.WhichOneof("kind") or "an empty one", expected)
    return message


def checked_hops(message: pb.Step) -> tuple[pb.HopTiming, ...]:
    """The durations of the servers before. Raises InputError for too many, or for numbers that are no durations."""
    if len(message.hops) >= MAX_HOPS:
        raise InputError("hops", len(message.hops), f"fewer than {MAX_HOPS}, the most servers of a chain")
    hops = tuple(message.hops)
    for hop in hops:
        seconds = (hop.decode_s, hop.queue_s, hop.trunk_s, hop.encode_s, hop.compile_s)
        if not all(math.isfinite(each) and each >= 0 for each in seconds):
            raise InputError("hops", seconds, "seconds, 0 or more")
    return hops
