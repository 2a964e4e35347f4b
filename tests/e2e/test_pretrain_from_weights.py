"""The commands with weights from elsewhere: `--init-from`, going on without them, freezing, evaluating, exporting."""

import json
import shutil
import sys

import pytest
import torch
from conftest import ROOT
from launched import SCRIPT, deepspeed, latest, lines, run, state

from clips.common.tensors import read_weights
from clips.config import RunConfig
from clips.weights.initial import read_initial

sys.path.insert(0, str(ROOT / "tests" / "numerics"))  # the official layout is written by one test module alone
from test_official import write_official

pytestmark = pytest.mark.slow
STEPS = 4
FLAGS = ("--debug", "--samples", str(8 * STEPS), "--set", "train.precision=fp32", "train.checkpoint_every=16")


def test_an_official_checkpoint_trains_with_a_frozen_tower_and_goes_on_without_its_files(shards, tmp_path):
    """Two ranks under the deepspeed launcher; then the last checkpoint and the official files are gone."""
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
