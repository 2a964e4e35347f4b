"""What would end or falsify a comparison hours later, refused before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clips import parser as pretraining_parser
from clips.common.errors import UserError
from clips.common.files import read_json
from clips.common.flags import given
from clips.common.rundir import difference, refuse
from mllm.compare.cells import RECIPES, EncoderCell, PretrainedEncoder, arms_of, samples_seen
from mllm.compare.commands import pretrain_config, train_arguments
from mllm.compare.comparison import Comparison, is_demo, question_limit
from mllm.compare.plan import deciding
from mllm.data.questions import open_questions
from mllm.training.arguments import flags_of_stage
from mllm.training.arguments import parser as training_parser
from mllm.training.prepare import encoder_of
from mllm.training.stages import STAGES

TRAINING_OWN = ("stage", "seed", "vision_tower", "output_dir", "device")
PRETRAINING_OWN = ("recipe", "seed", "name", "output", "device")
"""Flags of the two scripts that the comparison itself sets."""


def check_request(comparison: Comparison) -> None:
    """Raise UserError for flags that do not fit each other, or that the comparison itself sets."""
    c = comparison
    if min(c.seeds, c.jobs, c.gpus, 1 if c.limit is None else c.limit) < 1:
        raise UserError("--seeds, --jobs, --gpus and --limit must be at least 1")
    if c.first_seed < 0:
        raise UserError(f"--first-seed {c.first_seed} must be at least 0")
    if c.budget is not None and not 0 < c.budget <= 1:
        raise UserError(f"--budget {c.budget} must be above 0 and at most 1")
    if c.llava_runs is not None and c.llava_runs < c.seeds:
        raise UserError(f"--llava-runs {c.llava_runs} must be at least --seeds {c.seeds}: each encoder is used")
    if min(c.jobs, c.gpus) > 1:
        raise UserError(f"--jobs {c.jobs} with --gpus {c.gpus}: the cells would share GPUs; choose one of them")

    arms = arms_of(c)
    if len({arm.folder for arm in arms}) < max(2, len(arms)):
        names = ", ".join(arm.name for arm in arms)
        raise UserError(f"{names or 'no encoder'}: give at least two different --encoders or --variants")

    own = [("--pretrain-flags", given(pretraining_parser(), c.pretrain_flags) & set(PRETRAINING_OWN))]
    for option, flags in [("--train-flags", c.train_flags), *(("--variants", flags) for _, flags in c.variants)]:
        for stage in STAGES.values():
            words = flags_of_stage(list(flags), stage.name)
            own.append((option, given(training_parser(), words) & set(TRAINING_OWN)))
    for option, names_of_flags in own:
        for name in sorted(names_of_flags):
            raise UserError(f"{option}: --{name} is what the comparison itself sets; leave it out")

    if c.questions is None and not is_demo(c) and not c.benchmarks:
        raise UserError(
            "the models are trained on other data than the demo's, so the demo's questions say nothing about them: "
            "give --questions (and --image-folder), or --benchmarks"
        )


def check_inputs(comparison: Comparison, encoders: Sequence[PretrainedEncoder]) -> None:
    """Raise UserError for what would end the comparison hours later: encoders and questions."""
    for encoder in encoders:
        objective = pretrain_config(comparison, encoder).task.objective
        if objective != encoder.kind:
            raise UserError(f"--pretrain-flags: {encoder.kind} would be trained with the objective {objective}")
    if comparison.questions is not None:
        questions, _ = open_questions(comparison.questions, comparison.image_folder, question_limit(comparison))
        if not any(question.answer is not None or question.references for question in questions):
            raise UserError(f"{comparison.questions} has neither answers nor references: there is nothing to compare")
        deciding(comparison, questions)


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
    config = read_json(run / "config.json")
    rates = ("lr", "muon_lr")  # each has its own best ones
    return {
        "data": config["data"],
        "seed": config["train"]["seed"],
        "image tower": config["model"]["vision"],
        "phases": [{k: v for k, v in phase.items() if k not in rates} for phase in config["phases"]],
        "samples and steps seen": samples_seen(run),
    }
