"""Rows 1 to 8 of the faults: a run is killed, stopped, damaged, changed, and goes on. Real processes, tiny twins."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from launched import (
    SCRIPT,
    Done,
    assert_finished,
    assert_said,
    assert_same_training,
    checkpoints,
    deepspeed,
    endless,
    flip_bit,
    last_step,
    lines,
    python,
    run,
    started,
    state,
    torchrun,
    trace,
    wait_for,
    wait_until_gone,
)

pytestmark = pytest.mark.slow
LAST_STEP = 72
"""Of the runs with THREE_PHASES: three phases of 24 steps of 8 samples."""
THREE_PHASES = (
    *("--recipe", "s16", "--debug", "--name", "r", "--samples", "192"),
    *("--set", "train.precision=fp32", "train.checkpoint_every=40", "train.log_every=1"),
)


def recording(out: Path, shards: tuple[str, ...]) -> tuple[str | Path, ...]:
    """The command of the run in `out`, which writes down the keys of each batch."""
    return ("tests/faulty_run.py", "record", "all", *shards, *THREE_PHASES, "--output", out)


@pytest.fixture(scope="module")
def whole(shards: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of an uninterrupted run of three phases."""
    out = tmp_path_factory.mktemp("whole")
    done = run(python(*recording(out, shards)))
    assert done.code == 0, done.text
    return out


