"""One offline page for every report: blocks of plain data, shown by one template; and tables for a terminal.

A report computes a `Page`. templates/page.html.j2 shows its blocks, and jinja escapes every text that it puts in.
"""

from __future__ import annotations

import base64
import io
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup
from rich import console
from rich import table as rich_table

from clips.common.escape import clip, for_rich, printable

if TYPE_CHECKING:  # matplotlib takes longer to import than a table on a terminal may
    from matplotlib.figure import Figure as Plot
    from PIL.Image import Image


def names_and_numbers(column: int, text: str) -> str:
    """Return the CSS class of a table's cell: names in the first column, numbers in the others."""
    return "n" if column else ""


# ------------------------------------------------------------------------------------------- blocks
@dataclass
class Paragraph:
    """A paragraph of plain text."""

    text: str
    mark: str = ""
    """A word in bold before the text, such as "Verdict"."""


@dataclass
class Bullets:
    """A bulleted list."""

    lines: Sequence[str]
    css: str = ""
    """"big" for findings."""


@dataclass
class Code:
    """Preformatted text."""

    text: str


@dataclass
class Table:
    """Rows of text."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    css_class: Callable[[int, str], str] = names_and_numbers
    """CSS class of a cell or heading, by its column and text."""


@dataclass
class Chart:
    """A plot, and a text of what it shows."""

    plot: Plot
    words: str
    """What the plot shows."""

    @property
    def png(self) -> bytes:
        """The plot as the bytes of a PNG file."""
        return png(self.plot)


@dataclass
class Interval:
    """A difference with its interval, to be drawn against zero; positions are in percent of the axis."""

    name: str
    low: float
    mean: float
    high: float
    css: str
    """"win", "tie" or "loss"."""
    text: str


@dataclass
class Forest:
    """Intervals below each other on one axis, with a line at zero."""

    intervals: Sequence[Interval]
    reach: str
    """Label at both ends of the axis, without its sign."""


@dataclass
class Card:
    """An example: small PNG images, a title, and named texts."""

    title: str
    images: Sequence[bytes] = ()
    texts: Sequence[tuple[str, str, bool | None]] = ()
    """Name, text, and whether the text is right (None: not judged)."""


@dataclass
class Cards:
    """Examples next to each other, as many in a row as fit."""

    cards: Sequence[Card]


@dataclass
class Tile:
    """A result in large type at the top of the page."""

    label: str
    words: Sequence[tuple[str, str]]
    """The words in large type, each with its CSS class: "good", "bad", "open" (a verdict), or "" (a number)."""
    note: str = ""


@dataclass
class Folded:
    """Blocks that stay hidden until their summary is clicked."""

    summary: str
    blocks: Sequence[Block]


Block = Paragraph | Bullets | Code | Table | Chart | Forest | Cards | Folded


@dataclass
class Section:
    """A heading with its blocks and a note below it."""

    title: str
    blocks: Sequence[Block]
    note: str = ""


@dataclass
class Page:
    """A page: title, note, tiles and sections. `as_html` renders it."""

    title: str
    note: str
    sections: Sequence[Section]
    tiles: Sequence[Tile] = ()


def as_html(page: Page) -> str:
    """Return the page as one HTML file that needs no other."""
    return _template().render(vars(page)).strip() + "\n"


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("clips.common"),
        autoescape=True,
        finalize=_printed,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"clip": clip, "data_uri": data_uri, "kind": lambda block: type(block).__name__}
    return environment.get_template("page.html.j2")


def _printed(value: Any) -> Any:
    """Return a value as it goes into a page; autoescape follows."""
    return printable(value, None) if isinstance(value, str) and not isinstance(value, Markup) else value


# ------------------------------------------------------------------------------------------- images
def png(plot: Plot, kind: str = "png") -> bytes:
    """Return the plot as the bytes of a file of `kind`, png or svg."""
    out = io.BytesIO()
    with warnings.catch_warnings():  # a character that the font lacks is drawn as a box; nobody can mend that
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        plot.savefig(out, format=kind)
    return out.getvalue()


def save_plot(plot: Plot, path: Path) -> Path:
    """Write `plot` as a .png or .svg file, whose folder is made if it is missing, and return `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(plot, path.suffix.removeprefix(".")))
    return path


def thumbnail(image: Image, side: int) -> bytes:
    """Return `image` as PNG, at most `side` pixels wide and high."""
    small, out = image.copy(), io.BytesIO()
    small.thumbnail((side, side))
    small.save(out, "PNG")
    return out.getvalue()


def data_uri(png: bytes) -> Markup:
    """Return a PNG as a data URI."""
    return Markup("data:image/png;base64," + base64.b64encode(png).decode())


# ------------------------------------------------------------------------------------------- tables for a terminal
def table_of(
    title: str, head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", names: int = 1
) -> rich_table.Table:
    """Return a table for a terminal: `names` columns of names, then columns of numbers; without a head all are text."""
    options: dict[str, Any] = {"title_justify": "left", "caption_justify": "left", "show_header": bool(head)}
    table = rich_table.Table(title=for_rich(title) or None, caption=for_rich(caption) or None, **options)
    for index, column in enumerate(head):
        table.add_column(for_rich(column), justify="left" if index < names else "right")
    for row in rows:
        table.add_row(*map(for_rich, row))
    return table


def print_table(table: rich_table.Table) -> None:
    """Print a table on stdout."""
    console.Console(emoji=False, width=None if sys.stdout.isatty() else 160).print(table)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table whose cells hold Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
