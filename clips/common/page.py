"""Reports: pages and Markdown from jinja2 templates, tables for a terminal.

A report computes plain data, and a template (`templates/` beside it) shows the data. clips/common/templates holds the
shared parts: the frame and style of a page, tables, tiles, sections, pictures. Everything that a template puts in is
escaped for its medium: HTML in `*.html.j2`, Markdown in `*.md.j2`.
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

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich import console
from rich import table as rich_table

from clips.common.escape import clip, for_markdown, for_rich, visible

if TYPE_CHECKING:  # matplotlib takes longer to import than a table on a terminal may
    from matplotlib.figure import Figure as Plot
    from PIL.Image import Image

    from clips.common.plots import Theme


def names_and_numbers(column: int, text: str) -> str:
    """The CSS class of a table's cell: names in the first column, figures in the others."""
    return "n" if column else ""


@dataclass
class Table:
    """Rows of text, for pages and for Markdown."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    css_class: Callable[[int, str], str] = names_and_numbers
    """Column and text → class of a cell or heading."""


@dataclass
class Picture:
    """A plot inside the page, for the light and the dark theme, as data URIs."""

    light: str
    dark: str
    alt: str


def render(package: str, template: str, **shown: Any) -> str:
    """`template` of `package`/templates (or of clips/common/templates) filled with `shown`.

    A name that the template uses and nobody gave raises jinja2.UndefinedError.
    """
    escape = _as_markdown if template.endswith(".md.j2") else _as_html
    return _environment(package, escape).get_template(template).render(shown).rstrip("\n") + "\n"


@cache
def _environment(package: str, escape: Callable[[Any], Any]) -> Environment:
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("clips.common")]),
        autoescape=True,
        finalize=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"clip": clip, "data_uri": data_uri}
    return environment


def _as_html(value: Any) -> Any:
    """What is put into a page; autoescape comes after it."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _as_markdown(value: Any) -> Markup:
    """What is put into Markdown; Markup, so that autoescape makes no HTML of it."""
    return value if isinstance(value, Markup) else Markup(for_markdown(str(value)))


def themed(draw: Callable[[Theme], Plot], alt: str) -> Picture:
    from clips.common.plots import DARK, LIGHT

    light, dark = (data_uri(png(draw(theme))) for theme in (LIGHT, DARK))
    return Picture(light, dark, alt)


def png(plot: Plot, kind: str = "png") -> bytes:
    """The plot as a file of `kind`, png or svg."""
    out = io.BytesIO()
    with warnings.catch_warnings():  # a character that the font lacks is drawn as a box; nobody can mend that
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        plot.savefig(out, format=kind)
    return out.getvalue()


def save_plot(plot: Plot, path: Path) -> Path:
    """Write `plot` as a .png or .svg file, whose folder is made if it is missing; returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(plot, path.suffix.removeprefix(".")))
    return path


def thumbnail(picture: Image, side: int) -> bytes:
    """`picture` as PNG, at most `side` pixels wide and high."""
    small, out = picture.copy(), io.BytesIO()
    small.thumbnail((side, side))
    small.save(out, "PNG")
    return out.getvalue()


def data_uri(png: bytes) -> str:
    """A PNG as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def table_of(
    title: str, head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", names: int = 1
) -> rich_table.Table:
    """A table for a terminal: the first `names` columns are names, the others figures. Without a head all are words."""
    options: dict[str, Any] = {"title_justify": "left", "caption_justify": "left", "show_header": bool(head)}
    table = rich_table.Table(title=for_rich(title) or None, caption=for_rich(caption) or None, **options)
    for index, column in enumerate(head):
        table.add_column(for_rich(column), justify="left" if index < names else "right")
    for row in rows:
        table.add_row(*map(for_rich, row))
    return table


def print_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print `table_of` on stdout."""
    console.Console(emoji=False, width=None if sys.stdout.isatty() else 160).print(table_of(title, head, rows))


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose cells hold Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
