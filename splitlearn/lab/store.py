"""An experiment in one SQLite file, which survives a kill at any moment and can be resumed.

    with Store.create(path, setup) as store:         # or Store.open(path, write=True) to resume one
        store.add(trial)                             # on the disk when it returns

One program writes at a time; any number may read meanwhile (`Store.open(path)`). A writer keeps three files beside it:
`.lock`, whose lock dies with its process, and SQLite's own `-wal` and `-shm`, which belong to the data until the writer
closes. Several threads may use one Store.

Raises InputError for an unusable file, and SetupError if the disk or another program is in the way. Earlier data stays.
"""

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from splitlearn.errors import InputError, SetupError, SplitlearnError
from splitlearn.lab.records import Setup, Trial

# An experiment is kept in FILE, in a folder of its own below FOLDER.
FILE, FOLDER = "experiment.sqlite", "lab"
VERSION = 3
APPLICATION_ID = 0x53504C42  # "SPLB": marks an experiment among SQLite files
FIELD = "experiment file"
# A discarded run keeps its figures. An ending counts until another run is added; `trials` is the number of runs then.
_SCHEMA = """
CREATE TABLE setup (json TEXT NOT NULL);
CREATE TABLE trials (id INTEGER PRIMARY KEY, block INTEGER NOT NULL, attempt INTEGER NOT NULL, arm TEXT NOT NULL,
                     json TEXT NOT NULL, UNIQUE (block, attempt, arm));
CREATE TABLE discarded (block INTEGER NOT NULL, attempt INTEGER NOT NULL, why TEXT NOT NULL,
                        PRIMARY KEY (block, attempt));
CREATE TABLE notes (key TEXT PRIMARY KEY, json TEXT NOT NULL);
CREATE TABLE endings (trials INTEGER PRIMARY KEY, reason TEXT NOT NULL);
"""
_FULL = {sqlite3.SQLITE_FULL: "the disk is full", sqlite3.SQLITE_IOERR: "the disk is full or does not work"}
_DAMAGED = {sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT}


class Store:
    """The experiment at `path`; use `create` or `open`. `setup` has its settings."""

    def __init__(self, path: Path, lock: BaseFileLock | None) -> None:
        self.path = path
        self._lock = lock
        with _clear_errors(path):
            self._connection = _connect(path, "rw")
        try:
            with _clear_errors(path):
                # A reader, too, may have to recover after a kill, if the disk is writable.
                self._connection.execute(f"PRAGMA query_only = {lock is None}")
                _check(path, self._connection)
                self.setup = _setup(path, self._connection)
                if lock is not None:
                    # Readers do not wait for the writer, nor it for them. FULL: a loss of power costs nothing either.
                    self._connection.execute("PRAGMA journal_mode = WAL")
                    self._connection.execute("PRAGMA synchronous = FULL")
        except BaseException:
            self._connection.close()
            raise

    @classmethod
    def create(cls, path: Path, setup: Setup) -> "Store":
        """Begin an experiment in a new file, open for writing. Makes the folders above it."""
        with _clear_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
        try:
            if path.exists():
                expected = "a file that is not there yet (to go on with the experiment in it, give it to --resume)"
                raise InputError(FIELD, str(path), expected)
            with _clear_errors(path):
                _write_new(path, setup)
            return cls(path, lock)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def open(cls, path: Path, write: bool = False) -> "Store":
        """Open an experiment to read it, even while another program writes, or to resume it."""
        if not path.is_file():
            raise InputError(FIELD, str(path), "the file of an experiment that was begun; there is no such file")
        if not write:
            return cls(path, None)
        lock = _lock(path)
        try:
            return cls(path, lock)
        except BaseException:
            lock.release()
            raise

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. A writer then removes the files beside it, unless another program reads."""
        if self._lock is not None and self._lock.is_locked:
            # If that fails (a reader, a full disk), the -wal file stays and nothing is lost.
            with contextlib.suppress(sqlite3.OperationalError):
                self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                self._connection.execute("PRAGMA journal_mode = DELETE")
        self._connection.close()
        if self._lock is not None:
            self._lock.release()

    def add(self, trial: Trial) -> None:
        """Store a run; it is on the disk when this returns. Raises InputError if it is stored already."""
        place = (trial.block, trial.attempt, trial.arm)
        statement = "INSERT INTO trials (block, attempt, arm, json) VALUES (?, ?, ?, ?)"
        try:
            self._write(statement, *place, json.dumps(trial.as_json()))
        except sqlite3.IntegrityError:
            run = f"block {trial.block}, attempt {trial.attempt}, {trial.arm}"
            raise InputError("trial", run, "a run that is not stored yet") from None

    def trials(self) -> list[Trial]:
        """Every run, in the order of storing. `bad` also has why a block was discarded."""
        statement = "SELECT json, why FROM trials LEFT JOIN discarded USING (block, attempt) ORDER BY id"
        with _clear_errors(self.path), _readable(self.path):
            rows = self._connection.execute(statement).fetchall()
            found = [(Trial.from_json(json.loads(text)), why) for text, why in rows]
        return [replace(trial, bad=trial.bad or why or "") for trial, why in found]

    def discard(self, block: int, attempt: int, why: str) -> None:
        """Mark all runs of a block's attempt as bad, later ones too. The first reason stays."""
        if not why:
            raise InputError("why", why, "the reason why the block does not count")
        self._write("INSERT OR IGNORE INTO discarded VALUES (?, ?, ?)", block, attempt, why)

    def note(self, key: str, value: Any) -> None:
        """Store a JSON value under `key`, in place of an earlier one."""
        self._write("INSERT OR REPLACE INTO notes VALUES (?, ?)", key, json.dumps(value))

    def notes(self) -> dict[str, Any]:
        """All notes."""
        with _clear_errors(self.path), _readable(self.path):
            rows = self._connection.execute("SELECT key, json FROM notes ORDER BY rowid").fetchall()
            return {key: json.loads(text) for key, text in rows}

    def finish(self, reason: str) -> None:
        """Store that the experiment ended, and why. A later run makes it unfinished again."""
        self._write("INSERT OR REPLACE INTO endings SELECT count(*), ? FROM trials", reason)

    @property
    def finished(self) -> str | None:
        """Why the experiment ended, or None if it has not."""
        statement = "SELECT reason FROM endings WHERE trials = (SELECT count(*) FROM trials)"
        with _clear_errors(self.path):
            row = self._connection.execute(statement).fetchone()
        return None if row is None else str(row[0])

    def _write(self, statement: str, *values: object) -> None:
        """Run one statement as one transaction, so that a kill leaves nothing half done."""
        with _clear_errors(self.path):
            self._connection.execute(statement, values)


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"{path.resolve().as_uri()}?mode={mode}"
    return sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)


