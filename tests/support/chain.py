"""A chain of trunk servers behind real sockets."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.client.hop import Hop
from splitlearn.models.plan import SplitPlan
from tests.support.proxy import Proxy, proxy
from tests.support.trunk import TrunkHere, serve_here

TWO = (SplitPlan(1, 3, 6), SplitPlan(3, 5, 6))
THREE = (SplitPlan(1, 2, 6), SplitPlan(2, 4, 6), SplitPlan(4, 5, 6))


@dataclass(frozen=True)
class ChainHere:
    """Servers in this process, each of which may forward to those after it and to the proxies before them."""

    hops: Sequence[Hop]
    servers: Sequence[TrunkHere]
    proxies: Sequence[Proxy]

    def free(self) -> bool:
        """Whether nothing is left of any session."""
        runtimes = [server.runtime for server in self.servers]
        return not any(each.admission.sessions or each.admission.pool.blocks_used for each in runtimes)


@contextmanager
def chain_here(files: ModelFiles, plans: Sequence[SplitPlan]) -> Iterator[ChainHere]:
    """A server for each of `plans`."""
    with ExitStack() as stack:
        servers, proxies = list[TrunkHere](), list[Proxy]()
        for plan in reversed(plans):
            after = [*(each.address for each in servers), *(each.address for each in proxies)]
            layers = (plan.start, plan.end)
            servers.append(
                stack.enter_context(serve_here(files, "trunk:none", {}, layers, forward_to={"addresses": after}))
            )
            proxies.append(stack.enter_context(proxy(servers[-1].address)))
        servers.reverse()
        proxies.reverse()
        hops = [
            Hop(plan, (server.address,), link=f"{number} of {len(plans)}")
            for number, (plan, server) in enumerate(zip(plans, servers, strict=True), 1)
        ]
        yield ChainHere(hops, servers, proxies)
