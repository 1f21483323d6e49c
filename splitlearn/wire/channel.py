"""How a client reaches a trunk: `open_channel` makes the channel, plaintext or TLS, with the client's token.

`credentials` reads what the settings name (files, an environment variable). A token goes over TLS or to this machine's
own loopback, never in plaintext over a network. No proxy is used, whatever http_proxy says: gRPC would ask it for
loopback, too, and most proxies do not let HTTP/2 streams through.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc

from splitlearn.address import Address, loopback
from splitlearn.config import TrunkConfig
from splitlearn.errors import InputError
from splitlearn.wire import TOKEN_HEADER, TOKEN_SCHEME, pem

# A trunk whose machine went away, or that hangs, closes nothing: a ping that stays unanswered tells. The server permits
# them as often (KEEP_ALIVE in server/endpoint.py). The third is for a ping of another kind, behind which a keepalive
# ping waits; the fourth lets pings go on while a long prompt is computed and nothing is sent.
KEEP_ALIVE = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
)
# A machine that takes a connection and says nothing on it would be waited for 20 s.
_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.min_reconnect_backoff_ms", 5_000),
)


@dataclass(frozen=True)
class Credentials:
    """By what a client knows its trunk, and what it shows to it. PEM files' contents; without `ca` it is plaintext."""

    ca: bytes | None = field(default=None, repr=False)
    certificate: bytes | None = field(default=None, repr=False)
    key: bytes | None = field(default=None, repr=False)
    server_name: str | None = None
    """The name in the trunk's certificate, where its address has another."""
    token: str | None = field(default=None, repr=False)


NONE = Credentials()


def credentials(settings: TrunkConfig) -> Credentials:
    """What `settings` name, read. Raises InputError for a file or a token that cannot be used."""
    tls = settings.tls
    certificate, key = pem.pair("trunk.tls", tls.certificate, tls.key) or (None, None)
    ca = pem.authorities("trunk.tls.ca", tls.ca)
    return Credentials(ca, certificate, key, tls.server_name, _token(settings.token))


def open_channel(address: str, shown: Credentials = NONE) -> grpc.Channel:
    """A channel to the trunk at `address`; it connects when it is first used.

    Raises InputError for a token that would go over a network in plaintext.
    """
    options = (*_OPTIONS, *KEEP_ALIVE)
    if shown.ca is not None:
        secure = grpc.ssl_channel_credentials(shown.ca, shown.key, shown.certificate)
        name = (("grpc.ssl_target_name_override", shown.server_name),) if shown.server_name else ()
        channel = grpc.secure_channel(address, secure, options=(*options, *name))
    else:
        plain = address if shown.token is None else _on_loopback(address)
        channel = grpc.insecure_channel(plain, options=options)
    return channel if shown.token is None else grpc.intercept_channel(channel, _ShowToken(shown.token))


def _on_loopback(address: str) -> str:
    """`address` with the loopback address that its host means: gRPC may be told another one when it looks a name up."""
    found = Address.parse(address)
    here = loopback(found.host)
    if here is None:
        wanted = f"the PEM file by which {address} is known: a token does not go over a network in plaintext"
        raise InputError("trunk.tls.ca", None, wanted)
    return str(Address(here, found.port))


def _token(variable: str) -> str | None:
    """The token in that environment variable; None when it is not set or empty."""
    token = os.environ.get(variable, "")
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise InputError("trunk.token", variable, "a variable that holds one token of `python -m server token`")
    return token or None


class _WithMetadata(grpc.ClientCallDetails):
    """A call's details of which only the metadata is other than it was."""

    def __init__(self, metadata: tuple[tuple[str, str | bytes], ...]) -> None:
        self.metadata = metadata


class _ShowToken(grpc.UnaryUnaryClientInterceptor, grpc.StreamStreamClientInterceptor):
    """Puts the token into the metadata of each call. `open_channel` has seen to it that nobody reads it on the way."""

    def __init__(self, token: str) -> None:
        self._shown = (TOKEN_HEADER, TOKEN_SCHEME + token)

    def intercept_unary_unary(
        self, continuation: Callable[..., Any], client_call_details: grpc.ClientCallDetails, request: Any
    ) -> Any:
        """One request, one answer."""
        return continuation(self._with_token(client_call_details), request)

    def intercept_stream_stream(
        self,
        continuation: Callable[..., Any],
        client_call_details: grpc.ClientCallDetails,
        request_iterator: Iterator[Any],
    ) -> Any:
        """A session."""
        return continuation(self._with_token(client_call_details), request_iterator)

    def _with_token(self, details: grpc.ClientCallDetails) -> _WithMetadata:
        return _WithMetadata((*(details.metadata or ()), self._shown))
