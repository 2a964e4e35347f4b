"""What a comparison's cells left as figures: what each encoder's models can do, how they differ, and report.json.

Everything but when, where and by which command comes from the files in the comparison's directory, without a model and
without torch: verify.py computes it again from the same files elsewhere.

Scores are fractions. Shapes: R runs of an encoder · S of them that are independent · I items.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from clips.common.errors import UserError
from clips.common.files import read_json, sha256, write_json
from clips.common.rundir import METRICS
from clips.lab.grid import COST, RECORD, what_was_fixed
from clips.lab.stats import (
    FEWEST_SEEDS,
    Estimate,
    detectable,
    independent_runs,
    interval,
    labels,
    over_groups,
    over_runs,
    shared_runs,
    verdict,
)
from mllm.compare.comparison import (
    COLUMNS,
    PLAN,
    Comparison,
    EncoderCell,
    columns_of,
    is_pretrained_anew,
    of_deciding_column,
    samples_seen,
    stored_questions,
)
from mllm.data.questions import LIKELIHOODS, images_of, read_questions
from mllm.encoders.registry import parse_vision_name
from mllm.evaluation.cider import cider
from mllm.evaluation.scores import Exactness, exactness, scorer_version
from mllm.training.stages import STAGES

ASKED = ("question_id", "prompt", "image", "kind", "expected")
"""All cells' lines of answers must agree in these."""
EXAMPLES = 6
"""Of each way in which a pair of models can differ."""
LOOSE_WAYS: tuple[Exactness, ...] = ("normalised", "prefix")
NEEDS_PICTURE = "needs_picture"
NOT_IN_PERCENT = ("cider_d", "log_likelihood")
REPORT = "report.json"
ENCODERS = "encoders.json"
"""Cell → the figures of its encoder alone, and what its pretraining saw."""
RECORDS = (
    *(RECORD, "config.json", "env.json", COST, "evaluation/figures.json"),
    *(f"{stage.name}/done.json" for stage in STAGES.values()),
)
Lines = dict[EncoderCell, list[dict[str, Any]]]
NO_ANSWER = " in generating"
"""What lmms-eval logs if `generate` raised. It scores an empty answer then."""
PROBE = "probe_tokens_top1"
"""Linear probe on the mean of the tokens that the projector sees, the same way for every encoder."""
RUN_VARIANCE = 1.03e-3
ENCODER_VARIANCE = 1.03e-3
ANSWER_VARIANCE = 5.4e-4
PICTURE_VARIANCE = 0.1e-4
"""Of the difference in right answers between two encoders: between LLaVA runs on the same encoders, between
pretrainings, and, both at `OF_QUESTIONS` questions, by luck with single answers and with pictures. More questions
reduce the last two alone. tests/data/lab/real/encoders.json gives the sum of the first three over all pairs of
pretrained encoders, and the third by the shares of right answers; tests/unit/mllm/test_compare_archive.py computes
both. No crossed comparison has split the rest yet: half is assumed for each."""
OF_QUESTIONS = 800


@dataclass
class ItemScores:
    """One metric of every encoder's models, item by item."""

    clusters: np.ndarray
    """[I] names of pictures: items of one picture are drawn together."""
    by_encoder: dict[str, np.ndarray]
    """Encoder → [R, I]."""
    column: str
    kind: str | None = None

    def only(self, items: np.ndarray, kind: str | None = None) -> ItemScores:
        """The same for the items that the mask `items` [I] chooses."""
        by_encoder = {name: scores[:, items] for name, scores in self.by_encoder.items()}
        return ItemScores(self.clusters[items], by_encoder, self.column, kind)


# ------------------------------------------------------------------------------------------- report.json
def keep_encoders(output: Path, measured: Mapping[EncoderCell, dict[str, dict[str, Any]]]) -> None:
    """Write OUTPUT/encoders.json; `measured` are the encoders' own figures (mllm/compare/probe.py)."""
    records = {cell.name: {"figures": own, "pretraining": _pretraining(cell)} for cell, own in measured.items()}
    write_json(output / ENCODERS, records)


