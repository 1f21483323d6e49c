"""An experiment's file: what was said to be stored is there, whatever happens to the program, the disk or the file."""

import contextlib
import os
import random
import resource
import shutil
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from splitlearn.errors import InputError, SetupError, SplitlearnError, WorkerDied
from splitlearn.flags.selection import FlagSet
from splitlearn.lab.design import plan
from splitlearn.lab.records import Setup, Trial
from splitlearn.lab.store import APPLICATION_ID, VERSION, Store
from splitlearn.runtime import process

FLAGS = FlagSet(*[frozenset({"use_cache", "inference_mode"})] * 3)
SETUP = Setup(
    design="without",
    plan=plan("without", FLAGS, ["use_cache"]),
    flags=FLAGS,
    prompts=("Why is the sky blue?", "Größe, 大きさ"),
    max_new_tokens=64,
    delta=0.02,
    pairs=None,
    max_pairs=100,
    minutes=30.0,
    seed=7,
    model="tiny",
    command="python -m splitlearn lab",
    environment={"torch": "2.13.0", "trunk": {"threads": 2}, "governor": None},
)
SMALL = "size=256k"
KILLS = 6


def trial(block: int, attempt: int = 0, arm: str = "baseline, full", bad: str = "") -> Trial:
    """A run with figures of its own."""
    spread = random.Random(f"{block} {attempt} {arm}")
    return Trial(
        block=block,
        attempt=attempt,
        order=0,
        arm=arm,
        at_s=1.7e9 + block,
        block_runs=1,
        prefills_s=(spread.random(),),
        ttft_s=spread.random(),
        tpot_s=spread.random(),
        itl_s=tuple(spread.random() for _ in range(63)),
        token_ids=tuple(spread.randrange(50_000) for _ in range(64)),
        ledger={"tokenise": spread.random(), "unattributed": 1e-9},
        decode_ledger={"model": spread.random()},
        load_s=1.5,
        compile_s=0.0,
        added_bytes=10**9,
        peak_bytes=10**9,
        others_cpu=0.0,
        disturbance="",
        dtype="float32",
        threads=2,
        bytes_up=0,
        bytes_down=0,
        bad=bad,
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a folder" / "of its own #1?" / "experiment.sqlite"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of the test's own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or not shutil.which("mount") or _mount(SMALL, folder):
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def _mount(options: str, folder: Path) -> int:
    return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode


def add_until_it_fails(store: Store) -> tuple[int, SplitlearnError]:
    """How many runs were stored, and what the next one met."""
    for block in range(10_000):
        try:
            store.add(trial(block))
        except SplitlearnError as error:
            return block, error
    raise AssertionError("the disk is larger than this test thinks")


def add_for_ever(connection: Connection, path: str) -> None:
    """What a program does that is killed: go on where the file ends, and say of each run that it is stored."""
    with Store.open(Path(path), write=True) as store:
        block = len(store.trials())
        while True:
            store.add(trial(block))
            connection.send(block)
            block += 1


def create_for_ever(connection: Connection, folder: str) -> None:
    for number in range(100_000):
        Store.create(Path(folder) / f"{number}.sqlite", SETUP).close()
        connection.send(number)


def add_with_little_room(connection: Connection, path: str, bytes_at_most: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_at_most, bytes_at_most))
    with Store.open(Path(path), write=True) as store:
        stored, error = add_until_it_fails(store)
    connection.send((stored, type(error).__name__, str(error)))
    connection.recv()


def kill_at_a_random_moment(child: process.Child, spread: random.Random) -> int:
    """Let it work for some milliseconds, kill it with SIGKILL; the last that it said."""
    last = int(child.receive())
    threading.Timer(spread.uniform(0.0, 0.08), child.process.kill).start()
    try:
        while True:
            last = child.receive()
    except WorkerDied:
        return last
    finally:
        child.stop()


def test_what_was_stored_is_read_back_as_it_was(path: Path) -> None:
    runs = [trial(0), trial(0, arm="baseline again, full"), trial(0, attempt=1, bad="compiled"), trial(1)]
    with Store.create(path, SETUP) as store:
        for run in runs:
            store.add(run)
        store.note("warm-up", {"baseline, full": 3})
        store.note("warm-up", {"baseline, full": 4})
        store.note("observer", [0.004, None, "fine"])
        assert store.setup == SETUP and store.trials() == runs
    with Store.open(path) as read:
        assert read.setup == SETUP
        assert read.trials() == runs
        assert read.notes() == {"warm-up": {"baseline, full": 4}, "observer": [0.004, None, "fine"]}
        assert read.finished is None


