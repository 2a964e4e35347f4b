"""A tiny LLaVA-style model in a folder, and it loaded for talks: fixtures that a test module imports by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_mllm import pictures, write_llm, write_run

from mllm.chat.model import ChatModel, Sampling
from mllm.encoders.registry import load_vision
from mllm.model.llava import build_model, save_model
from mllm.model.llm import load_llm

SHORT = Sampling(max_new_tokens=8)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chat")
    write_run(root / "runs" / "clips-demo")
    write_llm(root / "llm", max_position_embeddings=512)
    vision = load_vision("clips", runs=root / "runs")
    model, processor = build_model(vision, load_llm(str(root / "llm")), seed=3)
    # A random model must not answer the same whatever it sees: enlarge what comes from the picture.
    torch.nn.init.normal_(model.model.multi_modal_projector.linear_2.weight, std=2.0)
    save_model(model, processor, root / "runs" / "llava" / "model", vision=vision, card={})
    pictures(root / "images", 4)
    return root


@pytest.fixture(scope="module")
def model(place: Path) -> ChatModel:
    return ChatModel.load(str(place / "runs" / "llava" / "model"), device="cpu")
