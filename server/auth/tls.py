"""Reads the configured TLS certificates, client CA and tokens, before any weights are loaded."""

from dataclasses import dataclass

import grpc

from server.auth.gate import Access
from server.forwarding import NextServers
from splitlearn.access import network, tokens
from splitlearn.config import ServerConfig, ServerTls
from splitlearn.wire import pem


@dataclass(frozen=True)
class Security:
    """The access control of a server, its TLS credentials (None: plaintext), and the next servers of
    chains."""

    access: Access
    credentials: grpc.ServerCredentials | None
    next_servers: NextServers

    @classmethod
    def of(cls, settings: ServerConfig) -> "Security":
        """Read the files that `settings` name.

        Raises InputError for an unusable file, SetupError for a server that would be open to a network.
        """
        _check_open(settings)
        access = Access(tokens.load(settings.tokens, "server.tokens") if settings.tokens else ())
        return cls(access, _credentials(settings.tls), NextServers(settings.forward_to))

    def listen(self, server: grpc.Server, address: str) -> int:
        """Make `server` listen at `address` and return the port. Raises RuntimeError if it cannot."""
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
    """Raise SetupError for a server beyond loopback that lacks TLS, or both tokens and client certificates."""
    clients = "server.tokens or server.tls.client_ca"
    known = settings.tls.client_ca is not None or settings.tokens is not None
    missing = "server.tls" if settings.tls.certificate is None else "" if known else clients
    remedy = f"server.tls with {clients} (docs/access.md)"
    network.check_open("server", settings.host, settings.allow_open, missing, remedy)