def test_runs_keep_the_order_in_which_they_were_run(path: Path) -> None:
    runs = [trial(2), trial(0), trial(1, arm="z"), trial(1, arm="a")]
    with Store.create(path, SETUP) as store:
        for run in runs:
            store.add(run)
        assert store.trials() == runs


def test_no_run_is_kept_twice(path: Path) -> None:
    with Store.create(path, SETUP) as store:
        store.add(trial(3))
        with pytest.raises(InputError, match="block 3, attempt 0, baseline, full"):
            store.add(trial(3))
        store.add(trial(3, attempt=1))
        assert [(run.block, run.attempt) for run in store.trials()] == [(3, 0), (3, 1)]


def test_a_discarded_block_keeps_its_runs_and_says_why_they_do_not_count(path: Path) -> None:
    with Store.create(path, SETUP) as store:
        for run in (trial(0), trial(0, arm="b", bad="compiled"), trial(0, attempt=1), trial(1)):
            store.add(run)
        store.discard(0, 0, "other programs took 0.4 cores")
        store.discard(0, 0, "something else")
        store.add(trial(0, arm="c"))
        bad = [run.bad for run in store.trials()]
        assert bad == ["other programs took 0.4 cores", "compiled", "", "", "other programs took 0.4 cores"]
        with pytest.raises(InputError, match="reason"):
            store.discard(1, 0, "")


def test_an_ending_counts_until_another_run_is_added(path: Path) -> None:
    with Store.create(path, SETUP) as store:
        said = [store.finished]
        for reason in ("stopped", "cancelled"):
            store.finish(reason)
            said.append(store.finished)
        store.add(trial(0))
        said.append(store.finished)
        assert said == [None, "stopped", "cancelled", None]
        store.finish("every verdict is decided")
    with Store.open(path) as read:
        assert read.finished == "every verdict is decided"


def test_a_closed_experiment_is_one_file_that_can_be_copied(path: Path) -> None:
    with Store.create(path, SETUP) as store:
        store.add(trial(0))
        store.close()
    assert {other.name for other in path.parent.iterdir()} == {path.name, f"{path.name}.lock"}
    other = path.with_name("copy.sqlite")
    shutil.copy(path, other)
    with Store.open(other) as read:
        assert read.trials() == [trial(0)]


def test_it_can_be_read_while_it_is_written(path: Path) -> None:
    with Store.create(path, SETUP) as store, Store.open(path) as read:
        for block in range(5):
            store.add(trial(block))
            assert [run.block for run in read.trials()] == list(range(block + 1))
        started = time.monotonic()
        store.close()
        assert time.monotonic() - started < 1.0, "closing waited for a reader"
    with Store.open(path) as again:
        assert len(again.trials()) == 5


def test_a_slow_reader_does_not_hold_up_the_writer(path: Path) -> None:
    with Store.create(path, SETUP) as store, contextlib.closing(sqlite3.connect(path)) as slow:
        slow.execute("BEGIN")
        assert slow.execute("SELECT count(*) FROM trials").fetchone() == (0,)
        started = time.monotonic()
        store.add(trial(0))
        assert time.monotonic() - started < 1.0
        assert slow.execute("SELECT count(*) FROM trials").fetchone() == (0,)
        slow.rollback()


def test_a_reader_cannot_write(path: Path) -> None:
    Store.create(path, SETUP).close()
    with Store.open(path) as read, pytest.raises(SetupError, match="readonly"):
        read.add(trial(0))


def test_several_threads_may_write(path: Path) -> None:
    with Store.create(path, SETUP) as store, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda block: store.add(trial(block)), range(40)))
        assert sorted(run.block for run in store.trials()) == list(range(40))


