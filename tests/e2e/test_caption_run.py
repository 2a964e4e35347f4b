"""An encoder that learns from captions alone, walked to its end: training, figures, exports, LLaVA's registry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from launched import SCRIPT, Done, assert_finished, assert_said, pictures, python, torchrun, trace
from launched import run as run_command
from PIL import Image

from clips import CLIPS
from clips.common.errors import UserError
from clips.data.images import decode_image
from clips.recipes import recipe
from clips.training.cli import config_from_flags, parser
from clips.weights.convert import convert
from clips.weights.initial import check_agrees, initialise, read_initial
from clips.weights.load import load_model
from mllm.encoders.registry import load_vision

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(shards: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """The folder of a run that drops patches of the tower besides, on two ranks with ZeRO-3."""
    folder = tmp_path_factory.mktemp("captions")
    flags = (*shards, "--recipe", "caption", "--debug", "--output", folder, "--set", "train.precision=fp32")
    flags += ("model.vision.patch_size=5", "model.vision.patch_dropout=0.5", "train.debug=false")  # it may be newest
    zero3 = ("--name", "two", "--ds-config", ROOT / "ds_configs" / "zero3.json")
    return folder / "two", run_command(torchrun(SCRIPT, *zero3, *flags))


@pytest.fixture(scope="module")
def trained(run: tuple[Path, Done]) -> Path:
    return run[0]


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return decode_image(pictures(1)[0][0])


def test_it_is_trained_measured_and_exported_and_says_what_it_has_not(run: tuple[Path, Done]) -> None:
    run_dir, done = run
    assert_said(done, 0, "no retrieval", "export/open_clip")
    assert done.text.count("Next:") == 1, "one rank speaks"
    assert_finished(run_dir, formats=("native", "hf_vit"))
    assert not (run_dir / "export" / "open_clip").exists()
    assert json.loads((run_dir / "evaluation.json").read_text())["figures"].keys() == {"caption_token_top1"}
    assert all("caption_token_top1" in line for line in trace(run_dir, "eval"))
    assert not {"contrastive_loss", "logit_scale"} & trace(run_dir)[0].keys()
    page = (run_dir / "report" / "index.html").read_text()
    assert "caption token top 1" in page
    assert "Retrieval: hits and misses" not in page


def test_commands_take_it_and_refuse_what_it_has_not(trained: Path, tmp_path: Path) -> None:
    done = run_command(python("scripts/evaluate_clips.py", "--model", trained, "--output", tmp_path / "figures.json"))
    assert done.code == 0, done.text
    assert "retrieval and zero-shot classification are not measured" in done.text
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert figures == json.loads((trained / "evaluation.json").read_text())["figures"], "the same weights, the same set"
    done = run_command(python("scripts/convert.py", trained, tmp_path / "open_clip", "--to", "open_clip"))
    assert_said(done, 2, "was trained without a contrastive loss")
    assert max(convert(str(trained), tmp_path / "native", "native").values()) <= 1e-5
    assert convert(str(trained), tmp_path / "vit", "transformers").keys() == {"image tokens"}
    card = (trained / "export" / "hf_vit" / "README.md").read_text()
    assert "embedding.safetensors" not in card
    assert not (trained / "export" / "hf_vit" / "embedding.safetensors").exists()


def test_it_opens_as_an_encoder_without_texts(trained: Path, picture: Image.Image) -> None:
    encoder = CLIPS.from_pretrained(trained)
    features = encoder.encode_image([picture])
    assert features.shape == (1, encoder.embed_dim) == (1, 32)
    assert features.norm().item() == pytest.approx(1, abs=1e-5)
    assert len(encoder.caption([picture, picture])) == 2
    with pytest.raises(UserError, match="texts have no features"):
        encoder.encode_text(["a cat"])
    with pytest.raises(UserError, match="reads the image alone: leave the web captions out"):
        encoder.caption([picture], "a cat")


def test_all_tokens_are_used_outside_training(trained: Path, picture: Image.Image) -> None:
    """The same weights without dropping give the same features and captions."""
    loaded = load_model(trained)
    assert loaded.model.config.vision.patch_dropout == 0.5
    encoder = CLIPS.from_pretrained(trained)
    without = loaded.run.override(["model.vision.patch_dropout=0", "model.captioner.image_token_keep=1"])
    plain = type(loaded.model)(without.model, loaded.model.pad_id).eval()
    plain.load_state_dict(loaded.model.state_dict())
    pixels = encoder.preprocess(picture)[None]
    with torch.no_grad():
        plain.visual.set_image_size(encoder.image_size)
        assert torch.equal(plain.encode_image(pixels), encoder.encode_image(picture))
        web = encoder.tokenize([""])
        assert torch.equal(
            plain.caption(pixels, web, bos_id=1, eos_id=2), encoder.model.caption(pixels, web, bos_id=1, eos_id=2)
        )


@pytest.mark.parametrize("name", ["caption:{run}", "caption"])
def test_a_llava_style_model_sees_with_it(trained: Path, name: str, picture: Image.Image) -> None:
    vision = load_vision(name.format(run=trained), runs=trained.parent, select_layer=-1)
    pixels = vision.image_processor(images=picture, return_tensors="pt")["pixel_values"]
    tokens = vision.model(pixels, output_hidden_states=True).hidden_states[-1]
    model = CLIPS.from_pretrained(Path(vision.source).parents[1]).model  # of the newest one, or the one that was named
    torch.testing.assert_close(tokens, model.visual(pixels)[1], atol=1e-5, rtol=1e-5)


def test_its_tower_and_captioner_begin_a_run_of_clips_and_a_run_of_clips_one_of_its_kind(trained: Path) -> None:
    def begun(source: Path, *flags: str):
        initial = read_initial(str(source))
        given = parser().parse_args(["--debug", "--init-from", str(source), "--set", "train.precision=fp32", *flags])
        run = config_from_flags(given, initial.architecture)
        check_agrees(run, initial)
        model = type(load_model(trained).model)(run.model, 0)
        return run, model, initialise(model, initial)

    run, model, beginning = begun(trained)
    weights = load_model(trained).model.state_dict()
    assert (run.task.objective, run.model.embed_dim, run.model.captioner.web) == ("clips", 32, False)
    assert (run.model.vision.patch_dropout, run.model.captioner.image_token_keep) == (0.0, 1.0), "the recipe's own"
    assert beginning.new.keys() == {"text tower", "projections", "temperature"}
    for name, value in model.state_dict().items():
        if name in weights and name != "logit_scale":
            assert torch.equal(value, weights[name]), name
    # and the other way: the tower's export, since the captioner of `clips` reads the web caption too
    run, model, beginning = begun(trained / "export" / "hf_vit", "--recipe", "caption")
    assert run.model.embed_dim == 0
    assert torch.equal(model.visual.cls_token, weights["visual.cls_token"])
    assert beginning.given.keys() == {"vision tower"}
    assert run.model.captioner.image_token_keep == recipe("caption").model.captioner.image_token_keep
