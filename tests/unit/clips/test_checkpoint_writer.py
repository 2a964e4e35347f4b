"""Checkpoints beside the training: one at a time, of the moment they were begun, retried; which stay; rewinding."""

from __future__ import annotations

import errno
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import script_parser
from test_checkpoint import flip_bit

from clips.common import saved
from clips.common.errors import CommandError, UserError, run_command
from clips.common.files import seal
from clips.common.rundir import checkpoints, newest_weights
from clips.weights import checkpoint
from clips.weights.checkpoint import TrainState, Writer

WEIGHTS = {"a": torch.ones(5)}


def state(step: int) -> TrainState:
    return TrainState(seed=0, step=step, samples=8 * step)


def save(run_dir: Path, *steps: int, keep: int = 99, keep_every: int = 0) -> list[Path]:
    return [checkpoint.save(run_dir, WEIGHTS, WEIGHTS, state(step), keep, keep_every) for step in steps]


def steps(run_dir: Path) -> list[int]:
    return [int(path.name[5:]) for path in reversed(checkpoints(run_dir))]


def test_a_write_holds_the_state_of_the_moment_and_is_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on, whole = threading.Event(), checkpoint.save_file

    def waiting(*arguments: object) -> None:
        assert goes_on.wait(30)
        whole(*arguments)

    monkeypatch.setattr(checkpoint, "save_file", waiting)
    now = state(3)
    now.logit_scale.append((24, 1.5))
    with Writer(tmp_path, keep=2) as writer:
        writer.begin(WEIGHTS, WEIGHTS, now)
        now.step, now.samples = 4, 32
        now.logit_scale.append((32, 2.5))
        with pytest.raises(RuntimeError, match="being written still"):
            writer.begin(WEIGHTS, WEIGHTS, now)
        assert not writer.has_failed()
        assert checkpoint.latest(tmp_path) is None, "what is not whole does not count"
        goes_on.set()
        assert writer.wait() is None
    found = checkpoint.latest(tmp_path).state
    assert (found.step, found.samples, [tuple(pair) for pair in found.logit_scale]) == (3, 24, [(24, 1.5)])


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


def test_a_failed_write_is_told_once_and_leaves_the_older_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 1)
    blocked = tmp_path / "checkpoints/step-00000002.partial"
    blocked.write_text("no directory can be made here")
    with Writer(tmp_path, keep=1) as writer:
        writer.begin(WEIGHTS, WEIGHTS, state(2))
        assert "the checkpoint of step 2 cannot be written" in writer.wait()
        assert writer.wait() is None
        assert not writer.has_failed()
        blocked.write_text("")
        writer.begin(WEIGHTS, WEIGHTS, state(2))
    assert "warning: the checkpoint of step 2 cannot be written" in capsys.readouterr().err
    assert checkpoint.latest(tmp_path).state.step == 1


