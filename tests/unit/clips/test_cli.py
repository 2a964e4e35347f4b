"""The flags of scripts/pretrain_clips.py, and the configuration that they describe."""

import pytest

from clips.common.errors import UserError
from clips.config import difference
from clips.recipes import debug_twin, recipe
from clips.training.cli import config_from_flags, parser


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
    assert difference(recipe("small"), run) == [
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
    for mix, noun in ((["a=1"], "NAME=SHARE:DATA"), (["a=inf:b"], "share"), (["a=1:b", "a=1:c"], "twice")):
        with pytest.raises(UserError, match=noun):
            pretrain("--mix", *mix)
    with pytest.raises(SystemExit, match="2"):
        pretrain("--mix", "a=1:b", "--data", "c")
    with pytest.raises(UserError, match="both or neither"):
        pretrain("--data", "mix")


def test_samples_and_batch_size_fit_together() -> None:
    run = pretrain("--samples", "48", "--batch-size", "16")  # 48 alone is less than one batch of the recipe
    assert [(phase.samples, phase.batch_size) for phase in run.phases] == [(48, 16)]
    run = pretrain("--samples", "64", "--set", "phases.0.batch_size=8")
    assert run.phases[0].batch_size == 8
    with pytest.raises(UserError, match="samples 48 is below one batch of 64"):
        pretrain("--samples", "48")


def test_another_batch_size_moves_the_rates_by_the_recipes_rule() -> None:
    """The paper's rates are per 256 samples; the demo's follow the square root; --set has the last word."""
    run = pretrain("--recipe", "b16", "--data", "x.tar", "--batch-size", "256")
    assert [phase.lr for phase in run.phases] == pytest.approx([8e-6, 4e-7, 1e-7], rel=1e-12)
    assert [phase.warmup_samples for phase in run.phases] == [p.warmup_samples for p in recipe("b16").phases]
    own = recipe("demo").phases[0]
    phase = pretrain("--batch-size", "16").phases[0]
    assert (phase.lr, phase.muon_lr) == pytest.approx((own.lr / 2, own.muon_lr / 2))
    assert pretrain("--batch-size", "64") == recipe("demo")
    phase = pretrain("--batch-size", "16", "--set", "phases.0.lr=0.5").phases[0]
    assert (phase.lr, phase.muon_lr) == (0.5, pytest.approx(own.muon_lr / 2))
    phase = pretrain("--batch-size", "16", "--set", "optim.lr_scaling=linear").phases[0]
    assert (phase.lr, phase.muon_lr) == pytest.approx((own.lr / 4, own.muon_lr / 4))
    phase = pretrain("--set", "phases.0.batch_size=32").phases[0]
    assert (phase.batch_size, phase.lr) == (32, own.lr), "--set sets one field"
    with pytest.raises(UserError, match="batch_size must be positive"):
        pretrain("--batch-size", "0")


def test_paper_recipes_ask_for_data_and_their_debug_twins_do_not() -> None:
    with pytest.raises(UserError, match="recipe l14 needs training data: --data"):
        pretrain("--recipe", "l14")
    assert pretrain("--recipe", "l14", "--debug").data.train == "demo"
    assert pretrain("--recipe", "l14", "--debug", "--data", "my.csv").data.train == "my.csv"
