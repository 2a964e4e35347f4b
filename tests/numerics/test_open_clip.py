"""Models that open_clip made, here and back: the features of stock open_clip at every stop, by its own pipeline."""

import json

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP
from PIL import Image

from clips import CLIPS
from clips.common.errors import UserError
from clips.common.tensors import write_weights
from clips.data.tokenizer import build_tokenizer
from clips.weights.export import export_all
from clips.weights.load import load_model

VISION = {"layers": 2, "width": 32, "head_width": 8, "patch_size": 16, "image_size": 48}
TEXT = {"width": 24, "heads": 3, "layers": 2}
BPE = {"context_length": 77, "vocab_size": 49408}
EPS = {"norm_kwargs": {"eps": 1e-6}}
TANH = {"act_kwargs": {"approximate": "tanh"}}
WORDS = {"context_length": 20, "vocab_size": 200, "hf_tokenizer_name": "local"}
SQUASH = {"interpolation": "bilinear", "resize_mode": "squash"}
MODELS = {
    "OpenAI's ViT-B-16": {"quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT | BPE},
    "laion's ViT-B-16": {"vision_cfg": VISION, "text_cfg": TEXT | BPE},
    "LayerScale": {"vision_cfg": VISION | {"ls_init_value": 0.5}, "text_cfg": TEXT | BPE | {"ls_init_value": 0.5}},
    "mean, no norm before the blocks": {
        "custom_text": True,
        "vision_cfg": VISION | EPS | TANH | {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
        "text_cfg": TEXT | BPE | EPS | TANH,
    },
    "fixed positions, text both ways": {
        "custom_text": True,
        "vision_cfg": VISION | {"pos_embed_type": "sin_cos_2d", "patch_dropout": 0.0},
        "text_cfg": TEXT | WORDS | {"no_causal_mask": True, "pool_type": "eos", "eos_id": 2},
    },
    "CoCa's text": {
        "custom_text": True,
        "vision_cfg": VISION,
        "text_cfg": TEXT | WORDS | {"embed_cls": True, "context_length": 19},
    },
}
TEXTS = ["a photo of a cat!", "", "Tom &amp; Jerry at the café 😀", "many words " * 60]
FEATURES = {"atol": 1e-5, "rtol": 0.0}


def write_stock(directory, model_cfg, **preprocess):
    """A random model of stock open_clip, as it stands on the hub."""
    torch.manual_seed(0)
    fields = {name: value for name, value in model_cfg.items() if name != "custom_text"}
    model = (CustomTextCLIP if model_cfg.get("custom_text") else CLIP)(embed_dim=20, **fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale" and parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    directory.mkdir(parents=True)
    if "hf_tokenizer_name" in model_cfg["text_cfg"]:
        build_tokenizer("wordpiece", TEXTS * 3, vocab_size=200).save(directory)
    config = {"model_cfg": {"embed_dim": 20, **model_cfg}, "preprocess_cfg": SQUASH | preprocess}
    (directory / "open_clip_config.json").write_text(json.dumps(config))
    write_weights(model.state_dict(), directory / "open_clip_model.safetensors")


def make_images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)) for _ in range(3)]


@torch.no_grad()
def stock_features(directory):
    """Image and text features by stock open_clip alone: its preprocessing, its tokenizer."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{directory}")
    model.eval()
    images = torch.stack([preprocess(image) for image in make_images()])
    ids = open_clip.get_tokenizer(f"local-dir:{directory}")(TEXTS)
    return model.encode_image(images, normalize=True), model.encode_text(ids, normalize=True)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_open_clip_comes_in_and_goes_out(tmp_path, name):
    write_stock(tmp_path / "theirs", MODELS[name])  # normalised by OpenAI's mean and deviation, open_clip's default
    expected = stock_features(tmp_path / "theirs")
    loaded = load_model(tmp_path / "theirs")
    images = CLIPS(loaded, torch.device("cpu")).preprocess
    sample = torch.stack([images(image) for image in make_images()])
    differences = export_all(loaded.model, loaded.run, loaded.tokenizer, tmp_path / "ours", sample, TEXTS)
    assert max(differences.values()) < 1e-5
    for directory in (tmp_path / "theirs", tmp_path / "ours" / "native", tmp_path / "ours" / "open_clip"):
        opened = CLIPS.from_pretrained(directory, device="cpu")
        torch.testing.assert_close(opened.encode_image(make_images()), expected[0], **FEATURES)
        torch.testing.assert_close(opened.encode_text(TEXTS), expected[1], **FEATURES)
    for ours, theirs in zip(stock_features(tmp_path / "ours" / "open_clip"), expected, strict=True):
        torch.testing.assert_close(ours, theirs, **FEATURES)


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        ("vision_cfg", {"attentional_pool": True, "attn_pooler_heads": 4}, "pools by attention, which no tower"),
        ("vision_cfg", {"timm_model_name": "vit_base"}, "timm_model_name is 'vit_base'"),
        ("vision_cfg", {"pool_type": "avg"}, "it does not pool before its last LayerNorm"),
        ("vision_cfg", {"image_size": [48, 32]}, "48 × 32 pixels, which is not square"),
        ("vision_cfg", {"layers": [2, 2, 2, 2]}, "its image tower is a ModifiedResNet"),
        ("vision_cfg", {"layers": [2, 2, 2, 10**6]}, "layers is 1,000,000, more than 1,024"),
        ("text_cfg", {"qk_norm": True}, "its blocks are CustomResidualAttentionBlock"),
        ("text_cfg", {"pool_type": "first"}, "it reads a text by pool_type 'first'"),
        ("text_cfg", {"hf_model_name": "roberta"}, "hf_model_name is 'roberta'"),
        ("text_cfg", {"tokenizer_kwargs": {"clean": "canonicalize"}}, "tokenizer_kwargs is {'clean'"),
        ("text_cfg", {"word_dropout": 0.1}, "unexpected keyword argument 'word_dropout'"),
        ("text_cfg", {"pool_type": "eos"}, "eos_id is 2, the tokenizer ends texts with 49407"),
        ("text_cfg", {"embed_cls": True}, r"lack text\.cls_emb"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_its_name(tmp_path, part, fields, message):
    write_stock(tmp_path / "stock", MODELS["laion's ViT-B-16"])
    path = tmp_path / "stock" / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"][part] |= fields
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "stock")
