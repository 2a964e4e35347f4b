"""Rows 2, 4 and 5 of the LLaVA package, and a checkpoint whose seal is right and whose content is not."""

import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny_llava
import torch
import warm
from conftest import ROOT, run_group
from launched import flip_bit, lines, of_run, started, wait_for, wait_until_gone
from llava_worker import keep_at
from tiny_llava import ALIGN, INSTRUCT, START, TRAIN, WORKER, assert_same_results, command, losses, run

from clips.common.files import check_seal, seal
from clips.common.tensors import write_weights
from clips.engine import checkpoint

place = tiny_llava.place  # a fixture
pytestmark = pytest.mark.slow

FLAGS = [*ALIGN, "--max_steps", "6", "--save_steps", "2", "--save_total_limit", "4"]


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """An uninterrupted run; beside it `whole-kept`, as it was when the checkpoint of step 4 was sealed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", checkpoint.save)  # undone at the end of the block
        keep_at(4)
        run(place, patch, *FLAGS, "--output_dir", str(place / "runs/whole"))
    return place / "runs" / "whole"


def kept(whole: Path, target: Path) -> Path:
    return shutil.copytree(whole.with_name("whole-kept"), target)


def anywhere(place: Path, flags: Sequence[str]) -> list[str]:
    """Flags for a process that is started in another directory than `place`."""
    return [str(place / flag) if flag == "cache" or (place / flag).exists() else flag for flag in flags]


def assert_equal(run_dir: Path, whole: Path) -> None:
    assert losses(run_dir) == losses(whole)
    assert_same_results(run_dir, whole)


def test_row_02_a_kill_in_the_middle_of_a_save(place: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = place / "runs" / "killed"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, str(WORKER), "kill", "4", *FLAGS, "--output_dir", str(killed)]
    done = run_group(words, cwd=place, env=env, timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert not (killed / "align/checkpoints/step-00000004").exists()
    assert check_seal(killed / "align/checkpoints/step-00000002")
    output = command(place, monkeypatch, "train_llava", *FLAGS, "--output_dir", killed)
    assert f"goes on from {killed / 'align/checkpoints/step-00000002'}" in output
    assert not (killed / "align/checkpoints").exists()
    assert_equal(killed, whole)


def test_row_04_a_full_disk(place: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system itself refuses to write beyond some bytes of a file, here in the optimizer's."""
    run_dir = kept(whole, tmp_path / "run")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    try:
        output = command(place, monkeypatch, "train_llava", *FLAGS, "--output_dir", run_dir, code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "the checkpoint of step 6 cannot be written" in output
    assert "The older ones are intact" in output
    assert check_seal(run_dir / "align/checkpoints/step-00000004")
    assert not (run_dir / "align/checkpoints/step-00000006").exists()
    run(place, monkeypatch, *FLAGS, "--output_dir", str(run_dir))
    assert_equal(run_dir, whole)


@pytest.mark.parametrize("how", ["truncated", "one bit"])
def test_row_05_a_damaged_checkpoint(how, place, whole, tmp_path, monkeypatch):
    run_dir = kept(whole, tmp_path / "run")
    path = run_dir / "align/checkpoints/step-00000004/optimizer.safetensors"
    flip_bit(path) if how == "one bit" else path.write_bytes(path.read_bytes()[:-100])
    output = command(place, monkeypatch, "train_llava", *FLAGS, "--output_dir", run_dir)
    assert "step-00000004 is not usable (optimizer.safetensors does not match its SHA-256" in output
    assert f"goes on from {run_dir / 'align/checkpoints/step-00000002'}" in output
    assert_equal(run_dir, whole)


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_row_01_a_stage_killed_at_random_moments_comes_to_the_same_weights(stage, place, tmp_path, monkeypatch):
    """Four kills: in a step, in a save or in the start, wherever the run is then."""
    flags = [*(ALIGN if stage == "align" else [*INSTRUCT, *START, "--lora_enable", "--lora_dropout", "0.2"])]
    flags += ["--max_steps", "120", "--save_steps", "7", "--vision_tower", f"clips:{place}/runs/clips-demo"]
    flags = anywhere(place, flags)
    undisturbed, killed = place / f"runs/{stage}-in-peace", place / f"runs/{stage}-killed"
    run(place, monkeypatch, *flags, "--output_dir", str(undisturbed))
    moments = random.Random(stage)
    for number in range(4):
        until = moments.randint(5, 25) + 20 * number
        with started([sys.executable, str(TRAIN), *flags, "--output_dir", str(killed)], tmp_path / "log") as process:
            wait_for(lambda last=until: len(lines(killed)) >= last, process, tmp_path / "log")
            time.sleep(moments.random() / 20)
            process.kill()
        assert not (killed / stage / "done.json").exists(), "all kills fall before the end"
    run(place, monkeypatch, *flags, "--output_dir", str(killed))
    assert_equal(killed, undisturbed)


def test_what_is_sealed_and_does_not_fit_the_run(place, whole, tmp_path, monkeypatch):
    """The seal is no signature: another program may have made it."""
    damaged = kept(whole, tmp_path / "run") / "align/checkpoints/step-00000004"
    write_weights({"a": torch.ones(1)}, damaged / "model.safetensors")
    seal(damaged)
    output = command(place, monkeypatch, "train_llava", *FLAGS, "--output_dir", tmp_path / "run", code=2)
    assert f"cannot go on from {damaged}" in output
    assert "other parameters than those that train" in output


@pytest.mark.parametrize(("ranks", "number"), [(1, signal.SIGTERM), (2, signal.SIGTERM), (2, signal.SIGHUP)])
def test_row_03_a_signal_to_train_llava_sh_reaches_the_stage(ranks, number, place, tmp_path):
    """The stage went on as an orphan, the next one never came, and the same command was refused."""
    out, log = place / "runs" / f"stopped-{ranks}-{number}", tmp_path / "log"
    words = anywhere(place, [*ALIGN[2:], "--vision", f"clips:{place}/runs/clips-demo", "--output_dir", str(out)])
    words += ["--instruct.data_path", str(place / "instruct.json"), "--align.data_path", str(place / "align.json")]
    command = ["bash", str(ROOT / "scripts/train_llava.sh"), *words]
    env = {"PYTHON": str(warm.program(tmp_path)), "NUM_GPUS": str(ranks), warm.ADDRESS: warm.start()}
    with started([*command, "--align.num_train_epochs", "2000"], log, env) as train:
        wait_for(lambda: len(lines(out)) >= 3, train, log, 300)
        train.send_signal(number)  # to this process alone
        assert train.wait(60) == 128 + number, log.read_text()
        wait_until_gone(out)
    assert not (ROOT / "cache").exists()
    assert "a checkpoint was saved" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert not (out / "instruct").exists()
    with started([*command, "--align.num_train_epochs", "2000"], log, env) as train:
        wait_for(lambda: "goes on from" in log.read_text(), train, log, 300)
        os.killpg(train.pid, signal.SIGTERM)
        train.wait(60)


def test_workers_end_with_a_killed_process(place: Path, tmp_path: Path) -> None:
    out, log = place / "runs" / "orphaned", tmp_path / "log"
    flags = (*ALIGN, "--feature_cache", "False", "--dataloader_num_workers", "2", "--num_train_epochs", "1000")
    flags += ("--vision_tower", f"clips:{place}/runs/clips-demo", "--output_dir", str(out))
    flags = anywhere(place, flags)
    with started([sys.executable, str(TRAIN), *flags], log) as train:
        wait_for(lambda: len(lines(out)) >= 2 and len(of_run(out)) >= 3, train, log)
        train.kill()
        wait_until_gone(out, 20)
