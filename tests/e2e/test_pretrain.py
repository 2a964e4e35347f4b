"""The pretraining command as people start, stop, kill, misuse and continue it. Real processes, tiny debug twins."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from launched import (
    SCRIPT,
    Done,
    deepspeed,
    lines,
    pictures,
    python,
    recap,
    run,
    run_all,
    small_data,
    started,
    torchrun,
    wait_for,
    write_shard,
)
from safetensors.torch import load_file

from clips.recipes import RECIPES
from clips.training.log import MACHINE

pytestmark = pytest.mark.slow
LAST_STEP = 72
"""Of the runs with THREE_PHASES: three phases of 24 steps of 8 samples."""
THREE_PHASES = (
    *("--recipe", "s16", "--debug", "--name", "r", "--samples", "192"),
    *("--set", "train.precision=fp32", "train.checkpoint_every=40", "train.log_every=1"),
)


# What a run leaves


def trace(run_dir: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Every logged figure that does not depend on the machine."""
    return [{k: v for k, v in line.items() if k not in MACHINE} for line in lines(run_dir) if line["kind"] == kind]


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))


def state(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "checkpoints" / (run_dir / "LATEST").read_text().strip() / "state.json").read_text())


def assert_finished(run_dir: Path, *, figures: bool = True) -> None:
    for name in ("config.json", "env.json", "metrics.jsonl", "skipped.jsonl", "LATEST", "report/index.html"):
        assert (run_dir / name).is_file(), name
    for name in ("native", "open_clip", "hf_vit"):
        assert any((run_dir / "export" / name).glob("*.safetensors")), name
    assert "<img" in (run_dir / "report/index.html").read_text()
    assert list((run_dir / "tensorboard").iterdir())
    if figures:
        found = json.loads((run_dir / "evaluation.json").read_text())["figures"]
        assert found
        assert all(0 <= figure["value"] <= 100 for figure in found.values())


def assert_refused(done: Done, code: int, *words: str) -> None:
    assert done.code == code, done.text
    assert "Traceback" not in done.text
    for word in words:
        assert word in done.text, f"{word!r} is not in:\n{done.text}"


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


# Data


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return small_data(tmp_path_factory.mktemp("shards"))


# It runs


def test_every_recipe_takes_three_steps_to_the_report(shards: tuple[str, ...], tmp_path: Path) -> None:
    flags = ("--debug", "--output-dir", tmp_path, *shards, "--profile", "1")
    for name, done in run_all({name: python(SCRIPT, "--recipe", name, *flags) for name in RECIPES}).items():
        assert done.code == 0, done.text
        run_dir = tmp_path / f"{name}-debug"
        assert_finished(run_dir)
        assert [line["step"] for line in trace(run_dir)] == [1, 2, 3]
        assert [line["step"] for line in trace(run_dir, "eval")] == [3]
        assert ("caption_loss" in trace(run_dir)[0]) == (name != "clip_baseline")
        assert all(line["mfu"] > 0 for line in lines(run_dir) if line["kind"] == "train")
        for shown in (f"recipe {name}", "parameters", "writes to", "% of the time spent waiting for data", "Next:"):
            assert shown in done.text
        assert f"python scripts/evaluate_clips.py --model {run_dir}" in done.text
        assert (run_dir / "skipped.jsonl").read_text() == ""
        assert f"profile of 1 steps: {run_dir}/profile" in done.text
        recorded = json.loads((run_dir / "profile" / "trace-rank0.json").read_text())["traceEvents"]
        assert {"aten::mm", "aten::conv2d"} & {event["name"] for event in recorded}


def test_a_report_that_fails_costs_the_run_nothing(shards: tuple[str, ...], tmp_path: Path) -> None:
    run_dir = tmp_path / "demo-debug"
    command = python(SCRIPT, "--debug", "--output-dir", tmp_path, *shards)
    run_dir.mkdir()
    (run_dir / "report").write_text("in the way")
    done = run(command)
    assert done.code == 0, done.text
    assert f"warning: the report of {run_dir} is not written; the run itself is finished" in done.text
    assert "Traceback" not in done.text
    assert (run_dir / "evaluation.json").is_file()
    assert (run_dir / "export" / "native" / "model.safetensors").is_file()

    (run_dir / "report").unlink()
    done = run(command)
    assert done.code == 0, done.text
    assert_finished(run_dir)
    assert [line["step"] for line in trace(run_dir)] == [1, 2, 3]  # nothing was trained again


