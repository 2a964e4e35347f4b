"""From the answers and benchmarks of a comparison's cells to what each encoder's models can do, and how they differ.

Scores are fractions. Shapes: R runs of an encoder · S of them that are independent · I items.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean, stdev
from typing import Any

import numpy as np
from scipy import stats

from clips.common.errors import UserError
from clips.common.rundir import UNSEEN
from mllm.compare.benchmarks import benchmark_results
from mllm.compare.cells import Cell, cells_of, encoder_groups, encoder_names
from mllm.compare.comparison import Comparison
from mllm.compare.plan import stored_questions
from mllm.compare.statistics import holm, independent_runs, interval, labels, mcnemar, over_groups
from mllm.compare.variance import Spread, spread
from mllm.data.questions import UNSEEN_ANSWERS, read_questions
from mllm.evaluation.cider import cider
from mllm.evaluation.scores import exactness

ASKED = ("question_id", "prompt", "image", "kind", "expected")
"""What all cells' lines of answers must have in common."""
EXAMPLES = 6
"""Questions shown for each of the two ways in which a pair of models can differ."""
POINTS = (0.01, 0.02, 0.05)
"""Differences for which the report says how many seeds and pictures they need."""
SEEN = "seen"
COLUMNS = {"answers": SEEN, "descriptions": SEEN, UNSEEN_ANSWERS: UNSEEN}
"""File of answers to the demo's questions → what sort of pictures it is about; any other file is a sort of its own."""
NEEDS_PICTURE = "needs_picture"
"""The metric over the questions of the deciding column that blind models do not answer."""


@dataclass
class ItemScores:
    """One metric of every encoder's models, item by item, and the pictures that the items are about."""

    clusters: list[str]
    """One for each item; items of one picture are drawn together."""
    by_encoder: dict[str, np.ndarray]
    """Encoder → [R, I]."""
    column: str
    """Of the set of questions."""
    kind: str | None = None
    """The kind of question, where the metric is about one kind only."""


# ---------------------------------------------------------------------------------------------- downstream
def read_answers(comparison: Comparison) -> dict[Cell, list[dict[str, Any]]]:
    """Each cell's answers, all question files together; UserError naming a cell that was asked something else."""
    answers: dict[Cell, list[dict[str, Any]]] = {}
    cells = cells_of(comparison)
    for cell in cells:
        files = [cell.evaluation / f"{name}.jsonl" for name in stored_questions(comparison.output)]
        answers[cell] = [json.loads(line) | {"file": f.stem} for f in files for line in f.read_bytes().splitlines()]
        asked = [{key: line.get(key) for key in ASKED} for line in answers[cell]]
        first = cells[0]
        if asked != [{key: line.get(key) for key in ASKED} for line in answers[first]]:
            raise UserError(
                f"cell {cell.name} answered other questions than {first.name}: remove {cell.evaluation} and run "
                "the comparison again"
            )
    return answers


def columns_of(answers: dict[Cell, list[dict[str, Any]]]) -> list[str]:
    """The sorts of pictures that were asked about, the deciding one first: those of unseen artists, where there are."""
    first = next(iter(answers.values()))
    found = dict.fromkeys(COLUMNS.get(line["file"], line["file"]) for line in first)
    return sorted(found, key=lambda column: column != UNSEEN)


def item_scores(comparison: Comparison, answers: dict[Cell, list[dict[str, Any]]]) -> dict[str, ItemScores]:
    """`accuracy`, `accuracy/KIND` of each kind of question, and `cider_d` where there are references.

    Of another column than the deciding one a metric's name ends with @COLUMN. `needs_picture` is the accuracy over
    the deciding column without the questions that blind models answer, for all others than these.
    """
    columns = columns_of(answers)
    deciding, found = columns[0], {}
    for column in columns:
        suffix = "" if column == deciding else f"@{column}"
        for name, metric in _scores_of_column(comparison, answers, column).items():
            found[name + suffix] = metric
    overall = found.get("accuracy")
    if overall is not None:
        left, blind = ~solved_blind(comparison, overall), _blind(comparison)
        if left.any() and not left.all():
            clusters = [cluster for cluster, is_left in zip(overall.clusters, left, strict=True) if is_left]
            seeing = {name: scores[:, left] for name, scores in overall.by_encoder.items() if name not in blind}
            found[NEEDS_PICTURE] = ItemScores(clusters, seeing, deciding)
    return found


