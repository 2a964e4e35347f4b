"""The check finds what would stop a training; published data pass; captions that a model learns, and is measured on."""

from __future__ import annotations

import io
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import script_parser
from launched import write_shard
from PIL import Image
from tiny_mllm import write_run
from tiny_tokenizers import make_tokenizer

from clips import Fields, RunConfig
from clips.common.errors import UserError
from clips.common.escape import one_line
from clips.common.files import read_json_records
from mllm.data.captions import TEST, TEST_IMAGES, CaptionStore, open_store, write_test
from mllm.data.conversation import ConversationEncoder
from mllm.data.dataset import LlavaDataset
from mllm.data.images import ImageStore
from mllm.data.questions import open_questions
from mllm.encoders.load import load_vision
from mllm.training.build import data_of, open_data
from mllm.training.check_data import check_data, check_from_flags
from mllm.training.config import parse_stage

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


def test_everything_is_counted(data, encoder, capsys):
    with pytest.raises(UserError, match="6 sample"):
        check_data(data / "data.json", encoder, ImageStore(data / "images"))
    printed = capsys.readouterr().out
    counts = {kind: int(n) for n, kind in re.findall("([0-9]+) × (.*)", printed.partition("would be trained on")[0])}
    # 3 is cut; of 7, which is too long too, nothing that is trained is left
    faults = {"conversation": 2, "record": 1, "missing image": 2, "broken image": 1}
    assert counts.items() == (faults | {"cut: conversation": 1}).items()
    assert all(f"sample {i}" in printed for i in range(4, 10))
    assert "sample 7 (id s7): every label is masked" in printed
    shown = re.search("4 of 10 samples checked would be trained on. The first is\n(.*)", printed, re.DOTALL)[1]
    assert re.findall("⟦(.*?)⟧", shown) == ["A cat.<|im_end|>", "Left<|im_end|>"]  # exactly the trained tokens
    assert "[4 × <image>]" in shown
    found = check_data(data / "good.json", encoder, ImageStore(data / "images"), limit=2)
    assert (found.checked, found.faults) == (2, {})
    good = json.loads((data / "good.json").read_text())
    (data / "twice.json").write_text(json.dumps([*good, good[1]]))
    assert check_data(data / "twice.json", encoder, ImageStore(data / "images"), jobs=2).repeated == {"sample": 1}


def test_the_command_refuses_and_passes(data, tmp_path, capsys):
    tokenizer = make_tokenizer("gpt2")
    tokenizer.chat_template = None  # "auto" is v1 then, as in training
    tokenizer.save_pretrained(tmp_path / "llm")
    flags = ["--language-model", str(tmp_path / "llm"), "--image-folder", str(data / "images"), "--image-tokens", "4"]
    flags += ["--conversations"]
    with pytest.raises(UserError, match="would stop the training"):
        check_from_flags(script_parser("check_data").parse_args([*flags, str(data / "data.json")]))
    assert "format v1" in capsys.readouterr().out
    check_from_flags(script_parser("check_data").parse_args([*flags, str(data / "good.json")]))
    printed = capsys.readouterr()
    assert "4 of 4 samples checked would be trained on" in printed.out
    named = f"--align.data_path CAPTIONS --instruct.data_path {data / 'good.json'} --image_folder {data / 'images'}"
    assert named in printed.err, "stage 2 alone is refused in a run without a projector"
    assert f"--output_dir runs/llava-mine --small --model_name_or_path {tmp_path / 'llm'}" in printed.err
    (data / "odd.jsonl").write_text('{"image": "a.png", "alt words": "a dog"}\n')
    fields = ["--fields", "web=alt words"]
    check_from_flags(script_parser("check_data").parse_args([*flags, str(data / "odd.jsonl"), *fields]))
    assert "--fields 'web=alt words'" in capsys.readouterr().err


