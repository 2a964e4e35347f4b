"""The report of a comparison: report.json, report.md, and report.html, one page that needs no network.

Everything stands in report.json (mllm/compare/collect.py); the two others are readings of it. Differences are shown
in percentage points, and are a win or a loss only where their interval leaves zero out.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Plot

from clips.common.errors import reporting
from clips.common.escape import for_plot
from clips.common.files import write_atomically, write_json
from clips.common.page import Table, data_uri, render, themed
from clips.common.plots import SERIES, Theme, pretty
from clips.common.rundir import UNSEEN, deciding_name
from mllm.compare.collect import REPORT
from mllm.compare.evidence import evidence
from mllm.compare.probe import PROBE
from mllm.compare.words import (
    counts_right_answers,
    difference_text,
    headline,
    interval_text,
    metric_name,
    overall_rows,
    pair_name,
    percent_text,
    value_text,
)
from mllm.data.images import ImageStore

SIGNS = {"win": "▲ win", "tie": "= tie", "loss": "▼ loss"}
OWN = (PROBE, "zero_shot_top1", "sentence_i2t_r1", "sentence_t2i_r1", "part_i2t_r1", "part_t2i_r1")
INTRINSIC = (*(f"{UNSEEN}/{name}" for name in OWN), *OWN)
"""Figures of the encoder itself that are set against the accuracy downstream."""
THUMBNAIL = 160
Report = dict[str, Any]


def write_report(report: Report, output: Path, image_folder: Path | None) -> Path:
    """Write the three files into `output`, the examples' pictures taken from `image_folder`; returns the page.

    Raises CommandError where that fails.
    """
    page = output / "report.html"
    with reporting(f"the report in {output} cannot be written; every cell is finished"):
        write_json(output / REPORT, report)
        write_atomically(output / "report.md", markdown(report))
        store = ImageStore(image_folder) if image_folder else None
        write_atomically(page, render("mllm.compare", "report.html.j2", **_shown(report, store)))
    return page


# ---------------------------------------------------------------------------------------------- words and numbers
def _p(value: float | None) -> str:
    return "–" if value is None else "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def sentence(row: dict[str, Any]) -> str:
    """A difference in right answers, of all questions or of a kind, or in CIDEr-D, in words."""
    a, b, size = row["a"], row["b"], difference_text(row["metric"], abs(row["mean"])).removeprefix("+")
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
    """What the floors say: who does not stand above `blind`."""
    encoders = [name for name, encoder in report["encoders"].items() if encoder["kind"] == "blind"]
    below = []
    for row in report["differences"]:
        if row["metric"] == "accuracy" and {row["a"], row["b"]} & set(encoders):
            other, verdict = (row["a"], row["verdict"]) if row["b"] in encoders else (row["b"], _turned(row["verdict"]))
            if verdict != "win" and other not in encoders:
                below.append(f"{other} does not beat blind beyond the interval: no use of its pictures was shown.")
    return below


def _turned(verdict: str) -> str:
    return {"win": "loss", "loss": "win", "tie": "tie"}[verdict]


def controls(report: Report) -> list[str]:
    settings = report["settings"]
    trains = "; ".join(
        f"{name}: {stage['samples']:,} samples in batches of {stage['batch_size']}, "
        + ", ".join(f"{part} {how}" for part, how in stage["trains"].items())
        for name, stage in settings["stages"].items()
    )
    points = [
        f"Equal in every cell of a seed: language model ({settings['language_model']}), data, order of the samples, "
        "steps, rates, start of the adapters and way that the projector starts "
        f"({settings['stages']['align']['projector']}; a fit is to each encoder's own features, "
        "and the same at every budget). Not equal: the encoder alone.",
        f"Stages: {trains}.",
        f"{settings['llava_seeds']} LLaVA runs of each encoder, paired by seed; the same questions, paired by item. "
        f"Encoders that are trained anew have {settings['seeds']} pretraining seed(s), which the runs take in turn; no "
        "two of these encoders share a LLaVA seed.",
    ]
    if len(settings["columns"]) > 1:
        points.append(
            f"Questions are about several sorts of pictures ({', '.join(settings['columns'])}). "
            f"{settings['columns'][0]} decides; figures of the others are named after them."
        )
    points += [f"{name}: {encoder['described']}." for name, encoder in report["encoders"].items()]
    kinds = {encoder["kind"] for encoder in report["encoders"].values()}
    points += [f"Floor: {text}" for kind, text in FLOORS.items() if kind in kinds]
    points += _fixed(report)
    seen = [_pretraining(name, encoder["pretraining"]) for name, encoder in report["encoders"].items()]
    return points + [f"Pretrained with this project: {'; '.join(filter(None, seen))}."] * any(seen)


def _fixed(report: Report) -> list[str]:
    """What was decided before the first cell, and whether it was kept to."""
    fixed, decides = report["fixed"], report["plan"]["decides"]
    what = f"Decided by: {metric_name(decides)}. " if decides else ""
    if fixed["kept"]:
        return [f"{what}This, encoders, budget, questions and seeds were fixed before the first cell, and kept to: "
                f"compare.json, SHA-256 {fixed['sha256']}."]  # fmt: skip
    differs = "; ".join(fixed["differs"])
    return [f"{what}What was fixed in compare.json (SHA-256 {fixed['sha256']}) was not kept to: {differs}."]


FLOORS = {
    "blind": "blind gives the same tokens for every picture; what it gets right, the questions alone give away.",
    "random": "random is the architecture of the CLIPS encoder, untrained, another one for each seed.",
}


def _pretraining(name: str, runs: list[dict[str, Any]]) -> str:
    if not runs:
        return ""
    different = len({run["run"] for run in runs})
    return f"{name}: {runs[0]['samples']:,} samples in {runs[0]['steps']:,} steps, {different} run(s)"


def not_shown(report: Report) -> list[str]:
    settings = report["settings"]
    points = []
    if settings["is_demo"]:
        points.append(
            "The demo's pictures are drawings on painted grounds. These figures show that the path works and that the "
            "measurement tells encoders apart; they are no evidence about photographs."
        )
        if UNSEEN not in settings["columns"]:
            points.append(
                "The test of unseen artists is missing: the drawings of several could not be fetched. Every drawing "
                "asked about was trained on: encoders may be told apart by what they remember, not by what they see."
            )
        points.append(
            "The stages' rates and the start of the projector were tuned on the demo with a CLIPS encoder: what suits "
            "another one better was not looked for."
        )
    if settings["budget_share"] < 1:
        points.append(
            f"Each stage saw {settings['budget_share']:.0%} of the samples that train_llava.sh gives it"
            + (" (--quick)" if settings["quick"] else "")
            + ": models trained to the end are better, and their differences may be others."
        )
    few = [
        name
        for name, count in settings["distinct_encoders"].items()
        if count == 1 and settings["llava_seeds"] > 1 and report["encoders"][name]["kind"] not in FLOORS
    ]
    if few:
        points.append(
            f"All runs of {', '.join(few)} stand on one encoder each: intervals hold for these encoders, not for the "
            "methods that made them (--seeds, or {seed} in a path)."
        )
    seen = {run["samples"] for encoder in report["encoders"].values() for run in encoder["pretraining"]}
    if len(seen) > 1:
        points.append(
            "The encoders pretrained with this project saw different numbers of samples: what differs between them is "
            "not their method alone."
        )
    fewest = min((row["seeds"] for row in report["differences"]), default=settings["llava_seeds"])
    if fewest == 1:
        points.append("One seed: the interval says nothing about other training runs.")
    elif fewest < 4:
        points.append(
            f"{fewest} independent seeds tell their own spread badly. The interval allows for it by being wide, so "
            "that a difference that is there is often missed."
        )
    points.append(
        "One language model, one projector, one budget, the same rates for all encoders. The encoder stays frozen: "
        "what it could learn in training is not measured."
    )
    return points


STATISTICS = (
    "± is the standard deviation over seeds. Brackets are 95 % intervals of a mean with seeds and pictures as crossed "
    "random effects, both models paired by question and by seed: LLaVA runs of one pretraining seed are averaged, "
    "questions about one picture go together, and Student's t allows for how badly few seeds tell their spread. They "
    "speak of other questions and other training runs, and alone decide win, tie or loss; they are not corrected for "
    "their number. McNemar's exact test speaks of other questions to these very models (an item counts for the model "
    "that is right in more runs, and questions about one picture as independent); Holm's correction is over the kinds "
    "of one pair. “Needed” is the number of questions with which the interval would find a difference of the size seen "
    "with power 0.8; – where more questions alone would not do."
)
INTRINSIC_NOTE = (
    "Percent, mean ± standard deviation over seeds. The linear probe reads the mean of the tokens that the projector "
    "sees and is measured the same way for all; retrieval (one sentence an image; parts: several captions) and "
    "zero-shot come from the pretraining run and need a text tower, which random and blind have not."
)
UNSEEN_NOTE = f"“{UNSEEN}”: the same scenes by an artist that no training saw."


def differences_table(rows: list[dict[str, Any]], first: Callable[[dict[str, Any]], str]) -> Table:
    head = ["", "difference", "95 % interval", "verdict", "McNemar p", "Holm p", "questions", "needed"]
    lines = []
    for row in rows:
        numbers = [difference_text(row["metric"], row["mean"]), interval_text(row), SIGNS[row["verdict"]]]
        numbers += [_p(row["p_mcnemar"]), _p(row["p_holm"]), f"{row['items']:,}"]
        lines.append([first(row), *numbers, f"{row['items_needed']:,}" if row["items_needed"] else "–"])
    return Table(head, lines)


def _measured(report: Report) -> list[str]:
    """The figures of the encoders themselves."""
    return list(dict.fromkeys(name for encoder in report["encoders"].values() for name in encoder["intrinsic"]))


def intrinsic_note(report: Report) -> str:
    has_unseen = any(name.startswith(f"{UNSEEN}/") for name in _measured(report))
    return f"{INTRINSIC_NOTE} {UNSEEN_NOTE}" if has_unseen else INTRINSIC_NOTE


def intrinsic_table(report: Report) -> Table | None:
    encoders, every = report["encoders"], _measured(report)
    names = [name for name in INTRINSIC if name in every]
    names += [name for name in every if ": " in name and name.endswith("_r1")]  # other test sets, e.g. COCO
    chance = {n: next(e["intrinsic"][n]["chance"] for e in encoders.values() if n in e["intrinsic"]) for n in names}
    rows = [
        [name, *(percent_text(encoder["intrinsic"].get(figure)) for figure in names)]
        for name, encoder in encoders.items()
    ]
    rows.append(["chance", *(f"{chance[name]:.1f}" for name in names)])
    return Table(["encoder", *map(intrinsic_name, names)], rows) if names else None


def intrinsic_name(name: str) -> str:
    test_set, _, figure = name.rpartition("/")
    return ("linear probe" if figure == PROBE else pretty(figure)) + (f", {test_set}" if test_set else "")


def cost_table(report: Report) -> Table:
    known = ("align", "instruct", "evaluation", "benchmarks")
    parts = [part for part in known if any(part in cell["cost"] for cell in report["cells"])]
    rows, every = [], [sum(cell["cost"].values()) for cell in report["cells"]]
    for cell, together in zip(report["cells"], every, strict=True):
        seconds = [f"{cell['cost'].get(part, 0):.0f}" for part in parts]
        rows.append([f"{cell['encoder']}, {cell['run']}", *seconds, f"{together:.0f}"])
    rows.append(["all cells", *("" for _ in parts), f"{sum(every):.0f}"])
    return Table(["seconds", *parts, "together"], rows)


def benchmarks_table(report: Report) -> Table | None:
    encoders = report["encoders"]
    names = list(next(iter(encoders.values()))["benchmarks"])
    rows = [[n, *(f"{_raw(e['benchmarks'][n])}" for e in encoders.values())] for n in names]
    return Table(["lmms-eval", *encoders], rows) if names else None


def _raw(figure: dict[str, Any]) -> str:
    return f"{figure['mean']:.4g}" + (f" ± {figure['sd']:.2g}" if figure["sd"] is not None else "")


def _pairs(report: Report) -> dict[tuple[str, str], list[dict[str, Any]]]:
    pairs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in report["differences"]:
        pairs.setdefault((row["a"], row["b"]), []).append(row)
    return pairs


def _summary(report: Report) -> str:
    settings = report["settings"]
    line = f"{len(report['encoders'])} encoders × {settings['llava_seeds']} runs · {settings['language_model']}"
    return f"{line} · {report['time']}" + (" · quick budget" if settings["quick"] else "")


def _environment(report: Report) -> str:
    found = report["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in found.get("packages", {}).items())
    return (
        f"{found.get('cores', '?')} cores ({found.get('device', '?')}), {found.get('jobs', '?')} cells at a time, "
        f"{found.get('platform', '')}, Python {found.get('python', '')}; {packages}"
    )


# ---------------------------------------------------------------------------------------------- what is shown
def markdown(report: Report) -> str:
    """The report as text; examples' pictures are in the page only."""
    return render("mllm.compare", "report.md.j2", **_both(report))


