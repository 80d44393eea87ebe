"""Tables for the terminal, which also line up in a log."""

import unicodedata
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

MISSING = "-"


def printable(text: object) -> str:
    """What someone else wrote, without what a terminal would obey: control characters are replaced, spaces kept."""
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf") and c not in "\n\t" else c for c in str(text))


def plain_table(first: str, columns: Sequence[str]) -> Table:
    """Returns an empty table in Markdown's syntax.

    Args:
      first: header of the first column, which holds names.
      columns: headers of the others, which hold numbers.
    """
    table = Table(box=box.MARKDOWN, header_style="")
    table.add_column(Text(first), no_wrap=True)
    for column in columns:
        table.add_column(Text(column), justify="right", no_wrap=True)
    return table


def show(table: Table, console: Console | None = None) -> None:
    """Prints a table at its full width, so that a log of 80 columns neither folds nor cuts it."""
    console = console or Console()
    table.width = console.measure(table, options=console.options.update(width=10_000)).maximum
    console.print(table, crop=False)
