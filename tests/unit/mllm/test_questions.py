"""Which questions a limit leaves: balanced at every limit, where a stride would meet the same few answers."""

from __future__ import annotations

from collections import Counter
from itertools import cycle, islice

import pytest

from mllm.data.questions import Question, draw_evenly

ANSWERS = {
    "identity": [f"A thing {number}" for number in range(64)],
    "count": ["One", "Two", "Three"],
    "where": ["In the center", "At the top left", "At the top right", "At the bottom left", "At the bottom right"],
    "background": [f"Color {number}" for number in range(8)],
    "yes_no": ["No", "Yes"],
}


def questions_of(counts: dict[str, int]) -> list[Question]:
    """As the demo writes them: sorted by kind, the answers of a kind in turn."""
    asked = [(kind, answer) for kind, count in counts.items() for answer in islice(cycle(ANSWERS[kind]), count)]
    return [Question(id=i, text="?", kind=kind, answer=answer) for i, (kind, answer) in enumerate(asked)]


def assert_even(drawn: Counter, there: Counter) -> None:
    """Counts differ by one at most, apart from what has no more."""
    most = max(drawn.values())
    assert all(drawn[name] >= most - 1 or drawn[name] == there[name] for name in there), (drawn, there)


@pytest.mark.parametrize(
    "counts",
    [
        pytest.param(dict.fromkeys(ANSWERS, 200), id="the demo's"),
        pytest.param({"identity": 30, "count": 3, "where": 70, "yes_no": 11}, id="uneven kinds"),
    ],
)
def test_kinds_and_answers_are_balanced_at_every_limit(counts: dict[str, int]) -> None:
    questions = questions_of(counts)
    before: set[int] = set()
    for limit in range(1, len(questions) + 1):
        drawn = draw_evenly(questions, limit)
        ids = [question.id for question in drawn]
        assert len(ids) == limit
        assert ids == sorted(ids)
        assert before < set(ids)  # a larger limit adds questions, and exchanges none
        before = set(ids)
        assert_even(Counter(q.kind for q in drawn), Counter(q.kind for q in questions))
        for kind in counts:
            answers = Counter(q.answer for q in drawn if q.kind == kind)
            if answers:
                assert_even(answers, Counter(q.answer for q in questions if q.kind == kind))


def test_the_draw_is_one_of_its_seed() -> None:
    questions = questions_of(dict.fromkeys(ANSWERS, 40))
    ids = [[q.id for q in draw_evenly(questions, 50, seed)] for seed in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2]
    assert draw_evenly(questions, None) == draw_evenly(questions, 200) == draw_evenly(questions, 1000) == questions


def test_questions_without_answers_are_drawn_too() -> None:
    questions = [Question(id=i, text="?", references=("a fox",)) for i in range(30)]
    chosen = [question.id for question in draw_evenly(questions, 10)]
    assert len(set(chosen)) == 10
    assert chosen != list(range(0, 30, 3))