def _both(report: Report) -> dict[str, Any]:
    """What the page and the Markdown have in common; every word that depends on the figures."""
    overall = overall_rows(report)
    deciding = [row for row in report["differences"] if row["metric"] == report["plan"]["decides"]]
    return {
        "title": "What the encoder is worth",
        "note": _summary(report),
        "findings": [sentence(row) for row in deciding],
        "floors": floors(report) if overall else [],
        "headline": Table(*headline(report)) if report["differences"] else None,
        "statistics": STATISTICS,
        "pairs": [
            {"name": f"{a} − {b}", "table": differences_table(rows, _metric), "rows": rows}
            for (a, b), rows in _pairs(report).items()
        ],
        "parts": evidence(report),
        "benchmarks": benchmarks_table(report),
        "intrinsic": intrinsic_table(report),
        "intrinsic_note": intrinsic_note(report),
        "controls": controls(report),
        "not_shown": not_shown(report),
        "cost": cost_table(report),
        "environment": _environment(report),
        "command": report["command"],
    }


def _shown(report: Report, store: ImageStore | None) -> dict[str, Any]:
    """What templates/report.html.j2 shows."""
    shown, overall = _both(report), overall_rows(report)
    colours = {name: SERIES[i % len(SERIES)] for i, name in enumerate(report["encoders"])}
    measured = _measured(report)
    for pair in shown["pairs"]:
        pair["forest"] = _forest([row for row in pair["rows"] if row["metric"].startswith("accuracy/")], _metric)
    return shown | {
        "demo_note": shown["not_shown"][0] if report["settings"]["is_demo"] else "",
        "tiles": _tiles(report) if overall else [],
        "forest": _forest(overall, pair_name),
        "tests": differences_table(overall, pair_name),
        "kinds": _kinds(report, colours) if overall else [],
        "benchmark_differences": _benchmark_differences(report.get("benchmark_differences", [])),
        "plots": [
            themed(partial(scatter_plot, report, colours, name), f"{intrinsic_name(name)} against right answers")
            for name in (deciding_name(own, measured) for own in OWN[:3])
            if overall and name in measured
        ],
        "examples": [
            example | {"picture": _thumbnail(store, example["image"]) if store and example["image"] else None}
            for example in report["examples"]
        ],
        "configuration": json.dumps({"settings": report["settings"], "cells": report["cells"]}, indent=2),
    }


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    """(value, label, note) of each encoder."""
    tiles = []
    for name, encoder in report["encoders"].items():
        figure = encoder["metrics"]["accuracy"]
        seeds = len(figure["by_seed"])
        note = f"± {100 * figure['sd']:.1f} over {seeds} seeds" if figure["sd"] is not None else "one seed"
        tiles.append((f"{100 * figure['mean']:.1f} %", f"{name}: right answers", note))
    return tiles