def test_what_the_check_finds_is_what_training_leaves_out(data, encoder, capsys):
    """The same code; an image that is there and cannot be decoded is found by the check alone."""
    bad = sample(10, None, "\ud83d what?", "x")
    questions = [
        sample(11, None, "Say it\n<image>", "x"),
        sample(12, None, "a"),
        sample(13, "\ud83d.png", "<image>", "x"),
    ]
    records = [*json.loads((data / "data.json").read_text()), bad, *questions]
    (data / "more.json").write_text(json.dumps(records))
    store = ImageStore(data / "images")
    with pytest.raises(UserError, match=r"10 sample.*mend or remove them$"):  # to skip would not save it
        check_data(data / "more.json", encoder, store)
    dataset = LlavaDataset(data / "more.json", encoder, store, "skip")
    faults = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sample ")]
    assert [one_line(problem["message"]) for problem in dataset.skipped] == [f for f in faults if "s5" not in f]
    assert {problem["index"] for problem in dataset.skipped} == {4, 6, 7, 8, 9, 10, 11, 12, 13}
    assert "surrogate" in faults[6]
    assert [len(dataset[i]["input_ids"]) > 0 for i in range(len(dataset))] == [True] * 5
    with pytest.raises(UserError, match=r"more\.json: 9 sample.* cannot .*--on_bad_sample skip:\n  sample 4 \(id s4\)"):
        LlavaDataset(data / "more.json", encoder, store)


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
    table(tmp_path / "a", rows)
    store = CaptionStore(table(tmp_path / "b", rows), test=str(tmp_path / "a" / "my.jsonl"))
    assert store.test is not None
    write_test(tmp_path, store.test)
    lines = read_json_records(tmp_path / TEST)
    assert [line["references"] for line in lines] == [[f"long {i}", f"long {i + 4}"] for i in range(4)]
    assert isinstance(ImageStore(tmp_path / TEST_IMAGES).load(lines[0]["image"]), Image.Image)


def test_a_test_that_holds_training_images_is_counted_and_refused(tmp_path: Path) -> None:
    """The plan called it held out. Images of a table are one by their path, those of shards by their bytes."""
    rows = [{"image": f"{i}.png", "caption": f"a {i}"} for i in range(8)]
    train, folder = table(tmp_path / "a", rows), tmp_path / "a"
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[6:]))
    with pytest.raises(UserError, match=r"test.jsonl: 2 of its 2 images are in \S+my.jsonl too: take them out"):
        CaptionStore(train, test=str(folder / "test.jsonl"))
    other = table(tmp_path / "b", rows)  # equal names in another folder
    assert CaptionStore(train, test=str(other)).test is not None
    entries = [
        {"filename": f"{i % 6}.png", "split": "test" if i > 5 else "train", "sentences": [{"raw": "a"}]}
        for i in range(9)
    ]
    (folder / "k.json").write_text(json.dumps({"images": entries}))
    with pytest.raises(UserError, match="3 of its 3 images"):
        CaptionStore(f"{folder}/k.json#train+restval", test=f"{folder}/k.json#test")
    samples = [((folder / f"{i}.png").read_bytes(), {"txt": b"a"}) for i in range(8)]
    train, test = write_shard(tmp_path / "train.tar", samples[:5]), write_shard(tmp_path / "test.tar", samples[4:])
    with pytest.raises(UserError, match="1 of its 4 images"):
        CaptionStore(train, test=str(test))


@pytest.mark.parametrize("kind", ["clips", "random"])
def test_fields_are_those_of_the_encoder_s_run(kind: str, tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "mine")
    config = tmp_path / "runs" / "mine" / "config.json"
    run = RunConfig.load(config)
    replace(run, data=replace(run.data, fields=Fields(image="Bild", web="Satz", long=""))).save(config)
    path = table(tmp_path / "a", [{"Bild": "0.png", "Satz": "eine Katze", "text": "no"}])
    vision = load_vision(f"{kind}:{tmp_path / 'runs' / 'mine'}")

    def caption(data: Path, *words: str) -> str:
        arguments = parse_stage(["--stage", "1", "--data_path", str(data), "--held_out", "0", *words])
        store = open_data(arguments, vision)
        assert isinstance(store, CaptionStore)
        return next(store.records())["conversations"][1]["value"]

    assert caption(path) == "eine Katze"
    assert caption(path, "--fields", "web=text") == "no"
    assert caption(table(tmp_path / "b", [{"image": "0.png", "caption": "a cat"}])) == "a cat", "other data: guessed"
    with pytest.raises(UserError, match="--fields image=FIELD"):
        open_data(parse_stage(["--stage", "1", "--data_path", str(path)]))


