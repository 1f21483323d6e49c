"""Tables and progress bars for people, drawn by rich. Text that is not drawn is `terminal.say`'s; see there for rules.

A module of its own since rich takes a tenth of a second to import, which a refused command line does not need.
"""

from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from splitlearn.runtime import terminal

WIDE = 100_000


def console(*, stderr: bool = False) -> Console:
    """A console for tables and bars that interprets no markup; without a terminal, as wide as its content."""
    drawn = terminal.is_terminal(stderr=stderr)
    width = None if drawn else WIDE
    return _Console(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=not drawn, width=width)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Raise for stdout, where rich would end the program with status 1; `guarded` ends it. Ignore stderr."""
        if not self.stderr:
            raise BrokenPipeError


class PlainTable(Table):
    """A table whose cells are other people's text. Long cells fold; none is cut."""

    def __init__(self, *heads: str, **options: Any) -> None:
        super().__init__(**options)
        for head in heads:
            self.add_column(Text(head), overflow="fold")

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        """Add a row of strings, written as they are, or of rich's styled texts."""
        super().add_row(*(Text(_for_stdout(cell)) if isinstance(cell, str) else cell for cell in cells), **options)


def label_column() -> TextColumn:
    """A column with the task's label, not read as markup."""
    return TextColumn("{task.description}", markup=False)


def bars_on(shown: Console, *columns: ProgressColumn, **options: Any) -> Progress:
    """Progress bars that do not redirect stdout."""
    return Progress(*columns, console=shown, redirect_stdout=False, **options)


def bars() -> Progress:
    """Bars on stderr with share and remaining time."""
    columns = (label_column(), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return bars_on(console(stderr=True), *columns)


def _for_stdout(text: str) -> str:
    return terminal.visible(text) if terminal.is_terminal() else text
