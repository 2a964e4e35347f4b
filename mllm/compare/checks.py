"""What would end or falsify a comparison hours later, refused before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clips import KarpathySet
from clips import parser as pretraining_parser
from clips.common.errors import UserError
from clips.common.files import read_json
from clips.common.flags import given
from clips.common.rundir import difference, refuse
from clips.lab.grid import Cell
from mllm.compare.benchmarks import check_benchmarks
from mllm.compare.cells import (
    LLAVA_STEP,
    RECIPES,
    WITH_TEXTS,
    EncoderCell,
    PretrainedEncoder,
    arms_of,
    samples_seen,
)
from mllm.compare.commands import pretrain_config, train_arguments
from mllm.compare.comparison import Comparison, given_for_training, is_demo, question_limit
from mllm.compare.plan import deciding
from mllm.data.questions import open_questions
from mllm.encoders.registry import parse_vision_name
from mllm.training.prepare import encoder_of
from mllm.training.stages import STAGES

TRAINING_OWN = ("stage", "seed", "vision_tower", "output_dir", "device")
PRETRAINING_OWN = ("recipe", "seed", "name", "output", "device")
"""Flags of the two scripts that the comparison itself sets."""


def check_request(comparison: Comparison) -> None:
    """Raise UserError for flags that do not fit each other, or that the comparison itself sets."""
    c, kinds = comparison, {parse_vision_name(encoder)[0] for encoder in comparison.encoders}
    arms = arms_of(comparison)
    names = {arm.folder for arm in arms}
    mistakes = [
        (min(c.seeds, c.jobs, c.gpus) < 1, "--seeds, --jobs and --gpus must be at least 1"),
        (not 0 < (1 if c.budget is None else c.budget) <= 1, f"--budget {c.budget} must be above 0 and at most 1"),
        (c.seeds > LLAVA_STEP, f"--seeds {c.seeds} must be at most {LLAVA_STEP}"),
        (
            (c.llava_runs or c.seeds) < c.seeds,
            f"--llava-runs {c.llava_runs} must be at least --seeds {c.seeds}: each encoder is used",
        ),
        (
            len(names) < max(2, len(arms)),
            f"{', '.join(arm.name for arm in arms)}: give at least two different --encoders or --variants",
        ),
        (
            min(c.jobs, c.gpus) > 1,
            f"--jobs {c.jobs} with --gpus {c.gpus}: the cells would share GPUs; choose one of them",
        ),
        *(
            (name in found, f"{option}: --{name} is what the comparison itself sets; leave it out")
            for option, found, own in (
                ("--train-flags", given_for_training(c.train_flags), TRAINING_OWN),
                *(("--variants", given_for_training(flags), TRAINING_OWN) for _, flags in c.variants),
                ("--pretrain-flags", given(pretraining_parser(), c.pretrain_flags), PRETRAINING_OWN),
            )
            for name in own
        ),
        (
            c.karpathy is not None and not kinds & set(WITH_TEXTS),
            "--karpathy measures encoders with a text tower that were trained here: name clips or clip",
        ),
        (
            c.questions is None and not is_demo(c) and not c.benchmarks,
            "the models are trained on other data than the demo's, so the demo's questions say nothing about them: "
            "give --questions (and --image-folder), or --benchmarks",
        ),
    ]
    for is_wrong, message in mistakes:
        if is_wrong:
            raise UserError(message)


def check_inputs(comparison: Comparison, encoders: Sequence[PretrainedEncoder], cells: Sequence[Cell]) -> None:
    """Raise UserError for what would end the comparison hours later: encoders, questions, benchmarks."""
    for encoder in encoders:
        objective = pretrain_config(comparison, encoder).task.objective
        if objective != encoder.kind:
            raise UserError(f"--pretrain-flags: {encoder.kind} would be trained with the objective {objective}")
    if comparison.questions is not None:
        questions, _ = open_questions(comparison.questions, comparison.image_folder, question_limit(comparison))
        if not any(question.answer is not None or question.references for question in questions):
            raise UserError(f"{comparison.questions} has neither answers nor references: there is nothing to compare")
        deciding(comparison, questions)
    if comparison.karpathy is not None:
        KarpathySet(comparison.karpathy, comparison.image_root or comparison.karpathy.parent)
    if any(step.may_fail and not step.is_done() for cell in cells for step in cell.steps):
        check_benchmarks(comparison)


def load_encoders(comparison: Comparison, encoders: Sequence[PretrainedEncoder], cells: Sequence[EncoderCell]) -> None:
    """Load each encoder once that is not made here, as the cells do, before hours go into the others."""
    made_here = {encoder.directory for encoder in encoders}
    for cell in cells[: len(comparison.encoders)]:
        if Path(cell.argument) not in made_here:
            encoder_of(train_arguments(comparison, cell, min(STAGES)))


def check_same_samples(encoders: Sequence[PretrainedEncoder]) -> None:
    """UserError unless all encoders of a seed saw the same samples in as many steps of the same batches."""
    firsts: dict[int, Path] = {}
    for encoder in sorted(encoders, key=lambda encoder: [*RECIPES].index(encoder.kind)):
        run = encoder.directory
        first = firsts.setdefault(encoder.seed, run)
        changes = difference(_what_was_seen(first), _what_was_seen(run))
        refuse(changes, f"{run} is no fair baseline of {first}, they saw different things", "Give another --output")


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
