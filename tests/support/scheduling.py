"""Orders the test files for the test processes: the longest begin first, so that no process ends long after the others.

`tests/data/durations.json` has the seconds of each file, measured by `pytest --record-durations`. Rough values suffice:
they may be old, and from another machine.
"""

import json
from collections import defaultdict

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests.support import ROOT

DURATIONS = ROOT / "tests" / "data" / "durations.json"
# Assumed for a file that was not measured yet. Long, since a late start could leave it running alone at the end.
UNKNOWN_S = 60.0


def file_of(nodeid: str) -> str:
    """The path of a test's file."""
    return nodeid.partition("::")[0]


class ByFile(LoadScopeScheduling):  # type: ignore[misc]
    """Keeps the tests of a file in one process, for their fixtures."""

    def _split_scope(self, nodeid: str) -> str:
        return file_of(nodeid)


class Durations:
    """A pytest plugin that orders files. With `--record-durations` it writes the seconds of each."""

    def __init__(self, record: bool) -> None:
        self._record = record
        self._took_s: dict[str, float] = defaultdict(float)

    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Producer) -> LoadScopeScheduling:
        """Use `ByFile`, without xdist's order by number of tests."""
        config.option.loadscopereorder = False
        return ByFile(config, log)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Sort the longest files first. Tests of one file keep their order."""
        known = json.loads(DURATIONS.read_text())
        items.sort(key=lambda item: -known.get(file_of(item.nodeid), UNKNOWN_S))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add the time of one phase of a test."""
        self._took_s[file_of(report.nodeid)] += report.duration

    def pytest_sessionfinish(self) -> None:
        """Update the table if `--record-durations` was given."""
        if self._record:
            took_s = {file: round(seconds, 1) for file, seconds in self._took_s.items()}
            known = {file: s for file, s in json.loads(DURATIONS.read_text()).items() if (ROOT / file).exists()}
            longest_first = sorted((known | took_s).items(), key=lambda entry: -entry[1])
            DURATIONS.write_text(json.dumps(dict(longest_first), indent=2) + "\n")