def _scores_of_column(
    comparison: Comparison, answers: dict[Cell, list[dict[str, Any]]], column: str
) -> dict[str, ItemScores]:
    cells = cells_of(comparison)
    first = answers[cells[0]]
    clusters = [line.get("image") or f"question {line['question_id']}" for line in first]
    found: dict[str, ItemScores] = {}

    def add(name: str, items: list[int], scores: Mapping[Cell, Sequence[float]], kind: str | None = None) -> None:
        by_encoder = defaultdict(list)
        for cell in cells:
            by_encoder[cell.encoder].append([float(value) for value in scores[cell]])
        arrays = {encoder: np.array(rows) for encoder, rows in by_encoder.items()}
        found[name] = ItemScores([clusters[i] for i in items], arrays, column, kind)

    of_column = [i for i, line in enumerate(first) if COLUMNS.get(line["file"], line["file"]) == column]
    scored = [i for i in of_column if "correct" in first[i]]
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
    described = [i for i in of_column if (first[i]["file"], first[i]["question_id"]) in references]
    if described:
        texts = [references[first[i]["file"], first[i]["question_id"]] for i in described]
        each = {cell: cider([lines[i]["text"] for i in described], texts)[1] for cell, lines in answers.items()}
        add("cider_d", described, each)
    return found


