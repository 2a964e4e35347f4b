"""Fields that hold a list: which caption a step draws, and what the long one is made of."""

import json
import random
from collections import Counter
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch
from bad_corpus import square
from conftest import tiny_run
from launched import write_shard, write_table

from clips.common.errors import BrokenDataError, UserError
from clips.config import OTHERS, Fields
from clips.data.check import check_pairs
from clips.data.dataset import Dataset, open_data
from clips.data.importing.layouts import warn_once
from clips.data.loader import make_loader
from clips.data.sample import Texts
from clips.data.sentences import split_sentences
from clips.data.splits import check_readable
from clips.data.tokenizer import build_tokenizer
from clips.evaluation.encode import ImageSet
from clips.evaluation.evaluate import retrieval_rows
from clips.evaluation.testsets import SourceSet
from clips.recipes import recipe
from mllm.data.captions import CaptionStore

FIVE = ("A dog runs", "Two dogs!", "a  DOG runs.", "A brown dog .", "Grass")


def shard(folder: Path, captions: list[object], key: str = "captions") -> Path:
    """A shard with a sample for each entry of `captions`."""
    images = [square(40 * i % 256) for i in range(len(captions))]
    texts = [{"json": json.dumps({key: value}).encode()} for value in captions]
    return write_shard(folder / "a.tar", list(zip(images, texts, strict=True)))


def opened(path: Path | str, *, need_long: bool = True, **fields: str) -> Dataset:
    return open_data(str(path), replace(Fields(), **fields), need_long=need_long)


def test_the_long_caption_is_the_others_and_never_the_web_caption() -> None:
    texts = Texts(FIVE, others=True)
    assert texts.pair(0) == ("A dog runs", "Two dogs! A brown dog . Grass.")
    assert texts.pair(1) == ("Two dogs!", "a  DOG runs. A brown dog . Grass.")
    assert len(split_sentences(texts.pair(1)[1] or "")) == 3
    own = Texts(("one",), ("Long a", "one.", "Long b."))
    assert own.pair() == ("one", "Long a. Long b.")
    assert Texts(("one",), ("one",)).pair() == ("one", "one"), "a single long caption is the user's own word"


@pytest.mark.usefixtures("own_cache")
def test_a_check_counts_what_a_step_would_cut(tmp_path: Path) -> None:
    """A step reads two of the others. All four would be too long for the captioner."""
    words = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    path = shard(tmp_path, [[f"{word} {words}" for word in ("a", "b", "c", "d", "e")]] * 3)
    run = recipe("small")
    data = replace(run.data, train=str(path), fields=Fields(web="json:captions", long=OTHERS))
    assert check_pairs(replace(run, data=data)).cut == {}


def test_draws_are_uniform_and_a_single_caption_takes_no_number() -> None:
    rng = random.Random(0)
    drawn = Counter(Texts(FIVE, others=True).draw(rng)[0] for _ in range(5000))
    assert all(abs(drawn[text] - 1000) < 150 for text in FIVE)
    long = Counter(Texts(("a", "b", "c", "d"), others=True).draw(rng) for _ in range(24_000))
    pairs = {(web, f"{first}. {second}.") for web, first, second in permutations("abcd", 3)}
    assert set(long) == pairs, "two of the others, in any order"
    assert all(abs(count - 1000) < 150 for count in long.values())
    assert Texts(("a", "A", "a.", "b"), others=True).draw(rng)[1] in ("b.", "a."), "never the web caption"
    of_two = Counter(Texts(("w", "v")).draw_one(rng, 0.2) for _ in range(3000))
    assert all(abs(of_two[text] - 1500) < 140 for text in "wv"), "five standard deviations of the binomial are 137"
    of_all = Counter(Texts(("w", "v"), ("l",)).draw_one(rng, 0.2) for _ in range(3000))
    assert all(abs(of_all[text] - 1000) < 150 for text in "wvl")
    before = rng.getstate()
    assert Texts(("w",), ("l",)).draw(rng) == ("w", "l")
    assert rng.getstate() == before
    paper = Counter(Texts(("w",), ("l",)).draw_one(rng, 0.2) for _ in range(3000))
    assert abs(paper["l"] - 600) < 120


def test_a_list_in_a_shard_is_guessed_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = opened(shard(tmp_path, [list(FIVE), ["only one"], ["x", 3], [None, " ", "a", "b"]]))
    assert "two of the others joined" in caplog.text
    assert source.captions(0) == Texts(tuple(FIVE), others=True)
    assert (len(source), source.read(1).web) == (2, "a")
    assert source.parts[0].facts["skipped"] == {"web caption is int, not text": 1}
    assert source.notes[-1].endswith("1 of 3 samples are skipped without a long caption")
    assert len(list(source.all_captions())) == 7


IMAGES, EACH = 12, 5


def write_rows(folder: Path, name: str, rows: list[dict[str, object]]) -> Path:
    """A table in the form that its name has in the wild, and its images."""
    path = folder / name
    for i in range(IMAGES):
        (folder / f"{i}.png").write_bytes(square(i))
    if name != "results.csv":
        return write_table(path, rows)
    lines = ["image_name| comment_number| comment"]  # Kaggle's Flickr30K
    lines += [f"{row['image']}| {row['number']}| {row['caption']}" for row in rows]
    path.write_text("\n".join([*lines, ""]))
    return path


