"""The vision registry: every encoder equals its original and what stock LLaVA computes; the rest is refused."""

import json
import os
import shutil

import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from timm.models import save_for_hf
from tiny_mllm import SHAPES, tiny_tokenizer, write_map, write_run

from clips.common.errors import UserError
from clips.config import RunConfig
from clips.data.images import IMAGENET_MEAN, IMAGENET_STD
from clips.data.tokenizer import build_tokenizer
from clips.weights.export import write_native
from clips.weights.open_clip import open_clip_lacks, write_open_clip
from mllm.encoders.load import LOADERS, check_equal, load_vision
from mllm.encoders.registry import ARGUMENTS, parse_vision_name

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """runs/ with two CLIPS runs (`new` is the newest), a baseline and a run of another kind."""
    runs = tmp_path_factory.mktemp("runs")
    for age, (name, objective, seed) in enumerate([("base", "clip", 3), ("new", "clips", 2), ("old", "clips", 1)]):
        write_run(runs / name, objective, seed=seed)
        written = runs / name / "export" / "hf_vit" / "config.json"
        os.utime(written, (1e9 - age, 1e9 - age))
    (runs / "llava" / "export" / "hf_vit").mkdir(parents=True)
    (runs / "llava" / "export" / "hf_vit" / "config.json").write_text("{}")
    (runs / "llava" / "config.json").write_text("not json")
    return runs


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def stock_tokens(encoder, pixel_values):
    """What the projector of a stock model gets, seen by a hook on it."""
    config = transformers.LlavaConfig(
        vision_config=encoder.config,
        text_config=transformers.LlamaConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ),
        vision_feature_layer=encoder.select_layer,
        vision_feature_select_strategy=encoder.select_feature,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(encoder.model.state_dict())
    seen = []
    model.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model.get_image_features(pixel_values=pixel_values)
    return seen[0]