def _metric(row: dict[str, Any]) -> str:
    return metric_name(row["metric"])


def _forest(rows: list[dict[str, Any]], name: Callable[[dict[str, Any]], str]) -> dict[str, Any] | None:
    """A line for each difference, interval and mean against zero on one scale: places in percent of the width."""
    if not rows:
        return None
    reach = max(abs(end) for row in rows for end in row["ci95"]) * 1.05 or 1.0

    def place(value: float) -> float:
        return 50 + 50 * value / reach

    lines = []
    for row in rows:
        low, high = map(place, row["ci95"])
        numbers = f"{difference_text(row['metric'], row['mean'])} {interval_text(row)} {SIGNS[row['verdict']]}"
        places = {"low": f"{low:.2f}", "width": f"{high - low:.2f}", "mean": f"{place(row['mean']):.2f}"}
        lines.append({"name": name(row), "verdict": row["verdict"], "numbers": numbers} | places)
    return {"lines": lines, "reach": f"{100 * reach:.0f}"}


def _kinds(report: Report, colours: dict[str, str]) -> list[dict[str, Any]]:
    """Bars of every encoder for each kind of question."""
    encoders = report["encoders"]
    first = next(iter(encoders.values()))["metrics"]
    blocks = []
    for metric in (name for name in first if name.startswith("accuracy") and counts_right_answers(name)):
        means = {name: encoder["metrics"][metric]["mean"] for name, encoder in encoders.items()}
        bars = [(name, f"{100 * mean:.1f}", colours[name], value_text(metric, mean)) for name, mean in means.items()]
        blocks.append({"name": metric_name(metric), "questions": f"{first[metric]['items']:,}", "bars": bars})
    return blocks


