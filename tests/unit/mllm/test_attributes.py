"""Attributes become questions: balance, counts, held-out rows, what is left out, hostile values, all layouts."""

import csv
import json
import random
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from conftest import script_parser
from pyarrow import parquet
from tiny_shop import make_image, products, write_hub, write_tar

from clips import Fields, is_of_demo, open_data
from clips.common.errors import UserError
from clips.common.files import STAMP, write_json
from mllm.chat import web
from mllm.chat.model import ChatModel
from mllm.data.attributes import SHORT, balanced_pairs, build_from_flags, describe, value_of
from mllm.data.images import ImageStore
from mllm.data.questions import read_questions
from mllm.model.load import FACTS, data_of
from mllm.training.finish import print_next, trained_on

FEW = ("--min-count", "2", "--per-kind", "40")


def build(out: Path, *words: str | Path) -> Path:
    build_from_flags(script_parser("build_questions").parse_args([*FEW, *map(str, words), "--output", str(out)]))
    return out


def turns(out: Path) -> list[tuple[str, str]]:
    """Every question of the training with its answer."""
    pairs = []
    for record in json.loads((out / "instruct.json").read_text()):
        values = [turn["value"] for turn in record["conversations"]]
        pairs += list(zip(values[::2], values[1::2], strict=True))
    return pairs


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "shop.tar", products(200))


