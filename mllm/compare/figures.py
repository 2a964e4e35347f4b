"""From the answers and benchmarks of a comparison's cells to what each encoder's models can do, and how they differ.

Scores are fractions. Shapes: S seeds · I items.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean, stdev
from typing import Any

import numpy as np
from scipy import stats

from clips.common.errors import UserError
from mllm.compare.benchmarks import benchmark_results
from mllm.compare.cells import Cell, cells_of, encoder_names
from mllm.compare.comparison import Comparison
from mllm.compare.plan import stored_questions
from mllm.compare.statistics import Bootstrap, holm, mcnemar
from mllm.data.questions import read_questions
from mllm.evaluation.cider import cider

ASKED = ("question_id", "prompt", "image", "kind", "expected")
"""What all cells' lines of answers must have in common."""
EXAMPLES = 6
"""Questions shown for each of the two ways in which a pair of models can differ."""


@dataclass
class ItemScores:
    """One metric of every encoder's models, item by item, and the pictures that the items are about."""

    clusters: list[str]
    """One for each item; items of one picture are drawn together."""
    by_encoder: dict[str, np.ndarray]
    """Encoder → [S, I]."""
    kind: str | None = None
    """The kind of question, where the metric is about one kind only."""


# ---------------------------------------------------------------------------------------------- downstream
def read_answers(comparison: Comparison) -> dict[Cell, list[dict[str, Any]]]:
    """Each cell's answers, all question files together; UserError naming a cell that was asked something else."""
    answers: dict[Cell, list[dict[str, Any]]] = {}
    cells = cells_of(comparison)
    for cell in cells:
        files = [cell.evaluation / f"{name}.jsonl" for name in stored_questions(comparison.output)]
        answers[cell] = [json.loads(line) | {"file": f.stem} for f in files for line in f.read_text().splitlines()]
        asked = [{key: line.get(key) for key in ASKED} for line in answers[cell]]
        first = cells[0]
        if asked != [{key: line.get(key) for key in ASKED} for line in answers[first]]:
            raise UserError(
                f"cell {cell.name} answered other questions than {first.name}: remove {cell.evaluation} and run "
                "the comparison again"
            )
    return answers


def item_scores(comparison: Comparison, answers: dict[Cell, list[dict[str, Any]]]) -> dict[str, ItemScores]:
    """`accuracy`, `accuracy/KIND` of each kind of question, and `cider_d` where there are references."""
    cells = cells_of(comparison)
    first = answers[cells[0]]
    clusters = [line.get("image") or f"question {line['question_id']}" for line in first]
    found: dict[str, ItemScores] = {}

    def add(name: str, items: list[int], scores: Mapping[Cell, Sequence[float]], kind: str | None = None) -> None:
        by_encoder = defaultdict(list)
        for cell in cells:
            by_encoder[cell.encoder].append([float(value) for value in scores[cell]])
        arrays = {encoder: np.array(rows) for encoder, rows in by_encoder.items()}
        found[name] = ItemScores([clusters[i] for i in items], arrays, kind)

    scored = [i for i, line in enumerate(first) if "correct" in line]
    kinds = list(dict.fromkeys(first[i]["kind"] for i in scored))
    groups = [("accuracy", None, scored)] if scored else []
    if len(kinds) > 1:
        groups += [(f"accuracy/{kind}", kind, [i for i in scored if first[i]["kind"] == kind]) for kind in kinds]
    for name, kind, items in groups:
        add(name, items, {cell: [lines[i]["correct"] for i in items] for cell, lines in answers.items()}, kind)
    references = {
        (file, question.id): question.references
        for file, path in stored_questions(comparison.output).items()
        for question in read_questions(path)
        if question.references
    }
    described = [i for i, line in enumerate(first) if (line["file"], line["question_id"]) in references]
    if described:
        texts = [references[first[i]["file"], first[i]["question_id"]] for i in described]
        each = {cell: cider([lines[i]["text"] for i in described], texts)[1] for cell, lines in answers.items()}
        add("cider_d", described, each)
    return found


