"""Questions that a model answers as scripts/evaluate_llava.py asks them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mllm.chat.model import ChatModel
from mllm.data.images import ImageStore
from mllm.data.questions import Question, read_questions
from mllm.evaluation.evaluate import generate_answers


def answers_of(
    model: ChatModel, lines: list[dict[str, Any]], images: Path, path: Path
) -> tuple[list[Question], list[str]]:
    """The questions of `lines`, written to `path`, and their answers: equal in one batch and one by one."""
    text = "".join(json.dumps({"question_id": i} | line) + "\n" for i, line in enumerate(lines))
    path.write_text(text, encoding="utf-8")
    asked, store = read_questions(path), ImageStore(images)
    batched = generate_answers(model.model, model.processor, asked, store, batch_size=len(lines), max_new_tokens=8)
    alone = generate_answers(model.model, model.processor, asked, store, batch_size=1, max_new_tokens=8)
    assert batched == alone
    return asked, batched
