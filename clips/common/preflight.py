"""The report of a pre-flight, for pairs and for conversations: one table, one page with samples, one summary.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from clips.common.escape import clip, for_rich
from clips.common.files import write_atomically, write_json
from clips.common.page import render, table_of

THUMBNAIL = 176
"""Longest side in pixels of a picture on the page."""
PRINTED = 20
"""Reasons and problems that the table lists."""


@dataclass
class Shown:
    """A sample on the page."""

    key: str
    texts: Mapping[str, str] = field(default_factory=dict)
    """Name of a text → the text."""
    size: str = ""
    picture: bytes | None = None
    reason: str = ""
    """Why the sample is broken."""


@dataclass(kw_only=True)
class Preflight:
    """What a check found, ready to be shown."""

    title: str
    note: str = ""
    summary: dict[str, Any]
    """The content of summary.json."""
    rows: list[tuple[str, str]]
    broken_note: str
    """What a training does with a broken sample."""
    tiles: Sequence[tuple[str, str, str]] = ()
    reasons: Mapping[str, int] = field(default_factory=dict)
    """Why samples are broken → how many."""
    problems: Sequence[str] = ()
    refused: Sequence[str] = ()
    bars: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Chart → label → count."""
    good: Sequence[Shown] = ()
    bad: Sequence[Shown] = ()
    repeated: Sequence[tuple[str, int, str]] = ()
    """(what repeats, how often, an example)."""

    def publish(self, output: Path | str) -> None:
        """Write summary.json and contact_sheet.html into `output`, and print the table."""
        output = Path(output)
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "summary.json", self.summary)
        shown = vars(self) | {"title": "Data before a training", "note": f"{self.title} {self.note}".strip()}
        shown["reasons"] = list(self.reasons.items())
        shown["bars"] = {name: _trimmed(counts) for name, counts in self.bars.items() if any(counts.values())}
        write_atomically(output / "contact_sheet.html", render("clips.common", "preflight.html.j2", **shown))
        console = Console(emoji=False)
        rows = [*self.rows, *(("  broken", f"{n:,} × {why}") for why, n in list(self.reasons.items())[:PRINTED])]
        rows += [("  problem", clip(problem)) for problem in self.problems[:PRINTED]]
        if len(self.problems) > PRINTED:
            rows.append(("  problem", f"… and {len(self.problems) - PRINTED:,} more, all in summary.json"))
        console.print(table_of(self.title, (), rows))
        for name in ("summary.json", "contact_sheet.html"):
            console.print(f"wrote {for_rich(str(output / name))}", highlight=False)


def _trimmed(counts: Mapping[str, int]) -> dict[str, int]:
    """Without the empty bins at both ends."""
    filled = [place for place, count in enumerate(counts.values()) if count]
    return dict(list(counts.items())[filled[0] : filled[-1] + 1])
