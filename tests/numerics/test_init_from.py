"""What a run begins with after `--init-from`, and what convert.py writes: official checkpoints and others."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import tiny_run
from rich.console import Console
from test_foreign_weights import STOCK, VIT, clip, shaken
from test_official import TEXTS, pixels, reference_image, reference_text, write_official
from timm.models import save_for_hf

from clips.common.errors import UserError
from clips.common.tensors import read_weights
from clips.config import RunConfig
from clips.data.tokenizer import build_tokenizer
from clips.engine.engine import Engine
from clips.model.clips import CLIPSModel
from clips.model.vision import resample_positions
from clips.training.cli import config_from_flags, parser
from clips.training.optim import build_optimizer, parameter_groups
from clips.training.trainer import Task, rates_of
from clips.weights.convert import convert
from clips.weights.export import write_native
from clips.weights.initial import Beginning, InitialWeights, check_agrees, initialise, read_initial
from clips.weights.load import load_model


def begun(initial: InitialWeights, *flags: str) -> tuple[RunConfig, CLIPSModel, Beginning]:
    """The configuration, the model and the account of a run with `flags` and these weights, before its first step."""
    given = parser().parse_args(["--debug", "--init-from", initial.source, "--set", "train.precision=fp32", *flags])
    run = config_from_flags(given, initial.architecture)
    check_agrees(run, initial)
    torch.manual_seed(0)
    model = CLIPSModel(run.model, initial.tokenizer.pad_id if initial.tokenizer else 0)
    return run, model, initialise(model, initial)


def untouched(run: RunConfig, model: CLIPSModel) -> dict[str, torch.Tensor]:
    """The same model as its recipe alone initialises it."""
    torch.manual_seed(0)
    return CLIPSModel(run.model, model.text.pad_id).state_dict()


def printed(beginning: Beginning, run: RunConfig) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(beginning.table(run))
    return capture.get()


def write_own(directory: Path, run: RunConfig) -> Path:
    """A native export with a captioner, of a tokenizer of its own."""
    tokenizer = build_tokenizer("wordpiece", ["two red cats and a dog"] * 4, vocab_size=64)
    torch.manual_seed(7)
    write_native(CLIPSModel(run.model, tokenizer.pad_id), run, tokenizer, directory)
    return directory


@pytest.fixture
def native(tmp_path: Path) -> Path:
    """Of a run that dropped image tokens."""
    dropped = ("model.vision.patch_dropout=0.5", "model.captioner.image_token_keep=0.4")
    return write_own(tmp_path / "native", tiny_run().override(dropped))


@pytest.mark.parametrize("tokenizer", [None, "json"])
def test_a_run_begins_with_the_features_of_an_official_checkpoint(tokenizer: str | None, tmp_path: Path) -> None:
    w = write_official(tmp_path / "official", tokenizer=tokenizer)
    initial = read_initial(str(tmp_path / "official"))
    run, model, beginning = begun(initial, "--set", "phases.*.image_size=32")
    assert (run.model.vision.pos_embed, run.captions.tokenizer) == ("sincos_reference", "bert")
    assert run.model.captioner == config_from_flags(parser().parse_args(["--debug"])).model.captioner
    fresh = untouched(run, model)
    new = {name for name, value in model.state_dict().items() if torch.equal(value, fresh[name])}
    assert new == {name for name in fresh if name.startswith("captioner.")}
    assert beginning.new.keys() == {"captioner"}
    assert beginning.given.keys() == {"vision tower", "text tower", "projections", "logit scale"}

    ids = initial.tokenizer.for_tower(TEXTS[:3], run.model.text)
    caption = initial.tokenizer.caption_ids(initial.tokenizer.encode(TEXTS[:3]), 16)
    _, parts = Task(model, run.task, run.train)({"images": pixels(), "web": ids, "sub": ids, "caption": caption})
    logits = w["logit_scale"].exp() * reference_image(w, pixels()) @ reference_text(w, TEXTS[:3]).T
    pairs = torch.arange(3)
    expected = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
    torch.testing.assert_close(parts["contrastive_loss"], expected, atol=1e-4, rtol=1e-5)

    text = printed(beginning, run)
    for shown in ("(open_clip;", "captioner", "differs from demo", "model.text.pad_mask: true → false"):
        assert shown in text


def test_an_own_export_brings_its_captioner_where_the_recipe_has_one(native: Path) -> None:
    initial = read_initial(str(native))
    run, model, beginning = begun(initial)
    assert run.model == tiny_run().model, "what concerns training alone is the recipe's"
    assert not beginning.new
    assert all(torch.equal(value, initial.tensors[name]) for name, value in model.state_dict().items())

    run, model, beginning = begun(initial, "--recipe", "clip_baseline")
    assert run.model.captioner is None
    assert set(beginning.left_over) == {"captioner, which this run does not have"}
    assert "left over" in printed(beginning, run)


def test_an_image_tower_alone_gets_the_recipe_s_text_tower(tmp_path: Path) -> None:
    STOCK["siglip"]().save_pretrained(tmp_path)
    initial = read_initial(str(tmp_path))
    run, _, beginning = begun(initial)
    recipe = config_from_flags(parser().parse_args(["--debug"])).model
    assert (run.model.text, run.model.embed_dim, run.captions.tokenizer) == (recipe.text, recipe.embed_dim, "wordpiece")
    assert beginning.given.keys() == {"vision tower"}
    assert list(beginning.new) == ["logit scale", "projections", "text tower", "captioner"], "as the model has them"
    text = printed(beginning, run)
    for shown in ("SigLIP's pooling head: ", "more", "folded into the patch convolution"):
        assert shown in text


def test_layer_decay_moves_each_layer_of_an_official_checkpoint_by_its_share_of_the_rate(tmp_path: Path) -> None:
    """Adam's first step moves a weight by the rate, whatever its gradient."""
    write_official(tmp_path / "official")
    initial = read_initial(str(tmp_path / "official"))
    flags = ("phases.*.image_size=32", "optim.kind=adamw", "optim.weight_decay=0.0", "optim.layer_decay=0.5")
    run, model, _ = begun(initial, "--set", *flags)
    assert run.model.vision.layers == run.model.text.layers == 3
    task = Task(model, run.task, run.train)
    optimizer = build_optimizer(parameter_groups(task, run.optim), run.optim)
    Engine.set_rates(SimpleNamespace(optimizer=optimizer), rates_of(1e-3, 0.0))  # type: ignore[arg-type]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = initial.tokenizer.for_tower(TEXTS[:3], run.model.text)
    caption = initial.tokenizer.caption_ids(initial.tokenizer.encode(TEXTS[:3]), 16)
    task({"images": pixels(), "web": ids, "sub": ids, "caption": caption})[0].backward()
    optimizer.step()

    moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in model.named_parameters()}
    still = {name for name, most in moved.items() if not most}
    assert all(name.startswith("captioner.") for name in still), "what begins at zero passes no gradient on"
    shares = {"blocks.2": 0.5, "blocks.1": 0.25, "blocks.0": 0.125}
    shares |= dict.fromkeys(("patch_embed", "cls_token", "token_embed", "pos_embed"), 0.0625)
    for name in moved.keys() - still:
        of_tower = name.startswith(("visual.", "text."))
        share = next((share for part, share in shares.items() if of_tower and f".{part}" in name), 1.0)
        assert moved[name] == pytest.approx(1e-3 * share, rel=0.02), name


