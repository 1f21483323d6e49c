"""How far a long preparation has come: one record, and one way to show it.

Code that takes long calls a `Progress` with a `Step` as often as it likes; `on_console()` gives one that draws a bar on
a terminal and writes one plain line for each new label elsewhere. Both write to stderr, so stdout stays for results.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


@dataclass(frozen=True)
class Step:
    """`done` of `total` units of the work called `label`; `total` is None where it is not known."""

    label: str
    done: float = 0
    total: float | None = None


Progress = Callable[[Step], None]


def silent(step: Step) -> None:
    """Shows nothing."""


@contextmanager
def on_console() -> Iterator[Progress]:
    """A `Progress` that shows its steps on stderr for as long as the context is open."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with RichProgress(*columns, console=console) as bars:
        yield _bars(bars)


def _plain(console: Console) -> Progress:
    """One line for each label, when it first comes up."""
    seen: set[str] = set()

    def show(step: Step) -> None:
        if step.label not in seen:
            seen.add(step.label)
            console.print(step.label, highlight=False, soft_wrap=True)

    return show


def _bars(bars: RichProgress) -> Progress:
    """One bar for each label."""
    tasks = {}

    def show(step: Step) -> None:
        if step.label not in tasks:
            tasks[step.label] = bars.add_task(step.label, total=step.total)
        bars.update(tasks[step.label], completed=step.done, total=step.total)

    return show
