"""Why a request to a measured server failed, in words that can be shown and counted."""

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from splitlearn.errors import EndpointError
from splitlearn.loadtest.endpoint import CONNECT_S, SAID, STALL_S

_CAUSES: tuple[tuple[type[BaseException], str], ...] = (
    (ConnectionRefusedError, "connection refused"),
    (socket.gaierror, "unknown host"),
    (ssl.SSLError, "no trusted TLS"),
    (httpx.ConnectTimeout, f"no connection within {CONNECT_S:g} s"),
    (httpx.TimeoutException, f"nothing came for {STALL_S:g} s"),
    (httpx.ProxyError, "the proxy failed"),
    (httpx.ConnectError, "no connection"),
    (httpx.RemoteProtocolError, "no HTTP, or the connection ended within an answer"),
    (httpx.NetworkError, "the connection was lost"),
)


@contextmanager
def told(key: str | None) -> Iterator[None]:
    """Make each error of httpx an EndpointError, and keep `key` and the server's control characters out of all."""
    try:
        yield
    except EndpointError as error:
        error.args = (_clean(str(error), key),)
        raise
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise EndpointError(_clean(_cause(error), key)) from None


def _clean(text: str, key: str | None) -> str:
    shown = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return (shown.replace(key, "***") if key else shown)[:SAID]


def _cause(error: BaseException) -> str:
    chain = list(_chain(error))
    for kind, said in _CAUSES:
        found = next((each for each in chain if isinstance(each, kind)), None)
        if isinstance(found, ssl.SSLCertVerificationError):
            return f"the certificate is not trusted: {found.verify_message}"
        if found is not None:
            return said
    return f"{type(error).__name__}: {error}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that led to it."""
    while error is not None:
        yield error
        if isinstance(error, BaseExceptionGroup):
            for each in error.exceptions:
                yield from _chain(each)
        error = error.__cause__ or error.__context__
