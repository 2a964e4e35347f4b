"""Checkpoints as the authors of CLIPS and OpenVision publish them, against stock open_clip with their settings."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from tokenizers import BertWordPieceTokenizer

from clips import CLIPS
from clips.common.errors import UserError
from clips.common.tensors import read_weights, write_weights
from clips.data.images import IMAGENET_MEAN, IMAGENET_STD
from clips.data.tokenizer import bert_vocabulary
from clips.weights.export import export_all
from clips.weights.load import load_model
from mllm.encoders.load import load_vision

BERT = bert_vocabulary().parent
WIDTH, LAYERS, HEADS, PATCH, SIZE = 32, 3, 2, 8, 32
TEXT_WIDTH, TEXT_HEADS, CONTEXT, VOCABULARY, EMBED = 24, 3, 80, 32_000, 20
TEXTS = ["a red dog", "", "Two cats, 3.50 dollars at the café.", "many words " * 60]
FEATURES = {"atol": 1e-5, "rtol": 0.0}


def reference_positions(grid):
    """[1 + grid², WIDTH]: the frequencies are 1 / 10000^(i / (w/4 - 1)), which open_clip's own table has not."""
    frequencies = 1 / 10_000 ** (torch.arange(WIDTH // 4, dtype=torch.float64) / (WIDTH // 4 - 1))
    row, column = (torch.arange(grid * grid) // grid)[:, None], (torch.arange(grid * grid) % grid)[:, None]
    parts = [(column * frequencies).sin(), (column * frequencies).cos()]
    parts += [(row * frequencies).sin(), (row * frequencies).cos()]
    return F.pad(torch.cat(parts, dim=1), (0, 0, 1, 0)).float()


def towers(size=SIZE, *, tells_eps=True):
    """`vision_cfg` and `text_cfg` of such a file; some files leave out eps and GELU (`tells_eps`)."""
    vision = {"image_size": size, "layers": LAYERS, "width": WIDTH, "patch_size": PATCH, "head_width": WIDTH // HEADS}
    vision |= {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}
    text = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "hf_tokenizer_name": "bert-base-uncased"}
    text |= {"width": TEXT_WIDTH, "heads": TEXT_HEADS, "layers": LAYERS, "pool_type": "last", "no_causal_mask": True}
    text |= {"tokenizer_kwargs": {"strip_sep_token": True}}
    if tells_eps:
        vision["norm_kwargs"] = text["norm_kwargs"] = {"eps": 1e-6}
        text["act_kwargs"] = {"approximate": "tanh"}
    return vision, text


def stock(w, size=SIZE):
    """open_clip's class with the weights `w`, on images of `size` pixels."""
    model = CLIP(EMBED, *towers(size)).eval()
    model.load_state_dict(w | {"visual.positional_embedding": reference_positions(size // PATCH)})
    return model


@torch.no_grad()
def reference_image(w, images):
    return stock(w, images.shape[-1]).encode_image(images, normalize=True)


@torch.no_grad()
def reference_text(w, texts):
    """`[1 … 2] 0 … 101`, all 80 slots attended, the last one is the text's."""
    wordpiece = BertWordPieceTokenizer(str(BERT / "vocab.txt"), lowercase=True)
    rows = [[1, *wordpiece.encode(text, add_special_tokens=False).ids[: CONTEXT - 3], 2] for text in texts]
    ids = torch.tensor([row + [0] * (CONTEXT - 1 - len(row)) + [101] for row in rows])
    return stock(w).encode_text(ids, normalize=True)


def official_weights():
    """Every tensor of such a file, under its names: those of open_clip's class CLIP."""
    torch.manual_seed(0)
    w = CLIP(EMBED, *towers()).state_dict()
    w = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in w.items()}
    return w | {"visual.positional_embedding": reference_positions(SIZE // PATCH), "logit_scale": torch.tensor(3.0)}


def write_official(directory, *, weights="bin", tokenizer=None, tells_eps=True):
    """A directory as on the hub; returns its weights. `tokenizer`: None, "json" or "vocab" (BERT's own files)."""
    directory.mkdir()
    w = official_weights()
    if weights == "bin":
        torch.save(w, directory / "open_clip_pytorch_model.bin")
    else:
        write_weights(w, directory / "open_clip_model.safetensors")
    vision, text = towers(tells_eps=tells_eps)
    look = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "interpolation": "bilinear", "resize_mode": "squash"}
    config = {"model_cfg": {"embed_dim": EMBED, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": look}
    (directory / "open_clip_config.json").write_text(json.dumps(config))
    if tokenizer == "json":
        wordpiece = BertWordPieceTokenizer(str(BERT / "vocab.txt"), lowercase=True)
        wordpiece.enable_truncation(128)
        wordpiece.enable_padding(length=128)
        wordpiece.save(str(directory / "tokenizer.json"))
        declared = {"cls_token": "[CLS]", "pad_token": "[PAD]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
        (directory / "tokenizer_config.json").write_text(json.dumps(declared))  # neither bos nor eos
    elif tokenizer == "vocab":
        shutil.copy(BERT / "vocab.txt", directory)
    return w


def pixels(size=SIZE):
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("weights", "tokenizer", "tells_eps"),
    [("bin", None, True), ("safetensors", None, False), ("bin", "json", False), ("safetensors", "vocab", True)],
)
def test_official_checkpoints_give_the_reference_s_features(tmp_path, weights, tokenizer, tells_eps):
    w = write_official(tmp_path / "official", weights=weights, tokenizer=tokenizer, tells_eps=tells_eps)
    opened = CLIPS.from_pretrained(tmp_path / "official", device="cpu")
    vision = opened.model.config.vision
    assert (vision.pos_embed, vision.patch_bias) == ("sincos_reference", False)
    assert opened.model.visual.patch_embed.bias is None
    torch.testing.assert_close(opened.encode_image(pixels()), reference_image(w, pixels()), **FEATURES)
    torch.testing.assert_close(opened.encode_text(TEXTS), reference_text(w, TEXTS), **FEATURES)
    assert opened.logit_scale == pytest.approx(math.exp(3.0))
    assert opened.tokenizer.decode(opened.tokenize(["Two cats"])[0]) == "two cats"


def test_half_precision_rounds_the_table_and_no_more(tmp_path):
    """fp16 rounds it by up to 5e-4; what is read is the exact table all the same."""
    w = write_official(tmp_path / "official", weights="safetensors")
    halves = {name: tensor.half() for name, tensor in w.items()}
    assert (halves["visual.positional_embedding"].float() - w["visual.positional_embedding"]).abs().max() > 1e-4
    write_weights(halves, tmp_path / "official" / "open_clip_model.safetensors")
    vision = load_model(tmp_path / "official").model.config.vision
    assert (vision.pos_embed, vision.patch_bias) == ("sincos_reference", False)


def test_another_resolution_keeps_their_table(tmp_path):
    w = write_official(tmp_path / "official")
    model = load_model(tmp_path / "official").model
    model.visual.set_image_size(48)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(pixels(48)), reference_image(w, pixels(48)), **FEATURES)
        model.visual.config = dataclasses.replace(model.visual.config, pos_embed="sincos")
        model.visual.set_image_size(48)
        assert (model.encode_image(pixels(48)) - reference_image(w, pixels(48))).abs().max() > 1e-3


@pytest.mark.parametrize("tokenizer", [None, "json"])
def test_exports_of_an_official_checkpoint_come_back(tmp_path, tokenizer):
    w = write_official(tmp_path / "official", tokenizer=tokenizer)
    loaded = load_model(tmp_path / "official")
    out = tmp_path / "export"
    differences = export_all(loaded.model, loaded.run, loaded.tokenizer, out, pixels(), TEXTS)
    assert max(differences.values()) < 1e-5  # through stock open_clip and transformers
    for name in ("native", "open_clip"):
        again = CLIPS.from_pretrained(out / name, device="cpu")
        assert again.model.config == loaded.model.config
        torch.testing.assert_close(again.encode_image(pixels()), reference_image(w, pixels()), **FEATURES)
        torch.testing.assert_close(again.encode_text(TEXTS), reference_text(w, TEXTS), **FEATURES)
    stock = read_weights(out / "open_clip" / "open_clip_model.safetensors")
    theirs = {name if name.startswith(("visual.", "logit_scale")) else f"text.{name}": w[name] for name in w}
    torch.testing.assert_close(stock, theirs, **FEATURES)

    larger = export_all(loaded.model, loaded.run, loaded.tokenizer, out, pixels(48), TEXTS, image_size=48)
    assert max(larger.values()) < 1e-5
    again = CLIPS.from_pretrained(out / "open_clip", device="cpu")
    assert again.model.config.vision.pos_embed == "sincos_reference"
    torch.testing.assert_close(again.encode_image(pixels(48)), reference_image(w, pixels(48)), **FEATURES)


@pytest.mark.parametrize("tells_eps", [True, False])
def test_as_an_encoder_for_llava(tmp_path, tells_eps):
    w = write_official(tmp_path / "official", tells_eps=tells_eps)
    encoder = load_vision(f"clips:{tmp_path / 'official'}")
    assert encoder.config.layer_norm_eps == 1e-6
    with torch.no_grad():
        outputs = stock(w).visual.forward_intermediates(
            pixels(), indices=[LAYERS - 2], output_fmt="NLC", normalize_intermediates=False
        )
    expected = outputs["image_intermediates"][0]
    torch.testing.assert_close(encoder.features(pixels()), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


def test_what_is_no_clips_checkpoint_is_refused(tmp_path):
    directory = tmp_path / "official"
    w = write_official(directory, weights="safetensors")
    write_weights(w | {"visual.extra": torch.ones(1)}, directory / "open_clip_model.safetensors")
    with pytest.raises(UserError, match=r"no tower here has: visual\.extra"):
        load_model(directory)
    del w["ln_final.bias"]
    write_weights(w, directory / "open_clip_model.safetensors")
    with pytest.raises(UserError, match=r"lack text\.ln_final\.bias"):
        load_model(directory)
    write_weights(official_weights(), directory / "open_clip_model.safetensors")
    path = directory / "open_clip_config.json"
    whole = json.loads(path.read_text())
    for part, fields, message in [
        ("vision_cfg", {"image_size": 48}, r"positional_embedding is \(17, 32\), by image_size it would be \(37, 32\)"),
        ("text_cfg", {"vocab_size": 1000}, r"30522 ids, text_cfg\.vocab_size 1000"),
        ("text_cfg", {"hf_tokenizer_name": "other/tokenizer"}, "no usable tokenizer"),
        ("text_cfg", {"context_length": 32}, "CLIPA"),
    ]:
        model = whole["model_cfg"] | {part: whole["model_cfg"][part] | fields}
        path.write_text(json.dumps(whole | {"model_cfg": model}))
        with pytest.raises(UserError, match=message):
            load_model(directory)
