"""Everything about a finished comparison, as it stands in report.json."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Sequence
from statistics import mean
from typing import Any

import numpy as np

from clips.common.files import read_json
from clips.common.rundir import METRICS
from mllm.compare.benchmarks import benchmark_results
from mllm.compare.calibration import AnsweredRuns, calibrate
from mllm.compare.cells import (
    Cell,
    cells_of,
    encoder_groups,
    encoder_names,
    llava_runs,
    samples_seen,
    vision_fingerprint,
)
from mllm.compare.commands import dataset_size, stage_samples, train_arguments
from mllm.compare.comparison import (
    Comparison,
    asks_questions,
    budget_share,
    evaluation_settings,
    is_demo,
)
from mllm.compare.figures import (
    blind_questions,
    columns_of,
    compare_benchmarks,
    compare_scores,
    item_scores,
    loose_answers,
    over_seeds,
    pick_examples,
    read_answers,
)
from mllm.compare.order import order_of
from mllm.compare.statistics import independent_runs, labels
from mllm.training.arguments import TrainArguments
from mllm.training.prepare import START_IMAGES
from mllm.training.stages import STAGES


def collect(
    comparison: Comparison, measured: dict[Cell, dict[str, dict[str, Any]]], command: Sequence[str]
) -> dict[str, Any]:
    """The content of report.json; `measured` are the encoders' own figures (mllm/compare/probe.py)."""
    every, names = cells_of(comparison), encoder_names(comparison)
    environment = read_json(every[0].directory / "env.json") | {"cores": os.cpu_count(), "jobs": comparison.jobs}
    report: dict[str, Any] = {
        "command": shlex.join(["python", *command]),
        "time": time.strftime("%Y-%m-%d %H:%M %Z"),
        "environment": environment,
        "settings": _settings(comparison),
        "encoders": {},
        "differences": [],
        "cells": [_cell_record(comparison, cell) for cell in every],
        "examples": [],
    }
    summary: dict[str, dict[str, Any]] = {encoder: {} for encoder in names}
    if asks_questions(comparison):
        answers = read_answers(comparison)
        scores = item_scores(comparison, answers)
        report["settings"]["columns"] = columns_of(answers)
        summary, report["differences"] = compare_scores(comparison, scores)
        report["loose_answers"] = loose_answers(comparison, answers)
        if (overall := scores.get("accuracy")) is not None:
            shared = {name: encoder_groups(comparison, name) for name in names}
            report["blind_questions"] = blind_questions(comparison, answers, overall)
            report["calibration"] = calibrate(AnsweredRuns(overall.by_encoder, shared, labels(overall.clusters)))
        report["examples"] = pick_examples(comparison, answers)
    benchmarks: dict[str, dict[str, Any]] = {}
    if comparison.benchmarks:
        benchmarks, report["benchmark_differences"] = compare_benchmarks(comparison)
    for encoder in names:
        cells = [cell for cell in every if cell.encoder == encoder]
        report["encoders"][encoder] = {
            "kind": cells[0].kind,
            "metrics": summary[encoder],
            "benchmarks": benchmarks.get(encoder, {}),
            "intrinsic": _intrinsic(
                [measured[cell] for cell in cells], independent_runs(encoder_groups(comparison, encoder))
            ),
            "described": read_json(cells[0].directory / "config.json")["instruct"]["facts"]["vision encoder"],
            "pretraining": [found for cell in cells if (found := _pretraining(cell))],
            "cost": _cost(cells),
        }
    if len(report["settings"]["columns"]) > 1 and all("accuracy" in metrics for metrics in summary.values()):
        report["order"] = order_of([report])
    return report


def _intrinsic(by_seed: list[dict[str, dict[str, Any]]], groups: np.ndarray) -> dict[str, dict[str, Any]]:
    """The figures that an encoder has with every seed, over seeds."""
    return {
        name: over_seeds([figures[name]["value"] for figures in by_seed], groups)
        | {"chance": first["chance"], "items": first["items"], "test_set": first.get("test_set")}
        for name, first in by_seed[0].items()
        if all(name in figures for figures in by_seed)
    }


def _settings(comparison: Comparison) -> dict[str, Any]:
    cells = cells_of(comparison)
    cell, stages = cells[0], {}
    config = read_json(cell.directory / "config.json")
    for number, stage in STAGES.items():
        arguments = train_arguments(comparison, cell, number)
        done = read_json(cell.directory / stage.name / "done.json")
        stages[stage.name] = {
            "samples": done.get("samples", stage_samples(comparison, cell, number)),
            "steps": done.get("steps"),
            "batch_size": arguments.batch_size,
            "learning_rate": arguments.learning_rate,
            "trains": config[stage.name]["freeze"],
            "projector": _projector(arguments),
        }
    return {
        "encoders": list(comparison.encoders),
        "seeds": comparison.seeds,
        "llava_seeds": llava_runs(comparison),
        "columns": [],
        "quick": comparison.quick,
        "budget_share": budget_share(comparison),
        "distinct_encoders": {
            name: len({vision_fingerprint(cell) for cell in cells if cell.encoder == name})
            for name in encoder_names(comparison)
        },
        "is_demo": is_demo(comparison),
        "train_flags": list(comparison.train_flags),
        "language_model": config["instruct"]["facts"]["language model"],
        "stages": stages,
        "evaluation": evaluation_settings(comparison),
        "benchmarks": list(comparison.benchmarks),
    }


def _projector(arguments: TrainArguments) -> str:
    """Which projector, and how it starts: the same in every cell."""
    if arguments.pretrain_mm_mlp_adapter is not None:
        start = f"from {arguments.pretrain_mm_mlp_adapter}"
    elif arguments.stage == 2:
        start = "from stage 1"
    elif arguments.mm_projector_init == "captions":
        count = min(dataset_size(arguments), START_IMAGES)
        start = f"fitted in closed form to the captions of {count:,} samples"
    else:
        start = "random"
    return f"{arguments.mm_projector_type}, {start}"


def _cell_record(comparison: Comparison, cell: Cell) -> dict[str, Any]:
    return {
        "encoder": cell.encoder,
        "pretraining_seed": cell.pretraining_seed,
        "seed": cell.seed,
        "run": cell.run,
        "vision": cell.vision,
        "directory": str(cell.directory),
        "config": read_json(cell.directory / "config.json"),
        "figures": read_json(cell.figures) if asks_questions(comparison) else {},
        "benchmarks": benchmark_results(cell.directory, comparison.benchmarks),
        "cost": read_json(cell.directory / "cost.json"),
    }


def _pretraining(cell: Cell) -> dict[str, Any] | None:
    """What a run of clips/ behind this cell's encoder saw; None where the encoder comes from elsewhere."""
    run = cell.pretraining_run
    if run is None or not (run / "config.json").is_file() or not (run / METRICS).is_file():
        return None
    config = read_json(run / "config.json")
    return {"run": str(run), "recipe": config["recipe"], "seed": config["train"]["seed"]} | samples_seen(run)


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
