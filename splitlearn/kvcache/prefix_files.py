"""Kept prefixes in files: the tier behind memory.

    <folder>/secret                        of this user's clients, if prefixes survive a restart
    <folder>/<hash of context>-<number>/   of one process at a time, which holds the lock in it; mode 0700
        <key>.block                        mode 0600: SHA-256 of key and rest, the number of parts, safetensors

A file is named by its block's key, which is a hash. It is read only if it is a plain file of this user alone and its
digest is right. Else its block counts as missing. Other files are left alone, and nothing is unpickled.
"""

import hashlib
import os
import re
import secrets
import stat
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load, save

from splitlearn.config import PrefixCacheConfig
from splitlearn.errors import SetupError
from splitlearn.kvcache.prefix_store import Block, Counts, Memory, PrefixStore, Reader, Tier

MOST_FOLDERS = 64
PASSING, DRAFT = "passing-", ".draft-"
"""Begin the names of folders whose files do not survive, and of files that are being written."""
SECRET_BYTES = 32
DIGEST_BYTES = 32
_locks: list[FileLock] = []
"""Held until the process ends."""
NAME = re.compile(r"([0-9a-f]{32}|[0-9a-f]{64})\.block")


def store_of(settings: PrefixCacheConfig, device: torch.device, context: bytes) -> PrefixStore:
    """The store of one process: on a GPU its memory, then that of the host, then files. `context` names what the
    blocks' values depend on. Raises SetupError for a folder that cannot be used."""
    tiers: list[Tier] = [Memory("memory", settings.memory_bytes, torch.device("cpu"))]
    if device.type == "cuda":
        tiers.insert(0, Memory("device", settings.device_bytes))
    if settings.file_bytes and settings.folder:
        own = _own_folder(settings.folder, context, settings.survives_restart)
        tiers.append(Files(own, settings.file_bytes))
    return PrefixStore(tiers)


def secret_of(settings: PrefixCacheConfig) -> bytes:
    """The secret of a client's keys: a new one for each process, or one in a file if prefixes survive a restart."""
    root = settings.folder
    if root is None or not (settings.file_bytes and settings.survives_restart):
        return secrets.token_bytes(SECRET_BYTES)
    _private(root)
    path = root / "secret"
    with suppress(FileExistsError):
        made = root / f"{DRAFT}{secrets.token_hex(8)}"
        _write(made, secrets.token_bytes(SECRET_BYTES))
        try:
            os.link(made, path)  # the first of several processes wins
        finally:
            made.unlink()
    found = _read(path, SECRET_BYTES)
    if found is None:
        raise SetupError(f"prefix_cache.folder: {path} is not a file of {SECRET_BYTES} bytes that only you can read.")
    return found


class Files:
    """Blocks in files of `folder`, which no other process uses now. Begins with those that are there."""

    name = "file"

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.max_bytes, self.nbytes, self.counts = max_bytes, 0, Counts()
        self._folder, self._sizes = folder, OrderedDict[bytes, int]()
        for path, size in _blocks_in(folder):
            self._sizes[bytes.fromhex(path.stem)] = size
            self.nbytes += size
        self._make_room(0)

    def __contains__(self, key: bytes) -> bool:
        return key in self._sizes

    def touch(self, key: bytes) -> None:
        self._sizes.move_to_end(key)
        with suppress(OSError):
            os.utime(self._path(key), ns=(time.time_ns(),) * 2)  # finer than the kernel's own times

    def oldest(self) -> bytes | None:
        return next(iter(self._sizes), None)

    def reader(self, key: bytes) -> Reader:
        path, size = self._path(key), self._sizes[key]

        def read() -> Block | None:
            data = _read(path, size)
            return None if data is None else _decoded(key, data)

        return read

    def add(self, key: bytes, block: Block) -> None:
        data = _encoded(key, block)
        self._make_room(len(data))
        if len(data) > self.max_bytes:
            return
        with suppress(OSError):  # a full disk: the block is not kept
            _write(self._path(key), data)
            self._sizes[key] = len(data)
            self.nbytes += len(data)

    def remove(self, key: bytes) -> Block | None:
        self._forget(key)
        return None

    def _make_room(self, size: int) -> None:
        """Remove the least recently used until a file of `size` bytes fits. It is larger than its block."""
        while self._sizes and self.nbytes + size > self.max_bytes:
            self._forget(next(iter(self._sizes)))
            self.counts.evictions += 1

    def _forget(self, key: bytes) -> None:
        self.nbytes -= self._sizes.pop(key)
        with suppress(OSError):
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: bytes) -> Path:
        return self._folder / f"{key.hex()}.block"