def test_a_shard_becomes_conversations_and_a_test_without_a_copy_of_its_images(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("llava-out", "mine/export/hf_vit"):
        (tmp_path / "runs" / folder).mkdir(parents=True)
    flags = ("--held-out", "0.2", "--caption", "productDisplayName", "--ask", "articleType=What is sold?")
    out = build(tmp_path / "out", "--data", shop, *flags)
    printed = capsys.readouterr()
    assert f"{out}: align.json, instruct.json, manifest.json, question.jsonl" in printed.out
    (line,) = [line for line in printed.err.splitlines() if line.startswith("Next: ")]
    assert "--vision clips:runs/mine " in line, "it need not be of the objective clips"
    assert f"--output_dir runs/llava-out-2 --small --image_folder {shop} --align.data_path {out / 'align.json'}" in line
    assert line.endswith(f"--instruct.data_path {out / 'instruct.json'}")
    assert json.loads((out / "manifest.json").read_text())["images"] == dict.fromkeys(("train", "test"), str(shop))
    trains = {"instruct": {"trains": {"data_path": str(out / "instruct.json")}}}
    (tmp_path / "runs/llava-out/config.json").write_text(json.dumps(trains))
    print_next(2, Path("runs/llava-out"))
    measured = f"--model runs/llava-out/model --questions {out / 'question.jsonl'} --image-folder {shop}"
    assert f"Next: python scripts/evaluate_llava.py {measured}\n" in capsys.readouterr().err
    records = json.loads((out / "instruct.json").read_text())
    questions = read_questions(out / "question.jsonl")
    assert not list(out.glob("*.tar"))
    tested = {question.image for question in questions}
    trained = {record["image"] for record in records}
    assert not tested & trained
    store = ImageStore(shop)
    assert not any(store.problem(name) for name in tested | trained)

    first = [record["conversations"][0]["value"] for record in records]
    assert all(text.startswith("<image>\n") and text.endswith(SHORT) for text in first)
    assert len({text.split("\n")[1].split(" ")[-1] for text in first}) > 3, "another column begins at times"
    open_texts = {text.split("\n")[-2 if SHORT in text else 0] for text, answer in turns(out) if answer == "Casual"}
    assert open_texts == {"What is the usage?"}
    assert {q.text for q in questions if q.kind == "article_type"} == {f"What is sold?\n{SHORT}"}
    assert {q.kind for q in questions} == {"gender", "sub_category", "article_type", "base_colour", "usage", "yes_no"}
    align = json.loads((out / "align.json").read_text())
    assert len(align) == len(trained), "columns that predict each other are in conversations of their own"
    assert align[0]["conversations"][1]["value"].startswith("Acme ")

    answers = Counter(question.answer for question in questions if question.kind == "usage")
    assert answers["Casual"] > answers["Formal"] > 0, "as frequent as in the data"
    assert (
        f"always answering 'Casual' gets {answers['Casual'] / answers.total():.1%}" in (out / "summary.txt").read_text()
    )


def test_yes_and_no_say_nothing_without_the_image(shop: Path, tmp_path: Path) -> None:
    """Each value is asked about as often with yes as with no, also of a column that mostly has one value."""
    out = build(tmp_path / "out", "--data", shop, "--held-out", "0.4")
    for pairs in (turns(out), [(q.text, q.answer) for q in read_questions(out / "question.jsonl")]):
        counts = Counter((text.split("?")[0].split("\n")[-1], answer) for text, answer in pairs)
        texts = {text for text, answer in counts if answer in ("Yes", "No")}
        assert {"Is the usage Casual", "Is the base colour Navy Blue"} <= texts
        assert all(counts[text, "Yes"] == counts[text, "No"] > 0 for text in texts)
    rare = {number: "a" if number < 97 else "b" for number in range(100)}
    pairs = balanced_pairs(rare, random.Random(0))
    assert len(pairs) == 3
    assert all({rare[first], rare[second]} == {"a", "b"} for first, second in pairs)
    assert balanced_pairs(dict.fromkeys(range(5), "a"), random.Random(0)) == []


def test_held_out_rows_are_chosen_by_their_keys(tmp_path: Path) -> None:
    """Neither the seed nor the order of the rows moves a row; rows with one key stay together."""
    rows = products(120)
    for number, row in enumerate(rows):
        row["model"] = f"m{number // 4}"

    def tested(name: str, rows: list[dict[str, Any]], *words: str) -> set[str]:
        data = write_tar(tmp_path / f"{name}.tar", rows)
        out = build(tmp_path / name, "--data", data, "--held-out", "0.3", "--columns", "usage", *words)
        trained = {record["image"] for record in json.loads((out / "instruct.json").read_text())}
        return {f"{row['id']}.jpg" for row in rows} - trained

    by_image = tested("a", rows)
    assert 0.15 < len(by_image) / 120 < 0.45
    assert tested("b", rows[::-1], "--seed", "5") == by_image
    twice = build(tmp_path / "twice", "--data", tmp_path / "a.tar", "--columns", "usage", "usage")
    assert len({question.id for question in read_questions(twice / "question.jsonl")}) <= 2 * 40
    assert all(len(record["conversations"]) == 2 for record in json.loads((twice / "instruct.json").read_text()))
    models = Counter(rows[int(name[:-4]) - 15000]["model"] for name in tested("c", rows, "--key", "model"))
    assert models
    assert set(models.values()) == {4}


def test_one_image_is_in_one_split(tmp_path: Path) -> None:
    """A copy under another name in a tar, and a row for each of an image's captions in a table of images."""
    rows = products(90)
    for row in rows:
        row["copy_of"] = row["id"] - row["id"] % 3
    write_tar(tmp_path / "a.tar", rows, number="copy_of")
    in_table = [row | {"image": make_image(number=row["copy_of"])} for row in rows]
    parquet.write_table(pa.Table.from_pylist(in_table), tmp_path / "b.parquet")
    for data in ("a.tar", "b.parquet"):
        out = build(tmp_path / data.split(".")[0], "--data", tmp_path / data, "--pack", "--held-out", "0.3")
        copies = [Counter(images_of(out / f"{split}.tar")) for split in ("train", "test")]
        assert sum(sum(of_split.values()) for of_split in copies) == 90
        assert not copies[0].keys() & copies[1].keys()


def images_of(tar: Path) -> list[bytes]:
    store = ImageStore(tar)
    return [store.read(f"{number:08}.jpg") for number in range(len(open_data(str(tar), Fields(), need_long=False)))]


def test_a_model_of_these_questions_is_not_the_demos(shop, tmp_path, monkeypatch) -> None:
    """Every folder with a stamp was the demo's, so chat and page said that a shop's model knows drawings alone."""
    out = build(tmp_path / "out", "--data", shop, "--caption", "productDisplayName", "--pack")
    scenes = {"version": 1, "seed": 0, "image_size": 8, "sizes": {}}
    for name, built in (("demo", scenes), ("llava_demo", {"version": 1, "scenes": scenes, "align": 8})):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / STAMP, {"built": built})
    assert is_of_demo(str(tmp_path / "demo/train/0.tar"))
    assert not is_of_demo(f"{tmp_path}/demo/train;{out}/train.tar")
    shown: list[list[Any]] = []
    monkeypatch.setattr(web, "add_chat", lambda model, questions: (shown.append(questions), sys.exit()))
    monkeypatch.setattr(web, "demo_questions", lambda: ["of the demo"])
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # the page sets it
    for folder, learned in (("out", ["align.json", "instruct.json"]), ("llava_demo", ["demo"])):
        paths = {stage: f"{tmp_path}/{folder}/{stage}.json" for stage in ("align", "instruct")}
        (model := tmp_path / f"run-{folder}" / "model").mkdir(parents=True)
        write_json(model.parent / "config.json", {stage: {"trains": {"data_path": paths[stage]}} for stage in paths})
        write_json(model / "config.json", {})
        write_json(model / FACTS, {"trained_on": trained_on(model.parent)})
        assert data_of(model) == learned
        opened = SimpleNamespace(directory=model)
        assert ("drawings" in ChatModel.scope.fget(opened)) == (folder == "llava_demo")
        monkeypatch.setattr(web.ChatModel, "load", lambda *_, opened=opened: opened)
        with pytest.raises(SystemExit):
            web.launch(None, port=0)
    assert shown == [[], ["of the demo"]]


