"""The pretraining command as people start, stop, misuse and continue it, also with weights from elsewhere."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_group
from launched import (
    ENV,
    SCRIPT,
    assert_finished,
    assert_said,
    checkpoints,
    deepspeed,
    latest,
    lines,
    make_images,
    python,
    run,
    run_all,
    state,
    trace,
    write_shard,
)

from clips.common.tensors import read_weights
from clips.config import RunConfig
from clips.data.demo import MISSING
from clips.weights.initial import read_initial

pytestmark = pytest.mark.slow


def test_each_kind_of_recipe_takes_three_steps_to_the_report(shards: tuple[str, ...], tmp_path: Path) -> None:
    """Of the paper's four, which differ in sizes alone, the smallest."""
    recipes = ["demo", "small_clip", "s16"]
    flags = ("--debug", "--output", tmp_path, *shards, "--profile", "1")
    for name, done in run_all({name: python(SCRIPT, *flags, "--recipe", name) for name in recipes}).items():
        assert done.code == 0, done.text
        run_dir = tmp_path / f"{name}-debug"
        assert_finished(run_dir)
        assert [line["step"] for line in trace(run_dir)] == [1, 2, 3]
        assert [line["step"] for line in trace(run_dir, "eval")] == [3]
        assert ("caption_loss" in trace(run_dir)[0]) == (name != "small_clip")
        assert all(line["tflops"] > 0 and "mfu" not in line for line in lines(run_dir) if line["kind"] == "train")
        for shown in (f"recipe {name}", "parameters", "writes to", "% of the time spent waiting for data", "Next:"):
            assert shown in done.text
        assert str(run_dir) in done.text.split("Next:")[1], "the next step is this run's"
        assert (run_dir / "skipped.jsonl").read_text() == ""
        assert f"profile of 1 steps: {run_dir}/profile" in done.text
        recorded = json.loads((run_dir / "profile" / "trace-rank0.json").read_text())["traceEvents"]
        assert {"aten::mm", "aten::conv2d"} & {event["name"] for event in recorded}


@pytest.mark.draws
def test_the_bare_command_builds_the_demo_data_and_draws_a_report(tmp_path: Path) -> None:
    """`deepspeed scripts/pretrain_clips.py` and no flag that names data."""
    small = (ROOT / "tests/small_demo.py", "one", "pretrain_clips.py", "--debug")
    env = ENV | {"CLIPS_MLLM_CACHE": str(tmp_path / "cache")}
    done = run_group(deepspeed(*small), cwd=tmp_path, env=env, stderr=subprocess.STDOUT, timeout=300)
    assert done.returncode == 0, done.stdout
    run_dir = tmp_path / "runs/demo-debug"
    assert_finished(run_dir)
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    assert {"sentence_t2i_r1", "zero_shot_top1", "linear_probe_top1"} <= evaluation["metrics"].keys()
    # Without npm one artist draws the demo, which every place says.
    assert (done.stdout.count(f"warning: {MISSING}"), evaluation["missing"]) == (1, MISSING)
    assert MISSING in (run_dir / "report" / "index.html").read_text()


def test_a_dry_run_shows_the_plan_and_leaves_nothing(shards: tuple[str, ...], tmp_path: Path) -> None:
    flags = (SCRIPT, "--debug", "--dry-run", "--output", tmp_path / "out", *shards)
    whole = ("--set", "train.accumulation=2", "train.contrastive=global")
    plans = run_all({"plain": python(*flags), "whole": python(*flags, *whole)})
    assert plans["plain"].code == plans["whole"].code == 0, plans
    assert "3 steps × 8" in plans["plain"].text
    for name, done in plans.items():
        assert ("train.contrastive=global" in done.text) == (name == "whole")
    assert not (tmp_path / "out").exists()