def _encoded(key: bytes, block: Block) -> bytes:
    """A block as the bytes of its file: the digest, the number of parts, the tensors."""
    tensors = {f"{at}.{number}": each.contiguous() for at, part in enumerate(block) for number, each in enumerate(part)}
    rest = bytes([len(block)]) + save(tensors)
    return hashlib.sha256(key + rest).digest() + rest


def _decoded(key: bytes, data: bytes) -> Block | None:
    """The block in the bytes of its file. None if they are damaged."""
    digest, rest = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
    if not rest or hashlib.sha256(key + rest).digest() != digest:
        return None
    try:
        tensors = load(rest[1:])
        parts: list[list[torch.Tensor]] = [[] for _ in range(rest[0])]
        for name in sorted(tensors, key=lambda name: tuple(map(int, name.split(".")))):
            parts[int(name.split(".")[0])].append(tensors[name])
    except (SafetensorError, ValueError, IndexError):
        return None
    return tuple(map(tuple, parts))


def _own_folder(root: Path, context: bytes, survives: bool) -> Path:
    """A folder that no other running process has. Removes what processes have left whose prefixes do not survive."""
    _private(root)
    for left in root.glob(f"{PASSING}*"):
        if (lock := _locked(left)) is not None:
            _clear(left)
            lock.release()
    name = f"{'' if survives else PASSING}{hashlib.sha256(context).hexdigest()[:32]}"
    for number in range(MOST_FOLDERS):
        path = root / f"{name}-{number}"
        _private(path)
        if (lock := _locked(path)) is not None:
            _locks.append(lock)
            return path
    raise SetupError(f"prefix_cache.folder: {MOST_FOLDERS} processes keep prefixes of the same kind in {root} already.")


def _locked(folder: Path) -> FileLock | None:
    """The lock of a folder, now held; None if another process holds it."""
    lock = FileLock(folder / "lock", mode=0o600, is_singleton=False, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except (Timeout, OSError):
        return None
    return lock


def _private(folder: Path) -> None:
    """Make the folder if need be. Raises SetupError unless it is a folder that only this user can use."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise SetupError(f"prefix_cache.folder: {folder} cannot be used: {error.strerror}.") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise SetupError(f"prefix_cache.folder: {folder} is not a folder of yours with mode 0700.")


def _blocks_in(folder: Path) -> Iterator[tuple[Path, int]]:
    """The files of blocks and their sizes, the oldest first. What else is there is left alone."""
    with os.scandir(folder) as entries:
        named = [entry for entry in entries if NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)]
    found = [(entry, entry.stat(follow_symlinks=False)) for entry in named]
    for entry, status in sorted(found, key=lambda pair: pair[1].st_mtime_ns):
        yield Path(entry.path), status.st_size


def _clear(folder: Path) -> None:
    for path in (*(path for path, _ in _blocks_in(folder)), *folder.glob(f"{DRAFT}*")):
        path.unlink(missing_ok=True)


def _read(path: Path, size: int) -> bytes | None:
    """The bytes of a plain file of this user alone, of that size. None for anything else."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(handle)
        own = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
        return file.read() if own and found.st_size == size else None


def _write(path: Path, data: bytes) -> None:
    """Write a file of mode 0600 in one step. Raises OSError, and leaves nothing then."""
    draft = path.with_name(f"{DRAFT}{secrets.token_hex(8)}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
