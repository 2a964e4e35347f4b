"""Rows 9 to 13: one rank, or one of its workers, fails: all end with a reason, and no process is left.

Also launchers that die, a scheduler's signal, the sbatch file, and what the watchdog does about spikes and slow ranks
(docs/training.md). Real launchers, real processes; what no signal can do stands in tests/faulty_run.py.
"""

import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import warm
from conftest import ROOT
from launched import (
    ENV,
    SCRIPT,
    assert_said,
    assert_saved_at_the_end,
    deepspeed,
    endless,
    last_step,
    lines,
    make_images,
    of_run,
    python,
    rank,
    recap,
    run,
    started,
    torchrun,
    wait_for,
    wait_until_gone,
    write_shard,
)
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


FAST = ("--set", "train.precision=fp32", "train.log_every=1", "phases.*.lr=1e-2", "data.workers=0")
"""What lets the debug twin learn its 64 samples within 40 steps."""


def faulty(fault: str, rank: str, out: Path, shards: tuple[str, ...], *flags: str) -> list[str]:
    """Flags of `torchrun` for 48 steps of two ranks, of which `rank` (or "all") has `fault` from step 6 or 41 on."""
    words = ("--debug", "--name", "r", "--output", str(out), *shards, "--samples", "384", *FAST, *flags)
    return ["tests/faulty_run.py", fault, rank, *words]


def ended(words: list[str], out: Path, fault: Callable[[], object] | None = None) -> str:
    """What a run of two ranks said that must fail: after `fault` in one of its first steps, or by itself."""
    log = out / "log"
    with started(words, log) as process:
        if fault is not None:
            wait_for(lambda: len(lines(out / "r")) >= 3, process, log)
            fault()
        assert process.wait(60) != 0
        wait_until_gone(out)
    return log.read_text()


