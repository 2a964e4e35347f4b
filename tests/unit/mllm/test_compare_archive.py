"""A finished comparison computed again from raw answers; its archive and pages; what is fixed before; what it sees."""

from __future__ import annotations

import dataclasses
import html
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from tiny_compare import comparison_of, finish, made, place, reported

from clips.common.errors import CommandError, UserError
from clips.common.files import read_json, sha256
from clips.common.page import as_html
from clips.lab import archive
from clips.lab.archive import unpack
from clips.lab.stats import interval, over_groups, verdict
from mllm.compare.analysis import (
    ANSWER_VARIANCE,
    ENCODER_VARIANCE,
    IMAGE_VARIANCE,
    OF_QUESTIONS,
    RUN_VARIANCE,
    detectable_difference,
    power_in_words,
)
from mllm.compare.commands import fix_plan, lab_run, plan_of
from mllm.compare.comparison import LIMIT, PLAN, Comparison
from mllm.compare.comparison import comparison_of as comparison_of_plan
from mllm.compare.report import design_in_words, page, sentence
from mllm.compare.verify import MEMBER, pack, pack_from_flags, verify
from tools.update_docs import main, take, update_pages

__all__ = ["made", "place"]  # fixtures
CELL = "runs/random-seed1"
ANSWERS, METRICS = f"{CELL}/evaluation/question.jsonl", f"{CELL}/evaluation/results.json"
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


