"""The page of a study of variants, made only from the content of its JSON file."""

from collections.abc import Mapping
from typing import Any

from clips.common.live import in_words
from clips.common.page import Block, Page, Paragraph, Section, Table, Tile
from clips.common.plots import pretty
from clips.common.rundir import UNSEEN, deciding_name
from clips.lab.report import COLOURS, described, forest
from clips.lab.report import verdict_class as css_class
from clips.lab.stats import UNDECIDED, Verdict, show_difference, show_mean
from clips.studies.variants import SECONDS

METRICS = (
    "sentence_r1",
    "sentence_neg_log_rank",
    "long_r1",
    "part_r1",
    "web_r1",
    "zero_shot_top1",
    "linear_probe_top1",
)
BESIDE = ("long_r1", "web_r1", "zero_shot_top1", "linear_probe_top1")
"""Metrics shown next to the deciding metric, after its value on the drawing styles of the training."""
Words = Mapping[Verdict, str]
"""What the verdicts on a − b mean in a study."""
BETTER: Words = {"win": "better", "loss": "worse", "tie": "no significant difference", "undecided": "undecided"}


def called(metric: str) -> str:
    """Return a metric in words, with its test set if that is not the first."""
    test_set, _, name = metric.rpartition("/")
    return pretty(name) + (f" ({test_set} style)" if test_set == UNSEEN else f" ({test_set})" if test_set else "")


def page(result: Mapping[str, Any], title: str, note: str, limits: str, words: Words = BETTER) -> Page:
    """Return the page of a study's `result`. `limits` says what the study does not show, `words` name its verdicts."""
    questions, variants = result["questions"], result["variants"]
    tiles = [
        Tile(f"({key}) {q['title']}", [(_in_words(q["verdict"], words), COLOURS.get(q["verdict"], "open"))])
        for key, q in questions.items()
    ]
    count = sum(len(q["contrasts"]) for q in questions.values())
    decides = (
        f"Fixed before anything was trained: the difference in {called(result['deciding_metric'])}, in percentage "
        f"points, between two variants. “{words['win']}”: its 95 % interval is above 0. “{words['loss']}”: below 0. "
        f"“{words['tie']}”: it covers 0, and nothing is shown. “Undecided”: {UNDECIDED} (docs/statistics.md). "
        f"Results were written of {' and of '.join(result['looks'])}. Intervals are Welch's over seeds. "
        "They hold for other seeds, not for other test images, and are not corrected for the number of comparisons "
        f"({count})."
    )
    parts = [
        Section("What decides", [Paragraph(decides), Paragraph(limits, "Limits")]),
        *(Section(f"({key}) {q['title']}", _blocks(q, variants, words)) for key, q in questions.items()),
    ]
    return Page(title, note, [*parts, Section("How it was run", _how(result))], tiles)


def _in_words(verdict: str, words: Words) -> str:
    """Return a verdict, or a count of verdicts, in the words of the study."""
    for kind, text in words.items():
        verdict = verdict.replace(kind, text)
    return verdict


def _blocks(question: Mapping[str, Any], variants: Mapping[str, Any], words: Words) -> list[Block]:
    blocks: list[Block] = []
    if question.get("paper"):
        blocks.append(Paragraph(question["paper"], "The paper"))
    blocks.append(Paragraph(f"{_in_words(question['verdict'], words)}.", "Verdict"))

    contrasts = question["contrasts"]
    compared = {name: variants[name] for name in question["variants"]}
    pairs = {f"{compared[c['a']]['label']} − {compared[c['b']]['label']}": c for c in contrasts}
    metric = contrasts[0]["metric"]
    metrics = contrasts[0]["metrics"]
    decide = [deciding_name(name, metrics) for name in ("sentence_r1", *BESIDE)]
    candidates = dict.fromkeys([decide[0], "sentence_r1", *decide])
    beside = [name for name in candidates if name in metrics and name != metric]
    rows = [
        (pair, show_difference(c), words[c["verdict"]], *(show_difference(c["metrics"][name]) for name in beside))
        for pair, c in pairs.items()
    ]
    head = ("comparison", called(metric), "verdict", *map(called, beside))
    intervals = [(pair, c) for pair, c in pairs.items() if c["ci95"]]
    if intervals:
        blocks.append(forest(intervals))
    blocks.append(Table(head, rows, css_class({text: COLOURS[kind] for kind, text in words.items()})))
    blocks.append(Paragraph("Only the first metric decides. Differences in percentage points with 95 % intervals."))
    if question.get("caution"):
        blocks.append(Paragraph(question["caution"], "With care"))
    return [*blocks, Paragraph("Test split, percent, mean ± standard deviation over seeds:"), means(compared)]


def means(variants: Mapping[str, Any]) -> Table:
    """Return a table with a row for each metric that the variants have and a column for each variant."""
    measured = next(iter(variants.values()))["runs"][0]["metrics"]
    named = [*METRICS, *(f"{protocol}_{way}_r1" for protocol in ("sentence", "long") for way in ("i2t", "t2i"))]
    # The set that decides is first, then the first set, whose metrics have plain names, then further sets.
    sets = sorted({name.rpartition("/")[0] for name in measured}, key=lambda name: (name != UNSEEN, name))
    metrics = {name: called(name) for test_set in sets for name in (f"{test_set}/{n}".lstrip("/") for n in named)}
    metrics[SECONDS] = "seconds of training, at the run's fastest rate"
    rows = [
        (words, *(show_mean([run["metrics"][name] for run in variant["runs"]]) for variant in variants.values()))
        for name, words in metrics.items()
        if name in measured
    ]
    return Table(("", *(variant["label"] for variant in variants.values())), rows, css_class({}))


def _how(result: Mapping[str, Any]) -> list[Block]:
    rows = [
        (name, variant["recipe"], " ".join(variant["settings"]) or "as it is", str(len(variant["runs"])))
        for name, variant in result["variants"].items()
    ]
    took = f"{in_words(result['seconds'])}, {result['jobs']} runs at a time; finished runs are not repeated"
    return [
        Paragraph(f"{result['command']} ({took})", "Command"),
        Table(("variant", "recipe", "settings", "runs"), rows, css_class({})),
        Paragraph(described(result["environment"]), "Environment"),
        Paragraph("The JSON file beside this page holds each run's configuration, seed and command."),
    ]