def _lock(path: Path) -> BaseFileLock:
    """Take the lock for writing `path`; it ends with this process at the latest."""
    lock = FileLock(f"{path}.lock", thread_local=False)
    try:
        with _clear_errors(path):
            lock.acquire(blocking=False)
    except Timeout:
        raise SetupError(
            f"Another program is running the experiment in {path} now. Wait until it ends or stop it, or give this one"
            " another --out; reading it, as report does, is possible meanwhile."
        ) from None
    return lock


def _write_new(path: Path, setup: Setup) -> None:
    """Create the file under another name, then rename it: a kill leaves a whole experiment or none."""
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    try:
        with contextlib.closing(_connect(new, "rwc")) as connection:
            connection.executescript(f"BEGIN; {_SCHEMA}")
            connection.execute("INSERT INTO setup VALUES (?)", (json.dumps(setup.as_json()),))
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {VERSION}")
            connection.execute("COMMIT")
        new.rename(path)
    finally:
        new.unlink(missing_ok=True)


def _check(path: Path, connection: sqlite3.Connection) -> None:
    """Raise InputError unless this is a whole experiment's file of this version."""
    application, version = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
    )
    if application != APPLICATION_ID:
        raise InputError(FIELD, str(path), "a file that `python -m splitlearn lab` wrote; this is something else")
    if version != VERSION:
        raise InputError(
            FIELD,
            str(path),
            f"an experiment of version {VERSION}, and this one is of version {version}: open it with the splitlearn"
            " that wrote it, or begin a new experiment with another --out",
        )
    if connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
        raise _damaged(path)


def _setup(path: Path, connection: sqlite3.Connection) -> Setup:
    with _readable(path):
        return Setup.from_json(json.loads(connection.execute("SELECT json FROM setup").fetchone()[0]))


def _damaged(path: Path) -> InputError:
    expected = (
        "an experiment that is whole, and this one is damaged: take a copy of it, or begin again with another --out"
    )
    return InputError(FIELD, str(path), expected)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn errors of reading stored values into InputError: the file is damaged."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(path) from error


@contextlib.contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    """Turn errors of the operating system and SQLite into those of errors.py."""
    try:
        yield
    except (sqlite3.IntegrityError, sqlite3.ProgrammingError, Timeout):
        raise
    except (sqlite3.Error, OSError) as error:
        raise _clear_error(path, error) from error


def _clear_error(path: Path, error: sqlite3.Error | OSError) -> SplitlearnError:
    code = error.sqlite_errorcode & 0xFF if isinstance(error, sqlite3.Error) else None
    if code in _DAMAGED:
        return _damaged(path)
    why = error.strerror if isinstance(error, OSError) else _FULL.get(code or 0, str(error))
    return SetupError(
        f"The experiment's file {path} cannot be used: {why}. All that was stored in it before is kept: mend this and"
        " go on with --resume, or give another --out."
    )
