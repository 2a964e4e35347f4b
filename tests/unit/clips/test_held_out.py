"""A share is held out by image, whatever rows, keys and order a set has; the check of pairs counts what is there."""

import json
import os
import random
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bad_corpus import encode
from conftest import random_model, script_parser, tiny_run
from launched import make_images, recap, write_shard, write_table
from PIL import Image

from clips.common import rundir
from clips.common.errors import BrokenDataError, CommandError, UserError
from clips.common.files import write_json
from clips.common.preflight import check
from clips.config import DataConfig, Fields, MixPart, RunConfig
from clips.data.check import check_pairs
from clips.data.dataset import Dataset, open_data
from clips.data.splits import held_out_images, open_split, split_spec
from clips.data.tokenizer import build_tokenizer
from clips.evaluation.evaluate import evaluate_from_flags
from clips.evaluation.testsets import SourceSet, count_trained_on
from clips.recipes import recipe
from clips.training.cli import config_from_flags, parser
from clips.training.prepare import same_data
from clips.weights.export import write_native
from mllm.data.captions import CaptionStore

pytestmark = pytest.mark.usefixtures("own_cache")
Row = tuple[int, str]
"""The number of an image, and one of its captions."""
IMAGES = 200


def make_image(i: int) -> bytes:
    return encode(Image.new("RGB", (8, 8), (i % 256, i // 256, 7)))


def layout(captions: int, order: str, images: int = IMAGES) -> list[Row]:
    rows = [(i, f"{i} {k}") for i in range(images) for k in range(captions)]
    if order == "one missing in every tenth":
        rows = [(i, text) for i, text in rows if captions == 1 or i % 10 or not text.endswith(" 0")]
    if order == "shuffled":
        random.Random(0).shuffle(rows)
    return rows


def csv_of_paths(folder: Path, rows: list[Row]) -> Path:
    """Every second row names its image in another way."""
    (folder / "images").mkdir(exist_ok=True)
    for i in {i for i, _ in rows}:
        (folder / f"images/{i}.png").write_bytes(make_image(i))
    named = [{"image": f"{'./' * (k % 2)}images/{i}.png", "text": text} for k, (i, text) in enumerate(rows)]
    return write_table(folder / "t.csv", named)


def parquet_of_bytes(folder: Path, rows: list[Row]) -> Path:
    return write_table(folder / "t.parquet", [{"image": make_image(i), "text": text} for i, text in rows])


def tar_of_members(folder: Path, rows: list[Row]) -> Path:
    return write_shard(folder / "t.tar", [(make_image(i), {"txt": text.encode()}) for i, text in rows])


def sides(data: DataConfig) -> dict[str, set[bytes]]:
    """The images of training and validation, by their bytes."""
    splits = {split: open_split(data, split, need_long=False) for split in ("train", "val")}
    return {split: {part.read(i).image for i in range(len(part))} for split, part in splits.items()}


@pytest.mark.parametrize("write", [csv_of_paths, parquet_of_bytes, tar_of_members])
def test_no_image_is_on_both_sides(write, tmp_path: Path) -> None:
    held_out = []
    for captions in (1, 5, 6):
        for order in ("in order", "shuffled", "one missing in every tenth"):
            folder = tmp_path / f"{captions} {order}"
            folder.mkdir()
            data = DataConfig(train=str(write(folder, layout(captions, order))), held_out=0.1)
            images = sides(data)
            assert not images["train"] & images["val"]
            assert images["train"] | images["val"] == {make_image(i) for i in range(IMAGES)}
            assert 0.05 * IMAGES < len(images["val"]) < 0.15 * IMAGES
            assert held_out_images(data)[1].startswith(f"{len(images['val'])} of {IMAGES} images held out")
            held_out.append(images["val"])
    assert all(other == held_out[0] for other in held_out), "rows and their order change nothing"


def test_a_check_counts_copies_under_other_names(tmp_path: Path) -> None:
    table = csv_of_paths(tmp_path, layout(1, "in order", 20))
    for i in range(3):
        shutil.copy(tmp_path / f"images/{10 + i}.png", tmp_path / f"images/{i}.png")
    assert check_pairs(replace(run_on(table), task=recipe("small_clip").task)).repeated == {"image": 3}


def test_added_images_move_no_other_into_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clips.data.splits.MOST_HELD_OUT", 25)
    held_out = []
    for images in (200, 300, 400):
        (folder := tmp_path / str(images)).mkdir()
        data = DataConfig(train=str(csv_of_paths(folder, layout(2, "in order", images))), held_out=0.1)
        held_out.append(sides(data)["val"])
        known = {make_image(i) for i in range(images - 100)}
        assert images == 200 or held_out[-1] & known <= held_out[-2]
    assert len(held_out[-1]) == 25


def test_tables_in_two_folders_and_samples_without_a_long_caption(tmp_path: Path) -> None:
    csv_of_paths(tmp_path, layout(1, "in order"))
    table = (tmp_path / "t.csv").read_text().replace("images/", "").replace("./", "")
    (tmp_path / "images" / "t.csv").write_text(table)
    images = sides(DataConfig(train=f"{tmp_path}/t.csv;{tmp_path}/images/t.csv", held_out=0.1))
    assert len(images["train"]) + len(images["val"]) == IMAGES

    texts = [recap(f"w {i}", "Long one.") for i in range(IMAGES)]
    for text in texts[::3]:
        del text["txt"]
    write_shard(tmp_path / "l.tar", [(make_image(i), text) for i, text in enumerate(texts)])
    data = DataConfig(train=str(tmp_path / "l.tar"), held_out=0.1)
    train, val = open_split(data, "train", need_long=True), open_split(data, "val", need_long=False)
    keys = {split: {part.read(i).key for i in range(len(part))} for split, part in (("t", train), ("v", val))}
    assert not keys["t"] & keys["v"]
    assert len(train) < 2 * IMAGES / 3 < len(train) + len(val)


def test_rows_with_equal_keys_are_on_one_side(tmp_path: Path) -> None:
    """Front and back of one thing were on both sides, and validation chose what had learned by heart."""
    csv_of_paths(tmp_path, layout(1, "in order"))
    rows = [{"image": f"images/{i}.png", "text": f"t {i // 2}", "article": {"id": i // 2}} for i in range(IMAGES)]
    samples = [
        (make_image(i), {"txt": b"t", "json": f'{{"article": {{"id": {i // 2}}}}}'.encode()}) for i in range(IMAGES)
    ]
    held_out = []
    for table in (write_table(tmp_path / "t.jsonl", rows), write_shard(tmp_path / "t.tar", samples)):
        data = DataConfig(train=str(table), held_out=0.1, key="article.id")
        images = sides(data)
        things = [{i // 2 for i in range(IMAGES) if make_image(i) in images[split]} for split in ("train", "val")]
        assert not things[0] & things[1]
        assert held_out_images(data)[1].startswith(f"{len(things[1])} of 100 values of 'article.id' held out, ")
        held_out.append(things[1])
        with pytest.raises(UserError, match=r"--key 'id' is not among .*article.id"):
            sides(replace(data, key="id"))
    assert held_out[0] == held_out[1]
    store = CaptionStore(table, held_out=0.1, key="article.id")
    assert len(store.facts["held_out"]) == len(held_out[1]), "LLaVA's captions are held out alike"
    flags = ["--data", str(table), "--key", "article.id"]
    assert config_from_flags(parser().parse_args(flags), {}).data.key == "article.id"
    with pytest.raises(UserError, match="held_out"):
        config_from_flags(parser().parse_args([*flags, "--val-data", str(table)]), {})


def test_few_images_and_a_mix_hold_nothing_out(tmp_path: Path) -> None:
    data = DataConfig(train=str(csv_of_paths(tmp_path, layout(5, "shuffled", 8))), held_out=0.05)
    assert len({s.read(i).image for s in [open_split(data, "train", need_long=False)] for i in range(len(s))}) == 8
    assert split_spec(data, "val") is None
    assert held_out_images(data)[1] == "no image is held out of 8 images, fewer than 100 (--val-data gives others)"
    (tmp_path / "many").mkdir()
    many = csv_of_paths(tmp_path / "many", layout(1, "in order"))
    mix = replace(data, train="mix", mix=(MixPart(name="a", share=1, data=str(many)),))
    assert len(open_split(mix, "train", need_long=False)) == IMAGES


def test_a_folder_that_moves_keeps_its_hashes_and_sides(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    table = csv_of_paths(tmp_path / "here", layout(2, "shuffled"))
    data = [
        DataConfig(train=str(folder / table.name), held_out=0.1)
        for folder in (table.parent, shutil.copytree(table.parent, tmp_path / "there"))
    ]
    assert sides(data[0]) == sides(data[1])
    numbers = [open_split(other, "train", need_long=False).metadata() | {"manifest": None} for other in data]
    assert numbers[0] == numbers[1]
    with table.open("a") as file:
        file.write("images/0.png,one more\n")
    assert open_split(data[0], "train", need_long=False).metadata()["captions_sha256"] != numbers[0]["captions_sha256"]


@pytest.mark.parametrize("kind", ["csv", "folder", "tar", "karpathy"])
def test_changed_data_of_equal_size_is_other_data(kind: str, tmp_path: Path) -> None:
    """Lines in another order, exchanged captions, one image for another: as many samples in as many bytes."""
    texts = {"a.png": "one cat", "b.png": "two dog"}
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(make_image(0))

    def written(texts: dict[str, str]) -> Dataset:
        spec = tmp_path
        if kind == "csv":
            spec = write_table(tmp_path / "t.csv", [{"image": name, "text": text} for name, text in texts.items()])
        elif kind == "tar":
            samples = [
                (make_image(0), {"txt": text.encode() + b"!" * (name == "c.png")}) for name, text in texts.items()
            ]
            spec = write_shard(tmp_path / "t.tar", samples)
        elif kind == "karpathy":
            images = [{"filename": name, "split": "train", "sentences": [{"raw": texts[name]}]} for name in texts]
            (tmp_path / "k.json").write_text(json.dumps({"images": images}))
            spec = f"{tmp_path}/k.json#train"
        else:
            for name in ("a.png", "b.png", "c.png"):
                (tmp_path / name).with_suffix(".txt").unlink(missing_ok=True)
            for name, text in texts.items():
                (tmp_path / name).with_suffix(".txt").write_text(text)
        return open_data(str(spec), Fields(), need_long=False)

    exchanged = dict(zip(texts, reversed(texts.values()), strict=True))
    changes = {"captions, images": dict(reversed(texts.items())), "captions": exchanged}
    changes["images" if kind != "tar" else "captions"] = {"a.png": "one cat", "c.png": "two dog"}
    began = written(texts)
    write_json(tmp_path / rundir.DATA, began.metadata())
    same_data(tmp_path, written(texts))
    for differs, change in changes.items():
        if kind in ("csv", "karpathy") or differs in ("captions", "images"):
            with pytest.raises(UserError, match=f"other data; what differs: {differs}. Give another --name"):
                same_data(tmp_path, written(change))
    before = written(texts)
    for listing, said in ((before.listing(), None), ("0", "began with 2 samples, before data were imported")):
        write_json(tmp_path / rundir.DATA, {"samples": 2, "files": 1, "sha256": listing, "contents": "0"})
        with pytest.raises(UserError, match=said) if said else nullcontext():
            same_data(tmp_path, before)


def test_a_run_goes_on_if_a_row_that_was_never_usable_is_corrected(tmp_path: Path) -> None:
    """It could not: the corrected table was other data, and the bad row ended the run again."""
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(make_image(i))

    def written(*names: str, text: str = "w") -> Dataset:
        rows = [{"image": name, "text": text} for name in names]
        return open_data(str(write_table(tmp_path / "t.csv", rows)), Fields(), need_long=False)

    began = written("0.png", "../1.png", "2.png")
    write_json(tmp_path / rundir.DATA, began.metadata())
    corrected = written("0.png", "1.png", "2.png")
    assert len(corrected) == 3
    goes_on = same_data(tmp_path, corrected)
    assert [goes_on.read(i).image for i in range(len(goes_on))] == [make_image(0), make_image(2)]
    for names, text, differs in (
        (("0.png", "1.png", "2.png"), "v", "captions"),
        (("0.png", "../1.png", "1.png"), "w", "images"),
        (("0.png",), "w", r"the number of samples \(2 before, 1 now\), captions, images"),
    ):
        with pytest.raises(UserError, match=f"what differs: {differs}. "):
            same_data(tmp_path, written(*names, text=text))


def run_on(train: object, **data: object) -> RunConfig:
    return replace(recipe("b16"), data=DataConfig(train=str(train), max_broken_share=data.pop("limit", 1.0), **data))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """300 samples: 10 cut off, 3 without a web caption, 20 of one web caption, a long one, 5 images twice."""
    samples = make_images(300)
    rows = []
    for i, (image, web, long) in enumerate(samples):
        if i < 5:
            image = samples[100 + i][0]
        image = image[:60] if 10 <= i < 20 else image
        web = "" if 20 <= i < 23 else "stock photo" if 30 <= i < 50 else web
        rows.append((image, recap(web, "word " * 500 if i == 90 else long)))
    write_shard(tmp_path / "data/0.tar", rows[:150])
    write_shard(tmp_path / "data/1.tar", rows[150:])
    return tmp_path / "data"


@pytest.mark.parametrize("jobs", [1, 2])
def test_everything_is_counted(data: Path, jobs: int, capsys: pytest.CaptureFixture[str]) -> None:
    found = check_pairs(run_on(data, held_out=0.05), jobs=jobs)
    assert (found.checked, found.faults) == (297, {"image": 10})
    assert found.cut == {"long caption": 1}
    assert found.repeated == {"web caption": 19, "image": 5}
    printed = capsys.readouterr().out
    assert printed.count("image: image file is truncated") == 10
    assert "10 × image" in printed
    assert printed.count("web caption is empty") == 3
    assert "287 of 297 samples checked would be trained on. The first is\n  data/0.tar#00000" in printed.replace(
        f"{data.parent}/", ""
    )
    assert check_pairs(run_on(data), limit=200, jobs=jobs).checked == 200


def test_a_wrong_field_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A failing guess printed 100 equal lines, and the advice to train on broken samples alone."""
    csv_of_paths(tmp_path, layout(1, "in order"))
    wrong = write_table(tmp_path / "w.jsonl", [{"image": f"images/{i}.png", "text": i} for i in range(IMAGES)])
    run = replace(recipe("small_clip"), data=DataConfig(train=str(wrong)))
    with pytest.raises(BrokenDataError, match=r"(?s)200 of 200 .* --fields") as refused:
        check_pairs(run)
    assert "max_broken_share=" not in str(refused.value)
    assert str(refused.value).count("web caption is int") == 2, "the first row, and the count of all"
    assert capsys.readouterr().out == ""


def test_a_process_that_dies_is_one_sentence() -> None:
    with pytest.raises(CommandError, match="fewer than --jobs 2"):
        check(lambda _: os._exit(1), range(9), 2)


def test_evaluation_takes_the_held_out_images_and_counts_those_trained_on(tmp_path, capsys) -> None:
    """The run's own table was measured without a word, and its held-out images were no default."""
    table = csv_of_paths(tmp_path, layout(1, "in order"))
    tokenizer = build_tokenizer("wordpiece", ["0 1 2 3 4 5 6 7 8 9"], vocab_size=64)
    run = replace(tiny_run(), data=DataConfig(train=str(table), held_out=0.1, workers=0))
    write_native(random_model(run), run, tokenizer, tmp_path / "native")
    held_out = len(sides(run.data)["val"])

    def evaluated(*flags: str) -> dict[str, Any]:
        words = ["--model", str(tmp_path / "native"), "--output", str(tmp_path / "out.json"), "--batch-size", "99"]
        evaluate_from_flags(script_parser("evaluate_clips").parse_args([*words, *flags]))
        return json.loads((tmp_path / "out.json").read_text())

    default = evaluated()
    assert (default["test_set"], default["metrics"]["web_i2t_r1"]["items"]) == ("val", held_out)
    assert default["trained_on"] == 0
    assert "no test data" in capsys.readouterr().err
    copy = tmp_path / "elsewhere"  # by bytes, whatever the files are called
    copy.mkdir()
    shutil.copy(tmp_path / "images/1.png", copy / "7.png")
    (copy / "new.png").write_bytes(make_image(IMAGES))
    write_table(copy / "t.csv", [{"image": name, "text": f"a {name}"} for name in ("7.png", "new.png")])
    assert evaluated("--data", str(copy / "t.csv"))["trained_on"] == (1 - (make_image(1) in sides(run.data)["val"]))
    assert evaluated("--data", str(table))["trained_on"] == IMAGES - held_out
    assert f"trained on {IMAGES - held_out} of these {IMAGES} images" in " ".join(capsys.readouterr().out.split())


REMOTE = "http://127.0.0.1:1/x.tar"


@pytest.mark.parametrize(
    "data",
    [
        {"train": REMOTE},
        {"train": f"here.tar;{REMOTE}"},
        {"train": "hf:me/set"},
        {"train": "mix", "mix": tuple(MixPart(name=name, share=1, data=name) for name in ("a.tar", REMOTE))},
    ],
)
def test_training_data_elsewhere_are_not_opened_to_be_counted(data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network it took minutes, and then the measured metrics were lost."""
    monkeypatch.setattr("clips.evaluation.testsets.open_split", lambda *_, **__: pytest.fail("they are opened"))
    assert count_trained_on(DataConfig(**data), []) == 0


def test_training_data_that_cannot_be_read_cost_no_evaluation(tmp_path: Path) -> None:
    table = csv_of_paths(tmp_path, layout(1, "in order", 3))
    items = SourceSet(open_data(str(table), Fields(), need_long=False))
    assert count_trained_on(DataConfig(train=str(table)), items) == 3
    outside = write_table(tmp_path / "o.csv", [{"image": "../0.png", "text": "t"}])
    assert count_trained_on(DataConfig(train=str(outside)), items) == 0
