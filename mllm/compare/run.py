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

from clips.common.errors import CommandError, UserError
from clips.common.escape import for_rich
from clips.common.files import read_json, sha256
from clips.common.page import print_table
from clips.common.runtime import choose_device
from clips.lab.report import write_report
from clips.lab.run import Runner, failed_steps
from mllm.compare.cells import PLAN, cells_of, encoders_to_pretrain, is_pretrained_anew, llava_runs
from mllm.compare.checks import check_inputs, check_request, check_same_samples, load_encoders
from mllm.compare.commands import encoder_cell, lab_cells, samples_of_cells
from mllm.compare.comparison import Comparison, asks_questions, budget_share, comparison_from_flags, question_files
from mllm.compare.figures import REPORT, collect, keep_encoders
from mllm.compare.plan import fix_plan, power_in_words
from mllm.compare.probe import measure_encoders
from mllm.compare.report import page
from mllm.compare.words import design_in_words, difference_text, digits_and_scale, mean_and_sd, metric_name

CURVE = (0.25, 0.5, 1.0)
"""Shares of the budget at which `learning_curve` trains."""


def compare_from_flags(flags: argparse.Namespace) -> None:
    """What scripts/compare_encoders.py does."""
    comparison, console = comparison_from_flags(flags), Console(emoji=False, stderr=True)
    if flags.curve:
        learning_curve(comparison, console, sys.argv, see=flags.see, dry_run=flags.dry_run)
    else:
        compare(comparison, console, sys.argv, dry_run=flags.dry_run)


def learning_curve(
    comparison: Comparison, console: Console, command: Sequence[str], *, see: float, dry_run: bool = False
) -> float | None:
    """Compare the first two encoders with two seeds at shares of the budget; returns the smallest budget that suffices.

    It suffices if, there and at every larger budget, the larger standard deviation over seeds is at most a third of
    `see`, in the shown unit of the deciding figure. Seeds also agree before a jump, so the larger budgets count. Each
    budget is a comparison in OUTPUT/curve-BUDGET, on the encoders of OUTPUT.
    """
    if not asks_questions(comparison):
        raise UserError("--curve compares answers: give --questions")
    note = "three comparisons of two seeds, one for each budget; encoders are pretrained once, also for the table"
    console.print(f"learning curve: {note}", highlight=False, soft_wrap=True)
    rows: list[list[str]] = []
    enough: list[float] = []
    for share in CURVE:
        budget = share * budget_share(comparison)
        output = comparison.output / f"curve-{budget:g}"
        short = replace(comparison, encoders=comparison.encoders[:2], variants=(), seeds=2, llava_runs=2, benchmarks=())
        short = replace(short, first_seed=0, budget=budget, output=output)
        if dry_run:
            compare(short, console, command, dry_run=True)
            continue

        output.mkdir(parents=True, exist_ok=True)
        for name in ("encoders", "probes"):
            (comparison.output / name).mkdir(exist_ok=True)
            if not (output / name).exists():
                (output / name).symlink_to(f"../{name}")
        compare(short, console, command)

        report = read_json(output / REPORT)
        metric = report["plan"]["decides"]
        figures = [encoder["metrics"][metric] for encoder in report["encoders"].values()]
        difference = next(row for row in report["differences"] if row["metric"] == metric)
        rows.append([f"{budget:g}", *(mean_and_sd(metric, figure) for figure in figures), difference_text(difference)])
        agree = digits_and_scale(metric)[1] * max(figure["sd"] for figure in figures) <= see / 3
        enough = [*enough, budget] if agree else []
    if rows:
        print_table(f"{metric_name(metric)}, two seeds", ["--budget", *report["encoders"], "difference"], rows)
        proposal = f"--budget {enough[0]:g}" if enough else "a larger budget, or more seeds"
        print(f"to see a difference of {see:g}: {proposal}")
    return next(iter(enough), None)


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
