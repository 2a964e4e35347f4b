"""The result of a study as NAME.json, and as NAME.html: one page of sections and blocks that needs no network.

A study computes its result as plain data, then a `Page` from the result. The page can be made again from the JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from matplotlib.figure import Figure as Plot

from clips.common.errors import reporting
from clips.common.files import write_atomically
from clips.common.page import Picture, Table, render, themed
from clips.common.plots import Theme
from clips.lab.stats import Verdict, show_difference, verdict

SIGNS: dict[Verdict, str] = {"win": "▲ win", "tie": "= tie", "loss": "▼ loss"}


@dataclass
class Paragraph:
    text: str
    mark: str = ""
    """A word in bold before the text, such as "Verdict"."""
    kind: ClassVar[str] = "paragraph"


@dataclass
class Bullets:
    lines: Sequence[str]
    css: str = ""
    """"big" for the findings of a study."""
    kind: ClassVar[str] = "bullets"


@dataclass
class Code:
    text: str
    wraps: bool = False
    kind: ClassVar[str] = "code"


@dataclass
class Charts:
    """Plots beside each other, each drawn for light and for dark."""

    drawn: Sequence[tuple[Callable[[Theme], Plot], str]]
    """How to draw a plot, and what it shows in words."""
    css: str = "curves"
    """"plot" for a single chart in the middle of the page."""
    kind: ClassVar[str] = "charts"

    def pictures(self) -> list[Picture]:
        return [themed(draw, words) for draw, words in self.drawn]


@dataclass
class Forest:
    """Differences against zero, each a line with its interval and verdict."""

    rows: Sequence[tuple[str, Mapping[str, Any]]]
    """Name, and a row with `mean` and `ci95`."""
    scale: float = 1
    """100 for fractions: the page shows points."""
    kind: ClassVar[str] = "forest"

    @property
    def reach(self) -> float:
        """Half of the axis, in units of the rows."""
        return max(abs(end) for _, row in self.rows for end in row["ci95"]) * 1.05 or 1.0

    def lines(self) -> Iterable[dict[str, str]]:
        """Places in percent of the axis."""
        for name, row in self.rows:
            low, high, middle = (50 + 50 * value / self.reach for value in (*row["ci95"], row["mean"]))
            said = verdict(row["ci95"])
            places = {"low": f"{low:.2f}", "width": f"{high - low:.2f}", "mean": f"{middle:.2f}"}
            numbers = f"{show_difference(row, scale=self.scale)} {SIGNS[said]}"
            yield {"name": name, "verdict": said, "numbers": numbers} | places


@dataclass
class Bars:
    """Groups of bars, such as the kinds of question."""

    groups: Sequence[tuple[str, str, Sequence[tuple[str, float, str]]]]
    """Title, remark, and bars: name, length in percent, colour."""
    kind: ClassVar[str] = "bars"


@dataclass
class Card:
    """An example: a picture, a line, and named texts."""

    picture: str | None
    """A data URI."""
    title: str
    texts: Sequence[tuple[str, str, bool | None]]
    """Name, text, and whether the text is right (None: not judged)."""


@dataclass
class Cards:
    cards: Sequence[Card]
    kind: ClassVar[str] = "cards"


@dataclass
class Folded:
    """Blocks behind a summary, which opens them."""

    summary: str
    blocks: Sequence[Block]
    is_open: bool = False
    kind: ClassVar[str] = "folded"


Block = Paragraph | Bullets | Code | Charts | Forest | Bars | Cards | Folded | Table


@dataclass
class Section:
    title: str
    blocks: Sequence[Block]
    note: str = ""


@dataclass
class Tile:
    label: str
    words: Sequence[tuple[str, str]]
    """What stands large, each with its CSS class: "good", "bad", "open" (a verdict), or "" (a figure)."""
    note: str = ""


@dataclass
class Page:
    title: str
    note: str
    sections: Sequence[Section]
    tiles: Sequence[Tile] = field(default_factory=tuple)


def write_report(result: Mapping[str, Any], output: Path, name: str, page: Callable[[], Page]) -> Path:
    """Write `output`/`name`.json and then `page` as `output`/`name`.html; returns the path of the page.

    The JSON is there even if the page cannot be drawn. Raises CommandError if either cannot be written.
    """
    path = output / f"{name}.html"
    with reporting(f"the report in {output} cannot be written; every finished cell stays"):
        write_atomically(output / f"{name}.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
        write_atomically(path, as_html(page()))
    return path


def as_html(page: Page) -> str:
    return render("clips.lab", "report.html.j2", **vars(page))


# ------------------------------------------------------------------------------------------- parts that studies share
COLOURS = {"win": "good", "loss": "bad", "tie": "open"}
"""Verdict → CSS class."""


def verdict_class(words: Mapping[str, str]) -> Callable[[int, str], str]:
    """CSS classes for a table with verdicts: words may wrap, figures may not. `words`: text of a cell → its class."""

    def css_class(column: int, text: str) -> str:
        kind = "" if "±" in text or "[" in text else "wrap"
        return f"{kind} verdict {words[text]}" if text in words else kind

    return css_class


def described(environment: Mapping[str, Any]) -> str:
    """Machine and package versions, as env.json of a run names them, in one line."""
    packages = environment.get("packages", {})
    rest = {name: value for name, value in environment.items() if name != "packages"}
    return ", ".join(f"{name} {value}" for name, value in (rest | packages).items())
