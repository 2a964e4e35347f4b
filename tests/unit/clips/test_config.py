"""The configuration: validated, rebuilt from its JSON form, changed and compared by field."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import random_model, tiny_run

from clips.common.errors import UserError
from clips.common.runtime import has_bf16
from clips.config import OptimConfig, RunConfig, TaskConfig, difference, from_dict
from clips.recipes import RECIPES, debug_twin, recipe
from clips.training.prepare import with_precision
from clips.training.task import Task


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_config_json_alone_rebuilds_every_recipe(name: str, debug: bool, tmp_path: Path) -> None:
    run = debug_twin(recipe(name)) if debug else recipe(name)
    run.save(tmp_path / "config.json")
    loaded = RunConfig.load(tmp_path / "config.json")
    assert loaded == run  # tuples again, not lists
    assert difference(run, loaded) == []
    assert isinstance(loaded.phases, tuple)
    assert isinstance(loaded.optim.betas, tuple)
    assert (loaded.model.captioner is None) == (name == "clip_baseline")


def test_samples_and_steps_count_whole_batches() -> None:
    run = tiny_run()
    a = replace(run.phases[0], samples=100, batch_size=8)  # 12 steps, 4 samples left over
    b = replace(run.phases[0], samples=64, batch_size=16)
    run = replace(run, phases=(a, b))
    assert (a.steps, b.steps, run.steps) == (12, 4, 16)
    assert run.samples == 12 * 8 + 4 * 16


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("model.vision.widht=8", r"--set model\.vision\.widht: no field 'widht'; known here: width, layers"),
        ("nothing", r"must look like part\.field=value"),
        ("phases.3.lr=1", r"'3' is not an index below 1"),
        ("train.seed.deep=1", "no field 'deep'; known here: none"),
        ("task.caption_weight=true", "caption_weight must be float, found True"),
        ("train.seed=one", r"config\.train\.seed must be int, found 'one'"),
        ("train.compile=1", r"config\.train\.compile must be bool"),
        ("train.precision=fp64", r"train\.precision = 'fp64' is not known; choose one of: auto, bf16, fp32"),
        ("train.accumulation=0", r"train\.accumulation must be at least 1"),
        ("optim.kind=sgd", r"optim\.kind = 'sgd' is not known; choose one of: adamw, muon"),
        ("optim.betas=[0.9]", r"optim\.betas must have 2 items, found 1"),
        ("optim.betas=[0.9, null]", r"optim\.betas\.1 must be float"),
        ("model.vision=null", r"model\.vision must be an object"),
        ("model.vision.width=30", r"vision\.width 30 must be divisible by 4"),
        ("model.vision.patch_size=15", "image size 32 is not a multiple of the patch size 15"),
        ("model.text.context_length=4", r"text\.context_length 4 is below 5"),
        ("model.captioner=null", r"task\.caption_weight is above 0 but model\.captioner is null"),
        ("phases.0.image_size=40", "image size 40 is not a multiple of the patch size 16"),
        (
            "phases.0.sizes=[[48,32],[40,32]]",
            r"phase a: in sizes the size \(40, 32\) is not a multiple of the patch size 16",
        ),
        ("eval.sizes=[[48,40]]", r"in eval.sizes the size \(48, 40\) is not a multiple of the patch size 16"),
        ("phases.0.by_aspect=true", "phase a: by_aspect needs several sizes"),
        ("phases.0.sizes=[32]", r"config\.phases\.0\.sizes\.0 must be a list, found 32"),
        ("phases.0.batch_size=0", "phase a: batch_size must be positive"),
        ("phases.0.batch_size=65", "phase a: samples 64 is below one batch of 65"),
        ("phases=[]", "at least one phase"),
        ("task.synthetic_share=1.5", "synthetic_share 1.5 is not in"),
        ("captions.strategy=first", "choose one of: sentence, truncation, random_mask, block_mask, full"),
    ],
)
def test_wrong_values_are_named(assignment: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        tiny_run().override([assignment])
    assert caught.value.exit_code == 2


def test_muon_with_clipping_is_refused() -> None:
    assert OptimConfig(kind="adamw", clip_grad=1.0).clip_grad == 1.0
    with pytest.raises(UserError, match="clip_grad must be 0 with Muon"):
        OptimConfig(kind="muon", clip_grad=1.0)
    with pytest.raises(UserError, match="clip_grad"):
        tiny_run().override(["optim.kind=muon", "optim.clip_grad=1"])


@pytest.mark.parametrize(
    ("name", "assignments", "said"),
    [
        (
            "demo",
            ["task.objective=caption"],
            "embed_dim is 128, and the objective caption has no contrastive loss: set",
        ),
        ("demo", ["model.embed_dim=0"], "embed_dim is 0, and the objective clips has a contrastive loss"),
        ("caption", ["model.captioner=null"], "trains by the captioner alone"),
        ("caption", ["task.caption_weight=0"], "trains by the captioner alone"),
        ("caption", ["model.captioner.web=true"], r"web is true, which is not the objective caption: --recipe cap"),
        ("caption", ["task.objective=caption+web"], "web is false, which is not the objective caption"),
        ("caption", ["train.contrastive=global"], "has no contrastive loss; leave it out"),
        ("caption", ["train.freeze=text"], "has no text tower"),
        ("demo", ["model.captioner.image_token_keep=0"], r"image_token_keep 0.0 is not in \(0, 1\]"),
        ("demo", ["model.vision.patch_dropout=1"], r"patch_dropout 1.0 is not in \[0, 1\)"),
        ("demo", ["model.embed_dim=-1"], "embed_dim -1 is negative"),
    ],
)
def test_a_model_and_its_objective_must_fit(name: str, assignments: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        recipe(name).override(assignments)


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
    changed = run.override(["phases.*.muon_lr=0.5", "data.val=a=b.csv", "data.image_root=null", "data.test=3x"])
    assert [phase.muon_lr for phase in changed.phases] == [0.5] * 2
    assert changed.data.val == "a=b.csv"  # only the first = separates
    assert changed.data.image_root is None
    assert changed.data.test == "3x"


def test_unknown_and_missing_fields_are_named(tmp_path: Path) -> None:
    tree = tiny_run().to_dict()
    with pytest.raises(UserError, match=r"config\.data has unknown fields: trian; known: train, mix, val"):
        from_dict(RunConfig, tree | {"data": {"trian": "x"}})
    (tmp_path / "config.json").write_text(json.dumps(tree | {"data": {"gone": 1}}))
    with pytest.raises(UserError, match=r"config\.json .*config\.data has unknown fields: gone; .*delete this field"):
        RunConfig.load(tmp_path / "config.json")
    without = {key: value for key, value in tree["model"].items() if key != "embed_dim"}
    with pytest.raises(UserError, match=r"config\.model lacks the fields: embed_dim"):
        from_dict(RunConfig, tree | {"model": without})
    assert from_dict(RunConfig, {k: v for k, v in tree.items() if k != "train"}).train.seed == 0  # has a default


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"recipe": 3}', "\x00"])
def test_an_unreadable_config_file_is_a_users_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError):
        RunConfig.load(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"missing\.json"):
        RunConfig.load(tmp_path / "missing.json")


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


def test_difference_of_phases_and_of_a_missing_part() -> None:
    run = tiny_run()
    more = replace(run, phases=run.phases * 2)
    (line,) = difference(run, more)
    assert line.startswith("phases: [")
    without = replace(run, model=replace(run.model, captioner=None), task=TaskConfig(caption_weight=0, caption_chunk=7))
    lines = difference(run, without)
    assert any(line.startswith("model.captioner: {") and line.endswith("→ null") for line in lines)