def stock_token_count(encoder):
    """How many placeholders a stock processor puts for one image."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    processor = transformers.LlavaProcessor(
        image_processor=encoder.image_processor,
        tokenizer=tokenizer,
        patch_size=encoder.patch_size,
        num_additional_image_tokens=encoder.prefix_tokens,
        vision_feature_select_strategy=encoder.select_feature,
    )
    ids = processor(images=np.zeros((50, 30, 3), dtype=np.uint8), text="a <image>?")["input_ids"][0]
    return ids.count(processor.image_token_id)


def assert_fits_stock(encoder, images):
    with torch.no_grad():
        features = encoder.features(images)
    assert features.shape == (2, encoder.num_tokens, encoder.width)
    assert torch.equal(features, stock_tokens(encoder, images))
    assert stock_token_count(encoder) == encoder.num_tokens


@pytest.mark.parametrize("shape", SHAPES)
def test_clips_equals_the_trained_tower(tmp_path, images, shape):
    """Whatever its shape, and whichever of its exports is named."""
    trained = write_run(tmp_path / "run", **SHAPES[shape])
    tokenizer = build_tokenizer("wordpiece", ["a red dog and two cats"], vocab_size=64)
    write_native(trained, RunConfig.load(tmp_path / "run" / "config.json"), tokenizer, tmp_path / "native")
    places = ["run", "native"]
    if open_clip_lacks(trained.config) is None:
        write_open_clip(trained, tokenizer, tmp_path / "open_clip")
        places.append("open_clip")
    states = []
    for block in trained.visual.blocks:
        block.register_forward_hook(lambda block, inputs, output: states.append(output))
    with torch.no_grad():
        trained.visual(images)
    for place in places:
        for layer in (-1, -2) if place == "run" else (-2,):
            encoder, expected = load_vision(f"clips:{tmp_path / place}", select_layer=layer), states[layer]
            expected = trained.visual.patches(expected)
            close = {"atol": 1e-5 * expected.abs().max().item(), "rtol": 0.0}
            torch.testing.assert_close(encoder.features(images), expected, **close)
        has_cls = trained.config.vision.cls
        assert (encoder.num_tokens, encoder.width, encoder.prefix_tokens) == (16, 32, int(has_cls))
        assert encoder.select_feature == ("default" if has_cls else "full")
        assert_fits_stock(encoder, images)


def test_random_is_seeded_and_untrained(runs, images):
    one, same, other = (load_vision("random", runs=runs, seed=seed) for seed in (1, 1, 2))
    trained = load_vision("clips", runs=runs)
    assert one.fingerprint == same.fingerprint
    assert len({one.fingerprint, other.fingerprint, trained.fingerprint}) == 3
    assert torch.equal(one.model.embeddings.position_embeddings, trained.model.embeddings.position_embeddings)
    features = one.features(images)
    assert (features[0] - features[1]).abs().mean() > 0.1  # it does see the image
    assert one.num_tokens == trained.num_tokens
    assert_fits_stock(one, images)


@pytest.mark.parametrize("shape", ["ViT", "SigLIP"])
def test_blind_sees_nothing(tmp_path, images, shape):
    write_run(tmp_path / "run", **SHAPES[shape])
    blind = load_vision(f"blind:{tmp_path / 'run'}")
    features = blind.features(images)
    assert torch.equal(features[0], features[1])
    assert features.isfinite().all()
    assert features[0].std(dim=0).mean() > 0.01  # positions are still there
    assert_fits_stock(blind, images)


def randomised(model):
    torch.manual_seed(4)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def open_clip_directory(directory, **vision):
    """A random open_clip model on disk; returns it."""
    vision_cfg = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 8, **vision}
    text_cfg = {"width": 32, "heads": 4, "layers": 1, "vocab_size": 64, "context_length": 16}
    model = randomised(open_clip.CLIP(embed_dim=16, vision_cfg=vision_cfg, text_cfg=text_cfg))
    directory.mkdir()
    config = {
        "model_cfg": {"embed_dim": 16, "vision_cfg": vision_cfg, "text_cfg": text_cfg},
        "preprocess_cfg": {"mean": IMAGENET_MEAN, "std": IMAGENET_STD},
    }
    (directory / "open_clip_config.json").write_text(json.dumps(config))
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, directory / "open_clip_model.safetensors")
    return model


@pytest.mark.parametrize(
    ("vision", "kind"),
    [
        ({}, "clip_vision_model"),
        ({"ls_init_value": 0.1}, "clip_vision_model"),
        ({"no_ln_pre": True, "pos_embed_type": "sin_cos_2d", "pool_type": "avg"}, "vit"),
    ],
)
def test_open_clip(tmp_path, images, vision, kind):
    original = open_clip_directory(tmp_path / "model", **vision)
    encoder = load_vision(f"open_clip:local-dir:{tmp_path / 'model'}")
    assert encoder.config.model_type == kind
    with torch.no_grad():
        expected = original.visual.forward_intermediates(
            images, indices=[1], output_fmt="NLC", output_extra_tokens=True, normalize_intermediates=False
        )["image_intermediates"][0]
    tokens = encoder.features(images)
    assert torch.allclose(tokens, expected, atol=1e-4 * expected.abs().max())
    assert_fits_stock(encoder, images)
    assert encoder.image_processor.size["shortest_edge"] == 32  # open_clip's default: shortest side, then crop
    assert list(encoder.image_processor.image_mean) == list(IMAGENET_MEAN)
    # A CLIPS release in this format is found by `clips:` too.
    assert load_vision(f"clips:{tmp_path / 'model'}").fingerprint == encoder.fingerprint


def timm_directory(directory, **options):
    """A random timm model on disk; returns it."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 0} | options
    look = {"interpolation": "bilinear", "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    look |= {"crop_pct": 0.8, "crop_mode": "center"}
    model = randomised(timm.create_model("vit_tiny_patch16_224", pretrained_cfg_overlay=look, **sizes))
    save_for_hf(model, directory, model_args=sizes)
    return model


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "vit"),
        ({"init_values": 0.1, "no_embed_class": True, "global_pool": "avg", "qkv_bias": False}, "vit"),
        ({"pre_norm": True}, "clip_vision_model"),
        ({"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh"}, "siglip_vision_model"),
    ],
)
def test_timm(tmp_path, images, options, kind):
    original = timm_directory(tmp_path / "model", **options)
    encoder = load_vision(f"timm:local-dir:{tmp_path / 'model'}")
    assert encoder.config.model_type == kind
    with torch.no_grad():
        expected = original.forward_intermediates(images, indices=[1], output_fmt="NLC", intermediates_only=True)[0]
    assert torch.allclose(encoder.features(images), expected, atol=1e-4 * expected.abs().max())
    assert encoder.select_feature == ("full" if kind == "siglip_vision_model" else "default")
    assert_fits_stock(encoder, images)
    # timm's preprocessing, as timm does it: resize the short side to 32 / 0.8, crop 32.
    assert encoder.image_processor.size["shortest_edge"] == 40