def weights(run_dir: Path, step: int, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def losses(run_dir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines(run_dir) if line["kind"] == "train"}


GLOBAL = ("train.accumulation=2", "train.contrastive=global")


@pytest.mark.parametrize(("fault", "stage", "settings"), [("nan", 0, ()), ("nan", 3, ()), ("inf", 2, GLOBAL)])
def test_row_09_a_value_that_is_not_finite_on_one_rank_stops_all(fault, stage, settings, shards, tmp_path):
    flags = ("--ds-config", f"ds_configs/zero{stage}.json", "--set", "train.checkpoint_every=40", *settings)
    done = run(torchrun(*faulty(fault, "1", tmp_path, shards, *flags)))
    assert done.code != 0
    assert done.text.count("not finite at step 6;") == 2, "every rank says so by itself"
    assert "exitcode  : 3" in done.text.partition("Root Cause")[2]
    assert "[rank" not in done.text, "a traceback of theirs"
    assert "no weight was changed" in done.text
    named = {word.strip(",") for word in done.text.split() if "tar#" in word}
    # The loss runs over all ranks, so every sample of the step is named, but where features are looked at one by one.
    assert len(named) == (4 if settings else 8)
    assert sorted(losses(tmp_path / "r")) == list(range(1, 6))
    saved = sorted(path.name for path in (tmp_path / "r/checkpoints").iterdir())
    assert saved[-1] == "step-00000005"
    assert all(value.isfinite().all() for value in weights(tmp_path / "r", 5).values())
    wait_until_gone(tmp_path)


@pytest.mark.parametrize("launch", [deepspeed, torchrun])
def test_row_10_a_killed_rank_ends_the_others(launch, shards, tmp_path):
    text = ended(launch(*endless(tmp_path, shards)), tmp_path, lambda: rank(tmp_path, 1).send_signal(signal.SIGKILL))
    assert "rank 0: a collective of step" in text
    assert "No sign of life from rank 1" in text


def test_row_11_a_rank_that_hangs_is_named_with_the_place_after_the_timeout(shards, tmp_path):
    """It hangs before the reduction of gradients, which DeepSpeed does in groups of its own."""
    command = ["tests/faulty_run.py", "hang", "1", *endless(tmp_path, shards, "--timeout-minutes", "0.15")[1:]]
    log = tmp_path / "log"
    with started(deepspeed(*command), log) as process:
        wait_for(lambda: "No sign of life from rank 1" in log.read_text(), process, log)
        rank(tmp_path, 1).send_signal(signal.SIGCONT)  # the launcher would wait 30 s for it to end
        assert process.wait(60) != 0
        wait_until_gone(tmp_path)
    output = log.read_text()
    assert "failed at clips/" in output
    assert "9000ms" in output


def failed_with_own_data_on_rank_1(data: Path, shards: tuple[str, ...], tmp_path: Path, split: str = "data") -> str:
    """What a run of two ranks, the second with `data` of its own, says before it ends, which it must."""
    words = torchrun("tests/faulty_run.py", f"{split}={data}", "1", *endless(tmp_path, shards)[1:])
    return ended(words, tmp_path)


def test_row_12_broken_data_of_one_rank_are_noticed_before_training(shards: tuple[str, ...], tmp_path: Path) -> None:
    """The second rank's copy of the data is broken, as a bad disk of one node would have it."""
    broken = [(bytes(len(image)), recap(web, long)) for image, web, long in make_images(64)]  # of equal sizes
    write_shard(tmp_path / "broken/0.tar", broken[:40])
    write_shard(tmp_path / "broken/1.tar", broken[40:])
    text = failed_with_own_data_on_rank_1(tmp_path / "broken", shards, tmp_path)
    assert "ranks do not agree on the training data" in text
    assert text.count("64 samples in 2 files") >= 2, "only the hashes differ"
    assert "exitcode  : 2" in text


def test_row_12_an_exception_in_one_ranks_data_ends_all_with_its_traceback(shards, tmp_path):
    words = deepspeed(*faulty("raise", "1", tmp_path, shards, "--set", "data.workers=1"))
    text = ended(words, tmp_path)
    assert "[rank1]: ZeroDivisionError: Caught ZeroDivisionError in DataLoader worker process 0" in text
    assert "a defect that" in text
    assert "in raising" in text, "the place in the worker"
    assert "[rank0]: ZeroDivisionError" not in text
    assert 0 < len(losses(tmp_path / "r")) <= 5


def test_a_shard_that_one_rank_lacks_is_named_before_training(shards: tuple[str, ...], tmp_path: Path) -> None:
    fewer = [(image, recap(web, long)) for image, web, long in make_images(40)]
    write_shard(tmp_path / "fewer/0.tar", fewer)
    text = failed_with_own_data_on_rank_1(tmp_path / "fewer", shards, tmp_path)
    assert "rank 0: 64 samples in 2 files" in text
    assert "rank 1: 40 samples in 1 files" in text
    assert not lines(tmp_path / "r")


def test_validation_data_that_one_rank_has_otherwise_are_named(shards: tuple[str, ...], tmp_path: Path) -> None:
    """Each rank encodes its share of them: images would be missing, or counted twice."""
    fewer = [(image, recap(web, long)) for image, web, long in make_images(9)]
    held_out = write_shard(tmp_path / "val.tar", fewer)
    text = failed_with_own_data_on_rank_1(held_out, shards, tmp_path, "val")
    assert "ranks do not agree on the validation data" in text
    assert "rank 0: 16 samples in 1 files" in text
    assert "rank 1: 9 samples in 1 files" in text
    assert not lines(tmp_path / "r")


def test_row_13_a_killed_worker_of_one_rank_ends_all_and_is_named(shards: tuple[str, ...], tmp_path: Path) -> None:
    killed: list[int] = []

    def kill() -> None:
        killed.append(max(rank(tmp_path, 1).children(), key=psutil.Process.create_time).pid)
        os.kill(killed[0], signal.SIGKILL)

    text = ended(deepspeed(*endless(tmp_path, shards, "--set", "data.workers=1")), tmp_path, kill)
    assert f"(pid(s) {killed[0]})" in text


@pytest.fixture(scope="module")
def skipped(shards: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that skipped the spike of step 41, with Muon under ZeRO-2, and its last checkpoints, of every step."""
    out = tmp_path_factory.mktemp("skipped")
    flags = ("--on-spike", "skip", "--ds-config", "ds_configs/zero2.json")
    settings = ("--set", "train.checkpoint_every=8", "train.keep_checkpoints=20")
    done = run(torchrun(*faulty("spike", "all", out, shards, *flags, *settings)))
    assert done.code == 0, done.text
    assert "warning: spike at step 41: loss" in done.text
    assert "; skip. Its samples are in spikes.jsonl" in done.text
    return out / "r"


def test_a_spike_is_recorded_and_skip_leaves_its_step_out(skipped: Path) -> None:
    (spike,) = lines(skipped, "spikes.jsonl")
    assert (spike["step"], spike["action"]) == (41, "skip")
    assert spike["loss"] == pytest.approx(losses(skipped)[41], rel=1e-6)
    assert spike["loss"] > 2 * spike["usual_loss"]
    assert [len(keys) for keys in spike["keys"]] == [4, 4]
    assert len({key for keys in spike["keys"] for key in keys}) == 8, "the samples of every rank"
    for name in ("model", "optimizer"):
        assert equal(weights(skipped, 41, name), weights(skipped, 40, name))
        assert not equal(weights(skipped, 42, name), weights(skipped, 41, name))
    assert sorted(losses(skipped)) == list(range(1, 49))


def test_spikes_without_an_end_end_the_run(shards: tuple[str, ...], tmp_path: Path) -> None:
    flags = ("--on-spike", "skip", "--set", "train.checkpoint_every=272")
    done = run(python(*faulty("spikes", "all", tmp_path, shards, *flags)))
    assert_said(done, 3, "spike number 6 within", "--on-spike continue")
    assert [line["step"] for line in lines(tmp_path / "r", "spikes.jsonl")] == list(range(41, 47))
    assert (tmp_path / "r" / "LATEST").read_text().strip() == "step-00000034"


def test_each_rank_s_own_time_tells_the_slow_one(shards: tuple[str, ...], tmp_path: Path) -> None:
    flags = ("--samples", "48", "--set", "train.log_every=3")
    done = run(torchrun(*faulty("slow", "1", tmp_path, shards), *flags))
    assert done.code == 0, done.text
    records = [line for line in lines(tmp_path / "r") if line["kind"] == "train"]
    for line in records:
        fast, slow = line["rank_seconds"]
        assert slow > max(0.3, 1.5 * fast)
        assert line["step_seconds"] >= 0.3
        assert line["data_wait_share"] > 0.2, "of the rank that waits longest, whatever else the machine does"
        assert line["peak_memory_gb"] > 0.1


@pytest.mark.parametrize(("launch", "generation"), [(deepspeed, 2), (torchrun, 1)])
def test_ranks_without_their_launcher_save_and_end(launch, generation, shards, tmp_path):
    """`deepspeed` itself (the second generation above a rank), or torchrun, killed with -9.

    It was started in the background by a shell that has ended, which is nobody's wish to stop.
    """
    run_dir, log = tmp_path / "r", tmp_path / "log"
    words = launch(*endless(tmp_path, shards))
    start = ["bash", "-c", 'nohup "$@" &', "-", str(warm.program(tmp_path)), *words[words[0] == sys.executable :]]
    with log.open("wb") as out:  # the shell ends at once
        subprocess.run(start, cwd=ROOT, env=ENV | {warm.ADDRESS: warm.start()}, stdout=out, stderr=out, check=True)
    try:
        wait_for(lambda: last_step(run_dir) >= 5, None, log)
        above = rank(tmp_path, 0).parents()[generation - 1]
        if launch is deepspeed:
            again = run(python(*endless(tmp_path, shards)))
            assert again.code == 2
            assert f"process {rank(tmp_path, 0).pid} under launcher " in again.text
            assert f"{above.pid} on host {platform.node()}" in again.text
        above.kill()
        wait_until_gone(tmp_path)
    finally:
        for process in of_run(tmp_path):
            process.kill()
    assert "the launcher is gone" in log.read_text()
    assert_saved_at_the_end(run_dir)


def test_a_scheduler_s_signal_to_one_rank_saves_and_has_an_exit_code_of_its_own(shards, tmp_path):
    log = tmp_path / "log"
    with started(deepspeed(*endless(tmp_path, shards)), log) as process:
        wait_for(lambda: last_step(tmp_path / "r") >= 3, process, log)
        rank(tmp_path, 1).send_signal(signal.SIGUSR1)
        assert process.wait(60) == 128 + signal.SIGUSR1
        wait_until_gone(tmp_path)
    assert "stopped by SIGUSR1; a checkpoint was saved" in log.read_text()
    assert_saved_at_the_end(tmp_path / "r")


def test_a_signal_in_the_last_validation_stops_both_ranks_before_the_end(shards, tmp_path):
    """It was forgotten: the run evaluated and exported until the scheduler killed it."""
    flags = ("--debug", "--name", "r", "--output", tmp_path, *shards)
    done = run(torchrun("tests/faulty_run.py", "last", "1", *flags))
    assert done.code != 0
    assert "stopped by SIGTERM; a checkpoint was saved" in done.text  # the launcher may end the other one first
    assert f"exitcode  : {128 + signal.SIGTERM}" in done.text.partition("Root Cause")[2]
    assert_saved_at_the_end(tmp_path / "r")
    assert not (tmp_path / "r/export").exists()
    validated = [line for line in lines(tmp_path / "r") if line["kind"] == "eval"]
    again = run(python(SCRIPT, *flags))
    assert again.code == 0, again.text
    assert (tmp_path / "r/export").is_dir()
    assert [line for line in lines(tmp_path / "r") if line["kind"] == "eval"] == validated


SRUN = """#!/bin/bash
# As srun: the command once per node, signals passed on to each, the highest exit code.
tasks=()
for _ in $(seq "$SLURM_JOB_NUM_NODES"); do "$@" & tasks+=($!); done
trap 'kill -USR1 "${tasks[@]}"' USR1
highest=0
for task in "${tasks[@]}"; do
  while :; do
    wait "$task"; code=$?
    kill -0 "$task" 2>/dev/null || break
  done
  if [ "$code" -gt "$highest" ]; then highest=$code; fi
done
exit "$highest"
"""
SCONTROL = """#!/bin/bash
echo "$@" >>"$(dirname "$0")/scontrol.log"
if [ "$1 $2" = "show hostnames" ]; then echo localhost; fi
"""


def test_the_sbatch_file_saves_before_the_end_and_asks_to_be_queued_again(shards, tmp_path):
    """srun and scontrol stand in for a cluster; torchrun, its two launchers and the training are real."""
    programs = tmp_path / "bin"
    programs.mkdir()
    launcher = f'#!/bin/sh\nexec {warm.program(tmp_path)} -m torch.distributed.run "$@"\n'
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "torchrun": launcher}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "here", "SLURM_GPUS_ON_NODE": "1"}
    env = job | {"PATH": f"{programs}:{os.environ['PATH']}", warm.ADDRESS: warm.start()}
    batch = ["bash", "scripts/slurm/train.sbatch"]
    with started([*batch, *endless(tmp_path, shards)], tmp_path / "log", env) as process:
        wait_for(lambda: last_step(tmp_path / "r") >= 3, process, tmp_path / "log")
        process.send_signal(signal.SIGUSR1)  # to the batch shell alone, as `--signal=B:USR1@120` asks
        assert process.wait(90) != 0
        wait_until_gone(tmp_path)
    assert_saved_at_the_end(tmp_path / "r")
    calls = (programs / "scontrol.log").read_text().splitlines()
    assert calls == ["show hostnames here", "requeue 7"]

    mistake = run([*batch, SCRIPT, "--recipe", "no-such-recipe"], env=env)
    assert mistake.code != 0
    calls = (programs / "scontrol.log").read_text().splitlines()
    assert "requeue 7" not in calls[2:], "what fails by itself would fail again"
