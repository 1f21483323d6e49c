"""What the page keeps for its visitors: names made here, bounds, and nothing left."""

import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from ui.visitors import MOST_FOLDERS, MOST_SIGNALS, PREFIX, Downloads, LeastRecent, Stops

HASHES = ["/tmp/elsewhere", "../../x", "..", "", "a/b", "x" * 10_000, "nul\0"]


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files of the test's own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def written(downloads: Downloads, visitor: str) -> Path:
    with downloads.fresh(visitor) as folder:
        (folder / "report.html").touch()
    return folder


def test_a_visitor_who_leaves_takes_no_folder_from_under_what_is_written_there() -> None:
    with Downloads() as downloads:
        before = written(downloads, "one")
        with downloads.fresh("one") as folder:
            downloads.forget("one")
            (folder / "report.html").touch()
        assert not before.exists()
        assert (folder / "report.html").exists()


@pytest.mark.parametrize("visitor", HASHES)
def test_no_text_of_a_visitor_is_part_of_a_path(temporary: Path, visitor: str) -> None:
    with Downloads() as downloads:
        folder = written(downloads, visitor)
        assert folder.parent == downloads.folder
        assert folder.is_dir()
        assert not visitor or visitor not in str(folder) or visitor == ".."
        downloads.forget(visitor)
        assert not folder.exists()
    assert not list(temporary.iterdir())


def test_a_visitor_has_one_folder_and_there_are_so_many_at_most() -> None:
    with Downloads() as downloads:
        folders = [written(downloads, "one") for _ in range(3)]
        assert [folder.exists() for folder in folders] == [False, False, True]
        for at in range(MOST_FOLDERS * 3):
            written(downloads, f"visitor {at}")
        assert len(list(downloads.folder.iterdir())) == MOST_FOLDERS


def test_what_a_killed_run_left_goes_with_the_next_start_and_a_living_ones_stays(temporary: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        made = round(psutil.Process(other.pid).create_time())
        with Downloads() as mine:
            living = temporary / f"{PREFIX}{other.pid}-{made}-abc"
            reused = temporary / f"{PREFIX}{other.pid}-{made - 1000}-abc"
            others = [temporary / name for name in (f"{PREFIX}notes", "splitlearn-abc", f"{PREFIX}1")]
            for folder in (living, reused, *others):
                folder.mkdir()
            with Downloads():
                assert living.exists()
                assert not reused.exists()
            other.communicate(b"\n")
            with Downloads():
                assert not living.exists()
            assert all(folder.exists() for folder in (mine.folder, *others))


def test_a_link_with_such_a_name_is_left_alone(temporary: Path) -> None:
    kept = temporary / "kept"
    kept.mkdir()
    link = temporary / f"{PREFIX}1-1-abc"
    link.symlink_to(kept)
    with Downloads():
        assert kept.exists()


def test_a_run_is_stopped_by_its_visitor_however_many_others_came() -> None:
    stops = Stops()
    stops.begin("ada")
    signal = stops.signal("ada")  # which the run holds
    for at in range(MOST_SIGNALS * 4):
        stops.begin(f"other {at}")
        stops.stop(f"left {at}")
    assert not signal.is_set()
    stops.stop("ada")
    assert signal.is_set()
    stops.begin("ada")
    assert not signal.is_set()


def test_signals_of_visitors_who_come_and_go_are_not_kept() -> None:
    stops = Stops()
    for at in range(MOST_SIGNALS * 4):
        stops.stop(f"{at}")
    assert len(stops._signals) == MOST_SIGNALS


def test_a_run_that_waits_is_stopped_when_its_page_is_closed() -> None:
    stops = Stops()
    stops.begin("ada")
    stops.stop("ada")  # what a page that is closed does
    assert stops.signal("ada").is_set()


def test_the_least_recently_used_goes_first() -> None:
    gone: list[int] = []
    table = LeastRecent[int](2, gone.append)
    table.put("a", 1)
    table.put("b", 2)
    assert table.get("a") == 1
    table.put("c", 3)
    table.put("a", 4)
    assert gone == [2, 1]
