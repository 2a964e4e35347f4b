"""Answers of a tiny real model, which questions a limit leaves, and every metric against a slow reference."""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import random
import shutil
from collections import Counter
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
import tiny_chat
import torch
from conftest import script_parser
from tiny_mllm import make_images
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from clips.common.errors import UserError
from clips.common.files import sha256, write_json
from mllm.data.images import ImageStore
from mllm.data.questions import Question, candidates_of, draw_evenly, open_questions, read_questions
from mllm.evaluation import evaluate
from mllm.evaluation.batches import generate_inputs
from mllm.evaluation.cider import cider, words
from mllm.evaluation.evaluate import evaluate_from_flags, generate_answers
from mllm.evaluation.report import metrics_of, one_caption
from mllm.evaluation.scores import (
    exact_match_metrics,
    exactness,
    is_right,
    normalise,
    says_yes,
    scorer_version,
    yes_no_metrics,
)
from mllm.model.load import CACHE, FACTS, find_model, load_llava, newest_model

Loaded = tuple[LlavaForConditionalGeneration, LlavaProcessor]


place = tiny_chat.own_place  # a fixture: evaluations write on the model's card


def test_a_run_stands_for_its_model(place: Path, tmp_path: Path) -> None:
    """Also with the config.json that train_llava.sh leaves in it; a model with a folder of this name is itself."""
    run = tmp_path / "run"
    shutil.copytree(place / "runs" / "llava" / "model", run / "model")
    for config, found in (({"align": {}, "instruct": {}}, run / "model"), ({"model_type": "llava"}, run)):
        write_json(run / "config.json", config)
        assert find_model(str(run)) == str(found)
    assert find_model(str(run / "model")) == str(run / "model")


@pytest.fixture
def _loads_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "load_llava", functools.cache(load_llava))


@pytest.fixture(scope="module")
def loaded(place: Path) -> Loaded:
    return load_llava(str(place / "runs" / "llava" / "model"), torch.device("cpu"), torch.float32)


def questions() -> list[Question]:
    texts = ["What is it?", "And how many dogs are in the image, if any?", "Cat?", "Where is the red cat?"]
    with_image = [Question(id=i, text=texts[i % 4], images=(f"{i}.png",)) for i in range(6)]
    without = [Question(id="t", text="Say a word"), Question(id="u", text="Two words now", images=())]
    again = [Question(id=f"{i}", text=text, images=(f"{i % 3}.png",)) for i, text in enumerate(texts * 2)]
    return [with_image[0], without[0], *with_image[1:], without[1], *again]


def test_batched_answers_are_those_of_one_by_one_and_of_the_stock_processor(place: Path, loaded: Loaded) -> None:
    model, processor = loaded
    asked, store = questions(), ImageStore(place / "images")
    batched, _ = generate_answers(model, processor, asked, store, batch_size=4, max_new_tokens=8)
    single, _ = generate_answers(model, processor, asked, store, batch_size=1, max_new_tokens=8)
    assert batched == single
    assert len(set(batched)) > 3  # otherwise equality would say nothing
    for question, answer in zip(asked, batched, strict=True):
        content = [{"type": "image"}] if question.images else []
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": question.text}]}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        images = [store.load(name) for name in question.images] or None
        inputs = processor(images=images, text=prompt, return_tensors="pt")
        output = model.generate(**inputs, do_sample=False, max_new_tokens=8)
        stock = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == stock.strip()


def test_answers_and_cider_are_equal_at_every_batch_size(loaded: Loaded, tmp_path: Path) -> None:
    """With none, one and two images, prompts of several lengths, and images that several questions share."""
    make_images(tmp_path, 32)
    asked = []
    for i, text in zip(range(64), cycle(["Cat?", "What is it?", "And how many dogs are here, if any?"]), strict=False):
        images = [(f"{i % 32}.png",), (f"{i % 32}.png", f"{(i + 5) % 32}.png"), (), (f"{i % 3}.png",)][i % 4]
        asked.append(Question(id=i, text=f"{text} {i}", images=images))
    store = ImageStore(tmp_path)
    by_size = {
        size: generate_answers(*loaded, asked, store, batch_size=size, max_new_tokens=24)[0] for size in (1, 7, 32)
    }
    assert len(set(by_size[1])) > 32  # otherwise equality would say nothing
    assert by_size[7] == by_size[1]
    assert by_size[32] == by_size[1]
    references = [(" ".join(text.split()[:9]),) for text in by_size[1]]
    one, other = (cider(by_size[size], references) for size in (1, 32))
    assert one == other
    assert one[0] > 0


