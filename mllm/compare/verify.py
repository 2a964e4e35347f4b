"""Recompute the metrics of a finished comparison from its raw answers, and list what differs from report.json.

    report.json  compare.json  encoders.json  questions/NAME.jsonl
    runs/NAME/  run.json config.json env.json cost.json align/done.json instruct/done.json
                 evaluation/NAME.jsonl evaluation/results.json benchmarks/TASK/MODEL/DATE_results.json

A directory or an archive of these files can be verified on any machine, without model, images, network or torch. Every
answer is scored again, and the metrics of each run and all means, intervals and differences are recomputed. These are
taken as recorded: likelihoods of right answers, metrics of the encoders themselves (probe, retrieval, zero-shot), the
scores of lmms-eval, times and memory.
"""

import json
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clips.common.errors import CommandError, UserError, in_one_line
from clips.common.escape import printable
from clips.common.files import read_json, sha256
from clips.common.page import print_table, table_of
from clips.lab import archive
from clips.lab.archive import ENDING, mismatches
from clips.lab.grid import RECORD
from mllm.compare.analysis import REPORT, computed, stored_files
from mllm.compare.comparison import PLAN, Comparison, EncoderRun, comparison_of, stored_questions
from mllm.compare.report import headline
from mllm.data.questions import Question
from mllm.evaluation.report import metrics_of
from mllm.evaluation.scores import is_right, score, scorer_version

_NAME = r"(?!\.{1,2}(?:/|$))[^/\\\x00-\x1f]{1,200}"
MEMBER = re.compile(
    rf"(?:report|compare|encoders)\.json|questions/{_NAME}\.jsonl?|runs/{_NAME}/(?:(?:run|config|env|cost)\.json"
    rf"|(?:align|instruct)/done\.json|evaluation/{_NAME}\.jsonl?|benchmarks/{_NAME}/{_NAME}/{_NAME}_results\.json)"
)
"""Matches the paths of the files of a comparison."""
AS_RECORDED = ("command", "time", "environment")
"""Parts of report.json that cannot be recomputed from other files."""
OTHER_SHAPE = (OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError)
"""The errors that code raises on JSON of another form than it expects."""
NAMED = 30
"""Most differences to print."""


@dataclass
class Verification:
    """What a verification recomputed, and where that differs from the report."""

    report: dict[str, Any]
    differs: list[str] = field(default_factory=list)
    """Differences from report.json, one line each. The comparison is verified if there are none."""
    answers: int = 0
    """Number of answers that were scored again."""

    @property
    def kept(self) -> str:
        """A sentence that says whether the comparison kept to its plan."""
        fixed = self.report["fixed"]
        state = "kept" if fixed["kept"] else "not kept, as the report says: " + "; ".join(map(str, fixed["differs"]))
        return f"the plan that was fixed before ({PLAN}, SHA-256 {fixed['sha256']}): {state}"


def verify(output: Path) -> Verification:
    """Check the comparison in `output`. Raises UserError if there is none, or if its files cannot be read."""
    if not (output / REPORT).is_file():
        raise UserError(f"there is no {output / REPORT}: give the directory or the archive of a finished comparison")
    try:
        report = read_json(output / REPORT)
        return _verified(report, comparison_of(report["plan"], output))
    except OTHER_SHAPE as error:
        what = "cannot be verified, because its files are not what a comparison writes"
        raise UserError(f"{output} {what}: {in_one_line(error)}") from error


def _verified(report: dict[str, Any], comparison: Comparison) -> Verification:
    result = Verification(report)
    runs = comparison.runs
    directories = [path.name for path in (comparison.output / "runs").glob("*") if path.is_dir()]
    files = stored_questions(comparison.output)
    result.differs += _other("run", directories, [run.name for run in runs])
    result.differs += _other("question file", files, report["plan"]["questions"])
    for name, planned in report["plan"]["questions"].items():
        if name in files and sha256(files[name]) != planned["sha256"]:
            result.differs.append(f"question file {name} was changed: its SHA-256 is not the one in the plan")
    if result.differs:
        return result

    questions = {name: comparison.asked(path) for name, path in files.items()}
    plan = sha256(comparison.output / PLAN)
    for run in runs:
        result.differs += [f"run {run.name}: {text}" for text in _checked(run, plan, questions)]
        result.answers += sum(map(len, questions.values()))
    try:
        result.differs += _report(report, json.loads(json.dumps(computed(comparison, report["plan"]))))
    except UserError as error:  # for example because runs answered different questions
        result.differs.append(str(error))
    return result


