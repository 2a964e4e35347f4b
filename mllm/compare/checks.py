"""What would end or falsify a comparison hours later, refused before anything runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clips.common.errors import UserError
from clips.common.files import read_json
from clips.config import RunConfig
from clips.config import difference as differing_fields
from clips.evaluation.testsets import KarpathySet
from mllm.compare.plan import Plan, steps_seen
from mllm.data.questions import open_questions
from mllm.training.prepare import encoder_of
from mllm.training.stages import STAGES


# ---------------------------------------------------------------------------------------------- running
def check_cells(plan: Plan) -> None:
    """Raise UserError naming a cell whose directory holds other settings or another encoder than those asked for."""
    for cell in plan.cells:
        there = read_json(cell.directory / "config.json")
        changes = []
        for number, stage in STAGES.items():
            if stage.name in there:
                before = dict(there[stage.name]["trains"])
                fingerprint = before.pop("vision_fingerprint", None)
                now = json.loads(json.dumps(plan.arguments(cell, number).what_trains()))
                # The weights say which encoder it is; its path may be written in several ways.
                names = sorted(n for n in (before | now).keys() - {"vision_tower"} if before.get(n) != now.get(n))
                changes += [f"{stage.name}.{name}: {before.get(name)} there, {now.get(name)} asked" for name in names]
                if not names and fingerprint != encoder_of(plan.arguments(cell, number)).fingerprint:
                    changes.append(f"{cell.vision} holds other weights than those it was trained on")
        _refuse(cell.directory, f"cell {cell.name} ({cell.directory})", changes)
        answered = cell.figures.parent
        before = read_json(cell.directory / "cell.json").get("evaluation", {}) if answered.is_dir() else {}
        names = [name for name in before if before[name] != plan.evaluation.get(name)]
        changes = [f"{name}: {before[name]} there, {plan.evaluation.get(name)} asked" for name in names]
        _refuse(answered, f"cell {cell.name} was asked otherwise: {answered}", changes)


def _refuse(place: Path, what: str, changes: list[str]) -> None:
    if changes:
        raise UserError(
            f"{what} holds other settings:\n  "
            + "\n  ".join(changes)
            + f"\nGive the comparison another --output, or remove {place}"
        )


def check_inputs(plan: Plan) -> None:
    """Raise UserError for what would end the comparison hours later: flags, encoders, questions, other settings."""
    for number in STAGES:
        plan.arguments(plan.cells[0], number)
    for path, (kind, seed) in plan.pretraining.items():
        asked = plan.pretraining_config(path, kind, seed)
        if asked.task.objective != kind:
            raise UserError(f"--pretrain-flags: {kind} would be trained with the objective {asked.task.objective}")
        if (path / "config.json").is_file():
            changes = differing_fields(RunConfig.load(path / "config.json"), asked)
            _refuse(path, f"encoder {path}", changes)
    if plan.question_file is not None:
        questions, _ = open_questions(plan.question_file, plan.question_images, plan.questions)
        if not any(question.answer is not None or question.references for question in questions):
            raise UserError(f"{plan.question_file} has neither answers nor references: there is nothing to compare")
    if plan.karpathy is not None:
        KarpathySet(plan.karpathy, plan.image_root or plan.karpathy.parent)


def load_encoders(plan: Plan) -> None:
    """Load each encoder once that is not made here, in the way of the cells: before hours go into the others."""
    for cell in plan.cells[: len(plan.encoders)]:
        if Path(cell.vision.partition(":")[2]) not in plan.pretraining:
            encoder_of(plan.arguments(cell, 1))


def assert_same_samples(clips: Path, clip: Path) -> None:
    """UserError unless both pretraining runs saw the same samples in as many steps of the same batches."""
    changes = [
        f"{name}: {ours} and {theirs}" for name, ours, theirs in _pretraining_settings(clips, clip) if ours != theirs
    ]
    if changes:
        raise UserError(f"{clip} is no fair baseline of {clips}, they saw different things:\n  " + "\n  ".join(changes))


def _pretraining_settings(*runs: Path) -> Iterator[tuple[str, Any, Any]]:
    """(name, of the first, of the second) of what decides which samples a run sees, and what it came to."""
    configs, seen = [read_json(run / "config.json") for run in runs], [steps_seen(run) for run in runs]
    yield "data", *(config["data"] for config in configs)
    yield "seed", *(config["train"]["seed"] for config in configs)
    yield "image tower", *(config["model"]["vision"] for config in configs)
    rates = ("lr", "muon_lr")  # each has its own best ones
    yield "phases", *([{k: v for k, v in p.items() if k not in rates} for p in c["phases"]] for c in configs)
    yield "samples and steps seen", *seen
