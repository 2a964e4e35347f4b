"""Checkpoints as the authors of CLIPS and OpenVision publish them, against a forward pass written from the method."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import BertWordPieceTokenizer

from clips import CLIPS
from clips.common.errors import UserError
from clips.common.tensors import read_weights, write_weights
from clips.data.tokenizer import bert_vocabulary
from clips.weights.export import export_all
from clips.weights.load import load_model
from clips.weights.open_clip import import_open_clip
from mllm.encoders.registry import load_vision

BERT = bert_vocabulary().parent
WIDTH, LAYERS, HEADS, PATCH, SIZE = 32, 3, 2, 8, 32
TEXT_WIDTH, TEXT_HEADS, CONTEXT, VOCABULARY, EMBED = 24, 3, 80, 32_000, 20
TEXTS = ["a red dog", "", "Two cats, 3.50 dollars at the café.", "many words " * 60]
FEATURES = {"atol": 1e-5, "rtol": 0.0}


# ------------------------------------------------------------------------------------------- the reference
def reference_positions(grid):
    """[1 + grid², WIDTH]: the frequencies are 1 / 10000^(i / (w/4 - 1))."""
    table = np.zeros((1 + grid * grid, WIDTH))
    quarter = WIDTH // 4
    for row in range(grid):
        for column in range(grid):
            for i in range(quarter):
                frequency = 1 / 10_000 ** (i / (quarter - 1))
                parts = np.sin(column * frequency), np.cos(column * frequency)
                parts += np.sin(row * frequency), np.cos(row * frequency)
                for part, value in enumerate(parts):
                    table[1 + row * grid + column, part * quarter + i] = value
    return torch.from_numpy(table).float()


def norm(x, w, name):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)


def blocks(x, w, prefix, heads, gelu):
    """Pre-norm blocks without any mask; the hidden states before the first and after each."""
    states = [x]
    for i in range(LAYERS):
        name = f"{prefix}transformer.resblocks.{i}"
        B, L, D = x.shape
        qkv = norm(x, w, f"{name}.ln_1") @ w[f"{name}.attn.in_proj_weight"].T + w[f"{name}.attn.in_proj_bias"]
        q, k, v = (part.view(B, L, heads, D // heads).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        attended = (q @ k.transpose(-2, -1) / (D // heads) ** 0.5).softmax(-1) @ v
        attended = attended.transpose(1, 2).reshape(B, L, D)
        x = x + attended @ w[f"{name}.attn.out_proj.weight"].T + w[f"{name}.attn.out_proj.bias"]
        hidden = norm(x, w, f"{name}.ln_2") @ w[f"{name}.mlp.c_fc.weight"].T + w[f"{name}.mlp.c_fc.bias"]
        x = x + F.gelu(hidden, approximate=gelu) @ w[f"{name}.mlp.c_proj.weight"].T + w[f"{name}.mlp.c_proj.bias"]
        states.append(x)
    return states


def reference_tokens(w, images):
    """Hidden states [B, 1 + N, WIDTH] before and after each block, CLS first."""
    patches = F.conv2d(images, w["visual.conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([w["visual.class_embedding"].expand(len(images), 1, -1), patches], dim=1)
    return blocks(x + reference_positions(images.shape[-1] // PATCH), w, "visual.", HEADS, "none")


def reference_image(w, images):
    pooled = norm(reference_tokens(w, images)[-1][:, 1:].mean(dim=1), w, "visual.ln_post")
    return F.normalize(pooled @ w["visual.proj"], dim=-1)


def reference_text(w, texts):
    """`[1 … 2] 0 … 101`, all 80 slots attended, the last one is the text's."""
    wordpiece = BertWordPieceTokenizer(str(BERT / "vocab.txt"), lowercase=True)
    rows = [[1, *wordpiece.encode(text, add_special_tokens=False).ids[: CONTEXT - 3], 2] for text in texts]
    ids = torch.tensor([row + [0] * (CONTEXT - 1 - len(row)) + [101] for row in rows])
    x = blocks(w["token_embedding.weight"][ids] + w["positional_embedding"], w, "", TEXT_HEADS, "tanh")[-1]
    return F.normalize(norm(x[:, -1], w, "ln_final") @ w["text_projection"], dim=-1)


