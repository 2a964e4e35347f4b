"""The report of the paper's claims: one list of sections, written as an offline page and as Markdown.

Everything comes from the content of claims.json, so the page can be written again without the runs.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure as Plot
from scipy import stats

from clips.common.errors import reporting
from clips.common.escape import for_plot
from clips.common.files import write_atomically
from clips.common.page import Picture, Table, render, save_plot, themed
from clips.common.plots import LIGHT, SERIES, Theme
from clips.common.rundir import UNSEEN, deciding_name
from clips.lab.stats import show_difference
from clips.studies.claims import CONTEXT, CONTRADICTED, LLAVA, OPEN, REPRODUCED

TITLE = "The claims of CLIPS, in small"
NAMES = {
    "sentence_r1": "retrieval R@1, test sentences",
    "long_r1": "retrieval R@1, full long captions",
    "part_r1": "retrieval R@1, parts of the long caption",
    "web_r1": "retrieval R@1, web captions",
    "zero_shot_top1": "zero-shot accuracy",
    "linear_probe_top1": "linear probe accuracy",
}
BETTER, WORSE, ALIKE = "better", "worse", "not told apart"
COLOURS = {REPRODUCED: "good", CONTRADICTED: "bad", OPEN: "open", BETTER: "good", WORSE: "bad", ALIKE: "open"}
WAYS = {"i2t": "image → text", "t2i": "text → image"}
BESIDE = ("long_r1", "web_r1", "zero_shot_top1", "linear_probe_top1")
"""Figures that stand beside the deciding one."""
SHORT = {
    "sentence_r1": "R@1 test sentences",
    "long_r1": "R@1 long captions",
    "part_r1": "R@1 parts of long captions",
    "web_r1": "R@1 web captions",
    "zero_shot_top1": "zero-shot",
    "linear_probe_top1": "linear probe",
}
DRAWN = ("sentence_r1", "long_r1", "zero_shot_top1", "linear_probe_top1")


@dataclass
class Paragraph:
    text: str
    mark: str = ""
    """A word that stands out before it, such as Verdict."""


@dataclass
class Chart:
    name: str
    """The PNG file that the Markdown shows."""
    claim: Mapping[str, Any]
    variants: Mapping[str, Any]

    @property
    def alt(self) -> str:
        return self.claim["title"]

    def picture(self) -> Picture:
        """For the page."""
        return themed(partial(draw, self), self.alt)


Block = Paragraph | Table | Chart


@dataclass
class Section:
    title: str
    blocks: Sequence[Block]


Tile = tuple[str, Sequence[tuple[str, str]], str]
"""What is judged, the verdict's words with their CSS classes, and a line about it."""


def write_reports(result: dict[str, Any], output: Path) -> None:
    """Write a PNG file per chart, claims.md and claims.html for the content of claims.json.

    Raises CommandError where that fails.
    """
    with reporting(f"the report in {output} cannot be written; every run and {output / 'claims.json'} are there"):
        tiles = [(f"({key})", _tile(claim), claim["title"]) for key, claim in result["claims"].items()]
        write_pages(output / "claims", TITLE, _summary(result), sections(result), tiles)


def write_pages(path: Path, title: str, note: str, parts: Sequence[Section], tiles: Sequence[Tile]) -> None:
    """`path`.md, `path`.html and a PNG file per chart beside them."""
    shown = {"title": title, "note": note, "sections": parts}
    for chart in (block for part in parts for block in part.blocks if isinstance(block, Chart)):
        save_plot(draw(chart, LIGHT), path.with_name(chart.name))
    write_atomically(path.with_suffix(".md"), render("clips.studies", "claims.md.j2", **shown))
    write_atomically(path.with_suffix(".html"), render("clips.studies", "claims.html.j2", **shown, tiles=tiles))