def test_only_one_program_writes(path: Path) -> None:
    with Store.create(path, SETUP) as store:
        with pytest.raises(SetupError, match="Another program is running the experiment"):
            Store.open(path, write=True)
        with pytest.raises(SetupError, match="Another program is running the experiment"):
            Store.create(path, SETUP)
        store.add(trial(0))
    with Store.open(path, write=True) as store:
        assert store.trials() == [trial(0)]


def test_only_one_program_writes_also_when_it_is_another_process(path: Path) -> None:
    Store.create(path, SETUP).close()
    child = process.start("The writer", add_for_ever, str(path))
    try:
        child.receive()
        with pytest.raises(SetupError, match="Another program is running the experiment"):
            Store.open(path, write=True)
        with Store.open(path) as read:
            assert read.trials()
    finally:
        child.stop()
    Store.open(path, write=True).close()


def test_an_experiment_that_is_there_is_not_overwritten(path: Path) -> None:
    with Store.create(path, SETUP) as store:
        store.add(trial(0))
    with pytest.raises(InputError, match="--resume"):
        Store.create(path, SETUP)
    with Store.open(path) as read:
        assert read.trials() == [trial(0)]


def test_killed_at_any_moment_it_loses_nothing_and_keeps_nothing_twice(path: Path) -> None:
    Store.create(path, SETUP).close()
    spread = random.Random(0)
    stored = 0
    for _ in range(KILLS):
        said = kill_at_a_random_moment(process.start("The writer", add_for_ever, str(path)), spread)
        with Store.open(path) as read:
            runs = read.trials()
        assert runs == [trial(block) for block in range(len(runs))]
        # What was on the disk when the kill came may not have been said yet.
        assert len(runs) in (said + 1, said + 2) and len(runs) > stored
        stored = len(runs)
    with Store.open(path, write=True) as store:
        assert [run.block for run in store.trials()] == list(range(stored))
        store.finish("done")


def test_killed_while_it_is_created_there_is_a_whole_experiment_or_none(tmp_path: Path) -> None:
    spread = random.Random(1)
    for number in range(KILLS):
        folder = tmp_path / str(number)
        last = kill_at_a_random_moment(process.start("The writer", create_for_ever, str(folder)), spread)
        files = sorted(folder.glob("*.sqlite"))
        assert len(files) > last
        for file in files:
            with Store.open(file) as read:
                assert read.setup == SETUP
        Store.create(folder / f"{len(files)}.sqlite", SETUP).close()


def test_a_full_disk_loses_nothing_and_the_experiment_goes_on_when_there_is_room(disk: Path) -> None:
    path = disk / "experiment.sqlite"
    with Store.create(path, SETUP) as store:
        stored, error = add_until_it_fails(store)
        assert isinstance(error, SetupError) and "the disk is full" in str(error) and "--resume" in str(error)
        assert stored > 10 and store.trials() == [trial(block) for block in range(stored)]
        _mount("remount,size=4m", disk)
        store.add(trial(stored))
    with Store.open(path, write=True) as store:
        assert store.trials() == [trial(block) for block in range(stored + 1)]


def test_what_was_stored_before_the_disk_was_full_is_found_by_the_next_program(disk: Path) -> None:
    path = disk / "experiment.sqlite"
    with Store.create(path, SETUP) as store:
        stored, _ = add_until_it_fails(store)
    with Store.open(path) as read:
        assert read.trials() == [trial(block) for block in range(stored)]


def test_a_disk_without_room_for_a_new_experiment_is_a_clear_error(disk: Path) -> None:
    (disk / "ballast").write_bytes(bytes(252 * 1024))
    with pytest.raises(SetupError, match="the disk is full"):
        Store.create(disk / "experiment.sqlite", SETUP)
    (disk / "ballast").unlink()
    Store.create(disk / "experiment.sqlite", SETUP).close()


def test_a_read_only_disk_can_be_read_and_says_why_it_is_not_written(disk: Path) -> None:
    path = disk / "experiment.sqlite"
    with Store.create(path, SETUP) as store:
        store.add(trial(0))
    _mount("remount,ro", disk)
    with Store.open(path) as read:
        assert read.trials() == [trial(0)]
    with pytest.raises(SetupError, match="Read-only file system"):
        Store.open(path, write=True)
    with pytest.raises(SetupError, match="Read-only file system"):
        Store.create(disk / "other.sqlite", SETUP)


