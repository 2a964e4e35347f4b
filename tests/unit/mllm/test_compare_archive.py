"""A finished comparison computed again from its raw answers; its archive; what is fixed before the first cell."""

from __future__ import annotations

import dataclasses
import hashlib
import html
import io
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from tiny_compare import comparison_of, finish, made, reported

from clips.common.errors import CommandError, UserError
from clips.common.files import read_json, sha256
from clips.common.page import as_html
from clips.lab import archive
from clips.lab.archive import unpack
from mllm.compare.cells import PLAN, cells_of
from mllm.compare.comparison import Comparison
from mllm.compare.plan import comparison_of as comparison_of_plan
from mllm.compare.plan import fix_plan, plan_of
from mllm.compare.report import page, sentence
from mllm.compare.verify import MEMBER, opened, pack, pack_from_flags, verified, verify

__all__ = ["made"]  # a fixture
CELL = "cells/random-seed1"
ANSWERS, FIGURES = f"{CELL}/evaluation/question.jsonl", f"{CELL}/evaluation/figures.json"
HEAVY = ("torch", "transformers", "deepspeed", "peft", "matplotlib", "PIL", "mllm.model", "mllm.training.run")


@pytest.fixture(scope="module")
def original(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comparison]:
    """Two encoders, two runs each, finished and reported; the current directory is where its encoders are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        comparison = finish(
            comparison_of(tmp_path_factory.mktemp("original"), encoders=("clips:clips-run", "random"), seeds=2)
        )
        reported(comparison)
        yield comparison


@pytest.fixture
def output(original: Comparison, tmp_path: Path) -> Path:
    """A copy of what the comparison left, elsewhere."""
    return shutil.copytree(original.output, tmp_path / "copy")


def edit(path: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def replace(path: Path, before: str, after: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert before in text
    path.write_text(text.replace(before, after, 1), encoding="utf-8")


# --------------------------------------------------------------------------------------------------------- verified


def test_an_untouched_comparison_verifies(output: Path) -> None:
    found = verify(output)
    assert found.differs == []
    assert found.answers == 4 * 36
    assert "kept" in found.kept


def answer_better_and_hide_it(output: Path) -> None:
    """With every hash beside it: the figures still tell."""
    lines = [json.loads(line) | {"text": "yes", "correct": True} for line in (output / ANSWERS).open()]
    (output / ANSWERS).write_text("".join(json.dumps(line) + "\n" for line in lines))

    def own(figures: dict) -> None:
        figures["sets"]["question"]["answers"]["sha256"] = sha256(output / ANSWERS)
        for kind in figures["exact_match"].values():
            kind["accuracy"] = 1.0

    def hashes(report: dict) -> None:
        report["files"] = {name: sha256(output / name) for name in report["files"]}

    edit(output / FIGURES, own)
    edit(output / "report.json", hashes)


def answer_better(output: Path) -> None:
    """The whole line as if the model had said so."""
    replace(output / ANSWERS, '"<b>no"', '"yes"')
    replace(output / ANSWERS, '"correct": false', '"correct": true')


def an_answer_less(output: Path) -> None:
    path = output / ANSWERS
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def in_the_report(**changes: Any) -> Callable[[Path], None]:
    return lambda output: edit(output / "report.json", lambda report: report.update(changes))


def decide_otherwise(*names: str) -> Callable[[Path], None]:
    def change(content: dict) -> None:
        content.get("plan", content).update(decides="accuracy/where")

    return lambda output: [edit(output / name, change) for name in names]


@pytest.mark.parametrize(
    ("tamper", "said"),
    [
        (
            lambda output: edit(output / "report.json", lambda r: r["encoders"]["clips"]["metrics"].update(accuracy=0)),
            r"encoders\.clips\.metrics\.accuracy: 0 as recorded, .* computed again",
        ),
        (
            lambda output: replace(output / ANSWERS, '"correct": false', '"correct": true'),
            r"cell random-seed1: answer to question, question \d+\.correct: true as recorded, false computed again",
        ),
        (answer_better, r"cell random-seed1: figures\.json\.exact_match"),
        (answer_better_and_hide_it, r"encoders\.random\.metrics\.accuracy\.mean: .*computed again\n"),
        (
            lambda output: replace(output / "questions" / "question.jsonl", '"where?"', '"Where, please?"'),
            r"question file question was changed",
        ),
        (lambda output: shutil.rmtree(output / CELL), r"cell random-seed1 is missing"),
        (
            lambda output: shutil.copytree(output / CELL, output / "cells" / "random-seed2"),
            r"cell random-seed2 is none of this comparison's",
        ),
        (
            lambda output: edit(output / FIGURES, lambda figures: figures.update(scorer="0" * 64)),
            r'random-seed1: figures\.json\.scorer: "0{64}" as recorded',
        ),
        (decide_otherwise("report.json"), r"fixed\.kept: true as recorded, false computed again"),
        (decide_otherwise("report.json", PLAN), r"cell clips-clips-run-seed0: cell\.json\.plan: "),
        (
            lambda output: edit(output / CELL / "cell.json", lambda record: record.update(seed=7)),
            r"cell random-seed1: cell\.json\.seed: 7 as recorded, 1 computed again",
        ),
        (in_the_report(reviewers={"liked": 1}), r"report\.json holds 'reviewers', which is computed by nothing"),
        (an_answer_less, r"cell random-seed1: it has 35 answers question to 36 questions"),
        (
            lambda output: edit(output / CELL / "cost.json", lambda cost: cost.update(align=1.0)),
            r"cells/random-seed1/cost\.json was changed after the report",
        ),
    ],
)
def test_what_was_changed_is_named_and_not_packed(output: Path, tamper: Callable[[Path], Any], said: str) -> None:
    tamper(output)
    for check in (lambda: verified(output, output), lambda: pack_from_flags(str(output))):
        with pytest.raises(CommandError, match=said) as failed:
            check()
        assert failed.value.exit_code == 1
    assert not list(output.parent.glob("*.tar.xz"))


def test_another_scorer_here_is_named(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that scores otherwise: then the figures differ as well."""
    monkeypatch.setattr("mllm.compare.verify.scorer_version", lambda: "f" * 64)
    monkeypatch.setattr("mllm.compare.figures.scorer_version", lambda: "f" * 64)
    found = verify(output).differs
    assert sum("figures.json.scorer: " in line for line in found) == 4
    assert any(line.startswith("scorer: ") for line in found)
    monkeypatch.setattr("mllm.compare.verify.is_right", lambda answer, expected: True)
    assert any("correct: false as recorded, true computed again" in line for line in verify(output).differs)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("report.json", "[" * 200_000, "nested too deep"),
        ("report.json", "{}", "says what it was fixed to"),
        ("report.json", '{"plan": {"format": 99}}', "another version of this program"),
        (f"{CELL}/config.json", "{}", "figures cannot be computed again: KeyError"),
        (ANSWERS, "[1, 2]\n" * 36, "cannot be verified"),
        ("plan", {"llava_runs": 10**9}, "more than 50 encoders or 100 seeds"),
        ("plan", {"variants": [["a", []]] * 30}, "more than 50 encoders"),
        ("plan", {"encoders": "clips"}, "'c' is not known"),
        ("plan", {"benchmarks": ["../../elsewhere"]}, "leads out of a cell"),
        ("plan", {"output": "/"}, "another version"),
        ("plan", {"train_flags": ["--help"]}, "not what its report says"),  # words: none is parsed
        ("plan", {"encoders": ["hf:/", "timm:../pipe"]}, "is missing"),  # names: no path in a plan is opened
    ],
)
def test_files_of_another_shape_and_plans_that_ask_too_much_are_refused(
    output: Path, name: str, content: Any, said: str
) -> None:
    if name == "plan":
        os.mkfifo(output.parent / "pipe")
        edit(output / "report.json", lambda report: report["plan"]["comparison"].update(content))
    else:
        (output / name).write_text(content)
    with pytest.raises(CommandError, match=said):
        verified(output, output)


