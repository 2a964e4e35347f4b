"""From the cells of a comparison (mllm/compare/run.py) to its figures: what stands in report.json.

Scores are fractions, figures of the encoders themselves percent (as in clips/). Shapes: S seeds · I items.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

from clips.common.errors import UserError
from clips.common.files import write_atomically
from clips.config import DataConfig
from clips.data.images import decode_image
from clips.data.sample import BrokenSample
from clips.evaluation.evaluate import PROBE_SAMPLES, ImageSet, probe_images
from clips.evaluation.testsets import open_test_set
from mllm.compare.plan import RECIPES, Cell, Plan, stage_samples, steps_seen
from mllm.compare.statistics import Bootstrap, holm, mcnemar
from mllm.data.questions import read_questions
from mllm.encoders.encoder import VisionEncoder
from mllm.encoders.registry import image_pixels
from mllm.evaluation.cider import cider
from mllm.training.log import read_json
from mllm.training.prepare import encoder_of
from mllm.training.stages import STAGES

ASKED = ("question_id", "prompt", "image", "kind", "expected")
"""What all cells' lines of answers must have in common."""
EXAMPLES = 6
"""Questions shown for each of the two ways in which a pair of models can differ."""
PROBE = "probe_tokens_top1"
"""Linear probe on the mean of the tokens that the projector sees, the same way for every encoder."""


@dataclass
class Metric:
    """One figure of every model: its items' scores and the pictures they are about."""

    clusters: list[str]
    scores: dict[str, np.ndarray]
    """Encoder → [S, I]."""


# ---------------------------------------------------------------------------------------------- downstream
def read_answers(plan: Plan) -> dict[Cell, list[dict[str, Any]]]:
    """Each cell's answers, all question files together; UserError naming a cell that was asked something else."""
    answers: dict[Cell, list[dict[str, Any]]] = {}
    for cell in plan.cells:
        files = [cell.figures.parent / f"{name}.jsonl" for name in _answer_files(plan)]
        answers[cell] = [json.loads(line) | {"file": f.stem} for f in files for line in f.read_text().splitlines()]
        asked = [{key: line.get(key) for key in ASKED} for line in answers[cell]]
        first = plan.cells[0]
        if asked != [{key: line.get(key) for key in ASKED} for line in answers[first]]:
            raise UserError(
                f"cell {cell.name} answered other questions than {first.name}: remove {cell.figures.parent} and run "
                "the comparison again"
            )
    return answers


def _answer_files(plan: Plan) -> list[str]:
    return [plan.question_file.stem] if plan.question_file else ["answers", "descriptions"]


def metrics(plan: Plan, answers: dict[Cell, list[dict[str, Any]]]) -> dict[str, Metric]:
    """`accuracy`, `accuracy/KIND` of each kind of question, and `cider_d` where there are references."""
    first = answers[plan.cells[0]]
    clusters = [line.get("image") or f"question {line['question_id']}" for line in first]
    found: dict[str, Metric] = {}

    def add(name: str, items: list[int], scores: dict[Cell, Sequence[float]]) -> None:
        by_encoder = defaultdict(list)
        for cell in plan.cells:
            by_encoder[cell.encoder].append([float(value) for value in scores[cell]])
        found[name] = Metric([clusters[i] for i in items], {e: np.array(rows) for e, rows in by_encoder.items()})

    scored = [i for i, line in enumerate(first) if "correct" in line]
    kinds = list(dict.fromkeys(first[i]["kind"] for i in scored))
    groups = {"accuracy": scored}
    if len(kinds) > 1:
        groups |= {f"accuracy/{kind}": [i for i in scored if first[i]["kind"] == kind] for kind in kinds}
    for name, items in groups.items():
        if items:
            add(name, items, {cell: [lines[i]["correct"] for i in items] for cell, lines in answers.items()})
    paths = plan.question_files[0]
    references = {
        (file, question.id): question.references
        for file, path in zip(_answer_files(plan), paths, strict=True)
        for question in read_questions(path)
        if question.references
    }
    described = [i for i, line in enumerate(first) if (line["file"], line["question_id"]) in references]
    if described:
        texts = [references[first[i]["file"], first[i]["question_id"]] for i in described]
        each = {cell: cider([lines[i]["text"] for i in described], texts)[1] for cell, lines in answers.items()}
        add("cider_d", described, each)
    return found


