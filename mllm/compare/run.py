"""What an encoder is worth: the same LLaVA-style model on each encoder, several seeds, the same questions.

1. Missing encoders of RECIPES are pretrained, on the same data for the same samples and steps.
2. A cell is one encoder, one pretraining seed and one LLaVA seed: stage 1, stage 2 and the evaluation, as ordinary
   runs of the scripts. Cells of one LLaVA seed share the start of the adapters, the order of the samples and every
   other setting. The projector starts in the same way.
3. mllm/compare/figures.py and probe.py make figures of what the cells left, and report.py the page.

    OUTPUT/encoders/clips-seed0/    a pretraining run       OUTPUT/cells/random-seed2/    a cell: mllm/training/run.py
    OUTPUT/cells/random-seed2.log   what it printed         OUTPUT/report.{json,html}
    OUTPUT/compare.json             what was fixed before the first cell, and OUTPUT/questions/: mllm/compare/plan.py

clips/lab/run.py runs the cells: a finished cell is never run again, a cell that was cut goes on from its last
checkpoint, and a cell with other settings is refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from clips.common.errors import CommandError
from clips.common.escape import for_rich
from clips.common.files import sha256
from clips.common.runtime import choose_device
from clips.lab.report import write_report
from clips.lab.run import Runner, failed_steps
from mllm.compare.cells import PLAN, WITH_TEXTS, cells_of, encoders_to_pretrain
from mllm.compare.checks import check_inputs, check_request, check_same_samples, load_encoders
from mllm.compare.commands import encoder_cell, lab_cells, retrieval_command, retrieval_figures, stage_samples
from mllm.compare.comparison import Comparison, budget_share, comparison_from_flags, question_files
from mllm.compare.figures import collect, keep_encoders
from mllm.compare.plan import fix_plan
from mllm.compare.probe import measure_encoders
from mllm.compare.report import page
from mllm.training.stages import STAGES


def compare_from_flags(flags: argparse.Namespace) -> None:
    """What scripts/compare_encoders.py does."""
    compare(comparison_from_flags(flags), Console(emoji=False, stderr=True), sys.argv, dry_run=flags.dry_run)


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
    check_inputs(comparison, encoders, planned)
    samples = [f"{s.name} {stage_samples(comparison, cells[0], n):,} samples" for n, s in STAGES.items()]
    share = f" ({budget_share(comparison):.0%} of the stages' own)" if budget_share(comparison) < 1 else ""
    plan_runner = Runner([*pretraining, *planned], comparison.jobs, console)
    plan_runner.print_plan(f"comparison of encoders in {comparison.output}", {"a cell": ", ".join(samples) + share})
    if dry_run:
        return None
    (comparison.output / "cells").mkdir(parents=True, exist_ok=True)
    load_encoders(comparison, encoders, cells)
    disable_progress_bar()  # of encoders that are loaded again for their figures: the table is the view
    image_folder = question_files(comparison)[1]
    plan, fixed = fix_plan(comparison), comparison.output / PLAN
    console.print(f"fixed in {for_rich(str(fixed))}, SHA-256 {sha256(fixed)}", highlight=False, soft_wrap=True)
    planned = lab_cells(comparison, cells)  # again: their records name the plan
    runner = Runner([*pretraining, *planned], comparison.jobs, console)
    with runner.live():
        runner.run(pretraining)
        check_same_samples(encoders)
        runner.run(planned)
    split = comparison.karpathy
    if split is not None:
        with_texts = [cell for cell in cells if cell.kind in WITH_TEXTS]
        runs = sorted({run for cell in with_texts if (run := cell.pretraining_run) is not None})
        for run in [run for run in runs if not retrieval_figures(split, run).is_file()]:
            runner.commands.run(retrieval_command(comparison, split, run), comparison.output / f"{run.name}.log")
    keep_encoders(comparison.output, measure_encoders(comparison, choose_device(comparison.device)))
    report = collect(comparison, plan, command)
    written = write_report(report, comparison.output, "report", lambda: page(report, image_folder))
    output = for_rich(str(comparison.output))
    console.print(
        f"\n[bold]{output}[/bold] holds the comparison:\n"
        f"  page        {for_rich(str(written))}\n"
        f"  figures     {output}/report.json\n"
        f"  cells       {output}/cells/  (each a run directory with its model)\n"
        f"Next:\n  python scripts/chat.py --model {for_rich(str(cells[0].directory))}/model",
        highlight=False,
        soft_wrap=True,
    )
    failed = "\n".join(f"  {task}: see {log}" for task, log in failed_steps(planned))
    if failed:
        raise CommandError(
            "lmms-eval left no scores, or scored questions that it could not answer; the report goes without them, "
            f"and the same command tries again:\n{failed}"
        )
    return written
