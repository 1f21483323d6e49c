"""The one parser for hosts and addresses as people write them, and the test for loopback.

`host` takes a name or an IP address, `Address.parse` takes `host:port`. Both raise ValueError with what would be right.
Results are normalised: lower case, IPv6 in its short form, a name in ASCII and without a final dot.
"""

import ipaddress
import re
import socket
from dataclasses import dataclass

HOST = "a host name or an IP address, without scheme and port"
ADDRESS = "host:port with a port from 1 to 65535, and an IPv6 address in brackets: [::1]:50051"
LOCALHOST = "localhost"
_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(\.(?!-)[a-z0-9_-]{1,63}(?<!-))*", re.ASCII)
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)  # `127.1` and `0x7f.1` are addresses to some programs
_PORT = re.compile(r"[1-9][0-9]{0,4}", re.ASCII)
_ZONE = re.compile(r"[A-Za-z0-9_.-]+", re.ASCII)
_LONGEST_NAME = 253


@dataclass(frozen=True)
class Address:
    """The address of a server. `str()` is the inverse of `parse`; `host` has no brackets."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Parse `host:port`, spaces around it allowed. Raises ValueError, with a suggestion if the meaning is clear."""
        found = _split(text.strip())
        if found is None:
            meant = _meant(text.strip())
            raise ValueError(f"{meant!r}: {ADDRESS}" if meant else ADDRESS)
        return found

    def __str__(self) -> str:
        return joined(self.host, self.port)


def host(text: str) -> str:
    """`text`, a name or an IP address (an IPv6 one may stand in brackets), normalised. Raises ValueError."""
    return _host(text.strip())


def joined(name: str, port: int) -> str:
    """`host:port`, with brackets round an IPv6 address."""
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"


def url(name: str, port: int, tls: bool = False) -> str:
    """The http URL of a server, https with `tls`. A zone's percent sign is written as %25 (RFC 6874)."""
    return f"http{'s' if tls else ''}://{joined(name.replace('%', '%25'), port)}"


def is_loopback(name: str) -> bool:
    """Whether only this machine can reach `name`; see `loopback`."""
    return loopback(name) is not None


def is_loopback_literal(text: str) -> bool:
    """Whether `text` is a loopback address or `localhost`. Other names do not count: their owner may change them."""
    try:
        return text == LOCALHOST or _is_loopback(text)
    except ValueError:
        return False


def loopback(name: str) -> str | None:
    """The loopback address of `name`; None if other machines can reach it, or if it cannot be resolved.

    A name counts if all its addresses do. If secrecy depends on the answer, use the returned address instead of the
    name, which may resolve to another one the next time. `localhost` stands for itself (RFC 6761).
    """
    try:
        plain = host(name)
    except ValueError:
        return None
    if plain == LOCALHOST:
        return plain
    try:
        return plain if _is_loopback(plain) else None
    except ValueError:
        return _all_loopback(_resolved(plain))


def _split(text: str) -> Address | None:
    before, colon, port = text.rpartition(":")
    bracketed = before.startswith("[") and before.endswith("]")
    if not colon or bracketed != (":" in before) or not _PORT.fullmatch(port) or int(port) > 65535:
        return None
    try:
        return Address(_host(before), int(port))
    except ValueError:
        return None


def _meant(text: str) -> str | None:
    """A suggestion for a URL, or for an IPv6 address without brackets or port."""
    _, scheme, rest = text.rpartition("://")
    if scheme:
        found = _split(re.split(r"[/?#]", rest.lstrip("/"))[0].rpartition("@")[2])
        return str(found) if found else None
    before, _, port = text.rpartition(":")
    for each in (f"[{before}]:{port}", f"[{text}]:50051"):
        if ":" in before and (found := _split(each)):
            return str(found)
    return None


def _host(plain: str) -> str:
    bracketed = plain.startswith("[") and plain.endswith("]")
    try:
        found = ipaddress.IPv6Address(plain[1:-1]) if bracketed else ipaddress.ip_address(plain)
    except ValueError:
        return _name(plain)
    if isinstance(found, ipaddress.IPv6Address) and found.scope_id and not _ZONE.fullmatch(found.scope_id):
        raise ValueError(HOST)
    return str(found)


def _name(text: str) -> str:
    """A host name in ASCII. Raises ValueError, also for one that older and newer rules encode differently (faß.de)."""
    try:
        encoded = text.lower().encode("idna")
        name = encoded.decode("ascii").removesuffix(".")
    except UnicodeError as error:
        raise ValueError(HOST) from error
    if not text.isascii() and encoded.decode("idna") != text.lower():
        raise ValueError(f"{HOST}, of a name its ASCII form (xn--...)")
    if len(name) > _LONGEST_NAME or not _NAME.fullmatch(name) or _NUMBER.fullmatch(name.rpartition(".")[2]):
        raise ValueError(HOST)
    return name


def _is_loopback(text: str) -> bool:
    """Whether an IP address is loopback. Raises ValueError for a name."""
    found = ipaddress.ip_address(text)
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback


def _resolved(name: str) -> list[str]:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return [str(each[4][0]) for each in found]


def _all_loopback(addresses: list[str]) -> str | None:
    """The first address if all are loopback. IPv4 comes first: every program listens on it."""
    if not all(map(_is_loopback, addresses)):
        return None
    return min(addresses, key=lambda each: ":" in each, default=None)
