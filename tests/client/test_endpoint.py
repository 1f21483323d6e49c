"""The channels of an address, for several threads at once."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from splitlearn.client.endpoint import Endpoint
from splitlearn.wire.channel import NONE

USERS, TIMES = 8, 500


@pytest.fixture
def _many_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def is_closed(channel: grpc.Channel) -> bool:
    try:
        health_pb2_grpc.HealthStub(channel).Check.future(health_pb2.HealthCheckRequest()).cancel()
    except ValueError:  # as grpc says it
        return True
    return False


def test_each_channel_has_one_user_at_a_time_and_none_stays_open(_many_switches: None) -> None:
    endpoint, used, all_of_them = Endpoint("localhost:1", NONE), set[grpc.Channel](), set[grpc.Channel]()

    def use(number: int) -> None:
        for time in range(TIMES):
            channel = endpoint.take()
            assert channel not in used
            used.add(channel)
            all_of_them.add(channel)
            used.remove(channel)
            if number == 0 and time == TIMES // 2:
                endpoint.close()
            endpoint.give_back(channel)

    with ThreadPoolExecutor(USERS) as threads:
        list(threads.map(use, range(USERS)))
    assert all(is_closed(each) for each in all_of_them)
