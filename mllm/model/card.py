"""The card of a saved model, and the figures on it: those that were measured on exactly its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from clips.common.hub import model_digest
from clips.common.model_card import result, write_card
from mllm.model.tiles import Layout, Llava

CODE = """\
from transformers import pipeline

source = "."
chat = pipeline("image-text-to-text", model=source)
content = [{"type": "image", "url": "picture.png"}, {"type": "text", "text": "What is in the picture?"}]
answer = chat(text=[{"role": "user", "content": content}], max_new_tokens=64, return_full_text=False)
print(answer[0]["generated_text"])"""
VIDEOS = """\
A video is `{"type": "video", "path": "clip.mp4"}` in `content`, which torchcodec decodes, or
`{"type": "video", "video": frames}`, an array uint8 of frames × height × width × 3. The model sees FRAMES of them."""


def write_model_card(
    directory: Path, model: Llava, name: str, facts: Mapping[str, str], base_model: str | None = None
) -> None:
    """Write the card: the parts of `model`, the `facts` of its training, and how stock transformers loads it."""
    config: Any = model.config
    layout = Layout.of(config)
    tokens = f"up to {layout.most}" if layout.pinpoints else layout.square
    header = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model=base_model,
        tags=["llava", "clips-mllm"],
        model_name=name,
    )
    write_card(
        directory,
        header,
        name=name,
        about=(
            f"A LLaVA-style model: {config.vision_config.model_type} vision encoder, {config.text_config.model_type} "
            f"language model, {tokens} tokens per image. CLIPS-MLLM wrote it; transformers and vLLM load it."
        ),
        facts=facts,
        code=CODE,
        note=VIDEOS.replace("FRAMES", str(layout.frames)) if layout.frames else "",
    )


def add_evaluation(directory: Path, test_set: str, figures: Mapping[str, Any]) -> bool:
    """Have the card of the model in `directory` hold `figures`, measured on `test_set`; returns whether it does.

    It does not if the weights have changed since they were measured, or if another program saved them.
    `figures` are what mllm/evaluation/evaluate.py writes to figures.json. Figures of other weights are removed.
    """
    path = directory / "README.md"
    weights = figures["weights"]
    if not path.is_file() or model_digest(directory) != weights:
        return False
    card = ModelCard.load(path)
    if "clips-mllm" not in (card.data.tags or ()):
        return False

    earlier = card.data.eval_results or []
    results = [one for one in earlier if (one.metric_args or {}).get("weights") == weights]
    results = [one for one in results if one.dataset_name != test_set]
    origin = {"weights": weights, "dtype": figures["dtype"]}
    for kind, row in figures.get("exact_match", {}).items():
        value, low, high = (round(float(100 * row[name]), 1) for name in ("accuracy", "low", "high"))  # no numpy's
        facts = {**origin, "low": low, "high": high, "questions": int(row["n"])}
        results.append(result(test_set, "exact_match", f"{kind}, right in %", value, **facts))
    if "cider" in figures:
        value = round(float(figures["cider"]["cider_d"]), 2)
        facts = {**origin, "questions": int(figures["cider"]["n"])}
        results.append(result(test_set, "cider", "CIDEr-D of descriptions", value, **facts))
    card.data.eval_results = results
    card.save(path)
    return True
