"""Captions that a model learns: the share that it is measured on instead, and fields by the encoder's run."""

from __future__ import annotations

import io
import json
import random
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


@pytest.mark.parametrize("rows_per_image", [1, 5])
def test_a_share_is_held_out_by_image_and_asked_for_with_all_its_captions(rows_per_image: int, tmp_path: Path) -> None:
    captions = [f"{letter} {{}}" for letter in "abcde"]
    lists = [captions] if rows_per_image == 1 else [[caption] for caption in captions]
    rows = [
        {"image": f"{i}.png", "caption": [caption.format(i) for caption in of_row]}
        for i in range(IMAGES)
        for of_row in lists
    ]
    path = table(tmp_path / "a", random.Random(0).sample(rows, len(rows)))
    store = open_store(path, None, held_out=0.2)
    assert isinstance(store, CaptionStore)
    assert store.test is not None
    trained = {store.read(record["image"]) for record in store.records()}
    broken = store.test.read(0).image
    number = int(np.asarray(Image.open(io.BytesIO(broken)))[0, 0, 0])
    (tmp_path / "a" / f"{number}.png").write_bytes(b"broken")
    write_test(tmp_path / "run", store.test)
    questions, images = open_questions(tmp_path / "run" / TEST, tmp_path / "run" / TEST_IMAGES, None)
    assert images is not None
    for question in questions:
        (name,) = question.images
        number = int(np.asarray(images.load(name))[0, 0, 0])
        assert set(question.references) == {caption.format(number) for caption in captions}
        assert images.read(name) not in trained
    assert len(trained) + len(questions) + 1 == IMAGES, "the broken one is not asked for"
    few = table(tmp_path / "few", [{"image": f"{i}.png", "caption": f"a {i}"} for i in range(40)])
    whole = CaptionStore(few, held_out=0.2)
    assert (len(whole), whole.test) == (40, None)


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


def test_karpathy_s_file_trains_and_its_test_split_is_described(tmp_path: Path) -> None:
    entries = [
        {"filename": f"{i}.png", "split": split, "sentences": [{"raw": f"a {i}"}, {"raw": f"b {i}"}]}
        for i, split in enumerate(("train", "restval", "val", "test"))
    ]
    table(tmp_path / "images", [{"image": f"{i}.png"} for i in range(4)])
    (tmp_path / "coco.json").write_text(json.dumps({"images": entries}))
    words = ["--stage", "2", "--karpathy", str(tmp_path / "coco.json"), "--image_folder", str(tmp_path / "images")]
    store = open_data(parse_train_arguments(words).resolve(1))
    assert isinstance(store, CaptionStore)
    assert store.test is not None
    assert [record["conversations"][1]["value"] for record in store.records()] == ["a 0", "a 1"]
    write_test(tmp_path, store.test)
    assert [line["references"] for line in read_json_records(tmp_path / TEST)] == [["a 3", "b 3"]]
