"""A tiny CLIPS run whose export can be looked into (native, with its tokenizer), and a scene-like picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from tiny_mllm import write_run

from clips.captions import build_tokenizer
from clips.config import RunConfig
from clips.export import write_native
from clips.model import CLIPS


def write_export(run: Path, objective: str = "clips", *, pre_norm: bool = False, seed: int = 0) -> CLIPS:
    """A finished run with export/hf_vit and export/native."""
    model = write_run(run, objective, pre_norm=pre_norm, seed=seed)
    tokenizer = build_tokenizer("wordpiece", ["a cat", "a dog"] * 8, vocab_size=model.config.text.vocab_size)
    write_native(model, RunConfig.load(run / "config.json"), tokenizer, run / "export" / "native")
    return model


def picture(width: int = 60, height: int = 40, *, seed: int = 0) -> Image.Image:
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
