"""Computes a finished comparison's figures again from its raw answers, and says which differ from report.json.

    report.json  compare.json  encoders.json  questions/NAME.jsonl
    cells/NAME/  cell.json config.json env.json cost.json align/done.json instruct/done.json
                 evaluation/NAME.jsonl evaluation/figures.json benchmarks/TASK/MODEL/DATE_results.json

An output directory or an archive of these files verifies on any machine, without model, pictures, network or torch.
Every answer is scored anew; each cell's figures, all means, intervals and differences are computed again. Taken as
recorded: the encoders' own figures (probe, retrieval, zero-shot), the scores of lmms-eval, times and memory.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from clips.common.errors import CommandError, UserError, in_one_line
from clips.common.escape import for_rich
from clips.common.files import read_json, sha256
from clips.common.page import print_table
from clips.common.paths import is_plain
from clips.lab import archive
from clips.lab.archive import ENDING, MOST_BYTES, differences
from clips.lab.grid import RECORD
from mllm.compare.cells import PLAN, EncoderCell, cells_of, encoder_names
from mllm.compare.comparison import Comparison
from mllm.compare.figures import REPORT, computed, stored_files
from mllm.compare.plan import asked_questions, comparison_of, stored_questions
from mllm.compare.words import headline
from mllm.data.questions import Question, of_set
from mllm.evaluation.scores import is_right, score, scorer_version

_NAME = r"(?!\.{1,2}(?:/|$))[^/\\\x00-\x1f]{1,200}"
MEMBER = re.compile(
    rf"(?:report|compare|encoders)\.json|questions/{_NAME}\.jsonl?|cells/{_NAME}/(?:(?:cell|config|env|cost)\.json"
    rf"|(?:align|instruct)/done\.json|evaluation/{_NAME}\.jsonl?|benchmarks/{_NAME}/{_NAME}/{_NAME}_results\.json)"
)
AS_RECORDED = ("command", "time", "environment")
"""Parts of report.json that no file says again."""
MOST_ENCODERS, MOST_SEEDS = 50, 100
MOST_ANSWERS, MOST_DIFFERENCES = 1_000_000, 5_000
"""Answers of all cells, and pairs of encoders times kinds of questions: each difference takes milliseconds."""
OTHER_SHAPE = (OSError, KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
"""What code raises that reads JSON of another shape than it expects."""
NAMED = 30
"""Differences that are printed."""


@dataclass
class Verification:
    report: dict[str, Any]
    differs: list[str] = field(default_factory=list)
    """What is not as report.json says, one line each; empty: the comparison is verified."""
    kept: str = ""
    """Whether the comparison was kept to its plan, in words."""
    answers: int = 0
    """Scored anew."""


def verify(output: Path) -> Verification:
    """Check the comparison in `output`. Raises UserError if there is none, or one that cannot be read at all."""
    try:
        return _verify(output)
    except (*OTHER_SHAPE, SystemExit) as error:  # whatever would end this process is no verification
        what = "cannot be verified, its files are not what a comparison writes"
        raise UserError(f"{output} {what}: {in_one_line(error)}") from error


def _verify(output: Path) -> Verification:
    if not (output / REPORT).is_file():
        raise UserError(f"there is no {output / REPORT}: give the directory or the archive of a finished comparison")
    report = read_json(output / REPORT)
    if "plan" not in report:
        raise UserError(f"{output} holds no {REPORT} of a finished comparison that says what it was fixed to")
    comparison = _bounded(comparison_of(report["plan"], output))
    if sum((output / name).stat().st_size for name in stored_files(comparison)) > MOST_BYTES:
        raise UserError(f"{output} holds more than {MOST_BYTES:,} bytes")
    found, cells, files = Verification(report), cells_of(comparison), stored_questions(output)
    there = [path.name for path in (output / "cells").glob("*") if path.is_dir()]
    found.differs += _other("cell", there, [cell.name for cell in cells])
    found.differs += _other("question file", files, report["plan"]["questions"])
    for name, asks in report["plan"]["questions"].items():
        if name in files and sha256(files[name]) != asks["sha256"]:
            found.differs.append(f"question file {name} was changed: its SHA-256 is not the one in the plan")
    if not found.differs:
        asked = {name: asked_questions(comparison, path) for name, path in files.items()}
        _check_work(comparison, len(cells), asked)
        for cell in cells:
            found.differs += [f"cell {cell.name}: {text}" for text in _cell(comparison, cell, asked)]
            found.answers += sum(map(len, asked.values()))
        try:
            found.differs += _report(report, json.loads(json.dumps(computed(comparison, report["plan"]))))
        except UserError as error:  # such as cells that were asked different things
            found.differs.append(str(error))
        except OTHER_SHAPE as error:
            found.differs.append(f"the figures cannot be computed again: {in_one_line(error)}")
    fixed = report["fixed"]
    state = "kept" if fixed["kept"] else "not kept, as the report says: " + "; ".join(map(str, fixed["differs"]))
    found.kept = f"what was fixed before ({PLAN}, SHA-256 {fixed['sha256']}): {state}"
    return found


def _bounded(comparison: Comparison) -> Comparison:
    """`comparison`, if it asks for no more than a machine can compute."""
    seeds = max(comparison.seeds, comparison.llava_runs or 0)
    arms = len(comparison.encoders) * (1 + len(comparison.variants))  # counted before any is made
    if arms > MOST_ENCODERS or seeds > MOST_SEEDS:
        raise UserError(f"{comparison.output}: more than {MOST_ENCODERS} encoders or {MOST_SEEDS} seeds")
    if outside := [task for task in comparison.benchmarks if not is_plain(task)]:
        raise UserError(f"{comparison.output}: benchmark {outside[0]!r} leads out of a cell")
    return comparison


def _check_work(comparison: Comparison, cells: int, asked: Mapping[str, list[Question]]) -> None:
    """Raise UserError for more answers or differences than a comparison has: a small archive may repeat much."""
    answers = cells * sum(map(len, asked.values()))
    kinds = {(name, question.kind) for name, questions in asked.items() for question in questions}
    differences_asked = math.comb(len(encoder_names(comparison)), 2) * len(kinds)
    if answers > MOST_ANSWERS or differences_asked > MOST_DIFFERENCES:
        raise UserError(
            f"{comparison.output}: {answers:,} answers and {differences_asked:,} differences between encoders are more "
            f"than is verified ({MOST_ANSWERS:,} and {MOST_DIFFERENCES:,})"
        )


def _other(kind: str, there: Collection[str], wanted: Collection[str]) -> Iterator[str]:
    """Names that are missing, and names that are no part of the comparison."""
    yield from (f"{kind} {name} is missing" for name in wanted if name not in there)
    yield from (f"{kind} {name} is none of this comparison's" for name in there if name not in wanted)


def _cell(comparison: Comparison, cell: EncoderCell, asked: Mapping[str, list[Question]]) -> Iterator[str]:
    """What is wrong with a cell's record, its answers and its own figures."""
    record = cell.read(RECORD)
    wanted: dict[str, Any] = {name: getattr(cell, name) for name in ("encoder", "pretraining_seed", "seed")}
    wanted["plan"] = sha256(comparison.output / PLAN)
    yield from differences({name: record.get(name) for name in wanted}, wanted, RECORD)
    if not asked:
        return
    recorded = cell.read("evaluation/figures.json")
    again: dict[str, Any] = {"scorer": scorer_version()}
    sets = list(recorded.get("sets", {}))
    for name in sorted(asked, key=lambda name: sets.index(name) if name in sets else len(sets)):  # as it did
        path = cell.evaluation / f"{name}.jsonl"
        lines = [json.loads(line) for line in path.read_bytes().splitlines()] if path.is_file() else []
        if len(lines) != len(asked[name]):
            yield f"it has {len(lines)} answers {name} to {len(asked[name])} questions"
            continue
        yield from _answers(name, asked[name], lines)
        again |= of_set(name, score(asked[name], [str(line["text"]) for line in lines]))
    yield from differences({key: recorded.get(key) for key in again}, again, "figures.json")