@pytest.mark.parametrize("look", [{}, {"mean": (0.1, 0.2, 0.3)}, {"crop_mode": "squash"}])
def test_a_feature_map_and_its_preprocessing_are_those_of_timm(tmp_path, look):
    # 80 px are resized to, of which 64 are kept: with an odd number of pixels left, both would crop half a pixel apart.
    name = write_map(tmp_path / "model", "FastViT", **{"interpolation": "bilinear", "crop_pct": 0.8} | look)
    original = timm.create_model(name.removeprefix("timm:"), pretrained=True).eval()
    encoder = load_vision(name, select_layer=-1)
    assert (encoder.num_tokens, encoder.width, encoder.prefix_tokens, encoder.select_feature) == (4, 256, 0, "full")
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 135, 3), dtype=np.uint8))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(original))
    pixels = encoder.image_processor(images=photo, return_tensors="pt")["pixel_values"]
    assert (pixels - transform(photo)).abs().max() < 3 / 255 / 0.225  # torchvision and PIL round differently
    with torch.no_grad():
        assert torch.allclose(
            encoder.features(pixels), original.forward_features(pixels).flatten(2).mT, atol=1e-5, rtol=1e-4
        )


def test_image_size_and_weights_of_a_file(tmp_path):
    name = write_map(tmp_path / "model", "ResNet")
    larger = load_vision(f"{name}@128", select_layer=-1)
    assert (larger.image_size, larger.num_tokens) == (128, 16)
    file = load_vision(f"timm:test_resnet:{tmp_path / 'model' / 'pytorch_model.bin'}@128", select_layer=-1)
    assert file.weights_fingerprint == larger.weights_fingerprint
    timm_directory(tmp_path / "vit")
    assert load_vision(f"timm:local-dir:{tmp_path / 'vit'}@64").num_tokens == 64


def test_towers_that_a_stock_model_cannot_hold_are_refused(tmp_path):
    name = write_map(tmp_path / "model", "ResNet")
    timm_directory(tmp_path / "registers", reg_tokens=2)
    save_for_hf(timm.create_model("hiera_tiny_224", img_size=64), tmp_path / "tokens", model_args={"img_size": 64})
    write_map(tmp_path / "oblong", "ResNet", input_size=(3, 64, 96))
    write_map(tmp_path / "border", "ResNet", crop_mode="border")
    weights = tmp_path / "model" / "pytorch_model.bin"
    for encoder, options, said in [
        (name, {}, "layer -2 .* set --mm_vision_select_layer -1"),  # the default, for ViTs
        (name, {"select_layer": -1, "image_aspect_ratio": "anyres"}, "no tiles"),
        (f"{name}@100", {}, "stride of 32 does not divide: .*/model@96$"),
        ("timm:test_resnets", {}, "has no model 'test_resnets'; it has test_resnet"),
        (f"timm:test_efficientnet:{weights}", {}, "not those of a test_efficientnet"),
        (f"timm:test_resnet:{tmp_path / 'none.pth'}", {}, "there is no weight file"),
        ("timm:test_resnet.none", {}, "Invalid pretrained tag"),
        (f"timm:local-dir:{tmp_path / 'tokens'}", {}, "no feature map .* but 4 × 768"),
        (f"timm:local-dir:{tmp_path / 'registers'}", {}, "reg_token"),
        (f"timm:local-dir:{tmp_path / 'oblong'}", {}, "3 × 64 × 96"),
        (f"timm:local-dir:{tmp_path / 'border'}", {}, "'border'"),
    ]:
        with pytest.raises(UserError, match=said):
            load_vision(encoder, **options)


