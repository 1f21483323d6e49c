"""A split arm behind an emulated link: the same answer, the same names, one worker for all links."""

import signal
from collections.abc import Iterator
from dataclasses import replace

import psutil
import pytest

from splitlearn import config
from splitlearn.address import Address
from splitlearn.arms.report import ArmReport
from splitlearn.arms.runs import Runs
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.errors import InputError
from splitlearn.events import GenerationRequest, Kind
from splitlearn.flags.selection import FlagSet
from splitlearn.link.emulated import Link
from splitlearn.link.route import Routes
from splitlearn.runtime.progress import silent
from splitlearn.wire.channel import Credentials, open_channel
from tests.conftest import TinyFactory
from tests.support.trunk import settings

CACHED = frozenset({"use_cache", "inference_mode"})
FLAGS = FlagSet(CACHED, CACHED, CACHED)
SHORT = GenerationRequest("Why is the sky blue?", max_new_tokens=6, ignore_eos=True)
FAR = Link(rtt_ms=10, jitter_ms=2, up_mbit=10, down_mbit=50)


@pytest.fixture(scope="module")
def files(tiny_model: TinyFactory) -> ModelFiles:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def runs(files: ModelFiles) -> Iterator[Runs]:
    with Runs(config.parse(settings(files, trunk={"link": str(FAR)})), silent) as made:
        yield made


def report(runs: Runs, link: Link | None = None, kind: Kind = "split") -> ArmReport:
    *_, last = runs.stream(kind, FLAGS, SHORT, link=link)
    assert isinstance(last, ArmReport)
    return last


def proxies() -> list[psutil.Process]:
    """The processes that emulate links: the only children that listen and answer no gRPC."""
    children = psutil.Process().children(recursive=True)
    return [each for each in children if any(at.status == psutil.CONN_LISTEN for at in each.net_connections("tcp"))]


def test_a_link_changes_no_token_and_the_report_names_the_link_and_the_real_trunk(runs: Runs) -> None:
    configured, near, full = report(runs), report(runs, Link()), report(runs, kind="full")
    assert configured.metrics.token_ids == near.metrics.token_ids == full.metrics.token_ids
    assert (configured.link, near.link, full.link) == (FAR, Link(), Link())
    assert configured.trunk_address == near.trunk_address == runs.trunk_addresses()[0]


def test_a_step_takes_no_less_than_the_round_trip(runs: Runs) -> None:
    far = report(runs, Link(rtt_ms=100))
    assert min(far.metrics.itl_s) > 0.09


def test_another_link_needs_no_other_worker(runs: Runs) -> None:
    specs = {runs.ready_spec("split", FLAGS, link) for link in (FAR, replace(FAR, rtt_ms=20), Link(loss_percent=1))}
    assert len(specs) == 1


def test_a_link_that_died_is_made_anew_for_the_next_run(runs: Runs) -> None:
    (near,) = runs.ready_spec("split", FLAGS).hops[0].via
    port = int(near.rpartition(":")[2])
    (child,) = [each for each in proxies() if port in {at.laddr.port for at in each.net_connections("tcp")}]
    child.send_signal(signal.SIGKILL)
    assert report(runs).link == FAR
    assert runs.ready_spec("split", FLAGS).hops[0].via != (near,)


def test_words_that_mean_no_link_are_named_before_anything_starts(files: ModelFiles) -> None:
    with pytest.raises(InputError, match=r"trunk\.link: 'rtt=5'"):
        Runs(config.parse(settings(files, trunk={"link": "rtt=5"})), silent)


def test_a_token_goes_over_no_network_in_plaintext_by_way_of_a_link() -> None:
    with pytest.raises(InputError, match=r"trunk\.tls\.ca"):
        open_channel("192.0.2.1:50051", Credentials(token="secret"), "127.0.0.1:50051")


def test_each_address_of_a_trunk_is_behind_the_link() -> None:
    routes = Routes()
    try:
        via = routes.over(FAR, ("127.0.0.1:1", "[::1]:2", "localhost:3"))
        assert len(set(via)) == 3
        assert all(Address.parse(each).host == "127.0.0.1" for each in via)
        assert routes.over(Link(rtt_ms=1), ("[::1]:2",)) == via[1:2]
        assert routes.over(Link(), ("127.0.0.1:1",)) == ()
    finally:
        routes.close()
