"""TLS, client certificates and tokens, as configured; read before anything is loaded."""

from dataclasses import dataclass

import grpc

from server.auth import tokens
from server.auth.gate import Access
from splitlearn.address import is_loopback
from splitlearn.config import ServerConfig, ServerTls
from splitlearn.errors import SetupError
from splitlearn.wire import pem


@dataclass(frozen=True)
class Security:
    """Who may connect, and over which credentials (None: plaintext)."""

    access: Access
    credentials: grpc.ServerCredentials | None

    @classmethod
    def of(cls, settings: ServerConfig) -> "Security":
        """Read what `settings` name. Raises InputError for a file that cannot be used, SetupError as `_check_open`."""
        _check_open(settings)
        access = Access(tokens.load(settings.tokens) if settings.tokens else ())
        return cls(access, _credentials(settings.tls))

    def listen(self, server: grpc.Server, address: str) -> int:
        """Make `server` listen at `address`; returns the port. Raises RuntimeError when it cannot."""
        if self.credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, self.credentials)


def _credentials(tls: ServerTls) -> grpc.ServerCredentials | None:
    own = pem.pair("server.tls", tls.certificate, tls.key)
    if own is None:
        return None
    certificate, key = own
    clients = pem.authorities("server.tls.client_ca", tls.client_ca)
    return grpc.ssl_server_credentials([(key, certificate)], clients, require_client_auth=clients is not None)


def _check_open(settings: ServerConfig) -> None:
    """Raise SetupError for a server beyond loopback without TLS or a way to know its clients. In plaintext anybody
    could read a token."""
    tls = settings.tls
    guarded = tls.certificate is not None and (tls.client_ca is not None or settings.tokens is not None)
    if guarded or settings.allow_open or is_loopback(settings.host):
        return
    lacking = "server.tls" if tls.certificate is None else "server.tokens or server.tls.client_ca"
    raise SetupError(
        f"server.host: {settings.host!r} is reached from other machines, and {lacking} is not set. Set server.tls with "
        "server.tokens or server.tls.client_ca (docs/access.md), or listen on 127.0.0.1, or give --allow-open "
        "(server.allow_open) where everybody who reaches it may use it."
    )