@pytest.mark.parametrize("is_shuffled", [False, True])
@pytest.mark.parametrize(
    "name", ["captions.txt", "results.csv", "t.jsonl", "paths.parquet", "bytes.parquet", "l.jsonl"]
)
def test_the_rows_of_an_image_are_gathered(tmp_path, caplog, name, is_shuffled):
    """A row for each caption: no caption is lost, and no image is its own negative."""
    pairs = [(i, k) for i in range(IMAGES) for k in range(EACH)]
    random.Random(0).shuffle(pairs) if is_shuffled else None
    rows: list[dict[str, object]] = [
        {"image": f"{i}.png", "number": k, "caption": f'Größe "{i}", caption {k} .'} for i, k in pairs
    ]
    if name == "bytes.parquet":
        rows = [row | {"image": {"bytes": square(i), "path": None}} for row, (i, _) in zip(rows, pairs, strict=True)]
    if name == "l.jsonl":
        rows = [row | {"caption": [row["caption"], f"more {i} {k}"]} for row, (i, k) in zip(rows, pairs, strict=True)]
    path = write_rows(tmp_path, name, rows)
    for _ in range(2):  # the second time the index is there
        caplog.clear()
        warn_once.cache_clear()
        source = opened(path)
        assert f"{name}: {len(rows)} rows of {IMAGES} images: the captions of each are gathered" in caplog.text
        assert "two of the others joined" in caplog.text
    order = list(dict.fromkeys(i for i, _ in pairs))
    for number, i in enumerate(order):
        captions = [row["caption"] for row, (image, _) in zip(rows, pairs, strict=True) if image == i]
        flat = [text for cell in captions for text in (cell if isinstance(cell, list) else [cell])]
        sample = source.read(number)
        assert (sample.image, sample.texts) == (square(i), Texts(tuple(flat), others=True))
        assert source.captions(number) == sample.texts
    assert len(SourceSet(source).read(0).captions["sentence"]) == EACH
    assert len(opened(tmp_path)) == IMAGES, "by its folder"
    run = recipe("small")
    found = check_pairs(replace(run, data=replace(run.data, train=str(path))))
    assert (found.checked, found.faults.total()) == (IMAGES, 0)
    first = rows[0]["caption"]
    answer = next(CaptionStore(path).records())["conversations"][1]["value"]
    assert answer == (first[0] if isinstance(first, list) else first)


def test_long_captions_are_gathered_too(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"image": f"{i % 6}.png", "caption": f"w{i}", "long_caption": f"Long {i % 6} {i < 6}.", "label": i}
        for i in range(12)
    ]
    source = opened(write_rows(tmp_path, "t.csv", rows))
    assert source.captions(1) == Texts(("w1", "w7"), ("Long 1 True.", "Long 1 False."))
    assert source.read(1).extra == {"label": "1"}, "that of the first row"
    assert source.read(1).key == f"{tmp_path}/t.csv#1 (1.png)"


def test_a_drawn_web_caption_that_is_the_long_one_is_predicted_itself(tmp_path: Path) -> None:
    """The draw leaves no long caption, which ended the run, and each time that it went on."""
    rows: list[dict[str, object]] = [
        {"image": "0.png", "caption": web, "long_caption": "A long one."} for web in ("a dog", "A long one.")
    ]
    source = opened(write_rows(tmp_path, "t.csv", rows))
    assert source.captions(0).pair(1) == ("A long one.", None)
    tokenizer = build_tokenizer("wordpiece", ["a dog a long one."] * 4, vocab_size=64)
    run = tiny_run().override(["phases.0.samples=32"])
    drawn = set()
    for batch in make_loader(source, tokenizer, run, rank=0, world_size=1):
        for web, caption in zip(batch["web"], batch["caption"], strict=True):
            drawn.add((tokenizer.decode(web), tokenizer.decode(caption)))
    assert drawn == {("a dog", "a long one."), ("a long one.", "a long one.")}


def test_an_image_that_is_there_twice_by_accident(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is one sample, but the set is none of several captions: retrieval has no sentences."""
    rows: list[dict[str, object]] = [{"image": f"{i % 10}.png", "caption": f"w{i}"} for i in range(12)]
    rows += [{"image": "", "caption": "w"}] * 3
    path = write_rows(tmp_path, "t.csv", rows)
    source = opened(path, need_long=False)
    assert "t.csv: 12 rows of 10 images" in caplog.text
    assert source.captions(1) == Texts(("w1", "w11"))
    assert source.captions(2) == Texts(("w2",))
    with pytest.raises(UserError, match="no long captions"):
        opened(path)
    assert (len(source), source.skipped) == (10, (3, 15)), "rows without an image are counted, as rows"
    items = [SourceSet(source).read(i) for i in range(10)]
    assert sum(bool(item.captions["sentence"]) for item in items) == 2
    captions = [item.captions for item in items]
    images = ImageSet(torch.empty(10, 4), torch.empty(10, 4), captions, [None] * 10, list(range(10)), [])
    assert (retrieval_rows(images, "sentence"), len(retrieval_rows(images, "web"))) == ([], 10)


def test_rows_that_do_not_fit_are_a_share_of_rows(tmp_path: Path) -> None:
    """Flickr30K's results.csv has one. One of 61 rows is not one of 13 samples."""
    rows: list[dict[str, object]] = [
        {"image": f"{i}.png", "number": k, "caption": f"c {i} {k}"} for i in range(IMAGES) for k in range(EACH)
    ]
    path = write_rows(tmp_path, "results.csv", rows)
    path.write_text(path.read_text() + "1.png| 4   A dog runs across the grass .\n")
    source = opened(path)
    assert (len(source), source.skipped) == (IMAGES, (1, 61))
    check_readable(source, 0.02)
    with pytest.raises(BrokenDataError, match="1 of 61 rows"):
        check_readable(source, 0.01)
    run = recipe("small")
    with pytest.raises(BrokenDataError, match=r"are broken, 1\.6%"):
        check_pairs(replace(run, data=replace(run.data, train=str(path), max_broken_share=0.01)))
