"""Builds the trunk's gRPC server: its methods and their threads."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection, reflection_pb2

from server import connections
from server.auth.gate import Access
from server.connections import CHECK, HEALTH_THREADS
from server.dispatch import Behavior, CallThreads, Dispatch, Method, unary
from server.idle_timeout import IdleTimeout, WatchedCall
from server.service import TrunkService
from splitlearn.config import ServerConfig
from splitlearn.wire import SERVICE

REFLECT = f"/{reflection.SERVICE_NAME}/ServerReflectionInfo"
# Threads for short calls, and spare ones for sessions.
BRIEF_THREADS, SPARE_THREADS = 16, 16


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
        CHECK: Method(unary(connections.check(state)), CallThreads(HEALTH_THREADS), timeout, open=True),
        REFLECT: Method(_reflect(names), brief, timeout),
    }
    dispatch = Dispatch(methods, access, service.counts)
    unused = ThreadPoolExecutor(1)  # gRPC requires a pool but does not use it for these methods
    return grpc.server(unused, handlers=[dispatch], options=connections.options(limits, sessions.size))


def _reflect(names: Sequence[str]) -> Behavior:
    """gRPC reflection: lists the services and their messages."""
    servicer = reflection.ReflectionServicer(names)

    def behavior(requests: Iterator[bytes], context: grpc.ServicerContext, call: WatchedCall) -> Iterator[bytes]:
        kind = reflection_pb2.ServerReflectionRequest
        messages = (connections.parse(kind, request, context) for request in call.requests(requests))
        for answer in servicer.ServerReflectionInfo(messages, context):
            yield answer.SerializeToString()

    return behavior