def _answers(name: str, questions: list[Question], lines: list[dict[str, Any]]) -> Iterator[str]:
    for question, line in zip(questions, lines, strict=True):
        about = {"question_id": question.id, "prompt": question.text, "image": question.image}
        if question.answer is not None:
            right = is_right(str(line["text"]), question.answer)
            about |= {"kind": question.kind, "expected": question.answer, "correct": right}
        yield from differences(
            {key: line.get(key) for key in about}, about, f"answer to {name}, question {question.id}"
        )


def _report(report: Mapping[str, Any], again: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(report.keys() - again.keys() - set(AS_RECORDED)):
        yield f"{REPORT} holds {name!r}, which is computed by nothing here"
    before, now = report.get("files", {}), again["files"]
    names = sorted(before.keys() | now.keys())
    yield from (f"{name} was changed after the report" for name in names if before.get(name) != now.get(name))
    for name, value in again.items():
        yield from () if name == "files" else differences(report.get(name), value, name)


# ------------------------------------------------------------------------------------------- the commands
@contextmanager
def opened(place: Path) -> Iterator[Path]:
    """The directory of a comparison: `place` itself, or where the archive `place` is unpacked for the time being."""
    if place.is_dir():
        yield place
        return
    with tempfile.TemporaryDirectory() as directory:
        archive.unpack(place, Path(directory), MEMBER)
        yield Path(directory)


def verified(output: Path, called: Path) -> Verification:
    """`verify`; CommandError, listing what differs, unless the comparison is what its report says."""
    try:
        found = verify(output)
    except UserError as error:  # of an archive that is unpacked for the time being
        raise UserError(str(error).replace(str(output), str(called))) from None
    if found.differs:
        more = len(found.differs) - NAMED
        lines = found.differs[:NAMED] + [f"and {more:,} more"] * (more > 0) + [f"({found.kept})"]
        raise CommandError(f"{called} is not what its report says:\n  " + "\n  ".join(lines))
    return found


def verify_from_flags(place: str) -> None:
    """What `compare_encoders.py --verify PLACE` does."""
    path = Path(place)
    with opened(path) as output:
        found = verified(output, path)
    print_table("mean ± standard deviation over seeds", *headline(found.report))
    cells = len(found.report["cells"])
    lines = [
        f"verified: {cells} cells, {found.answers:,} answers scored anew, every figure as in {REPORT}",
        found.kept,
        "taken as recorded: the encoders' own figures, scores of lmms-eval, times and memory of each cell",
        *([] if path.is_dir() else [f"SHA-256 of {place}: {sha256(path)}"]),
    ]
    for line in lines:
        Console(emoji=False).print(for_rich(line), highlight=False, soft_wrap=True)


def pack(output: Path, packed: Path) -> str:
    """Write the comparison in `output` to the archive `packed`; returns the archive's SHA-256."""
    comparison = comparison_of(read_json(output / REPORT)["plan"], output)
    return archive.pack(output, [REPORT, *stored_files(comparison)], packed, MEMBER)


def pack_from_flags(directory: str) -> None:
    """What `compare_encoders.py --pack DIR` does: DIR.tar.xz, of a comparison that verifies."""
    output = Path(directory)
    packed = output.parent / f"{output.resolve().name}{ENDING}"
    verified(output, output)
    digest = pack(output, packed)
    shown = f"{packed}: {packed.stat().st_size:,} bytes, SHA-256 {digest}"
    Console(emoji=False).print(for_rich(shown), highlight=False, soft_wrap=True)
