"""What a comparison is fixed to before its first cell, in OUTPUT/compare.json.

    format       1
    comparison   the flags that decide what is compared: encoders, seeds, budget, limit, … (not where, nor how fast)
    decides      the figure that the comparison is made for, of the deciding column: `accuracy`, `log_likelihood` or
                 `share`, or one of them as FIGURE/KIND, or `cider_d`
    is_demo      whether the cells train on the demo's data
    budget       the share of each stage's samples, the samples (of variants too), and how each stage's projector starts
    questions    name → file, column (what sort of pictures), SHA-256, questions, how many are asked, of which kinds
    scorer       which scorer (`mllm.evaluation.scores.scorer_version`)
    cells_begun  cells that had begun when this was written: 0, or nothing was fixed before

OUTPUT/questions/NAME.jsonl is a copy of the file that CELL/evaluation/NAME.jsonl answers, so that a finished comparison
can be verified alone.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clips.common.errors import UserError
from clips.common.files import replacing, sha256
from clips.common.rundir import UNSEEN
from clips.lab.grid import RECORD, fix
from clips.lab.stats import FEWEST_SEEDS, detectable, independent_runs
from mllm.compare.cells import PLAN, cells_of, encoder_groups, encoder_names
from mllm.compare.comparison import Comparison, budget_share, is_demo, question_files, question_limit
from mllm.data.questions import LIKELIHOODS, UNSEEN_ANSWERS, Question, draw_evenly, read_questions
from mllm.evaluation.scores import scorer_version
from mllm.training.stages import STAGES

if TYPE_CHECKING:
    from mllm.training.arguments import TrainArguments

QUESTIONS = "questions"
FORMAT = 1
NOT_FIXED = {*("output", "jobs", "device", "questions", "image_folder", "include_path", "decides")}
"""Fields of `Comparison` that say where and how fast. The plan itself says which questions, and what decides."""
LATER = {"variants", "first_seed"}
"""Fields that came after the first plans were kept, so a plan leaves them out where they are empty or 0."""
RUN_VARIANCE = 1.03e-3
ENCODER_VARIANCE = 1.03e-3
ANSWER_VARIANCE = 5.4e-4
PICTURE_VARIANCE = 0.1e-4
"""Of the difference in right answers between two encoders: between LLaVA runs on the same encoders, between
pretrainings, and, both at `OF_QUESTIONS` questions, by luck with single answers and with pictures. More questions
reduce the last two alone. tests/data/lab/real/encoders.json gives the sum of the first three over all pairs of
pretrained encoders, and the third by the shares of right answers; tests/unit/mllm/test_power.py computes both. No
crossed comparison has split the rest yet: half is assumed for each."""
OF_QUESTIONS = 800
SEEN = "seen"
COLUMNS = {"answers": SEEN, "descriptions": SEEN, UNSEEN_ANSWERS: UNSEEN}
"""File of answers to the demo's questions → the sort of its pictures. Any other file is a sort of its own."""


def fix_plan(comparison: Comparison) -> dict[str, Any]:
    """Write compare.json, unless a cell has begun by the plan that is there, and copy the question files.

    Returns the plan as it is asked for now.
    """
    plan, output = plan_of(comparison), comparison.output
    with replacing(output / QUESTIONS) as copies:
        for name, path in question_files(comparison)[0].items():
            shutil.copyfile(path, copies / f"{name}.{'jsonl' if path.suffix == '.jsonl' else 'json'}")
    begun = len(list((output / "cells").glob(f"*/{RECORD}")))  # also of encoders and seeds that are not asked for now
    fix(output / PLAN, plan, begun)
    return plan


def plan_of(comparison: Comparison) -> dict[str, Any]:
    """What compare.json would hold; UserError for a deciding figure that the questions do not give."""
    from mllm.compare.commands import samples_of_cells, train_arguments  # imports torch

    cells = cells_of(comparison)
    files = question_files(comparison)[0]
    samples = samples_of_cells(comparison, cells)
    questions = {name: asked_questions(comparison, path) for name, path in files.items()}
    stages = {stage.name: number for number, stage in STAGES.items()}
    given = {name: value for name, value in vars(comparison).items() if name not in NOT_FIXED}
    for name in LATER:
        if not given[name]:
            del given[name]
    flags = json.loads(json.dumps(given))
    return {
        "format": FORMAT,
        "comparison": flags,
        "decides": deciding(comparison, _of_deciding_column(questions)),
        "is_demo": is_demo(comparison),
        "budget": {
            "share": budget_share(comparison),
            "samples": samples.pop(""),
            "projector": {name: _projector(train_arguments(comparison, cells[0], n)) for name, n in stages.items()},
            **({"samples of variants": samples} if samples else {}),
        },
        "questions": {
            name: {
                "file": path.name,
                "column": COLUMNS.get(name, name),
                "sha256": sha256(path),
                "questions": len(read_questions(path)),
                "asked": len(questions[name]),
                "kinds": kinds_of(questions[name]),
            }
            for name, path in files.items()
        },
        "scorer": scorer_version(),
    }


