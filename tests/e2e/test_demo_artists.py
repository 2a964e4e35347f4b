"""The whole path on the demo by several artists, and by one where the others' drawings cannot be fetched.

Small data and tiny models.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, run_python
from small_demo import shrink
from tiny_compare import collected, finish
from tiny_llava import command
from tiny_mllm import write_llava_on, write_llm

from clips.common.rundir import UNSEEN
from clips.data.demo import MISSING
from clips.lab.report import write_report
from mllm.compare.comparison import Comparison
from mllm.compare.figures import PROBE
from mllm.compare.probe import measure_encoders
from mllm.compare.report import page as report_page
from mllm.compare.verify import verify
from mllm.data.demo import DEMO_DIR, IMAGES
from mllm.data.questions import UNSEEN_ANSWERS
from mllm.evaluation.summary import print_summary

pytestmark = pytest.mark.slow


@pytest.fixture(params=[True, False], ids=["several artists", "one artist"])
def several(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> bool:
    """Whether the drawings of several artists can be had; the current directory is an empty one."""
    if request.param:
        request.getfixturevalue("several_artists")
    else:
        monkeypatch.setenv("CLIPS_MLLM_CACHE", str(tmp_path / "cache"))
    shrink(monkeypatch, several=request.param)
    monkeypatch.chdir(tmp_path)
    return request.param


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_whole_path(several: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ran(script: str, *flags: str | Path) -> str:
        code, output = command(tmp_path, monkeypatch, script, "--device", "cpu", *flags)
        assert code == 0, output
        return output

    # an encoder
    run = tmp_path / "runs" / "demo"
    words = ("several" if several else "one", "pretrain_clips.py", "--debug", "--name", "demo")
    done = run_python(ROOT / "tests" / "small_demo.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    errors = done.stderr
    assert errors.count(f"warning: {MISSING}") == (not several)
    evaluation = read(run / "evaluation.json")
    assert (f"{UNSEEN}/sentence_i2t_r1" in evaluation["figures"]) == several
    assert evaluation.get("missing") == (None if several else MISSING)
    page = (run / "report" / "index.html").read_text()
    for part in (">unseen</th>", "“unseen”"):
        assert (part in page) == several
    assert (MISSING in page) == (not several)
    assert ("name: unseen" in (run / "export" / "native" / "README.md").read_text()) == several

    printed = ran("evaluate_clips.py", "--model", run, "--limit", "20")
    assert (f"{UNSEEN} %" in printed) == several
    assert (MISSING in " ".join(printed.split())) == (not several)

    # a model on it
    write_llava_on(tmp_path / "runs" / "llava-clips", run)
    printed = ran("evaluate_llava.py", "--max-new-tokens", "4")
    assert ("unseen artist" in printed) == several
    figures = read(tmp_path / "runs" / "llava-clips" / "evaluation" / "figures.json")
    assert figures["sets"].keys() == {"answers", "descriptions"} | ({UNSEEN_ANSWERS} if several else set())
    assert (UNSEEN in figures) == several

    with contextlib.redirect_stdout(io.StringIO()) as told:
        print_summary()
    summary = told.getvalue()
    assert f"pictures by {'unseen' if several else 'seen'} artists" in summary
    assert ("test of unseen artists is missing" in summary) == (not several)

    # what the encoder is worth
    flags = ("--model_name_or_path", str(write_llm(tmp_path / "llm")), "--batch_size", "4")
    comparison = Comparison(
        encoders=("clips:runs/demo", "blind"), seeds=1, output=Path("out"), train_flags=flags, device="cpu"
    )
    finish(comparison)
    report = collected(comparison, measure_encoders(comparison, torch.device("cpu")), ["compare_encoders.py"])
    assert report["settings"]["columns"] == ([UNSEEN, "seen"] if several else ["seen"])
    assert report["plan"]["decides"] == "accuracy"
    intrinsic = report["encoders"]["clips"]["intrinsic"]
    assert {PROBE, "zero_shot_top1"} <= intrinsic.keys()
    assert {f"{UNSEEN}/{name}" in intrinsic for name in (PROBE, "zero_shot_top1")} == {several}
    page = write_report(report, comparison.output, "report", lambda: report_page(report, DEMO_DIR / IMAGES)).read_text()
    assert ("test of unseen artists is missing" in page) == (not several)
    assert (UNSEEN in page.replace("test of unseen artists is missing", "")) == several
    blind = {name: figure["mean"] for name, figure in report["encoders"]["blind"]["metrics"].items()}
    assert (blind.get("accuracy@seen", blind["accuracy"]) != blind["accuracy"]) == several
    assert verify(comparison.output).differs == []