def compare_scores(
    comparison: Comparison, found: dict[str, ItemScores]
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """(encoder → metric → figure, differences of every pair in every metric)."""
    names, seeds = encoder_names(comparison), comparison.seeds
    summary: dict[str, dict[str, Any]] = {encoder: {} for encoder in names}
    differences = []
    for name, metric in found.items():
        bootstrap, items = Bootstrap(metric.clusters, seeds=seeds), len(metric.clusters)
        for encoder, scores in metric.by_encoder.items():
            estimate = bootstrap.interval(scores)
            figure = over_seeds(scores.mean(1).tolist()) | {"ci95": [estimate.low, estimate.high]}
            summary[encoder][name] = figure | {"items": items, "kind": metric.kind}
        for a, b in combinations(names, 2):
            between = metric.by_encoder[a] - metric.by_encoder[b]
            estimate = bootstrap.interval(between)
            row: dict[str, Any] = {"a": a, "b": b, "metric": name, "kind": metric.kind}
            row |= {"mean": estimate.mean, "ci95": [estimate.low, estimate.high]}
            row |= {"seeds": seeds, "items": items, "verdict": estimate.verdict}
            row |= {"items_needed": bootstrap.items_needed(between), "p_mcnemar": None, "p_holm": None}
            if name != "cider_d":
                test = mcnemar(metric.by_encoder[a], metric.by_encoder[b])
                row |= {"p_mcnemar": test.p, "p_holm": test.p, "wins": test.wins, "losses": test.losses}
            differences.append(row)
    for pair in combinations(names, 2):  # the kinds of one pair are one family; accuracy is one of its own
        family = [row for row in differences if (row["a"], row["b"]) == pair and row["kind"] is not None]
        for row, p in zip(family, holm([row["p_mcnemar"] for row in family]), strict=True):
            row["p_holm"] = p
    return summary, differences


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation (None of one seed) of a figure, and its value of each seed."""
    return {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else None, "by_seed": list(values)}


def pick_examples(comparison: Comparison, answers: dict[Cell, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Questions that one of the first two encoders got right and the other did not, drawn at random, seed 0.

    As many of each way as there are, up to `EXAMPLES`: the examples show how models differ, not how often.
    """
    a, b = encoder_names(comparison)[:2]
    cells = [cell for cell in cells_of(comparison) if cell.seed == 0]
    first, second = (next(cell for cell in cells if cell.encoder == encoder) for encoder in (a, b))
    order = np.random.default_rng(0).permutation(len(answers[first]))
    shown, left = [], {True: EXAMPLES, False: EXAMPLES}
    for i in order:
        x, y = answers[first][i], answers[second][i]
        if "correct" in x and x["correct"] != y["correct"] and left[x["correct"]]:
            left[x["correct"]] -= 1
            example = {"image": x.get("image"), "question": x["prompt"], "truth": x["expected"], "kind": x["kind"]}
            shown.append(example | {"answers": {a: x["text"], b: y["text"]}, "right": a if x["correct"] else b})
    return sorted(shown, key=lambda example: example["right"] != a)


def compare_benchmarks(comparison: Comparison) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """As `compare_scores`, of what lmms-eval measured. Its items are not here: intervals are over seeds only."""
    by_encoder: dict[str, list[dict[str, float]]] = defaultdict(list)
    for cell in cells_of(comparison):
        by_encoder[cell.encoder].append(benchmark_results(cell.directory, comparison.benchmarks))
    every = [results for rows in by_encoder.values() for results in rows]
    names = [name for name in every[0] if all(name in results for results in every)]
    summary = {e: {name: over_seeds([row[name] for row in rows]) for name in names} for e, rows in by_encoder.items()}
    differences = []
    for a, b in combinations(encoder_names(comparison), 2):
        for name in names:
            between = [x[name] - y[name] for x, y in zip(by_encoder[a], by_encoder[b], strict=True)]
            row = {"a": a, "b": b, "metric": name, "mean": mean(between), "ci95": None, "seeds": comparison.seeds}
            if comparison.seeds > 1:
                interval = stats.ttest_1samp(between, 0.0).confidence_interval()
                row["ci95"] = [float(interval.low), float(interval.high)]
            differences.append(row)
    return summary, differences