# ------------------------------------------------------------------------------------------ the checkpoint
def official_weights():
    """Every tensor of such a file, under its names: those of open_clip's class CLIP."""
    torch.manual_seed(0)
    w = {
        "visual.class_embedding": torch.randn(WIDTH),
        "visual.positional_embedding": reference_positions(SIZE // PATCH),
        "visual.conv1.weight": torch.randn(WIDTH, 3, PATCH, PATCH) / 14,
        "visual.proj": torch.randn(WIDTH, EMBED),
        "token_embedding.weight": 0.02 * torch.randn(VOCABULARY, TEXT_WIDTH),
        "positional_embedding": 0.02 * torch.randn(CONTEXT, TEXT_WIDTH),
        "text_projection": torch.randn(TEXT_WIDTH, EMBED),
        "logit_scale": torch.tensor(3.0),
    }
    norms = {"visual.ln_post": WIDTH, "ln_final": TEXT_WIDTH}
    for prefix, width in (("visual.", WIDTH), ("", TEXT_WIDTH)):
        for i in range(LAYERS):
            name = f"{prefix}transformer.resblocks.{i}"
            norms |= {f"{name}.ln_1": width, f"{name}.ln_2": width}
            w[f"{name}.attn.in_proj_weight"] = torch.randn(3 * width, width) / width**0.5
            w[f"{name}.attn.in_proj_bias"] = 0.2 * torch.randn(3 * width)
            for part, out, into in (
                ("attn.out_proj", width, width),
                ("mlp.c_fc", 4 * width, width),
                ("mlp.c_proj", width, 4 * width),
            ):
                w[f"{name}.{part}.weight"] = torch.randn(out, into) / into**0.5
                w[f"{name}.{part}.bias"] = 0.2 * torch.randn(out)
    for name, width in norms.items():
        w[f"{name}.weight"], w[f"{name}.bias"] = 1 + 0.2 * torch.randn(width), 0.2 * torch.randn(width)
    return w


def write_official(directory, *, weights="bin", tokenizer=None, tells_eps=True):
    """A directory as on the hub; returns its weights. `tokenizer`: None, "json" or "vocab" (BERT's own files)."""
    directory.mkdir()
    w = official_weights()
    if weights == "bin":
        torch.save(w, directory / "open_clip_pytorch_model.bin")
    else:
        write_weights(w, directory / "open_clip_model.safetensors")
    eps = {"norm_kwargs": {"eps": 1e-6}} if tells_eps else {}
    config = {
        "model_cfg": {
            "embed_dim": EMBED,
            "vision_cfg": {
                "image_size": SIZE,
                "layers": LAYERS,
                "width": WIDTH,
                "patch_size": PATCH,
                "head_width": WIDTH // HEADS,
                "no_ln_pre": True,
                "pool_type": "avg",
                "final_ln_after_pool": True,
                **eps,
            },
            "text_cfg": {
                "context_length": CONTEXT,
                "vocab_size": VOCABULARY,
                "hf_tokenizer_name": "bert-base-uncased",
                "tokenizer_kwargs": {"strip_sep_token": True},
                "width": TEXT_WIDTH,
                "heads": TEXT_HEADS,
                "layers": LAYERS,
                "pool_type": "last",
                "no_causal_mask": True,
                **({"act_kwargs": {"approximate": "tanh"}, **eps} if tells_eps else {}),
            },
        },
        "preprocess_cfg": {
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "interpolation": "bilinear",
            "resize_mode": "squash",
        },
    }
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


def edit_config(directory, part, **fields):
    path = directory / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"][part] |= fields
    path.write_text(json.dumps(config))


def pixels(size=SIZE):
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------ the tests
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
    assert opened.logit_scale == pytest.approx(np.exp(3.0))
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
    expected = reference_tokens(w, pixels())[-2][:, 1:]
    torch.testing.assert_close(encoder.features(pixels()), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


def test_what_is_no_clips_checkpoint_is_refused(tmp_path):
    directory = tmp_path / "official"
    w = write_official(directory, weights="safetensors")
    write_weights(w | {"visual.extra": torch.ones(1)}, directory / "open_clip_model.safetensors")
    with pytest.raises(UserError, match=r"holds besides visual\.extra: it is not the model"):
        import_open_clip(directory)
    del w["ln_final.bias"]
    write_weights(w, directory / "open_clip_model.safetensors")
    with pytest.raises(UserError, match=r"lacks text\.ln_final\.bias: it is not the model"):
        import_open_clip(directory)
    write_weights(official_weights(), directory / "open_clip_model.safetensors")
    import_open_clip(directory)

    edit_config(directory, "vision_cfg", image_size=48)
    with pytest.raises(UserError, match=r"positional_embedding has shape \(17, 32\).*\(37, 32\).*image_size"):
        import_open_clip(directory)
    edit_config(directory, "vision_cfg", image_size=SIZE)

    edit_config(directory, "text_cfg", vocab_size=1000)
    with pytest.raises(UserError, match=r"30522 ids, text_cfg\.vocab_size .* is 1000"):
        import_open_clip(directory)
    edit_config(directory, "text_cfg", vocab_size=VOCABULARY, hf_tokenizer_name="other/tokenizer")
    with pytest.raises(UserError, match="no usable tokenizer"):
        import_open_clip(directory)
    edit_config(directory, "text_cfg", context_length=32)
    with pytest.raises(UserError, match="CLIPA"):
        import_open_clip(directory)
