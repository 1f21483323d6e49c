"""Kept prefixes in files: exact bytes, within the budget, after a restart; damaged and foreign files are not used."""

import os
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from splitlearn.config import PrefixCacheConfig
from splitlearn.errors import SetupError
from splitlearn.kvcache import prefix_files
from splitlearn.kvcache.prefix_files import Files, secret_of, store_of
from splitlearn.kvcache.prefix_store import Block, Memory, PrefixStore, nbytes

CPU, CONTEXT, PATIENCE_S = torch.device("cpu"), b"a model", 60.0
KEYS = [bytes([at]) * 16 for at in range(1, 7)]


def block_of(number: int) -> Block:
    """A block with all that may be in one: several dtypes, a part without tensors, a tensor that is not contiguous."""
    values = torch.arange(48.0).reshape(2, 4, 6) + number
    rows = torch.arange(16, dtype=torch.uint8) + number
    return (tuple(values.to(dtype) for dtype in (torch.float32, torch.bfloat16)), (), (rows, values.transpose(0, 1)))


BLOCKS = [block_of(number) for number in range(len(KEYS))]
SIZE = len(prefix_files._encoded(KEYS[0], BLOCKS[0]))  # noqa: SLF001


def same(one: Block, other: Block) -> bool:
    pairs = [pair for mine, theirs in zip(one, other, strict=True) for pair in zip(mine, theirs, strict=True)]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "prefixes"


def settings(root: Path, files: int = 100, memory: int = 0, survives: bool = True) -> PrefixCacheConfig:
    """Room for so many files, and for so many blocks in memory."""
    return PrefixCacheConfig(
        memory_bytes=memory * nbytes(BLOCKS[0]), file_bytes=files * SIZE, folder=root, survives_restart=survives
    )


def restarted() -> None:
    """Let go of all locks, as the end of the process does."""
    while prefix_files._locks:  # noqa: SLF001
        prefix_files._locks.pop().release()  # noqa: SLF001


@pytest.fixture(autouse=True)
def _locks() -> None:
    restarted()


def files_in(root: Path) -> list[Path]:
    return sorted(root.rglob("*.block"))


def kept(root: Path, files: int = 100) -> PrefixStore:
    store = store_of(settings(root, files), CPU, CONTEXT)
    store.put(KEYS, 0, BLOCKS)
    return store


def test_the_bytes_come_back_exactly_also_after_a_restart(root: Path) -> None:
    assert all(map(same, kept(root).find(KEYS), BLOCKS))
    restarted()
    found = store_of(settings(root), CPU, CONTEXT).find(KEYS)
    assert len(found) == len(KEYS)
    assert all(map(same, found, BLOCKS))


def test_blocks_in_memory_are_found_while_files_are_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, begun, found = store_of(settings(root, memory=2), CPU, CONTEXT), threading.Event(), threading.Event()
    for start in (0, 2, 4):
        store.put(KEYS[start : start + 2], 0, BLOCKS[start : start + 2])
    read = prefix_files._read  # noqa: SLF001

    def slow(path: Path, size: int) -> bytes | None:
        begun.set()
        return read(path, size) if found.wait(PATIENCE_S) else None

    monkeypatch.setattr(prefix_files, "_read", slow)
    with ThreadPoolExecutor(1) as threads:
        reading = threads.submit(store.find, KEYS[:2])
        assert begun.wait(PATIENCE_S)
        assert all(map(same, store.find(KEYS[4:]), BLOCKS[4:]))
        store.put(KEYS[2:4], 0, BLOCKS[2:4])
        found.set()
        assert all(map(same, reading.result(), BLOCKS[:2]))


def test_what_leaves_memory_is_found_in_files(root: Path) -> None:
    store = store_of(settings(root, memory=2), CPU, CONTEXT)
    for start in (0, 2, 4):
        store.put(KEYS[start : start + 2], 0, BLOCKS[start : start + 2])
    memory, files = store.tiers
    assert (memory.nbytes, files.nbytes) == (2 * nbytes(BLOCKS[0]), 4 * SIZE)
    assert all(map(same, store.find(KEYS), BLOCKS))
    assert (memory.counts.hits, files.counts.hits) == (32, 64)


def test_files_are_for_this_user_alone_and_named_by_keys(root: Path) -> None:
    kept(root)
    secret_of(settings(root))
    paths = list(root.rglob("*"))
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (root, *paths) if path.is_dir()}
    assert modes == {0o700}
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths if path.is_file()} == {0o600}
    assert {path.stem for path in files_in(root)} == {key.hex() for key in KEYS}


