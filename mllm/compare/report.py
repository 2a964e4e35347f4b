"""The page of a comparison of encoders, from the content of report.json (mllm/compare/figures.py)."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Plot

from clips.common.escape import clip, for_plot
from clips.common.page import Table, data_uri
from clips.common.plots import SERIES, Theme, pretty
from clips.common.rundir import UNSEEN, deciding_name
from clips.lab import report as lab
from clips.lab.report import Block, Bullets, Folded, Section
from clips.lab.stats import ANSWERS, TOGETHER, turned
from mllm.compare.probe import PROBE
from mllm.compare.words import difference_text, headline, interval_text, metric_name, percent_text
from mllm.data.images import ImageStore

OWN = (PROBE, "zero_shot_top1", "sentence_i2t_r1", "sentence_t2i_r1", "part_i2t_r1", "part_t2i_r1")
INTRINSIC = (*(f"{UNSEEN}/{name}" for name in OWN), *OWN)
"""Figures of the encoder itself that are set against the accuracy downstream."""
THUMBNAIL = 160
FLOORS = {
    "blind": "blind gives the same tokens for every picture. What it gets right, the questions alone give away.",
    "random": "random is the architecture of the CLIPS encoder, untrained, another encoder for each seed.",
}
STATISTICS = (
    "± is the standard deviation over seeds. Brackets are 95 % intervals of a mean with seeds and pictures as crossed "
    "random effects. Models are paired by question and by seed, runs of one pretraining seed are averaged, questions "
    "about one picture go together, and Student's t allows for how badly few seeds tell their spread. The intervals "
    "speak of other questions and other training runs, and are not corrected for their number. “Needed” is the number "
    "of questions that show a difference of the size seen in four of five comparisons; – if no number does."
)
INTRINSIC_NOTE = (
    "Percent, mean ± standard deviation over seeds. The linear probe reads the mean of the tokens that the projector "
    "sees, the same way for all encoders. Retrieval (one sentence an image; parts: several captions) and zero-shot are "
    f"of the pretraining run and need a text tower. “{UNSEEN}”: the same scenes by an artist that no training saw."
)
VARIANCE_NOTE = (
    "The standard error of each figure in points, and the part of its variance that each source gives, in percent, at "
    "today's numbers of seeds and pictures. “Single answers” is what a seed does to one picture or question. Seeds "
    "whose effects cannot be told apart share a column. Five seeds tell a spread to a factor between 0.6 and 2.9."
)
NEEDED_NOTE = (
    "How many of each show a difference of 1, 2 or 5 points over all questions in four of five comparisons: of one "
    "source alone, or of seeds and pictures together, both grown by one factor. – if one source alone is not enough."
)
BLIND_NOTE = (
    "Questions that blind models answer right in more than half of their runs. “Not answered blind” leaves them out. "
    "Models that always say yes mark every yes: then look at the kind by itself."
)
LOOSE_NOTE = (
    "Normalised: right, but only without case, articles and the last full stop. Prefix: wrong, but it begins with the "
    "expected words. If either is frequent, the scorer decides too."
)
EXAMPLES_NOTE = (
    "Seed 0, drawn at random among the questions that one of the first two encoders' models got right and the other did"
    " not. As many of each way as there are: they say how the models differ, not how often."
)
Report = Mapping[str, Any]
Row = dict[str, Any]


def page(report: Report, image_folder: Path | None) -> lab.Page:
    """The whole page; the pictures of its examples come from `image_folder`."""
    settings, overall = report["settings"], _overall(report)
    note = f"{len(report['encoders'])} encoders × {settings['llava_seeds']} runs · {settings['language_model']}"
    note += f" · {report['time']}" + (" · quick budget" if settings["quick"] else "")
    made = _decided(report, overall) if report["differences"] else []
    made += [
        *_evidence(report, overall),
        *_benchmarks(report),
        *_encoders(report),
        *_examples(report, image_folder),
        Section("Controls", [Bullets(controls(report))]),
        Section("What is not shown", [Bullets(not_shown(report))]),
        Section("Cost", [_cost_table(report)], "Wall-clock seconds of each cell, on the cores that it shared."),
        Section("Environment", _environment(report), lab.described(report["environment"])),
    ]
    return lab.Page("What the encoder is worth", note, made, _tiles(report) if overall else [])


def _overall(report: Report) -> list[Row]:
    """Differences over all questions of the deciding column."""
    return [row for row in report["differences"] if row["metric"] == "accuracy"]


def _pair(row: Row) -> str:
    return f"{row['a']} − {row['b']}"


def _counts_right_answers(metric: str) -> bool:
    """Whether right answers of the deciding column are what a metric counts."""
    return "@" not in metric and not metric.startswith("cider_d")


# ------------------------------------------------------------------------------------------- what was found
def _tiles(report: Report) -> list[lab.Tile]:
    tiles = []
    for name, encoder in report["encoders"].items():
        figure = encoder["metrics"]["accuracy"]
        seeds = len(figure["by_seed"])
        note = f"± {100 * figure['sd']:.1f} over {seeds} seeds" if figure["sd"] is not None else "one seed"
        tiles.append(lab.Tile(f"{name}: right answers", [(f"{100 * figure['mean']:.1f} %", "")], note))
    return tiles


def _decided(report: Report, overall: list[Row]) -> list[Section]:
    """Findings, right answers, differences, kinds of question."""
    deciding = [row for row in report["differences"] if row["metric"] == report["plan"]["decides"]]
    found: list[Block] = [Bullets([sentence(row) for row in deciding], "big"), Bullets(floors(report))]
    differences: list[Block] = []
    if overall:
        differences.append(lab.Forest([(_pair(row), row) for row in overall], 100))
    differences.append(Folded("How the intervals are made", [lab.Paragraph(STATISTICS)]))
    pairs: dict[str, list[Row]] = {}
    for row in report["differences"]:
        pairs.setdefault(_pair(row), []).append(row)
    for i, (name, rows) in enumerate(pairs.items()):
        kinds = [(metric_name(row["metric"]), row) for row in rows if row["metric"].startswith("accuracy/")]
        blocks: list[Block] = [lab.Forest(kinds, 100)] if kinds else []
        differences.append(Folded(name, [*blocks, differences_table(rows)], is_open=i == 0))
    decides = "95 % intervals over other questions and other training runs; they alone decide win, tie or loss."
    sections = [
        Section("What was found", found, not_shown(report)[0] if report["settings"]["is_demo"] else ""),
        Section(
            "Answers",
            [Table(*headline(report))],
            "% right, and CIDEr-D of descriptions: mean ± standard deviation over seeds.",
        ),
        Section("Differences, points", differences, decides),
    ]
    if overall:
        sections.append(Section("Kinds of question, % right", [_kinds(report)], "Mean over seeds."))
    return sections


def sentence(row: Row) -> str:
    """A difference in right answers, of all questions or of a kind, or in CIDEr-D, in words."""
    a, b = row["a"], row["b"]
    size = difference_text(row | {"mean": abs(row["mean"]), "ci95": None}).removeprefix("+")
    is_accuracy = not row["metric"].startswith("cider_d")
    points = f"{size} {'points' if is_accuracy else 'CIDEr-D'} {interval_text(row)}"
    if row["verdict"] == "tie":
        needed = row["items_needed"]
        seen = f"about {needed:,} questions would be needed" if needed else "more questions alone would not do"
        return f"{a} and {b} tie: a difference of {points} is not told from none; to see one of this size, {seen}."
    if not is_accuracy:
        return f"{a} describes {points} {'better' if row['verdict'] == 'win' else 'worse'} than {b}."
    kind = "questions" if row["metric"] == "accuracy" else f"{metric_name(row['metric'])} questions"
    return f"{a} answers {points} {'more' if row['verdict'] == 'win' else 'fewer'} {kind} right than {b}."


def floors(report: Report) -> list[str]:
    """Which encoders are not above `blind`."""
    blind = {name for name, encoder in report["encoders"].items() if encoder["kind"] == "blind"}
    below = []
    for row in _overall(report):
        if len({row["a"], row["b"]} & blind) == 1:
            other, said = (row["a"], row["verdict"]) if row["b"] in blind else (row["b"], turned(row["verdict"]))
            if said != "win":
                below.append(f"{other} does not beat blind beyond the interval: no use of its pictures was shown.")
    return below


def differences_table(rows: list[Row]) -> Table:
    lines = []
    for row in rows:
        numbers = [difference_text(row), lab.SIGNS[row["verdict"]], f"{row['items']:,}"]
        lines.append([metric_name(row["metric"]), *numbers, _count(row["items_needed"] or None)])
    return Table(["", "difference [95 %]", "verdict", "questions", "needed"], lines)


def _count(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"


def _kinds(report: Report) -> lab.Bars:
    """Bars of every encoder for each kind of question."""
    encoders = report["encoders"]
    first = next(iter(encoders.values()))["metrics"]
    groups = []
    for metric in (name for name in first if name.startswith("accuracy") and _counts_right_answers(name)):
        bars = [
            (name, 100 * encoder["metrics"][metric]["mean"], SERIES[i % len(SERIES)])
            for i, (name, encoder) in enumerate(encoders.items())
        ]
        groups.append((metric_name(metric), f"({first[metric]['items']:,})", bars))
    return lab.Bars(groups)


# ------------------------------------------------------------------------------------------- how far to trust it
def _evidence(report: Report, overall: list[Row]) -> list[Section]:
    parts = [
        ("Where the uncertainty comes from", VARIANCE_NOTE, _variance_table(report, overall)),
        ("How many are needed", NEEDED_NOTE, _needed_table(overall)),
        ("Questions that need no picture", BLIND_NOTE, _blind_table(report)),
        ("Answers that are nearly right", LOOSE_NOTE, _loose_table(report)),
    ]
    return [Section(title, [Folded("Numbers", [table])], note) for title, note, table in parts if table.rows]


def _in_order(sources: Iterable[str]) -> list[str]:
    """Names of sources of variance: seeds before pictures before single answers, coarse before fine."""

    def place(name: str) -> tuple[bool, bool, bool, bool]:
        return name == ANSWERS, "seed" not in name, " and " in name, name in ("LLaVA seed", "question")

    return sorted(set(sources), key=place)


def _variance_table(report: Report, overall: list[Row]) -> Table:
    """Of every encoder's figures in the deciding column, and of every difference over all questions."""
    figures = [
        (f"{name}: {metric_name(metric)}", figure["variance"])
        for name, encoder in report["encoders"].items()
        for metric, figure in encoder["metrics"].items()
        if _counts_right_answers(metric)
    ]
    figures += [(_pair(row), row["variance"]) for row in overall]
    sources = _in_order(name for _, variance in figures for name in variance)
    rows = []
    for name, variance in figures:
        if (total := sum(variance.values())) > 0:
            shares = [f"{100 * variance[source] / total:.0f}" if source in variance else "–" for source in sources]
            rows.append([name, f"{100 * total**0.5:.2f}", *shares])
    return Table(["", "standard error", *sources], rows)


