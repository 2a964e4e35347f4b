"""Earlier turns of a training conversation give nothing away about a later answer, and later turns are measured."""

import json
import random
from collections import Counter

import pytest
from earlier_turns import Talk, guessed

from clips.data.demo import PLACES, split_scene
from mllm.data import demo
from mllm.data.attributes import Column, Row, conversations, independent_groups
from mllm.data.demo import DemoScene, by_coin, instruct_record, is_there, talk_about, talk_questions
from mllm.data.questions import TALKS, Question, read_questions
from mllm.evaluation.evaluate import _turns
from mllm.evaluation.report import metrics_of
from mllm.evaluation.scores import score

NEAR = 0.05
"""A rule may be right so much more often than a constant answer."""


def scenes(count: int, split: str = "train") -> list[DemoScene]:
    order = [*PLACES]
    drawn = []
    for number in range(count):
        scene, texts = split_scene(split, number, 0)
        things = sorted(
            ((thing.concept, thing.place) for thing in scene.things), key=lambda thing: order.index(thing[1])
        )
        drawn.append(DemoScene(f"{number}.jpg", b"", tuple(things), scene.background, texts.caption, "All of it."))
    return drawn


def talk_of(record: dict) -> Talk:
    texts = [turn["value"].replace("<image>", "").strip() for turn in record["conversations"]]
    return [*zip(texts[::2], texts[1::2], strict=True)]


def kind_of(question: str, answer: str) -> str:
    if answer in ("Yes", "No"):
        return "yes_no"
    if answer.split()[0] in ("At", "In"):
        return "where"
    if "color" in question:
        return "background"
    return "relation" if any(f" {side} the " in question for side in demo.SIDES) else "identity"


def test_no_answer_of_the_demo_follows_from_earlier_turns() -> None:
    talks = [talk_of(instruct_record(scene, random.Random(scene.name))) for scene in scenes(4_000)]
    results = guessed(talks, kind_of)
    assert set(results) == {"identity", "where", "relation", "yes_no", "background"}
    for kind, (right, constant, number) in results.items():
        assert number > 60, kind
        # Two things are not at one place: the second of three places is one of four, the third one of three.
        assert right < constant + NEAR + (0.05 if kind == "where" else 0), (kind, right, constant)


def test_the_rule_finds_a_balance() -> None:
    """The conversations before this test: each thing is asked about once with yes, and once with no."""
    talks = []
    for scene in scenes(2_000):
        rng = random.Random(scene.name)
        absent = demo.absent_from(scene)
        pairs = [
            is_there(name, at, yes, rng)
            for thing, at in scene.things
            for name, yes in ((thing, True), (rng.choice(absent), False))
        ]
        talks.append(rng.sample(pairs, len(pairs)))
    right, constant, _ = guessed(talks, kind_of)["yes_no"]
    assert right > constant + 0.15


@pytest.mark.parametrize("facts", [1, 2, 3])
def test_a_coin_decides_whatever_was_answered_before(facts: int) -> None:
    after: dict[tuple[str, ...], Counter] = {}
    for seed in range(4_000):
        pairs = by_coin(range(facts), lambda fact, yes: (str(fact), "Yes" if yes else "No"), random.Random(seed))
        assert len(pairs) <= 2 * facts
        assert len({question for question, answer in pairs if answer == "Yes"}) == Counter(a for _, a in pairs)["Yes"]
        for turn, (_, answer) in enumerate(pairs):
            after.setdefault(tuple(a for _, a in pairs[:turn]), Counter())[answer] += 1
    for before, counts in after.items():
        if counts.total() > 500:
            assert counts["Yes"] / counts.total() == pytest.approx(0.5, abs=0.07), before


def test_a_relation_names_no_earlier_thing() -> None:
    for scene in scenes(300):
        if talk := talk_about("relation", scene, random.Random(scene.name)):
            (_, place), (_, answer) = talk
            assert place.split()[0] in ("At", "In")
            assert answer.removeprefix("A ") not in talk[0][0]


