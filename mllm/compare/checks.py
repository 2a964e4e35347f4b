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
from clips.lab.grid import Cell
from mllm.compare.benchmarks import check_benchmarks
from mllm.compare.cells import LLAVA_STEP, RECIPES, WITH_TEXTS, EncoderCell, PretrainedEncoder, samples_seen, slug
from mllm.compare.commands import pretrain_config, train_arguments
from mllm.compare.comparison import Comparison, given_for_training, is_demo, question_limit
from mllm.compare.plan import deciding
from mllm.data.questions import open_questions
from mllm.encoders.registry import parse_vision_name
from mllm.training.prepare import encoder_of
from mllm.training.stages import STAGES


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
    pretraining = given(pretraining_parser(), comparison.pretrain_flags)
    for option, found, own in (
        ("--train-flags", training, ("stage", "seed", "vision_tower", "output_dir", "device")),
        ("--pretrain-flags", pretraining, ("recipe", "seed", "name", "output", "device")),
    ):
        if taken := [name for name in own if name in found]:
            raise UserError(f"{option}: --{taken[0]} is what the comparison itself sets; leave it out")
    kinds = {parse_vision_name(encoder)[0] for encoder in comparison.encoders}
    if comparison.karpathy is not None and not kinds & set(WITH_TEXTS):
        raise UserError("--karpathy measures encoders with a text tower that were trained here: name clips or clip")
    if comparison.questions is None and not is_demo(comparison) and not comparison.benchmarks:
        raise UserError(
            "the models are trained on other data than the demo's, so the demo's questions say nothing about them: "
            "give --questions (and --image-folder), or --benchmarks"
        )


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
    of_seed: dict[int, dict[str, Path]] = {}
    for encoder in encoders:
        of_seed.setdefault(encoder.seed, {})[encoder.kind] = encoder.directory
    for directories in of_seed.values():
        first, *others = (directories[kind] for kind in RECIPES if kind in directories)
        ours = _what_was_seen(first)
        for other in others:
            theirs = _what_was_seen(other)
            changes = [f"{name}: {ours[name]} and {theirs[name]}" for name in ours if ours[name] != theirs[name]]
            if changes:
                lines = "\n  ".join(changes)
                raise UserError(f"{other} is no fair baseline of {first}, they saw different things:\n  {lines}")


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
