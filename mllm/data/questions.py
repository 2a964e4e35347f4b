"""LLaVA's question files, with this project's kinds and answers.

A question may have several pictures: `image` is then a list, as in LLaVA-Interleave.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clips.common.errors import UserError
from clips.common.files import read_json_records

if TYPE_CHECKING:
    from mllm.data.images import ImageStore

UNSEEN_ANSWERS = "answers_unseen"
"""The name of the answers to the demo's questions about the unseen artist."""

LIKELIHOODS = ("log_likelihood", "share")
"""Fields of a line of answers: of the right answer, its nats per token and its share among the answers of its kind."""
CANDIDATES = 64
"""Answers of a kind, at most, among which the right one has its share of probability."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One line of a question file; `answer` or `references` if it can be scored."""

    id: Any
    text: str
    images: tuple[str, ...] = ()
    kind: str = "question"
    answer: str | None = None
    references: tuple[str, ...] = ()

    @property
    def image(self) -> str | list[str] | None:
        """LLaVA's field: a path, a list of several, or None; a path may be a video's."""
        return list(self.images) if len(self.images) > 1 else next(iter(self.images), None)


def images_of(line: Mapping[str, Any]) -> tuple[str, ...]:
    """The pictures of a line of LLaVA's: `image`, else `video`, is a path, a list of paths, empty or missing."""
    image = line.get("image") or line.get("video") or ()
    return (image,) if isinstance(image, str) else tuple(image)


def read_questions(path: Path) -> list[Question]:
    """LLaVA's question.jsonl (`question_id`, `text`, `image`), with optional `kind`, `answer` and `references`."""
    questions = []
    for index, line in enumerate(read_json_records(path)):
        if not isinstance(line, dict) or "question_id" not in line:
            raise UserError(f"{path}: record {index} must be an object with question_id, text and image")
        where = f"{path}: record {index} (question_id {line['question_id']})"
        image = line.get("image") or line.get("video") or []
        references = line.get("references") or []
        if not isinstance(image, str | list) or not all(isinstance(name, str) for name in image):
            raise UserError(f"{where}: image must be a path or a list of paths, and so must video")
        if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
            raise UserError(f"{where}: references must be a list of texts")
        texts: list[Any] = [line.get("text"), line.get("kind") or "", line.get("answer") or ""]
        if not all(isinstance(text, str) for text in texts) or not texts[0].strip():
            raise UserError(f"{where}: text, kind and answer must be texts")
        questions.append(
            Question(
                id=line["question_id"],
                text=line["text"],
                images=images_of(line),
                kind=line.get("kind") or "question",
                answer=line.get("answer"),
                references=tuple(references),
            )
        )
    return questions


def candidates_of(questions: Sequence[Question], every: Sequence[Question]) -> list[list[str]]:
    """Of each question its answer, and the others of its kind among `every`, at most CANDIDATES, drawn by a hash."""
    pairs = {(question.kind, question.answer) for question in every if question.answer}
    drawn: dict[str, list[str]] = {}
    for kind, answer in sorted(pairs, key=lambda pair: hashlib.sha256(pair[1].encode()).digest()):
        drawn.setdefault(kind, []).append(answer)
    candidates = []
    for question in questions:
        others = [answer for answer in drawn.get(question.kind, ())[:CANDIDATES] if answer != question.answer]
        candidates.append([question.answer, *others][:CANDIDATES] if question.answer else [])
    return candidates


def open_questions(
    path: Path, image_folder: Path | str | None, limit: int | None
) -> tuple[list[Question], ImageStore | None]:
    """`limit` questions of a file, drawn evenly, and their pictures. Raises UserError for a missing picture."""
    from mllm.data.images import ImageStore  # it imports torch, which reading questions alone does not need

    questions = draw_evenly(read_questions(path), limit)
    store = ImageStore(image_folder) if image_folder else None
    for question in questions:
        for name in question.images:
            problem = store.problem(name) if store else "it has an image, but no --image-folder is given"
            if problem:
                raise UserError(f"{path}: question {question.id}: {problem}")
    return questions, store


def draw_evenly(questions: list[Question], limit: int | None, seed: int = 0) -> list[Question]:
    """`limit` questions, drawn evenly over kinds and, within a kind, over answers, in the order of the file.

    Counts of kinds, and of answers of a kind, differ by at most one while questions are left. A smaller limit draws a
    subset. Files are sorted by kind and answers often alternate, so every n-th line would meet few answers.
    """
    if limit is None or limit >= len(questions):
        return questions
    rng = random.Random(seed)
    piles: dict[str, dict[str | None, list[int]]] = {}
    for i in rng.sample(range(len(questions)), len(questions)):
        piles.setdefault(questions[i].kind, {}).setdefault(questions[i].answer, []).append(i)
    drawn = _in_turn([_in_turn(list(of_kind.values()), rng) for of_kind in piles.values()], rng)
    return [questions[i] for i in sorted(drawn[:limit])]


def _in_turn(piles: list[list[int]], rng: random.Random) -> list[int]:
    """Round by round one item of each pile, in a new random order each round."""
    order = []
    for depth in range(max(map(len, piles))):
        left = [pile[depth] for pile in piles if depth < len(pile)]
        order += rng.sample(left, len(left))
    return order