def test_a_test_that_was_trained_on_is_counted_and_refused(tmp_path: Path) -> None:
    rows = products(90)
    train = write_tar(tmp_path / "train.tar", [row | {"sku": f"s{row['id'] // 2}"} for row in rows[:60]])
    renamed = [row | {"id": row["id"] + 1000, "of": row["id"], "sku": f"s{row['id'] // 2}"} for row in rows[31:]]
    test = write_tar(tmp_path / "test.tar", renamed, number="of")
    words = ("--data", train, "--test-data", test, "--columns", "usage")
    with pytest.raises(
        UserError, match=r"--test-data: 29 of 59 are in --data too.* 16031.jpg is 15031.jpg.*--held-out"
    ):
        build(tmp_path / "out", *words)
    with pytest.raises(UserError, match=r"15 of 30 .* by their sku: "):
        build(tmp_path / "out", *words, "--key", "sku")
    with pytest.raises(UserError, match=r"--key: train has no column 'of'"):
        build(tmp_path / "out", *words, "--key", "of")
    assert not (tmp_path / "out").exists()
    build(tmp_path / "by_name", *words, "--key", "image")
    # The tars of --pack have the same names for other images.
    packed = build(tmp_path / "packed", "--data", train, "--pack")
    build(tmp_path / "again", "--data", packed / "train.tar", "--test-data", packed / "test.tar", "--columns", "usage")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--key gendr", "--key: train has no column 'gendr', did you mean gender"),
        ("--caption productName", "--caption: .*'productName', did you mean productDisplayName"),
        ("--pack --long {baseColor}.", "--long: .*'baseColor', did you mean baseColour"),
        ("--columns use", "--columns: .*'use', did you mean usage"),
        ("--ask color=Which?", "--ask: .*'color'"),
        ("--ask usage", "--ask 'usage': give COLUMN=TEXT"),
        ("--held-out 1", "--held-out 1.0"),
        ("--columns rare", "no question for the test"),
        ("--columns yes_no", "column yes_no .* the yes/no questions"),
        ("--columns base_colour baseColour", "column baseColour .* column base_colour"),
    ],
)
def test_what_would_falsify_the_test_is_refused(tmp_path: Path, words: str, message: str) -> None:
    rows = [row | {"yes_no": row["usage"], "base_colour": row["baseColour"]} for row in products(60)]
    for number, row in enumerate(rows):
        row["rare"] = number % 2 if number < 6 else None
    test = write_tar(tmp_path / "b.tar", products(80)[60:])
    with pytest.raises(UserError, match=message):
        build(tmp_path / "out", "--data", write_tar(tmp_path / "a.tar", rows), "--test-data", test, *words.split())
    assert not (tmp_path / "out").exists()