def test_the_users_mistakes_are_named(shards: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    (tmp_path / "ds.json").write_text('{"train_batch_size": 8}')
    cases: dict[str, tuple[list[str], list[str]]] = {
        "unwritable": ([*shards, "--output", f"{tmp_path}/file/runs"], ["cannot write to", "--output"]),
        "no GPU": ([*shards, "--device", "cuda"], ["--device cuda", "--device cpu"]),
        "indivisible": ([*shards, "--set", "train.accumulation=3"], ["batch_size 8 is not a multiple of 3"]),
        "engine settings": ([*shards, "--ds-config", f"{tmp_path}/ds.json"], ["train_batch_size", "batch_size"]),
    }
    commands = {
        name: python(SCRIPT, "--debug", "--output", tmp_path / "out", "--name", name.replace(" ", "-"), *flags)
        for name, (flags, _) in cases.items()
    }
    if torch.cuda.is_available():
        del commands["no GPU"]
    for name, done in run_all(commands).items():
        words = cases[name][1]
        assert done.code == 2, (name, done.text)
        assert "error:" in done.text, name
        assert "Traceback" not in done.text, (name, done.text)
        for word in words:
            assert word in done.text, (name, done.text)
        assert not (tmp_path / "out" / name.replace(" ", "-") / "config.json").exists(), (
            "mended, the name is still free"
        )


def with_captions(path: Path, count: int) -> Path:
    samples = [
        (image, {"json": json.dumps({"captions": [web, f"{i}: {web}", long]}).encode()})
        for i, (image, web, long) in enumerate(make_images(count, "JPEG"))
    ]
    return write_shard(path, samples, "jpg")


def test_several_captions_a_held_out_share_and_the_best_checkpoint_without_a_flag(tmp_path: Path) -> None:
    """As someone with photographs and several captions each would begin; only the length is a test's."""
    with_captions(tmp_path / "mine.tar", 120)
    run_dir = tmp_path / "mine"
    every = ("train.eval_every=16", "train.checkpoint_every=16", "train.keep_checkpoints=1", "data.held_out=0.1")
    command = python(
        *(SCRIPT, "--data", tmp_path / "mine.tar", "--name", "mine", "--output", tmp_path, "--batch-size", "16"),
        *("--set", *every, "--samples"),
    )
    done = run([*command, "96"])
    assert_said(done, 0, "recipe small", "captions")
    assert_finished(run_dir)
    values = {line["step"]: line["choosing"] for line in trace(run_dir, "eval")}
    assert len(values) == 6
    best = max(values, key=lambda step: (values[step], step))
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    assert evaluation["checkpoint"]["step"] == best
    held_out = evaluation["metrics"]["sentence_i2t_r1"]["items"]
    assert_said(done, 0, f"{120 - held_out} samples", f"{held_out} of 120 images held out, {held_out} rows")
    assert f"the best checkpoint on {held_out} validation images is step-{best:08d}" in " ".join(done.text.split())
    assert set(checkpoints(run_dir)) == {f"step-{best:08d}", "step-00000006"}

    longer = [*command, "112", "--allow-config-change"]
    moved = (tmp_path / "mine.tar").rename(tmp_path / "other.tar")
    assert_said(run(longer), 2, "no data at")
    with_captions(tmp_path / "mine.tar", 140)
    done = run(longer)
    assert_said(done, 2, "has trained on other data", "Give another --name to begin", f"--init-from {run_dir}")
    assert checkpoints(run_dir)[-1] == "step-00000006"
    (run_dir / "data.json").rename(tmp_path / "data.json")
    assert_said(run([*longer, "--dry-run"]), 0, "goes on from", "it began when rows were held out")
    moved.replace(tmp_path / "mine.tar")
    (tmp_path / "data.json").replace(run_dir / "data.json")
    done = run([*longer, "--dry-run"])
    assert_said(done, 0, "goes on from")
    assert "rows were held out" not in done.text


STEPS = 4
FLAGS = ("--debug", "--samples", str(8 * STEPS), "--set", "train.precision=fp32", "train.checkpoint_every=16")


def test_an_official_checkpoint_trains_with_a_frozen_tower_and_goes_on_without_its_files(shards, tmp_path, monkeypatch):
    """Two ranks under the deepspeed launcher; then the last checkpoint and the official files are gone."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "numerics")
    from test_official import write_official

    official, run_dir = tmp_path / "official", tmp_path / "r"
    write_official(official)
    initial = read_initial(str(official))
    flags = (*FLAGS, "train.freeze=vision", "--init-from", str(official), "--ds-config", "ds_configs/zero2.json")
    command = deepspeed(SCRIPT, "--name", "r", "--output", tmp_path, *shards, *flags)
    done = run(command)
    assert done.code == 0, done.text
    for shown in (f"begins with {official}", "from the file", "differs from demo", "(train.freeze=vision)"):
        assert done.text.count(shown) == 1, (shown, done.text)
    record = json.loads((run_dir / "init_from.json").read_text())
    assert (record["source"], record["sha256"]) == (str(official), initial.sha256)
    assert state(run_dir)["began_with"] == initial.sha256
    assert RunConfig.load(run_dir / "config.json").train.init_from == str(official)

    whole = read_weights(latest(run_dir) / "model.safetensors")
    frozen = {name for name in whole if name.startswith("visual.")} - {"visual.proj.weight"}
    assert {name for name, value in initial.tensors.items() if torch.equal(whole[name], value)} == frozen
    losses = [line["loss"] for line in lines(run_dir) if line["kind"] == "train"]
    assert len(losses) == STEPS

    shutil.rmtree(latest(run_dir))
    shutil.rmtree(run_dir / "export")
    shutil.rmtree(official)
    done = run(command)
    assert done.code == 0, done.text
    assert "goes on from" in done.text
    assert "begins with" not in done.text
    assert [line["loss"] for line in lines(run_dir) if line["kind"] == "train"] == losses
    again = read_weights(latest(run_dir) / "model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    assert state(run_dir)["began_with"] == initial.sha256