def compare_metrics(plan: Plan, found: dict[str, Metric]) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """(encoder → metric → figure, differences of every pair in every metric)."""
    summary: dict[str, dict[str, Any]] = {encoder: {} for encoder in plan.names}
    differences = []
    for name, metric in found.items():
        bootstrap = Bootstrap(metric.clusters, seeds=plan.seeds)
        for encoder, scores in metric.scores.items():
            estimate = bootstrap.interval(scores)
            summary[encoder][name] = _over_seeds(scores.mean(1).tolist()) | {
                "ci95": [estimate.low, estimate.high],
                "items": len(metric.clusters),
            }
        for a, b in combinations(plan.names, 2):
            between = metric.scores[a] - metric.scores[b]
            estimate = bootstrap.interval(between)
            row = {"a": a, "b": b, "metric": name, "mean": estimate.mean, "ci95": [estimate.low, estimate.high]}
            row |= {"seeds": plan.seeds, "items": len(metric.clusters), "verdict": estimate.verdict}
            row |= {"items_needed": bootstrap.items_needed(between), "p_mcnemar": None, "p_holm": None}
            if name != "cider_d":
                test = mcnemar(metric.scores[a], metric.scores[b])
                row |= {"p_mcnemar": test.p, "p_holm": test.p, "wins": test.wins, "losses": test.losses}
            differences.append(row)
    for pair in combinations(plan.names, 2):  # the kinds of one pair are one family; accuracy is one of its own
        family = [row for row in differences if (row["a"], row["b"]) == pair and "/" in row["metric"]]
        for row, p in zip(family, holm([row["p_mcnemar"] for row in family]), strict=True):
            row["p_holm"] = p
    return summary, differences


def _over_seeds(values: Sequence[float]) -> dict[str, Any]:
    return {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else None, "by_seed": list(values)}