def test_the_same_flags_give_the_same_bytes_and_another_seed_others(shop: Path, tmp_path: Path) -> None:
    def files(name: str, *words: str) -> list[bytes]:
        out = build(tmp_path / name, "--data", shop, *words)
        return [(out / file).read_bytes() for file in ("instruct.json", "question.jsonl")]

    first = files("a")
    assert files("b") == first
    assert all(a != b for a, b in zip(files("c", "--seed", "1"), first, strict=True))
    before = (tmp_path / "a" / "instruct.json").stat().st_ino
    files("a")
    assert (tmp_path / "a" / "instruct.json").stat().st_ino == before, "it is there already"


HOSTILE = ["", "nan", "NaN", "n/a", "x" * 61, "<image>", "a <video>", "a\0b", "\ud800", float("nan"), None, ["a"], {}]


def test_what_is_left_out_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = products(60)
    for number, value in enumerate(HOSTILE):
        rows[number]["baseColour"] = value
    rows[20]["baseColour"] = "Taupe"
    rows[21]["baseColour"] = 'a "big"\n\tdot, so'
    rows[22]["baseColour"] = 'a "big" dot, so'
    data = write_tar(tmp_path / "a.tar", rows)
    test = write_tar(tmp_path / "b.tar", [row | {"id": row["id"] + 100} for row in rows])
    out = build(tmp_path / "out", "--data", data, "--test-data", test, "--columns", "baseColour", "gender")
    usual = 60 - len(HOSTILE) - 1
    counts = f"{usual} train and {usual} test rows; skipped 2 rare ones, {2 * len(HOSTILE)} without"
    assert f"column baseColour: 4 of 5 values in {counts}" in capsys.readouterr().out
    answers = {answer for _, answer in turns(out)}
    assert {'a "big" dot, so', "Men"} <= answers
    assert not answers & {"Taupe", "", "nan"}
    assert [value_of(value) for value in (2012.0, 0.5, 3, "نیم\u200cجا")] == ["2012", "0.5", "3", "نیم\u200cجا"]


def test_a_table_names_its_images_where_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = products(80)
    (tmp_path / "my images").mkdir()
    for row in rows:
        row["path"] = f"{row['id']}.png"
        if row["id"] != 15003:
            (tmp_path / "my images" / row["path"]).write_bytes(make_image("PNG", row["id"]))
    table = write_csv(tmp_path / "shop.csv", rows)
    out = build(tmp_path / "out", "--data", table, "--image-root", tmp_path / "my images")
    text = capsys.readouterr().out
    assert "skipped 1 rows without an image: missing image: '15003.png' is not in" in text
    assert "column productDisplayName:" in text
    assert "column id: 0 of" in text, "a value of its own in each row is no answer"
    assert "15003.png" not in (out / "instruct.json").read_text()
    odd = [row | {"image": {"bytes": value}} for row, value in zip(rows, ("text", 10**12), strict=False)]
    lines = [json.dumps(row) + "\n" for row in (*odd, *(row | {"image": row["path"]} for row in rows[4:]))]
    (tmp_path / "shop.jsonl").write_text("".join(lines))
    build(tmp_path / "odd", "--data", tmp_path / "shop.jsonl", "--image-root", tmp_path / "my images")
    assert "skipped 2 rows without an image" in capsys.readouterr().out, "what is no bytes is no image"
    with pytest.raises(UserError, match="image-root"):
        build(tmp_path / "none", "--data", table, "--image-root", tmp_path)
    with pytest.raises(UserError, match="shade"):
        build(tmp_path / "none", "--data", table, "--image-root", tmp_path / "my images", "--columns", "shade")
    with pytest.raises(UserError, match="--image COLUMN"):
        build(tmp_path / "none", "--data", write_csv(tmp_path / "b.csv", products(4)))