def test_a_wrong_mapping_is_noticed(tmp_path, images):
    original = timm_directory(tmp_path / "model")
    encoder = load_vision(f"timm:local-dir:{tmp_path / 'model'}")
    with torch.no_grad():
        encoder.model.layers[1].mlp.fc1.bias[0] += 1.0
    with pytest.raises(UserError, match="not what transformers' ViTModel computes"):
        check_equal(encoder.model, original, original.blocks[-1])


def hf_directory(directory, kind):
    """A random transformers model with its usual image processor; returns the vision model."""
    if kind == "clip":
        vision = SMALL | {"intermediate_size": 64}
        text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=text))
        processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    elif kind == "siglip":
        model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SMALL, intermediate_size=64))
        processor = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    elif kind == "dinov2":
        model = transformers.Dinov2Model(transformers.Dinov2Config(**SMALL | {"image_size": 48}))
        processor = transformers.BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    else:
        model = transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**SMALL, num_register_tokens=3)
        )
        processor = transformers.BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    randomised(model).save_pretrained(directory)
    processor.save_pretrained(directory)
    return getattr(model, "vision_model", model), processor


@pytest.mark.parametrize(
    ("kind", "tokens", "select"),
    [("clip", 16, "default"), ("siglip", 16, "full"), ("dinov2", 16, "default"), ("registers", 19, "default")],
)
def test_hf(tmp_path, images, kind, tokens, select):
    original, processor = hf_directory(tmp_path, kind)
    encoder = load_vision(f"hf:{tmp_path}")
    assert (encoder.num_tokens, encoder.select_feature) == (tokens, select)
    with torch.no_grad():
        expected = original(images, output_hidden_states=True).hidden_states[-2]
    assert torch.allclose(encoder.features(images), expected[:, select == "default" :], atol=1e-5)
    assert_fits_stock(encoder, images)
    image = np.random.default_rng(0).integers(0, 256, (70, 45, 3), dtype=np.uint8)
    pixels = [p(images=image, return_tensors="pt")["pixel_values"] for p in (processor, encoder.image_processor)]
    assert torch.allclose(*pixels, atol=1e-5)
    full = load_vision(f"hf:{tmp_path}", select_feature="full", select_layer=[-2, 1])
    assert full.width == 64
    assert_fits_stock(full, images)


def test_unknown_names_and_layers(runs, tmp_path):
    for name in ("openai/clip-vit-large-patch14-336", "./tower", "/models/tower"):  # as LLaVA's users type it
        assert parse_vision_name(name) == ("hf", name)
    (tmp_path / "mine" / "export").mkdir(parents=True)
    with pytest.raises(UserError, match="clips:"):
        parse_vision_name(str(tmp_path / "mine"))
    (tmp_path / "empty").mkdir()
    for name, options, noun in [
        ("dino", {}, "not known"),
        ("clips", {"runs": runs, "select_layer": -5}, "layers"),
        ("clip", {"runs": tmp_path}, "clip_baseline"),  # nothing trained yet
        (f"clips:{tmp_path / 'empty'}", {}, "no encoder"),
    ]:
        with pytest.raises(UserError, match=noun):
            load_vision(name, **options)
    assert list(LOADERS) == list(ARGUMENTS)


def test_fingerprint_follows_weights_layer_and_preprocessing(runs, tmp_path):
    base = load_vision("clips", runs=runs)
    shutil.copytree(runs / "new", tmp_path / "moved")
    assert load_vision(f"clips:{tmp_path / 'moved'}").fingerprint == base.fingerprint
    variants = [
        load_vision("clips", runs=runs, select_layer=-1),
        load_vision("clips", runs=runs, select_feature="full"),
        load_vision("clips", runs=runs, image_aspect_ratio="pad"),
        load_vision(f"clips:{runs / 'old'}"),
    ]
    changed = load_vision("clips", runs=runs)
    with torch.no_grad():
        changed.model.layers[0].mlp.fc1.weight[0, 0] += 1e-3
    prints = {base.fingerprint, changed.fingerprint, *(encoder.fingerprint for encoder in variants)}
    assert len(prints) == 6
