"""The pre-flight of pretraining data counts what is there, in bounded memory, and shows it without carrying it out."""

from __future__ import annotations

import io
import json
import random
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from bad_corpus import encode
from conftest import script_parser
from hostile import HOSTILE
from launched import pictures, recap, write_shard
from PIL import Image

from clips.common.errors import BrokenDataError, UserError
from clips.config import DataConfig, Fields, RunConfig, parse_mix
from clips.data import check
from clips.data.check import Distinct, check_from_flags, check_triples, reason_class, script_of, sketch
from clips.recipes import recipe


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPS_MLLM_CACHE", str(tmp_path / "cache"))


def run_on(train: object, **data: object) -> RunConfig:
    return replace(recipe("b16"), data=DataConfig(train=str(train), max_broken_share=data.pop("limit", 1.0), **data))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """300 samples: 10 cut off, 3 without a web caption, 20 of one web caption, 30 in Russian, 5 pictures twice."""
    samples = pictures(300)
    rows = []
    for i, (picture, web, long) in enumerate(samples):
        if i < 5:
            picture = samples[100 + i][0]
        picture = picture[:60] if 10 <= i < 20 else picture
        web = "" if 20 <= i < 23 else "stock photo" if 30 <= i < 50 else web
        long = f"Кот номер {i} спит." if 50 <= i < 80 else "word " * 500 if i == 90 else long
        rows.append((picture, recap(web, long)))
    write_shard(tmp_path / "data/0.tar", rows[:150])
    write_shard(tmp_path / "data/1.tar", rows[150:])
    return tmp_path / "data"


