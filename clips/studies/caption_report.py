"""The report of a comparison of sets of captions: which teach best, and, of the demo, how often they are right."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clips.common.errors import UserError, reporting
from clips.common.page import Table, save_plot
from clips.common.plots import LIGHT, check_format
from clips.lab.stats import show_difference
from clips.studies.caption_truth import SHARES
from clips.studies.claims import CONTRADICTED, OPEN, REPRODUCED, verdict
from clips.studies.claims_report import (
    ALIKE,
    BETTER,
    COLOURS,
    WORSE,
    Block,
    Chart,
    Paragraph,
    Section,
    called,
    comparison,
    draw,
    how_it_ran,
    lengths,
    write_pages,
)

TITLE = "Sets of captions"
WORDS = {REPRODUCED: BETTER, CONTRADICTED: WORSE, OPEN: ALIKE}
CAUTION = (
    "equal samples seen is not equal time. The runs with long captions have two texts a picture and a captioner, those "
    "with web captions only have one text, no captioner and the baseline's learning rates. A model is measured best "
    "with texts like those it was trained on, so captions in the style of the test's texts have an advantage; the "
    "linear probe reads no text."
)


def write_report(result: Mapping[str, Any], output: Path) -> list[str]:
    """Write captions.md, captions.html and the chart for the content of captions.json; returns the verdicts in words.

    Raises CommandError where that fails.
    """
    with reporting(f"the report in {output} cannot be written; every run and {output / 'captions.json'} are there"):
        contrasts = [dict(c, verdict=WORDS[verdict(c["ci95"])]) for c in result["contrasts"]]
        said = conclusions(result, contrasts)
        note = (
            f"{result['pictures']:,} pictures that all sets have, {result['samples']:,} samples seen by every run, "
            f"{result['seeds']} seeds"
        )
        tiles = [
            (c["a"], [(c["verdict"], COLOURS[c["verdict"]])], f"than web captions only: {show_difference(c)}")
            for c in contrasts
            if c["b"] == "web"
        ]
        write_pages(output / "captions", TITLE, note, sections(result, contrasts, said), tiles)
        return said


def conclusions(result: Mapping[str, Any], contrasts: list[dict[str, Any]]) -> list[str]:
    """One sentence a set: whether its captions help over web captions alone, and what of them is wrong where not."""
    deciding, lines = result["deciding_figure"], []
    test_set, _, plain = deciding.rpartition("/")
    for c in contrasts:
        if c["b"] != "web":
            continue
        verb = {BETTER: "help over", WORSE: "do harm against", ALIKE: "show no gain over"}[c["verdict"]]
        line = f"The captions of {c['a']} {verb} web captions alone: {show_difference(c)} in {called(deciding)}"
        line += f", {show_difference(c['figures'][plain])} with seen artists." if test_set else "."
        if shares := result["truth"].get(c["a"]):
            rights = [
                f"{words} {shares[name]:g} %"
                for name, words in (
                    ("things_right", "things"), ("counts_right", "counts"), ("places_right", "places"),
                )
                if shares[name] is not None
            ]  # fmt: skip
            line += f" Of what they say this is right: {', '.join(rights)}; they name {shares['things_found']:g} % of "
            line += "the things there."
        lines.append(line)
    return lines


def write_chart(report: Path, out: Path) -> Path:
    """Draw the figures of `report`, a captions.json, into `out`; returns `out`.

    Raises UserError for a file that is none, and an `out` that is neither .png nor .svg.
    """
    check_format(out)
    try:
        result = json.loads(report.read_text(encoding="utf-8"))
        plot = draw(Chart(out.name, _claim(result, result["contrasts"]), result["variants"]), LIGHT)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"--report {report} is no captions.json of compare_captions.py: {error!r}") from None
    return save_plot(plot, out)


def _claim(result: Mapping[str, Any], contrasts: list[dict[str, Any]]) -> dict[str, Any]:
    """As `clips.studies.claims.Claim`."""
    names = list(result["variants"])
    return {"title": TITLE, "variants": names, "contrasts": contrasts, "caution": CAUTION, "line": False}


def sections(result: Mapping[str, Any], contrasts: list[dict[str, Any]], said: list[str]) -> list[Section]:
    """The whole report, in order."""
    deciding = result["deciding_figure"]
    decides = (
        f"Fixed before anything was trained: the difference in {called(deciding)} between two sets. "
        f"“{BETTER}”: its 95 % interval (Welch's, over seeds) lies above 0; “{WORSE}”: below; “{ALIKE}”: it covers 0, "
        f"and nothing is shown either way. The intervals are not corrected for there being {len(contrasts)} of them."
    )
    parts = [
        Section("Result", [Paragraph(line) for line in said]),
        Section("What decides", [Paragraph(decides)]),
        Section("The encoders", comparison("captions.png", _claim(result, contrasts), result["variants"])),
    ]
    if result["truth"]:
        parts.append(Section("How often the captions are right", _truth(result)))
    return [
        *parts,
        Section("The sets", _sets(result)),
        Section("Lengths of the texts", lengths(result)),
        Section("How it was run", how_it_ran(result)),
    ]


def _truth(result: Mapping[str, Any]) -> list[Block]:
    sets = result["truth"]
    rows = [
        (words, *("" if shares[name] is None else f"{shares[name]:.1f}" for shares in sets.values()))
        for name, words in SHARES.items()
    ]
    return [
        Paragraph(
            "The demo knows what is in its pictures. Percent, counted in the words of the demo's own texts; what a "
            "caption says in other words is not counted:"
        ),
        Table(("", *sets), rows),
    ]


def _sets(result: Mapping[str, Any]) -> list[Block]:
    rows = [(name, entry["data"], f"{entry['samples']:,}") for name, entry in result["sets"].items()]
    blocks: list[Block] = [Table(("set", "data", "samples"), rows, lambda column, text: "wrap" if column == 1 else "")]
    common = f"{result['pictures']:,} pairs of picture and web caption are in all of them; every run sees these alone."
    return [*blocks, Paragraph(common), *map(Paragraph, result["notes"])]
