"""Exports against the trained model, in a process that has only the stock libraries."""

import json
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from bad_corpus import encode
from conftest import tiny_run
from PIL import Image

from clips import CLIPS
from clips.common.errors import UserError
from clips.common.files import lock
from clips.common.tensors import assign_weights, read_model, read_weights, write_weights
from clips.config import CaptionsConfig
from clips.data.images import decode_image, eval_transform
from clips.data.tokenizer import build_tokenizer
from clips.model.clips import CLIPSModel
from clips.recipes import with_tower
from clips.weights.export import ExportError, export_all
from clips.weights.hf_clip import clip_model_lacks
from clips.weights.load import load_model, load_native

TEXTS = [
    "a red dog",
    "",
    "Tom &amp; Jerry at the café, 25 cats and 3.50 dollars",
    "a special [CLS] [PAD] <pad> token typed as text",
    "many words " * 40,
    "two green cars on a blue background",
]
VARIANTS = [  # tokenizer, pad_mask, pre_norm
    ("bert", False, False),
    ("bert", True, True),
    ("wordpiece", False, True),
    ("wordpiece", True, False),
]

LABELS = ["a red dog", "two green cars on a blue background", "25 cats"]
CLIP_TOKENIZERS = ("bert", "wordpiece", "clip")

# Runs with `python -I` in another directory; the project, installed or not, cannot be imported.
STOCK = """
import json, sys
sys.modules["clips"] = sys.modules["mllm"] = None
import numpy as np, open_clip, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, pipeline

texts, names, paths, LABELS, CLIP_TOKENIZERS = json.load(open("inputs.json"))
for name in names:
    with torch.no_grad():
        model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{name}/open_clip")
        tokens = open_clip.get_tokenizer(f"local-dir:{name}/open_clip")(texts)
        images = torch.stack([preprocess(Image.open(p).convert("RGB")) for p in paths])
        model.eval()
        image_features = model.encode_image(images, normalize=True)
        text_features = model.encode_text(tokens, normalize=True)
        vit, info = AutoModel.from_pretrained(f"{name}/hf_vit", output_loading_info=True)
        assert not any(info.values()), info
        hidden = vit.eval()(images, output_hidden_states=True).hidden_states[-1]
        processor = AutoImageProcessor.from_pretrained(f"{name}/hf_vit")
        processed = processor([Image.open(p) for p in paths], return_tensors="pt").pixel_values
        np.savez(f"{name}.npz", images=images, image_features=image_features, text_features=text_features,
                 logit_scale=model.logit_scale.exp(), hidden=hidden, processed=processed, kind=type(vit).__name__)

for kind in CLIP_TOKENIZERS:
    assert type(AutoProcessor.from_pretrained(f"{kind}/hf")).__name__ == "CLIPProcessor"
    classify = pipeline("zero-shot-image-classification", f"{kind}/hf")
    for i in range(3):
        found = classify(f"{i}.png", candidate_labels=LABELS, hypothesis_template="{}")
        print(json.dumps([next(one["score"] for one in found if one["label"] == label) for label in LABELS]))
"""


def build(kind, pad_mask=False, pre_norm=False, text_like_clip=False, **vision):
    """A model whose every parameter matters: those that start at 0 or 1 are moved."""
    corpus = [text for text in TEXTS for _ in range(3)]
    tokenizer = build_tokenizer(kind, corpus, vocab_size=200) if kind == "wordpiece" else build_tokenizer(kind, None)
    run = tiny_run(pad_mask=pad_mask)
    text = replace(run.model.text, width=24, context_length=20, vocab_size=tokenizer.vocab_size)
    if text_like_clip:
        text = replace(text, pool="eos", causal=True)
    vision = replace(run.model.vision, image_size=48, pre_norm=pre_norm, **vision)
    shape = replace(run.model, vision=vision, text=text, embed_dim=20)
    run = replace(run, model=shape, captions=CaptionsConfig(tokenizer=kind))
    torch.manual_seed(0)
    model = CLIPSModel(run.model, tokenizer.pad_id).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model, run, tokenizer


@pytest.fixture(scope="module")
def photos():
    rng = np.random.default_rng(0)
    out = []
    for width, height in [(48, 48), (90, 60), (31, 77)]:
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        out.append(encode(coarse.resize((width, height), Image.Resampling.BICUBIC)))
    return out


def pixels(images, size=48):
    return torch.stack([eval_transform(size)(decode_image(data)) for data in images])