def _summary(result: Mapping[str, Any]) -> str:
    parts = []
    if result["variants"]:
        runs = [run for variant in result["variants"].values() for run in variant["runs"]]
        parts.append(f"{result['samples']:,} samples seen by every run, {result['seeds']} seeds")
        if all(run["config"]["data"]["train"] == "demo" for run in runs):
            parts.append("the demo's drawings")
    if LLAVA in result["claims"]:
        parts.append(f"({LLAVA}) from the report of compare_encoders.py")
    return " · ".join(parts)


def _tile(claim: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The verdict in a few words, each with its CSS class: a count where the comparisons differ."""
    verdicts = [contrast["verdict"] for contrast in claim.get("contrasts", [])]
    if len(set(verdicts)) < 2:
        return [(claim["verdict"], COLOURS.get(claim["verdict"], ""))]
    return [
        (f"{verdicts.count(kind)} {kind.removesuffix(' here')}", colour)
        for kind, colour in COLOURS.items()
        if kind in verdicts
    ]


def sections(result: Mapping[str, Any]) -> list[Section]:
    """The whole report, in order."""
    claims, variants = result["claims"], result["variants"]
    return [
        Section("What decides", [Paragraph(_what_decides(result))]),
        *(Section(f"({key}) {claim['title']}", _claim(key, claim, variants)) for key, claim in claims.items()),
        Section("Controls and limits", _controls(result)),
        *([Section("Lengths of the texts", lengths(result))] if variants else []),
        Section("How it was run", how_it_ran(result)),
    ]


def called(figure: str, names: Mapping[str, str] = NAMES) -> str:
    """A figure in words, with its test set where that is not the first."""
    test_set, _, rest = figure.rpartition("/")
    return names[rest] + (f" ({test_set} artist)" if test_set == UNSEEN else f" ({test_set})" if test_set else "")


def _what_decides(result: Mapping[str, Any]) -> str:
    return (
        f"Fixed before anything was trained: the difference in {called(result['deciding_figure'])} (percent, mean of "
        "image → text and text → image) between two variants. “Reproduced here”: its 95 % interval lies above 0, in "
        "the direction of the claim. “Contradicted here”: below 0. “Not reproduced here”: it covers 0, so that "
        "nothing is shown either way. Means alone decide nothing."
    )


def _controls(result: Mapping[str, Any]) -> list[Block]:
    count = sum(len(claim["contrasts"]) for claim in result["claims"].values() if "variants" in claim)
    equal = (
        f"Equal in all runs of (a) to (d): {result['samples']:,} samples seen, batch, image tower, and for each seed "
        "the order of the data. Intervals are Welch's over seeds, which count as independent runs: a seed sets order "
        "and the first weights alike, but what that leaves in common after training is small, and pairing by seed "
        "would halve the degrees of freedom. They speak of other seeds on these test images, not of other images. "
        f"They are not corrected for there being {count} comparisons: of twenty without a difference one is "
        "expected to look like one."
    )
    limits = (
        "the scenes are drawings with generated captions, which for training are wrong about a tenth of the facts "
        "unless data.fields.long says otherwise, and the models are tiny, so a claim that does not hold here may hold "
        "at the paper's scale, and the other way round. Learning rates are those of the recipes (demo, and "
        "clip_baseline for one text per image), each searched for the recipe itself and not for every variant. Equal "
        "samples are not equal time. All text towers read up to 80 tokens, the paper's length, instead of the demo's, "
        "so that the full captions fit."
    )
    return [Paragraph(equal), Paragraph(limits, "Limits")]


def _claim(key: str, claim: Mapping[str, Any], variants: Mapping[str, Any]) -> list[Block]:
    blocks = [Paragraph(claim["paper"], "The paper"), Paragraph(f"{claim['verdict']}.", "Verdict")]
    if "missing" in claim:
        return [*blocks, Paragraph(f"To get there: {claim['missing']}.")]
    if "variants" not in claim:  # LLaVA, from another report
        rows = [
            (f"{c['a']} − {c['b']}", show_difference(c), c["verdict"], str(c["seeds"]), f"{c['items']:,}")
            for c in claim["contrasts"]
        ]
        source = (
            f"From {claim['report']}: accuracy in percentage points, interval over pictures and seeds by bootstrap; "
            "encoders, samples and limits stand there."
        )
        return [
            *blocks,
            Table(("comparison", "accuracy", "verdict", "seeds", "items"), rows, _cell_class),
            Paragraph(source),
        ]
    return [*blocks, *comparison(f"claim-{key}.png", claim, variants)]


def comparison(chart: str, claim: Mapping[str, Any], variants: Mapping[str, Any]) -> list[Block]:
    """Chart, differences and means of the variants of `claim`, in the figures that their runs have.

    `claim` has the fields of `clips.studies.claims.Claim`, its contrasts as `compared` makes them, with a verdict.
    """
    deciding, there = (claim["contrasts"][0][name] for name in ("metric", "figures"))
    labels = {name: variants[name]["label"] for name in claim["variants"]}
    pairs = {f"{labels[c['a']]} − {labels[c['b']]}": c for c in claim["contrasts"]}
    decided = [(pair, show_difference(c), c["verdict"]) for pair, c in pairs.items()]
    others = (
        deciding.rpartition("/")[2],
        *(deciding_name(name, there) for name in BESIDE),
    )  # first: on the seen artists
    aside = [name for name in others if name in there and name != deciding]
    beside = [(pair, *(show_difference(c["figures"][name]) for name in aside)) for pair, c in pairs.items()]
    names = NAMES | {f"{p}_{way}_r1": f"{p}, {words}" for p in ("sentence", "long") for way, words in WAYS.items()}
    # The set that decides first, then the first one, whose figures have plain names, then any further ones.
    sets = sorted({name.rpartition("/")[0] for name in there}, key=lambda name: (name != UNSEEN, name))
    measured = [f"{test_set}/{name}".removeprefix("/") for test_set in sets for name in names]
    figures = [(name, called(name, names)) for name in measured if name in there]
    figures.append(("train_seconds", "seconds of training, at the run's fastest rate"))
    table = [
        (words, *(_mean_and_sd([run["figures"][name] for run in variants[variant]["runs"]]) for variant in labels))
        for name, words in figures
    ]
    return [
        Chart(chart, claim, variants),
        Paragraph(
            f"{'Points' if claim['line'] else 'Bars'}: mean over seeds; whiskers: 95 % t interval of that mean. "
            "Whether they overlap decides nothing; the table of differences does."
        ),
        Paragraph("Differences in percentage points with their 95 % intervals:"),
        Table(("comparison", called(deciding, SHORT), "verdict"), decided, _cell_class),
        Paragraph("The same in figures that do not decide:"),
        Table(("comparison", *(called(name, SHORT) for name in aside)), beside, _cell_class),
        Paragraph(claim["caution"], "With care"),
        Paragraph("Test split, percent, mean ± standard deviation over seeds:"),
        Table(("", *labels.values()), table, _cell_class),
    ]


def _mean_and_sd(values: Sequence[float]) -> str:
    return f"{mean(values):.1f} ± {stdev(values):.1f}"


def lengths(result: Mapping[str, Any]) -> list[Block]:
    """How long the texts of training and test are."""
    tests = ", ".join(f"{name} {tokens:g}" for name, tokens in result["test_text_tokens"].items())
    rows = [
        (variant["label"], *(f"{variant['text_tokens'][name]:g}" if name in variant["text_tokens"] else "" for name in
         ("web", "sub")))
        for variant in result["variants"].values()
    ]  # fmt: skip
    return [
        Paragraph(
            "A model is measured best with texts as long as those it was trained on. Mean tokens of what the text "
            "towers were fed; where a variant has one text per image, it is the mix of web and synthetic captions:"
        ),
        Table(("variant", "web caption, or the one text", "piece of the long caption"), rows, _cell_class),
        Paragraph(f"Mean tokens of the test set's texts: {tests}."),
    ]


def how_it_ran(result: Mapping[str, Any]) -> list[Block]:
    """Command, time, settings and environment."""
    rows = [
        (name, variant["recipe"], " ".join(variant["settings"]) or "as it is", str(len(variant["runs"])))
        for name, variant in result["variants"].items()
    ]
    environment = {name: value for name, value in result["environment"].items() if name != "packages"}
    packages = result["environment"].get("packages", {})
    took = f"{result['seconds'] / 60:.0f} minutes, {result['jobs']} runs beside each other"
    described = ", ".join(f"{name} {value}" for name, value in (environment | packages).items())
    blocks: list[Block] = [Paragraph(f"{result['command']} ({took}; finished runs are not run again)", "Command")]
    if rows:
        blocks.append(Paragraph(f"Variants, all with {CONTEXT}:"))
        blocks.append(Table(("variant", "recipe", "settings", "runs"), rows, _cell_class))
    blocks.append(Paragraph(described, "Environment"))
    return [*blocks, Paragraph("The JSON file beside this holds each run's whole configuration, seed and command.")]


def _cell_class(column: int, text: str) -> str:
    """Words may wrap, figures with their spread may not."""
    kind = "" if "±" in text or "[" in text else "wrap"
    return f"{kind} verdict {COLOURS[text]}" if text in COLOURS else kind


# --- the chart
def draw(chart: Chart, theme: Theme) -> Plot:
    """The variants' figures as lines (steps of one quantity) or bars; whiskers are 95 % t intervals over seeds."""
    names = chart.claim["variants"]
    plot = Plot(figsize=(4.0, 3.5), dpi=200, facecolor=theme.paper, layout="constrained")
    axes = plot.subplots()
    axes.set_facecolor(theme.paper)
    width = 0.8 / len(DRAWN)
    decides = chart.claim["contrasts"][0]["metric"].rpartition("/")[2]
    shown = list(dict.fromkeys((decides, *DRAWN)))[: len(DRAWN)]
    there = chart.variants[names[0]]["runs"][0]["figures"]
    for number, (figure, colour) in enumerate(zip(shown, SERIES[: len(DRAWN)], strict=True)):
        drawn = deciding_name(figure, there)
        if any(drawn not in run["figures"] for name in names for run in chart.variants[name]["runs"]):
            continue
        values = [[run["figures"][drawn] for run in chart.variants[name]["runs"]] for name in names]
        means, whiskers = [mean(v) for v in values], [_half_width(v) for v in values]
        if chart.claim["line"]:
            places = [i + 0.03 * (number - 1.5) for i in range(len(names))]
            axes.plot(places, means, color=colour, linewidth=1.8, marker="o", markersize=4.5, label=SHORT[figure])
        else:
            places = [i + width * (number - 1.5) for i in range(len(names))]
            axes.bar(places, means, width * 0.92, color=colour, label=SHORT[figure])
        axes.errorbar(places, means, whiskers, fmt="none", ecolor=theme.ink, elinewidth=1.1, capsize=2.5)
    axes.set_xticks(range(len(names)), [textwrap.fill(for_plot(chart.variants[name]["label"]), 13) for name in names])
    top = axes.get_ylim()[1]
    axes.set_ylim(0, top if top < 50 else max(100, top))
    if deciding_name(decides, there) != decides:
        axes.set_title(f"{UNSEEN} artist", color=theme.ink, fontsize=9)
    axes.set_ylabel("%", color=theme.ink, rotation=0, labelpad=8)
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.ink, labelsize=9, length=0)
    axes.spines[:].set_visible(False)
    plot.legend(loc="outside lower center", ncols=2, fontsize=8.5, frameon=False, labelcolor=theme.ink)
    return plot


def _half_width(values: Sequence[float]) -> float:
    """Half of the 95 % t interval of the mean of independent runs."""
    return float(stats.t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5)
