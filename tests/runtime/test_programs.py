"""Children of this program are told where its packages are, and this process's own environment stays as it was."""

import os
from threading import Event, Thread

from splitlearn.runtime import programs


def test_threads_that_start_children_at_once_leave_the_environment_as_it_was() -> None:
    before = dict(os.environ)
    inside, leave = Event(), Event()

    def start() -> None:
        with programs.as_parent():
            inside.set()
            leave.wait()

    other = Thread(target=start)
    with programs.as_parent():
        assert os.environ["PYTHONSAFEPATH"] == "1"
        other.start()
        inside.wait(0.2)  # gives the other its chance to come in between
    leave.set()
    other.join()
    assert dict(os.environ) == before