def test_karpathy_s_file_trains_and_its_test_split_is_described(tmp_path: Path) -> None:
    entries = [
        {"filename": f"{i}.png", "split": split, "sentences": [{"raw": f"a {i}"}, {"raw": f"b {i}"}]}
        for i, split in enumerate(("train", "restval", "val", "test"))
    ]
    table(tmp_path / "images", [{"image": f"{i}.png"} for i in range(4)])
    (tmp_path / "coco.json").write_text(json.dumps({"images": entries}))
    words = ["--stage", "2", "--karpathy", str(tmp_path / "coco.json"), "--image_folder", str(tmp_path / "images")]
    store = open_data(parse_stage(words))
    assert isinstance(store, CaptionStore)
    assert store.test is not None
    assert [record["conversations"][1]["value"] for record in store.records()] == ["a 0", "a 1"]
    write_test(tmp_path, store.test)
    assert [line["references"] for line in read_json_records(tmp_path / TEST)] == [["a 3", "b 3"]]


def record(name: str | None, *values: str) -> dict[str, Any]:
    return sample(0, name, *values) | {"id": Path(name or "i6IyJda_0").stem}


PRETRAIN = [  # liuhaotian/LLaVA-Pretrain: the image stands before or behind the words
    record("00453/004539375.jpg", "Render a clear and concise summary of the photo.\n<image>", "a mattress"),
    record("00211/002112457.jpg", "<image>\nWrite a terse but informative summary of the image.", "a dog"),
]
FOLDERS = ("gqa/images/2354786", "ocr_vqa/images/140031996X", "textvqa/train_images/011e7e629fb9ae7b")
SHORT = "<image>\nWhat is it?\nAnswer the question using a single word or phrase."
MIX = [  # liuhaotian/LLaVA-Instruct-150K, llava_v1_5_mix665k.json: five folders of images, and texts of ShareGPT
    record("coco/train2017/000000033471.jpg", "<image>\nWhat is it?", "A bus.", "Is it driving?", "Yes."),
    *(record(f"{name}.jpg", SHORT, "Tree") for name in (*FOLDERS, "vg/VG_100K/4", "vg/VG_100K_2/51")),
    record(None, "How to tell if a customer segment is well segmented?", "1. Homogeneity") | {"model": ""},
]


@pytest.mark.parametrize(
    ("stage", "file", "folder", "records"),
    [
        (1, "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", "LLaVA-Pretrain/images", PRETRAIN),
        (2, "llava_v1_5_mix665k.json", "", MIX),
    ],
)
def test_llavas_own_data(stage: int, file: str, folder: str, records: list[dict[str, Any]], tmp_path: Path) -> None:
    for name in (entry["image"] for entry in records if "image" in entry):
        path = tmp_path / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 8), "green").save(path)
    (tmp_path / file).write_text(json.dumps(records))

    words = ["--stage", str(stage), "--data_path", str(tmp_path / file), "--image_folder", str(tmp_path / folder)]
    data_path, image_folder = data_of(parse_stage(words))
    encoder = ConversationEncoder(make_tokenizer("gpt2"), "plain" if stage == 1 else "chatml", 4, 2048)
    store = ImageStore(str(image_folder))
    samples = list(LlavaDataset(data_path, encoder, store))
    assert [sample["images"] for sample in samples] == [[e["image"]] if "image" in e else [] for e in records]
    found = check_data(data_path, encoder, store)
    assert (found.checked, found.faults.total()) == (len(records), 0)