def test_positions_are_resampled_for_another_image_size(tmp_path: Path) -> None:
    shaken(clip()).save_pretrained(tmp_path)
    initial = read_initial(str(tmp_path))
    run, model, beginning = begun(initial, "--set", "model.vision.image_size=48")
    expected = resample_positions(initial.tensors["visual.pos_embed"], 6, 1)
    assert torch.equal(model.visual.pos_embed, expected)
    assert expected.shape == (37, 32)
    assert "positions resampled from 32 px to 48 px" in printed(beginning, run)


def test_a_configuration_of_the_user_s_own_name_has_no_recipe_to_differ_from(native: Path) -> None:
    run, _, beginning = begun(read_initial(str(native)))
    assert "differs from demo" in printed(beginning, run)
    assert "differs from" not in printed(beginning, dataclasses.replace(run, recipe="mine"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--set", "model.vision.width=64"), r"model\.vision\.width: 32 → 64"),
        (("--set", "model.text.pad_mask=true"), r"model\.text\.pad_mask: false → true"),
        (("--set", "captions.tokenizer=wordpiece"), r'captions\.tokenizer: "bert" → "wordpiece"'),
        (("--set", "model.vision.patch_size=16"), r"patch_size: 8 → 16"),
        (("--set", "phases.*.image_size=36"), "image size 36 is not a multiple of the patch size 8"),
        (("--set", "train.init_from=elsewhere"), "give --init-from"),
        (("--tower", "siglip"), "bring their own image tower"),
    ],
)
def test_what_contradicts_the_weights_is_refused(flags: tuple[str, ...], said: str, tmp_path: Path) -> None:
    write_official(tmp_path / "official")
    with pytest.raises(UserError, match=said):
        begun(read_initial(str(tmp_path / "official")), *flags)


