"""scripts/compare_encoders.py as a user runs, kills and repeats it, with tiny models. Real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from lab_runs import run_main
from launched import wait_for
from small_demo import LLAVA_SIZES, shrink
from tiny_llava import conversation
from tiny_mllm import make_images, write_llm, write_run

from clips.common.rundir import UNSEEN
from clips.data.artists import ARTISTS, fetch_sets
from clips.data.demo import ensure_demo
from mllm.compare.analysis import PROBE
from mllm.data.demo import ensure_llava_demo

pytestmark = pytest.mark.slow
STAGES = ("align", "instruct")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("compare")
    write_run(root / "runs" / "clips-demo")
    write_llm(root / "llm", initializer_range=0.1)
    records, questions = [], []
    for i, name in enumerate(make_images(root / "images", 8)):
        answer = ("A red cat", "two dogs")[i % 2]
        records.append(conversation(name, [("What is it?", answer)]))
        questions.append({"question_id": i, "image": name, "text": "What is it?", "kind": "what", "answer": answer})
    (root / "data.json").write_text(json.dumps(records))
    (root / "question.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    return root


def command(*flags: str) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / "compare_encoders.py"), "--device", "cpu", *flags]


def environment(place: Path) -> dict[str, str]:
    return os.environ | {"CLIPS_MLLM_CACHE": str(place / "cache"), "HF_HUB_OFFLINE": "1"}


FLAGS = (
    *("--seeds", "1", "--output", "out"),
    *("--encoders", "clips:runs/clips-demo,blind", "--questions", "question.jsonl", "--image-folder", "images"),
    "--train-flags=--model_name_or_path llm --image_folder images --align.data_path data.json --learning_rate 5e-3 "
    "--instruct.data_path data.json --batch_size 4 --num_train_epochs 20 --logging_steps 20",
)


def test_a_killed_comparison_goes_on_without_running_anything_twice(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL after the first stage is there, SIGTERM later, then to the end; finished parts stay as they were."""
    runs = place / "out" / "runs"
    done = [runs / f"{name}-seed0" for name in ("clips-runs-clips-demo", "blind")]

    def finished() -> dict[Path, float]:
        parts = [run / part for run in done for part in ("align/done.json", "instruct/done.json")]
        parts += [run / "evaluation" / "results.json" for run in done]
        return {path: path.stat().st_mtime for path in parts if path.is_file()}

    log = place / "printed.log"
    first = subprocess.Popen(command(*FLAGS), cwd=place, env=environment(place), stderr=log.open("w"))
    wait_for(lambda: len(finished()) >= 1, first, log, 300)
    first.kill()
    first.wait()
    before = finished()

    second = subprocess.Popen(command(*FLAGS), cwd=place, env=environment(place), stderr=log.open("w"))
    wait_for(lambda: "seed0: instruct" in log.read_text(), second, log, 300)
    second.send_signal(signal.SIGTERM)
    assert second.wait(timeout=300) == 143
    before |= finished()

    monkeypatch.chdir(place)
    for name in ("CLIPS_MLLM_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, environment(place)[name])

    def again() -> tuple[int, str]:
        """Once more in this process: (exit code, what it said)."""
        capfd.readouterr()
        code = run_main(monkeypatch, "compare_encoders", "--device", "cpu", *FLAGS)
        return code, capfd.readouterr().err

    code, output = again()
    assert code == 0, output[-3000:]
    assert "report.html" in output
    assert len(finished()) == 6
    assert finished() | before == finished()
    configs = [json.loads((run / "config.json").read_text()) for run in done]
    for stage in STAGES:
        assert [json.loads((run / stage / "done.json").read_text())["steps"] for run in done] == [40, 40]
        a, b = (config[stage]["trains"] for config in configs)
        assert {name for name in a if a[name] != b[name]} == {"vision_tower", "vision_fingerprint"}
        assert configs[0][stage]["freeze"] == configs[1][stage]["freeze"]
    report = json.loads((place / "out" / "report.json").read_text())
    assert report["encoders"]["clips"]["metrics"]["accuracy"]["mean"] == 1.0
    assert report["encoders"]["blind"]["metrics"]["accuracy"]["mean"] <= 0.5
    assert report["fixed"]["kept"]
    record = json.loads((done[0] / "run.json").read_text())
    assert record["plan"] == report["fixed"]["sha256"]
    assert [*record["commands"]] == ["align", "instruct", "evaluation"]

    logs = {path: path.stat().st_size for path in runs.glob("*.log")}
    code, output = again()
    assert code == 0
    assert "0 of 2 to run" in output
    assert {path: path.stat().st_size for path in runs.glob("*.log")} == logs


def test_on_the_demo_encoders_are_pretrained_and_the_baseline_sees_the_same_samples(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The whole way with the recipes' tiny twins: pretraining, runs, linear probes on few images, report."""
    monkeypatch.setattr("mllm.compare.probe.PROBE_SAMPLES", 200)
    shrink(monkeypatch, several=True)
    ensure_demo(place / "data" / "demo")
    monkeypatch.setenv("CLIPS_MLLM_CACHE", str(place / "cache"))
    ensure_llava_demo(
        place / "data" / "llava_demo", place / "data" / "demo", **LLAVA_SIZES | {"align": 64, "instruct": 64}
    )
    monkeypatch.chdir(place)
    output, tiny = place / "demo", f"--model_name_or_path {place / 'llm'} --align.max_steps 1 --instruct.max_steps 1"
    flags = ("--encoders", "clips,clip", "--seeds", "1", "--jobs", "1", "--limit", "4", "--device", "cpu")
    demo = place / "data" / "demo"
    tests = [str(demo / "test"), *(f"{UNSEEN}={path}" for path in demo.glob(UNSEEN))]
    small = f"--debug --data {demo / 'train'} --val-data {demo / 'val'} --test-data {' '.join(tests)}"
    flags += ("--output", output, f"--pretrain-flags={small}", f"--train-flags={tiny}")
    assert run_main(monkeypatch, "compare_encoders", *flags) == 0, capfd.readouterr().err[-3000:]
    seen = []
    for kind in ("clips", "clip"):
        config = json.loads((output / "encoders" / f"{kind}-seed0" / "config.json").read_text())
        assert config["task"]["objective"] == kind
        seen.append([config["data"], config["train"]["seed"], config["phases"][0]["batch_size"]])
    assert seen[0] == seen[1]
    report = json.loads((output / "report.json").read_text())
    # What is described are the seen artists' images; where no npm could fetch the unseen one's there are no others.
    described = "cider_d@seen" if UNSEEN in report["settings"]["columns"] else "cider_d"
    for encoder in report["encoders"].values():
        (pretraining,) = encoder["pretraining"]
        assert (pretraining["samples"], pretraining["steps"]) == (24, 3)
        assert {"probe_tokens_top1", "zero_shot_top1", "sentence_i2t_r1"} <= encoder["intrinsic"].keys()
        assert [encoder["metrics"][name]["items"] for name in ("accuracy", described)] == [4, 4]
    assert "drawings" in (output / "report.html").read_text()
    assert run_main(monkeypatch, "compare_encoders", "--verify", output) == 0
    page = (output / "report.html").read_text()
    if reason := fetch_sets(list(ARTISTS)):  # no fault of the code, and no test that may be skipped in silence
        assert "test in an unseen drawing style is missing" in page
        pytest.xfail(f"the demo's drawings by several artists are NOT TESTED: {reason}")
    assert report["settings"]["columns"] == [UNSEEN, "seen"]
    intrinsic = report["encoders"]["clips"]["intrinsic"]
    assert {f"{UNSEEN}/{name}" for name in (PROBE, "zero_shot_top1")} <= intrinsic.keys()