def test_everything_is_counted(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = check_triples(run_on(data), tmp_path / "out")
    assert (found["samples"], found["checked"], found["broken"]) == (300, 300, 13)
    assert found["reasons"] == {"image: image file is truncated": 10, "web caption is empty": 3}
    assert found["captions"]["web"]["captions"] == found["captions"]["long"]["captions"] == 297
    assert found["captions"]["long"]["longest"] == 500
    assert found["captions"]["long"]["beyond_room_share"] == pytest.approx(1 / 297)
    assert sum(found["captions"]["long"]["histogram"].values()) == 297
    assert found["long_with_one_sentence_share"] == pytest.approx(31 / 297)
    assert found["scripts"]["long"] == {"Latin": 267, "Cyrillic": 30}
    assert found["duplicates"]["picture"] == {"share": 5 / 297, "repeats": 5, "looked_at": 297, "of_hashes": 1.0}
    assert found["duplicates"]["look"]["repeats"] >= 5
    assert found["duplicates"]["web"]["repeats"] == 19
    assert found["shorter_side"]["32 – 64"] == found["aspect"]["1 – 1.34"] == 287
    assert json.loads((tmp_path / "out/summary.json").read_text()) == found
    said = capsys.readouterr().out
    for words in ("13 (4.33%)", "10 × image: image file is truncated", "Cyrillic 10.1%"):
        assert words in said
    page = (tmp_path / "out/contact_sheet.html").read_text()
    assert check.SHOWN - 13 <= page.count("data:image/png") <= check.SHOWN
    assert page.count('class="why"') == 4 + 3, "four of one reason are enough"
    assert "http" not in page.split("<main>")[1], "it stands alone"


@pytest.mark.slow
def test_processes_find_what_one_finds(data: Path, tmp_path: Path) -> None:
    alone = check_triples(run_on(data), tmp_path / "a", samples=200)
    assert alone["checked"] == 200
    assert check_triples(run_on(data), tmp_path / "b", samples=200, workers=2) == alone
    assert (tmp_path / "a/contact_sheet.html").read_text() == (tmp_path / "b/contact_sheet.html").read_text()
    assert check_triples(run_on(data), tmp_path / "a", samples=200, seed=1) != alone


def test_one_caption_and_the_next_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table told of long captions that are not there: "repeated 0.00%"."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "t.csv").write_text("datei;alt\na.png;a cat\nb.png;a dog\n")
    data = ["--recipe", "clip_baseline", "--data", str(tmp_path / "t.csv"), "--fields", "image=datei"]
    check_from_flags(script_parser("check_data").parse_args([*data, "--output", str(tmp_path / "out")]))
    said = capsys.readouterr()
    rows = [line.split("│")[1].strip() for line in said.out.splitlines() if line.startswith("│")]
    assert "long captions" in rows
    assert "scripts, web" in rows
    assert not {"scripts, long", "repeated long captions"} & set(rows)
    assert f"Next: python scripts/pretrain_clips.py --name mine {shlex.join(data)}\n" in said.err


def test_the_data_may_stand_without_their_flag_and_once(capsys: pytest.CaptureFixture[str]) -> None:
    parse = script_parser("check_data").parse_args
    assert parse(["--jobs", "2", "t.csv"]) == parse(["--data", "t.csv", "--jobs", "2"])
    for words in (
        [],
        ["a.csv", "--data", "b.csv"],
        ["--data", "a.csv", "--mix", "a=1:b"],
        ["a", "--conversations", "b"],
    ):
        with pytest.raises(SystemExit, match="2"):
            parse(words)
        assert re.search("DATA --data --mix --conversations is required|not allowed with", capsys.readouterr().err)


def test_the_exit_is_that_of_the_training(data: Path, tmp_path: Path) -> None:
    with pytest.raises(BrokenDataError, match=r"13 of 300 samples are broken, 4.3%") as raised:
        check_triples(run_on(data, limit=0.01), tmp_path / "out")
    assert raised.value.exit_code == 4
    assert re.search(r"first are\n  \S+\.tar#\d+: image: .*\n.*--set data\.max_broken_share", str(raised.value), re.S)
    assert json.loads((tmp_path / "out/summary.json").read_text())["broken"] == 13
    check_triples(run_on(data, limit=0.05), tmp_path / "out")


def test_rows_that_are_left_out_count_as_broken(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = ["image,web,long", *["a.png,w,l"] * 12, *["a.png,w, w,l"] * 3000]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    fields = Fields(image="image", web="web", long="long")
    for _ in range(2):
        with pytest.raises(BrokenDataError, match="3,000 of 3,012"):
            check_triples(run_on(tmp_path / "t.csv", fields=fields, limit=0.01), tmp_path / "out")


def test_what_would_stop_a_training_is_listed(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    names = ["a.png", "../b.png", "a.png", "/etc/passwd"]
    lines = [json.dumps({"image": name, "web": "w", "long": "l"}) for name in names]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    fields = Fields(image="image", web="web", long="long")
    with pytest.raises(UserError, match=r"(?s)t\.jsonl#1: .*\.\./b\.png.*t\.jsonl#3: .*/etc/passwd"):
        check_triples(run_on(tmp_path / "t.jsonl", fields=fields), tmp_path / "out")
    assert json.loads((tmp_path / "out/summary.json").read_text())["broken"] == 2


def test_a_mix_and_a_damaged_shard(data: Path, tmp_path: Path) -> None:
    cut = (data / "1.tar").read_bytes()[:-200_100]
    (tmp_path / "cut.tar").write_bytes(cut)
    mix = parse_mix([f"a=1:{data}/0.tar", f"b=2:{tmp_path}/cut.tar"])
    found = check_triples(run_on("mix", mix=mix), tmp_path / "out")
    assert 150 < found["checked"] < 300
    assert any("cut.tar: member" in problem and "cut off" in problem for problem in found["problems_of_shards"])
    assert "cut.tar" in (tmp_path / "out/contact_sheet.html").read_text()


def test_nothing_from_the_data_acts_on_the_page(tmp_path: Path) -> None:
    (picture, *_), texts = pictures(1)[0], list(HOSTILE.values())
    rows = [{"image": "a.png", "web": text, "long": text} for text in texts]
    (tmp_path / "a.png").write_bytes(picture)
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fields = Fields(image="image", web="web", long="long")
    found = check_triples(run_on(tmp_path / "t.jsonl", fields=fields), tmp_path / "out")
    assert found["broken"] == 0
    page = (tmp_path / "out/contact_sheet.html").read_text()
    assert "<script" not in page
    assert "<b>bold" not in page
    assert not any(character in page for character in "\x1b\x08\u202e")
    assert len(page) < 500_000


@pytest.mark.parametrize(
    ("script", "texts"),
    [
        ("Latin", ["a red cat", "Un été à 5 €", "ＦＵＬＬ", "𝐛𝐨𝐥𝐝"]),
        ("Cyrillic", ["красный кот, a cat"]),
        ("Han", ["一只红色的猫"]),
        ("Hiragana", ["ひらがな と カ"]),
        ("Hangul", ["한국어"]),
        ("Hebrew", ["שלום עולם"]),
        ("Arabic", ["مرحبا"]),
        ("none", ["12 – 34 !", "\ud800"]),
    ],
)
def test_scripts(script: str, texts: list[str]) -> None:
    assert {script_of(text) for text in texts} == {script}


def test_reasons_lose_what_belongs_to_one_sample() -> None:
    for one, other in (
        ("[Errno 2] No such file or directory: '/a/b.png'", "[Errno 2] No such file or directory: '/c/it s.png'"),
        ("9000 × 9000 pixels are above the limit of 64000000", "60000 × 60000 pixels are above the limit of 64000000"),
        ("cannot identify image file <_io.BytesIO object at 0x7f>", "cannot identify image file …"),
    ):
        assert reason_class(f"image: {one}") == reason_class(f"image: {other}")
    assert reason_class("web caption is empty") != reason_class("long caption is empty")


def test_pictures_that_look_alike_share_a_sketch() -> None:
    drawn = random.Random(0)
    alike = 0
    for _ in range(40):
        picture, other = (
            Image.frombytes("RGB", (4, 4), drawn.randbytes(48)).resize((120, 90), Image.Resampling.BICUBIC)
            for _ in range(2)
        )
        alike += sketch(picture) == sketch(Image.open(io.BytesIO(encode(picture.resize((90, 70)), "JPEG", quality=85))))
        assert sketch(picture) != sketch(other)
    assert alike >= 20
    assert sketch(Image.new("RGB", (50, 50), "red")) is None


def test_duplicates_are_estimated_in_bounded_memory() -> None:
    draw = random.Random(0)
    exact, bounded = Distinct(10**6), Distinct(1000)
    digests = [draw.getrandbits(64) for _ in range(40_000)]
    digests += digests[:10_000] + digests[:5_000]
    for index, digest in enumerate(digests):
        exact.add(digest, index)
        bounded.add(digest, index)
    assert exact.summary() == {"share": 15 / 55, "repeats": 15_000, "looked_at": 55_000, "of_hashes": 1.0}
    found = bounded.summary()
    assert len(bounded.first) <= 1000
    assert found["of_hashes"] in (1 / 64, 1 / 32)
    assert found["share"] == pytest.approx(15 / 55, abs=0.06)
