"""Compare encoders: train the same LLaVA-style model on each of them with several seeds, and ask the same questions.

Missing encoders of RECIPES are pretrained first. Then each run trains both stages and answers the questions with the
same scripts that a user runs. docs/design.md walks through a run.

    OUTPUT/encoders/clips-seed0/    a pretraining run       OUTPUT/runs/random-seed2/    a run: mllm/training/run.py
    OUTPUT/runs/random-seed2.log   its output              OUTPUT/report.{json,html}
    OUTPUT/compare.json             the plan, fixed before the first run, and OUTPUT/questions/: see comparison.py
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from clips import parser as pretraining_parser
from clips.common.errors import CommandError, UserError
from clips.common.files import read_json, sha256
from clips.common.flags import given
from clips.common.launch import count_ranks
from clips.common.live import say
from clips.common.rundir import changed, refuse
from clips.common.runtime import choose_device
from clips.lab.pretraining import pretraining_run_of
from clips.lab.report import write_result
from clips.lab.run import Runner, failed_steps
from mllm.compare.analysis import collect, keep_encoders, power_in_words
from mllm.compare.commands import fix_plan, lab_run, pretrain_config, pretrain_flags, samples_of_runs, stage_config
from mllm.compare.comparison import (
    PLAN,
    RECIPES,
    Comparison,
    EncoderRun,
    PretrainedEncoder,
    comparison_from_flags,
    deciding,
    is_pretrained_anew,
    samples_seen,
)
from mllm.compare.probe import measure_encoders
from mllm.compare.report import design_in_words, page
from mllm.data.questions import open_questions
from mllm.training.build import encoder_of
from mllm.training.config import flags_of_stage
from mllm.training.config import parser as training_parser
from mllm.training.recipes import STAGES

TRAINING_OWN = ("stage", "seed", "vision_tower", "output_dir", "device")
PRETRAINING_OWN = ("recipe", "seed", "name", "output", "device")
"""Flags of the two scripts that only the comparison may set."""


def compare_from_flags(flags: argparse.Namespace) -> None:
    """Run scripts/compare_encoders.py."""
    compare(comparison_from_flags(flags), sys.argv, dry_run=flags.dry_run)


def compare(comparison: Comparison, command: Sequence[str] = (), *, dry_run: bool = False) -> Path | None:
    """Run what is missing, write the report, and return the path of its page. With `dry_run` only print the plan.

    `command` is recorded in the report. Raises UserError for flags that contradict each other and for runs that were
    made with other settings, and CommandError if a command fails or lmms-eval gives no scores.
    """
    check_request(comparison)
    runs, encoders = comparison.runs, comparison.pretrained
    pretraining = [
        pretraining_run_of(
            encoder.directory, pretrain_flags(comparison, encoder), f"{encoder.kind}, pretraining", encoder.seed
        )
        for encoder in encoders
    ]
    for run in pretraining:
        run.check()
    planned = [lab_run(comparison, run) for run in runs]
    check_inputs(comparison, encoders)
    share = f" ({comparison.budget_share:.0%} of a full training)" if comparison.budget_share < 1 else ""
    plan_runner = Runner([*pretraining, *planned], comparison.jobs)
    anew = comparison.seeds if any(map(is_pretrained_anew, comparison.encoders)) else 1
    facts = {}
    for variant, samples in samples_of_runs(comparison, runs).items():
        seen = ", ".join(f"{stage} {n:,} samples" for stage, n in samples.items())
        facts[f"a run, {variant}" if variant else "a run"] = seen + share
    facts |= {"design": design_in_words(anew, comparison.runs_per_encoder)}
    facts |= {"power": power_in_words(comparison)} if comparison.asks_questions else {}
    plan_runner.print_plan(f"comparison of encoders in {comparison.output}", facts)
    if dry_run:
        return None
    (comparison.output / "runs").mkdir(parents=True, exist_ok=True)
    load_encoders(comparison, encoders, runs)
    image_folder = comparison.question_files()[1]
    plan, fixed = fix_plan(comparison), comparison.output / PLAN
    digest = sha256(fixed)
    say(f"the plan is fixed in {fixed}, SHA-256 {digest}")
    planned = [replace(run, record={**(run.record or {}), "plan": digest}) for run in planned]
    runner = Runner([*pretraining, *planned], comparison.jobs)
    runner.run(pretraining)
    check_same_samples(encoders)
    runner.run(planned)
    keep_encoders(comparison.output, measure_encoders(comparison, choose_device(comparison.device)))
    report = collect(comparison, plan, command)
    written = write_result(report, comparison.output, "report", lambda: page(report, image_folder))
    note = f"{written} is the page, {comparison.output}/report.json has its metrics, and each run has a model. Next:\n"
    note += f"  python scripts/chat.py --model {shlex.quote(f'{runs[0].directory}/model')}"
    say(note)
    failed = "\n".join(f"  {task}: see {log}" for task, log in failed_steps(planned))
    if failed:
        raise CommandError(f"lmms-eval wrote no scores, or scored failed answers; try again:\n{failed}")
    return written


# ------------------------------------------------------------------------------- refused before anything runs
def check_request(comparison: Comparison) -> None:
    """Raise UserError for flags that contradict each other, or that only the comparison may set."""
    c = comparison
    if c.budget is not None and not 0 < c.budget <= 1:
        raise UserError(f"--budget {c.budget} must be above 0 and at most 1")
    if c.llava_runs is not None and c.llava_runs < c.seeds:
        raise UserError(f"--llava-runs {c.llava_runs} must be at least --seeds {c.seeds}, so that each encoder is used")
    if min(c.jobs, c.gpus) > 1:
        raise UserError(f"--jobs {c.jobs} with --gpus {c.gpus}: the runs would share GPUs; use only one of the two")
    count_ranks(c.gpus, c.device, "--gpus")

    arms = c.arms
    if len({arm.folder for arm in arms}) < max(2, len(arms)):
        names = ", ".join(arm.name for arm in arms)
        raise UserError(f"{names or 'no encoder'}: give at least two different --encoders or --variants")

    reserved = [("--pretrain-flags", given(pretraining_parser(), c.pretrain_flags) & set(PRETRAINING_OWN))]
    for option, flags in [("--train-flags", c.train_flags), *(("--variants", flags) for _, flags in c.variants)]:
        for stage in STAGES.values():
            words = flags_of_stage(list(flags), stage.name)
            reserved.append((option, given(training_parser(), words) & set(TRAINING_OWN)))
    for option, names_of_flags in reserved:
        for name in sorted(names_of_flags):
            raise UserError(f"{option}: --{name} is set by the comparison itself; leave it out")

    if c.questions is None and not c.is_demo and not c.benchmarks:
        raise UserError("the demo's questions cannot measure models of other data: give --questions or --benchmarks")


def check_inputs(comparison: Comparison, encoders: Sequence[PretrainedEncoder]) -> None:
    """Raise UserError for encoders or questions with which the comparison would fail hours later."""
    for encoder in encoders:
        objective = pretrain_config(comparison, encoder).task.objective
        if objective != encoder.kind:
            raise UserError(
                f"--pretrain-flags: they turn the encoder `{encoder.kind}` into one of the objective `{objective}`: "
                "remove task.objective from them"
            )
    if comparison.questions is not None:
        questions, _ = open_questions(comparison.questions, comparison.image_folder, comparison.question_limit)
        if not any(question.answer is not None or question.references for question in questions):
            raise UserError(f"{comparison.questions} has no answers or references, so there is nothing to compare")
        deciding(comparison.decides, questions)


def load_encoders(comparison: Comparison, encoders: Sequence[PretrainedEncoder], runs: Sequence[EncoderRun]) -> None:
    """Load each encoder of every seed that is not pretrained here, so that an error shows before hours of pretraining.

    Raises UserError for one that is missing or damaged.
    """
    made_here = {encoder.directory for encoder in encoders}
    for run in {run.vision: run for run in reversed(runs)}.values():  # the first run of each
        if Path(run.argument) not in made_here:
            encoder_of(stage_config(comparison, run, min(STAGES)))


def check_same_samples(encoders: Sequence[PretrainedEncoder]) -> None:
    """Raise UserError unless all encoders of a seed saw the same samples in the same batches and steps."""
    firsts: dict[int, Path] = {}
    for encoder in sorted(encoders, key=lambda encoder: [*RECIPES].index(encoder.kind)):
        run = encoder.directory
        first = firsts.setdefault(encoder.seed, run)
        changes = changed(_what_was_seen(first), _what_was_seen(run))
        refuse(changes, f"{run} is no fair baseline of {first}: their data differ", "Give another --output")


def _what_was_seen(run: Path) -> dict[str, Any]:
    config = read_json(run / "config.json")
    rates = ("lr", "muon_lr")  # the best learning rates differ between objectives
    return {
        "data": config["data"],
        "seed": config["train"]["seed"],
        "image tower": config["model"]["vision"],
        "phases": [{k: v for k, v in phase.items() if k not in rates} for phase in config["phases"]],
        "samples and steps seen": samples_seen(run),
    }