def test_launchers_and_zero_3_agree(shards: tuple[str, ...], tmp_path: Path) -> None:
    """One process, two ranks under torchrun (ZeRO-3) and under deepspeed: the same losses and the same figures."""

    def flags(name: str) -> tuple[str, ...]:
        precise = ("--set", "train.precision=fp32")
        return (SCRIPT, "--debug", "--output-dir", str(tmp_path), "--name", name, *shards, *precise)

    commands = {
        "one": python(*flags("one")),
        "torchrun": torchrun(*flags("torchrun"), "--ds-config", "ds_configs/zero3.json"),
        "deepspeed": deepspeed(*flags("deepspeed")),
    }
    for name, done in run_all(commands).items():
        assert done.code == 0, (name, done.text)
        assert_finished(tmp_path / name)
        assert done.text.count("Next:") == 1, "one rank speaks"
        assert ("2 ranks" in done.text) == (name != "one")
    one = trace(tmp_path / "one")
    for name in list(commands)[1:]:
        other = trace(tmp_path / name)
        for key in ("loss", "contrastive_loss", "caption_loss"):
            assert other[0][key] == pytest.approx(one[0][key], rel=1e-5), (name, key)
            # Muon's orthogonalisation runs in bf16: later steps differ by its rounding.
            assert [line[key] for line in other] == pytest.approx([line[key] for line in one], rel=2e-3), (name, key)


def test_the_bare_command_on_the_demo_data(tmp_path: Path) -> None:
    """`deepspeed scripts/pretrain_clips.py`, with the demo data built where it is missing."""
    launcher = Path(sys.executable).with_name("deepspeed")
    done = run([str(launcher), SCRIPT, "--debug", "--output-dir", str(tmp_path)], timeout=300)
    assert done.code == 0, done.text
    assert_finished(tmp_path / "demo-debug")
    found = json.loads((tmp_path / "demo-debug/evaluation.json").read_text())["figures"]
    assert {"sentence_t2i_r1", "zero_shot_top1", "linear_probe_top1"} <= found.keys()


def test_a_dry_run_shows_the_plan_and_leaves_nothing(shards: tuple[str, ...], tmp_path: Path) -> None:
    done = run(python(SCRIPT, "--debug", "--dry-run", "--output-dir", tmp_path / "out", *shards))
    assert done.code == 0, done.text
    assert "3 steps × 8" in done.text
    assert not (tmp_path / "out").exists()


# It is killed, stopped, and goes on