@pytest.fixture(scope="module")
def opened(tmp_path_factory, photos):
    """(folder, {variant: ours}, what the process printed): one process of the stock libraries opened all exports."""
    folder = tmp_path_factory.mktemp("stock")
    ours = {variant: build(*variant) for variant in VARIANTS}
    for variant, (model, run, tokenizer) in ours.items():
        export_all(model, run, tokenizer, folder / name_of(variant), pixels(photos), TEXTS)
    for kind in CLIP_TOKENIZERS:
        model, run, tokenizer = build(kind, pad_mask=kind == "bert", pre_norm=True, text_like_clip=True, pool="cls")
        distances = export_all(model, run, tokenizer, folder / kind, pixels(photos), TEXTS)
        assert distances["hf"] < 1e-4
    for i, data in enumerate(photos):
        (folder / f"{i}.png").write_bytes(data)
    files = [f"{i}.png" for i in range(len(photos))]
    inputs = [TEXTS, [name_of(variant) for variant in VARIANTS], files, LABELS, CLIP_TOKENIZERS]
    (folder / "inputs.json").write_text(json.dumps(inputs))
    done = subprocess.run(
        [sys.executable, "-I", "-c", STOCK], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "MISSING" not in done.stderr
    return folder, ours, done.stdout


def name_of(variant):
    return "-".join(map(str, variant))


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v[0]}-pad_mask={v[1]}-pre_norm={v[2]}")
@torch.no_grad()
def test_stock_libraries_give_the_same_features(opened, photos, variant):
    folder, ours, _ = opened
    (model, run, tokenizer), theirs = ours[variant], np.load(folder / f"{name_of(variant)}.npz")
    images = pixels(photos)
    assert np.abs(theirs["images"] - images.numpy()).max() < 1e-5  # open_clip preprocesses alike
    assert np.abs(theirs["processed"] - images.numpy()).max() < 0.04  # transformers resizes in torch: two grey levels

    image_features = model.encode_image(images)
    text_features = model.encode_text(tokenizer(TEXTS, run.model.text.context_length, trim=run.model.text.pad_mask))
    assert np.abs(theirs["image_features"] - image_features.numpy()).max() < 1e-4
    assert np.abs(theirs["text_features"] - text_features.numpy()).max() < 1e-4
    assert theirs["logit_scale"] == pytest.approx(model.logit_scale.exp().item())
    # zero-shot: the same class for every image
    classes = (theirs["image_features"] @ theirs["text_features"].T).argmax(1)
    assert (classes == (image_features @ text_features.T).argmax(1).numpy()).all()

    assert theirs["kind"] == ("CLIPVisionModel" if variant[2] else "ViTModel")
    tokens = model.visual(images)[1].numpy()
    assert np.abs(theirs["hidden"] - tokens).max() < 1e-4 * np.abs(tokens).max()


@pytest.mark.slow
def test_towers_of_clip_are_a_clip_model_with_its_pipeline(opened, photos):
    """With each tokenizer; the id of eos is 2 in two of them, which CLIPModel reads in another way."""
    folder, _, printed = opened
    wanted = []
    for kind in CLIP_TOKENIZERS:
        again = CLIPS.from_pretrained(folder / kind / "hf", device="cpu")
        ours = CLIPS.from_pretrained(folder / kind / "native", device="cpu")
        odds, others = (
            (one.logit_scale * one.similarity(list(pixels(photos)), LABELS)).softmax(dim=-1) for one in (ours, again)
        )
        assert torch.allclose(others, odds, atol=1e-3)
        wanted += odds.tolist()
    # transformers resizes in torch: images differ by up to two grey levels
    scores = [json.loads(line) for line in printed.splitlines() if line.startswith("[")]
    assert np.abs(np.array(scores) - np.array(wanted)).max() < 0.03


def test_an_export_without_clip_model_names_the_switch():
    plain = tiny_run()
    assert "vision.pool=cls" in clip_model_lacks(plain.model)
    assert "--tower clip_model" in clip_model_lacks(plain.model)
    assert clip_model_lacks(with_tower(plain, "clip_model").model) is None


def test_another_resolution_recomputes_positions(tmp_path, photos):
    model, run, tokenizer = build("wordpiece")
    export_all(model, run, tokenizer, tmp_path / "export", pixels(photos, 80), TEXTS, image_size=80)
    loaded, loaded_run, _ = load_native(tmp_path / "export/native")
    assert loaded_run.model.vision.image_size == 80
    with torch.no_grad():
        assert not torch.allclose(loaded.encode_image(pixels(photos, 80)), model.encode_image(pixels(photos)))
        model.visual.set_image_size(80)
        assert torch.equal(loaded.encode_image(pixels(photos, 80)), model.encode_image(pixels(photos, 80)))
    with pytest.raises(ValueError, match="48 px"):
        export_all(model, run, tokenizer, tmp_path / "export", pixels(photos, 80), TEXTS)


