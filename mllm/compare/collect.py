"""Everything about a finished comparison, as it stands in report.json.

All of it but when, where and by which command comes from the files in the comparison's directory, without a model and
without torch: so that verify.py can compute it again from the same files elsewhere.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from clips.common.files import read_json, sha256, write_json
from clips.common.rundir import METRICS
from mllm.compare.benchmarks import benchmark_results, newest_results
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
from mllm.compare.comparison import Comparison
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
from mllm.compare.plan import PLAN, stored_questions, what_was_fixed
from mllm.compare.statistics import independent_runs, labels
from mllm.evaluation.scores import scorer_version
from mllm.training.stages import STAGES

REPORT = "report.json"
ENCODERS = "encoders.json"
"""Cell → the figures of its encoder alone, and what its pretraining saw."""
RECORDS = (
    *("cell.json", "config.json", "env.json", "cost.json", "evaluation/figures.json"),
    *(f"{stage.name}/done.json" for stage in STAGES.values()),
)
"""What a cell leaves beside its answers and its model."""


def keep_encoders(output: Path, measured: Mapping[Cell, dict[str, dict[str, Any]]]) -> None:
    """Write OUTPUT/encoders.json; `measured` are the encoders' own figures (mllm/compare/probe.py)."""
    records = {cell.name: {"figures": own, "pretraining": _pretraining(cell)} for cell, own in measured.items()}
    write_json(output / ENCODERS, records)


def collect(comparison: Comparison, plan: Mapping[str, Any], command: Sequence[str]) -> dict[str, Any]:
    """The content of report.json, by the plan that the comparison has now (mllm/compare/plan.py)."""
    environment = read_json(cells_of(comparison)[0].directory / "env.json")
    return {
        "command": shlex.join(["python", *command]),
        "time": time.strftime("%Y-%m-%d %H:%M %Z"),
        "environment": environment | {"cores": os.cpu_count(), "jobs": comparison.jobs},
    } | computed(comparison, plan)


def computed(comparison: Comparison, plan: Mapping[str, Any]) -> dict[str, Any]:
    """What report.json says by the files of the comparison, its figures before all."""
    every, names = cells_of(comparison), encoder_names(comparison)
    alone = read_json(comparison.output / ENCODERS)
    report: dict[str, Any] = {
        "plan": plan,
        "fixed": what_was_fixed(comparison.output, plan),
        "scorer": scorer_version(),
        "settings": _settings(comparison, plan),
        "encoders": {},
        "differences": [],
        "cells": [_cell_record(comparison, cell) for cell in every],
        "examples": [],
        "files": {name: sha256(comparison.output / name) for name in stored_files(comparison)},
    }
    summary: dict[str, dict[str, Any]] = {encoder: {} for encoder in names}
    if plan["questions"]:
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
        own = [alone[cell.name] for cell in cells]
        report["encoders"][encoder] = {
            "kind": cells[0].kind,
            "metrics": summary[encoder],
            "benchmarks": benchmarks.get(encoder, {}),
            "intrinsic": _intrinsic(
                [record["figures"] for record in own], independent_runs(encoder_groups(comparison, encoder))
            ),
            "described": read_json(cells[0].directory / "config.json")["instruct"]["facts"]["vision encoder"],
            "pretraining": [record["pretraining"] for record in own if record["pretraining"]],
            "cost": _cost(cells),
        }
    if len(report["settings"]["columns"]) > 1 and all("accuracy" in metrics for metrics in summary.values()):
        report["order"] = order_of([report])
    return report


def stored_files(comparison: Comparison) -> list[str]:
    """The files that the report rests on, as paths below the comparison's directory, sorted."""
    output, questions = comparison.output, stored_questions(comparison.output)
    files = [output / PLAN, output / ENCODERS, *questions.values()]
    for cell in cells_of(comparison):
        files += [cell.directory / name for name in RECORDS]
        files += [cell.evaluation / f"{name}.jsonl" for name in questions]
        files += [found for task in comparison.benchmarks if (found := newest_results(cell.directory, task))]
    return sorted(_below(comparison, path) for path in files if path.is_file())


def _below(comparison: Comparison, path: Path) -> str:
    return path.relative_to(comparison.output).as_posix()


def _intrinsic(by_seed: list[dict[str, dict[str, Any]]], groups: np.ndarray) -> dict[str, dict[str, Any]]:
    """The figures that an encoder has with every seed, over seeds."""
    return {
        name: over_seeds([figures[name]["value"] for figures in by_seed], groups)
        | {"chance": first["chance"], "items": first["items"], "test_set": first.get("test_set")}
        for name, first in by_seed[0].items()
        if all(name in figures for figures in by_seed)
    }


def _settings(comparison: Comparison, plan: Mapping[str, Any]) -> dict[str, Any]:
    cells = cells_of(comparison)
    cell, stages = cells[0], {}
    config = read_json(cell.directory / "config.json")
    for stage in STAGES.values():
        trains, done = config[stage.name]["trains"], read_json(cell.directory / stage.name / "done.json")
        stages[stage.name] = {
            "samples": done["samples"],
            "steps": done["steps"],
            "batch_size": trains["batch_size"],
            "learning_rate": trains["learning_rate"],
            "trains": config[stage.name]["freeze"],
            "projector": plan["budget"]["projector"][stage.name],
        }
    return {
        "encoders": list(comparison.encoders),
        "seeds": comparison.seeds,
        "llava_seeds": llava_runs(comparison),
        "columns": [],
        "quick": comparison.quick,
        "budget_share": plan["budget"]["share"],
        "distinct_encoders": {
            name: len({vision_fingerprint(cell) for cell in cells if cell.encoder == name})
            for name in encoder_names(comparison)
        },
        "is_demo": plan["is_demo"],
        "train_flags": list(comparison.train_flags),
        "language_model": config["instruct"]["facts"]["language model"],
        "stages": stages,
        "evaluation": read_json(cell.directory / "cell.json")["evaluation"],
        "benchmarks": list(comparison.benchmarks),
    }


def _cell_record(comparison: Comparison, cell: Cell) -> dict[str, Any]:
    return {
        "encoder": cell.encoder,
        "pretraining_seed": cell.pretraining_seed,
        "seed": cell.seed,
        "run": cell.run,
        "vision": read_json(cell.directory / "cell.json")["vision"],
        "directory": _below(comparison, cell.directory),
        "config": read_json(cell.directory / "config.json"),
        "figures": read_json(cell.figures),
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
