"""Exceptions as gRPC status codes and back: the one place for both directions."""

import grpc

from splitlearn.errors import (
    InputError,
    SplitlearnError,
    TrunkError,
    TrunkFailed,
    TrunkFull,
    TrunkRefused,
    TrunkUnavailable,
)

# gRPC drops a status whose message is over its limit for metadata (8 KiB); each end may have put its words around a
# value of any length.
_MAX_DETAILS = 2000

_CODES: tuple[tuple[type[SplitlearnError], grpc.StatusCode], ...] = (
    (InputError, grpc.StatusCode.INVALID_ARGUMENT),
    (TrunkRefused, grpc.StatusCode.FAILED_PRECONDITION),
    (TrunkFull, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (TrunkUnavailable, grpc.StatusCode.UNAVAILABLE),
)

_ERRORS: dict[grpc.StatusCode, type[TrunkError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: TrunkRefused,
    grpc.StatusCode.FAILED_PRECONDITION: TrunkRefused,
    grpc.StatusCode.UNIMPLEMENTED: TrunkRefused,
    grpc.StatusCode.RESOURCE_EXHAUSTED: TrunkFull,
    grpc.StatusCode.UNAVAILABLE: TrunkUnavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: TrunkUnavailable,
    grpc.StatusCode.CANCELLED: TrunkUnavailable,
}


def code_of(error: Exception) -> grpc.StatusCode:
    """The status with which a server answers `error`; INTERNAL for what nobody foresaw."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), grpc.StatusCode.INTERNAL)


def shorten(details: str) -> str:
    """`details` short enough to arrive, its middle left out where it is too long."""
    half = _MAX_DETAILS // 2
    return details if len(details) <= _MAX_DETAILS else f"{details[:half]} [...] {details[-half:]}"


def error_of(error: grpc.RpcError, address: str) -> TrunkError:
    """What a client raises for `error` from the trunk at `address`."""
    code, details = error.code(), error.details() or "no details"
    kind = _ERRORS.get(code, TrunkFailed)
    if kind is TrunkUnavailable:
        return kind(
            f"The trunk server at {address} does not answer or was lost ({details}). "
            "Start it with `python -m server --config config.yaml`, or set trunk.address."
        )
    return kind(f"The trunk server at {address} answered {code.name}: {details}")