def _needed_table(overall: list[Row]) -> Table:
    every = [(_pair(row), points, found) for row in overall for points, found in row["needed"].items()]
    levels = _in_order(name for _, _, found in every for name in found if not name.endswith(TOGETHER))
    lines = []
    for name, points, found in every:
        both = [_count(number) for level, number in found.items() if level.endswith(TOGETHER)]
        lines.append([name, points, *(_count(found.get(level)) for level in levels), " × ".join(both) or "–"])
    return Table(["", "points", *(f"{level}s" for level in levels), "seeds × pictures together"], lines)


def _blind_table(report: Report) -> Table:
    rows = []
    for kind, found in report.get("blind_questions", {}).get("kinds", {}).items():
        shown = [f"{answer} ({times})" for answer, times in list(found["answers"].items())[:5]]
        more = ", …" if len(found["answers"]) > 5 else ""
        rows.append([kind, f"{found['solved']:,} of {found['questions']:,}", ", ".join(shown) + more or "–"])
    return Table(["kind", "answered blind", "their answers"], rows)


def _loose_table(report: Report) -> Table:
    rows = []
    for name, found in report.get("loose_answers", {}).items():
        for way in ("normalised", "prefix"):
            examples = [f"{e['text']} ({e['expected']}) × {e['times']}" for e in found[way]["examples"]]
            if examples:
                of_all = f"{found[way]['count']:,} of {found['answers']:,}"
                rows.append([f"{name}, {way}", of_all, "; ".join(clip(example, 80) for example in examples)])
    return Table(["", "answers", "most frequent: said (expected) × times"], rows)


