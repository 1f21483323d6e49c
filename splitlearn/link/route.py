"""The way to trunks over an emulated link: one proxy for all of them, started when a link is first asked for."""

from collections.abc import Sequence

from splitlearn.address import Address, loopback
from splitlearn.errors import WorkerDied
from splitlearn.link.emulated import Link
from splitlearn.link.proxy import Proxy


class Routes:
    """Where to connect for which trunk. The proxy stays, so that connections outlive a change of the link."""

    def __init__(self) -> None:
        self._proxy: Proxy | None = None

    def over(self, link: Link, addresses: Sequence[str]) -> tuple[str, ...]:
        """Where to connect for each of `addresses`, over `link` from now on; nothing where there is no link."""
        if link == Link():
            return ()
        try:
            return self._over(link, addresses)
        except WorkerDied:
            self.close()
            return self._over(link, addresses)

    def close(self) -> None:
        """End the proxy."""
        if self._proxy is not None:
            self._proxy.close()
        self._proxy = None

    def _over(self, link: Link, addresses: Sequence[str]) -> tuple[str, ...]:
        self._proxy = self._proxy or Proxy()
        self._proxy.shape(link)
        return tuple(self._proxy.route(_fixed(address)) for address in addresses)


def _fixed(address: str) -> str:
    """`address`, as an IP address where it is loopback's: a token may go there in plaintext, so the name must not
    become another machine's later."""
    found = Address.parse(address)
    return str(Address(loopback(found.host) or found.host, found.port))