def test_what_would_end_the_process_with_0_verifies_nothing(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As argparse did for a plan with --help."""
    monkeypatch.setattr("mllm.compare.verify.scorer_version", lambda: sys.exit(0))
    with pytest.raises(CommandError, match="cannot be verified") as failed:
        verified(output, output)
    assert failed.value.exit_code != 0


@pytest.mark.parametrize("limit", ["MOST_ANSWERS", "MOST_DIFFERENCES"])
def test_the_work_of_verifying_is_bounded(output: Path, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    """Two encoders, two runs each: 144 answers, and a difference for each of three kinds of questions."""
    monkeypatch.setattr(f"mllm.compare.verify.{limit}", {"MOST_ANSWERS": 144, "MOST_DIFFERENCES": 3}[limit])
    assert verify(output).differs == []
    monkeypatch.setattr(f"mllm.compare.verify.{limit}", {"MOST_ANSWERS": 143, "MOST_DIFFERENCES": 2}[limit])
    with pytest.raises(UserError, match="144 answers and 3 differences between encoders are more than is verified"):
        verify(output)


# ----------------------------------------------------------------------------------------------------- fixed before


def test_the_plan_stands_before_the_first_cell(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    comparison = comparison_of(tmp_path, seeds=2)
    fix_plan(dataclasses.replace(comparison, decides="accuracy/where"))
    assert read_json(comparison.output / PLAN)["decides"] == "accuracy/where"
    fix_plan(comparison)  # nothing has begun: a mind may be changed
    plan = read_json(comparison.output / PLAN)
    assert plan.pop("cells_begun") == 0
    assert plan == json.loads(json.dumps(plan_of(comparison)))
    assert (plan["decides"], plan["comparison"]["seeds"], plan["budget"]["share"]) == ("accuracy", 2, 1.0)
    (asked,) = plan["questions"].values()
    assert asked["kinds"] == {"identity": 12, "where": 12, "yes_no": 12}
    assert asked["sha256"] == hashlib.sha256((made / "question.jsonl").read_bytes()).hexdigest()
    again = comparison_of_plan(plan, comparison.output)
    assert [cell.directory for cell in cells_of(again)] == [cell.directory for cell in cells_of(comparison)]
    with pytest.raises(UserError, match=r"--decides accuracy/count: these questions give accuracy, accuracy/identity"):
        fix_plan(dataclasses.replace(comparison, decides="accuracy/count"))


def test_a_change_of_mind_and_a_late_plan_are_in_the_report_and_verify(output: Path) -> None:
    """The first plan stays; the report says what is otherwise."""
    comparison = comparison_of_plan(json.loads((output / "report.json").read_text())["plan"], output)
    comparison = dataclasses.replace(comparison, questions=Path("question.jsonl"), image_folder=Path("images"))
    comparison = dataclasses.replace(comparison, device="cpu")
    before = sha256(output / PLAN)
    kept = reported(comparison)
    assert (kept["fixed"]["kept"], kept["fixed"]["sha256"]) == (True, before)
    assert "fixed before the first cell, and kept to" in as_html(page(kept, None))
    report = reported(dataclasses.replace(comparison, decides="accuracy/where"))
    assert sha256(output / PLAN) == before
    differs = ['decides: "accuracy" → "accuracy/where"']
    assert report["fixed"] == {"sha256": before, "kept": False, "differs": differs}
    text = html.unescape(as_html(page(report, None)))
    assert "was not kept to: decides: " in text
    wheres = [row for row in report["differences"] if row["metric"] == "accuracy/where"]
    assert all(sentence(row) in text for row in wheres)
    assert " more where questions right than " in sentence(wheres[0] | {"verdict": "win"})
    found = verify(output)
    assert found.differs == []
    assert "not kept" in found.kept
    (output / PLAN).unlink()
    assert reported(comparison)["fixed"]["differs"] == ["compare.json was written when 4 cell(s) had begun already"]


# ---------------------------------------------------------------------------------------------------------- archive


VERIFY = f"""
import runpy, sys
sys.argv = ["compare_encoders.py", "--verify", "sent.tar.xz"]
try:
    runpy.run_path("{ROOT}/scripts/compare_encoders.py", run_name="__main__")
finally:
    print("loaded:", [name for name in {HEAVY} if name in sys.modules])
"""


def test_an_archive_verifies_elsewhere_by_the_command(
    output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Packed, unpacked and computed again in a process that sees no encoder, model or picture, and loads no torch."""
    pack_from_flags(str(output))
    packed = tmp_path / "copy.tar.xz"
    assert sha256(packed) in capsys.readouterr().out.replace("\n", "")
    assert packed.stat().st_size < 100_000
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(packed, elsewhere / "sent.tar.xz")
    shutil.rmtree(output)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HOME": str(elsewhere)}
    command = [sys.executable, "-c", VERIFY]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("loaded: []\n")
    assert "4 cells, 144 answers scored anew" in done.stdout
    with opened(elsewhere / "sent.tar.xz") as found:
        report = json.loads((found / "report.json").read_text())
    shown = {f"{100 * encoder['metrics']['accuracy']['mean']:.1f} ±" for encoder in report["encoders"].values()}
    assert all(text in done.stdout for text in shown)
    assert list(elsewhere.iterdir()) == [elsewhere / "sent.tar.xz"]


def test_the_same_comparison_gives_the_same_bytes(output: Path, tmp_path: Path) -> None:
    first = pack(output, tmp_path / "first.tar.xz")
    other = shutil.copytree(output, tmp_path / "other", copy_function=shutil.copyfile)
    for path in other.rglob("*"):
        os.utime(path, (1, 1))
    (other / "cells" / "random-seed1.log").write_text("printed")  # not what figures rest on
    (other / CELL / "model").mkdir()
    (other / CELL / "model" / "model.safetensors").write_bytes(b"large")
    assert pack(other, tmp_path / "second.tar.xz") == first == sha256(tmp_path / "second.tar.xz")


def archive_of(place: Path, *members: tarfile.TarInfo | str) -> Path:
    """An archive with these members; a name alone is a file of a few bytes."""
    path, stream = place / "sent.tar.xz", io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for member in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = 2 if info.isreg() else 0
            tar.addfile(info, io.BytesIO(b"{}") if info.isreg() else None)
    path.write_bytes(lzma.compress(stream.getvalue()))
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("members", "said"),
    [
        (["report.json", "../outside.json"], "points outside"),
        (["report.json", "cells/x/evaluation/a/b.jsonl"], "is no file of such a study"),
        (["report.json", "cells/x/model/model.safetensors"], "is no file of such a study"),
        (["report.json", "report.json"], "appears twice"),
        ([special("report.json", tarfile.SYMTYPE, "/etc/passwd")], "is a link"),
        (["report.json", special("cells/x/cell.json", tarfile.FIFOTYPE)], "not a regular file"),
        ([], "empty"),
    ],
)
def test_an_archive_with_anything_else_is_refused(tmp_path: Path, members: list, said: str) -> None:
    sent, place = archive_of(tmp_path, *members), tmp_path / "a" / "b" / "place"
    place.mkdir(parents=True)
    with pytest.raises(UserError, match=said):
        unpack(sent, place, MEMBER)
    assert [path.name for path in tmp_path.rglob("*.json")] == []


