"""What a server that other machines reach must have, and the names by which it is reached."""

import ipaddress
import re
import socket
from collections.abc import Sequence

from splitlearn.address import is_loopback, is_loopback_literal
from splitlearn.errors import SetupError

_NETLOC = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:(?P<port>\d{1,5}))?")


class Names:
    """A server's names: those of loopback, `host` that it listens on, and `more` from the config.

    One that listens on all addresses accepts any IP address and the machine's name. IP addresses are safe, since DNS
    rebinding needs a name.
    """

    def __init__(self, host: str = "127.0.0.1", more: Sequence[str] = ()) -> None:
        self._everywhere = host in ("", "0.0.0.0", "::", "[::]")
        own = socket.gethostname() if self._everywhere else host.strip("[]")
        self._names = {own.lower(), *(name.lower() for name in more)}

    def has(self, netloc: str) -> bool:
        """Whether `netloc`, a name or an address with or without a port, is one of them."""
        name = name_of(netloc)
        if name is None:
            return False
        return is_loopback_literal(name) or name in self._names or (self._everywhere and _is_address(name))


def name_of(netloc: str) -> str | None:
    """The name or address of `netloc`, in lower case and without brackets; None if it is none."""
    found = _NETLOC.fullmatch(netloc.lower())
    return None if found is None else found["name"].strip("[]").removesuffix(".")


def check_open(section: str, host: str, allow_open: bool, missing: str, remedy: str) -> None:
    """Raise SetupError for a server beyond loopback that lacks access control: `missing` names the settings, if any.

    Tokens alone do not suffice: in plaintext anybody on the network could read them.
    """
    if not missing or allow_open or is_loopback(host):
        return
    raise SetupError(
        f"{section}.host: {host!r} is reached from other machines, and {missing} is not set. Set {remedy}, or listen "
        f"on 127.0.0.1, or give --allow-open ({section}.allow_open) if everybody who reaches it may use it."
    )


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