def _other(kind: str, present: Collection[str], expected: Collection[str]) -> Iterator[str]:
    """Yield a line for each name that is missing or that does not belong to the comparison."""
    yield from (f"{kind} {name} is missing" for name in expected if name not in present)
    yield from (f"{kind} {name} does not belong to this comparison" for name in present if name not in expected)


def _checked(run: EncoderRun, plan: str, questions: Mapping[str, list[Question]]) -> Iterator[str]:
    """Yield a line for each thing that is wrong with the record, the answers or the metrics of a run.

    `plan` is the SHA-256 of the plan.
    """
    record = run.read(RECORD)
    expected: dict[str, Any] = {name: getattr(run, name) for name in ("encoder", "pretraining_seed", "seed")}
    expected["plan"] = plan
    yield from mismatches({name: record.get(name) for name in expected}, expected, RECORD)
    metrics: dict[str, Any] = {}
    for name, asked in questions.items():
        path = run.evaluation / f"{name}.jsonl"
        lines = [json.loads(line) for line in path.read_bytes().splitlines()] if path.is_file() else []
        if len(lines) != len(asked):
            yield f"it has {len(lines)} answers {name} to {len(asked)} questions"
            continue
        for question, line in zip(asked, lines, strict=True):
            about = {"question_id": question.id, "prompt": question.text, "image": question.image}
            if question.answer is not None:
                right = is_right(str(line["text"]), question.answer)
                about |= {"kind": question.kind, "expected": question.answer, "correct": right}
            place = f"answer to {name}, question {question.id}"
            yield from mismatches({key: line.get(key) for key in about}, about, place)
        scored = score(asked, [str(line["text"]) for line in lines])
        metrics |= metrics_of(name, scored, lines)
    recorded = run.read("evaluation/results.json")
    again = metrics | {"scorer": scorer_version()} if questions else {}
    recorded |= recorded.pop("metrics", {})
    yield from mismatches({name: recorded.get(name) for name in again}, again, "results.json")


def _report(report: Mapping[str, Any], again: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(report.keys() - again.keys() - set(AS_RECORDED)):
        yield f"{REPORT} holds {name!r}, which cannot be recomputed"
    before, now = report.get("files", {}), again["files"]
    names = sorted(before.keys() | now.keys())
    yield from (f"{name} was changed after the report" for name in names if before.get(name) != now.get(name))
    for name, value in again.items():
        yield from () if name == "files" else mismatches(report.get(name), value, name)


# ------------------------------------------------------------------------------------------- the commands
@contextmanager
def opened(place: Path) -> Iterator[Path]:
    """Yield the directory of a comparison: `place` itself or, for an archive, a temporary directory with its files.

    The temporary directory is removed at the end of the block. Raises UserError for an archive that is missing, damaged
    or too large, or that holds anything but the files of a comparison.
    """
    if place.is_dir():
        yield place
        return
    with tempfile.TemporaryDirectory() as directory:
        archive.unpack(place, Path(directory), MEMBER)
        yield Path(directory)


def verified(output: Path, called: Path) -> Verification:
    """Return the result of `verify`. Raises CommandError with a list of differences if there are any."""
    result = verify(output)
    if result.differs:
        lines = [*result.differs[:NAMED], f"{len(result.differs):,} differences in all", result.kept]
        raise CommandError(f"{called} is not what its report says:\n  " + "\n  ".join(lines))
    return result


def verify_from_flags(place: str) -> None:
    """Run `compare_encoders.py --verify PLACE`."""
    path = Path(place)
    with opened(path) as output:
        result = verified(output, path)
    print_table(table_of("mean ± standard deviation over seeds", *headline(result.report)))
    runs = len(result.report["runs"])
    print(f"verified: {runs} runs, {result.answers:,} answers scored again, every metric as in {REPORT}")
    print(printable(result.kept))
    print("taken as recorded: likelihoods, metrics of the encoders alone, scores of lmms-eval, times and memory")
    if path.is_file():
        print(f"SHA-256 of {place}: {sha256(path)}")


def pack(output: Path, packed: Path) -> str:
    """Write the comparison in `output` to the archive `packed`, and return the SHA-256 of the archive."""
    comparison = comparison_of(read_json(output / REPORT)["plan"], output)
    return archive.pack(output, [REPORT, *stored_files(comparison)], packed, MEMBER)


def pack_from_flags(directory: str) -> None:
    """Run `compare_encoders.py --pack DIR`, which verifies a comparison and writes it to DIR.tar.xz."""
    output = Path(directory)
    packed = output.parent / f"{output.resolve().name}{ENDING}"
    verified(output, output)
    digest = pack(output, packed)
    print(f"{packed}: {packed.stat().st_size:,} bytes, SHA-256 {digest}")