def columns_of(files: Iterable[str]) -> list[str]:
    """The sorts of pictures that files of questions are about; the sort that decides, of unseen artists, is first."""
    columns = dict.fromkeys(COLUMNS.get(name, name) for name in files)
    return sorted(columns, key=lambda column: column != UNSEEN)


def _projector(arguments: TrainArguments) -> str:
    """Which projector, and how it starts: the same in every cell."""
    from mllm.compare.commands import dataset_size  # imports torch
    from mllm.training.prepare import START_IMAGES

    start = "from stage 1" if arguments.stage == 2 else "random"
    if arguments.pretrain_mm_mlp_adapter is not None:
        start = f"from {arguments.pretrain_mm_mlp_adapter}"
    elif arguments.stage == 1 and arguments.mm_projector_init == "captions":
        start = f"fitted in closed form to the captions of {min(dataset_size(arguments), START_IMAGES):,} samples"
    return f"{arguments.mm_projector_type}, {start}"


def detectable_difference(comparison: Comparison, questions: int) -> float:
    """Return the difference that a comparison of this design sees with 80 % power, by the spreads of the demo."""
    groups = encoder_groups(comparison, *encoder_names(comparison))
    sizes = np.bincount(independent_runs(groups))
    seeds, runs = len(sizes), len(sizes) ** 2 / float((1 / sizes).sum())  # runs of unequal weight
    luck = ANSWER_VARIANCE * OF_QUESTIONS / questions / runs
    pretraining = ENCODER_VARIANCE / seeds if groups.max() > 0 else 0.0
    pictures = PICTURE_VARIANCE * OF_QUESTIONS / questions
    return detectable(pretraining + RUN_VARIANCE / runs + luck, pictures, luck, seeds, questions)


def power_in_words(comparison: Comparison) -> str:
    """What the comparison can see, said before anything is trained."""
    seeds = int(independent_runs(encoder_groups(comparison, *encoder_names(comparison))).max()) + 1
    if seeds < FEWEST_SEEDS:
        return f"{seeds} independent seed(s) are a look, without verdicts; --seeds {FEWEST_SEEDS} gives verdicts"
    by_file = {name: asked_questions(comparison, path) for name, path in question_files(comparison)[0].items()}
    points = 100 * detectable_difference(comparison, len(_of_deciding_column(by_file)))
    spreads = "the spreads measured on the demo" if is_demo(comparison) else "the demo's spreads, for want of its own"
    return f"a difference of {points:.1f} points is seen in 80 of 100 such comparisons, by {spreads}"


def _of_deciding_column(by_file: Mapping[str, list[Question]]) -> list[Question]:
    columns = columns_of(by_file)
    return [q for name, questions in by_file.items() if COLUMNS.get(name, name) == columns[0] for q in questions]


def comparison_of(plan: Mapping[str, Any], output: Path) -> Comparison:
    """The comparison of `plan`, with what it left in `output`; UserError for flags of another version."""
    flags = plan.get("comparison")
    known = {field.name for field in dataclasses.fields(Comparison)} - NOT_FIXED
    if plan.get("format") != FORMAT or not isinstance(flags, dict) or flags.keys() | LATER != known:
        raise UserError(f"{output}: its plan was written by another version of this program (format {FORMAT} is read)")
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}
    return Comparison(output=output, decides=plan.get("decides"), **given)


def stored_questions(output: Path) -> dict[str, Path]:
    """Name of the answers → copy of the question file, in the order in which they are compared."""
    return {path.stem: path for path in sorted((output / QUESTIONS).glob("*"))}


def asked_questions(comparison: Comparison, path: Path) -> list[Question]:
    """The questions of a file that every cell is asked, in their order."""
    return draw_evenly(read_questions(path), question_limit(comparison))


def kinds_of(questions: Iterable[Question]) -> dict[str, int]:
    """Kind → questions that have an answer."""
    return dict(Counter(question.kind for question in questions if question.answer is not None))


def deciding(comparison: Comparison, questions: Iterable[Question]) -> str | None:
    """The figure that decides; None if nothing is asked. UserError for a figure that the questions do not give."""
    questions = list(questions)
    kinds = list(kinds_of(questions))
    suffixes = [""] * bool(kinds) + [f"/{kind}" for kind in kinds if len(kinds) > 1]
    figures = [f"{name}{suffix}" for name in ("accuracy", *LIKELIHOODS) for suffix in suffixes]
    figures += ["cider_d"] * any(question.references for question in questions)
    if comparison.decides is not None and comparison.decides not in figures:
        raise UserError(f"--decides {comparison.decides}: these questions give {', '.join(figures) or 'no figure'}")
    return comparison.decides or next(iter(figures), None)
