"""The page's talks, model lines and examples, without a browser (tests/e2e/test_web.py has one)."""

from __future__ import annotations

import html
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from tiny_web import picture, write_export, write_llava

from clips import CONCEPTS
from clips.common.errors import UserError
from mllm.chat.limits import Limits
from mllm.chat.model import ChatModel
from mllm.chat.web import LABELS, _conversation, _opening
from mllm.chat.web_models import Pool, about, choices, example_questions, example_things, trained_models
from mllm.chat.web_talk import Talk, answer, begin, forget, stop
from mllm.model.load import FACTS

LIMITS = Limits(prompt_chars=500, images=2, new_tokens=40)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("web")
    write_export(root / "runs" / "demo")
    write_llava(root / "runs" / "one", root / "runs" / "demo")
    picture().save(root / "scene.png")
    return root


@pytest.fixture(scope="module")
def model(place: Path) -> ChatModel:
    return ChatModel.load(str(place / "runs" / "one" / "model"), device="cpu")


@pytest.fixture(autouse=True)
def every_token_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mllm.chat.web_talk.SHOWN_EVERY_S", -1)


def stream(talk: Talk, model: ChatModel, **options: Any):
    settings = {"column": 0, "temperature": 0.0, "length": 30, "limits": LIMITS, "again": False} | options
    return answer(talk, model=lambda: model, **settings)


def said(talk: Talk, column: int = 0) -> list[str]:
    return [message["content"] for message in talk.messages[column] if message["role"] == "assistant"]


def ask(talk: Talk, text: str, files: list[str] | None = None, columns: int = 1) -> dict[str, Any]:
    return begin({"text": text, "files": files or []}, talk, columns, LIMITS)


def test_a_question_streams_and_both_turns_are_shown(model: ChatModel, place: Path) -> None:
    talk = Talk()
    box = ask(talk, " What <image>? ", [str(place / "scene.png")])
    assert box["stop_btn"] is True
    assert talk.busy
    with pytest.raises(UserError, match="still being answered"):
        ask(talk, "Another?")
    *pieces, last = stream(talk, model)
    assert len(pieces) > 3
    assert [len(messages) for messages, _, _ in pieces] == [1] + [2] * (len(pieces) - 1)
    messages, box, remark = last
    assert messages[0]["content"] == [
        {"path": str(place / "scene.png")},
        {"type": "text", "text": "What &lt;image&gt;?"},
    ]
    assert messages[1]["content"] == html.escape(talk.sessions[0].turns[1]["value"][0]["text"], quote=False) != ""
    assert remark.startswith("30 tokens")
    assert "cut off" in remark
    assert box["submit_btn"] is True
    assert not talk.busy
    assert len(talk.sessions[0].turns) == 2


