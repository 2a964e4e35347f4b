"""A tiny LLaVA-style model in a folder, and it loaded for talks: fixtures that a test module imports by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_mllm import pictures, write_llava, write_run

from mllm.chat.model import ChatModel, Sampling

SHORT = Sampling(max_new_tokens=8)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chat")
    write_run(root / "runs" / "clips-demo")
    write_llava(root, context=512)
    pictures(root / "images", 6)
    return root


@pytest.fixture(scope="module")
def model(place: Path) -> ChatModel:
    return ChatModel.load(str(place / "runs" / "llava" / "model"), device="cpu")
