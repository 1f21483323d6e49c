"""Prompts in pieces, several of which are under way at once: the same answer, also when the trunk is lost meanwhile."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import cast

import pytest
import torch

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.client.remote_stage import RemoteStage
from splitlearn.events import GenerationRequest, TokenEvent
from splitlearn.flags import registry
from splitlearn.generation.chain import Link
from splitlearn.generation.generator import Generator
from splitlearn.generation.tokenizer import Tokens
from splitlearn.metrics import RunMetrics
from splitlearn.stages import loading
from tests.support.client import CACHED
from tests.support.proxy import proxy
from tests.support.trunk import PLAN, TrunkHere, hidden, served
from tests.support.words import generation_of, load_of, session_of

LENGTHS = [9, 9, 9, 4]
REQUEST = GenerationRequest("the quick brown fox jumps over the lazy dog and runs on", 12, ignore_eos=True)


def _pieces(files: ModelFiles) -> list[tuple[int, torch.Tensor]]:
    parts = torch.split(hidden(files, sum(LENGTHS)), LENGTHS, dim=1)
    return [(sum(LENGTHS[:at]), part) for at, part in enumerate(parts)]


def _whole(files: ModelFiles, address: str) -> torch.Tensor:
    with (
        closing(RemoteStage([address], served(files), 20)) as stage,
        closing(stage.open(session_of(CACHED), 64)) as session,
    ):
        return session.step(0, hidden(files, sum(LENGTHS))).x


def test_pieces_that_are_under_way_together_are_answered_in_their_order(here: TrunkHere, files: ModelFiles) -> None:
    with (
        closing(RemoteStage([here.address], served(files), 20)) as stage,
        closing(stage.open(session_of(CACHED), 64)) as session,
    ):
        outputs = [begun.finish() for begun in [session.begin(*piece) for piece in _pieces(files)]]
    assert [output.x.shape[1] for output in outputs] == LENGTHS
    torch.testing.assert_close(torch.cat([output.x for output in outputs], dim=1), _whole(files, here.address))
    for output in outputs:
        assert output.timing.overlapped_s >= 0 and min(output.timing.ledger.values()) >= 0


@pytest.mark.parametrize("answered", range(len(LENGTHS)))
def test_pieces_under_way_at_a_trunk_that_is_lost_are_answered_by_the_next(
    here: TrunkHere, files: ModelFiles, answered: int
) -> None:
    wanted = _whole(files, here.address)
    with (
        proxy(here.address) as between,
        closing(RemoteStage([between.address], served(files), 20)) as stage,
        closing(stage.open(session_of(CACHED), 64)) as session,
    ):
        pieces = _pieces(files)
        outputs = [session.step(*piece) for piece in pieces[:answered]]
        between.pause_s = 1.0  # no answer arrives before the cut
        begun = [session.begin(*piece) for piece in pieces[answered:]]
        between.cut()
        between.pause_s = 0.0
        outputs += [each.finish() for each in begun]
        torch.testing.assert_close(torch.cat([output.x for output in outputs], dim=1), wanted)
        assert [len(output.timing.recoveries) for output in outputs].count(1) == 1
        then = session.step(sum(LENGTHS), hidden(files, 1, seed=9))
        assert then.x.shape[1] == 1 and not then.timing.recoveries


def _answer(files: ModelFiles, address: str, client: frozenset[str], trunk: frozenset[str] = CACHED) -> RunMetrics:
    placement = loading.Placement(torch.device("cpu"), torch.float32)
    bottom, *rest = loading.load(files, loading.client_specs(PLAN), load_of(client), placement).chain
    with closing(RemoteStage([address], served(files), 20)) as stage:
        links: Sequence[Link] = [
            Link(bottom, session_of(client)),
            Link(stage, session_of(trunk)),
            *(Link(stage, session_of(client)) for stage in rest),
        ]
        tokens = Tokens.load(files.folder, use_fast=True)
        events = list(Generator(links, tokens, None, generation_of(client)).stream(REQUEST))
    times = [0.0, *(event.time_s for event in events if isinstance(event, TokenEvent))]
    for event, before, after in zip(events, times, times[1:], strict=False):
        assert isinstance(event, TokenEvent)
        assert sum(event.ledger.values()) == pytest.approx(after - before, abs=1e-9)
    metrics = RunMetrics.from_events(events)
    assert metrics is not None
    return metrics


@pytest.mark.parametrize("trunk", [CACHED, CACHED - {"use_cache"}], ids=["cached", "recomputing"])
def test_a_prompt_in_pieces_has_the_tokens_of_a_whole_one(
    here: TrunkHere, files: ModelFiles, trunk: frozenset[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _answer(files, here.address, CACHED, trunk)
    overlap = registry.FLAGS["prefill_overlap"]
    three = {
        **overlap.choices,
        "on": lambda settings: replace(settings, generation=replace(settings.generation, chunk_tokens=3)),
    }
    monkeypatch.setitem(cast(dict[str, registry.Flag], registry.FLAGS), overlap.name, replace(overlap, choices=three))
    pieces = _answer(files, here.address, CACHED | {"prefill_overlap"}, trunk)
    assert pieces.token_ids == whole.token_ids
    assert (pieces.bytes_up > whole.bytes_up) == (trunk == CACHED)  # a trunk without a cache is sent it whole