@pytest.fixture(scope="module")
def whole(shards: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of an uninterrupted run of three phases."""
    out = tmp_path_factory.mktemp("whole")
    done = run(python(SCRIPT, *THREE_PHASES, *shards, "--output-dir", out))
    assert done.code == 0, done.text
    return out


@pytest.fixture(scope="module")
def killed(shards: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, killed in the middle of its second phase, a few steps after a checkpoint."""
    out = tmp_path_factory.mktemp("killed")
    with started(python(SCRIPT, *THREE_PHASES, *shards, "--output-dir", out), out / "log") as process:
        wait_for(lambda: lines(out / "r") and lines(out / "r")[-1]["step"] >= 32, process, out / "log")
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    found = state(out / "r")
    assert found["phase"] == 1
    assert 0 < found["phase_step"] < 24
    return out


def test_the_uninterrupted_run(whole: Path, shards: tuple[str, ...]) -> None:
    assert_finished(whole / "r")
    assert [line["step"] for line in trace(whole / "r")] == list(range(1, LAST_STEP + 1))
    assert checkpoints(whole / "r") == ["step-00000070", "step-00000072"]
    assert state(whole / "r")["samples"] == 8 * LAST_STEP


def test_a_finished_run_is_not_run_again(whole: Path, shards: tuple[str, ...]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (whole / "r").rglob("*") if path.is_file()}
    done = run(python(SCRIPT, *THREE_PHASES, *shards, "--output-dir", whole))
    assert done.code == 0, done.text
    assert "Next:" in done.text
    assert "phase" not in done.text
    assert {path: path.stat().st_mtime_ns for path in (whole / "r").rglob("*") if path.is_file()} == before


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(
    whole: Path, killed: Path, shards: tuple[str, ...], tmp_path: Path
) -> None:
    out = shutil.copytree(killed, tmp_path / "out")
    (out / "r/checkpoints/.step-00000099.tmp").mkdir()  # as a kill in the middle of a save leaves it
    (out / "r/checkpoints/.step-00000099.tmp/model.safetensors").write_bytes(b"half")
    done = run(python(SCRIPT, *THREE_PHASES, *shards, "--output-dir", out))
    assert done.code == 0, done.text
    assert "goes on from" in done.text
    assert_finished(out / "r")
    assert trace(out / "r") == trace(whole / "r")
    assert trace(out / "r", "eval") == trace(whole / "r", "eval")
    assert checkpoints(out / "r") == checkpoints(whole / "r")
    assert not list((out / "r/checkpoints").glob(".*"))
    for name in ("model.safetensors", "optimizer.safetensors"):
        files = [folder / "r/checkpoints" / f"step-{LAST_STEP:08d}" / name for folder in (out, whole)]
        assert files[0].read_bytes() == files[1].read_bytes(), name


def test_resumed_on_two_ranks_from_the_checkpoint_before_a_damaged_one(
    whole: Path, killed: Path, shards: tuple[str, ...], tmp_path: Path
) -> None:
    out = shutil.copytree(killed, tmp_path / "out")
    *_, previous, newest = checkpoints(out / "r")
    flip_bit(out / "r/checkpoints" / newest / "model.safetensors")
    done = run(torchrun(SCRIPT, *THREE_PHASES, *shards, "--output-dir", out))
    assert done.code == 0, done.text
    assert f"{newest} is not usable (model.safetensors does not match" in done.text
    assert f"{previous} (" in done.text
    assert_finished(out / "r")
    resumed, uninterrupted = trace(out / "r"), trace(whole / "r")
    assert [line["samples"] for line in resumed] == [line["samples"] for line in uninterrupted]
    for key in ("loss", "contrastive_loss", "caption_loss"):  # another order of samples would be off by far more
        assert [a[key] for a in resumed] == pytest.approx([b[key] for b in uninterrupted], rel=2e-3), key


def test_never_from_zero_when_no_checkpoint_is_good(killed: Path, shards: tuple[str, ...], tmp_path: Path) -> None:
    out = shutil.copytree(killed, tmp_path / "out")
    for name in checkpoints(out / "r"):
        flip_bit(out / "r/checkpoints" / name / "optimizer.safetensors")
    before = (out / "r/metrics.jsonl").read_bytes()
    done = run(python(SCRIPT, *THREE_PHASES, *shards, "--output-dir", out))
    assert_refused(done, 5, "no usable checkpoint", "another --name")
    assert (out / "r/metrics.jsonl").read_bytes() == before


def test_another_configuration_is_refused_or_allowed_by_a_flag(
    killed: Path, shards: tuple[str, ...], tmp_path: Path
) -> None:
    out = shutil.copytree(killed, tmp_path / "out")
    flags = (SCRIPT, *THREE_PHASES, *shards, "--output-dir", str(out))
    pickle = tmp_path / "model.pt"
    pickle.write_bytes(b"\x80\x04.")
    commands = {
        "refused": python(*flags, "--seed", "5", "--set", "phases.0.lr=0.25"),
        "never": python(*flags, "--resume", "never"),
        "pickle": python(*flags, "--resume", pickle),
        "optimizer": python(*flags, "--set", "optim.kind=muon", "--allow-config-change"),
        "width": python(*flags, "--set", "model.embed_dim=16", "--allow-config-change"),
        "allowed": python(*flags, "--set", "train.keep_checkpoints=1", "--allow-config-change", "--dry-run"),
    }
    found = {name: run(command) for name, command in commands.items()}  # one after another: they share a directory
    assert_refused(found["refused"], 2, "train.seed: 0 → 5", "phases.0.lr:", "→ 0.25", "--allow-config-change")
    assert "data.train" not in found["refused"].text, "only what differs is shown"
    assert_refused(found["never"], 2, "holds a run already", "--name")
    assert_refused(found["pickle"], 2, "--resume", "model.pt")
    assert_refused(found["optimizer"], 2, "optim.kind cannot change within a run")
    assert_refused(found["width"], 2, "do not fit the model", "(32, 32)", "(16, 32)")
    assert found["allowed"].code == 0, found["allowed"].text
    assert "goes on from" in found["allowed"].text
    assert json.loads((out / "r/config.json").read_text())["train"]["seed"] == 0


def test_stopped_by_signals_after_a_checkpoint(shards: tuple[str, ...], tmp_path: Path) -> None:
    """SIGTERM, then Ctrl-C on what goes on from there; a worker process gets the signals too."""
    run_dir, log = tmp_path / "r", tmp_path / "log"
    flags = ("--debug", "--name", "r", "--output-dir", tmp_path, *shards, "--samples", "400000", "--set")
    command = python(SCRIPT, *flags, "data.workers=1")
    step = 0
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with started(command, log) as process:
            wait_for(lambda s=step: lines(run_dir) and lines(run_dir)[-1]["step"] >= s + 3, process, log)
            os.killpg(process.pid, number)
            assert process.wait(60) == code, log.read_text()
        assert_refused(Done(code, log.read_text()), code, "a checkpoint was saved", signal.Signals(number).name)
        assert state(run_dir)["step"] == lines(run_dir)[-1]["step"] > step, "the step was ended, and saved"
        step = state(run_dir)["step"]
    assert [line["step"] for line in trace(run_dir)] == list(range(1, step + 1))


def test_ctrl_c_under_the_deepspeed_launcher(shards: tuple[str, ...], tmp_path: Path) -> None:
    """The launcher sends SIGTERM after the Ctrl-C that its children have got already: they must still save."""
    run_dir, log = tmp_path / "r", tmp_path / "log"
    flags = ("--debug", "--name", "r", "--output-dir", tmp_path, *shards, "--samples", "400000")
    with started(deepspeed(SCRIPT, *flags, "--set", "data.workers=1"), log) as process:
        wait_for(lambda: len(lines(run_dir)) >= 3, process, log)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) != 0
        end = time.monotonic() + 20
        while not (run_dir / "LATEST").exists() and time.monotonic() < end:  # the launcher does not wait for its own
            time.sleep(0.1)
    assert state(run_dir)["step"] == lines(run_dir)[-1]["step"]


