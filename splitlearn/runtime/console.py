"""Tables and progress bars for people, drawn by rich. Text that is not drawn is `terminal.say`'s; see there for rules.

A module of its own since rich takes a tenth of a second to import, which a refused command line does not need.
"""

from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from splitlearn.runtime import terminal

WIDE = 100_000
ROOM = 8


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
    """A table whose cells are other people's text. Long cells fold; none is cut.

    The first column has names to be typed: it folds only where that would leave the others less than ROOM each.
    """

    def __init__(self, *heads: str, **options: Any) -> None:
        super().__init__(**options)
        for head in heads:
            self.add_column(_for_stdout(head), overflow="fold")

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        """Add a row of strings, or of texts that have one style each. Raises TypeError for anything else."""
        super().add_row(*map(_for_stdout, cells), **options)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the table as wide as `options` allow."""
        first, *others = self.columns
        whole = max((cell.cell_len for cell in first.cells if isinstance(cell, Text)), default=0)
        frame = 3 * len(self.columns) + 1
        first.no_wrap = options.max_width - frame - whole >= ROOM * len(others)
        return super().__rich_console__(console, options)


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


def _for_stdout(cell: RenderableType | None) -> Text:
    """The text of a cell, with its style; on a terminal with pictures in the place of control characters."""
    if not isinstance(cell, str | Text):
        raise TypeError(f"a cell is a string or a Text, not {type(cell).__name__}")
    plain, style = (cell, "") if isinstance(cell, str) else (cell.plain, cell.style)
    return Text(terminal.visible(plain) if terminal.is_terminal() else plain, style)
