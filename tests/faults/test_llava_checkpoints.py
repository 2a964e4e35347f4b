"""Rows 2, 4 and 5 of the LLaVA half, and checkpoints whose seal is right and whose content is not."""

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_llava
import torch
from conftest import ROOT, run_group
from launched import lines, of_run, started, wait_for, wait_until_gone
from llava_worker import at_seal, keep
from tiny_llava import ALIGN, TRAIN, WORKER, command, losses, results, run

from clips.common.errors import UserError
from clips.common.files import MANIFEST, check_seal, seal
from clips.common.tensors import write_weights
from mllm.training import trainer
from mllm.training.checkpoints import check_content

place = tiny_llava.place  # a fixture

FLAGS = [*ALIGN, "--max_steps", "6", "--save_steps", "2", "--save_total_limit", "4"]


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """An uninterrupted run; beside it `whole-kept`, as it was when the checkpoint of step 4 was sealed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "seal", trainer.seal)  # undone at the end of the block
        at_seal(4, before=False, act=keep)
        run(place, patch, *FLAGS, "--output_dir", str(place / "runs/whole"))
    return place / "runs" / "whole"


def kept(whole: Path, target: Path) -> Path:
    return shutil.copytree(whole.with_name("whole-kept"), target)


def assert_equal(run_dir: Path, whole: Path) -> None:
    assert losses(run_dir) == losses(whole)
    first, second = results(whole), results(run_dir)
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.slow
def test_row_02_a_kill_in_the_middle_of_a_save(place: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = place / "runs" / "killed"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, str(WORKER), "kill", "4", *FLAGS, "--output_dir", str(killed)]
    done = run_group(words, cwd=place, env=env, timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert not (killed / "align/checkpoint-4" / MANIFEST).exists()
    assert check_seal(killed / "align/checkpoint-2")
    code, output = command(place, monkeypatch, "train_llava.py", *FLAGS, "--output_dir", killed)
    assert not code, output
    assert f"goes on from {killed / 'align/checkpoint-2'}" in output
    assert not list((killed / "align").glob("checkpoint-*"))
    assert_equal(killed, whole)


@pytest.mark.slow
def test_row_04_a_full_disk(place: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system itself refuses to write beyond some bytes of a file, here in the optimizer's."""
    run_dir = kept(whole, tmp_path / "run")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    try:
        code, output = command(place, monkeypatch, "train_llava.py", *FLAGS, "--output_dir", run_dir)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1, output
    assert "the checkpoint of step 6 cannot be written" in output
    assert "The older checkpoints are intact" in output
    assert "Traceback" not in output
    assert check_seal(run_dir / "align/checkpoint-4")
    assert not (run_dir / "align/checkpoint-6" / MANIFEST).exists()
    run(place, monkeypatch, *FLAGS, "--output_dir", str(run_dir))
    assert_equal(run_dir, whole)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["truncated", "one bit"])
def test_row_05_a_damaged_checkpoint(how, place, whole, tmp_path, monkeypatch):
    run_dir = kept(whole, tmp_path / "run")
    path = run_dir / "align/checkpoint-4/optimizer.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data if how == "one bit" else data[:-100])
    code, output = command(place, monkeypatch, "train_llava.py", *FLAGS, "--output_dir", run_dir)
    assert not code, output
    assert "checkpoint-4 is not usable (optimizer.pt does not match its SHA-256" in output
    assert f"goes on from {run_dir / 'align/checkpoint-2'}" in output
    assert_equal(run_dir, whole)


def change(**fields: object) -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:99])


Damage = tuple[str, Callable[[Path], object], str]
CONTENT: dict[str, Damage] = {
    "optimizer, truncated": ("optimizer.pt", cut, "is damaged"),
    "optimizer, missing": ("optimizer.pt", lambda path: path.unlink(), "is missing"),
    "scheduler, text": ("scheduler.pt", lambda path: path.write_text("hello"), "scheduler.pt"),
    "random numbers, truncated": ("rng_state.pth", cut, "rng_state"),
    "state, empty": ("trainer_state.json", lambda path: path.write_text(""), "Expecting value"),
    "state, another step": ("trainer_state.json", change(global_step=7), "is of step 7, not 4"),
    "not under DeepSpeed": ("", lambda path: None, "it was written without DeepSpeed"),
}
"""Found before anything is loaded."""
LOADED: dict[str, Damage] = {
    "optimizer, foreign": ("optimizer.pt", lambda path: torch.save([1, 2], path), "cannot go on from"),
    "random numbers, foreign": ("rng_state.pth", lambda path: torch.save({"cpu": 1}, path), "cannot go on from"),
    "weights, other names": ("trained.safetensors", lambda p: write_weights({"a": torch.ones(1)}, p), "other para"),
    "weights, truncated": ("trained.safetensors", cut, "is damaged"),
}
"""Found by the run that goes on."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONTENT)
def test_what_is_sealed_and_is_not_what_it_should_be(kind: str, whole: Path, tmp_path: Path) -> None:
    """The seal is no signature: another program may have made it. The file is named, and the mend."""
    checkpoint = kept(whole, tmp_path / "run") / "align/checkpoint-4"
    name, damage, message = CONTENT[kind]
    check_content(checkpoint, deepspeed=None, world_size=1)
    damage(checkpoint / name)
    with pytest.raises(UserError, match="move it elsewhere") as refused:
        check_content(checkpoint, deepspeed=[] if kind == "not under DeepSpeed" else None, world_size=1)
    assert str(refused.value).startswith(f"cannot go on from {checkpoint}")
    assert message in " ".join(str(refused.value).split())


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOADED)
def test_what_is_sealed_and_does_not_fit_the_run(kind, place, whole, tmp_path, monkeypatch):
    run_dir = kept(whole, tmp_path / "run")
    checkpoint = run_dir / "align/checkpoint-4"
    name, damage, message = LOADED[kind]
    damage(checkpoint / name)
    seal(checkpoint)
    code, output = command(place, monkeypatch, "train_llava.py", *FLAGS, "--output_dir", run_dir)
    assert code == 2, output
    assert f"cannot go on from {checkpoint}" in output
    assert message in " ".join(output.split())
    assert "Traceback" not in output


@pytest.mark.slow
def test_workers_end_with_a_killed_process(place: Path, tmp_path: Path) -> None:
    out, log = place / "runs" / "orphaned", tmp_path / "log"
    flags = (*ALIGN, "--feature_cache", "False", "--dataloader_num_workers", "2", "--num_train_epochs", "1000")
    flags += ("--vision_tower", f"clips:{place}/runs/clips-demo", "--output_dir", str(out))
    flags = [str(place / flag) if (place / flag).exists() else flag for flag in flags]
    with started([sys.executable, str(TRAIN), *flags], log) as train:
        wait_for(lambda: len(lines(out)) >= 2 and len(of_run(out)) >= 3, train, log)
        train.kill()
        wait_until_gone(out, 20)