def _benchmark_differences(rows: list[dict[str, Any]]) -> Table:
    table = []
    for row in rows:
        interval = "–" if row["ci95"] is None else f"[{row['ci95'][0]:+.4g}, {row['ci95'][1]:+.4g}]"
        table.append([f"{pair_name(row)}: {row['metric']}", f"{row['mean']:+.4g}", interval])
    return Table(["", "mean", "95 % interval"], table)


def scatter_plot(report: Report, colours: dict[str, str], figure: str, theme: Theme) -> Plot:
    """Right answers of each cell against a figure of its encoder: does a better encoder give a better model?"""
    plot = Plot(figsize=(4, 3.1), dpi=130, facecolor=theme.paper, layout="constrained")
    axes = plot.add_subplot(facecolor=theme.paper)
    axes.set_title("right answers, %", loc="left", fontsize=9.5, color=theme.ink)
    axes.set_xlabel(f"{intrinsic_name(figure)}, %", fontsize=9.5, color=theme.ink)
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.ink, labelsize=8.5, length=0)
    axes.spines[:].set_visible(False)
    axes.margins(0.12)
    for name, encoder in report["encoders"].items():
        if figure in encoder["intrinsic"]:
            right = [100 * value for value in encoder["metrics"]["accuracy"]["by_seed"]]
            axes.scatter(
                encoder["intrinsic"][figure]["by_seed"], right, s=36, color=colours[name], label=for_plot(name, 60)
            )
    plot.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False, labelcolor=theme.ink, handletextpad=0)
    return plot


def _thumbnail(store: ImageStore, name: str) -> str:
    image, out = store.load(name), io.BytesIO()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(out, "PNG")
    return data_uri(out.getvalue())
