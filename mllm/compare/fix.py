"""Writes down what a comparison is made for before its first cell (mllm/compare/plan.py)."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from clips.common.files import sha256, write_json
from mllm.compare.cells import cells_of
from mllm.compare.commands import dataset_size, stage_samples, train_arguments
from mllm.compare.comparison import (
    Comparison,
    asks_questions,
    budget_share,
    deciding_column,
    is_demo,
    question_files,
    question_sets,
)
from mllm.compare.plan import (
    FORMAT,
    PLAN,
    QUESTIONS,
    SETS,
    asked_questions,
    deciding,
    fixed_flags,
    kinds_of,
    read_plan,
)
from mllm.data.questions import QuestionSet, read_questions
from mllm.evaluation.scores import scorer_version
from mllm.training.arguments import TrainArguments
from mllm.training.prepare import START_IMAGES
from mllm.training.stages import STAGES


def fix(comparison: Comparison) -> dict[str, Any]:
    """Write compare.json, unless a cell has begun by the one that is there, and copy the question files.

    Returns the plan as it is asked for now, which is another one where somebody changed their mind.
    """
    plan, output = plan_of(comparison), comparison.output
    shutil.rmtree(output / QUESTIONS, ignore_errors=True)
    (output / QUESTIONS).mkdir(parents=True)
    sets = []
    for asked, path in _sets(comparison):
        copy = replace(asked, file=f"{asked.name}.{'jsonl' if path.suffix == '.jsonl' else 'json'}")
        shutil.copyfile(path, output / QUESTIONS / copy.file)
        sets.append(asdict(copy))
    write_json(output / QUESTIONS / SETS, {"deciding_column": plan["deciding_column"], "sets": sets})
    begun = len(list((output / "cells").glob("*/cell.json")))  # also of encoders and seeds that are not asked for now
    if not read_plan(output) or not begun:
        write_json(output / PLAN, plan | {"cells_begun": begun})
    return plan


def plan_of(comparison: Comparison) -> dict[str, Any]:
    """What compare.json would hold; UserError for a deciding figure that the questions do not give."""
    cell = cells_of(comparison)[0]
    arguments = {stage.name: train_arguments(comparison, cell, number) for number, stage in STAGES.items()}
    sets = _sets(comparison)
    asked = {one.name: asked_questions(comparison, path) for one, path in sets}
    column = deciding_column(comparison)
    of_column = [question for one, _ in sets if one.column == column for question in asked[one.name]]
    return {
        "format": FORMAT,
        "comparison": fixed_flags(comparison),
        "decides": deciding(comparison, of_column),
        "deciding_column": column,
        "is_demo": is_demo(comparison),
        "budget": {
            "share": budget_share(comparison),
            "samples": {stage.name: stage_samples(comparison, cell, number) for number, stage in STAGES.items()},
            "projector": {name: _projector(given) for name, given in arguments.items()},
        },
        "questions": {
            one.name: {
                "file": path.name,
                "column": one.column,
                "sha256": sha256(path),
                "questions": len(read_questions(path)),
                "asked": len(asked[one.name]),
                "kinds": kinds_of(asked[one.name]),
            }
            for one, path in sets
        },
        "scorer": scorer_version(),
    }


def _sets(comparison: Comparison) -> list[tuple[QuestionSet, Path]]:
    """What every cell is asked; nothing where there are benchmarks alone."""
    if not asks_questions(comparison):
        return []
    return list(zip(question_sets(comparison), question_files(comparison)[0], strict=True))


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