# UCSC-VLAA/CLIPS at 6b7d32d, open_clip/model.py: the fields of the classes that read a configuration. Any other field
# ends in a TypeError there.
FORK = {
    "CLIP": (
        *("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale", "init_logit_bias"),
        *("nonscalar_logit_scale", "cast_dtype", "output_dict"),
    ),
    "CLIPVisionCfg": (
        *("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "ls_init_value", "patch_dropout"),
        *("attentional_pool", "attn_pooler_queries", "attn_pooler_heads", "no_ln_pre", "pos_embed_type"),
        *("final_ln_after_pool", "pool_type", "output_tokens", "act_kwargs", "norm_kwargs", "timm_model_name"),
        *("timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path"),
    ),
    "CLIPTextCfg": (
        *("context_length", "vocab_size", "hf_tokenizer_name", "tokenizer_kwargs", "width", "heads", "layers"),
        *("mlp_ratio", "ls_init_value", "embed_cls", "pad_id", "no_causal_mask", "final_ln_after_pool", "pool_type"),
        *("proj_bias", "proj_type", "output_tokens", "act_kwargs", "norm_kwargs", "hf_model_name"),
        *("hf_model_pretrained", "hf_proj_type", "hf_pooler_type"),
    ),
}


def test_official_and_back_are_the_same_names_and_values(tmp_path: Path) -> None:
    w = write_official(tmp_path / "official")
    distances = convert(str(tmp_path / "official"), tmp_path / "open_clip", "open_clip")
    distances |= convert(str(tmp_path / "open_clip"), tmp_path / "again", "official")
    assert max(distances.values()) <= 1e-5
    convert(str(tmp_path / "official"), tmp_path / "native", "native")
    hashes = {read_initial(str(tmp_path / name)).sha256 for name in ("official", "native", "open_clip")}
    assert len(hashes) == 1  # of the weights, whatever their format
    again = read_weights(tmp_path / "again" / "open_clip_pytorch_model.bin")
    torch.testing.assert_close(again, w, atol=1e-6, rtol=0)
    config = json.loads((tmp_path / "again" / "open_clip_config.json").read_text())["model_cfg"]
    before = json.loads((tmp_path / "official" / "open_clip_config.json").read_text())["model_cfg"]
    for part in ("vision_cfg", "text_cfg"):
        assert before[part].items() <= config[part].items()
    assert config.keys() <= set(FORK["CLIP"])
    assert config["vision_cfg"].keys() <= set(FORK["CLIPVisionCfg"])
    assert config["text_cfg"].keys() <= set(FORK["CLIPTextCfg"])
    for name in ("open_clip", "again", "native"):  # a conversion has a card
        assert str(tmp_path) not in (tmp_path / name / "README.md").read_text(encoding="utf-8")


def test_a_clip_of_transformers_becomes_every_other_format(tmp_path: Path) -> None:
    shaken(clip()).save_pretrained(tmp_path / "clip")
    for to in ("native", "open_clip", "transformers"):
        assert max(convert(str(tmp_path / "clip"), tmp_path / to, to).values()) <= 1e-5
    again = load_model(tmp_path / "open_clip")
    assert again.model.config == dataclasses.replace(load_model(tmp_path / "native").model.config)
    with pytest.raises(UserError, match="their text towers attend to everything"):
        convert(str(tmp_path / "clip"), tmp_path / "official", "official")


def test_an_image_tower_of_timm_becomes_one_of_transformers(tmp_path: Path) -> None:
    save_for_hf(shaken(timm.create_model("vit_base_patch16_224", **VIT)), tmp_path / "timm", model_args=VIT)
    distances = convert(f"timm:{tmp_path / 'timm'}", tmp_path / "vit", "transformers")
    assert distances.keys() == {"image tokens"}
    assert not (tmp_path / "vit" / "embedding.safetensors").exists()
    with pytest.raises(UserError, match="--init-from"):
        convert(str(tmp_path / "timm"), tmp_path / "native", "native")


def test_a_torch_file_that_cannot_be_written_is_an_error_of_the_system(tmp_path, monkeypatch):
    write_official(tmp_path / "official")
    monkeypatch.setattr("clips.weights.convert.OFFICIAL_WEIGHTS", "no/weights.bin")
    with pytest.raises(OSError, match=r"weights\.bin"):  # torch raises a RuntimeError, as for a full disk
        convert(str(tmp_path / "official"), tmp_path / "new", "official")


def test_convert_writes_nothing_over_what_is_there_nor_when_it_only_checks(
    tmp_path: Path, native: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(tmp_path.iterdir())
    assert convert(str(native), tmp_path / "new", "open_clip", check_only=True)
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(UserError, match=r"exists; convert\.py overwrites nothing"):
        convert(str(native), native, "open_clip")
    with pytest.raises(UserError, match="padding included"):
        convert(str(native), tmp_path / "new", "official")
    with pytest.raises(UserError, match="their tokenizer is BERT's"):
        convert(str(write_own(tmp_path / "unmasked", tiny_run(pad_mask=False))), tmp_path / "new", "official")
    before = sorted(tmp_path.iterdir())

    monkeypatch.setattr("clips.weights.open_clip.logit_scale_parameter", lambda model: torch.tensor(0.1))
    with pytest.raises(UserError, match="is another model: logit scale differ"):
        convert(str(native), tmp_path / "new", "open_clip")
    assert sorted(tmp_path.iterdir()) == before
