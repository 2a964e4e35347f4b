"""Twenty steps of a LLaVA stage, fp32, one rank, against losses and gradient norms that were stored before.

`python tests/numerics/test_llava_curves.py DIR` makes them. Those of align and lora are still of transformers' Trainer
(commit 09df7532). The others are of the loop here, which the last test compares with one of torch and transformers.
"""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_llava
import torch
from tiny_llava import ALIGN, INSTRUCT, START, build, conversation, losses, run, write_place
from transformers import LlavaForConditionalGeneration, get_scheduler

from mllm.model.projector import load_projector

av = pytest.importorskip("av")
STORED = Path(__file__).parents[1] / "data" / "llava_curves.json"
LORA = ("--lora_enable", "--lora_r", "4", "--lora_dropout", "0")
KINDS = {
    "align": ALIGN,
    "full": (*INSTRUCT, *START),
    "lora": (*INSTRUCT, *START, *LORA),
    "lora_4bit": (*INSTRUCT, *START, *LORA, "--bits", "4"),
    "padded": (*INSTRUCT, *START, "--weight_decay", "0.1"),
    "tiles": (*INSTRUCT, *START, "--image_aspect_ratio", "anyres"),
    "video": (
        *INSTRUCT,
        *START,
        "--image_aspect_ratio",
        "anyres",
        "--frames_upbound",
        "2",
        "--data_path",
        "video.json",
    ),
    "encoder_too": (*INSTRUCT, *START, "--unfreeze_mm_vision_tower", "--gradient_accumulation_steps", "2"),
}
place, batches = tiny_llava.place, tiny_llava.batches  # fixtures


def add_videos(place: Path) -> None:
    """Videos of grey pictures in the image folder of `place`, and video.json about pictures and them."""
    for number in range(4):
        file = io.BytesIO()
        with av.open(file, "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.height, stream.width, stream.pix_fmt = 32, 32 + 16 * (number % 2), "yuv420p"
            for i in range(6):
                picture = np.full((32, stream.width, 3), 20 + 30 * i + 10 * number, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        (place / "images" / f"{number}.mp4").write_bytes(file.getvalue())
    names = [f"{number}.{kind}" for number in range(4) for kind in ("mp4", "png")]
    records = [conversation(name, [("What?", "two cats " * (1 + i % 3))]) for i, name in enumerate(names)]
    (place / "video.json").write_text(json.dumps(records))


def curve_of(kind: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    if kind == "padded":
        monkeypatch.setattr("mllm.model.forward.MODEL_TYPES", ())
    if kind == "video":
        add_videos(place)
    run(place, monkeypatch, *KINDS[kind], "--max_steps", "20", "--output_dir", f"runs/curve-{kind}")
    lines = (place / f"runs/curve-{kind}/metrics.jsonl").read_text().splitlines()
    return [(line["loss"], line["grad_norm"]) for line in map(json.loads, lines)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_the_stored_ones(kind: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = json.loads(STORED.read_text())[kind]
    assert len(stored) == 20
    for step, (now, before) in enumerate(zip(curve_of(kind, place, monkeypatch), stored, strict=True), 1):
        assert now == pytest.approx(before, rel=1e-6), f"step {step}"


@pytest.mark.slow
@pytest.mark.parametrize("words", ["trained", "frozen"])
def test_twenty_steps_are_those_of_a_stock_loop(
    words: str, place: Path, batches: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model that a stage begins with, saved, opened and trained by transformers and torch alone."""
    model = build(place)
    load_projector(model.model.multi_modal_projector, place / "start.bin")
    model.save_pretrained(place / "began")
    flags = (*KINDS["full"], "--feature_cache", "False", "--max_steps", "20", "--output_dir", f"runs/{words}")
    run(place, monkeypatch, *flags, "--freeze_word_embeddings", str(words == "frozen"))
    stock = LlavaForConditionalGeneration.from_pretrained(place / "began").train()
    stock.model.vision_tower.requires_grad_(False)
    if words == "frozen":
        stock.get_input_embeddings().requires_grad_(False)
        stock.lm_head.requires_grad_(False)
    trained = [parameter for parameter in stock.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    schedule = get_scheduler("cosine", optimizer, 1, 20)
    assert len(batches) == 20
    for (step, ours), batch in zip(losses(place / f"runs/{words}"), batches, strict=True):
        loss = stock(**batch).loss
        assert ours == pytest.approx(loss.item(), rel=1e-6), f"step {step}"
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # a batch without images moves the projector by its momentum
        schedule.step()


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        place = write_place(Path(sys.argv[1]))
        curves = {}
        for kind in KINDS:
            with patch.context() as inner:
                curves[kind] = curve_of(kind, place, inner)
        STORED.write_text(json.dumps(curves, indent=0) + "\n")