def collect(comparison: Comparison, plan: Mapping[str, Any], command: Sequence[str]) -> dict[str, Any]:
    """The content of report.json, by the plan that the comparison has now (mllm/compare/comparison.py)."""
    machine = {"cores": os.cpu_count(), "jobs": comparison.jobs}
    return {
        "command": shlex.join(["python", *command]),
        "time": time.strftime("%Y-%m-%d %H:%M %Z"),
        "environment": comparison.cells[0].read("env.json") | machine,
        **computed(comparison, plan),
    }


def computed(comparison: Comparison, plan: Mapping[str, Any]) -> dict[str, Any]:
    """What report.json says by the files of the comparison."""
    cells = comparison.cells
    answers = read_answers(comparison) if plan["questions"] else {}
    scores = item_scores(comparison, answers) if answers else {}
    fixed = what_was_fixed(comparison.output / PLAN, plan)
    metrics, differences = compare_scores(comparison, scores, kept=fixed["kept"])
    benchmarks, benchmark_differences = compare_benchmarks(comparison)

    on_answers: dict[str, Any] = {"loose_answers": loose_answers(comparison, answers)} if answers else {}
    if "accuracy" in scores:
        on_answers["blind_questions"] = blind_questions(comparison, answers, scores["accuracy"])
    return {
        "plan": plan,
        "fixed": fixed,
        "scorer": scorer_version(),
        "settings": _settings(comparison, plan) | {"columns": columns_of(stored_questions(comparison.output))},
        "encoders": {
            name: {"metrics": metrics[name], "benchmarks": benchmarks.get(name, {})} | _encoder(comparison, name)
            for name in comparison.names
        },
        "differences": differences,
        **on_answers,
        **({"benchmark_differences": benchmark_differences} if comparison.benchmarks else {}),
        "cells": [_cell_record(comparison, cell) for cell in cells],
        "examples": pick_examples(comparison, answers) if answers else [],
        "files": {name: sha256(comparison.output / name) for name in stored_files(comparison)},
    }


def stored_files(comparison: Comparison) -> list[str]:
    """The files that the report rests on, as paths below the comparison's directory, sorted."""
    output, questions = comparison.output, stored_questions(comparison.output)
    files = [output / PLAN, output / ENCODERS, *questions.values()]
    for cell in comparison.cells:
        files += [cell.directory / name for name in RECORDS]
        files += [cell.evaluation / f"{name}.jsonl" for name in questions]
        files += [results for task in comparison.benchmarks if (results := newest_results(cell.directory, task))]
    return sorted(path.relative_to(output).as_posix() for path in files if path.is_file())


def _encoder(comparison: Comparison, name: str) -> dict[str, Any]:
    """What an encoder is, its own figures, and what its cells cost."""
    cells = [cell for cell in comparison.cells if cell.encoder == name]
    groups = independent_runs(encoder_groups(comparison, name))
    records = read_json(comparison.output / ENCODERS)
    own = [records[cell.name] for cell in cells]
    by_run = [record["figures"] for record in own]
    intrinsic = {}
    for figure, first in by_run[0].items():
        if all(figure in figures for figures in by_run):
            about = {"chance": first["chance"], "items": first["items"], "test_set": first.get("test_set")}
            intrinsic[figure] = over_seeds([figures[figure]["value"] for figures in by_run], groups) | about
    return {
        "kind": cells[0].kind,
        "intrinsic": intrinsic,
        "described": cells[0].read("config.json")["instruct"]["facts"]["vision encoder"],
        "pretraining": [record["pretraining"] for record in own if record["pretraining"]],
        "cost": _cost(cells),
    }


def _settings(comparison: Comparison, plan: Mapping[str, Any]) -> dict[str, Any]:
    cells = comparison.cells
    cell = cells[0]
    config = cell.read("config.json")
    stages = {}
    for stage in STAGES.values():
        trains = config[stage.name]["trains"]
        done = cell.read(f"{stage.name}/done.json")
        stages[stage.name] = {
            **{name: done[name] for name in ("samples", "steps")},
            **{name: trains[name] for name in ("batch_size", "learning_rate")},
            "trains": config[stage.name]["freeze"],
            "projector": plan["budget"]["projector"][stage.name],
        }
    return {
        "encoders": list(comparison.encoders),
        "seeds": comparison.seeds,
        "llava_runs": comparison.runs,
        "quick": comparison.quick,
        "budget_share": plan["budget"]["share"],
        "distinct_encoders": {
            name: len({cell.fingerprint() for cell in cells if cell.encoder == name}) for name in comparison.names
        },
        "is_demo": plan["is_demo"],
        "train_flags": list(comparison.train_flags),
        "language_model": config["instruct"]["facts"]["language model"],
        "stages": stages,
        "evaluation": cell.read(RECORD)["evaluation"],
        "benchmarks": list(comparison.benchmarks),
    }


