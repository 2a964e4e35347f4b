"""A tiny chat model and a tiny encoder on disk, and pictures as data URLs, for tests of the server."""

from __future__ import annotations

import base64
import dataclasses
import io
from pathlib import Path

import torch
from PIL import Image
from tiny_mllm import clips_model, write_llm, write_run

from clips.captions import build_tokenizer
from clips.config import RunConfig
from clips.export import write_native
from clips.model import CLIPS
from mllm.llm import load_llm
from mllm.model import build_model, save_model
from mllm.vision import load_vision

LONG = "Tell me a long story"
"""A question that the tiny model answers until it is stopped."""


def write_models(root: Path, context: int = 4096) -> None:
    """`runs/llava/model` with 16 tokens a picture, and the encoder `runs/clips-demo`."""
    run = root / "runs" / "clips-demo"
    write_run(run)
    tokenizer = build_tokenizer("wordpiece", ["a red cat and two dogs"] * 3, vocab_size=64)
    model = clips_model()
    text = dataclasses.replace(model.config.text, vocab_size=tokenizer.vocab_size)
    config = RunConfig.load(run / "config.json")
    config = dataclasses.replace(config, model=dataclasses.replace(model.config, text=text))
    torch.manual_seed(0)
    encoder = CLIPS(config.model, tokenizer.pad_id)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    write_native(encoder, config, tokenizer, run / "export" / "native")
    write_llm(root / "llm", max_position_embeddings=context)
    llava, processor = build_model(load_vision("clips", runs=root / "runs"), load_llm(str(root / "llm")), seed=3)
    torch.nn.init.normal_(llava.model.multi_modal_projector.linear_2.weight, std=2.0)  # what is seen must matter
    save_model(llava, processor, root / "runs" / "llava" / "model", card={})


def png(colour: str = "red", size: tuple[int, int] = (40, 28)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def picture(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def user(*parts: str | dict) -> dict:
    """A user's message of texts and pictures."""
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}