@pytest.fixture(scope="module")
def killed(shards: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, killed in the middle of its second phase, a few steps after a checkpoint."""
    out = tmp_path_factory.mktemp("killed")
    with started(python(*recording(out, shards)), out / "log") as process:
        wait_for(lambda: last_step(out / "r") >= 32, process, out / "log")
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    saved = state(out / "r")
    assert saved["phase"] == 1
    assert 0 < saved["phase_step"] < 24
    return out


def test_the_uninterrupted_run(whole: Path, shards: tuple[str, ...]) -> None:
    assert_finished(whole / "r")
    assert [line["step"] for line in trace(whole / "r")] == list(range(1, LAST_STEP + 1))
    assert checkpoints(whole / "r") == ["step-00000070", "step-00000072"]
    assert state(whole / "r")["samples"] == 8 * LAST_STEP


def times(run_dir: Path) -> dict[Path, int]:
    """When each file was written last; the lock says who holds it, even for a moment."""
    return {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file() and path.name != ".lock"}


def test_a_finished_run_is_not_run_again(whole: Path, shards: tuple[str, ...]) -> None:
    before = times(whole / "r")
    done = run(python(SCRIPT, *shards, *THREE_PHASES, "--output", whole))
    assert done.code == 0, done.text
    assert "Next:" in done.text
    assert "phase" not in done.text
    assert times(whole / "r") == before


def test_a_finished_run_without_its_evaluation_is_measured_again(whole, shards, tmp_path):
    run_dir = shutil.copytree(whole, tmp_path / "out") / "r"
    measured = json.loads((run_dir / "evaluation.json").read_text())
    (run_dir / "evaluation.json").unlink()
    done = run(python(SCRIPT, *shards, *THREE_PHASES, "--output", tmp_path / "out"))
    assert done.code == 0, done.text
    assert json.loads((run_dir / "evaluation.json").read_text()) == measured
    assert trace(run_dir) == trace(whole / "r"), "no step was taken"


def test_row_06_never_from_zero_when_no_checkpoint_is_good(killed, shards, tmp_path):
    out = shutil.copytree(killed, tmp_path / "out")
    for file in (out / "r/checkpoints").glob("step-*/optimizer.safetensors"):  # a kill may leave half of an old one
        flip_bit(file)
    before = (out / "r/metrics.jsonl").read_bytes()
    done = run(python(SCRIPT, *shards, *THREE_PHASES, "--output", out))
    assert_said(done, 5, "no usable checkpoint", "another --name")
    assert (out / "r/metrics.jsonl").read_bytes() == before


def test_row_07_another_configuration_is_refused_or_allowed_by_a_flag(killed, shards, tmp_path):
    out = shutil.copytree(killed, tmp_path / "out")
    flags = (SCRIPT, *shards, *THREE_PHASES, "--output", str(out))
    pickle = tmp_path / "model.pt"
    pickle.write_bytes(b"\x80\x04.")
    commands = {
        "refused": python(*flags, "--seed", "5", "--set", "phases.0.lr=0.25"),
        "never": python(*flags, "--resume", "never"),
        "pickle": python(*flags, "--resume", pickle),
        "optimizer": python(*flags, "--set", "optim.kind=muon", "phases.*.muon_lr=0.02", "--allow-config-change"),
        "batch": python(*flags, "--batch-size", "16", "--allow-config-change", "--dry-run"),
        "width": python(*flags, "--set", "model.embed_dim=16", "--allow-config-change"),
        "allowed": python(*flags, "--set", "train.keep_checkpoints=1", "--allow-config-change", "--dry-run"),
    }
    lost = shutil.copytree(killed / "r", tmp_path / "lost" / "r")
    (lost / "config.json").unlink()
    commands["never, config.json lost"] = python(*flags, "--output", str(lost.parent), "--resume", "never")
    results = {name: run(command) for name, command in commands.items()}  # one after another: they share a directory
    assert_said(results["refused"], 2, "train.seed: 0 → 5", "phases.0.lr:", "→ 0.25", "--allow-config-change")
    assert "data.train" not in results["refused"].text, "only what differs is shown"
    for name in ("never", "never, config.json lost"):
        assert_said(results[name], 2, "holds a run already", "--name")
    assert_said(results["pickle"], 2, "--resume", "model.pt")
    assert_said(results["optimizer"], 2, "optim.kind cannot change in a run")
    assert_said(results["batch"], 2, "a phase that has begun keeps its batch size", "--init-from")
    assert_said(results["width"], 2, "do not fit the model", "(32, 32)", "(16, 32)")
    assert results["allowed"].code == 0, results["allowed"].text
    assert "goes on from" in results["allowed"].text
    assert json.loads((out / "r/config.json").read_text())["train"]["seed"] == 0


def test_row_03_stopped_by_signals_after_a_checkpoint(shards: tuple[str, ...], tmp_path: Path) -> None:
    """SIGTERM, then Ctrl-C on what goes on from there; a worker process gets the signals too."""
    run_dir, log = tmp_path / "r", tmp_path / "log"
    command = python(*endless(tmp_path, shards, "--set", "data.workers=1"))
    step = 0
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with started(command, log) as process:
            wait_for(lambda s=step: last_step(run_dir) >= s + 3, process, log)
            os.killpg(process.pid, number)
            assert process.wait(60) == code, log.read_text()
        assert_said(Done(code, log.read_text()), code, "a checkpoint was saved", signal.Signals(number).name)
        assert state(run_dir)["step"] == last_step(run_dir) > step, "the step was ended, and saved"
        step = state(run_dir)["step"]
    assert [line["step"] for line in trace(run_dir)] == list(range(1, step + 1))


def test_row_03_ctrl_c_under_the_deepspeed_launcher(shards: tuple[str, ...], tmp_path: Path) -> None:
    """The launcher sends SIGTERM after the Ctrl-C that its children have got already: they must still save."""
    run_dir, log = tmp_path / "r", tmp_path / "log"
    with started(deepspeed(*endless(tmp_path, shards, "--set", "data.workers=1")), log) as process:
        wait_for(lambda: last_step(run_dir) >= 3, process, log)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) != 0
        end = time.monotonic() + 20
        while not (run_dir / "LATEST").exists() and time.monotonic() < end:  # the launcher does not wait for its own
            time.sleep(0.1)
    assert state(run_dir)["step"] == last_step(run_dir)


def test_row_04_a_full_disk_ends_the_run_with_older_checkpoints_intact(killed, shards, tmp_path):
    """The system refuses to let any file grow beyond 1 MiB; the weights take 8. The next save waits at the latest.

    One rank writes, beside the training, and both ranks hear of it.
    """
    out = shutil.copytree(killed, tmp_path / "out")
    before = {path: path.read_bytes() for path in (out / "r/checkpoints").rglob("*") if path.is_file()}
    next_save = state(out / "r")["step"] + 5
    done = run(torchrun("tests/faulty_run.py", "full", "all", *shards, *THREE_PHASES, "--output", out))
    assert done.code == 1, done.text
    assert done.text.count(f"error: the checkpoint of step {next_save} cannot be written") == 2
    assert "make room" in done.text
    assert {path: path.read_bytes() for path in (out / "r/checkpoints").rglob("*") if path.is_file()} == before
    steps = [line["step"] for line in trace(out / "r")]
    assert steps == list(range(1, len(steps) + 1))
    assert next_save <= steps[-1] <= next_save + 5


@pytest.fixture(scope="module")
def killed_in_a_save(killed: Path, shards: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The killed run, resumed and killed while a checkpoint was written beside the training."""
    out = shutil.copytree(killed, tmp_path_factory.mktemp("save") / "out")
    for _ in range(5):  # a save takes some hundredths of a second: the kill may come too late
        before = state(out / "r")["step"]
        with started(python(SCRIPT, *shards, *THREE_PHASES, "--output", out), out / "log") as process:
            wait_for(lambda now=before: state(out / "r")["step"] > now and half_written(out), process, out / "log")
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert "goes on from" in (out / "log").read_text()
        if half_written(out):
            return out
    raise AssertionError("no kill found its moment")


def half_written(out: Path) -> list[Path]:
    return list((out / "r/checkpoints").glob("*.partial"))


@pytest.fixture(scope="module")
def resumed(killed_in_a_save: Path, shards: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, resumed once more, to the end."""
    out = shutil.copytree(killed_in_a_save, tmp_path_factory.mktemp("resumed") / "out")
    done = run(python(SCRIPT, *shards, *THREE_PHASES, "--output", out))
    assert done.code == 0, done.text
    return out


def test_row_01_killed_in_a_step_and_resumed_equals_uninterrupted_bit_for_bit(whole: Path, resumed: Path) -> None:
    assert_finished(resumed / "r")
    assert_same_training(resumed / "r", whole / "r", f"step-{LAST_STEP:08d}")


def test_row_02_killed_in_the_middle_of_saves(whole: Path, killed_in_a_save: Path, resumed: Path) -> None:
    """The checkpoint before it is used, and no trace is left of the half-written one."""
    assert half_written(killed_in_a_save)
    assert not half_written(resumed)
    assert checkpoints(resumed / "r") == checkpoints(whole / "r")


def recorded(out: Path) -> dict[int, str]:
    """The sample of each position of the run, as ranks trained on it: twice where a kill came before a checkpoint."""
    key_at: dict[int, str] = {}
    for line in lines(out / "r", "keys.jsonl"):
        for position, key in zip(line["positions"], line["keys"], strict=True):
            assert key_at.setdefault(position, key) == key, f"position {position} was another sample the second time"
    return key_at


@pytest.fixture(scope="module")
def on_two_ranks(killed: Path, shards: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The killed run with its newest checkpoint damaged, which two ranks took up until they were killed."""
    out = shutil.copytree(killed, tmp_path_factory.mktemp("two") / "out")
    flip_bit(out / "r/checkpoints" / checkpoints(out / "r")[-1] / "model.safetensors")
    with started(torchrun(*recording(out, shards)), out / "log") as process:
        wait_for(lambda: last_step(out / "r") >= 45, process, out / "log")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    wait_until_gone(out)
    return out


def test_row_05_a_damaged_checkpoint_is_named_and_the_one_before_it_goes_on_on_two_ranks(killed, on_two_ranks):
    *_, previous, newest = checkpoints(killed / "r")
    text = (on_two_ranks / "log").read_text()
    assert text.count(f"{newest} is not usable (model.safetensors does not match") == 1  # hashed once a machine
    assert f"{previous} (" in text


def test_row_08_other_numbers_of_ranks_see_the_same_samples_in_the_same_order(whole, on_two_ranks, shards, tmp_path):
    """One rank to the end, and 1 → 2 → 1 ranks under kills: every position of the run has the same sample's key."""
    out = shutil.copytree(on_two_ranks, tmp_path / "out")
    done = run(python(*recording(out, shards)))
    assert done.code == 0, done.text
    assert_finished(out / "r")
    assert recorded(out) == recorded(whole)
    assert sorted(recorded(out)) == list(range(8 * LAST_STEP))
    changing, uninterrupted = trace(out / "r"), trace(whole / "r")
    assert [line["samples"] for line in changing] == [line["samples"] for line in uninterrupted]
    for key in ("loss", "contrastive_loss", "caption_loss"):  # another order of samples would be off by far more
        assert [a[key] for a in changing] == pytest.approx([b[key] for b in uninterrupted], rel=2e-3), key