def test_a_full_disk_ends_the_run_with_older_checkpoints_intact(
    killed: Path, shards: tuple[str, ...], tmp_path: Path
) -> None:
    """The system refuses to let any file grow beyond 1 MiB; the weights take 8. The next save waits at the latest."""
    out = shutil.copytree(killed, tmp_path / "out")
    before = {path: path.read_bytes() for path in (out / "r/checkpoints").rglob("*") if path.is_file()}
    next_save = state(out / "r")["step"] + 5
    command = python(SCRIPT, *THREE_PHASES, *shards, "--output-dir", out)
    done = run(["bash", "-c", 'ulimit -f 1024 && exec "$@"', "-", *command])
    assert_refused(done, 1, f"the checkpoint of step {next_save} cannot be written", "make room")
    assert {path: path.read_bytes() for path in (out / "r/checkpoints").rglob("*") if path.is_file()} == before
    steps = [line["step"] for line in trace(out / "r")]
    assert steps == list(range(1, len(steps) + 1))
    assert next_save <= steps[-1] <= next_save + 5


# It is misused


def test_the_users_mistakes_are_named(shards: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    (tmp_path / "empty").mkdir()
    write_shard(tmp_path / "short/0.tar", [(p, {"json": recap(w, t)["json"]}) for p, w, t in pictures(4)])
    (tmp_path / "hollow").mkdir()
    tarfile.open(tmp_path / "hollow/0.tar", "w").close()
    (tmp_path / "ds.json").write_text('{"train_batch_size": 8}')
    data = shards[1]
    cases: dict[str, tuple[list[str], list[str]]] = {
        "unwritable": ([*shards, "--output-dir", f"{tmp_path}/file/runs"], ["cannot write to", "--output-dir"]),
        "missing": (["--data", f"{tmp_path}/nowhere/*.tar"], ["no data at", "nowhere"]),
        "empty folder": (["--data", f"{tmp_path}/empty"], ["no data at", "empty"]),
        "empty shard": (["--data", f"{tmp_path}/hollow"], ["hold no samples"]),
        "missing test data": (["--data", data, "--test-data", f"{tmp_path}/gone.csv"], ["no data at", "gone.csv"]),
        "wrong field": (["--data", data, "--fields", "web=json:alt"], ["json:alt", "json:org_caption", "txt"]),
        "no long captions": (["--data", f"{tmp_path}/short"], ["long", "json:org_caption"]),
        "no GPU": ([*shards, "--device", "cuda"], ["--device cuda", "--device cpu"]),
        "indivisible": ([*shards, "--set", "train.accumulation=3"], ["batch_size 8 is not divisible", "6 or 9"]),
        "engine settings": ([*shards, "--ds-config", f"{tmp_path}/ds.json"], ["train_batch_size", "batch_size"]),
    }
    commands = {
        name: python(SCRIPT, "--debug", "--output-dir", tmp_path / "out", "--name", name.replace(" ", "-"), *flags)
        for name, (flags, _) in cases.items()
    }
    commands["ranks"] = deepspeed(SCRIPT, "--debug", "--output-dir", tmp_path / "out", *shards, "--batch-size", "7")
    cases["ranks"] = ([], ["batch_size 7 is not divisible by 2 ranks", "6 or 8"])
    import torch

    if torch.cuda.is_available():
        del commands["no GPU"]
    for name, done in run_all(commands).items():
        words = cases[name][1]
        assert done.code == 2, (name, done.text)
        assert "error:" in done.text, name
        if name != "ranks":  # the launcher may add its own
            assert "Traceback" not in done.text, (name, done.text)
        for word in words:
            assert word in done.text, (name, done.text)
        assert not (tmp_path / "out" / name.replace(" ", "-") / "config.json").exists(), (
            "mended, the name is still free"
        )


def test_a_loss_that_is_not_finite_changes_nothing(shards: tuple[str, ...], tmp_path: Path) -> None:
    flags = ("--recipe", "s16", "--debug", "--name", "r", "--output-dir", tmp_path, *shards, "--samples", "80", "--set")
    settings = ("phases.*.lr=1e36", "phases.*.warmup_samples=0", "train.precision=fp32", "train.checkpoint_every=8")
    done = run(python(SCRIPT, *flags, *settings))
    assert_refused(done, 3, "not finite at step", "no weight was changed", "rank 0:", "0.tar#000")
    run_dir = tmp_path / "r"
    last = trace(run_dir)[-1]["step"]
    assert f"at step {last + 1} " in done.text
    assert state(run_dir)["step"] == last
    for value in load_file(run_dir / "checkpoints" / f"step-{last:08d}" / "model.safetensors").values():
        assert value.isfinite().all()
    named = {word.strip(",") for word in done.text.split() if "tar#" in word}
    assert len(named) == 8, "the samples of the step"


# A user's own pictures


def test_a_users_own_pictures_as_shards_and_as_a_table(tmp_path: Path) -> None:
    """50 pictures with two captions each, one of them damaged, under names of the user's own choice."""
    photos = pictures(50, "JPEG")
    photos[7] = (photos[7][0][:100], *photos[7][1:])
    shard = [(p, {"json": json.dumps({"alt": w, "recaption": t}).encode()}) for p, w, t in photos]
    write_shard(tmp_path / "shards/my-00000.tar", shard[:25], "jpg")
    write_shard(tmp_path / "shards/my-00001.tar", shard[25:], "jpg")
    (tmp_path / "table/pictures").mkdir(parents=True)
    with (tmp_path / "table/mine.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "alt", "recaption"])
        for i, (picture, web, long) in enumerate(photos):
            (tmp_path / f"table/pictures/{i}.jpg").write_bytes(picture)
            table.writerow([f"pictures/{i}.jpg", web, long])
    data = {"shards": f"{tmp_path}/shards/my-{{00000..00001}}.tar", "table": f"{tmp_path}/table/mine.csv"}
    fields = {
        "shards": ("--fields", "image=jpg", "web=json:alt", "long=json:recaption"),
        "table": ("--fields", "image=file", "web=alt", "long=recaption"),
    }

    def train(kind: str) -> list[str]:
        splits = ("--data", data[kind], "--val-data", data[kind], "--test-data", data[kind])
        size = ("--samples", "100", "--batch-size", "10")
        return python(SCRIPT, "--name", kind, "--output-dir", tmp_path / "runs", *splits, *fields[kind], *size)

    def measure(kind: str) -> list[str]:
        model = ("--model", tmp_path / "runs" / kind, "--data", data[kind], *fields[kind])
        return python("scripts/evaluate_clips.py", *model, "--out", tmp_path / f"{kind}.json")

    trained = run_all({kind: train(kind) for kind in data})
    for kind, done in trained.items():
        assert done.code == 0, done.text
        assert_finished(tmp_path / "runs" / kind)
        skipped = lines(tmp_path / "runs" / kind, "skipped.jsonl")
        assert len(skipped) == trace(tmp_path / "runs" / kind)[-1]["skipped"] == 2, "two epochs see the damaged one"
        assert {line["key"].rpartition("#")[2] for line in skipped} == {"00007" if kind == "shards" else "7"}
    for kind, done in run_all({kind: measure(kind) for kind in data}).items():
        assert done.code == 0, done.text
        assert "49 images, 1 skipped" in done.text
        figures = json.loads((tmp_path / f"{kind}.json").read_text())["figures"]
        assert figures["web_t2i_r1"]["items"] == 49
        assert 0 <= figures["web_t2i_r1"]["value"] <= 100