# ------------------------------------------------------------------------------------------- benchmarks, the encoders
def _benchmarks(report: Report) -> list[Section]:
    encoders, differences = report["encoders"], []
    names = list(next(iter(encoders.values()))["benchmarks"])
    if not names:
        return []
    for row in report["benchmark_differences"]:
        ends = "–" if row["ci95"] is None else f"[{row['ci95'][0]:+.4g}, {row['ci95'][1]:+.4g}]"
        differences.append([f"{_pair(row)}: {row['metric']}", f"{row['mean']:+.4g}", ends])
    rows = []
    for name in names:
        figures = [encoder["benchmarks"][name] for encoder in encoders.values()]
        spreads = ["" if f["sd"] is None else f" ± {f['sd']:.2g}" for f in figures]
        rows.append([name, *(f"{f['mean']:.4g}{spread}" for f, spread in zip(figures, spreads, strict=True))])
    folded = Folded("Differences", [Table(["", "mean", "95 % interval"], differences)])
    note = "As lmms-eval reports them. Its items are not at hand here, so intervals are over seeds only."
    return [Section("Benchmarks", [Table(["lmms-eval", *encoders], rows), folded], note)]


def _encoders(report: Report) -> list[Section]:
    """Figures of the encoders themselves, alone and against the right answers."""
    encoders = report["encoders"]
    every = list(dict.fromkeys(name for encoder in encoders.values() for name in encoder["intrinsic"]))
    names = [name for name in INTRINSIC if name in every]
    names += [name for name in every if ": " in name and name.endswith("_r1")]  # other test sets, e.g. COCO
    if not names:
        return []
    chance = [next(e["intrinsic"][n]["chance"] for e in encoders.values() if n in e["intrinsic"]) for n in names]
    rows = [[name, *(percent_text(e["intrinsic"].get(figure)) for figure in names)] for name, e in encoders.items()]
    rows.append(["chance", *(f"{value:.1f}" for value in chance)])
    drawn = [name for name in (deciding_name(own, every) for own in OWN[:3]) if _overall(report) and name in every]
    plots = [(partial(scatter_plot, report, name), f"{own_name(name)} against right answers") for name in drawn]
    table = Table(["encoder", *map(own_name, names)], rows)
    return [Section("The encoders themselves", [table, lab.Charts(plots)], INTRINSIC_NOTE)]


