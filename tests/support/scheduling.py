"""Which test process runs which file: the files that take longest begin first, so that no process ends long after the
others.

`tests/data/durations.json` has the seconds of each file, as `pytest --record-durations` measured them. The order needs
them only roughly: they may be old, and from another machine.
"""

import json
from collections import defaultdict

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests.support import ROOT

DURATIONS = ROOT / "tests" / "data" / "durations.json"
# For a file that was not measured yet: early, since a late one could end alone.
UNKNOWN_S = 60.0


def file_of(nodeid: str) -> str:
    """The path of a test's file."""
    return nodeid.partition("::")[0]


class ByFile(LoadScopeScheduling):  # type: ignore[misc]
    """The tests of a file share a process, for their fixtures."""

    def _split_scope(self, nodeid: str) -> str:
        return file_of(nodeid)


class Durations:
    """A pytest plugin that orders files and, asked by `--record-durations`, writes what each took."""

    def __init__(self, record: bool) -> None:
        self._record = record
        self._took_s: dict[str, float] = defaultdict(float)

    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Producer) -> LoadScopeScheduling:
        """The scheduler. xdist would order files by their number of tests."""
        config.option.loadscopereorder = False
        return ByFile(config, log)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Longest files first. Tests of one file keep their order."""
        known = json.loads(DURATIONS.read_text())
        items.sort(key=lambda item: -known.get(file_of(item.nodeid), UNKNOWN_S))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of a test is over."""
        self._took_s[file_of(report.nodeid)] += report.duration

    def pytest_sessionfinish(self) -> None:
        """Bring the table up to date, where that was asked."""
        if self._record:
            took_s = {file: round(seconds, 1) for file, seconds in self._took_s.items()}
            known = {file: s for file, s in json.loads(DURATIONS.read_text()).items() if (ROOT / file).exists()}
            longest_first = sorted((known | took_s).items(), key=lambda entry: -entry[1])
            DURATIONS.write_text(json.dumps(dict(longest_first), indent=2) + "\n")
