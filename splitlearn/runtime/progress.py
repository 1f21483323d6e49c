"""Progress of long preparations: one record, one way to show it, and a way to read it from other libraries.

Slow code calls a `Progress` with a `Step` as often as it likes. `on_console()` gives one that draws a bar on a
terminal, and elsewhere writes one plain line for each new label. Both write to stderr; stdout is for results.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from splitlearn.runtime import terminal

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


@dataclass(frozen=True)
class Step:
    """`done` of `total` units of the work called `label`; `total` is None where it is not known."""

    label: str
    done: float = 0
    total: float | None = None


Progress = Callable[[Step], None]


def silent(step: Step) -> None:
    """A `Progress` that shows nothing."""


@contextmanager
def on_console() -> Iterator[Progress]:
    """A `Progress` that shows its steps on stderr for as long as the context is open."""
    if not terminal.is_terminal(stderr=True):
        yield _plain()
        return
    from splitlearn.runtime import console  # slow to import: only where bars are drawn

    with console.bars() as bars:
        yield _bars(bars)


def _plain() -> Progress:
    """Write each label once, when it first appears."""
    seen: set[str] = set()

    def show(step: Step) -> None:
        if step.label not in seen:
            seen.add(step.label)
            terminal.say(step.label, stderr=True)

    return show


def _bars(bars: "RichProgress") -> Progress:
    """Draw one bar for each label; a new label completes the one before it."""
    tasks: dict[str, TaskID] = {}

    def show(step: Step) -> None:
        if step.label not in tasks:
            for task in tasks.values():
                bars.update(task, total=1, completed=1)
            tasks[step.label] = bars.add_task(terminal.visible(step.label), total=step.total)
        bars.update(tasks[step.label], completed=step.done, total=step.total)

    return show


def reporting_tqdm(show: Callable[[Any], None]) -> type[Any]:
    """A tqdm class for libraries that draw their progress with one. It calls `show(bar)` instead of drawing.

    The bar's `desc`, `n`, `total` and `unit` are tqdm's.
    """
    import tqdm.auto  # type: ignore[import-untyped]  # slow to import, for those libraries alone

    class Reporter(tqdm.auto.tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **(kwargs | {"file": io.StringIO()}))  # tqdm writes line ends past `display`

        def display(self, *args: Any, **kwargs: Any) -> None:
            show(self)

    return Reporter