def test_a_wrong_export_is_not_accepted_and_the_old_one_stays(tmp_path, photos, monkeypatch):
    model, run, tokenizer = build("wordpiece")
    export_all(model, run, tokenizer, tmp_path / "export", pixels(photos), TEXTS)
    before = (tmp_path / "export/native/model.safetensors").read_bytes()
    monkeypatch.setattr("clips.weights.open_clip.positions_with_bias", lambda positions, bias, prefix: positions)
    with torch.no_grad():
        model.logit_scale += 1
    with pytest.raises(ExportError, match="open_clip"):
        export_all(model, run, tokenizer, tmp_path / "export", pixels(photos), TEXTS)
    assert (tmp_path / "export/native/model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("pad_mask", "vision"),
    [
        (False, {}),
        (True, {"patch_bias": False}),
        (False, {"pos_embed": "sincos_reference", "patch_bias": False, "pre_norm": True}),
    ],
)
def test_open_clip_files_are_read_back(tmp_path, photos, pad_mask, vision):
    model, run, tokenizer = build("bert", pad_mask=pad_mask, **vision)
    export_all(model, run, tokenizer, tmp_path / "export", pixels(photos), TEXTS)
    folder = tmp_path / "export/open_clip"
    loaded = load_model(folder)
    read, read_tokenizer = loaded.model, loaded.tokenizer
    assert read.config == replace(run.model, captioner=None)
    ids = read_tokenizer(TEXTS, 20, trim=False)
    with torch.no_grad():
        assert torch.allclose(read.encode_image(pixels(photos)), model.encode_image(pixels(photos)), atol=1e-5)
        assert torch.allclose(read.encode_text(ids), model.encode_text(ids), atol=1e-6)

    weights = read_weights(folder / "open_clip_model.safetensors")
    weights["visual.positional_embedding"][3] += 0.1
    write_weights(weights, folder / "open_clip_model.safetensors")
    assert load_model(folder).model.config.vision.pos_embed == "learned"


def test_torch_files_are_read_and_files_without_weights_refused(tmp_path):
    torch.save({"state_dict": {"module.weight": torch.ones(2)}, "step": 5}, tmp_path / "wrapped.pt")
    assert read_weights(tmp_path / "wrapped.pt")["weight"].tolist() == [1, 1]
    (tmp_path / "wrapped.pt").unlink()
    torch.save({"epoch": 3}, tmp_path / "epoch.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    write_weights({"a": torch.ones(3)}, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-4])
    for path in tmp_path.iterdir():
        with pytest.raises(UserError, match=path.name):
            read_weights(path)
    with pytest.raises(UserError, match="absent"):
        read_weights(tmp_path / "absent.pt")


def test_weights_that_do_not_fit_name_both_shapes():
    layer = torch.nn.Linear(3, 4)
    weight, bias = torch.ones(4, 3), torch.ones(4)
    for tensors, message in [
        ({"weight": torch.ones(4, 2), "bias": bias}, r"weight: the file has shape \(4, 2\), the model \(4, 3\)"),
        ({"weight": weight}, "missing in the file: bias"),
        ({"weight": weight, "bias": bias, "scale": torch.ones(1)}, "unknown to the model: scale"),
    ]:
        with pytest.raises(UserError, match=message):
            assign_weights(layer, tensors, "x")


@pytest.mark.parametrize("name", ["../other.safetensors", "/other.safetensors"])
def test_an_index_of_weights_stays_in_its_directory(name, tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    outside = tmp_path / "other.safetensors"
    write_weights({"a": torch.ones(1)}, outside)
    target = str(outside) if name.startswith("/") else name
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": target}}))
    with pytest.raises(UserError, match="outside its directory"):
        read_model(directory)


def test_two_processes_do_not_write_one_export_at_once(tmp_path, monkeypatch):
    """export_clips.py during a run's own export: both wrote into export.partial."""
    writes = threading.Event()
    monkeypatch.setattr("clips.weights.export.write_native", lambda *_: writes.set())
    monkeypatch.setattr("clips.weights.export.check_exports", lambda *_: {})
    run = tiny_run()
    tokenizer = build_tokenizer("wordpiece", ["a fox"], vocab_size=200)
    arguments = (CLIPSModel(run.model, 0), run, tokenizer, tmp_path / "export", torch.zeros(1, 3, 20, 20), ["a fox"])
    with lock(tmp_path / ".export.lock", wait=False):
        second = threading.Thread(target=export_all, args=arguments, daemon=True)
        second.start()
        assert not writes.wait(2)
    second.join(60)
    assert writes.is_set()
