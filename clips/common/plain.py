"""Tables of text for a terminal and for Markdown."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from clips.common.escape import for_rich


def print_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """On stdout; the first column is names, the others are figures."""
    table = Table(title=for_rich(title), title_justify="left")
    for index, column in enumerate(head):
        table.add_column(for_rich(column), justify="right" if index else "left")
    for row in rows:
        table.add_row(*map(for_rich, row))
    Console(emoji=False, width=None if sys.stdout.isatty() else 160).print(table)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose cells hold Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