def slow_nats(model: LlavaForConditionalGeneration, processor: LlavaProcessor, messages: list, images: list) -> list:
    """Log likelihoods of the answer's tokens and its end, of one conversation alone."""
    whole, prompt = (
        processor(images=images or None, text=text, return_tensors="pt")
        for text in (
            processor.apply_chat_template(messages),
            processor.apply_chat_template(messages[:1], add_generation_prompt=True),
        )
    )
    ids, start = whole["input_ids"][0], prompt["input_ids"].shape[1]
    assert torch.equal(ids[:start], prompt["input_ids"][0])
    with torch.inference_mode():
        likely = model(**whole).logits[0].log_softmax(-1)
    end = start + ids[start:].tolist().index(processor.tokenizer.eos_token_id)
    return [likely[place - 1, ids[place]].item() for place in range(start, end + 1)]


def test_likelihoods_are_those_of_single_conversations(place: Path, loaded: Loaded) -> None:
    model, processor = loaded
    truths = {"name": ["A red cat", "dog", "two dogs in the image"], "yes_no": ["Yes", "No"], "open": [None]}
    varied = []
    for i, (question, kind) in enumerate(zip(questions(), cycle(truths), strict=False)):
        varied.append(replace(question, kind=kind, answer=truths[kind][i // 3 % len(truths[kind])]))
    store = ImageStore(place / "images")
    candidates = candidates_of(varied, varied)
    answers, measured = generate_answers(model, processor, varied, store, batch_size=4, candidates=candidates)
    assert answers == generate_answers(model, processor, varied, store, batch_size=4)[0]
    lines = []
    for question, of_question, likelihoods in zip(varied, candidates, measured, strict=True):
        assert sorted(of_question) == sorted(filter(None, truths[question.kind]))
        if question.answer is None:
            assert likelihoods == {}
            continue
        content = [*[{"type": "image"} for _ in question.images], {"type": "text", "text": question.text}]
        images = [store.load(name) for name in question.images]
        nats = {}
        for answer in of_question:
            message = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
            nats[answer] = slow_nats(model, processor, [{"role": "user", "content": content}, message], images)
        own = nats[question.answer]
        share = math.exp(sum(own)) / sum(math.exp(sum(of_answer)) for of_answer in nats.values())
        expected = {"log_likelihood": sum(own) / len(own), "share": share}
        assert likelihoods == pytest.approx(expected, rel=1e-3)
        lines.append({"kind": question.kind, **expected})
    assert len({round(line["share"], 4) for line in lines}) > 5  # otherwise equality would say nothing
    metrics = metrics_of("answers", {}, [*lines, {"text": "of an open question"}])
    shares = [line["share"] for line in lines if line["kind"] == "yes_no"]
    assert metrics["share_yes_no"]["value"] == pytest.approx(100 * sum(shares) / len(shares))
    assert metrics["log_likelihood_overall"]["items"] == len(lines)


def test_rivals_of_an_answer_are_drawn_by_a_hash() -> None:
    every = [Question(id=i, text="?", kind="name", answer=f"name {i % 90}") for i in range(180)]
    one, other = candidates_of(every, every)[:2]
    assert (one[0], other[0], len(one), len(set(other))) == ("name 0", "name 1", 64, 64)
    assert candidates_of(every[:1], every[::-1]) == [one]


def test_a_image_is_read_once_for_all_its_questions(loaded: Loaded) -> None:
    model, _ = loaded
    image, tokens = model.config.image_token_id, model.config.image_seq_length
    rows = [[5, 6, *[image] * tokens, 7, *question] for question in ([8], [9, 10, 11], [9, 12])]
    images = [(torch.rand(1, 3, 32, 32), (32, 32)) for _ in range(2)]
    inputs = generate_inputs(model, rows, [(0,), (1,), (0,)], images, 0)
    assert "pixel_values" not in inputs
    assert inputs[CACHE].get_seq_length() == 2 + tokens + 1
    assert inputs["attention_mask"][:, -3:].tolist() == [[0, 0, 1], [1, 1, 1], [0, 1, 1]]
    assert torch.equal(inputs[CACHE].layers[0].keys[0], inputs[CACHE].layers[0].keys[2])
    assert "pixel_values" in generate_inputs(model, rows[:2], [(0,), (1,)], images, 0)  # nothing is shared
    apart = [[5, *rows[0]], rows[1], rows[2]]  # their images stand in other places
    assert generate_inputs(model, apart, [(0,), (1,), (0,)], images, 0)["pixel_values"].shape[0] == 3


def test_wrong_questions_are_named(place: Path, loaded: Loaded, tmp_path: Path) -> None:
    store = ImageStore(place / "images")
    for fields, message in [
        ({"text": "What?", "images": ("missing.png",)}, r"question 7.*missing\.png"),
        ({"text": "word " * 300}, r"question 7 has \d+ tokens with its images, the context is 512"),
    ]:
        with pytest.raises(UserError, match=message):
            generate_answers(*loaded, [Question(id=7, **fields)], store)
    (tmp_path / "question.jsonl").write_text('{"question_id": 7, "text": "What?", "image": "0.png"}')
    with pytest.raises(UserError, match=r"question 7.*no --image-folder"):
        open_questions(tmp_path / "question.jsonl", None, None)
    (tmp_path / "question.jsonl").write_text('{"question_id": 0, "text": "Fine?"}\n{"text": "What?"}\n')
    with pytest.raises(UserError, match="question_id"):
        read_questions(tmp_path / "question.jsonl")


@pytest.mark.parametrize("field", ["text", "kind", "answer", "question_id", "references"])
def test_half_a_character_is_refused_before_an_answer_is_generated(field: str, tmp_path: Path) -> None:
    line = {"question_id": 0, "text": "What?", field: ["\ud83d"] if field == "references" else "\ud83d"}
    (tmp_path / "q.jsonl").write_text(json.dumps(line))
    with pytest.raises(UserError, match="record 0 has half a character"):
        read_questions(tmp_path / "q.jsonl")


def test_an_answer_ends_where_the_context_does(loaded: Loaded) -> None:
    (ids,) = captured_lengths(loaded, Question(id=0, text="Say a word"), room=3)
    assert ids == 3


def captured_lengths(loaded: Loaded, question: Question, room: int) -> list[int]:
    """The limits on new tokens with a context that leaves `room` after the question."""
    model, processor = loaded
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        prompts: list[list[int]] = []
        whole = evaluate.answer_settings
        build = evaluate.ConversationEncoder.prompt
        patch.setattr(evaluate.ConversationEncoder, "prompt", lambda *a: prompts.append(ids := build(*a)) or ids)
        generate_answers(model, processor, [question], None, max_new_tokens=1)
        patch.setattr(model.config.get_text_config(), "max_position_embeddings", len(prompts[0]) + room)
        patch.setattr(evaluate, "answer_settings", lambda e, most, t: seen.append(most) or whole(e, most, t))
        generate_answers(model, processor, [question], None, max_new_tokens=8)
    return seen


def test_a_tokenizer_without_a_padding_token_answers(loaded: Loaded) -> None:
    asked = [Question(id=0, text="Say a word"), Question(id=1, text="Two words, or rather three")]
    expected = generate_answers(*loaded, asked, None, max_new_tokens=4)
    processor = copy.deepcopy(loaded[1])
    processor.tokenizer.pad_token = None
    assert processor.tokenizer.pad_token_id is None
    assert generate_answers(loaded[0], processor, asked, None, max_new_tokens=4) == expected


@pytest.mark.parametrize("flag", ["--batch-size", "--max-new-tokens"])
@pytest.mark.parametrize("value", ["0", "-1"])
def test_a_batch_or_an_answer_of_nothing_is_refused(flag: str, value: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        parsed(f"{flag}={value}")


def parsed(*flags: str) -> argparse.Namespace:
    return script_parser("evaluate_llava").parse_args(flags)


@pytest.mark.parametrize("answer", [0, False, ["no"], "", " "])
def test_an_answer_that_is_no_text_is_named(answer: object, tmp_path: Path) -> None:
    """0 and false passed as if the question had no answer, and failed hours later in the scorer."""
    (tmp_path / "q.jsonl").write_text(json.dumps({"question_id": 7, "text": "How many?", "answer": answer}))
    with pytest.raises(UserError, match=r"question_id 7.*answer"):
        read_questions(tmp_path / "q.jsonl")


def test_command_writes_llava_s_answers_and_metrics(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A partial evaluation never writes where the whole one is, and never onto the model's card."""
    lines = [
        {"question_id": 11, "image": "0.png", "text": "What is it?", "category": "conv"},
        {"question_id": 12, "text": "Is it?", "kind": "yes_no", "answer": "Yes"},
        {"question_id": 13, "image": "1.png", "text": "Describe it.", "references": ["a red cat"]},
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = newest_model(place / "runs")
    monkeypatch.setattr(evaluate, "ensure_any_llava_demo", lambda directory: place)  # whole: the demo's own questions
    monkeypatch.setattr(evaluate, "demo_questions", lambda directory: {"answers": tmp_path / "mine.jsonl"})
    monkeypatch.setattr(evaluate, "IMAGES", "images")
    common = ["--model", str(model), "--batch-size", "2", "--max-new-tokens", "4", "--device", "cpu"]
    own = ["--questions", str(tmp_path / "mine.jsonl"), "--image-folder", str(place / "images")]
    metrics = evaluate_from_flags(parsed(*common))
    assert "3 of 3 answers are cut off after --max-new-tokens 4" in capsys.readouterr().err
    out = place / "runs" / "llava" / "evaluation"
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [line["question_id"] for line in answers] == [11, 12, 13]
    assert {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"} <= answers[0].keys()
    assert (answers[0]["prompt"], answers[0]["model_id"], answers[1]["expected"]) == ("What is it?", "llava", "Yes")
    assert json.loads((out / "results.json").read_text()) == metrics
    origin = {"model", "dtype", "weights", "scorer", "sets", "flags", "command", "environment", "test_set", "unit"}
    assert set(metrics) == {"metrics"} | origin
    assert {"yes_no", "overall", "pope_f1", "cider_d", "cider_d_of_one_caption"} <= metrics["metrics"].keys()
    (asked,) = metrics["sets"].values()
    assert asked["questions"] == {"file": "mine.jsonl", "sha256": sha256(tmp_path / "mine.jsonl"), "asked": 3}
    assert asked["answers"] == {"file": "answers.jsonl", "sha256": sha256(out / "answers.jsonl")}
    assert metrics["scorer"] == scorer_version()
    assert metrics["metrics"]["overall"]["items"] == 1

    digest = sha256(tmp_path / "mine.jsonl")[:8]
    whole = {path: path.read_bytes() for path in out.iterdir()}
    sampled = ["--temperature", "0.5", "--seed", "3"]  # it overwrote the greedy answers
    partial = [(["--limit", "1"], "limit-1"), (sampled, "temperature-0.5-seed-3")]
    for flags, where in (*partial, ([*own, "--limit", "2"], f"mine-{digest}-limit-2")):
        evaluate_from_flags(parsed(*common, *flags))
        assert (out / where / "results.json").is_file()
    with pytest.raises(UserError, match="other questions"):
        evaluate_from_flags(parsed(*common, "--limit", "1", "--output", str(out)))
    assert {path: path.read_bytes() for path in whole} == whole

    elsewhere = ["--output", str(tmp_path / "kept" / "answers.jsonl")]
    evaluate_from_flags(parsed(*common, *own, *elsewhere, "--likelihood"))
    shares = [json.loads(line).get("share") for line in (tmp_path / "kept" / "answers.jsonl").read_text().splitlines()]
    assert shares == [None, 1, None]  # there is one answer, and it has no rival
    kept = json.loads((tmp_path / "kept" / "answers" / "results.json").read_text())
    assert kept["metrics"]["share_overall"]["items"] == 1
    with pytest.raises(UserError, match="--questions"):
        evaluate_from_flags(parsed(*common, *elsewhere))


@pytest.mark.usefixtures("_loads_once")
def test_llava_s_flags_of_evaluation(place: Path, tmp_path: Path) -> None:
    """Its conversation format and temperature count."""
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"question_id": i, "text": f"What is {i}?"}) + "\n" for i in range(7)))
    common = ["--model", str(newest_model(place / "runs")), "--questions", str(path), "--batch-size", "1"]
    common += ["--max-new-tokens", "4", "--device", "cpu"]

    def texts(*flags: str) -> list[str]:
        evaluate_from_flags(parsed(*common, "--output", str(file := tmp_path / "answers.jsonl"), *flags))
        return [json.loads(line)["text"] for line in file.read_text().splitlines()]

    whole = texts()
    assert texts("--conv-mode", "vicuna_v1") == texts("--conv-mode", "v1") != whole
    drawn = texts("--temperature", "5")
    assert drawn == texts("--temperature", "5") != whole
    assert texts("--temperature", "5", "--seed", "1") != drawn
    with pytest.raises(UserError, match="--temperature must be"):
        texts("--temperature", "-1")
    kept = (tmp_path / "answers.jsonl").read_bytes()
    path.write_text(json.dumps({"question_id": 0, "text": "Another?"}))
    with pytest.raises(UserError, match="other questions"):  # although none has a right answer
        texts()
    assert (tmp_path / "answers.jsonl").read_bytes() == kept


@pytest.mark.parametrize(
    ("answer", "expected", "how"),
    [
        ("A fox", "A fox", "exact"),
        ("a fox.", "A fox", "normalised"),
        ("  The  fox", "fox", "normalised"),
        ("Yes, there is a fox.", "Yes", "prefix"),
        ("(B) a fox", "B", "prefix"),
        ("Yesterday", "Yes", "wrong"),
        ("theatre", "atre", "wrong"),
        ("", "fox", "wrong"),
        ("3.5", "35", "wrong"),
        ("", "A", "wrong"),
        (".", "A", "wrong"),
        ("The", "A", "wrong"),
        ("a.", "A", "normalised"),
    ],
)
def test_exact_match_forgives_case_articles_and_the_full_stop_only(answer: str, expected: str, how: str) -> None:
    assert exactness(answer, expected) == how
    assert is_right(answer, expected) == (how in ("exact", "normalised"))
    assert normalise(normalise(answer)) == normalise(answer)


def test_accuracy_per_kind_with_wilson_s_interval() -> None:
    questions = [Question(id=i, text="?", kind="count" if i < 4 else "where", answer="One") for i in range(10)]
    questions.append(Question(id=10, text="?"))  # without an answer: not counted
    metrics = exact_match_metrics(questions, ["one"] * 3 + ["two"] * 3 + ["one"] * 4 + ["one"])
    assert list(metrics) == ["count", "where", "overall"]
    assert (metrics["count"]["accuracy"], metrics["where"]["accuracy"]) == (0.75, 4 / 6)
    n, p, z = 10, 0.7, 1.959963984540054
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert metrics["overall"] == pytest.approx({"accuracy": p, "low": centre - half, "high": centre + half, "n": n})


def test_chance_is_the_commonest_truth_of_each_kind() -> None:
    """Seven "One" of ten, and five of ten."""
    questions, answers = [], []
    for kind, truths in (("count", ["One", "One", "Two"]), ("where", ["At the top", "Below"])):
        for i in range(10):
            questions.append(Question(id=i, text="?", kind=kind, answer=truths[i % len(truths)]))
            answers.append(questions[-1].answer if i < 6 else "no")
    lines = [{"kind": question.kind, "expected": question.answer} for question in questions]
    metric = metrics_of("answers_unseen", {"exact_match": exact_match_metrics(questions, answers)}, lines)[
        "unseen/overall"
    ]
    assert (metric["value"], metric["chance"], metric["items"]) == pytest.approx((60, 60, 20))
    assert [metric["low"], metric["high"]] == pytest.approx([38.7, 78.1], abs=0.05)


def test_yes_no_metrics_are_pope_s() -> None:
    assert [says_yes(t) for t in ("Yes.", "No, there is none", "There is not", "Nothing", "Yes. No doubt", "")] == [
        *(True, False, False, True, True, True)
    ]
    rng = random.Random(0)
    expected = [rng.random() < 0.5 for _ in range(200)]
    answers = [rng.random() < 0.6 for _ in expected]
    metrics = yes_no_metrics(["Yes" if s else "No" for s in answers], expected)
    tp = fp = tn = fn = 0  # POPE's evaluate.py, counted one by one
    for s, e in zip(answers, expected, strict=True):
        tp, fp, tn, fn = tp + (s and e), fp + (s and not e), tn + (not s and not e), fn + (not s and e)
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    expected = {"accuracy": (tp + tn) / 200, "precision": precision, "recall": recall, "yes_share": (tp + fp) / 200}
    assert metrics == pytest.approx(expected | {"f1": 2 * precision * recall / (precision + recall), "n": 200})
    assert yes_no_metrics(["No"], [True])["f1"] == 0


REFERENCES = [
    ["a red fox at the top left and two cars", "the fox is at the top left"],
    ["three green trees on a blue background"],
    ["a cat at the center", "one cat in the center of the image", "a cat"],
    ["two dogs at the bottom right and a car at the top"],
]
CANDIDATES = [
    "a red fox at the top left",
    "three trees on a green background with three green trees",
    "a dog at the center",
    "two dogs at the bottom right and a car at the top",
]
# What pycocoevalcap 1.2's CiderScorer(n=4, sigma=6.0) gives for them.
PUBLISHED = [5.372361089019258, 3.061392999540089, 1.3792252890493037, 10.0]


def test_one_caption_for_all_is_the_floor_of_descriptions() -> None:
    texts = [["a red cat sits", f"cat {i} by a door"] if i % 3 else [f"some dog {i}"] for i in range(300)]
    questions = [Question(id=i, text="?", references=tuple(of_image)) for i, of_image in enumerate(texts)]
    floor = one_caption([*questions, Question(id=300, text="?", answer="Yes")])["cider_d_of_one_caption"]
    best = cider(["a red cat sits"] * 300, texts)[0]
    assert floor == {"caption": "a red cat sits", "value": best, "items": 300}
    assert best > cider(["some dog 3"] * 300, texts)[0]
    assert one_caption([Question(id=0, text="?", answer="Yes")]) == {}
    strangers = [Question(id=i, text="?", references=(f"thing{i} stands{i} here{i}",)) for i in range(9)]
    assert one_caption(strangers)["cider_d_of_one_caption"]["value"] == 0.0, "a caption described its own image"


def test_cider_is_coco_caption_s() -> None:
    mean, each = cider(CANDIDATES, REFERENCES)
    assert each == pytest.approx(PUBLISHED, abs=1e-9)
    assert mean == pytest.approx(sum(PUBLISHED) / 4, abs=1e-9)
    assert words("A fox, at the top-left; it's  red.") == ["a", "fox", "at", "the", "top-left", "it's", "red"]
    assert cider(["", "a b c d e"], [["a fox"], ["a b c d e"]])[1][0] == 0.0
    assert cider([], []) == (0.0, [])


def test_a_model_of_other_data_is_not_asked_about_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of photographs had the demo drawn, for minutes and in silence, and was asked about its drawings."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / FACTS).write_text('{"trained_on": {"align": "align.json", "instruct": "instruct.json"}}')
    monkeypatch.setattr(evaluate, "ensure_any_llava_demo", None)
    with pytest.raises(UserError, match=r"trained on align\.json, instruct\.json: .* --questions"):
        evaluate_from_flags(parsed("--model", str(tmp_path / "model"), "--device", "cpu"))


def assert_even(drawn: Counter, there: Counter) -> None:
    """Counts differ by one at most, apart from what has no more."""
    most = max(drawn.values())
    assert all(drawn[name] >= most - 1 or drawn[name] == there[name] for name in there), (drawn, there)


def test_kinds_and_answers_are_balanced_at_any_limit() -> None:
    counts = {"identity": (30, 64), "count": (3, 3), "where": (70, 5), "yes_no": (11, 2)}
    # As the demo writes them: sorted by kind, the answers of a kind in turn.
    pairs = [(kind, str(i % answers)) for kind, (count, answers) in counts.items() for i in range(count)]
    questions = [Question(id=i, text="?", kind=kind, answer=answer) for i, (kind, answer) in enumerate(pairs)]
    before: set[int] = set()
    for limit in [*range(1, 40), *range(40, len(questions), 23), len(questions)]:
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