def _cell_record(comparison: Comparison, cell: EncoderCell) -> dict[str, Any]:
    return {
        **{name: getattr(cell, name) for name in ("encoder", "pretraining_seed", "seed", "run")},
        "vision": cell.read(RECORD)["vision"],
        "directory": cell.directory.relative_to(comparison.output).as_posix(),
        "config": cell.read("config.json"),
        "figures": read_json(cell.figures),
        "benchmarks": benchmark_results(cell.directory, comparison.benchmarks),
        "cost": cell.read(COST),
    }


def _pretraining(cell: EncoderCell) -> dict[str, Any] | None:
    """What a run of clips/ behind this cell's encoder saw; None for an encoder from elsewhere."""
    run = cell.pretraining_run
    if run is None or not (run / "config.json").is_file() or not (run / METRICS).is_file():
        return None
    config = read_json(run / "config.json")
    return {"run": str(run), "recipe": config["recipe"], "seed": config["train"]["seed"]} | samples_seen(run)


def _cost(cells: list[EncoderCell]) -> dict[str, float]:
    """Means over the cells: wall-clock seconds of each part, training speed, the largest memory.

    A killed command leaves a part without its time, if the part itself was finished.
    """
    costs = [cell.read(COST) for cell in cells]
    every = dict.fromkeys(part for of_cell in costs for part in of_cell)
    parts = {part: mean(of_cell[part] for of_cell in costs if part in of_cell) for part in every}
    cost = parts | {"seconds": sum(parts.values())}
    for stage in STAGES.values():
        done = [cell.read(f"{stage.name}/done.json") for cell in cells]
        cost[f"{stage.name}_samples_per_s"] = mean(row["samples_per_s"] for row in done)
        cost["peak_memory_gb"] = max(cost.get("peak_memory_gb", 0.0), *(row["peak_memory_gb"] for row in done))
    return cost


# ------------------------------------------------------------------------------------------- right answers
def read_answers(comparison: Comparison) -> Lines:
    """Each cell's answers, all question files together; UserError naming a cell that was asked something else."""
    answers: Lines = {}
    cells = comparison.cells
    for cell in cells:
        answers[cell] = []
        for name in stored_questions(comparison.output):
            lines = (cell.evaluation / f"{name}.jsonl").read_bytes().splitlines()
            answers[cell] += [json.loads(line) | {"file": name} for line in lines]
        questions = [[{key: line.get(key) for key in ASKED} for line in answers[c]] for c in (cell, cells[0])]
        if questions[0] != questions[1]:
            raise UserError(f"cell {cell.name} answered other questions than {cells[0].name}: remove {cell.evaluation}")
    return answers


def item_scores(comparison: Comparison, answers: Lines) -> dict[str, ItemScores]:
    """`accuracy`, `accuracy/KIND` of each kind of question, and `cider_d` of questions with references. Likewise
    `log_likelihood` and `share` if the cells measured them.

    The name of a metric of another column than the deciding one ends with @COLUMN. `needs_picture` is the accuracy over
    the deciding column without the questions that blind models answer, for all other encoders.
    """
    first = next(iter(answers.values()))
    deciding, *others = columns_of(line["file"] for line in first)
    metrics = _scores_of_column(comparison, answers, deciding)
    for column in others:
        of_column = _scores_of_column(comparison, answers, column)
        metrics |= {f"{name}@{column}": metric for name, metric in of_column.items()}

    overall = metrics.get("accuracy")
    if overall is not None:
        left = ~solved_blind(comparison, overall)
        if left.any() and not left.all():
            metric = metrics[NEEDS_PICTURE] = overall.only(left)
            for name in _blind(comparison):
                del metric.by_encoder[name]
    return metrics