def own_name(name: str) -> str:
    """A figure of the encoder itself in words."""
    test_set, _, figure = name.rpartition("/")
    return ("linear probe" if figure == PROBE else pretty(figure)) + (f", {test_set}" if test_set else "")


def scatter_plot(report: Report, figure: str, theme: Theme) -> Plot:
    """Right answers of each cell against a figure of its encoder: does a better encoder give a better model?"""
    plot = Plot(figsize=(4, 3.1), dpi=130, facecolor=theme.paper, layout="constrained")
    axes = lab.plain_axes(plot, theme)
    axes.set_title("right answers, %", loc="left", fontsize=9.5, color=theme.ink)
    axes.set_xlabel(f"{own_name(figure)}, %", fontsize=9.5, color=theme.ink)
    axes.margins(0.12)
    for i, (name, encoder) in enumerate(report["encoders"].items()):
        if figure in encoder["intrinsic"]:
            right = [100 * value for value in encoder["metrics"]["accuracy"]["by_seed"]]
            own, colour = encoder["intrinsic"][figure]["by_seed"], SERIES[i % len(SERIES)]
            axes.scatter(own, right, s=36, color=colour, label=for_plot(name, 60))
    plot.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False, labelcolor=theme.ink, handletextpad=0)
    return plot


def _examples(report: Report, image_folder: Path | None) -> list[Section]:
    store = ImageStore(image_folder) if image_folder else None
    cards = []
    for example in report["examples"]:
        texts: list[tuple[str, str, bool | None]] = [
            (name, answer, name == example["right"]) for name, answer in example["answers"].items()
        ]
        picture = _thumbnail(store, example["image"]) if store and example["image"] else None
        cards.append(lab.Card(picture, example["question"], [*texts, ("truth", example["truth"], None)]))
    return [Section("Where two models differ", [lab.Cards(cards)], EXAMPLES_NOTE)] if cards else []


def _thumbnail(store: ImageStore, name: str) -> str:
    image, out = store.load(name), io.BytesIO()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(out, "PNG")
    return data_uri(out.getvalue())