def pick_examples(plan: Plan, answers: dict[Cell, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Questions that one of the first two encoders got right and the other did not, drawn at random, seed 0.

    As many of each way as there are, up to `EXAMPLES`: the examples show how models differ, not how often.
    """
    a, b = plan.names[:2]
    first, second = (next(c for c in plan.cells if c.encoder == encoder and c.seed == 0) for encoder in (a, b))
    order = np.random.default_rng(0).permutation(len(answers[first]))
    shown, left = [], {True: EXAMPLES, False: EXAMPLES}
    for i in order:
        x, y = answers[first][i], answers[second][i]
        if "correct" in x and x["correct"] != y["correct"] and left[x["correct"]]:
            left[x["correct"]] -= 1
            example = {"image": x.get("image"), "question": x["prompt"], "truth": x["expected"], "kind": x["kind"]}
            shown.append(example | {"answers": {a: x["text"], b: y["text"]}, "right": a if x["correct"] else b})
    return sorted(shown, key=lambda example: example["right"] != a)


def benchmark_results(cell: Cell) -> dict[str, float]:
    """`TASK/METRIC` → value of every run of lmms-eval on this cell; the newest counts."""
    results: dict[str, float] = {}
    for path in sorted((cell.directory / "benchmarks").rglob("*results.json"), key=lambda path: path.stat().st_mtime):
        for task, values in json.loads(path.read_text())["results"].items():
            for key, value in values.items():
                metric = key.partition(",")[0]  # "exact_match,none": the metric and its filter
                if isinstance(value, (int, float)) and not metric.endswith("_stderr"):
                    results[f"{task}/{metric}"] = float(value)
    return results


def compare_benchmarks(plan: Plan) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """As `compare_metrics`, of what lmms-eval measured. Its items are not here: intervals are over seeds only."""
    by_encoder: dict[str, list[dict[str, float]]] = defaultdict(list)
    for cell in plan.cells:
        by_encoder[cell.encoder].append(benchmark_results(cell))
    every = [results for rows in by_encoder.values() for results in rows]
    names = [name for name in every[0] if all(name in results for results in every)]
    summary = {e: {name: _over_seeds([row[name] for row in rows]) for name in names} for e, rows in by_encoder.items()}
    differences = []
    for a, b in combinations(plan.names, 2):
        for name in names:
            between = [x[name] - y[name] for x, y in zip(by_encoder[a], by_encoder[b], strict=True)]
            row = {"a": a, "b": b, "metric": name, "mean": mean(between), "ci95": None, "seeds": plan.seeds}
            if plan.seeds > 1:
                interval = stats.ttest_1samp(between, 0.0).confidence_interval()
                row["ci95"] = [float(interval.low), float(interval.high)]
            differences.append(row)
    return summary, differences


# ---------------------------------------------------------------------------------------------- the encoders
def measure_encoders(plan: Plan, device: torch.device) -> dict[Cell, dict[str, dict[str, float]]]:
    """Cell → figure → value, chance, items of its encoder, in percent.

    The linear probe is measured here, on the demo, in the same way for every encoder; retrieval and zero-shot are what
    the encoder's own run directory holds (evaluation*.json), which random, blind and foreign encoders have not.
    """
    measured = {}
    sets = [_labelled("train", PROBE_SAMPLES), _labelled("test", None)] if plan.is_demo else []
    for cell in tqdm(plan.cells, desc="linear probes", unit="encoder", disable=not plan.is_demo):
        figures: dict[str, dict[str, float]] = {}
        run = Path(cell.vision.partition(":")[2]) if cell.vision.partition(":")[0] in RECIPES else None
        for path in sorted(run.glob("evaluation*.json")) if run else []:
            found = read_json(path)
            prefix = "" if path.stem == "evaluation" else f"{found['test_set']}: "
            figures |= {f"{prefix}{name}": figure for name, figure in found["figures"].items()}
        if plan.is_demo:
            path = plan.output / "probes" / f"{_fingerprint(cell)[:32]}.json"
            if not path.is_file():
                encoder = encoder_of(plan.arguments(cell, 2))
                figure = probe_images(*(_image_set(encoder, labelled, device) for labelled in sets))
                path.parent.mkdir(exist_ok=True)
                write_atomically(path, json.dumps(vars(figure)) + "\n")
            figures[PROBE] = read_json(path)
        measured[cell] = figures
    return measured


def _labelled(split: str, limit: int | None) -> list[tuple[bytes, str]]:
    """Encoded image and class of the demo's labelled scenes, among the first `limit` of a fixed shuffle."""
    items, _ = open_test_set(DataConfig(train="demo"), split)
    chosen = torch.randperm(len(items), generator=torch.Generator().manual_seed(0)).tolist()[:limit]
    found = [items.read(index) for index in sorted(chosen)]
    return [(item.image, item.label) for item in found if item.label is not None]


@torch.inference_mode()
def _image_set(encoder: VisionEncoder, labelled: list[tuple[bytes, str]], device: torch.device) -> ImageSet:
    model, pooled, labels, skipped = encoder.model.to(device), [], [], []
    for start in range(0, len(labelled), 64):
        pixels = []
        for image, label in labelled[start : start + 64]:
            try:
                pixels.append(image_pixels(encoder.image_processor, decode_image(image)))
                labels.append(label)
            except BrokenSample as broken:
                skipped.append(str(broken))
        pooled.append(encoder.features(torch.stack(pixels).to(device, model.dtype)).mean(1).float().cpu())
    features = torch.cat(pooled)
    return ImageSet(features, features, [{} for _ in labels], labels, list(range(len(labels))), skipped)


# ---------------------------------------------------------------------------------------------- everything
def collect(plan: Plan, measured: dict[Cell, dict[str, dict[str, float]]], command: Sequence[str]) -> dict[str, Any]:
    """The content of report.json."""
    report: dict[str, Any] = {
        "command": shlex.join(["python", *command]),
        "time": time.strftime("%Y-%m-%d %H:%M %Z"),
        "environment": read_json(plan.cells[0].directory / "env.json") | {"cores": os.cpu_count(), "jobs": plan.jobs},
        "settings": _settings(plan),
        "encoders": {},
        "differences": [],
        "cells": [_cell_record(plan, cell) for cell in plan.cells],
        "examples": [],
    }
    summary: dict[str, dict[str, Any]] = {encoder: {} for encoder in plan.names}
    if plan.asks:
        answers = read_answers(plan)
        summary, report["differences"] = compare_metrics(plan, metrics(plan, answers))
        report["examples"] = pick_examples(plan, answers)
    benchmarks: dict[str, dict[str, Any]] = {}
    if plan.benchmarks:
        benchmarks, report["benchmark_differences"] = compare_benchmarks(plan)
    for encoder in plan.names:
        cells = [cell for cell in plan.cells if cell.encoder == encoder]
        shared = [name for name in measured[cells[0]] if all(name in measured[cell] for cell in cells)]
        intrinsic = {
            name: _over_seeds([measured[cell][name]["value"] for cell in cells])
            | {key: measured[cells[0]][name][key] for key in ("chance", "items")}
            for name in shared
        }
        report["encoders"][encoder] = {
            "metrics": summary[encoder],
            "benchmarks": benchmarks.get(encoder, {}),
            "intrinsic": intrinsic,
            "described": read_json(cells[0].directory / "config.json")["instruct"]["facts"]["vision encoder"],
            "pretraining": [found for cell in cells if (found := _pretraining(cell))],
            "cost": _cost(cells),
        }
    return report


def _settings(plan: Plan) -> dict[str, Any]:
    cell = plan.cells[0]
    stages = {}
    for number, stage in STAGES.items():
        arguments, done = plan.arguments(cell, number), read_json(cell.directory / stage.name / "done.json")
        stages[stage.name] = {
            "samples": done.get("samples", stage_samples(plan, cell, number)),
            "steps": done.get("steps"),
            "batch_size": arguments.batch_size,
            "learning_rate": arguments.learning_rate,
            "trains": read_json(cell.directory / "config.json")[stage.name]["freeze"],
            "projector": read_json(cell.directory / "config.json")[stage.name]["facts"]["projector"],
        }
    return {
        "encoders": list(plan.encoders),
        "seeds": plan.seeds,
        "quick": plan.quick,
        "budget_share": plan.share,
        "distinct_encoders": {
            name: len({_fingerprint(cell) for cell in plan.cells if cell.encoder == name}) for name in plan.names
        },
        "is_demo": plan.is_demo,
        "train_flags": list(plan.train_flags),
        "language_model": read_json(cell.directory / "config.json")["instruct"]["facts"]["language model"],
        "stages": stages,
        "evaluation": plan.evaluation,
        "benchmarks": list(plan.benchmarks),
    }


def _fingerprint(cell: Cell) -> str:
    return read_json(cell.directory / "config.json")["instruct"]["trains"]["vision_fingerprint"]


def _cell_record(plan: Plan, cell: Cell) -> dict[str, Any]:
    return {
        "encoder": cell.encoder,
        "seed": cell.seed,
        "vision": cell.vision,
        "directory": str(cell.directory),
        "config": read_json(cell.directory / "config.json"),
        "figures": read_json(cell.figures) if plan.asks else {},
        "benchmarks": benchmark_results(cell),
        "cost": read_json(cell.directory / "cost.json"),
    }


def _pretraining(cell: Cell) -> dict[str, Any] | None:
    """What a run of clips/ behind this cell's encoder saw; None where the encoder comes from elsewhere."""
    kind, _, place = cell.vision.partition(":")
    run = Path(place)
    if kind not in RECIPES or not (run / "config.json").is_file() or not (run / "metrics.jsonl").is_file():
        return None
    config = read_json(run / "config.json")
    return {"run": str(run), "recipe": config["recipe"], "seed": config["train"]["seed"]} | steps_seen(run)


def _cost(cells: list[Cell]) -> dict[str, float]:
    """Means over the cells: wall-clock seconds of each part, training speed, the largest memory."""
    costs = [read_json(cell.directory / "cost.json") for cell in cells]
    parts = {part: mean(found.get(part, 0.0) for found in costs) for part in costs[0]}
    cost = parts | {"seconds": sum(parts.values())}
    for stage in STAGES.values():
        done = [read_json(cell.directory / stage.name / "done.json") for cell in cells]
        cost[f"{stage.name}_samples_per_s"] = mean(row["samples_per_s"] for row in done)
        cost["peak_memory_gb"] = max(cost.get("peak_memory_gb", 0.0), *(row["peak_memory_gb"] for row in done))
    return cost
