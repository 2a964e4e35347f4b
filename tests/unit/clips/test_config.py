"""The configuration: validated, rebuilt from its JSON form, changed and compared by field."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import random_model, tiny_run

from clips.common.errors import UserError
from clips.common.runtime import has_bf16
from clips.config import RunConfig, difference, from_dict
from clips.recipes import recipe
from clips.training.prepare import with_precision
from clips.training.task import Task


@pytest.mark.parametrize("name", ["clip_baseline", "b16"])
def test_config_json_alone_rebuilds_a_recipe(name: str, tmp_path: Path) -> None:
    run = recipe(name)
    run.save(tmp_path / "config.json")
    loaded = RunConfig.load(tmp_path / "config.json")
    assert loaded == run  # tuples again, not lists
    assert difference(run, loaded) == []
    assert isinstance(loaded.phases, tuple)
    assert isinstance(loaded.optim.betas, tuple)
    assert (loaded.model.captioner is None) == (name == "clip_baseline")


@pytest.mark.parametrize(
    ("assignment", "noun"),
    [
        ("model.vision.widht=8", "widht"),
        ("train.seed=one", r"config\.train\.seed must be int"),
        ("train.precision=fp64", "choose one of: auto, bf16, fp32"),
        ("optim.betas=[0.9, null]", r"optim\.betas\.1"),
        ("model.vision.heads=3", "width 128 is not divisible by heads 3"),
        ("phases.0.image_size=44", "image size 44 is not a multiple of the patch size 10"),
        ("phases=[]", "at least one phase"),
        ("task.synthetic_share=1.5", "synthetic_share"),
        ("model.captioner=null", "task.caption_weight"),
        ("model.embed_dim=0", "embed_dim"),
        ("model.vision.patch_dropout=1", "patch_dropout"),
        ("optim.clip_grad=1", "clip_grad"),
    ],
)
def test_wrong_values_are_named(assignment: str, noun: str) -> None:
    with pytest.raises(UserError, match=noun):
        recipe("demo").override([assignment])


def test_at_least_one_token_is_kept() -> None:
    vision = recipe("demo").override(["model.vision.patch_dropout=0.99"]).model.vision
    assert [vision.kept_tokens(size) for size in (10, 60, 320)] == [1, 1, 10]
    assert recipe("demo").model.vision.kept_tokens(60) == 36
    captioner = recipe("demo").override(["model.captioner.image_token_keep=0.3"]).model.captioner
    assert [captioner.kept_tokens(count) for count in (1, 16, 196)] == [1, 5, 59]


def test_override_sets_one_field_and_leaves_the_rest() -> None:
    run = replace(tiny_run(), phases=tiny_run().phases * 2)
    changed = run.override(
        ["train.seed=5", "data.train=/shards/{00..09}.tar", "phases.1.lr=3", "optim.betas=[0.8,0.9]"]
    )
    assert difference(run, changed) == [
        'data.train: "demo" → "/shards/{00..09}.tar"',
        "optim.betas.0: 0.9 → 0.8",
        "optim.betas.1: 0.95 → 0.9",
        "phases.1.lr: 0.01 → 3.0",
        "train.seed: 0 → 5",
    ]
    assert isinstance(changed.phases[1].lr, float), "an integer is a float there"
    assert from_dict(RunConfig, json.loads(json.dumps(changed.to_dict()))) == changed
    assert run == replace(tiny_run(), phases=tiny_run().phases * 2)  # the old one is untouched
    together = tiny_run().override(["phases.*.batch_size=128", "phases.*.samples=128"])  # either alone does not fit
    assert (together.phases[0].batch_size, together.phases[0].samples) == (128, 128)
    changed = run.override(["data.val=a=b.csv", "data.image_root=null"])
    assert (changed.data.val, changed.data.image_root) == ("a=b.csv", None)  # only the first = separates


def test_unknown_and_missing_fields_are_named() -> None:
    tree = tiny_run().to_dict()
    with pytest.raises(UserError, match="trian"):
        from_dict(RunConfig, tree | {"data": {"trian": "x"}})
    without = {key: value for key, value in tree["model"].items() if key != "embed_dim"}
    with pytest.raises(UserError, match="embed_dim"):
        from_dict(RunConfig, tree | {"model": without})
    assert from_dict(RunConfig, {k: v for k, v in tree.items() if k != "train"}).train.seed == 0  # has a default


def test_a_field_of_an_earlier_version_is_read_at_its_default(tmp_path: Path) -> None:
    tree = tiny_run().to_dict()
    tree["train"] |= {"keep_every": 0}
    tree["captions"] |= {"splitter": "smart"}
    tree["task"] |= {"contrastive_weight": 1.0}
    tree["model"]["captioner"] |= {"web": True}
    tree["phases"] = [phase | {"sizes": [], "by_aspect": False} for phase in tree["phases"]]
    tree["eval"] |= {"sizes": []}
    tree["data"] |= {"demo_aspects": False}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert RunConfig.load(tmp_path / "config.json") == tiny_run()
    tree["train"]["keep_every"] = 32
    with pytest.raises(UserError, match="keep_every"):
        from_dict(RunConfig, tree)


@pytest.mark.parametrize("objective", ["caption", "caption+web"])
def test_an_objective_that_left_is_refused_by_its_name(objective: str, tmp_path: Path) -> None:
    tree = tiny_run().to_dict()
    tree["task"]["objective"] = objective
    tree["model"] |= {"embed_dim": 0, "captioner": tree["model"]["captioner"] | {"web": False}}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=f"'{re.escape(objective)}' was removed; commit aa82178b is the last"):
        RunConfig.load(tmp_path / "config.json")


def test_auto_precision_is_what_the_run_began_in_or_what_the_device_computes_in(tmp_path: Path) -> None:
    auto, bf16, fp32 = (tiny_run().override([f"train.precision={name}"]) for name in ("auto", "bf16", "fp32"))
    assert difference(bf16, auto) == difference(fp32, auto) == []
    assert difference(bf16, fp32) == ['train.precision: "bf16" → "fp32"']
    cpu = torch.device("cpu")
    assert with_precision(auto, tmp_path, cpu) == (bf16 if has_bf16(cpu) else fp32)
    for begun in (bf16, fp32):
        begun.save(tmp_path / "config.json")
        assert with_precision(auto, tmp_path, cpu) == begun
    assert with_precision(bf16, tmp_path, cpu) == bf16
    with pytest.raises(ValueError, match="not decided"):
        Task(random_model(auto), auto)
