"""What an encoder is worth: the same LLaVA-style model on each encoder, several seeds, the same questions.

Missing encoders of RECIPES are pretrained. Then each cell trains both stages and answers the questions, as runs of the
scripts. docs/design.md walks through a cell.

    OUTPUT/encoders/clips-seed0/    a pretraining run       OUTPUT/cells/random-seed2/    a cell: mllm/training/run.py
    OUTPUT/cells/random-seed2.log   what it printed         OUTPUT/report.{json,html}
    OUTPUT/compare.json             what was fixed before the first cell, and OUTPUT/questions/: mllm/compare/plan.py
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from clips.common.errors import CommandError
from clips.common.escape import for_rich
from clips.common.files import sha256
from clips.common.runtime import choose_device
from clips.lab.report import write_report
from clips.lab.run import Runner, failed_steps
from mllm.compare.cells import PLAN, cells_of, encoders_to_pretrain, is_pretrained_anew, llava_runs
from mllm.compare.checks import check_inputs, check_request, check_same_samples, load_encoders
from mllm.compare.commands import encoder_cell, lab_cells, samples_of_cells
from mllm.compare.comparison import Comparison, asks_questions, budget_share, comparison_from_flags, question_files
from mllm.compare.figures import collect, keep_encoders
from mllm.compare.plan import fix_plan, power_in_words
from mllm.compare.probe import measure_encoders
from mllm.compare.report import page
from mllm.compare.words import design_in_words


def compare_from_flags(flags: argparse.Namespace) -> None:
    """What scripts/compare_encoders.py does."""
    console = Console(emoji=False, stderr=True)
    compare(comparison_from_flags(flags), console, sys.argv, dry_run=flags.dry_run)


def compare(
    comparison: Comparison, console: Console, command: Sequence[str] = (), *, dry_run: bool = False
) -> Path | None:
    """Run what is missing and write the report; returns the page's path. With `dry_run` only print the plan."""
    check_request(comparison)
    cells, encoders = cells_of(comparison), encoders_to_pretrain(comparison)
    pretraining = [encoder_cell(comparison, encoder) for encoder in encoders]
    for cell in pretraining:
        cell.check()
    planned = lab_cells(comparison, cells)
    check_inputs(comparison, encoders)
    share = f" ({budget_share(comparison):.0%} of the stages' own)" if budget_share(comparison) < 1 else ""
    plan_runner = Runner([*pretraining, *planned], comparison.jobs, console)
    anew = comparison.seeds if any(map(is_pretrained_anew, comparison.encoders)) else 1
    facts = {}
    for variant, samples in samples_of_cells(comparison, cells).items():
        seen = ", ".join(f"{stage} {n:,} samples" for stage, n in samples.items())
        facts[f"a cell, {variant}" if variant else "a cell"] = seen + share
    facts |= {"design": design_in_words(anew, llava_runs(comparison))}
    facts |= {"power": power_in_words(comparison)} if asks_questions(comparison) else {}
    plan_runner.print_plan(f"comparison of encoders in {comparison.output}", facts)
    if dry_run:
        return None
    (comparison.output / "cells").mkdir(parents=True, exist_ok=True)
    load_encoders(comparison, encoders, cells)
    image_folder = question_files(comparison)[1]
    plan, fixed = fix_plan(comparison), comparison.output / PLAN
    digest = sha256(fixed)
    console.print(f"fixed in {for_rich(str(fixed))}, SHA-256 {digest}", highlight=False, soft_wrap=True)
    planned = [replace(cell, record={**(cell.record or {}), "plan": digest}) for cell in planned]
    runner = Runner([*pretraining, *planned], comparison.jobs, console)
    runner.run(pretraining)
    check_same_samples(encoders)
    runner.run(planned)
    keep_encoders(comparison.output, measure_encoders(comparison, choose_device(comparison.device)))
    report = collect(comparison, plan, command)
    written = write_report(report, comparison.output, "report", lambda: page(report, image_folder))
    note = f"{written} is the page, {comparison.output}/report.json holds its figures, and each cell a model. Next:\n"
    note += f"  python scripts/chat.py --model {shlex.quote(f'{cells[0].directory}/model')}"
    console.print(for_rich(note), highlight=False, soft_wrap=True)
    failed = "\n".join(f"  {task}: see {log}" for task, log in failed_steps(planned))
    if failed:
        raise CommandError(
            "lmms-eval left no scores, or scored questions that it could not answer; the report goes without them, "
            f"and the same command tries again:\n{failed}"
        )
    return written
