"""The configuration: validated, rebuilt from its JSON form, changed and compared by field, and made of flags."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import random_model, tiny_run

from clips.common.errors import UserError
from clips.common.flags import from_dict
from clips.common.runtime import has_bf16
from clips.config import RunConfig, changed_fields
from clips.engine.engine import read_ds_config
from clips.recipes import debug_twin, recipe
from clips.training.cli import config_from_flags, parser
from clips.training.prepare import precision_of
from clips.training.trainer import Task


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
        ("eval.batch_size=0", "^eval.batch_size 0 must be at least 1$"),  # failed at the first validation, and on
        ("captions.sub_caption_tokens=-1", "^captions.sub_caption_tokens -1 must be at least 1$"),  # trained in silence
        ("captions.sub_caption_tokens=0", "sub_caption_tokens 0"),
        ("data.workers=-1", "data.workers -1 must be at least 0"),
        ("data.held_out=1", r"data.held_out 1\.0 must be at least 0 and below 1"),
        ("optim.eps=NaN", "optim.eps nan must be a finite number"),
        ("optim.betas=[0.9, Infinity]", "optim.betas inf must be a finite number"),
        ("phases.*.lr=-1", r"lr -1\.0 must be at least 0"),
        ("train.seed=99999999999999999999", "train.seed 99999999999999999999 must be at least 0 and below"),
        ("model.captioner.length=2", "captioner.length 2 must be at least 3"),  # bos and eos, no token between
        ("phases.*.muon_lr=0", "optim.kind=muon leaves the blocks as they are at .*muon_lr=0"),
    ],
)
def test_wrong_values_are_named(assignment: str, noun: str) -> None:
    with pytest.raises(UserError, match=noun):
        recipe("demo").override([assignment])


def test_muon_needs_a_rate_of_its_own() -> None:
    """The recipes of the paper have none: their blocks did not train, without a word."""
    with pytest.raises(UserError, match=r"--set 'phases\.\*\.muon_lr=0\.02'"):
        recipe("b16").override(["optim.kind=muon"])
    assert recipe("b16").override(["optim.kind=muon", "phases.*.muon_lr=0.02"]).optim.kind == "muon"
    assert recipe("b16").override(["optim.kind=muon", "phases.*.lr=0"]).phases[0].muon_lr == 0


NO_PARAMETERS = '{"optimizer": {"type": "AdamW", "params": null}, "zero_optimization": {"stage": 2}}'


@pytest.mark.parametrize("content", ["[1]", '"x"', "null", '{"zero_optimization": null}', NO_PARAMETERS])
def test_settings_of_deepspeed_are_an_object(content: str, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(content)
    if content == NO_PARAMETERS:
        assert read_ds_config(file, "--ds-config") == {"zero_optimization": {"stage": 2}}
    else:
        with pytest.raises(UserError, match=r"^--ds-config .*ds\.json .*expected an object"):
            read_ds_config(file, "--ds-config")


def test_override_sets_one_field_and_leaves_the_rest() -> None:
    run = replace(tiny_run(), phases=tiny_run().phases * 2)
    changed = run.override(
        ["train.seed=5", "data.train=/shards/{00..09}.tar", "phases.1.lr=3", "optim.betas=[0.8,0.9]"]
    )
    assert changed_fields(run, changed) == [
        'data.train: "demo" → "/shards/{00..09}.tar"',
        "optim.betas.0: 0.9 → 0.8",
        "optim.betas.1: 0.95 → 0.9",
        "phases.1.lr: 0.01 → 3.0",
        "train.seed: 0 → 5",
    ]
    assert isinstance(changed.phases[1].lr, float), "an integer is a float there"
    together = tiny_run().override(["phases.*.batch_size=128", "phases.*.samples=128"])  # either alone does not fit
    assert (together.phases[0].batch_size, together.phases[0].samples) == (128, 128)
    changed = run.override(["data.val=a=b.csv", "data.image_root=null"])
    assert (changed.data.val, changed.data.image_root) == ("a=b.csv", None)  # only the first = separates


def test_missing_fields_are_named() -> None:
    tree = tiny_run().to_dict()
    without = {key: value for key, value in tree["model"].items() if key != "embed_dim"}
    with pytest.raises(UserError, match="embed_dim"):
        from_dict(RunConfig, tree | {"model": without})
    assert from_dict(RunConfig, {k: v for k, v in tree.items() if k != "train"}).train.seed == 0  # has a default


def test_an_unknown_field_is_refused_also_if_it_is_null() -> None:
    with pytest.raises(UserError, match="nonsense"):
        from_dict(RunConfig, tiny_run().to_dict() | {"nonsense": None})


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


def test_auto_precision_is_what_the_run_began_in_or_what_the_device_computes_in() -> None:
    auto, bf16, fp32 = (tiny_run().override([f"train.precision={name}"]) for name in ("auto", "bf16", "fp32"))
    assert changed_fields(bf16, auto) == changed_fields(fp32, auto) == []
    assert changed_fields(bf16, fp32) == ['train.precision: "bf16" → "fp32"']
    cpu = torch.device("cpu")
    assert precision_of(auto, None, cpu) == ("bf16" if has_bf16(cpu) else "fp32")
    assert [precision_of(auto, begun, cpu) for begun in (bf16, fp32)] == ["bf16", "fp32"]
    assert precision_of(bf16, fp32, cpu) == "bf16"
    with pytest.raises(ValueError, match="not decided"):
        Task(random_model(auto), auto.task, auto.train)


def pretrain(*flags: str):
    return config_from_flags(parser().parse_args(flags))


def test_the_bare_command_is_the_demo_recipe() -> None:
    assert pretrain() == recipe("demo")
    assert pretrain("--debug") == debug_twin(recipe("demo"))
    assert pretrain("--local_rank=0") == recipe("demo"), "the deepspeed launcher adds it"


def test_flags_go_where_they_say() -> None:
    run = pretrain(
        *("--data", "a/*.tar", "--val-data", "v.csv", "--test-data", "t.csv", "--image-root", "pics"),
        *("--fields", "image=file", "web=alt", "--fields", "long=recaption", "--seed", "3"),
        *("--on-spike", "skip"),
    )
    assert changed_fields(recipe("small"), run) == [
        'data.fields.image: "jpg;jpeg;png;webp" → "file"',
        'data.fields.long: "txt" → "recaption"',
        'data.fields.web: "json:org_caption" → "alt"',
        'data.image_root: null → "pics"',
        'data.test: null → "t.csv"',
        'data.train: "" → "a/*.tar"',
        'data.val: null → "v.csv"',
        'train.on_spike: "continue" → "skip"',
        "train.seed: 0 → 3",
    ]


def test_several_test_sets_have_names_but_for_the_first() -> None:
    run = pretrain("--data", "a/*.tar", "--test-data", "coco=1.csv", "flickr=f.csv", "unseen=https://host/u?v=1.tar")
    assert run.data.test == "coco=1.csv"  # a place may have an equals sign in it
    further = [(part.name, part.data) for part in run.data.further_tests]
    assert further == [("flickr", "f.csv"), ("unseen", "https://host/u?v=1.tar")]
    for wrong, noun in ((["f.csv"], "NAME=DATA"), (["a/b=f.csv"], "a/b"), (["a=1", "a=2"], "twice")):
        with pytest.raises(UserError, match=noun):
            pretrain("--data", "a", "--test-data", "t.csv", *wrong)


def test_a_mix_is_several_sets_with_shares() -> None:
    run = pretrain("--mix", "recap=3:a/*.tar", "cc=0.5:https://host:80/b.parquet", "--set", "data.mix.1.fields=null")
    assert run.data.train == "mix"
    assert [(part.name, part.share, part.data) for part in run.data.mix] == [
        ("recap", 3.0, "a/*.tar"),
        ("cc", 0.5, "https://host:80/b.parquet"),
    ]
    with pytest.raises(UserError, match="NAME=SHARE:DATA"):
        pretrain("--mix", "a=1")
    with pytest.raises(SystemExit, match="2"):
        pretrain("--mix", "a=1:b", "--data", "c")
    with pytest.raises(UserError, match="both or neither"):
        pretrain("--data", "mix")


def test_samples_and_batch_size_fit_together() -> None:
    run = pretrain("--samples", "48", "--batch-size", "16")  # 48 alone is less than one batch of the recipe
    assert [(phase.samples, phase.batch_size) for phase in run.phases] == [(48, 16)]
    run = pretrain("--samples", "64", "--set", "phases.0.batch_size=8")
    assert run.phases[0].batch_size == 8
    with pytest.raises(UserError, match="samples 48 is below one batch of 128"):
        pretrain("--samples", "48")


def test_another_batch_size_moves_the_rates_by_the_recipes_rule() -> None:
    """The paper's rates are per 256 samples; the demo's follow the square root; --set has the last word."""
    run = pretrain("--recipe", "b16", "--data", "x.tar", "--batch-size", "256")
    assert [phase.lr for phase in run.phases] == pytest.approx([8e-6, 4e-7, 1e-7], rel=1e-12)
    assert [phase.warmup_samples for phase in run.phases] == [p.warmup_samples for p in recipe("b16").phases]
    own = recipe("demo").phases[0]
    phase = pretrain("--batch-size", "32").phases[0]
    assert (phase.lr, phase.muon_lr) == pytest.approx((own.lr / 2, own.muon_lr / 2))
    assert pretrain("--batch-size", "128") == recipe("demo")
    phase = pretrain("--batch-size", "32", "--set", "phases.0.lr=0.5").phases[0]
    assert (phase.lr, phase.muon_lr) == (0.5, pytest.approx(own.muon_lr / 2))
    phase = pretrain("--batch-size", "32", "--set", "optim.lr_scaling=linear").phases[0]
    assert (phase.lr, phase.muon_lr) == pytest.approx((own.lr / 4, own.muon_lr / 4))
    phase = pretrain("--set", "phases.0.batch_size=64").phases[0]
    assert (phase.batch_size, phase.lr) == (64, own.lr), "--set sets one field"
    with pytest.raises(UserError, match="batch_size 0 must be at least 1"):
        pretrain("--batch-size", "0")


def test_paper_recipes_ask_for_data_and_their_debug_twins_do_not() -> None:
    with pytest.raises(UserError, match="recipe l14 needs training data: --data"):
        pretrain("--recipe", "l14")
    assert pretrain("--recipe", "l14", "--debug").data.train == "demo"
    assert pretrain("--recipe", "l14", "--debug", "--data", "my.csv").data.train == "my.csv"
