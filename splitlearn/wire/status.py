"""Maps exceptions to gRPC statuses and back.

A refusal for want of room carries google.rpc.RetryInfo: the time after which to try again.
"""

from itertools import accumulate
from urllib.parse import quote

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from splitlearn.errors import (
    InputError,
    SplitlearnError,
    TrunkDenied,
    TrunkError,
    TrunkFailed,
    TrunkForgot,
    TrunkFull,
    TrunkLate,
    TrunkRefused,
    TrunkUnavailable,
)

# gRPC drops a status over its limit for metadata (8 KiB), which holds the message twice: percent-encoded, and in base64
# with the details. A message may quote a value of any length.
_MAX_ENCODED = 3000
_NOT_ENCODED = "".join(chr(code) for code in range(0x20, 0x7F)).replace("%", "")

# The first match counts.
_CODES: tuple[tuple[type[SplitlearnError], grpc.StatusCode], ...] = (
    (InputError, grpc.StatusCode.INVALID_ARGUMENT),
    (TrunkDenied, grpc.StatusCode.UNAUTHENTICATED),
    (TrunkRefused, grpc.StatusCode.FAILED_PRECONDITION),
    (TrunkFull, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (TrunkLate, grpc.StatusCode.DEADLINE_EXCEEDED),
    (TrunkForgot, grpc.StatusCode.ABORTED),
    (TrunkUnavailable, grpc.StatusCode.UNAVAILABLE),
)

_NOT_TRUSTED = ("handshake failed", "verification check failed")
_ERRORS: dict[grpc.StatusCode, type[TrunkError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: TrunkRefused,
    grpc.StatusCode.FAILED_PRECONDITION: TrunkRefused,
    grpc.StatusCode.UNIMPLEMENTED: TrunkRefused,
    grpc.StatusCode.UNAUTHENTICATED: TrunkDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: TrunkFull,
    grpc.StatusCode.UNAVAILABLE: TrunkUnavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: TrunkUnavailable,
    grpc.StatusCode.CANCELLED: TrunkUnavailable,
    grpc.StatusCode.ABORTED: TrunkUnavailable,
}


def code_of(error: Exception) -> grpc.StatusCode:
    """The code with which a server answers `error`; INTERNAL for any other exception."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), grpc.StatusCode.INTERNAL)


def status_of(error: Exception) -> grpc.Status:
    """The status with which a server answers `error`."""
    number: int = code_of(error).value[0]
    message = status_pb2.Status(code=number, message=shorten(str(error)))
    if isinstance(error, TrunkFull):
        info = error_details_pb2.RetryInfo()
        info.retry_delay.FromNanoseconds(int(error.retry_s * 1e9))
        detail = AnyMessage()
        detail.Pack(info)
        message.details.append(detail)
    status: grpc.Status = rpc_status.to_status(message)
    return status


def shorten(details: str) -> str:
    """`details`, without its middle if it is too long to arrive."""
    if len(details) <= _MAX_ENCODED and len(quote(details, _NOT_ENCODED)) <= _MAX_ENCODED:
        return details
    half = _MAX_ENCODED // 2 - 10
    return f"{_begin(details, half)} [...] {_begin(details[::-1], half)[::-1]}"


def _begin(text: str, size: int) -> str:
    """As many characters of `text` as take at most `size` bytes on the wire."""
    sizes = accumulate(len(quote(character, _NOT_ENCODED)) for character in text[:size])
    return text[: sum(each <= size for each in sizes)]


def error_class(code: grpc.StatusCode) -> type[TrunkError]:
    """The class of the exception that a client raises for a status of `code`."""
    return _ERRORS.get(code, TrunkFailed)


def error_of(error: grpc.RpcError, address: str) -> TrunkError:
    """The exception that a client raises for `error` from the trunk at `address`."""
    code, details = error.code(), error.details() or "no details"
    kind = error_class(code)
    if kind is TrunkUnavailable:
        return kind(f"The trunk server at {address} does not answer or was lost ({details}). {_advice(details)}")
    ask = "; set the environment variable that trunk.token names to one" if kind is TrunkDenied else ""
    message = f"The trunk server at {address} answered {code.name}: {details}{ask}"
    return TrunkFull(message, _retry_s(error)) if kind is TrunkFull else kind(message)


def _advice(details: str) -> str:
    """Advice about a trunk that cannot be reached, chosen by gRPC's message."""
    if any(words in details for words in _NOT_TRUSTED):
        return (
            "Look at trunk.tls: its ca, its server_name, and whether the trunk speaks TLS with a certificate in date."
        )
    start = "Start it with `python -m server --config config.yaml`, or set trunk.address."
    if "Socket closed" in details:  # gRPC reports no more of a refused TLS handshake
        return f"{start} If it asks for TLS or for a client's certificate, set trunk.tls."
    return start


def _retry_s(error: grpc.RpcError) -> float:
    """The status's RetryInfo in seconds; one second without it."""
    try:
        status = rpc_status.from_call(error)
    except ValueError:  # details that contradict the status, from another server
        status = None
    info = error_details_pb2.RetryInfo()
    for detail in status.details if status else ():
        if detail.Unpack(info):
            return float(info.retry_delay.ToNanoseconds() / 1e9)
    return 1.0
