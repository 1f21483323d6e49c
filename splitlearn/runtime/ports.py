"""Checks that a server can listen at a host and port, and says why not."""

import errno
import socket

from splitlearn.address import joined
from splitlearn.errors import SetupError

_WHY = {
    errno.EADDRINUSE: ("port", "another program listens there. Choose another port; 0 takes a free one."),
    errno.EACCES: ("port", "this user may not listen on that port. Take one above 1023; 0 takes a free one."),
    errno.EADDRNOTAVAIL: ("host", "no network interface of this machine has that address."),
    errno.EAFNOSUPPORT: ("host", "this machine has no IPv6."),
}


def check(section: str, host: str, port: int) -> int:
    """`port` if a server can listen on it at `host`, a free one for 0.

    `section` is the settings' prefix of `host` and `port`: `ui.`, `server.metrics_`. Raises SetupError that names the
    setting at fault. A host name is tried at each of its addresses: another program may already listen at one of them.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise _refused(section, host, port, error) from error
    free, first = [], None
    for family, _, _, _, place in dict.fromkeys(found):
        try:
            free.append(_bind(family, place))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise _refused(section, host, port, error) from error
            first = first or error  # an IPv6 address of localhost, where there is no IPv6
    if free:
        return free[0]
    assert first is not None
    raise _refused(section, host, port, first) from first


def _bind(family: int, place: tuple[object, ...]) -> int:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do
        probe.bind(place)
        return int(probe.getsockname()[1])


def _refused(section: str, host: str, port: int, error: OSError) -> SetupError:
    if isinstance(error, socket.gaierror):
        key, why = "host", f"the name cannot be resolved here ({error.strerror})."
    else:
        key, why = _WHY.get(error.errno or 0, ("host", f"{error.strerror}."))
    return SetupError(f"{section}{key}: cannot listen on {joined(host, port)}: {why}")
