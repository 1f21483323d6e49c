"""Opens a client's channel to a trunk, plaintext or TLS, with the client's token.

`credentials` reads the files and the environment variable that the settings name. A token goes over TLS or to this
machine's loopback, never in plaintext over a network. No proxy is used, whatever http_proxy says: gRPC would use it for
loopback, too, and most proxies do not pass HTTP/2 streams.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc

from splitlearn.address import Address, loopback
from splitlearn.config import ForwardConfig, TrunkConfig
from splitlearn.errors import InputError
from splitlearn.wire import TOKEN_HEADER, TOKEN_SCHEME, pem

# A trunk that hangs, or whose machine has gone, closes no connection; an unanswered keepalive ping detects it. The
# server permits as many (KEEP_ALIVE in server/endpoint.py). http2.ping_timeout_ms covers BDP pings, which would
# otherwise delay a keepalive ping. max_pings_without_data = 0 lets pings go on while a long prompt is computed and
# nothing is sent.
KEEP_ALIVE = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
)
# Without min_reconnect_backoff_ms, a connection that the other side accepts and ignores would take 20 s to fail.
_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.min_reconnect_backoff_ms", 5_000),
)


@dataclass(frozen=True)
class Credentials:
    """How a client checks its trunk, and what it shows to it: contents of PEM files. Without `ca` it is plaintext."""

    ca: bytes | None = field(default=None, repr=False)
    certificate: bytes | None = field(default=None, repr=False)
    key: bytes | None = field(default=None, repr=False)
    server_name: str | None = None
    """The name in the trunk's certificate, if it is not that of the address."""
    token: str | None = field(default=None, repr=False)
    section: str = "trunk"
    """Of the settings that name them, for errors."""


NONE = Credentials()


def credentials(settings: TrunkConfig | ForwardConfig, section: str = "trunk") -> Credentials:
    """Read what `settings`, the section of that name, say. Raises InputError for a file or a token that cannot be
    used."""
    tls = settings.tls
    certificate, key = pem.pair(f"{section}.tls", tls.certificate, tls.key) or (None, None)
    ca = pem.authorities(f"{section}.tls.ca", tls.ca)
    return Credentials(ca, certificate, key, tls.server_name, _token(settings.token, f"{section}.token"), section)


def open_channel(address: str, identity: Credentials = NONE, via: str | None = None) -> grpc.Channel:
    """A channel to the trunk at `address`. It connects on first use, to `via` where that is given: a proxy before the
    trunk, whose certificate still has to name `address`.

    Raises InputError if a token would go over a network in plaintext.
    """
    options = (*_OPTIONS, *KEEP_ALIVE)
    if identity.ca is not None:
        secure = grpc.ssl_channel_credentials(identity.ca, identity.key, identity.certificate)
        name = identity.server_name or (Address.parse(address).host if via else None)
        override = (("grpc.ssl_target_name_override", name),) if name else ()
        channel = grpc.secure_channel(via or address, secure, options=(*options, *override))
    else:
        plain = address if identity.token is None else _on_loopback(address, identity.section)
        channel = grpc.insecure_channel(via or plain, options=options)
    return channel if identity.token is None else grpc.intercept_channel(channel, _TokenInterceptor(identity.token))


def _on_loopback(address: str, section: str) -> str:
    """`address` with its host as a loopback address: when gRPC resolves a name itself, it may get another one."""
    found = Address.parse(address)
    here = loopback(found.host)
    if here is None:
        wanted = f"the PEM file by which {address} is known: a token does not go over a network in plaintext"
        raise InputError(f"{section}.tls.ca", None, wanted)
    return str(Address(here, found.port))


def _token(variable: str, key: str) -> str | None:
    """The token in that environment variable; None if unset or empty."""
    token = os.environ.get(variable, "")
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise InputError(key, variable, "a variable that holds one token of `python -m splitlearn token`")
    return token or None


class _WithMetadata(grpc.ClientCallDetails):
    """A call's details with other metadata."""

    def __init__(self, metadata: tuple[tuple[str, str | bytes], ...]) -> None:
        self.metadata = metadata


class _TokenInterceptor(grpc.UnaryUnaryClientInterceptor, grpc.StreamStreamClientInterceptor):
    """Adds the token to each call's metadata. `open_channel` makes sure that nobody can read it on the way."""

    def __init__(self, token: str) -> None:
        self._header = (TOKEN_HEADER, TOKEN_SCHEME + token)

    def intercept_unary_unary(
        self, continuation: Callable[..., Any], client_call_details: grpc.ClientCallDetails, request: Any
    ) -> Any:
        """A call with one request and one answer."""
        return continuation(self._with_token(client_call_details), request)

    def intercept_stream_stream(
        self,
        continuation: Callable[..., Any],
        client_call_details: grpc.ClientCallDetails,
        request_iterator: Iterator[Any],
    ) -> Any:
        """A session's stream."""
        return continuation(self._with_token(client_call_details), request_iterator)

    def _with_token(self, details: grpc.ClientCallDetails) -> _WithMetadata:
        return _WithMetadata((*(details.metadata or ()), self._header))