def test_a_rewind_puts_the_newer_ones_aside(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n')
    old = checkpoint.load(tmp_path / "checkpoints/step-00000001")
    aside = checkpoint.rewind(tmp_path, old)
    assert steps(tmp_path) == [1]
    assert sorted(path.name for path in aside.iterdir()) == ["metrics.jsonl", "step-00000002", "step-00000003"]
    assert (tmp_path / "LATEST").read_text() == "step-00000001\n"
    assert checkpoint.latest(tmp_path).state.step == 1
    assert checkpoint.rewind(tmp_path, old) is None
    save(tmp_path, 2)
    put_aside = checkpoint.load(aside / "step-00000003")
    assert checkpoint.run_of(put_aside.path) == tmp_path
    assert put_aside.state.step == 3
    assert steps(tmp_path) == [1, 2]


def command(*words: str | Path) -> None:
    """What scripts/checkpoints.py does, for list, verify and prune."""
    flags = script_parser("checkpoints").parse_args(list(map(str, words)))
    if flags.action == "prune":
        saved.prune_saved(flags.place, flags.keep, flags.keep_every, dry_run=flags.dry_run)
    else:
        saved.list_saved(flags.place, verify=flags.action == "verify")


def test_the_command_on_a_pretraining_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "r"
    save(run_dir, 1, 2, 3, 4, 5)
    checkpoint.rewind(run_dir, checkpoint.load(run_dir / "checkpoints/step-00000004"))
    command("list", run_dir)
    rows = capsys.readouterr().out.splitlines()
    assert next(line for line in rows if "latest" in line).split()[1:7:2] == ["checkpoints/step-00000004", "4", "32"]
    assert sum("put aside" in line for line in rows) == 1
    command("verify", run_dir)
    command("verify", run_dir / "checkpoints/step-00000002")
    flip_bit(run_dir / "checkpoints/step-00000002/model.safetensors")
    command("list", run_dir)  # which hashes nothing
    with pytest.raises(CommandError, match=r"step-00000002: model\.safetensors does not match") as caught:
        command("verify", run_dir)
    assert caught.value.exit_code == 1
    assert "step-00000003" not in str(caught.value)

    command("prune", run_dir, "--keep", "1", "--keep-every", "16", "--dry-run")
    said = capsys.readouterr().out
    deleted = [line.rpartition("/")[2] for line in said.splitlines() if line.startswith("would delete")]
    assert deleted == ["step-00000001", "step-00000003"]
    assert steps(run_dir) == [1, 2, 3, 4]
    command("prune", run_dir, "--keep", "2")
    assert steps(run_dir) == [3, 4]
    for path in checkpoints(run_dir)[:1]:
        flip_bit(path / "optimizer.safetensors")
    with pytest.raises(CommandError, match="none of the checkpoints that would stay"):
        command("prune", run_dir, "--keep", "1")
    assert steps(run_dir) == [3, 4]
    assert list((run_dir / "checkpoints").glob("aside-*/step-00000005"))


@pytest.mark.parametrize("border", ["builtins.open", "os.unlink"])
def test_a_run_that_is_read_only_is_one_line(
    border: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The system refuses; root would be refused nothing by a file's mode. Nothing counts as deleted."""
    save(tmp_path, 1, 2)
    really = open

    def refusing(path: Any, *arguments: Any, **options: Any) -> Any:
        if border == "os.unlink" or str(path).endswith(".lock"):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return really(path, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(border, refusing)
        assert run_command(lambda: command("prune", tmp_path, "--keep", "1")) in (1, 2)
    said = capsys.readouterr()
    assert "Read-only file system" in said.err
    assert "Traceback" not in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert (said.out, steps(tmp_path)) == ("", [1, 2])


def test_the_command_on_a_llava_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage, number in (("align", 5), ("align", 10), ("align", 15), ("instruct", 100)):
        directory = tmp_path / stage / f"checkpoint-{number}"
        directory.mkdir(parents=True)
        (directory / "trained.safetensors").write_bytes(b"x" * 100)
        if number != 15:  # killed while it was written
            seal(directory)
    command("list", tmp_path)
    said = capsys.readouterr().out
    assert said.count("latest") == 2
    assert "no MANIFEST.json" in said
    with pytest.raises(CommandError, match="checkpoint-15"):
        command("verify", tmp_path)
    with pytest.raises(UserError, match="do not tell their samples"):
        command("prune", tmp_path, "--keep-every", "10")
    command("prune", tmp_path, "--keep", "1")
    assert sorted(path.name for path in tmp_path.glob("*/checkpoint-*")) == [
        "checkpoint-10", "checkpoint-100", "checkpoint-15"
    ]  # fmt: skip
    with pytest.raises(UserError, match="holds no checkpoints"):
        command("list", tmp_path / "align" / "nothing")


def test_what_a_checkpoint_says_of_its_weights_is_not_hashed(tmp_path: Path) -> None:
    assert newest_weights(tmp_path) is None
    _, second = save(tmp_path, 1, 2)
    found = newest_weights(tmp_path)
    assert found == {
        "step": 2, "samples": 16, "sha256": json.loads((second / "MANIFEST.json").read_text())["model.safetensors"]
    }  # fmt: skip
    (second / "MANIFEST.json").write_text("{")
    assert newest_weights(tmp_path)["sha256"] is None
    shutil.rmtree(second)
    assert newest_weights(tmp_path)["step"] == 1