def test_a_column_of_yes_and_no_is_asked_as_a_sentence(tmp_path: Path) -> None:
    """ "Is the is legendary True?", with the answer Yes or No, is no English."""
    rows = [
        {"image": f"images\\{i}.png", "is_legendary": i % 3 == 0, "waterproof": ["yes", "No"][i % 2], "hasWings": i % 2}
        | {"legs": i % 2, "colour": ["red", "blue"][i % 2]}
        for i in range(60)
    ]
    (tmp_path / "images").mkdir()
    for i in range(60):
        (tmp_path / f"images/{i}.png").write_bytes(make_image("PNG", i))
    out = build(tmp_path / "out", "--data", write_csv(tmp_path / "t.csv", rows), "--held-out", "0.3")
    asked = {(question.removeprefix("<image>\n").partition("\n")[0], answer) for question, answer in turns(out)}
    for question in ("Is it legendary?", "Is it waterproof?", "Does it have wings?"):
        assert {answer for text, answer in asked if text == question} == {"Yes", "No"}
    assert ("What is the legs?", "1") in asked
    assert not any("true" in (text + answer).lower() or "is the is" in text.lower() for text, answer in asked)
    questions = read_questions(out / "question.jsonl")
    assert {q.answer for q in questions if q.kind == "is_legendary"} == {"Yes", "No"}
    rows = [row | {"image": f"C:\\pics\\{i}.png"} for i, row in enumerate(rows)]
    with pytest.raises(UserError, match="whole paths of another machine"):
        build(tmp_path / "none", "--data", write_csv(tmp_path / "w.csv", rows))


def test_the_hubs_tables_are_packed_for_both_halves(tmp_path: Path) -> None:
    """Images inside of two tables → one tar a split, which pretraining reads and LLaVA's files name."""
    hub = write_hub(tmp_path / "fashion", products(150))
    with pytest.raises(UserError, match="--pack"):
        build(tmp_path / "no", "--data", hub)
    long = "A {baseColour} {articleType} for {gender}, {usage}, {season} {year}."
    out = build(
        tmp_path / "out", "--data", hub, "--pack", "--caption", "productDisplayName", "--long", long, "--limit", "50"
    )
    for split, file in (("train", "instruct.json"), ("test", "question.jsonl")):
        store = ImageStore(out / f"{split}.tar")
        source = open_data(str(out / f"{split}.tar"), Fields(), need_long=True)
        sample = source.read(0)
        assert sample.web.startswith("Acme ")
        assert sample.long == describe(long, sample.extra)
        assert sample.long.endswith("Summer 2012.")
        text = (out / file).read_text()
        records = json.loads(text) if split == "train" else [json.loads(line) for line in text.splitlines()]
        assert all(store.load(record["image"]).size == (24, 32) for record in records)
    assert len(json.loads((out / "align.json").read_text())) == 50
    sizes = [len(open_data(str(out / f"{split}.tar"), Fields(), need_long=True)) for split in ("train", "test")]
    assert sum(sizes) == 150


def test_a_description_leaves_out_what_lacks() -> None:
    cells = {"colour": "blue", "kind": "shirt", "whom": "men", "use": None, "year": 2012.0}
    assert describe("A {colour} {kind} for {whom}, {use}, {year}.", cells) == "A blue shirt for men, 2012."
    assert describe("A {size} {kind}, {use}, {price}.", cells) == "A shirt."
