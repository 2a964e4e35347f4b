"""Reports from jinja2 templates: a page in one file and its Markdown, in which whatever is put in is text.

A report computes plain data; its template (`templates/` beside it) shows them. clips/common/templates holds what all
of them share: the frame and style of a page (light and dark, desktop and phone), tables, tiles, sections, pictures.
What a template puts in is escaped for its medium without being asked: HTML in `*.html.j2`, Markdown in `*.md.j2`.
"""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure as Plot

from clips.common.escape import clip, code_block, for_markdown, visible
from clips.common.plots import DARK, LIGHT, Theme


def names_and_numbers(column: int, text: str) -> str:
    """CSS class of a table's cell: names in the first column, figures in the others."""
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
    """A plot inside the page, drawn once for light and once for dark; both are what `src` takes."""

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
    environment.filters |= {"clip": clip, "code_block": lambda text: Markup(code_block(text)), "data_uri": data_uri}
    return environment


def _as_html(value: Any) -> Any:
    """What is put into a page; autoescape comes after it."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _as_markdown(value: Any) -> Markup:
    """What is put into Markdown; Markup, so that autoescape makes no HTML of it."""
    return value if isinstance(value, Markup) else Markup(for_markdown(str(value)))


def themed(draw: Callable[[Theme], Plot], alt: str) -> Picture:
    light, dark = (data_uri(png(draw(theme))) for theme in (LIGHT, DARK))
    return Picture(light, dark, alt)


def png(plot: Plot) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings():  # a character that the font lacks is drawn as a box; nobody can mend that
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        plot.savefig(out, format="png")
    return out.getvalue()


def save_plot(plot: Plot, path: Path) -> None:
    """Write `plot` as a PNG file, once it is drawn."""
    path.write_bytes(png(plot))


def data_uri(png: bytes) -> str:
    """A PNG as something that `src` takes."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