def test_a_quick_answer_has_few_steps_and_the_limit_s_length(model: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mllm.chat.web_talk.SHOWN_EVERY_S", 3600)
    talk = Talk()
    ask(talk, "What?")
    (asked, _, _), (first, _, _), (last, _, remark) = stream(talk, model, length=10**9)
    assert len(asked) == 1
    assert remark.startswith("40 tokens")  # the limit
    assert len(last[1]["content"]) > len(first[1]["content"])
    assert last[1]["content"] == html.escape(talk.sessions[0].turns[1]["value"][0]["text"], quote=False)


def test_a_stopped_answer_stays_and_can_be_asked_for_again(model: ChatModel) -> None:
    talk = Talk()
    ask(talk, "What?")
    long = {"length": 200, "limits": Limits(new_tokens=200)}  # it is stopped well before its end
    answers = stream(talk, model, **long)
    next(answers), next(answers)
    assert "stop_btn" not in stop(talk)  # the browser may hear of it after the answer's end
    assert "stopped" in list(answers)[-1][2]
    (first,) = said(talk)
    list(stream(talk, model, again=True, **long))
    (second,) = said(talk)
    assert second.startswith(first)
    assert len(second) > len(first)


def test_both_columns_answer_one_question_and_the_box_waits_for_the_slower(model: ChatModel) -> None:
    talk = Talk()
    ask(talk, "What?", columns=2)
    left, right = stream(talk, model), stream(talk, model, column=1)
    next(right)
    *_, (_, box, _) = left
    assert "submit_btn" not in box
    *_, (_, box, _) = right
    assert box["submit_btn"] is True
    assert said(talk, 0) == said(talk, 1)


def test_a_new_conversation_is_not_written_into_by_the_old_answer(model: ChatModel) -> None:
    talk = Talk()
    ask(talk, "Old?")
    old = stream(talk, model)
    next(old), next(old)
    forget(talk, 0)
    assert not talk.busy
    ask(talk, "New?")
    list(stream(talk, model))
    # The page is told again what the talk is now: what the old answer sent may be underway.
    assert [messages for messages, _, _ in old] == [talk.messages[0]]
    assert talk.messages[0][0]["content"] == [{"type": "text", "text": "New?"}]
    assert len(talk.sessions[0].turns) == 2


def test_a_question_that_cannot_be_answered_comes_back(model: ChatModel) -> None:
    talk = Talk()
    ask(talk, "What?")
    list(stream(talk, model))
    before = list(talk.messages[0])
    ask(talk, "ü" * 400)
    messages, box, remark = list(stream(talk, model))[-1]
    assert messages == before
    assert box["value"] == {"text": "ü" * 400, "files": []}
    assert not remark
    assert not talk.busy


@pytest.mark.parametrize(
    ("text", "data", "message"),
    [
        ("", None, "Ask something"),
        ("?" * 501, None, "501 characters, the limit is 500"),
        ("What?", [b""], "the file is empty"),
        ("What?", [b"text"], "cannot be read"),
        ("What?", [b"a", b"b", b"c"], "3 pictures are too many"),
    ],
)
def test_bad_questions_are_refused_with_a_reason(
    tmp_path: Path, text: str, data: list[bytes] | None, message: str
) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(len(data or []))]
    for path, content in zip(paths, data or [], strict=True):
        path.write_bytes(content)
    talk = Talk()
    with pytest.raises(UserError, match=message):
        ask(talk, text, list(map(str, paths)))
    assert not talk.busy


def test_models_are_loaded_once_and_no_others(place: Path) -> None:
    name, loaded = str(place / "runs" / "one" / "model"), []
    models = Pool({name: lambda: loaded.append(name) or name})
    assert models.get(name) == models.get(name) == name
    assert loaded == [name]
    assert choices([name, "a/two", "b/two"]) == [("one", name), ("a/two", "a/two"), ("b/two", "b/two")]
    with pytest.raises(UserError, match="there is no model"):
        models.get("somebody/else")
    assert trained_models(place / "runs") == [name]


def test_side_by_side_asks_for_a_second_model(place: Path) -> None:
    """It showed the only model twice."""
    name = str(place / "runs" / "one" / "model")
    with gr.Blocks() as page:
        _conversation(Pool({name: lambda: pytest.fail("nothing is asked")}), 2, [], LIMITS)
    (block,) = [block for block in page.blocks.values() if isinstance(block, gr.Markdown | gr.Chatbot)]
    assert block.value.startswith("### Which second model?")
    assert name in block.value


def test_the_line_about_a_model_is_text_whatever_its_facts_hold(place: Path, tmp_path: Path) -> None:
    """It begins with what the model learned, where its facts say so."""
    directory = place / "runs" / "one" / "model"
    line = "one · language model llama · encoder clips demo, 32 px, 16 tokens × 32"
    assert about(str(directory)) == line
    copy = shutil.copytree(directory, tmp_path / "one" / "model")
    known = json.loads((copy / FACTS).read_text())
    for data, said in (("demo", "drawings of 64 things; it knows nothing else"), ("a.json", "a.json")):
        (copy / FACTS).write_text(json.dumps(known | {"trained_on": {"align": data, "instruct": data}}))
        assert about(str(copy)) == f"**Trained on {said}.** {line}"
    shutil.copy(directory / "config.json", tmp_path)
    assert about(str(tmp_path)).endswith(" · language model llama · encoder vit, 16 tokens")
    facts = {"kind": "hf", "weights": "<b>*x*", "image_size": 224, "padded": True, "num_tokens": 256, "width": 9}
    (tmp_path / FACTS).write_text(json.dumps({"vision_encoder": facts}))
    assert about(str(tmp_path)).endswith(r"encoder hf \<b>\*x\*, 224 px, padded to a square, 256 tokens × 9")
    for damaged in ('{"vision_encoder', "[]", "{}", json.dumps({"vision_encoder": facts | {"width": None}})):
        (tmp_path / FACTS).write_text(damaged)
        with pytest.raises(UserError, match=r"clips_mllm\.json is damaged"):
            about(str(tmp_path))


