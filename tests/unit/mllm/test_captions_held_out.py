"""Captions that a model learns: the share that it is measured on instead, and fields by the encoder's run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_mllm import write_run

from clips import Fields, RunConfig
from clips.common.errors import UserError
from clips.common.files import read_json_records
from mllm.data.captions import TEST, TEST_IMAGES, CaptionStore, open_store, write_test
from mllm.data.images import ImageStore
from mllm.data.questions import open_questions
from mllm.encoders.registry import load_vision
from mllm.training.arguments import parse_train_arguments
from mllm.training.prepare import open_data

IMAGES = 160


def table(folder: Path, rows: list[dict[str, object]]) -> Path:
    """A JSONL file of captions; row i names an image of its own."""
    folder.mkdir()
    for row in rows:
        number = int(str(next(iter(row.values()))).removesuffix(".png"))
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(folder / f"{number}.png")
    (folder / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "my.jsonl"


def test_a_share_is_held_out_and_asked_for_with_all_its_captions(tmp_path: Path) -> None:
    path = table(tmp_path / "a", [{"image": f"{i}.png", "caption": [f"a {i}", f"b {i}"]} for i in range(IMAGES)])
    (tmp_path / "a" / "3.png").write_bytes(b"broken")
    store = open_store(path, None, held_out=0.2)
    assert isinstance(store, CaptionStore)
    assert store.test is not None
    assert len(store) + len(store.test) == IMAGES
    write_test(tmp_path / "run", store.test)
    questions, images = open_questions(tmp_path / "run" / TEST, tmp_path / "run" / TEST_IMAGES, None)
    assert images is not None
    trained = {store.read(record["image"]) for record in store.records()}
    for question in questions:
        (name,) = question.images
        number = int(np.asarray(images.load(name))[0, 0, 0])
        assert question.references == (f"a {number}", f"b {number}")
        assert images.read(name) not in trained
    left_out = (tmp_path / "a" / "3.png").read_bytes() not in trained  # it may be held out, and is not asked for then
    assert len(questions) == len(store.test) - left_out


def test_rows_of_one_image_are_one_question_and_long_captions_are_what_is_learned(tmp_path: Path) -> None:
    rows = [{"image": f"{i % 4}.png", "text": f"web {i}", "long": f"long {i}"} for i in range(8)]
    store = CaptionStore(table(tmp_path / "a", rows), test=str(tmp_path / "a" / "my.jsonl"))
    assert store.test is not None
    write_test(tmp_path, store.test)
    lines = read_json_records(tmp_path / TEST)
    assert [line["references"] for line in lines] == [[f"long {i}", f"long {i + 4}"] for i in range(4)]
    assert isinstance(ImageStore(tmp_path / TEST_IMAGES).load(lines[0]["image"]), Image.Image)


@pytest.mark.parametrize("kind", ["clips", "random"])
def test_fields_are_those_of_the_encoder_s_run(kind: str, tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "mine")
    config = tmp_path / "runs" / "mine" / "config.json"
    run = RunConfig.load(config)
    replace(run, data=replace(run.data, fields=Fields(image="Bild", web="Satz", long=""))).save(config)
    path = table(tmp_path / "a", [{"Bild": "0.png", "Satz": "eine Katze", "text": "no"}])
    vision = load_vision(f"{kind}:{tmp_path / 'runs' / 'mine'}")

    def caption(data: Path, *words: str) -> str:
        arguments = parse_train_arguments(["--stage", "1", "--data_path", str(data), "--held_out", "0", *words])
        store = open_data(arguments, vision)
        assert isinstance(store, CaptionStore)
        return next(store.records())["conversations"][1]["value"]

    assert caption(path) == "eine Katze"
    assert caption(path, "--fields", "web=text") == "no"
    assert caption(table(tmp_path / "b", [{"image": "0.png", "caption": "a cat"}])) == "a cat", "other data: guessed"
    with pytest.raises(UserError, match="--fields image=FIELD"):
        open_data(parse_train_arguments(["--stage", "1", "--data_path", str(path)]))
