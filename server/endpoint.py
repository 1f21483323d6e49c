"""Builds the gRPC server: its methods, their threads, and the limits of a connection."""

import resource
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from server.auth.gate import Access
from server.dispatch import Behavior, CallThreads, Dispatch, Method, unary
from server.idle_timeout import IdleTimeout, WatchedCall
from server.service import TrunkService
from splitlearn.config import ServerConfig
from splitlearn.errors import InputError
from splitlearn.wire import SERVICE
from splitlearn.wire.status import status_of

M = TypeVar("M", bound=Message)
CHECK = f"/{health.SERVICE_NAME}/Check"
REFLECT = f"/{reflection.SERVICE_NAME}/ServerReflectionInfo"
# Threads for health checks, for other short calls, and spare ones for sessions. Health checks need no token. To end
# another client's check, a stranger must place HEALTH_THREADS calls between that check's call and its message.
HEALTH_THREADS, BRIEF_THREADS, SPARE_THREADS = 64, 16, 16
# A client whose machine is gone closes nothing: without pings its session would stay open for ever. ping_timeout_ms
# covers BDP pings, which would otherwise delay a keepalive ping. min_ping_interval permits the clients' pings
# (wire/channel.py): by default gRPC treats more than one in five minutes as an attack and closes the connection.
KEEP_ALIVE = (
    ("grpc.keepalive_time_ms", 15_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)
# A connection without calls is closed after this time. Its client reconnects for its next call.
QUIET_MS = 60_000
MAX_CONNECTIONS = 2_000


def server(service: TrunkService, state: health.HealthServicer, limits: ServerConfig, access: Access) -> grpc.Server:
    """A gRPC server with all methods. It does not listen yet."""
    # A session of a chain has two calls: its client's and its feed.
    brief, sessions = (
        CallThreads(BRIEF_THREADS),
        CallThreads(2 * limits.max_sessions + limits.max_waiting + SPARE_THREADS),
    )
    timeout = IdleTimeout(limits.open_s, limits.open_s)
    names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
    methods = {
        **service.methods(brief, sessions),
        CHECK: Method(unary(_check(state)), CallThreads(HEALTH_THREADS), timeout, open=True),
        REFLECT: Method(_reflect(names), brief, timeout),
    }
    dispatch = Dispatch(methods, access, service.counts)
    unused = ThreadPoolExecutor(1)  # gRPC requires a pool but does not use it for these methods
    return grpc.server(unused, handlers=[dispatch], options=_options(limits, sessions.size))


def _options(limits: ServerConfig, streams: int) -> tuple[tuple[str, int], ...]:
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


def _check(state: health.HealthServicer) -> Callable[[bytes, grpc.ServicerContext], Message]:
    """The health check (Check). Watch is not served: it would hold a call for as long as its client likes."""

    def check(request: bytes, context: grpc.ServicerContext) -> Message:
        answer: Message = state.Check(_parse(health_pb2.HealthCheckRequest, request, context), context)
        return answer

    return check


def _reflect(names: Sequence[str]) -> Behavior:
    """gRPC reflection: lists the services and their messages."""
    servicer = reflection.ReflectionServicer(names)

    def behavior(requests: Iterator[bytes], context: grpc.ServicerContext, call: WatchedCall) -> Iterator[bytes]:
        messages = (
            _parse(reflection_pb2.ServerReflectionRequest, request, context) for request in call.requests(requests)
        )
        for answer in servicer.ServerReflectionInfo(messages, context):
            yield answer.SerializeToString()

    return behavior


def _parse(kind: type[M], request: bytes, context: grpc.ServicerContext) -> M:
    """Parse a client's message. Aborts the call if it is malformed."""
    try:
        return kind.FromString(request)
    except DecodeError:
        error = InputError("message", f"{len(request)} bytes", f"a serialized {kind.DESCRIPTOR.full_name}")
        context.abort_with_status(status_of(error))
