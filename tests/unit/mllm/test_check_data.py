"""The pre-flight finds what would stop a training, and says so."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from bad_corpus import encode
from conftest import script_parser
from launched import write_shard
from PIL import Image
from tiny_tokenizers import make_tokenizer

from clips.common.errors import UserError
from mllm.data.captions import open_store
from mllm.data.conversation import IGNORE, ConversationEncoder
from mllm.data.dataset import LlavaDataset
from mllm.data.images import ImageStore
from mllm.training.check_data import check_data, check_from_flags, inspect_data, render_example

CONTEXT = 120


def sample(number: int, image: str | None, *values: str) -> dict:
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return {"id": f"s{number}", "conversations": turns} | ({"image": image} if image else {})


@pytest.fixture(scope="module")
def encoder() -> ConversationEncoder:
    return ConversationEncoder(make_tokenizer("gpt2"), "chatml", 4, CONTEXT)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (20, 30), "green").save(tmp_path / "images" / f"{name}.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"\x89PNG nothing")
    records = [
        sample(0, "a.png", "<image>\nWhat?", "A cat.", "Where?", "Left"),
        sample(1, "a.png", "What?\n<image>", "A dog."),
        sample(2, None, "Say the word <image> in a text", "fine"),
        sample(3, "b.png", "<image>", "cat " * 200),
        sample(4, "none.png", "<image>", "x"),
        sample(5, "broken.png", "<image>", "x"),
        sample(6, "a.png", "no placeholder", "x"),
        sample(7, None, "word " * 200, "never seen"),
        {"id": "s8"},
        sample(9, "../a.png", "<image>", "x"),
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    (tmp_path / "good.json").write_text(json.dumps(records[:4]))
    return tmp_path


def test_everything_is_counted(data, encoder):
    report, good = inspect_data(data / "data.json", encoder, ImageStore(data / "images"))
    assert (report.samples, len(good)) == (10, 5)
    assert (report.text_only, report.images, report.images_decoded) == (1, 3, 3)
    assert (report.questions, report.answers) == (6, 6)
    assert report.typed_image_words == 1
    assert report.truncated == 1  # 3; of 7, which is too long as well, nothing that is trained would be left
    found = {(problem.index, problem.id, problem.kind) for problem in report.problems}
    assert found == {
        (4, "s4", "missing image"),
        (5, "s5", "broken image"),
        (6, "s6", "conversation"),
        (7, "s7", "conversation"),
        (8, "s8", "record"),
        (9, "s9", "record"),
    }
    assert "every label is masked" in next(p.message for p in report.problems if p.index == 7)
    encoded = [encoder.encode(record.turns, len(record.images), "x") for record in good]
    assert report.tokens == sum(len(e.input_ids) for e in encoded)
    assert report.trained_tokens == sum(y != IGNORE for e in encoded for y in e.labels)
    assert sum(report.histogram.values()) == 5
    assert report.histogram[f"over {CONTEXT}"] == 1
    few, _ = inspect_data(data / "data.json", encoder, ImageStore(data / "images"), decode_limit=1)
    assert (few.images_decoded, few.count("missing image")) == (1, 1)


def test_check_writes_and_refuses(data, encoder, tmp_path, capsys):
    with pytest.raises(UserError, match="6 problem"):
        check_data(data / "data.json", encoder, ImageStore(data / "images"), tmp_path / "out")
    assert "sample 5 (id s5)" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert len(summary["problems"]) == 6
    page = (tmp_path / "out" / "contact_sheet.html").read_text()
    assert page.count("data:image/png") == 3
    assert "A dog." in page
    report = check_data(data / "good.json", encoder, ImageStore(data / "images"), tmp_path / "good")
    assert report.problems == []


def test_example_colours_exactly_the_trained_tokens(data, encoder):
    _, good = inspect_data(data / "good.json", encoder, ImageStore(data / "images"))
    text = render_example(encoder, good[0])
    trained = [text.plain[span.start : span.end] for span in text.spans if span.style == "bold green"]
    assert trained == ["A cat.<|im_end|>", "Left<|im_end|>"]
    assert "[4 × <image>]" in text.plain


def test_the_command_refuses_and_passes(data, tmp_path, capsys):
    tokenizer = make_tokenizer("gpt2")
    tokenizer.chat_template = None  # "auto" is v1 then, as in training
    tokenizer.save_pretrained(tmp_path / "llm")
    flags = ["--language-model", str(tmp_path / "llm"), "--image-folder", str(data / "images"), "--image-tokens", "4"]
    flags += ["--output", str(tmp_path / "out"), "--conversations"]
    with pytest.raises(UserError, match="would stop the training"):
        check_from_flags(script_parser("check_data").parse_args([*flags, str(data / "data.json")]))
    assert "format v1" in capsys.readouterr().out
    check_from_flags(script_parser("check_data").parse_args([*flags, str(data / "good.json")]))
    said = capsys.readouterr()
    assert "nothing found that would stop a training" in said.out
    named = f"--stage 2 --data_path {data / 'good.json'} --image_folder {data / 'images'}"
    assert named in said.err, "without a stage the next step was refused"
    (data / "pairs.csv").write_text("image,text\na.png,a dog\n")
    check_from_flags(script_parser("check_data").parse_args([*flags, str(data / "pairs.csv")]))
    assert f"--stage 1 --data_path {data / 'pairs.csv'}" in capsys.readouterr().err


def test_shards_of_captions_are_read_by_one_thread(tmp_path, encoder, monkeypatch):
    """Four threads moved the position of one file, and whole pictures counted as broken."""
    for shard in range(2):
        write_shard(tmp_path / f"pairs/{shard}.tar", [(encode(Image.new("RGB", (8, 8))), {"txt": b"a word"})] * 8)
    store, threads = open_store(tmp_path / "pairs", None), set()
    shown = store.shown

    def slow(*asked):
        threads.add(threading.get_ident())
        time.sleep(0.01)  # a second thread would take the next picture
        return shown(*asked)

    monkeypatch.setattr(store, "shown", slow)
    report, _ = inspect_data(tmp_path / "pairs", encoder, store)
    assert (report.images_decoded, report.problems, len(threads)) == (16, [], 1)


def test_what_the_check_finds_is_what_training_leaves_out(data, encoder):
    """The same code; a picture that is there and cannot be decoded is found by the check alone."""
    bad = sample(10, None, "\ud83d what?", "x")
    questions = [
        sample(11, None, "Say it\n<image>", "x"),
        sample(12, None, "a"),
        sample(13, "\ud83d.png", "<image>", "x"),
    ]
    records = [*json.loads((data / "data.json").read_text()), bad, *questions]
    (data / "more.json").write_text(json.dumps(records))
    store = ImageStore(data / "images")
    report, good = inspect_data(data / "more.json", encoder, store)
    dataset = LlavaDataset(data / "more.json", encoder, store, "skip")
    assert dataset.records == good
    assert dataset.skipped == [problem for problem in report.problems if problem.kind != "broken image"]
    assert {problem.index for problem in dataset.skipped} == {4, 6, 7, 8, 9, 10, 11, 12, 13}
    assert "half a character (a lone surrogate): '\\ud83d what?'" in report.problems[5].message
    assert [len(dataset[i]["input_ids"]) > 0 for i in range(len(dataset))] == [True] * 5
    with pytest.raises(
        UserError, match=r"more\.json: 9 sample\(s\) cannot .*--on_bad_sample skip:\n  sample 4 \(id s4\)"
    ):
        LlavaDataset(data / "more.json", encoder, store)


def test_an_error_names_ten_and_counts_the_others(tmp_path, encoder):
    (tmp_path / "bad.json").write_text(json.dumps([sample(i, None, "a") for i in range(25)]))
    with pytest.raises(UserError, match="25 sample") as caught:
        LlavaDataset(tmp_path / "bad.json", encoder, None, "skip")  # none would be left
    lines = str(caught.value).splitlines()
    assert len(lines) == 12
    assert "… and 15 more" in lines[-1]
    assert "skip" not in str(caught.value)