# ------------------------------------------------------------------------------------------- controls and limits
def controls(report: Report) -> list[str]:
    settings, encoders = report["settings"], report["encoders"]
    stages = [
        f"{name}: {stage['samples']:,} samples in batches of {stage['batch_size']}, "
        + ", ".join(f"{part} {how}" for part, how in stage["trains"].items())
        for name, stage in settings["stages"].items()
    ]
    seen = [
        f"{name}: {runs[0]['samples']:,} samples in {runs[0]['steps']:,} steps, {len({r['run'] for r in runs})} run(s)"
        for name, encoder in encoders.items()
        if (runs := encoder["pretraining"])
    ]
    kinds, columns = {encoder["kind"] for encoder in encoders.values()}, settings["columns"]
    return [
        f"Equal in every cell of a seed: language model ({settings['language_model']}), data, order of the samples, "
        "steps, rates, start of the adapters and way that the projector starts "
        f"({settings['stages']['align']['projector']}; a fit is to each encoder's own features).",
        f"Stages: {'; '.join(stages)}.",
        f"{settings['llava_seeds']} LLaVA runs of each encoder, paired by seed and by question. Encoders trained anew "
        f"have {settings['seeds']} pretraining seed(s), which the runs take in turn; no two share a LLaVA seed.",
        *[f"Sorts of pictures: {', '.join(columns)}. {columns[0]} decides." for _ in columns[1:2]],
        *(f"{name}: {encoder['described']}." for name, encoder in encoders.items()),
        *(f"Floor: {text}" for kind, text in FLOORS.items() if kind in kinds),
        _fixed(report),
        *[f"Pretrained with this project: {'; '.join(seen)}." for _ in seen[:1]],
    ]


def _fixed(report: Report) -> str:
    """What was decided before the first cell, and whether the comparison was kept to it."""
    fixed, decides = report["fixed"], report["plan"]["decides"]
    what = f"Decided by: {metric_name(decides)}. " if decides else ""
    if fixed["kept"]:
        what += "This, encoders, budget, questions and seeds were fixed before the first cell, and kept to: "
        return f"{what}compare.json, SHA-256 {fixed['sha256']}."
    differs = "; ".join(fixed["differs"])
    return f"{what}What was fixed in compare.json (SHA-256 {fixed['sha256']}) was not kept to: {differs}."


def not_shown(report: Report) -> list[str]:
    settings, encoders = report["settings"], report["encoders"]
    is_demo, share, several = settings["is_demo"], settings["budget_share"], settings["llava_seeds"] > 1
    distinct = settings["distinct_encoders"].items()
    alone = [n for n, count in distinct if count == 1 and several and encoders[n]["kind"] not in FLOORS]
    samples = {run["samples"] for encoder in encoders.values() for run in encoder["pretraining"]}
    fewest = min((row["seeds"] for row in report["differences"]), default=settings["llava_seeds"])
    points = {
        "The demo's pictures are drawings on painted grounds. These figures show that the path works and that the "
        "measurement tells encoders apart; they are no evidence about photographs.": is_demo,
        "The test of unseen artists is missing: the drawings of several could not be fetched. Memory of drawings may "
        "tell encoders apart.": is_demo and UNSEEN not in settings["columns"],
        "The stages' rates and the start of the projector were tuned with a CLIPS encoder only.": is_demo,
        f"Each stage saw {share:.0%} of the samples that train_llava.sh gives it{' (--quick)' * settings['quick']}: "
        "models trained to the end are better, and may differ otherwise.": share < 1,
        f"All runs of {', '.join(alone)} stand on one encoder each: intervals hold for these encoders, not for the "
        "methods that made them (--seeds, or {seed} in a path).": alone,
        "The encoders pretrained here saw different numbers of samples.": len(samples) > 1,
        "One seed: the interval says nothing about other training runs.": fewest == 1,
        f"{fewest} independent seeds tell their spread badly: intervals are wide and miss differences.": 1 < fewest < 4,
        "One language model, one projector, one budget, the same rates for all encoders. The encoder stays frozen: "
        "what it could learn in training is not measured.": True,
    }
    return [text for text, holds in points.items() if holds]


def _cost_table(report: Report) -> Table:
    cells = report["cells"]
    parts = list(dict.fromkeys(part for cell in cells for part in cell["cost"]))
    rows, every = [], [sum(cell["cost"].values()) for cell in cells]
    for cell, together in zip(cells, every, strict=True):
        seconds: Sequence[str] = [f"{cell['cost'].get(part, 0):.0f}" for part in parts]
        rows.append([f"{cell['encoder']}, {cell['run']}", *seconds, f"{together:.0f}"])
    rows.append(["all cells", *("" for _ in parts), f"{sum(every):.0f}"])
    return Table(["seconds", *parts, "together"], rows)


def _environment(report: Report) -> list[Block]:
    settings = json.dumps({"settings": report["settings"], "cells": report["cells"]}, indent=2)
    folded = Folded("Settings and the configuration of every cell", [lab.Code(settings)])
    return [lab.Code(report["command"], wraps=True), folded]