def compare_scores(
    comparison: Comparison, found: dict[str, ItemScores]
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """(encoder → metric → figure, differences of every pair in every metric)."""
    names = encoder_names(comparison)
    summary: dict[str, dict[str, Any]] = {encoder: {} for encoder in names}
    differences = []
    for name, metric in found.items():
        clusters, items = labels(metric.clusters), len(metric.clusters)
        about = {"items": items, "kind": metric.kind, "column": metric.column}
        for encoder, scores in metric.by_encoder.items():
            groups = independent_runs(encoder_groups(comparison, encoder))
            estimate = interval(over_groups(scores, groups), clusters)
            figure = over_seeds(scores.mean(1).tolist(), groups) | {"ci95": [estimate.low, estimate.high]} | about
            split = _spread(comparison, scores, clusters, encoder)
            summary[encoder][name] = figure | {"variance": split.shares() if split else {}}
        for a, b in combinations([encoder for encoder in names if encoder in metric.by_encoder], 2):
            between = metric.by_encoder[a] - metric.by_encoder[b]
            groups = independent_runs(encoder_groups(comparison, a, b))
            estimate, split = (
                interval(over_groups(between, groups), clusters),
                _spread(comparison, between, clusters, a, b),
            )
            row: dict[str, Any] = {"a": a, "b": b, "metric": name} | about
            row |= {"mean": estimate.mean, "ci95": [estimate.low, estimate.high], "verdict": estimate.verdict}
            row |= {"seeds": len(set(groups.tolist())), "runs": len(groups), "p_mcnemar": None, "p_holm": None}
            row |= {"variance": split.shares() if split else {}}
            row |= {"items_needed": split.items_needed(abs(estimate.mean)) if split else None}
            if not name.startswith("cider_d"):
                row["needed"] = {f"{100 * points:g}": split.needed(points) for points in POINTS} if split else {}
                test = mcnemar(metric.by_encoder[a], metric.by_encoder[b])
                row |= {"p_mcnemar": test.p, "p_holm": test.p, "wins": test.wins, "losses": test.losses}
            differences.append(row)
    # The kinds of one pair and column are one family; accuracy is one of its own.
    families: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in differences:
        if row["kind"] is not None:
            families[row["a"], row["b"], row["column"]].append(row)
    for family in families.values():
        for row, p in zip(family, holm([row["p_mcnemar"] for row in family]), strict=True):
            row["p_holm"] = p
    return summary, differences


def _spread(comparison: Comparison, scores: np.ndarray, clusters: np.ndarray, *encoders: str) -> Spread | None:
    """How the variance of `scores` [R, I] of these encoders splits; None of a single item."""
    runs, items = np.arange(len(scores)), np.arange(scores.shape[1])
    seeds = (("pretraining seed", encoder_groups(comparison, *encoders)), ("LLaVA seed", runs))
    return spread(scores, seeds, (("picture", clusters), ("question", items))) if len(items) > 1 else None


def over_seeds(values: Sequence[float], groups: np.ndarray) -> dict[str, Any]:
    """Mean and standard deviation (None of one) over `groups` of runs, and the figure of every run (`by_seed`)."""
    each = over_groups(np.array(values), groups).tolist()
    return {"mean": mean(each), "sd": stdev(each) if len(each) > 1 else None, "by_seed": list(values)}


# ---------------------------------------------------------------------------------------------- questions and answers
def _blind(comparison: Comparison) -> set[str]:
    return {cell.encoder for cell in cells_of(comparison) if cell.kind == "blind"}


def solved_blind(comparison: Comparison, overall: ItemScores) -> np.ndarray:
    """[I]: whether blind models answer an item right in more than half of their runs."""
    runs = [overall.by_encoder[name] for name in sorted(_blind(comparison))]
    return np.concatenate(runs).mean(0) > 0.5 if runs else np.zeros(len(overall.clusters), dtype=bool)


def blind_questions(
    comparison: Comparison, answers: dict[Cell, list[dict[str, Any]]], overall: ItemScores
) -> dict[str, Any]:
    """Of the deciding column: how many questions of each kind, and with which answers, blind models answer; their ids.

    `overall` is `accuracy` of `item_scores`. Empty where no blind models were compared.
    """
    deciding = overall.column
    if not _blind(comparison):
        return {}
    marked, first = solved_blind(comparison, overall), next(iter(answers.values()))
    lines = [line for line in first if COLUMNS.get(line["file"], line["file"]) == deciding and "correct" in line]
    solved = [line for line, is_solved in zip(lines, marked, strict=True) if is_solved]
    kinds: dict[str, Any] = {}
    for kind in dict.fromkeys(line["kind"] for line in lines):
        expected = Counter(line["expected"] for line in solved if line["kind"] == kind)
        questions = sum(line["kind"] == kind for line in lines)
        kinds[kind] = {"solved": expected.total(), "questions": questions, "answers": dict(expected.most_common())}
    return {"questions": len(lines), "solved": [line["question_id"] for line in solved], "kinds": kinds}


def loose_answers(comparison: Comparison, answers: dict[Cell, list[dict[str, Any]]]) -> dict[str, Any]:
    """Encoder → how often, over all runs, an answer is right only when read loosely (scores.exactness), examples."""
    found: dict[str, Any] = {}
    for encoder in encoder_names(comparison):
        lines = [line for cell, of_cell in answers.items() if cell.encoder == encoder for line in of_cell]
        scored = [line for line in lines if "correct" in line]
        by_way: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for line in scored:
            by_way[exactness(line["text"], line["expected"])].append(line)
        found[encoder] = {"answers": len(scored)}
        for way in ("normalised", "prefix"):
            shown = Counter((line["text"], line["expected"]) for line in by_way[way]).most_common(EXAMPLES)
            examples = [{"text": text, "expected": expected, "times": times} for (text, expected), times in shown]
            found[encoder][way] = {"count": len(by_way[way]), "examples": examples}
    return found


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
    encoders = encoder_names(comparison)
    for cell in cells_of(comparison):
        by_encoder[cell.encoder].append(benchmark_results(cell.directory, comparison.benchmarks))
    every = [results for rows in by_encoder.values() for results in rows]
    names = [name for name in every[0] if all(name in results for results in every)]
    summary: dict[str, dict[str, Any]] = {}
    for e in encoders:
        groups = independent_runs(encoder_groups(comparison, e))
        summary[e] = {name: over_seeds([row[name] for row in by_encoder[e]], groups) for name in names}
    differences = []
    for a, b in combinations(encoders, 2):
        groups = independent_runs(encoder_groups(comparison, a, b))
        for name in names:
            runs = np.array([x[name] - y[name] for x, y in zip(by_encoder[a], by_encoder[b], strict=True)])
            between = over_groups(runs, groups)
            row = {"a": a, "b": b, "metric": name, "mean": float(between.mean()), "ci95": None, "seeds": len(between)}
            if len(between) > 1:
                found = stats.ttest_1samp(between, 0.0).confidence_interval()
                row["ci95"] = [float(found.low), float(found.high)]
            differences.append(row)
    return summary, differences
