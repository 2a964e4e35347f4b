"""What a comparison is fixed to before its first cell, in OUTPUT/compare.json, and whether it was kept to.

    format       1
    comparison   the flags that decide what is compared: encoders, seeds, budget, limit, … (not where, and how fast)
    decides      the figure that the comparison is made for, as `accuracy` or `accuracy/KIND`, of the deciding column
    is_demo      whether the cells train on the demo's data
    budget       the share of each stage's samples, the samples, and how each stage's projector starts
    questions    name → file, column (what sort of pictures), SHA-256, questions, how many are asked, of which kinds
    scorer       which scorer (`mllm.evaluation.scores.scorer_version`)
    cells_begun  cells that had begun when this was written: 0, or nothing was fixed before

OUTPUT/questions/NAME.jsonl is a copy of the file that is answered in CELL/evaluation/NAME.jsonl: so that a finished
comparison answers for itself.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from clips.common import rundir
from clips.common.errors import UserError
from clips.common.files import read_json, sha256
from mllm.compare.comparison import Comparison, question_limit
from mllm.data.questions import Question, draw_evenly, read_questions

PLAN, QUESTIONS = "compare.json", "questions"
FORMAT = 1
NOT_FIXED = {
    *("output", "jobs", "device", "question_file", "question_images", "include_path", "karpathy", "image_root"),
    "decides",
}
"""Fields of `Comparison` that say where and how fast; which questions, and what decides, a plan says in its own way."""


def fixed_flags(comparison: Comparison) -> dict[str, Any]:
    fields = dataclasses.asdict(comparison).items()
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields if name not in NOT_FIXED}


def comparison_of(plan: Mapping[str, Any], output: Path) -> Comparison:
    """The comparison that `plan` is of, with what it left in `output`; UserError for flags of another version."""
    flags, hints = plan.get("comparison"), get_type_hints(Comparison)
    known = hints.keys() - NOT_FIXED
    if plan.get("format") != FORMAT or not isinstance(flags, dict) or flags.keys() != known:
        raise UserError(f"{output}: its plan was written by another version of this program (format {FORMAT} is read)")
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}
    wrong = [name for name in sorted(known) if not _fits(given[name], hints[name])]
    if wrong:
        raise UserError(f"{output}: its plan gives {wrong[0]} as {given[wrong[0]]!r}")
    return Comparison(output=output, decides=plan.get("decides"), **given)


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(isinstance(part, str) for part in value)
    kinds = get_args(hint) or (hint,)
    return type(value) in kinds or (type(value) is int and float in kinds)


def stored_questions(output: Path) -> dict[str, Path]:
    """What the answers to each file are called → the copy of the file, in the order in which they are compared."""
    return {path.stem: path for path in sorted((output / QUESTIONS).glob("*"))}


def asked_questions(comparison: Comparison, path: Path) -> list[Question]:
    """The questions of a file that every cell is asked, in their order."""
    return draw_evenly(read_questions(path), question_limit(comparison))


def kinds_of(questions: Iterable[Question]) -> dict[str, int]:
    """Kind → questions that have an answer."""
    return dict(Counter(question.kind for question in questions if question.answer is not None))


def deciding(comparison: Comparison, questions: Iterable[Question]) -> str | None:
    """What the comparison is made for; None where nothing is asked. UserError for a figure that will not be there."""
    questions = list(questions)
    kinds = list(kinds_of(questions))
    figures = ["accuracy"] * bool(kinds) + [f"accuracy/{kind}" for kind in kinds if len(kinds) > 1]
    figures += ["cider_d"] * any(question.references for question in questions)
    if comparison.decides is not None and comparison.decides not in figures:
        raise UserError(f"--decides {comparison.decides}: these questions give {', '.join(figures) or 'no figure'}")
    return comparison.decides or next(iter(figures), None)


# ---------------------------------------------------------------------------------------------- what was kept
def read_plan(output: Path) -> dict[str, Any]:
    return read_json(output / PLAN)


def what_was_fixed(output: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Whether `plan`, by which the figures were made, is that of OUTPUT/compare.json; `differs` says in what it is not.

    `sha256` is that of the file, which each cell noted when it began.
    """
    before = read_plan(output)
    begun = before.pop("cells_begun", None)
    differs = rundir.difference(before, plan)
    if begun != 0:
        differs.append(f"{PLAN} was written when {begun} cell(s) had begun already")
    return {"sha256": sha256(output / PLAN), "kept": not differs, "differs": differs}