def test_an_untouched_comparison_verifies(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verification = verify(output)
    assert verification.differs == []
    assert verification.answers == 4 * 36
    assert "kept" in verification.kept
    monkeypatch.setattr("mllm.compare.verify.scorer_version", lambda: "f" * 64)
    assert sum("results.json.scorer" in line for line in verify(output).differs) == 4, "another scorer here is named"


def test_a_likelihood_that_decides_is_compared_and_computed_again(place: Path) -> None:
    comparison = finish(comparison_of(place, decides="log_likelihood/where"))
    runs = {run.name: run for run in comparison.runs}
    assert all("--likelihood" in lab_run(comparison, run).steps[-1].command for run in runs.values())
    report = reported(comparison)
    means = {}
    for name, run in runs.items():
        lines = [json.loads(line) for line in (run.evaluation / "question.jsonl").open()]
        means[name] = fmean(line["log_likelihood"] for line in lines if line["kind"] == "where")
    differences = [means[f"clips-clips-run-seed{seed}"] - means[f"clip-clip-run-seed{seed}"] for seed in range(3)]
    rows = {row["metric"]: row for row in report["differences"] if (row["a"], row["b"]) == ("clips", "clip")}
    row = rows["log_likelihood/where"]
    assert row["mean"] == pytest.approx(fmean(differences))
    words = r"clips is \d\.\d\d nats per token \[.*\] above clip: log likelihood, where\."
    assert row["verdict"] == "undecided"  # of three seeds
    assert re.fullmatch(words, sentence(row | {"verdict": "win"}))
    described = row | {"verdict": "win", "metric": "cider_d", "mean": 0.013, "ci95": [0.002, 0.024]}
    assert sentence(described) == "clips describes 1.3 points of CIDEr-D × 100 [+0.2, +2.4] better than clip."
    assert verify(comparison.output).differs == []
    changed = runs["random-seed1"].evaluation / "question.jsonl"
    lines = [json.loads(line) for line in changed.open()]
    lines[0]["share"] = 1.0
    changed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert any("results.json.share_identity.value" in line for line in verify(comparison.output).differs)
    with pytest.raises(UserError, match="share/where"):
        plan_of(comparison_of(place, decides="share/colour"))


def answer_better_and_hide_it(output: Path) -> None:
    """With every hash beside it: the metrics still tell."""
    lines = [json.loads(line) | {"text": "yes", "correct": True} for line in (output / ANSWERS).open()]
    (output / ANSWERS).write_text("".join(json.dumps(line) + "\n" for line in lines))

    def own(metrics: dict) -> None:
        metrics["sets"]["question"]["answers"]["sha256"] = sha256(output / ANSWERS)
        for kind in metrics["metrics"].values():
            kind["value"] = 100.0

    def hashes(report: dict) -> None:
        report["files"] = {name: sha256(output / name) for name in report["files"]}

    edit(output / METRICS, own)
    edit(output / "report.json", hashes)


@pytest.mark.parametrize(
    ("tamper", "named"),
    [
        (
            lambda output: edit(output / "report.json", lambda r: r["encoders"]["clips"]["metrics"].update(accuracy=0)),
            r"encoders\.clips\.metrics\.accuracy",
        ),
        (answer_better_and_hide_it, r"encoders\.random\.metrics\.accuracy\.mean"),
        (lambda output: replace(output / "questions" / "question.jsonl", '"where?"', '"Where?"'), "question file"),
        (lambda output: shutil.rmtree(output / CELL), "run random-seed1 is missing"),
        (lambda output: edit(output / PLAN, lambda plan: plan.update(decides="accuracy/where")), r"run\.json\.plan"),
    ],
)
def test_what_was_changed_is_named_and_not_packed(output: Path, tamper: Callable[[Path], Any], named: str) -> None:
    tamper(output)
    with pytest.raises(CommandError, match=named) as failed:
        pack_from_flags(str(output))
    assert failed.value.exit_code == 1
    assert not list(output.parent.glob("*.tar.xz"))


def test_a_comparison_of_an_earlier_version_is_refused_and_not_begun_again(made: Path, output: Path) -> None:
    edit(output / "report.json", lambda report: report["plan"].update(format=1))
    edit(output / PLAN, lambda plan: plan.update(format=1))
    with pytest.raises(UserError, match="its format is 1, not 2"):
        verify(output)
    with pytest.raises(UserError, match="its format is 1, not 2"):
        fix_plan(dataclasses.replace(comparison_of(output.parent), output=output))


# ----------------------------------------------------------------------------------------------------- fixed before


def test_the_plan_stands_before_the_first_run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    comparison = comparison_of(tmp_path, seeds=2)
    fix_plan(dataclasses.replace(comparison, decides="accuracy/where"))
    fix_plan(comparison)  # nothing has begun: a mind may be changed
    plan = read_json(comparison.output / PLAN)
    assert plan.pop("runs_begun") == 0
    assert plan == json.loads(json.dumps(plan_of(comparison)))
    assert (plan["decides"], plan["comparison"]["seeds"], plan["budget"]["share"]) == ("accuracy", 2, 1.0)
    (asked,) = plan["questions"].values()
    assert asked["kinds"] == {"identity": 12, "where": 12, "yes_no": 12}
    assert asked["sha256"] == sha256(made / "question.jsonl")
    again = comparison_of_plan(plan, comparison.output)
    assert [run.directory for run in again.runs] == [run.directory for run in comparison.runs]
    with pytest.raises(UserError, match="--decides accuracy/count"):
        fix_plan(dataclasses.replace(comparison, decides="accuracy/count"))


def test_a_change_of_mind_and_a_late_plan_are_in_the_report_and_verify(output: Path) -> None:
    """The first plan stays; the report says what is otherwise."""
    comparison = comparison_of_plan(json.loads((output / "report.json").read_text())["plan"], output)
    comparison = dataclasses.replace(
        comparison, questions=Path("question.jsonl"), image_folder=Path("images"), device="cpu"
    )
    before = sha256(output / PLAN)
    assert reported(comparison)["fixed"]["kept"]
    report = reported(dataclasses.replace(comparison, decides="accuracy/where"))
    assert sha256(output / PLAN) == before
    differs = ['decides: "accuracy" → "accuracy/where"']
    assert report["fixed"] == {"sha256": before, "kept": False, "differs": differs}
    text = html.unescape(as_html(page(report, None)))
    assert "was not kept: decides: " in text
    wheres = [row for row in report["differences"] if row["metric"] == "accuracy/where"]
    assert all(sentence(row) in text for row in wheres)
    verification = verify(output)
    assert verification.differs == []
    assert "not kept" in verification.kept
    (output / PLAN).unlink()
    assert reported(comparison)["fixed"]["differs"] == ["compare.json was written when 4 run(s) had begun already"]


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
    """Packed, unpacked and computed again in a process that sees no encoder, model or image, and loads no torch."""
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
    assert "4 runs, 144 answers scored again" in done.stdout
    assert list(elsewhere.iterdir()) == [elsewhere / "sent.tar.xz"]


def test_the_same_comparison_gives_the_same_bytes(output: Path, tmp_path: Path) -> None:
    first = pack(output, tmp_path / "first.tar.xz")
    other = shutil.copytree(output, tmp_path / "other", copy_function=shutil.copyfile)
    for path in other.rglob("*"):
        os.utime(path, (1, 1))
    (other / "runs" / "random-seed1.log").write_text("printed")  # not what metrics rest on
    (other / CELL / "model").mkdir()
    (other / CELL / "model" / "model.safetensors").write_bytes(b"large")
    assert pack(other, tmp_path / "second.tar.xz") == first == sha256(tmp_path / "second.tar.xz")


@pytest.mark.parametrize("name", ["../outside.json", "runs/x/model/model.safetensors", "link"])
def test_an_archive_with_anything_else_is_refused(tmp_path: Path, name: str) -> None:
    sent, place = tmp_path / "sent.tar.xz", tmp_path / "a" / "b" / "place"
    place.mkdir(parents=True)
    member = tarfile.TarInfo("report.json" if name == "link" else name)
    if name == "link":
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(sent, "w:xz") as tar:
        tar.addfile(member)
    with pytest.raises(UserError, match="not a file of such a study"):
        unpack(sent, place, MEMBER)
    assert not any(path.name in ("outside.json", "model.safetensors") for path in tmp_path.rglob("*"))


def test_a_damaged_or_too_large_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sent").write_bytes(lzma.compress(b"no tar" * 1000))
    with pytest.raises(UserError, match="damaged"):
        unpack(tmp_path / "sent", tmp_path / "place", MEMBER)
    monkeypatch.setattr(archive, "MOST_BYTES", 5_000_000)
    (tmp_path / "bomb").write_bytes(lzma.compress(bytes(30_000_000), preset=1))
    with pytest.raises(UserError, match="5,000,000 bytes"):
        unpack(tmp_path / "bomb", tmp_path / "place", MEMBER)


PAGE = """# Page

<!-- figures: compare
| kind | blind | random | random − blind |
|---|---|---|---|
| all | {blind: accuracy} | {random: accuracy} | {random − blind: accuracy} |
-->
<!-- /figures -->
"""


def test_the_pages_of_this_repository_hold_the_metrics_of_their_files() -> None:
    assert update_pages(check=True) == []


def test_a_file_of_results_is_taken_from_an_archive_that_verifies(place: Path, tmp_path: Path) -> None:
    """From raw answers to a table: the metrics in the page are those that were computed again."""
    comparison = finish(comparison_of(place, encoders=("random:clips-run", "blind:clips-run"), seeds=2))
    report = reported(comparison)
    root = tmp_path / "root"
    (root / "docs" / "results").mkdir(parents=True)
    (root / "README.md").write_text("# Readme\n")
    (root / "docs" / "page.md").write_text(PAGE)
    packed = place / "out.tar.xz"
    pack(comparison.output, packed)
    target = take(packed, "compare", root)
    content = json.loads(target.read_text())
    assert content["archive"] == {"file": "out.tar.xz", "bytes": packed.stat().st_size, "sha256": sha256(packed)}
    assert not {"runs", "examples", "files"} & content.keys()
    assert [row["ci95"] for row in content["differences"]] == [row["ci95"] for row in report["differences"]]
    (right,) = content["right"].values()
    shares = [answers.count("1") / len(answers) for name, answers in right.items() if name.startswith("random")]
    assert fmean(shares) == pytest.approx(content["encoders"]["random"]["metrics"]["accuracy"]["mean"])
    update_pages(check=False, root=root)
    shown = f"{100 * report['encoders']['random']['metrics']['accuracy']['mean']:.1f} ±"
    assert shown in (root / "docs" / "page.md").read_text().partition("-->")[2]

    report["encoders"]["random"]["metrics"]["accuracy"]["mean"] += 0.1
    (comparison.output / "report.json").write_text(json.dumps(report))
    pack(comparison.output, packed)
    with pytest.raises(CommandError, match="is not what its report says"):
        take(packed, "compare", root)
    assert json.loads(target.read_text()) == content


def test_a_file_of_results_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default was a file that no page reads."""
    monkeypatch.setattr("sys.argv", ["update_docs.py", "--take", "out.tar.xz"])
    with pytest.raises(UserError, match="--name NAME"):
        main()


def test_the_plan_s_spread_is_not_below_that_of_pretrained_encoders() -> None:
    """Computed from the right answers of the stored comparison, in both drawing styles."""
    stored = read_json(ROOT / "docs" / "results" / "drawings.json")["right"]
    total, of_answers, of_images = [], [], []
    for name in ("answers", "answers_unseen"):
        right = {run: np.array([answer == "1" for answer in answers], float) for run, answers in stored[name].items()}
        clips, clip = (
            np.stack([right[run] for run in right if run.startswith(f"{kind}-")]) for kind in ("clips", "clip")
        )
        between = clips - clip
        seeds, questions = between.shape
        assert questions == OF_QUESTIONS
        total.append(between.mean(1).var(ddof=1))
        of_answers.append(between.var(0, ddof=1).mean() / questions)
        of_images.append(between.mean(0).var(ddof=1) / questions - of_answers[-1] / seeds)
    assert np.mean(total) <= RUN_VARIANCE + ENCODER_VARIANCE + ANSWER_VARIANCE
    assert pytest.approx(np.mean(of_answers), rel=0.02) == ANSWER_VARIANCE
    assert pytest.approx(np.mean(of_images), rel=0.02) == IMAGE_VARIANCE


@pytest.mark.parametrize(
    ("seeds", "runs", "design", "points"),
    [
        (5, 5, "5 encoders of each kind, 1 LLaVA run on each", (5.5, 4.1, 3.5)),
        (5, None, "5 encoders of each kind, 6 LLaVA runs on them in turn", (5.3, 4.0, 3.4)),
        (8, 8, "8 encoders of each kind, 1 LLaVA run on each", (4.3, 3.0, 2.4)),
        (8, 24, "8 encoders of each kind, 3 LLaVA runs on each", (3.6, 2.5, 2.0)),
    ],
)
def test_designs_in_words_and_what_they_see(
    seeds: int, runs: int | None, design: str, points: tuple[float, ...]
) -> None:
    """With 400 questions (the default), all of the demo's, and 6,400."""
    comparison = Comparison(seeds=seeds, llava_runs=runs)
    assert design_in_words(seeds, comparison.runs_per_encoder) == design
    assert [100 * detectable_difference(comparison, n) for n in (LIMIT, 1280, 6400)] == pytest.approx(points, abs=0.1)
    page = (ROOT / "docs" / "statistics.md").read_text(encoding="utf-8")
    assert f"| {design} | {' | '.join(map(str, points))} |" in page


def test_a_plan_says_what_it_can_see_of_right_answers_only(place: Path) -> None:
    assert "detect a difference of" in power_in_words(comparison_of(place, seeds=5))
    likely = comparison_of(place, seeds=5, decides="log_likelihood")
    assert power_in_words(likely) == "known for right answers only, not for log_likelihood"


@pytest.mark.parametrize("questions", [400, 3200])
def test_simulated_comparisons_of_the_default_design_find_it_in_80_of_100(questions: int) -> None:
    """Luck of pretrainings and of LLaVA runs is that of whole models: no number of questions averages it out."""
    comparison, rng = Comparison(), np.random.default_rng(0)
    runs, wins, tries = comparison.runs_per_encoder, 0, 600
    groups = np.arange(runs) % comparison.seeds
    seen = detectable_difference(comparison, questions)
    for _ in range(tries):
        ours, theirs = (
            rng.normal(0, (ENCODER_VARIANCE / 2) ** 0.5, comparison.seeds)[groups, None]
            + rng.normal(0, (RUN_VARIANCE / 2) ** 0.5, (runs, 1))
            + rng.normal(0, (IMAGE_VARIANCE / 2 * OF_QUESTIONS) ** 0.5, questions)
            + rng.normal(0, (ANSWER_VARIANCE / 2 * OF_QUESTIONS) ** 0.5, (runs, questions))
            for _ in range(2)
        )
        ci95 = interval(over_groups(seen + ours - theirs, groups), np.arange(questions)).ci95
        by_seed = [over_groups(scores, groups).mean(1).tolist() for scores in (seen + ours, theirs)]
        wins += verdict(ci95, *by_seed) == "win"
    assert wins / tries == pytest.approx(0.8, abs=0.05)
