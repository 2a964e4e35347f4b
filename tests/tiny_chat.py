"""A tiny LLaVA-style model in a folder, loaded for talks: fixtures that a test module imports by name; its answers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_mllm import make_images, write_llava, write_run

from mllm.chat.model import ChatModel, Sampling
from mllm.chat.transcript import Turn
from mllm.data.images import ImageStore
from mllm.data.questions import Question, read_questions
from mllm.evaluation.evaluate import generate_answers

SHORT = Sampling(max_new_tokens=8)


def write_place(root: Path, **options: object) -> None:
    """`runs/llava/model` on the encoder `runs/clips-demo`, and six images in `images`.

    `options` are those of the encoder.
    """
    write_run(root / "runs" / "clips-demo")
    write_llava(root, context=512, **options)
    make_images(root / "images", 6)


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
    return ChatModel.load(str(place / "runs" / "llava" / "model"), device="cpu", dtype="float32")


def turn_text(turn: Turn) -> str:
    """The text of a turn, without its images."""
    return "".join(part["text"] for part in turn["value"] if part["type"] == "text").strip()


def answers_of(
    model: ChatModel, lines: list[dict[str, Any]], images: Path, path: Path
) -> tuple[list[Question], list[str]]:
    """The questions of `lines`, written to `path`, and their answers: equal in one batch and one by one."""
    text = "".join(json.dumps({"question_id": i} | line) + "\n" for i, line in enumerate(lines))
    path.write_text(text, encoding="utf-8")
    asked, store = read_questions(path), ImageStore(images)
    batched, _ = generate_answers(model.model, model.processor, asked, store, batch_size=len(lines), max_new_tokens=8)
    alone, _ = generate_answers(model.model, model.processor, asked, store, batch_size=1, max_new_tokens=8)
    assert batched == alone
    return asked, batched
