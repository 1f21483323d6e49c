"""Reuse of prefixes within one process: the answers stay the same, and only what is new is computed."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.events import GenerationRequest
from splitlearn.flags.registry import FLAGS, Place
from splitlearn.generation.chain import Link
from splitlearn.generation.generator import Generator
from splitlearn.generation.prefix_cache import PrefixCache, chain_keys
from splitlearn.generation.tokenizer import Tokens
from splitlearn.kvcache.prefix_files import Files
from splitlearn.kvcache.prefix_store import BLOCK_TOKENS, Memory, PrefixStore
from splitlearn.metrics import RunMetrics, of_samples
from splitlearn.models.structure import no_prefixes
from splitlearn.sampling import SamplingParams
from splitlearn.stages import loading
from splitlearn.stages.base import Stage
from splitlearn.stages.local import LocalStage
from tests.support.words import generation_of, load_of, session_of

CACHED = frozenset({"use_cache", "inference_mode", "cache"})
LONG = tuple(range(3, 3 + 5 * BLOCK_TOKENS + 3))
REQUEST = GenerationRequest(LONG, max_new_tokens=BLOCK_TOKENS + 4, chat=False, ignore_eos=True)


@pytest.fixture(scope="module")
def whole(files: ModelFiles) -> LocalStage:
    placement = loading.Placement(torch.device("cpu"), torch.float32)
    return loading.load(files, loading.full_specs(files.n_layers), load_of(CACHED), placement).stages[0]


def generator(
    files: ModelFiles, stages: Sequence[Stage], applied: frozenset[str] = CACHED, max_bytes: int = 1 << 30
) -> Generator:
    """One that keeps prefixes."""
    links = [Link(stage, session_of(applied | {"prefix_cache"})) for stage in stages]
    prefixes = PrefixCache(PrefixStore([Memory("memory", max_bytes)]), b"secret", b"context")
    return Generator(links, Tokens.load(files.folder, use_fast=True), None, generation_of(applied), prefixes)


def plain(made: Generator) -> Generator:
    """The same without kept prefixes."""
    return replace(made, prefixes=None)


def run(made: Generator, request: GenerationRequest = REQUEST) -> RunMetrics:
    return of_samples(made.stream(request), 1)[0]


@pytest.fixture
def fed(whole: LocalStage) -> Iterator[list[int]]:
    """How many tokens each forward had."""
    seen: list[int] = []
    handle = whole.cut.module.register_forward_pre_hook(
        lambda module, given, named: seen.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    yield seen
    handle.remove()


@pytest.mark.parametrize("kind", ["cache", "cache=dynamic", "cache=static"])
def test_a_prompt_that_was_seen_is_not_computed_again(
    kind: str, files: ModelFiles, whole: LocalStage, fed: list[int]
) -> None:
    made = generator(files, [whole], CACHED - {"cache"} | {kind})
    first = run(made)
    assert (first.cached_tokens, fed[0]) == (0, len(LONG))
    fed.clear()
    again = run(made)
    assert (again.cached_tokens, fed[0]) == (5 * BLOCK_TOKENS, 3)
    assert again.token_ids == first.token_ids == run(plain(made)).token_ids


def test_the_next_turn_of_a_conversation_computes_only_what_is_new(
    files: ModelFiles, whole: LocalStage, fed: list[int]
) -> None:
    made = generator(files, [whole])
    ids, new = LONG, len(LONG)
    for _ in range(4):
        fed.clear()
        found = run(made, replace(REQUEST, prompt=ids))
        assert found.token_ids == run(plain(made), replace(REQUEST, prompt=ids)).token_ids
        assert fed[0] == len(ids) - found.cached_tokens < new + BLOCK_TOKENS
        ids, new = (*ids, *found.token_ids, *range(7, 20)), 14  # the last token of an answer is never fed


def test_a_prompt_of_whole_blocks_still_computes_its_last_token(files: ModelFiles, whole: LocalStage) -> None:
    made, request = generator(files, [whole]), replace(REQUEST, prompt=LONG[: 2 * BLOCK_TOKENS])
    wanted = run(made, request).token_ids
    again = run(made, request)
    assert (again.cached_tokens, again.token_ids) == (BLOCK_TOKENS, wanted)


def test_another_prompt_shares_only_the_blocks_that_are_the_same(files: ModelFiles, whole: LocalStage) -> None:
    made = generator(files, [whole])
    run(made)
    other = replace(REQUEST, prompt=(*LONG[: 2 * BLOCK_TOKENS + 5], *LONG[:30]))
    found = run(made, other)
    assert (found.cached_tokens, found.token_ids) == (2 * BLOCK_TOKENS, run(plain(made), other).token_ids)
    shifted = replace(REQUEST, prompt=LONG[1:])
    assert run(made, shifted).cached_tokens == 0


@pytest.mark.parametrize("flag", ["prompt_lookup", "prefill_overlap"])
def test_drafts_and_prompts_in_pieces_go_with_it(flag: str, files: ModelFiles, whole: LocalStage) -> None:
    made = generator(files, [whole], CACHED | {flag})
    request = replace(REQUEST, prompt=LONG[:40] * 4, max_new_tokens=40)
    wanted = run(plain(made), request)
    assert [run(made, request).token_ids for _ in range(3)] == [wanted.token_ids] * 3


def test_samples_share_what_is_kept(files: ModelFiles, whole: LocalStage) -> None:
    made = generator(files, [whole])
    request = replace(REQUEST, samples=3, sampling=SamplingParams(temperature=0.9, seed=3))
    first, again = (of_samples(made.stream(request), 3) for _ in range(2))
    assert [each.token_ids for each in again] == [each.token_ids for each in first]
    assert [each.cached_tokens for each in again] == [5 * BLOCK_TOKENS] * 3


def test_an_echo_and_a_run_without_a_cache_reuse_nothing(files: ModelFiles, whole: LocalStage) -> None:
    made, echo = generator(files, [whole]), replace(REQUEST, echo=True, top_logprobs=2)
    run(made)
    assert (run(made, echo).cached_tokens, run(made, echo).token_ids) == (0, run(plain(made), echo).token_ids)
    bare = generator(files, [whole], frozenset({"inference_mode"}))
    short = replace(REQUEST, max_new_tokens=3)
    assert [run(bare, short).cached_tokens for _ in range(2)] == [0, 0]


def test_what_a_cancelled_answer_has_computed_is_kept(files: ModelFiles, whole: LocalStage) -> None:
    made = generator(files, [whole])
    with closing(made.stream(REQUEST)) as events:
        next(events)
    assert run(made).cached_tokens == 5 * BLOCK_TOKENS


def test_a_request_that_is_not_to_be_kept_reuses_and_leaves_nothing(files: ModelFiles, whole: LocalStage) -> None:
    made, warm_up = generator(files, [whole]), replace(REQUEST, kept=False)
    assert [run(made, warm_up).cached_tokens, run(made).cached_tokens] == [0, 0]
    assert run(made, warm_up).cached_tokens == 5 * BLOCK_TOKENS


def test_no_more_is_kept_than_the_budget_and_the_answers_stay_right(files: ModelFiles, whole: LocalStage) -> None:
    made = generator(files, [whole], max_bytes=3 * BLOCK_TOKENS * 6 * 2 * 2 * 12 * 4)
    assert made.prefixes is not None
    (tier,) = made.prefixes.store.tiers
    for start in (0, 20, 0, 40):
        request = replace(REQUEST, prompt=(*LONG[start:], *LONG[:start]))
        assert run(made, request).token_ids == run(plain(made), request).token_ids
        assert 0 < tier.nbytes <= tier.max_bytes
    assert tier.counts.evictions


def test_conversations_that_do_not_fit_into_memory_come_back_from_files(
    files: ModelFiles, whole: LocalStage, tmp_path: Path
) -> None:
    """32 conversations in turn, with room for 4 of them."""
    made, prompts = generator(files, [whole]), [(3 + at, *LONG[:35]) for at in range(32)]
    request = replace(REQUEST, max_new_tokens=2)
    wanted = [run(plain(made), replace(request, prompt=prompt)).token_ids for prompt in prompts]
    memory = Memory("memory", 4 * 2 * BLOCK_TOKENS * 6 * 2 * 2 * 12 * 4)
    store = PrefixStore([memory, Files(tmp_path, 1 << 30)])
    kept = replace(made, prefixes=PrefixCache(store, b"secret", b""))
    for cached in (0, 2 * BLOCK_TOKENS):
        found = [run(kept, replace(request, prompt=prompt)) for prompt in prompts]
        assert [each.token_ids for each in found] == wanted
        assert {each.cached_tokens for each in found} == {cached}
    assert 0 < memory.nbytes <= memory.max_bytes


def test_a_key_depends_on_the_secret_the_context_and_all_tokens_up_to_its_end() -> None:
    keys = chain_keys(b"s", b"c", LONG)
    assert len(keys) == len(set(keys)) == 5
    assert chain_keys(b"s", b"c", LONG[: 2 * BLOCK_TOKENS]) == keys[:2]
    for other in (chain_keys(b"t", b"c", LONG), chain_keys(b"s", b"d", LONG), chain_keys(b"s", b"c", (9, *LONG[1:]))):
        assert not set(other) & set(keys)


def test_the_flag_is_unavailable_where_keys_depend_on_the_length() -> None:
    flag, rope = FLAGS["prefix_cache"], {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    for config, refused in (
        (AutoConfig.for_model("llama"), False),
        (AutoConfig.for_model("llama", rope_parameters=rope), True),
        (AutoConfig.for_model("mamba"), True),
    ):
        assert (flag.unavailable(Place("cpu", no_prefixes=no_prefixes(config))) is not None) is refused