def _scores_of_column(comparison: Comparison, answers: Lines, column: str) -> dict[str, ItemScores]:
    first = next(iter(answers.values()))
    items = [i for i, line in enumerate(first) if COLUMNS.get(line["file"], line["file"]) == column]
    scored = [i for i in items if "correct" in first[i]]
    metrics: dict[str, ItemScores] = {}
    kinds = np.array([first[i]["kind"] for i in scored])
    for field in ("correct", *LIKELIHOODS) if scored else ():
        if field not in first[scored[0]]:
            continue
        name = "accuracy" if field == "correct" else field
        values = {cell: [float(lines[i][field]) for i in scored] for cell, lines in answers.items()}
        overall = metrics[name] = _item_scores(first, scored, values, column)
        for kind in dict.fromkeys(kinds.tolist()) if len(set(kinds)) > 1 else ():
            metrics[f"{name}/{kind}"] = overall.only(kinds == kind, kind)

    references = {
        (file, question.id): question.references
        for file, path in stored_questions(comparison.output).items()
        for question in read_questions(path)
    }
    described = [i for i in items if references.get((first[i]["file"], first[i]["question_id"]))]
    if described:
        texts = [references[first[i]["file"], first[i]["question_id"]] for i in described]
        values = {cell: cider([lines[i]["text"] for i in described], texts)[1] for cell, lines in answers.items()}
        metrics["cider_d"] = _item_scores(first, described, values, column)
    return metrics


def _item_scores(
    first: Sequence[Mapping[str, Any]], items: Sequence[int], values: Mapping[EncoderCell, list[float]], column: str
) -> ItemScores:
    """Scores of the `items` of the `first` cell's lines; `values`: cell → score of each item."""
    clusters = np.array([" ".join(images_of(first[i])) or f"question {first[i]['question_id']}" for i in items])
    rows = defaultdict(list)
    for cell, of_cell in values.items():
        rows[cell.encoder].append(of_cell)
    return ItemScores(clusters, {encoder: np.array(of_runs) for encoder, of_runs in rows.items()}, column)


