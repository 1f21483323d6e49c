"""A sandbox's child is bounded and replaced, and what it did to itself meets no later request."""

import os
import signal
import sys
import threading
from collections.abc import Iterator

import psutil
import pytest

from splitlearn.runtime import sandbox
from splitlearn.runtime.sandbox import Sandbox, SandboxError
from tests.support.children import output_of
from tests.support.trunk import eventually, gone

CPU_S, PATIENCE_S = 60.0, 60.0
FORKS = """
import os
from splitlearn.runtime.sandbox import Sandbox

echo = Sandbox("tests.support.echo_program")
pid = lambda: echo.ask({"do": "echo"}, 60.0)["pid"]
first = pid()
if not os.fork():
    print(pid(), flush=True)
    echo.close()
    os._exit(0)
os.wait()
print(first, pid())
"""
"""A process of its own forks: that of the tests has threads, and memory for which there may be no second time."""


@pytest.fixture
def echo() -> Iterator[Sandbox]:
    """Children that do what tests/support/echo_program.py says."""
    made = Sandbox("tests.support.echo_program", most=2)
    yield made
    made.close()


def pid(echo: Sandbox) -> int:
    found: int = echo.ask({"do": "echo"}, CPU_S)["pid"]
    return found


def test_one_child_answers_all_and_is_there_before_the_first_request(echo: Sandbox) -> None:
    before = set(psutil.Process().children())
    echo.prepare()
    (child,) = {*psutil.Process().children()} - before
    assert {pid(echo) for _ in range(20)} == {child.pid}
    assert echo.ask({"do": "echo", "text": "caf\ud800é" * 10**6}, CPU_S)["text"] == "caf\ud800é" * 10**6


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("loop", "more than 0.2 s of CPU time"),
        ("multiply", "more than 0.2 s of CPU time"),
        ("crash", "exit status -11"),
    ],
)
def test_a_request_without_end_ends_its_child_and_the_next_gets_another(echo: Sandbox, what: str, says: str) -> None:
    first = pid(echo)
    with pytest.raises(SandboxError, match=says):
        echo.ask({"do": what}, 0.2)
    assert gone(first) and pid(echo) != first


def test_a_child_that_stands_still_is_ended_by_the_clock(echo: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pid(echo)
    os.kill(first, signal.SIGSTOP)
    monkeypatch.setattr(sandbox, "WALL_S", 0.2)
    with pytest.raises(SandboxError, match=r"more than 0\.2 s$"):
        echo.ask({"do": "echo", "text": "x" * 10**7}, CPU_S)
    assert gone(first)


@pytest.mark.parametrize(("what", "failed"), [("hoard", "more than 256 MiB of memory"), ("keep", "")])
def test_a_child_that_took_much_memory_answers_no_further_request(echo: Sandbox, what: str, failed: str) -> None:
    first = pid(echo)
    assert failed in echo.ask({"do": what}, CPU_S).get("failed", "")
    assert pid(echo) != first


def test_others_go_on_while_a_request_is_slow(echo: Sandbox) -> None:
    slow = threading.Thread(target=lambda: pytest.raises(SandboxError, echo.ask, {"do": "loop"}, 1.0))
    slow.start()
    count = 0
    while slow.is_alive():
        pid(echo)
        count += 1
    assert count > 1


def test_a_fork_of_this_process_has_children_of_its_own() -> None:
    forked, first, again = map(int, output_of([sys.executable, "-c", FORKS]).split())
    assert forked != first == again
    assert eventually(lambda: gone(forked) and gone(first), PATIENCE_S)