def test_files_stay_within_their_budget_also_one_that_was_lowered(root: Path) -> None:
    store = kept(root, files=4)
    assert len(files_in(root)) == 4 == len(store.find(KEYS))
    restarted()
    lower = store_of(settings(root, files=2), CPU, CONTEXT)
    assert len(files_in(root)) == 2 == len(lower.find(KEYS))


def test_without_surviving_nothing_is_left_for_the_next_process(root: Path) -> None:
    store = store_of(settings(root, survives=False), CPU, CONTEXT)
    store.put(KEYS, 0, BLOCKS)
    assert len(store.find(KEYS)) == len(files_in(root)) == len(KEYS)
    restarted()
    assert store_of(settings(root, survives=False), CPU, b"another model").find(KEYS) == []
    assert files_in(root) == []


def test_processes_at_the_same_time_and_other_models_do_not_share_files(root: Path) -> None:
    kept(root)
    assert store_of(settings(root), CPU, CONTEXT).find(KEYS) == []
    restarted()
    assert store_of(settings(root), CPU, b"another model").find(KEYS) == []
    assert len(store_of(settings(root), CPU, CONTEXT).find(KEYS)) == len(KEYS)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def exchange(path: Path) -> None:
    """Another block's file in its place."""
    path.write_bytes((path.parent / f"{KEYS[4].hex()}.block").read_bytes())


def link(path: Path) -> None:
    path.rename(path.with_suffix(".elsewhere"))
    path.symlink_to(path.with_suffix(".elsewhere"))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def open_to_others(path: Path) -> None:
    path.chmod(0o644)


@pytest.mark.parametrize("damage", [cut, flip, exchange, link, pipe, open_to_others, Path.unlink])
@pytest.mark.parametrize("when", ["while it runs", "before it starts"])
def test_a_file_that_is_not_as_it_was_written_is_not_used(
    damage: Callable[[Path], None], when: str, root: Path
) -> None:
    store = kept(root)
    if when == "before it starts":
        restarted()
    damage(next(path for path in files_in(root) if path.stem == KEYS[2].hex()))
    if when == "before it starts":
        store = store_of(settings(root), CPU, CONTEXT)
    assert len(store.find(KEYS)) == 2
    store.put(KEYS, 0, BLOCKS)
    assert all(map(same, store.find(KEYS), BLOCKS))


def test_files_of_others_in_the_folder_stay_as_they_are(root: Path) -> None:
    kept(root)
    (folder,) = {path.parent for path in files_in(root)}
    (folder / "notes.txt").write_text("mine")
    (folder / f"{'0' * 31}g.block").write_text("mine, too")
    restarted()
    store_of(settings(root, files=1), CPU, CONTEXT)
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / f"{'0' * 31}g.block").exists()


def test_a_folder_that_others_can_use_is_refused(root: Path, tmp_path: Path) -> None:
    root.mkdir(mode=0o755)
    with pytest.raises(SetupError, match=r"prefix_cache\.folder.*0700"):
        store_of(settings(root), CPU, CONTEXT)
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    with pytest.raises(SetupError, match=r"prefix_cache\.folder"):
        store_of(settings(link), CPU, CONTEXT)
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match=r"prefix_cache\.folder"):
        store_of(settings(tmp_path / "file"), CPU, CONTEXT)


def test_a_client_has_the_same_secret_after_a_restart_only_if_prefixes_survive(root: Path) -> None:
    assert secret_of(settings(root)) == secret_of(settings(root))
    assert secret_of(settings(root, survives=False)) != secret_of(settings(root, survives=False))
    (root / "secret").chmod(0o644)
    with pytest.raises(SetupError, match="secret"):
        secret_of(settings(root))


def test_a_disk_that_is_full_keeps_nothing_and_fails_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prefix_files, "_write", full)
    store = kept(root)
    assert store.find(KEYS) == []
    assert isinstance(store.tiers[0], Files)
    assert not store.tiers[0].nbytes


def test_the_memory_of_a_device_comes_before_that_of_the_host() -> None:
    tiers = store_of(PrefixCacheConfig(), torch.device("cuda", 0), CONTEXT).tiers
    assert [(tier.name, type(tier)) for tier in tiers] == [("device", Memory), ("memory", Memory)]
