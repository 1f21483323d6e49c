"""The channels of an address, for several threads at once."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from splitlearn.client.endpoint import Endpoint
from splitlearn.wire.channel import NONE

USERS, TIMES = 8, 500


class Channel:
    """Counts how often it was closed."""

    def __init__(self, *_: object) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def _many_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_each_channel_has_one_user_at_a_time_and_none_stays_open(
    _many_switches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitlearn.client.endpoint.open_channel", Channel)
    endpoint, used, seen = Endpoint("localhost:1", NONE), set[object](), set[Channel]()

    def use(number: int) -> None:
        for time in range(TIMES):
            channel = endpoint.take()
            assert isinstance(channel, Channel) and channel not in used
            used.add(channel)
            seen.add(channel)
            used.remove(channel)
            if number == 0 and time == TIMES // 2:
                endpoint.close()
            endpoint.give_back(channel)

    with ThreadPoolExecutor(USERS) as threads:
        list(threads.map(use, range(USERS)))
    assert {each.closed for each in seen} == {1}
