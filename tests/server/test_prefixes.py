"""Kept prefixes at the trunk: a split conversation computes only what is new, and no holder learns of another's."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from server.prefixes import TrunkPrefixes
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.events import GenerationRequest
from splitlearn.generation.prefix_cache import PrefixCache, chain_keys
from splitlearn.kvcache import prefix_files
from splitlearn.kvcache.prefix_store import BLOCK_TOKENS, Memory, PrefixStore
from splitlearn.metrics import of_samples
from splitlearn.sampling import SamplingParams
from splitlearn.wire import MAX_PREFIX_KEYS
from splitlearn.wire import trunk_pb2 as pb
from splitlearn.wire.channel import Credentials
from tests.support.client import CACHED, Client, client
from tests.support.proxy import proxy
from tests.support.tokens import ANN, BOB, entry, written
from tests.support.trunk import Raw, TrunkHere, eventually, hidden, opening, serve_here, step, tensor_of

KEPT = CACHED | {"prefix_cache"}
LONG = tuple(range(3, 3 + 5 * BLOCK_TOKENS + 3))
REQUEST = GenerationRequest(LONG, max_new_tokens=BLOCK_TOKENS + 4, chat=False, ignore_eos=True)
KEYS = b"".join(chain_keys(b"a client's secret", b"", LONG))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(written(tmp_path_factory.mktemp("tokens"), entry("ann", ANN), entry("bob", BOB)))


@pytest.fixture(scope="module")
def guarded(files: ModelFiles, tokens: str) -> Iterator[TrunkHere]:
    """A server that asks for tokens."""
    with serve_here(files, tokens=tokens) as running:
        yield running


def empty() -> PrefixStore:
    return PrefixStore([Memory("memory", 1 << 30)])


@pytest.fixture
def kept(here: TrunkHere, monkeypatch: pytest.MonkeyPatch) -> TrunkPrefixes:
    """What `here` keeps: nothing yet."""
    prefixes = here.runtime.prefixes
    monkeypatch.setattr(prefixes, "store", empty())
    return prefixes


def keeping(made: Client) -> None:
    """Let the client keep prefixes, none of which it has yet."""
    made.keep(PrefixCache(empty(), b"secret", b""))


def test_a_split_conversation_computes_only_what_is_new(
    files: ModelFiles, here: TrunkHere, kept: TrunkPrefixes
) -> None:
    with client(files, here.address, trunk=KEPT, own=KEPT) as made:
        wanted = made.ask(REQUEST)
        keeping(made)
        first = made.ask(REQUEST)
        ids, new = (*LONG, *first.token_ids, 7, 8, 9), 4
        second = made.ask(replace(REQUEST, prompt=ids))
    assert (first.token_ids, first.cached_tokens) == (wanted.token_ids, 0)
    assert 0 < len(ids) - second.cached_tokens < new + BLOCK_TOKENS
    assert kept.store.hits == second.cached_tokens
    assert second.bytes_up < first.bytes_up / 2
    with client(files, here.address) as bare:
        assert bare.ask(replace(REQUEST, prompt=ids)).token_ids == second.token_ids


@pytest.mark.parametrize("flag", ["head_overlap", "prefill_overlap", "prompt_lookup"])
def test_early_steps_chunks_and_drafts_go_with_it(
    flag: str, files: ModelFiles, here: TrunkHere, kept: TrunkPrefixes
) -> None:
    """With chunks behind a kept block, and with a prompt of which a single token is left."""
    request = replace(REQUEST, prompt=(*LONG[:40] * 8, 5), max_new_tokens=24)
    with client(files, here.address, trunk=KEPT, own=KEPT | {flag}) as made:
        wanted = made.ask(request).token_ids
        keeping(made)
        made.ask(replace(request, prompt=LONG[:40], max_new_tokens=1))
        runs = [made.ask(request) for _ in range(3)]
    assert [run.token_ids for run in runs] == [wanted] * 3
    assert [run.cached_tokens for run in runs] == [32, 320, 320]


def test_samples_fork_what_is_kept(files: ModelFiles, here: TrunkHere, kept: TrunkPrefixes) -> None:
    request = replace(REQUEST, samples=3, sampling=SamplingParams(temperature=0.9, seed=3))
    with client(files, here.address, trunk=KEPT, own=KEPT) as made:
        keeping(made)
        first, again = (of_samples(made.stream(request), 3) for _ in range(2))
    assert [each.token_ids for each in again] == [each.token_ids for each in first]
    assert [each.cached_tokens for each in again] == [5 * BLOCK_TOKENS] * 3


def test_only_what_all_parts_have_is_reused(files: ModelFiles, here: TrunkHere, kept: TrunkPrefixes) -> None:
    with client(files, here.address, trunk=KEPT, own=KEPT) as made:
        keeping(made)
        wanted = made.ask(REQUEST).token_ids
        kept.store = empty()  # the trunk has forgotten
        assert (again := made.ask(REQUEST)).cached_tokens == 0
        keeping(made)  # the client has forgotten
        assert (last := made.ask(REQUEST)).cached_tokens == 0
        shorter = made.ask(replace(REQUEST, prompt=LONG[:30]))
    assert again.token_ids == last.token_ids == wanted
    assert shorter.cached_tokens == BLOCK_TOKENS


def test_an_answer_on_a_kept_prefix_survives_the_loss_of_its_trunk(
    files: ModelFiles, here: TrunkHere, kept: TrunkPrefixes
) -> None:
    with proxy(here.address) as between, client(files, between.address, trunk=KEPT, own=KEPT) as made:
        keeping(made)
        wanted = made.ask(REQUEST).token_ids
        found = made.ask(REQUEST, at=lambda tokens: between.cut() if tokens == 5 else None)
        kept.store = empty()  # another trunk, which has nothing
        other = made.ask(REQUEST)
        made.ask(REQUEST, at=lambda tokens: between.cut() if tokens == 5 else None)
    assert (found.cached_tokens, found.token_ids, len(found.recoveries)) == (5 * BLOCK_TOKENS, wanted, 1)
    assert other.token_ids == wanted


def keep(address: str, files: ModelFiles, who: Credentials, keys: bytes = KEYS) -> None:
    """Let a session compute and keep the blocks of `keys`."""
    with Raw(address, who) as raw:
        raw.ask(opening(files, max_length=128, flags=sorted(KEPT)))
        raw.ask(step(hidden(files, len(keys)), 0))
        raw.send(keeps(keys))
        raw.end()


def keeps(keys: bytes) -> bytes:
    return pb.ClientMessage(keep=pb.Keep(prefix_keys=keys)).SerializeToString()


def cached(address: str, files: ModelFiles, who: Credentials) -> int:
    with Raw(address, who) as raw:
        opened = raw.ask(opening(files, max_length=128, flags=sorted(KEPT), prefix_keys=KEYS)).opened
        raw.end()
        return opened.cached_tokens


def test_a_holder_finds_nothing_of_another_one_even_with_the_same_keys(files: ModelFiles, guarded: TrunkHere) -> None:
    ann, bob, store = Credentials(token=ANN), Credentials(token=BOB), guarded.runtime.prefixes.store
    keep(guarded.address, files, ann)
    assert cached(guarded.address, files, bob) == 0
    hits = store.hits
    assert cached(guarded.address, files, bob) == 0
    assert store.hits == hits
    assert cached(guarded.address, files, ann) == 5 * BLOCK_TOKENS
    keep(guarded.address, files, bob)
    assert store.tiers[0].nbytes == 10 * BLOCK_TOKENS * 2 * 2 * 2 * 12 * 4  # two copies of five blocks


def test_a_session_on_a_kept_prefix_answers_as_the_one_that_computed_it(
    files: ModelFiles, here: TrunkHere, kept: TrunkPrefixes
) -> None:
    x, nobody = hidden(files, 83), Credentials()
    with Raw(here.address) as raw:
        raw.ask(opening(files, max_length=128, flags=sorted(KEPT)))
        raw.ask(step(x[:, :80], 0))
        whole = tensor_of(raw.ask(step(x[:, 80:], 80, step_id=2)), files)
        raw.send(keeps(KEYS))
        raw.end()
    assert cached(here.address, files, nobody) == 80
    with Raw(here.address) as raw:
        raw.ask(opening(files, max_length=128, flags=sorted(KEPT), prefix_keys=KEYS))
        assert (tensor_of(raw.ask(step(x[:, 80:], 80)), files) == whole).all()
        again = tensor_of(raw.ask(step(x[:, 64:], 64, step_id=2, truncate=True)), files)
        assert (again[:, -3:] - whole).abs().max() < 1e-4


def test_prefixes_in_files_survive_a_restart_of_the_server(files: ModelFiles, tmp_path: Path) -> None:
    kept = {"memory_bytes": 0, "file_bytes": 1 << 20, "folder": str(tmp_path / "kept"), "survives_restart": True}
    found = []
    for _ in range(2):
        with serve_here(files, "trunk:none", kept) as running:
            found.append(cached(running.address, files, Credentials()))
            keep(running.address, files, Credentials())
        while prefix_files._locks:  # noqa: SLF001  the process that held them has ended
            prefix_files._locks.pop().release()  # noqa: SLF001
    assert found == [0, 5 * BLOCK_TOKENS]


BAD_OPENINGS: dict[str, dict[str, Any]] = {
    "half a key": {"prefix_keys": KEYS[:-1]},
    "too many keys": {"prefix_keys": bytes(16 * (MAX_PREFIX_KEYS + 1))},
    "more tokens than the session has": {"prefix_keys": KEYS, "max_length": 80},
    "keys without the flag": {"prefix_keys": KEYS, "flags": ["use_cache"]},
    "keys without a cache": {"prefix_keys": KEYS, "flags": ["prefix_cache"]},
}
BAD_KEEPS: dict[str, tuple[list[str], list[bytes]]] = {
    "more than was computed": (sorted(KEPT), [KEYS]),
    "half a key": (sorted(KEPT), [KEYS[:15]]),
    "a second time": (sorted(KEPT), [b"", KEYS[:16]]),
    "without the flag": (["use_cache"], [KEYS[:16]]),
}


@pytest.mark.parametrize("name", BAD_OPENINGS)
def test_a_session_with_wrong_keys_is_refused_and_leaves_nothing(
    name: str, files: ModelFiles, here: TrunkHere, kept: TrunkPrefixes
) -> None:
    with Raw(here.address) as raw:
        changes = {"max_length": 128, "flags": sorted(KEPT), **BAD_OPENINGS[name]}
        code, said = raw.refusal(opening(files, **changes))
    assert (code, "prefix_keys" in said) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    assert eventually(lambda: not here.runtime.admission.sessions)


@pytest.mark.parametrize("name", BAD_KEEPS)
def test_what_cannot_be_kept_is_refused_and_leaves_nothing(
    name: str, files: ModelFiles, here: TrunkHere, kept: TrunkPrefixes
) -> None:
    flags, asked = BAD_KEEPS[name]
    with Raw(here.address) as raw:
        raw.ask(opening(files, max_length=128, flags=flags))
        raw.ask(step(hidden(files, 40), 0))
        code, said = raw.refusal(*map(keeps, asked))
    assert (code, "keep" in said or "prefix_keys" in said) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    assert not kept.store.tiers[0].nbytes
    assert eventually(lambda: not here.runtime.admission.sessions)
