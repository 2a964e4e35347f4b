"""What would end or falsify a comparison hours later, refused before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clips import KarpathySet, RunConfig
from clips import difference as differing_fields
from clips import parser as pretraining_parser
from clips.common import rundir
from clips.common.errors import UserError
from clips.common.files import read_json
from mllm.compare.benchmarks import check_benchmarks, missing_benchmarks
from mllm.compare.cells import LLAVA_STEP, WITH_TEXTS, cells_of, encoders_to_pretrain, samples_seen, slug
from mllm.compare.commands import pretrain_config, train_arguments
from mllm.compare.comparison import (
    Comparison,
    evaluation_settings,
    given_fields,
    given_for_training,
    is_demo,
    question_limit,
)
from mllm.compare.plan import deciding
from mllm.data.questions import open_questions
from mllm.encoders.registry import parse_vision_name
from mllm.training.prepare import encoder_of
from mllm.training.stages import STAGES


# ---------------------------------------------------------------------------------------------- what was asked for
def check_request(comparison: Comparison) -> None:
    """Raise UserError for flags that do not fit each other, or that the comparison itself sets."""
    seeds, llava_seeds = comparison.seeds, comparison.llava_seeds
    if seeds < 1 or comparison.jobs < 1 or comparison.gpus < 1:
        raise UserError("--seeds, --jobs and --gpus must be at least 1")
    if comparison.budget is not None and not 0 < comparison.budget <= 1:
        raise UserError(f"--budget {comparison.budget:g} must be above 0 and at most 1")
    if seeds > LLAVA_STEP:
        raise UserError(f"--seeds {seeds} must be at most {LLAVA_STEP}")
    if llava_seeds is not None and llava_seeds < seeds:
        raise UserError(f"--llava-seeds {llava_seeds} must be at least --seeds {seeds}: each encoder is used")
    names = [slug(encoder) for encoder in comparison.encoders]
    if len(names) < 2 or len(set(names)) < len(names):
        raise UserError(f"--encoders {','.join(comparison.encoders)}: give at least two different ones")
    if comparison.jobs > 1 and comparison.gpus > 1:
        raise UserError(
            f"--jobs {comparison.jobs} with --gpus {comparison.gpus}: the cells would share GPUs; choose one of them"
        )
    training = given_for_training(comparison.train_flags)
    pretraining = given_fields(pretraining_parser(), comparison.pretrain_flags)
    for option, given, own in (
        ("--train-flags", training, ("stage", "seed", "vision_tower", "output_dir", "device")),
        ("--pretrain-flags", pretraining, ("recipe", "seed", "name", "output_dir", "device")),
    ):
        if taken := [name for name in own if name in given]:
            raise UserError(f"{option}: --{taken[0]} is what the comparison itself sets; leave it out")
    kinds = {parse_vision_name(encoder)[0] for encoder in comparison.encoders}
    if comparison.karpathy is not None and not kinds & set(WITH_TEXTS):
        raise UserError("--karpathy measures encoders with a text tower that were trained here: name clips or clip")
    if comparison.question_file is None and not is_demo(comparison) and not comparison.benchmarks:
        raise UserError(
            "the models are trained on other data than the demo's, so the demo's questions say nothing about them: "
            "give --question-file (and --question-images), or --benchmarks"
        )


def check_inputs(comparison: Comparison) -> None:
    """Raise UserError for what would end the comparison hours later: flags, encoders, questions, other settings."""
    check_request(comparison)
    for number in STAGES:
        train_arguments(comparison, cells_of(comparison)[0], number)
    for encoder in encoders_to_pretrain(comparison):
        asked = pretrain_config(comparison, encoder)
        if asked.task.objective != encoder.kind:
            raise UserError(
                f"--pretrain-flags: {encoder.kind} would be trained with the objective {asked.task.objective}"
            )
        config = encoder.directory / "config.json"
        if config.is_file():
            changes = differing_fields(RunConfig.load(config), asked)
            _refuse(encoder.directory, f"encoder {encoder.directory}", changes)
    if comparison.question_file is not None:
        questions, _ = open_questions(comparison.question_file, comparison.question_images, question_limit(comparison))
        if not any(question.answer is not None or question.references for question in questions):
            raise UserError(
                f"{comparison.question_file} has neither answers nor references: there is nothing to compare"
            )
        deciding(comparison, questions)
    if comparison.karpathy is not None:
        KarpathySet(comparison.karpathy, comparison.image_root or comparison.karpathy.parent)
    if any(missing_benchmarks(comparison, cell.directory) for cell in cells_of(comparison)):
        check_benchmarks(comparison)


def load_encoders(comparison: Comparison) -> None:
    """Load each encoder once that is not made here, in the way of the cells: before hours go into the others."""
    made_here = {encoder.directory for encoder in encoders_to_pretrain(comparison)}
    for cell in cells_of(comparison)[: len(comparison.encoders)]:
        if Path(cell.argument) not in made_here:
            encoder_of(train_arguments(comparison, cell, 1))


# ---------------------------------------------------------------------------------------------- what is there already
def check_cells(comparison: Comparison) -> None:
    """Raise UserError naming a cell whose directory holds other settings or another encoder than those asked for."""
    asked = evaluation_settings(comparison)
    for cell in cells_of(comparison):
        there = read_json(cell.directory / "config.json")
        changes = []
        for number, stage in STAGES.items():
            if stage.name in there:
                before = dict(there[stage.name]["trains"])
                fingerprint = before.pop("vision_fingerprint", None)
                before.pop("packed", None)  # how its batches are computed, which no flag says
                arguments = train_arguments(comparison, cell, number)
                now = json.loads(json.dumps(arguments.what_trains()))
                # The weights say which encoder it is; its path may be written in several ways.
                names = sorted(n for n in (before | now).keys() - {"vision_tower"} if before.get(n) != now.get(n))
                changes += [f"{stage.name}.{name}: {before.get(name)} there, {now.get(name)} asked" for name in names]
                if not names and fingerprint != encoder_of(arguments).fingerprint:
                    changes.append(f"{cell.vision} holds other weights than those it was trained on")
        _refuse(cell.directory, f"cell {cell.name} ({cell.directory})", changes)
        record = read_json(cell.directory / "cell.json") if cell.evaluation.is_dir() else {}
        before = record.get("evaluation", {})
        names = [name for name in before | asked if before and before.get(name) != asked.get(name)]
        changes = [f"{name}: {before.get(name)} there, {asked.get(name)} asked" for name in names]
        _refuse(cell.evaluation, f"cell {cell.name} was asked otherwise: {cell.evaluation}", changes)


def _refuse(place: Path, what: str, changes: list[str]) -> None:
    mend = f"Give the comparison another --output, or remove {place}"
    rundir.refuse(changes, f"{what} holds other settings", mend)


def assert_same_samples(clips: Path, clip: Path) -> None:
    """UserError unless both pretraining runs saw the same samples in as many steps of the same batches."""
    ours, theirs = _what_was_seen(clips), _what_was_seen(clip)
    changes = [f"{name}: {ours[name]} and {theirs[name]}" for name in ours if ours[name] != theirs[name]]
    if changes:
        raise UserError(f"{clip} is no fair baseline of {clips}, they saw different things:\n  " + "\n  ".join(changes))


def _what_was_seen(run: Path) -> dict[str, Any]:
    """What decides which samples a pretraining run sees, and what it came to."""
    config = read_json(run / "config.json")
    rates = ("lr", "muon_lr")  # each has its own best ones
    return {
        "data": config["data"],
        "seed": config["train"]["seed"],
        "image tower": config["model"]["vision"],
        "phases": [{k: v for k, v in phase.items() if k not in rates} for phase in config["phases"]],
        "samples and steps seen": samples_seen(run),
    }