def rows_of(number: int) -> tuple[list[Row], list[Column]]:
    """Kinds determine for whom a product is; the colour depends on nothing."""
    rng = random.Random(0)
    kinds = [rng.choice(("shirt", "dress", "watch", "tie")) for _ in range(number)]
    columns = {
        "kind": kinds,
        "whom": [
            "women" if kind == "dress" else "men" if kind == "tie" else rng.choice(("men", "women")) for kind in kinds
        ],
        "colour": [rng.choice(("red", "blue", "green")) for _ in kinds],
    }
    rows = [Row(f"{i}.jpg", {name: values[i] for name, values in columns.items()}, None) for i in range(number)]
    made = [
        Column(name, f"What is the {name}?", {"train": dict(enumerate(v)), "test": {}}) for name, v in columns.items()
    ]
    return rows, made


def test_columns_that_predict_each_other_are_in_different_conversations() -> None:
    rows, columns = rows_of(1_000)
    assert [[column.words for column in group] for group in independent_groups(columns)] == [
        ["kind", "colour"],
        ["whom"],
    ]
    records = conversations(rows, columns, 0)
    assert Counter(record["image"] for record in records) == dict.fromkeys((row.image for row in rows), 2)
    talks = [
        [(q.replace("Answer the question using a single word or phrase.", ""), a) for q, a in talk_of(r)]
        for r in records
    ]
    for kind, (right, constant, _) in guessed(talks, lambda q, a: "yes_no" if a in ("Yes", "No") else q).items():
        assert right < constant + NEAR, (kind, right, constant)


def test_talks_ask_after_true_turns(tmp_path) -> None:
    drawn = scenes(400, "test")
    truth = {scene.name: dict(scene.things) for scene in drawn}
    file = tmp_path / "talk.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in talk_questions(drawn, 40, 0)))
    questions = read_questions(file)
    kinds = Counter(question.kind for question in questions)
    assert kinds == dict.fromkeys(
        ("alone", "after_no", "after_two_no", "after_yes", "second_identity", "second_where"), 40
    )
    before = {"alone": [], "after_no": ["No"], "after_two_no": ["No", "No"], "after_yes": ["Yes"]}
    for question in questions:
        things = truth[question.images[0]]
        if question.kind in before:
            assert [answer for _, answer in question.earlier] == before[question.kind]
            for text, answer in (*question.earlier, (question.text, question.answer)):
                assert (answer == "Yes") == any(f"a {thing}" in text for thing in things), (text, things)
        else:
            assert len(question.earlier) == 1
            assert len(things) > 1
        assert question.text not in dict(question.earlier)
    assert Counter(q.answer for q in questions if q.kind == "after_no") == {"Yes": 20, "No": 20}


def test_earlier_turns_stand_before_the_question() -> None:
    question = Question(id=0, text="And now?", images=("a.jpg",), earlier=(("First?", "No"),))
    assert _turns(question) == [
        {"from": "human", "value": [{"type": "image"}, {"type": "text", "text": "First?"}]},
        {"from": "gpt", "value": "No"},
        {"from": "human", "value": "And now?"},
    ]


def test_talks_are_measured_by_answer() -> None:
    questions = [Question(id=i, text="?", kind="after_no", answer=("Yes", "No")[i % 2]) for i in range(4)]
    answers = ["Yes", "Yes", "Yes", "No"]
    lines = [
        {"kind": q.kind, "expected": q.answer, "correct": q.answer == answer}
        for q, answer in zip(questions, answers, strict=True)
    ]
    metrics = metrics_of(TALKS, score(questions, answers), lines)
    assert metrics["talks/after_no"]["value"] == 75
    assert metrics["talks/after_no"]["chance"] == 50
    assert (metrics["talks/after_no_if_yes"]["value"], metrics["talks/after_no_if_no"]["value"]) == (100, 50)


@pytest.mark.parametrize("earlier", ["No", [["a"]], [["a", 1]], {"a": "b"}])
def test_malformed_earlier_turns_are_refused(tmp_path, earlier) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps({"question_id": 0, "text": "?", "earlier": earlier}))
    with pytest.raises(demo.UserError, match="earlier"):
        read_questions(file)
