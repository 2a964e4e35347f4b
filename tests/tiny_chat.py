"""A tiny LLaVA-style model in a folder, and it loaded for talks: fixtures that a test module imports by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_mllm import pictures, write_llava, write_run

from mllm.chat.model import ChatModel, Sampling

SHORT = Sampling(max_new_tokens=8)


def write_place(root: Path, **options: object) -> None:
    """`runs/llava/model` on the encoder `runs/clips-demo`, and six pictures in `images`.

    `options` are those of the encoder.
    """
    write_run(root / "runs" / "clips-demo")
    write_llava(root, context=512, **options)
    pictures(root / "images", 6)


@pytest.fixture(scope="session")
def place(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    return made_once("tiny-chat", write_place)


@pytest.fixture(scope="module")
def own_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a module's own, which its tests may change."""
    root = tmp_path_factory.mktemp("place")
    write_place(root)
    return root


@pytest.fixture(scope="module")
def model(place: Path) -> ChatModel:
    return ChatModel.load(str(place / "runs" / "llava" / "model"), device="cpu")