def compare_scores(
    comparison: Comparison, scored: dict[str, ItemScores], *, kept: bool = True
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """(encoder → metric → figure, differences of every pair in every metric); `kept`: to the plan, as verdicts need."""
    names = comparison.names
    summary: dict[str, dict[str, Any]] = {encoder: {} for encoder in names}
    differences = []
    for name, metric in scored.items():
        clusters = labels(metric.clusters.tolist())
        about = {"items": len(clusters), "kind": metric.kind, "column": metric.column}
        for encoder, scores in metric.by_encoder.items():
            groups, estimate = _estimated(comparison, scores, clusters, encoder)
            summary[encoder][name] = {**over_seeds(scores.mean(1).tolist(), groups), "ci95": estimate.ci95, **about}
        for a, b in combinations([encoder for encoder in names if encoder in metric.by_encoder], 2):
            between = metric.by_encoder[a] - metric.by_encoder[b]
            groups, estimate = _estimated(comparison, between, clusters, a, b)
            by_seed = [over_groups(metric.by_encoder[encoder], groups).mean(1).tolist() for encoder in (a, b)]
            row: dict[str, Any] = {
                **{"a": a, "b": b, "metric": name},
                **about,
                **{"mean": estimate.mean, "ci95": estimate.ci95},
                "verdict": verdict(estimate.ci95, *by_seed, kept=kept),
                **{"seeds": int(groups.max()) + 1, "runs": len(groups)},
            }
            differences.append(row)
    return summary, differences


def _estimated(
    comparison: Comparison, scores: np.ndarray, clusters: np.ndarray, *encoders: str
) -> tuple[np.ndarray, Estimate]:
    """Groups of independent runs, and the mean of `scores` [R, I] with its interval."""
    groups = independent_runs(encoder_groups(comparison, *encoders))
    return groups, interval(over_groups(scores, groups), clusters)


def over_seeds(values: Sequence[float], groups: np.ndarray) -> dict[str, Any]:
    """The mean and standard deviation (None of one) over `groups` of runs, and every run's figure."""
    each = over_groups(np.array(values), groups).tolist()
    return {"mean": mean(each), "sd": stdev(each) if len(each) > 1 else None, "by_seed": list(values)}


def compare_benchmarks(comparison: Comparison) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """`compare_scores` of what lmms-eval measured. Its items are not here, so intervals are over seeds only."""
    by_encoder: dict[str, list[dict[str, float]]] = defaultdict(list)
    for cell in comparison.cells:
        by_encoder[cell.encoder].append(benchmark_results(cell.directory, comparison.benchmarks))
    runs = [results for of_encoder in by_encoder.values() for results in of_encoder]
    names = [name for name in runs[0] if all(name in results for results in runs)]

    summary = {}
    for encoder, results in by_encoder.items():
        groups = independent_runs(encoder_groups(comparison, encoder))
        summary[encoder] = {name: over_seeds([row[name] for row in results], groups) for name in names}
    differences = []
    for a, b in combinations(by_encoder, 2):
        groups = independent_runs(encoder_groups(comparison, a, b))
        for name in names:
            between = [x[name] - y[name] for x, y in zip(by_encoder[a], by_encoder[b], strict=True)]
            estimate = over_runs(over_groups(np.array(between), groups))
            row = {"a": a, "b": b, "metric": name, "mean": estimate.mean, "ci95": estimate.ci95}
            differences.append(row | {"seeds": int(groups.max()) + 1})
    return summary, differences


# ------------------------------------------------------------------------------------------- runs and power
def encoder_groups(comparison: Comparison, *names: str) -> np.ndarray:
    """[R] numbers from 0: runs with the same number share an encoder of those called `names` (stats.shared_runs).

    Runs of a pretraining seed share the encoders that are trained anew. `random` is another encoder in every run.
    All others are the same in all runs, also `blind`, which sees nothing.
    """
    runs = np.arange(comparison.runs)
    of_kind = {True: runs % comparison.seeds, "random": runs}
    named = [arm.encoder for arm in comparison.arms if arm.name in names]
    keys = [is_pretrained_anew(encoder) or parse_vision_name(encoder)[0] for encoder in named]
    return shared_runs([of_kind.get(key, 0 * runs) for key in keys])


def detectable_difference(comparison: Comparison, questions: int) -> float:
    """Return the difference that a comparison of this design sees with 80 % power, by the spreads of the demo."""
    groups = encoder_groups(comparison, *comparison.names)
    sizes = np.bincount(independent_runs(groups))
    seeds, runs = len(sizes), len(sizes) ** 2 / float((1 / sizes).sum())  # runs of unequal weight
    luck = ANSWER_VARIANCE * OF_QUESTIONS / questions / runs
    pretraining = ENCODER_VARIANCE / seeds if groups.max() > 0 else 0.0
    pictures = PICTURE_VARIANCE * OF_QUESTIONS / questions
    return detectable(pretraining + RUN_VARIANCE / runs + luck, pictures, luck, seeds, questions)


def power_in_words(comparison: Comparison) -> str:
    """What the comparison can see, said before anything is trained."""
    seeds = int(independent_runs(encoder_groups(comparison, *comparison.names)).max()) + 1
    if seeds < FEWEST_SEEDS:
        return f"{seeds} independent seed(s) are a look, without verdicts; --seeds {FEWEST_SEEDS} gives verdicts"
    by_file = {name: comparison.asked(path) for name, path in comparison.question_files()[0].items()}
    points = 100 * detectable_difference(comparison, len(of_deciding_column(by_file)))
    spreads = "the spreads measured on the demo" if comparison.is_demo else "the demo's spreads, for want of its own"
    return f"a difference of {points:.1f} points is seen in 80 of 100 such comparisons, by {spreads}"


# ------------------------------------------------------------------------------------------- questions and answers
def _blind(comparison: Comparison) -> set[str]:
    return {cell.encoder for cell in comparison.cells if cell.kind == "blind"}


def solved_blind(comparison: Comparison, overall: ItemScores) -> np.ndarray:
    """[I]: whether blind models answer an item right in more than half of their runs."""
    runs = [overall.by_encoder[name] for name in sorted(_blind(comparison))]
    return np.concatenate(runs).mean(0) > 0.5 if runs else np.zeros(len(overall.clusters), dtype=bool)


def blind_questions(comparison: Comparison, answers: Lines, overall: ItemScores) -> dict[str, Any]:
    """Questions of the deciding column that blind models answer: of each kind how many, their answers; their ids.

    `overall` is `accuracy` of `item_scores`. Empty if no blind models were compared.
    """
    if not _blind(comparison):
        return {}
    marked, first = solved_blind(comparison, overall), next(iter(answers.values()))
    lines = [line for line in first if COLUMNS.get(line["file"], line["file"]) == overall.column and "correct" in line]
    solved = [line for line, is_solved in zip(lines, marked, strict=True) if is_solved]
    kinds: dict[str, Any] = {}
    for kind in dict.fromkeys(line["kind"] for line in lines):
        expected = Counter(line["expected"] for line in solved if line["kind"] == kind)
        questions = sum(line["kind"] == kind for line in lines)
        kinds[kind] = {"solved": expected.total(), "questions": questions, "answers": dict(expected.most_common())}
    return {"questions": len(lines), "solved": [line["question_id"] for line in solved], "kinds": kinds}


def loose_answers(comparison: Comparison, answers: Lines) -> dict[str, Any]:
    """Encoder → how many answers of all its runs are right only if read loosely (scores.exactness)."""
    loose: dict[str, Any] = {}
    for encoder in comparison.names:
        lines = [line for cell, of_cell in answers.items() if cell.encoder == encoder for line in of_cell]
        counts = Counter(exactness(line["text"], line["expected"]) for line in lines if "correct" in line)
        loose[encoder] = {"answers": counts.total()} | {way: {"count": counts[way]} for way in LOOSE_WAYS}
    return loose


def pick_examples(comparison: Comparison, answers: Lines) -> list[dict[str, Any]]:
    """Questions that one of the first two encoders got right and the other did not, drawn at random, seed 0.

    As many of each way as there are, up to `EXAMPLES`: the examples show how models differ, not how often.
    """
    a, b = comparison.names[:2]
    first, second = (next(c for c in answers if c.encoder == encoder) for encoder in (a, b))
    examples = []
    left = {True: EXAMPLES, False: EXAMPLES}
    for i in np.random.default_rng(0).permutation(len(answers[first])):
        x, y = answers[first][i], answers[second][i]
        if "correct" in x and x["correct"] != y["correct"] and left[x["correct"]]:
            left[x["correct"]] -= 1
            example = {"image": next(iter(images_of(x)), None), "question": x["prompt"], "truth": x["expected"]}
            example |= {"kind": x["kind"], "answers": {a: x["text"], b: y["text"]}}
            examples.append(example | {"right": a if x["correct"] else b})
    return sorted(examples, key=lambda example: example["right"] != a)


# ------------------------------------------------------------------------------------------- lmms-eval's scores
def benchmark_folder(cell: Path, task: str) -> Path:
    return cell / "benchmarks" / task


def newest_results(cell: Path, task: str) -> Path | None:
    """The scores of the newest call for `task`; None if there are none."""
    return max(benchmark_folder(cell, task).glob("*/*_results.json"), default=None)  # named by their date


def benchmark_results(cell: Path, tasks: Sequence[str]) -> dict[str, float]:
    """`TASK/METRIC` → value of the tasks that are done; the members of a group each have a value.

    A task is not done if its newest call failed, or if answers are missing.
    """
    scores: dict[str, float] = {}
    for task in tasks:
        file, log = newest_results(cell, task), benchmark_folder(cell, task) / "log.txt"
        if file is None or (log.is_file() and NO_ANSWER in log.read_text(errors="replace", encoding="utf-8")):
            continue
        for name, values in read_json(file)["results"].items():
            for key, value in values.items():
                metric, _, filtered = key.partition(",")  # "exact_match,none": the metric and its filter
                if isinstance(value, (int, float)) and math.isfinite(value) and "_stderr" not in metric:
                    suffix = f" ({filtered})" if filtered not in ("", "none") else ""
                    scores[f"{name}/{metric}{suffix}"] = float(value)
    return scores
