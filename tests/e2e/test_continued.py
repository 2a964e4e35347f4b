"""Runs that go on: after their end, from an older checkpoint, after a kill beside a write; and the end."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from launched import (
    SCRIPT,
    assert_same_training,
    checkpoints,
    deepspeed,
    lines,
    python,
    rank,
    run,
    started,
    wait_for,
)

from clips.common.errors import UserError
from clips.common.rundir import MADE_OF, chosen_weights, has_report, is_finished
from clips.weights.load import load_model
from mllm.encoders.load import load_vision

pytestmark = pytest.mark.slow
STEPS = 10
EVERY_STEP = (
    *("--debug", "--name", "r", "--samples", str(8 * STEPS), "--set", "train.precision=fp32", "train.log_every=1"),
    "train.debug=false",  # it may be the newest
    *("train.checkpoint_every=8", "train.eval_every=8", "train.keep_checkpoints=3"),
)
"""Each step is saved and validated."""


@pytest.fixture(scope="module")
def whole(shards: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    done = run(python(SCRIPT, *EVERY_STEP, *shards, "--output", out))
    assert done.code == 0, done.text
    return out


def test_what_a_run_keeps_and_says_of_its_weights(whole: Path) -> None:
    run_dir = whole / "r"
    assert checkpoints(run_dir) == ["step-00000008", "step-00000009", "step-00000010"]
    newest = chosen_weights(run_dir)
    assert (newest["step"], newest["samples"]) == (STEPS, 8 * STEPS)
    for name in ("export", "report"):
        assert json.loads((run_dir / name / MADE_OF).read_text()) == newest
    assert json.loads((run_dir / "evaluation.json").read_text())["checkpoint"] == newest
    assert f"weights of step 10, SHA-256 {newest['sha256'][:12]}" in (run_dir / "report/index.html").read_text()
    assert load_model(run_dir).checkpoint == load_model(run_dir / "export").checkpoint == newest


def test_a_rewind_puts_aside_and_ends_as_before(whole: Path, shards: tuple[str, ...], tmp_path: Path) -> None:
    out = shutil.copytree(whole, tmp_path / "out")
    run_dir = out / "r"
    done = run(python(SCRIPT, *EVERY_STEP, *shards, "--output", out, "--resume", run_dir / "checkpoints/step-00000008"))
    assert done.code == 0, done.text
    (aside,) = (run_dir / "checkpoints").glob("aside-*")
    assert f"newer checkpoints than step-00000008 are put aside: {aside}" in done.text
    assert sorted(path.name for path in aside.iterdir()) == ["metrics.jsonl", "step-00000009", "step-00000010"]
    assert checkpoints(run_dir) == checkpoints(whole / "r")
    assert_same_training(run_dir, whole / "r", f"step-{STEPS:08d}")


def test_a_checkpoint_of_another_run_is_refused(whole: Path, shards: tuple[str, ...], tmp_path: Path) -> None:
    flags = [word if word != "r" else "other" for word in EVERY_STEP]
    command = python(SCRIPT, *flags, *shards, "--output", tmp_path, "--resume", whole / "r/checkpoints/step-00000008")
    done = run(command)
    assert done.code == 2, done.text
    assert "is of another run" in done.text


def test_a_run_that_went_on_after_its_end_is_finished_anew(whole, shards, tmp_path):
    """Killed after the last checkpoint and before the export: the old export is nobody's."""
    out = shutil.copytree(whole, tmp_path / "out")
    run_dir, log = out / "r", tmp_path / "log"
    flags = [word if word != str(8 * STEPS) else str(8 * STEPS + 40) for word in EVERY_STEP]
    command = python(SCRIPT, *flags, *shards, "--output", out, "--allow-config-change")
    last = run_dir / "checkpoints" / f"step-{STEPS + 5:08d}"
    with started(command, log) as process:
        wait_for(last.is_dir, process, log)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    stale = json.loads((run_dir / "export" / MADE_OF).read_text())
    assert stale["step"] == STEPS
    assert not is_finished(run_dir)
    assert not has_report(run_dir)
    for name in (f"clips:{run_dir}", "clips"):
        with pytest.raises(UserError, match=r"export_clips\.py --model"):
            load_vision(name, runs=out)
    assert load_model(run_dir).checkpoint == chosen_weights(run_dir), "of the run itself, the newest weights"

    done = run(command)
    assert done.code == 0, done.text
    newest = chosen_weights(run_dir)
    assert newest["step"] == STEPS + 5
    for made_of in (
        json.loads((run_dir / "export" / MADE_OF).read_text()),
        json.loads((run_dir / "report" / MADE_OF).read_text()),
        json.loads((run_dir / "evaluation.json").read_text())["checkpoint"],
    ):
        assert made_of == newest
    assert [line["step"] for line in lines(run_dir) if line["kind"] == "eval"] == list(range(1, STEPS + 6))
    load_vision(f"clips:{run_dir}", runs=out)
    before = (run_dir / "report/index.html").stat().st_mtime_ns
    assert run(command).code == 0
    assert (run_dir / "report/index.html").stat().st_mtime_ns == before


def test_one_checkpoint_is_exported(whole: Path, tmp_path: Path) -> None:
    out = shutil.copytree(whole, tmp_path / "out")
    done = run(python("scripts/export_clips.py", "--model", out / "r/checkpoints/step-00000008"))
    assert done.code == 0, done.text
    exported = out / "r/export-step-00000008"
    assert json.loads((exported / MADE_OF).read_text())["step"] == 8
    assert sorted(path.name for path in exported.iterdir() if path.is_dir()) == ["hf_vit", "native", "open_clip"]
    assert load_model(exported).checkpoint["step"] == 8
    assert is_finished(out / "r"), "its own export stays"


def test_the_end_is_one_rank_s_and_may_outlast_the_timeout(shards: tuple[str, ...], tmp_path: Path) -> None:
    """The other rank leaves; rank 0 then stands still for longer than ranks wait for each other, and finishes."""
    run_dir, log = tmp_path / "r", tmp_path / "log"
    words = ("--debug", "--name", "r", "--output", tmp_path, *shards, "--timeout-minutes", "0.15")
    with started(deepspeed(SCRIPT, *words), log) as process:
        wait_for(lambda: checkpoints(run_dir) and rank(tmp_path, 1) is None, process, log)
        first = rank(tmp_path, 0)
        assert first is not None
        assert not has_report(run_dir), "its end is over already"
        first.suspend()
        time.sleep(11)
        first.resume()
        assert process.wait(120) == 0, log.read_text()
    assert is_finished(run_dir)
    assert has_report(run_dir)
    assert log.read_text().count("Next:") == 1
