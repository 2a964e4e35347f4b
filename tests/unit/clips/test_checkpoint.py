"""Checkpoints: written whole or not at all, beside the training, refused when damaged, never silently started over."""

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from launched import flip_bit

from clips.common import files
from clips.common.errors import NoCheckpointError, UserError
from clips.common.rundir import checkpoints, chosen_weights
from clips.engine import checkpoint
from clips.engine.checkpoint import Checkpoint, TrainState, Writer

FILES = ["MANIFEST.json", "model.safetensors", "optimizer.safetensors", "state.json"]


def write(run_dir: Path, step: int) -> Path:
    weights = {"a.weight": torch.full((64, 4), float(step)), "scale": torch.tensor(2.5)}
    optimizer = {"a.weight/exp_avg": torch.arange(256.0).view(64, 4) * step}
    state = TrainState(seed=7, step=step, samples=8 * step, phase=1, phase_step=2, skipped=3)
    return checkpoint.save(run_dir, weights, optimizer, state, 2)


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    assert checkpoint.latest(tmp_path) is None
    path = write(tmp_path, 3)
    latest = checkpoint.latest(tmp_path)
    assert latest.path == path == checkpoint.load(path).path
    assert latest.state == TrainState(seed=7, step=3, samples=24, phase=1, phase_step=2, skipped=3)
    assert latest.weights().keys() == {"a.weight", "scale"}
    assert torch.equal(latest.weights()["a.weight"], torch.full((64, 4), 3.0))
    assert latest.weights()["scale"].shape == ()
    assert torch.equal(latest.optimizer()["a.weight/exp_avg"], torch.arange(256.0).view(64, 4) * 3)
    assert sorted(p.name for p in path.iterdir()) == FILES


def test_a_state_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    record = json.loads((path / "state.json").read_text())
    assert "logit_scale" not in record
    (path / "state.json").write_text(json.dumps(record | {"logit_scale": [[8, 14.25]]}))
    files.seal(path)
    assert checkpoint.load(path).state.samples == 8