def test_a_write_that_the_system_refuses_loses_nothing(path: Path) -> None:
    Store.create(path, SETUP).close()
    child = process.start("The writer", add_with_little_room, str(path), 200_000)
    stored, kind, said = child.receive()
    child.stop()
    assert kind == "SetupError" and "the disk is full" in said
    with Store.open(path, write=True) as store:
        assert stored > 10 and store.trials() == [trial(block) for block in range(stored)]
        store.add(trial(stored))


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match=r"file/sub/experiment\.sqlite.*(Not a directory|File exists)"):
        Store.create(tmp_path / "file" / "sub" / "experiment.sqlite", SETUP)


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("content", [b"", b"no database at all" * 500], ids=["empty", "text"])
def test_a_file_that_is_no_experiment_is_refused_and_left_alone(tmp_path: Path, content: bytes, write: bool) -> None:
    file = tmp_path / "experiment.sqlite"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"experiment\.sqlite"):
        Store.open(file, write)
    assert file.read_bytes() == content


def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "other.sqlite") as other:
        other.execute("CREATE TABLE setup (json TEXT)")
    other.close()
    with pytest.raises(InputError, match="something else"):
        Store.open(tmp_path / "other.sqlite", write=True)


@pytest.mark.parametrize("write", [False, True])
def test_a_file_that_is_missing_is_named_and_not_made(tmp_path: Path, write: bool) -> None:
    with pytest.raises(InputError, match="no such file"):
        Store.open(tmp_path / "missing.sqlite", write)
    with pytest.raises(InputError, match="no such file"):
        Store.open(tmp_path, write)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [False, True])
def test_a_file_of_another_version_says_which_and_what_to_do(path: Path, write: bool) -> None:
    Store.create(path, SETUP).close()
    _execute(path, f"PRAGMA user_version = {VERSION + 1}")
    with pytest.raises(InputError, match=rf"of version {VERSION}, .* of version {VERSION + 1}: open it with"):
        Store.open(path, write)


def test_the_file_tells_what_it_is(path: Path) -> None:
    Store.create(path, SETUP).close()
    assert _execute(path, "PRAGMA application_id") == APPLICATION_ID
    assert _execute(path, "PRAGMA user_version") == VERSION


@pytest.mark.parametrize("damage", ["cut off", "overwritten"])
def test_a_damaged_file_is_a_clear_error(path: Path, damage: str) -> None:
    with Store.create(path, SETUP) as store:
        for block in range(50):
            store.add(trial(block))
    size = path.stat().st_size
    if damage == "cut off":
        os.truncate(path, size // 2)
    else:
        with path.open("r+b") as file:
            file.seek(size // 2)
            file.write(b"\xff" * 8192)
    for write in (False, True):
        with pytest.raises(InputError, match="damaged"):
            Store.open(path, write)
    assert damage == "overwritten" or path.stat().st_size == size // 2


@pytest.mark.parametrize("change", ["UPDATE setup SET json = '{}'", "DELETE FROM setup", "UPDATE setup SET json = '{'"])
def test_a_setup_that_is_not_what_was_written_is_a_clear_error(path: Path, change: str) -> None:
    Store.create(path, SETUP).close()
    _execute(path, change)
    with pytest.raises(InputError, match="damaged"):
        Store.open(path)


def test_a_run_that_is_not_what_was_written_is_a_clear_error(path: Path) -> None:
    with Store.create(path, SETUP) as store:
        store.add(trial(0))
    _execute(path, "UPDATE trials SET json = '{}'")
    with Store.open(path) as read, pytest.raises(InputError, match="damaged"):
        read.trials()


def test_a_refused_file_can_be_opened_after_it_was_mended(path: Path) -> None:
    Store.create(path, SETUP).close()
    _execute(path, f"PRAGMA user_version = {VERSION + 1}")
    with pytest.raises(InputError):
        Store.open(path, write=True)
    _execute(path, f"PRAGMA user_version = {VERSION}")
    Store.open(path, write=True).close()


def _execute(path: Path, statement: str) -> object:
    """Change a file behind the store's back; the first value that the statement gives."""
    connection = sqlite3.connect(path)
    try:
        row = connection.execute(statement).fetchone()
        connection.commit()
    finally:
        connection.close()
    return row[0] if row else None
