"""Tiny parts of the web page: a CLIPS run whose export can be looked into, stock LLaVA models, a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tiny_mllm import write_llm, write_run

from clips.config import RunConfig
from clips.data.tokenizer import build_tokenizer
from clips.model.clips import CLIPSModel
from clips.weights.export import write_native
from mllm.encoders.registry import load_vision
from mllm.model.llava import build_model, save_model
from mllm.model.llm import load_llm


def write_export(run: Path, objective: str = "clips", *, seed: int = 0, **vision: Any) -> CLIPSModel:
    """A finished run with export/hf_vit and export/native."""
    model = write_run(run, objective, seed=seed, **vision)
    tokenizer = build_tokenizer("wordpiece", ["a cat", "a dog"] * 8, vocab_size=model.config.text.vocab_size)
    write_native(model, RunConfig.load(run / "config.json"), tokenizer, run / "export" / "native")
    return model


def picture(width: int = 60, height: int = 40, *, seed: int = 0) -> Image.Image:
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_llava(run: Path, export: Path, **options: object) -> Path:
    """An untrained stock model on the encoder of `export` as a trained run leaves it; its answers rarely end early.

    `options` are the language model's (`write_llm`).
    """
    llm = write_llm(run / "llm", **options)
    vision = load_vision(f"clips:{export}")
    model, processor = build_model(vision, load_llm(str(llm)))
    save_model(model, processor, run / "model", vision=vision, card={})
    return run / "model"
