"""Read LLaVA's question files, with this project's extra fields `kind`, `answer`, `references` and `earlier`.

If a question has several images, `image` is a list, as in LLaVA-Interleave.
"""

from __future__ import annotations

import hashlib
import json
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
"""The name of the answers to the demo's questions about the held-out drawing style."""
TALKS = "talks"
"""The name of the answers to the demo's questions after earlier turns."""

LIKELIHOODS = ("log_likelihood", "share")
"""Fields of an answer line about the right answer: log likelihood per token in nats, and share among its candidates."""
CANDIDATES = 64
"""Most answers of a kind, the right one included, over which the share of probability is computed."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One line of a question file. It can be scored if it has `answer` or `references`."""

    id: Any
    text: str
    images: tuple[str, ...] = ()
    kind: str = "question"
    answer: str | None = None
    references: tuple[str, ...] = ()
    earlier: tuple[tuple[str, str], ...] = ()
    """Questions and answers of the same conversation, before this question."""

    @property
    def image(self) -> str | list[str] | None:
        """LLaVA's field `image`: a path to an image or video, a list of several paths, or None."""
        return list(self.images) if len(self.images) > 1 else next(iter(self.images), None)


def images_of(line: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the images or videos of a LLaVA line, whose `image` or `video` is a path, a list, empty or missing."""
    image = line.get("image") or line.get("video") or ()
    return (image,) if isinstance(image, str) else tuple(image)


def read_questions(path: Path) -> list[Question]:
    """Read a question file in LLaVA's format (`question_id`, `text`, `image`) with the optional fields of `Question`.

    Raises UserError, with the record's number, for a missing or ill-typed field, an empty answer, and half a character.
    """
    questions = []
    for index, line in enumerate(read_json_records(path)):
        if not isinstance(line, dict) or "question_id" not in line:
            raise UserError(f"{path}: record {index} must be an object with question_id, text and image")
        try:
            json.dumps(line, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # else the answers could not be written, after all were generated
            raise UserError(f"{path}: record {index} has half a character (a lone surrogate): mend its text") from None
        where = f"{path}: record {index} (question_id {line['question_id']})"
        image = line.get("image") or line.get("video") or []
        references = line.get("references") or []
        if not isinstance(image, str | list) or not all(isinstance(name, str) for name in image):
            raise UserError(f"{where}: image must be a path or a list of paths, and so must video")
        if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
            raise UserError(f"{where}: references must be a list of texts")
        earlier = line.get("earlier") or []
        if not isinstance(earlier, list) or not all(
            isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
            for turn in earlier
        ):
            raise UserError(f"{where}: earlier must be a list of pairs, [question, answer]")
        texts: list[Any] = [line.get("text")]
        texts += [line[name] for name in ("kind", "answer") if line.get(name) is not None]
        if not all(isinstance(text, str) for text in texts) or not texts[0].strip():
            raise UserError(f"{where}: text, kind and answer must be texts")
        if line.get("answer") is not None and not line["answer"].strip():
            raise UserError(f"{where}: answer is empty: leave it out if there is no right answer")
        questions.append(
            Question(
                id=line["question_id"],
                text=line["text"],
                images=images_of(line),
                kind=line.get("kind") or "question",
                answer=line.get("answer"),
                references=tuple(references),
                earlier=tuple((question, answer) for question, answer in earlier),
            )
        )
    return questions


def candidates_of(questions: Sequence[Question], every: Sequence[Question]) -> list[list[str]]:
    """Return each question's answer and others of its kind in `every`, at most `CANDIDATES`, in fixed random order."""
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
    """Return `limit` questions of a file, drawn evenly, and their images. Raises UserError for a missing image."""
    from mllm.data.images import ImageStore  # it imports torch, which is not needed for reading questions

    questions = draw_evenly(read_questions(path), limit)
    store = ImageStore(image_folder) if image_folder else None
    for question in questions:
        for name in question.images:
            problem = store.problem(name) if store else "it has an image, but no --image-folder is given"
            if problem:
                raise UserError(f"{path}: question {question.id}: {problem}")
    return questions, store


def draw_evenly(questions: list[Question], limit: int | None) -> list[Question]:
    """Draw `limit` questions evenly over kinds and, within a kind, over answers. Return them in the order of the file.

    The counts of kinds, and of answers within a kind, differ by at most one while questions are left. A smaller limit
    draws a subset. Taking every n-th line would miss answers, because files are sorted and answers often alternate.
    """
    if limit is None or limit >= len(questions):
        return questions
    rng = random.Random(0)
    piles: dict[str, dict[str | None, list[int]]] = {}
    for i in rng.sample(range(len(questions)), len(questions)):
        piles.setdefault(questions[i].kind, {}).setdefault(questions[i].answer, []).append(i)
    drawn = _in_turn([_in_turn(list(by_answer.values()), rng) for by_answer in piles.values()], rng)
    return [questions[i] for i in sorted(drawn[:limit])]


def _in_turn(piles: list[list[int]], rng: random.Random) -> list[int]:
    """Take one entry of each pile in every round, in a new random order."""
    order = []
    for depth in range(max(map(len, piles))):
        left = [pile[depth] for pile in piles if depth < len(pile)]
        order += rng.sample(left, len(left))
    return order
