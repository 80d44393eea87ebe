"""Tables for the terminal, which also line up in a log."""

import math
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


def scaled(value: float, unit: str, base: int = 1000) -> str:
    """A quantity with the prefix that suits it: "1.05 TB" in powers of 1000, "15.75 GiB" in those of 1024."""
    prefixes = {-3: "n", -2: "u", -1: "m", 0: "", 1: "k", 2: "M", 3: "G", 4: "T", 5: "P"}
    power = math.floor(math.log(value, base) + 1e-9) if value else 0
    power = min(max(power, -3 if base == 1000 else 0), 5)
    number = value / base**power
    decimals = 2 if base == 1024 or number < 10 else 1 if number < 100 else 0
    prefix = prefixes[power].upper() + "i" if base == 1024 and power else prefixes[power]
    return f"{number:,.{decimals}f} {prefix}{unit}"


def show(table: Table, console: Console | None = None) -> None:
    """Prints a table at its full width, so that a log of 80 columns neither folds nor cuts it."""
    console = console or Console()
    table.width = console.measure(table, options=console.options.update(width=10_000)).maximum
    console.print(table, crop=False)
