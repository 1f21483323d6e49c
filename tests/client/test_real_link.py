"""The real link to a trunk, measured by calls with padding."""

from typing import Any

import grpc
import pytest

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.client.real_link import RealLink, real_link
from splitlearn.wire import MAX_PADDING_BYTES
from splitlearn.wire import trunk_pb2 as pb
from splitlearn.wire.channel import open_channel
from splitlearn.wire.stub import DESCRIBE, TrunkStub
from tests.support.trunk import TrunkHere, serve_here


def test_the_answer_has_the_padding_that_was_asked_for_and_ignores_the_requests_own(here: TrunkHere) -> None:
    with open_channel(here.address) as channel:
        describe = TrunkStub(channel).describe
        plain = describe(pb.DescribeRequest(padding=bytes(100_000)), timeout=20)
        padded = describe(pb.DescribeRequest(answer_padding=MAX_PADDING_BYTES), timeout=20)
    assert padded.padding == bytes(MAX_PADDING_BYTES)
    padded.ClearField("padding")
    assert padded == plain


def test_more_padding_than_there_may_be_is_refused_by_name(here: TrunkHere) -> None:
    with open_channel(here.address) as channel, pytest.raises(grpc.RpcError, match="answer_padding: 1048577"):
        TrunkStub(channel).describe(pb.DescribeRequest(answer_padding=MAX_PADDING_BYTES + 1), timeout=20)


def test_a_describe_that_is_no_message_is_refused(here: TrunkHere) -> None:
    with open_channel(here.address) as channel, pytest.raises(grpc.RpcError, match="DescribeRequest"):
        call: Any = channel.unary_unary(DESCRIBE)
        call(b"\xff", timeout=20)


def test_a_link_is_measured_both_ways_and_each_figure_is_positive(here: TrunkHere) -> None:
    found = real_link(here.address)
    assert found.rtt_s > 0
    assert found.up_bits_per_s and found.down_bits_per_s
    assert "Mbit/s up" in found.summary


def test_a_trunk_that_takes_no_long_message_tells_its_round_trip_alone(files: ModelFiles) -> None:
    with serve_here(files, max_message_bytes=10_000) as small:
        found = real_link(small.address)
    assert (found.rtt_s > 0, found.up_bits_per_s) == (True, None)


def test_figures_are_short_for_people() -> None:
    assert RealLink(0.00041, 1.234e9, 5.6e6).summary == "0.4 ms, 1200 Mbit/s up, 5.6 Mbit/s down"
    assert RealLink(0.05, None, None).summary == "50.0 ms"