def test_examples_show_every_kind_of_question_first(tmp_path: Path) -> None:
    assert example_questions(tmp_path) == []
    (tmp_path / "images").mkdir()
    rows = []
    for number, kind in enumerate(["what"] * 4 + ["where"] * 4):
        (tmp_path / "images" / f"{number}.png").touch()
        rows.append(json.dumps({"question_id": number, "image": f"{number}.png", "text": f"{number}?", "kind": kind}))
    rows.append(json.dumps({"question_id": 8, "image": "gone.png", "text": "8?", "kind": "gone"}))
    (tmp_path / "question.jsonl").write_text("\n".join(rows))
    assert [text for _, text in example_questions(tmp_path)] == ["0?", "4?", "1?", "5?", "2?", "6?"]
    (tmp_path / "run" / "evaluation").mkdir(parents=True)
    answers = [{"image": f"{i}.png", "prompt": f"{i}?", "correct": i in (3, 5, 6)} for i in range(8)]
    (tmp_path / "run/evaluation/answers.jsonl").write_text("\n".join(map(json.dumps, answers)))
    assert [text for _, text in example_questions(tmp_path, tmp_path / "run" / "model")] == ["3?", "5?", "6?"]
    (tmp_path / "run" / "model").mkdir()
    (tmp_path / "run" / "model" / FACTS).write_text('{"trained_on": {"align": "align.json"}}')
    assert example_questions(tmp_path, tmp_path / "run" / "model") == []  # it was trained on other pictures


def test_the_map_s_examples_are_first_those_that_it_points_at(tmp_path: Path) -> None:
    things = [("0.png", "A dog"), ("1.png", "An owl"), ("2.png", "A cat")]
    rows = [{"question_id": i, "image": image, "text": f"{i}?", "kind": "identity", "answer": thing}
            for i, (image, thing) in enumerate(things)]  # fmt: skip
    (tmp_path / "question.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = example_things(
        tmp_path, lambda path, thing, question: (path.name, thing, question) == ("1.png", "owl", "1?")
    )
    assert [thing for _, thing in found] == ["owl", "dog", "cat"]
    (tmp_path / "question.jsonl").write_text("\n".join(json.dumps(row) for row in rows * 9))
    looked_at: list[str] = []
    example_things(tmp_path, lambda path, thing, question: len(looked_at.append(thing) or "") * 1.0)
    assert len(looked_at) == 6  # the page waits for them: there were 24


@pytest.mark.parametrize(("data", "labels"), [("demo", list(CONCEPTS)), ("photos.csv", LABELS), ("", LABELS)])
def test_an_encoder_of_photographs_opens_with_general_labels(tmp_path: Path, data: str, labels: Any) -> None:
    """It was asked which of the demo's 64 drawings a photograph shows."""
    encoders: Any = Pool({"clips · mine": lambda: SimpleNamespace(data=data)})
    assert _opening(encoders, tmp_path) == ([], labels)
    assert _opening(Pool({}), tmp_path) == ([], LABELS)


def test_a_new_conversation_while_the_model_is_loaded_leaves_nothing_behind(model: ChatModel) -> None:
    talk = Talk()
    ask(talk, "Old?")

    def load() -> ChatModel:
        forget(talk, 0)
        return model

    list(answer(talk, 0, load, 0.0, 30, LIMITS, again=False))
    assert not talk.sessions
    assert not talk.messages
