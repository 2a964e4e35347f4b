"""Writes down what a comparison is made for before its first cell (mllm/compare/plan.py)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from clips.common.files import replacing, sha256, write_json
from clips.common.rundir import UNSEEN
from mllm.compare.cells import cells_of
from mllm.compare.commands import dataset_size, stage_samples, train_arguments
from mllm.compare.comparison import (
    Comparison,
    asks_questions,
    budget_share,
    is_demo,
    question_files,
)
from mllm.compare.figures import COLUMNS
from mllm.compare.plan import (
    FORMAT,
    PLAN,
    QUESTIONS,
    asked_questions,
    deciding,
    fixed_flags,
    kinds_of,
    read_plan,
)
from mllm.data.questions import read_questions
from mllm.evaluation.scores import scorer_version
from mllm.training.arguments import TrainArguments
from mllm.training.prepare import START_IMAGES
from mllm.training.stages import STAGES


def fix(comparison: Comparison) -> dict[str, Any]:
    """Write compare.json, unless a cell has begun by the one that is there, and copy the question files.

    Returns the plan as it is asked for now, which is another one where somebody changed their mind.
    """
    plan, output = plan_of(comparison), comparison.output
    with replacing(output / QUESTIONS) as copies:
        for name, path in _files(comparison).items():
            shutil.copyfile(path, copies / f"{name}.{'jsonl' if path.suffix == '.jsonl' else 'json'}")
    begun = len(list((output / "cells").glob("*/cell.json")))  # also of encoders and seeds that are not asked for now
    if not read_plan(output) or not begun:
        write_json(output / PLAN, plan | {"cells_begun": begun})
    return plan


def plan_of(comparison: Comparison) -> dict[str, Any]:
    """What compare.json would hold; UserError for a deciding figure that the questions do not give."""
    cell = cells_of(comparison)[0]
    arguments = {stage.name: train_arguments(comparison, cell, number) for number, stage in STAGES.items()}
    files = _files(comparison)
    asked = {name: asked_questions(comparison, path) for name, path in files.items()}
    columns = {name: COLUMNS.get(name, name) for name in files}
    first = UNSEEN if UNSEEN in columns.values() else next(iter(columns.values()), None)
    return {
        "format": FORMAT,
        "comparison": fixed_flags(comparison),
        "decides": deciding(
            comparison, [q for name, of_file in asked.items() if columns[name] == first for q in of_file]
        ),
        "is_demo": is_demo(comparison),
        "budget": {
            "share": budget_share(comparison),
            "samples": {stage.name: stage_samples(comparison, cell, number) for number, stage in STAGES.items()},
            "projector": {name: _projector(given) for name, given in arguments.items()},
        },
        "questions": {
            name: {
                "file": path.name,
                "column": columns[name],
                "sha256": sha256(path),
                "questions": len(read_questions(path)),
                "asked": len(asked[name]),
                "kinds": kinds_of(asked[name]),
            }
            for name, path in files.items()
        },
        "scorer": scorer_version(),
    }


def _files(comparison: Comparison) -> dict[str, Path]:
    """What every cell is asked; nothing where there are benchmarks alone."""
    return question_files(comparison)[0] if asks_questions(comparison) else {}


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
