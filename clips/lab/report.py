"""The result of a study as NAME.json and as NAME.html, and what the pages of studies share.

A study computes its result as plain data, then a `Page` from the result. The page can be made again from the JSON.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from clips.common.files import write_atomically
from clips.common.page import Forest, Interval, Page, as_html
from clips.lab.stats import Verdict, show_difference

SIGNS: dict[Verdict, str] = {"win": "▲ win", "tie": "= tie", "loss": "▼ loss", "undecided": "? undecided"}
COLOURS = {"win": "good", "loss": "bad", "tie": "open", "undecided": "open"}
"""CSS class of each verdict."""


def write_result(result: Mapping[str, Any], output: Path, name: str, page: Callable[[], Page]) -> Path:
    """Write `output`/`name`.json and then `page` as `output`/`name`.html, and return the path of the page.

    The JSON is written even if the page cannot be drawn.
    """
    path = output / f"{name}.html"
    write_atomically(output / f"{name}.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    write_atomically(path, as_html(page()))
    return path


def forest(rows: Iterable[tuple[str, Mapping[str, Any]]], scale: float = 1) -> Forest:
    """Return a chart of differences against zero, from pairs of a name and a row with `mean`, `ci95` and `verdict`.

    `scale` 100 shows shares as points.
    """
    rows = list(rows)
    reach = max(abs(end) for _, row in rows for end in row["ci95"]) * 1.05 or 1.0
    intervals = []
    for name, row in rows:
        low, mean, high = (50 + 50 * value / reach for value in (row["ci95"][0], row["mean"], row["ci95"][1]))
        decided = row["verdict"]
        intervals.append(
            Interval(name, low, mean, high, decided, f"{show_difference(row, scale=scale)} {SIGNS[decided]}")
        )
    return Forest(intervals, f"{scale * reach:.0f} points")


def verdict_class(words: Mapping[str, str]) -> Callable[[int, str], str]:
    """Return the `css_class` of a table with verdicts, whose CSS classes are in `words`.

    Cells of words may wrap, numbers with their intervals may not.
    """

    def css_class(column: int, text: str) -> str:
        kind = "" if "±" in text or "[" in text else "wrap"
        return f"{kind} verdict {words[text]}" if text in words else kind

    return css_class


def described(environment: Mapping[str, Any]) -> str:
    """Return machine and package versions, as env.json of a run lists them, in one line."""
    packages = environment.get("packages", {})
    rest = {name: value for name, value in environment.items() if name != "packages"}
    return ", ".join(f"{name} {value}" for name, value in (rest | packages).items())