def test_a_file_that_is_no_archive_is_refused(output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "place"
    place.mkdir()
    good = tmp_path / "good.tar.xz"
    pack(output, good)
    whole = good.read_bytes()
    for content, said in (
        (whole[:-100], "is cut off"),
        (whole[:2000] + bytes(100) + whole[2100:], "no xz file, or damaged"),
        (b"PK\x03\x04 a zip file, and no other", "no xz file"),
        (lzma.compress(b"no tar at all" * 1000), "not an uncompressed tar"),
        (b"", "is cut off"),
    ):
        (tmp_path / "sent").write_bytes(content)
        with pytest.raises(UserError, match=said):
            unpack(tmp_path / "sent", place, MEMBER)
    with pytest.raises(UserError, match="there is no archive"):
        unpack(tmp_path / "nothing", place, MEMBER)


def test_an_archive_costs_no_more_than_the_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.setattr(archive, "MOST_BYTES", 5_000_000)
    bomb = tmp_path / "bomb.tar.xz"
    bomb.write_bytes(lzma.compress(bytes(30_000_000), preset=1))
    assert bomb.stat().st_size < 100_000
    with pytest.raises(UserError, match="unpacks to more than 5,000,000 bytes"):
        unpack(bomb, place, MEMBER)
    assert (place / "archive.tar").stat().st_size <= 6_000_000
    many = archive_of(tmp_path, "report.json", *(f"cells/{i}/cell.json" for i in range(30)))
    monkeypatch.setattr(archive, "MOST_MEMBERS", 30)
    with pytest.raises(UserError, match="more than 30 files"):
        unpack(many, place, MEMBER)
    monkeypatch.setattr(archive, "MOST_MEMORY", 100_000)
    with pytest.raises(UserError, match="needs too much memory"):
        unpack(many, place, MEMBER)
    monkeypatch.setattr(archive, "MOST_PACKED", 100)
    with pytest.raises(UserError, match="more than 100 bytes"):
        unpack(many, place, MEMBER)