def own_memory() -> int:
    """Bytes of this process that it shares with no other, not counting mapped files."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def test_a_rank_maps_a_checkpoint_and_copies_nothing_of_it(tmp_path: Path) -> None:
    size = 2**26  # bytes of each of the two files
    large = {"a": torch.ones(size // 4)}
    saved = Checkpoint(checkpoint.save(tmp_path, large, {"a/exp_avg": large["a"]}, state(1), 1), state(1))
    before = own_memory()
    tensors = [*saved.weights().values(), *saved.optimizer().values()]
    assert [float(tensor.sum()) for tensor in tensors] == [size / 4] * 2
    assert own_memory() - before < size / 4


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["truncated", "bit", "missing", "empty", "pipe"])
def test_a_damaged_one_is_refused_and_the_previous_used(tmp_path, file, damage, capsys):
    write(tmp_path, 1)
    bad = write(tmp_path, 2)
    target = bad / file
    if damage == "missing":
        target.unlink()
    elif damage == "bit":
        flip_bit(target)
    elif damage == "pipe":  # to open it would wait for ever
        target.unlink()
        os.mkfifo(target)
    else:
        target.write_bytes(target.read_bytes()[: -1 if damage == "truncated" and file != "MANIFEST.json" else 0])
    assert checkpoint.latest(tmp_path).state.step == 1
    assert str(bad) in capsys.readouterr().err
    with pytest.raises(UserError, match="step-00000002"):
        checkpoint.load(bad)
    (checkpoint.checkpoints(tmp_path)[-1] / file).unlink()
    with pytest.raises(NoCheckpointError):
        checkpoint.latest(tmp_path)
    assert capsys.readouterr().err.count("; trying the one before it") == 1, "before the last there is none"
    write(tmp_path, 2)  # trained again, the same step replaces the bad one
    assert checkpoint.latest(tmp_path).state.step == 2


def test_a_run_whose_checkpoints_were_removed_does_not_start_over(tmp_path: Path) -> None:
    write(tmp_path, 1)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(NoCheckpointError, match="although some were written"):
        checkpoint.latest(tmp_path)


def test_write_atomically_never_leaves_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "LATEST"
    files.write_atomically(file, "old\n")

    def crash(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(file, "new and longer\n")
    assert file.read_text() == "old\n"


WEIGHTS = {"a": torch.ones(5)}


def state(step: int) -> TrainState:
    return TrainState(seed=0, step=step, samples=8 * step)


def save(run_dir: Path, *steps: int) -> list[Path]:
    return [checkpoint.save(run_dir, WEIGHTS, WEIGHTS, state(step), 99) for step in steps]


def test_a_write_holds_the_state_of_the_moment_and_is_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on, whole = threading.Event(), checkpoint.save_file

    def waiting(*arguments: object) -> None:
        assert goes_on.wait(30)
        whole(*arguments)

    monkeypatch.setattr(checkpoint, "save_file", waiting)
    now = state(3)
    now.recent_losses.append(1.5)
    with Writer(tmp_path, keep=2) as writer:
        writer.begin(WEIGHTS, WEIGHTS, now)
        now.step, now.samples = 4, 32
        now.recent_losses.append(2.5)
        with pytest.raises(RuntimeError, match="being written still"):
            writer.begin(WEIGHTS, WEIGHTS, now)
        assert not writer.has_failed()
        assert checkpoint.latest(tmp_path) is None, "what is not whole does not count"
        goes_on.set()
        assert writer.wait() is None
    saved = checkpoint.latest(tmp_path).state
    assert (saved.step, saved.samples, saved.recent_losses) == (3, 24, [1.5])


def test_whoever_leaves_waits_for_the_write(tmp_path: Path) -> None:
    def fails() -> None:
        with Writer(tmp_path, keep=2) as writer:
            writer.begin({"a": torch.ones(1_000_000)}, WEIGHTS, state(1))
            raise KeyError("another error")

    before = threading.active_count()
    with pytest.raises(KeyError):
        fails()
    assert checkpoint.latest(tmp_path).state.step == 1
    assert threading.active_count() == before


def test_what_a_checkpoint_says_of_its_weights_is_not_hashed(tmp_path: Path) -> None:
    assert chosen_weights(tmp_path) is None
    _, second = save(tmp_path, 1, 2)
    weights = chosen_weights(tmp_path)
    assert weights == {
        "step": 2, "samples": 16, "sha256": json.loads((second / "MANIFEST.json").read_text())["model.safetensors"]
    }  # fmt: skip
    (second / "MANIFEST.json").write_text("{")
    assert chosen_weights(tmp_path)["sha256"] is None
    shutil.rmtree(second)
    assert chosen_weights(tmp_path)["step"] == 1


def test_the_best_validated_checkpoint_is_chosen_and_stays(tmp_path: Path) -> None:
    values = {1: 20.0, 2: 30.0, 3: 25.0}
    for step, value in values.items():
        save(tmp_path, step)
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"kind": "eval", "step": step, "choosing": value}) + "\n")
    assert chosen_weights(tmp_path)["step"] == 2
    checkpoint.save(tmp_path, WEIGHTS, WEIGHTS, state(4), 1)
    assert [path.name[-1] for path in checkpoints(tmp_path)] == ["4", "2"]
    assert chosen_weights(tmp_path)["step"] == 2, "the newest one was never validated"
    (tmp_path / "metrics.jsonl").write_text('{"kind": "eval", "step": 2}\n')
    assert chosen_weights(tmp_path)["step"] == 4, "a run that does not choose stands for its newest checkpoint"


def test_a_run_that_no_longer_chooses_stands_for_its_newest_checkpoint(tmp_path: Path) -> None:
    """Continued with train.choose=last, it kept exporting the best of the time before."""
    save(tmp_path, 1, 2, 3)
    lines = [{"kind": "eval", "step": step, "choosing": 9 - step} for step in (1, 2)] + [{"kind": "eval", "step": 3}]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    for choose, step in (("best", 1), ("last", 3)):
        (tmp_path / "config.json").write_text(json.dumps({"train": {"choose": choose}}))
        assert chosen_weights(tmp_path)["step"] == step
    checkpoint.save(tmp_path, WEIGHTS, WEIGHTS, state(4), 1)
    assert [path.name[-1] for path in checkpoints(tmp_path)] == ["4"], "the old one goes"
