"""A chain of trunk servers behind real sockets."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.client.hop import Hop
from splitlearn.models.plan import SplitPlan
from tests.support.trunk import serve_here

TWO = (SplitPlan(1, 3, 6), SplitPlan(3, 5, 6))
THREE = (SplitPlan(1, 2, 6), SplitPlan(2, 4, 6), SplitPlan(4, 5, 6))


def hops_to(plans: Sequence[SplitPlan], *addresses: Sequence[str]) -> list[Hop]:
    """The hops of a chain whose servers have the layers of `plans` and listen at `addresses`."""
    listed = zip(plans, addresses, strict=True)
    return [Hop(plan, tuple(each), link=f"{number} of {len(plans)}") for number, (plan, each) in enumerate(listed, 1)]


@contextmanager
def chain_here(files: ModelFiles, plans: Sequence[SplitPlan]) -> Iterator[list[Hop]]:
    """The hops to servers in this process, one for each of `plans`."""
    with ExitStack() as stack:
        running = [stack.enter_context(serve_here(files, "trunk:none", {}, (plan.start, plan.end))) for plan in plans]
        yield hops_to(plans, *([each.address] for each in running))
