"""What all gRPC servers of this program share: the limits of a connection, health checks, parsing of messages."""

import resource
from collections.abc import Callable
from typing import TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health, health_pb2

from splitlearn.config import ServerConfig
from splitlearn.errors import InputError
from splitlearn.wire.status import status_of

M = TypeVar("M", bound=Message)
CHECK = f"/{health.SERVICE_NAME}/Check"
# Threads for health checks, which need no token. To end another client's check, a stranger must place HEALTH_THREADS
# calls between that check's call and its message.
HEALTH_THREADS = 64
# A client whose machine is gone closes nothing: without pings its session would stay open for ever. ping_timeout_ms
# covers BDP pings, which would otherwise delay a keepalive ping. max_ping_strikes 0 permits any number of pings: by
# default gRPC closes a connection that sends more than one in five minutes, and the clients' do (wire/channel.py). It
# also copies all its errors so far for each further one it has read: a burst of them stopped a server for a minute.
KEEP_ALIVE = (
    ("grpc.keepalive_time_ms", 15_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
)
# A connection without calls is closed after this time. Its client reconnects for its next call.
QUIET_MS = 60_000
MAX_CONNECTIONS = 2_000


def options(limits: ServerConfig, streams: int) -> tuple[tuple[str, int], ...]:
    """gRPC's own limits on a connection."""
    open_ms = max(1, int(limits.open_s * 1e3))
    return (
        ("grpc.so_reuseport", 0),  # with it, a second server could start on the same port and get half of the clients
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.max_concurrent_streams", streams),
        ("grpc.server_handshake_timeout_ms", open_ms),  # TLS and HTTP/2 together
        ("grpc.max_connection_idle_ms", QUIET_MS),
        ("grpc.max_allowed_incoming_connections", _connections()),
        *KEEP_ALIVE,
    )


def _connections() -> int:
    """The limit of connections: they may take at most half of the process's file descriptors."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if allowed == resource.RLIM_INFINITY else max(1, min(MAX_CONNECTIONS, allowed // 2))


def check(state: health.HealthServicer) -> Callable[[bytes, grpc.ServicerContext], Message]:
    """The health check (Check). Watch is not served: it would hold a call for as long as its client likes."""

    def answer_check(request: bytes, context: grpc.ServicerContext) -> Message:
        answer: Message = state.Check(parse(health_pb2.HealthCheckRequest, request, context), context)
        return answer

    return answer_check


def parse(kind: type[M], request: bytes, context: grpc.ServicerContext) -> M:
    """Parse a client's message. Aborts the call if it is malformed."""
    try:
        return kind.FromString(request)
    except DecodeError:
        error = InputError("message", f"{len(request)} bytes", f"a serialized {kind.DESCRIPTOR.full_name}")
        context.abort_with_status(status_of(error))
