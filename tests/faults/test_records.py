"""Faults in images, shards, records and paths, through the real commands: skipped, counted, bounded, or refused."""

import io
import json
import os
import re
import tarfile
import zlib
from pathlib import Path

import bad_corpus
import numpy as np
import pytest
from bad_corpus import encode, png, with_scans
from conftest import ROOT, run_python
from launched import SCRIPT, assert_said, lines, make_images, python, recap, run, run_all, trace, write_shard
from PIL import Image

from clips.data.images import decode_image

pytestmark = pytest.mark.slow
PAIRS = [(image, recap(web, long)) for image, web, long in make_images(400)]


def append(shard: Path, name: str, data: bytes = b"", **fields: object) -> None:
    with tarfile.open(shard, "a") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        for field, value in fields.items():
            setattr(info, field, value)
        tar.addfile(info, io.BytesIO(data))


def test_row_17_damaged_shards_are_named_and_their_good_samples_used(tmp_path: Path) -> None:
    data = tmp_path / "data"
    damaged = write_shard(data / "damaged.tar", PAIRS[:40])
    content = bytearray(damaged.read_bytes())
    with tarfile.open(damaged) as tar:
        place = next(member.offset for member in tar if member.name == "00020.json")
    content[place : place + 512] = os.urandom(512)
    damaged.write_bytes(content)
    cut = write_shard(data / "cut.tar", PAIRS[40:80])
    with tarfile.open(cut) as tar:
        place = next(member.offset_data for member in tar if member.name == "00030.txt")
    cut.write_bytes(cut.read_bytes()[: place + 5])
    incomplete = [(image, {"json": rest["json"]} if i == 7 else rest) for i, (image, rest) in enumerate(PAIRS[80:120])]
    write_shard(data / "incomplete.tar", incomplete)
    append(write_shard(data / "twice.tar", PAIRS[120:160]), "00003.txt", b"another caption")
    done = run(train(tmp_path, "r", data))
    assert_said(
        done, 0,
        "damaged.tar: damaged at byte", "after member 00020.txt",
        "cut.tar: member 00030.txt is cut off",
        "2 of 151 rows are skipped (2 no web caption); the first is 00030",
        "1 of 149 samples are skipped without a long",
        "twice.tar: member 00003.txt appears twice",
        f"{39 + 30 + 39 + 40} samples",
    )  # fmt: skip
    assert lines(tmp_path / "r", "skipped.jsonl") == []


def test_row_18_bad_records_are_skipped_counted_and_listed_before_a_run(tmp_path: Path) -> None:
    bad: dict[int, tuple[str, dict[str, bytes]]] = {
        30: ("json: bad JSON", {"json": b'{"org_caption": "w'}),
        80: ("json: bad JSON", {"json": '{"org_caption": "é"}'.encode("latin-1")}),
        130: ("web caption is empty", {"json": b'{"org_caption": null}'}),
        180: ("web caption is empty", {"json": b'{"org_caption": ""}'}),
        230: ("txt: not UTF-8", {"txt": "é".encode("latin-1")}),
    }
    samples = [(image, rest | bad.get(i, ("", {}))[1]) for i, (image, rest) in enumerate(PAIRS[:300])]
    write_shard(tmp_path / "data/0.tar", samples)
    data, limit = tmp_path / "data", ("--samples", "296", "--set", "data.max_broken_share=0.02")
    commands = {"run": train(tmp_path, "r", data, *limit), "stopped": train(tmp_path, "s", data)}
    done = run_all(commands | {"check": python("scripts/check_data.py", "--data", data)})
    assert_said(done["run"], 0, "5 of 300 rows are skipped (2 json, 2 web caption is empty, 1 txt)")
    assert lines(tmp_path / "r", "skipped.jsonl") == [], "none is met"
    assert_said(done["stopped"], 4, "5 of 300 rows cannot be used, 1.7%: above data.max_broken_share = 1.0%")
    assert not lines(tmp_path / "s")
    assert_said(done["check"], 4, "5 of 300 samples are broken, 1.7%", "data.max_broken_share = 1.0%")
    for place, (reason, _) in bad.items():
        assert all(f"0.tar#{place:05d}: {reason}" in done[name].text for name in ("check", "stopped"))


def test_row_18_a_row_that_leads_out_is_told_at_the_import_and_the_run_ends_well(tmp_path: Path) -> None:
    """It ended the run when its step came, and each time that the run went on."""
    rows = []
    for i, (image, rest) in enumerate(PAIRS[:200]):
        (tmp_path / f"{i}.png").write_bytes(image)
        rows.append({"image": f"{i}.png", "web": f"photo {i}", "long": rest["txt"].decode()})
    rows[100]["image"] = "../x.png"
    for name, some in (("train", rows), ("val", rows[:8])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    fields = ("--fields", "image=image", "web=web", "long=long", "--samples", "200")
    done = run(train(tmp_path, "r", tmp_path / "train.jsonl", "--val-data", tmp_path / "val.jsonl", *fields))
    assert_said(done, 0, "1 of 200 rows are skipped (1 image outside); the first is 100: image outside: '../x.png'")
    assert lines(tmp_path / "r", "skipped.jsonl") == []
    assert trace(tmp_path / "r")[-1]["samples"] == 200


def test_row_19_paths_that_climb_out_are_refused(tmp_path: Path) -> None:
    image = PAIRS[0][0]
    (tmp_path / "secret.png").write_bytes(image)
    members = {
        "climbing": ({}, "../00099.png"),
        "absolute": ({}, "/etc/00099.png"),
        "symbolic": ({"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "00099.png"),
        "hard": ({"type": tarfile.LNKTYPE, "linkname": "../secret.png"}, "00099.png"),
    }
    commands = {}
    for name, (fields, member) in members.items():
        shard = write_shard(tmp_path / f"{name}/0.tar", PAIRS[:20])
        append(shard, member, b"" if fields else image, **fields)
        commands[name] = train(tmp_path / "runs", name, shard)
    reasons = {
        "climbing": "'../00099.png' points outside", "absolute": "'/etc/00099.png' points outside",
        "symbolic": "is a link", "hard": "is a link",
    }  # fmt: skip
    for name, done in run_all(commands).items():
        assert_said(done, 2, reasons[name])
        assert not lines(tmp_path / "runs" / name), "nothing was trained on"


def train(out: Path, name: str, data: Path, *flags: str) -> list[str]:
    fixed = ("--recipe", "demo", "--set", "train.precision=fp32", "train.log_every=1")
    return python(SCRIPT, "--debug", "--data", data, "--output", out, "--name", name, *flags, *fixed)


def test_row_14_broken_images_are_skipped_counted_and_replaced_alike(tmp_path: Path) -> None:
    """Three of 400, in one epoch: any number of workers takes the same substitutes and trains to the same losses."""
    samples = list(PAIRS)
    faults = {20: b"", 121: samples[121][0][:60], 222: samples[222][0][:40] + bytes(200)}
    for place, data in faults.items():
        samples[place] = (data, samples[place][1])
    write_shard(tmp_path / "data/0.tar", samples)
    seen = ("--samples", "400")
    commands = {
        name: train(tmp_path, name, tmp_path / "data", *seen, "--set", f"data.workers={workers}")
        for name, workers in (("a", 0), ("b", 2))
    }
    for done in run_all(commands).values():
        assert_said(done, 0)
    skipped = lines(tmp_path / "a", "skipped.jsonl")
    assert {line["key"].rpartition("#")[2] for line in skipped} == {"00121", "00222"}, "the empty one is no sample"
    assert all(line["reason"].startswith("image: ") for line in skipped)
    assert len(skipped) == trace(tmp_path / "a")[-1]["skipped"] >= 2

    def told(name: str) -> list[tuple[str, str]]:
        return [(line["key"], line["reason"]) for line in lines(tmp_path / name, "skipped.jsonl")]

    assert told("a") == told("b")
    assert trace(tmp_path / "a") == trace(tmp_path / "b")


def test_row_14_above_one_percent_the_run_ends_with_exit_4(tmp_path: Path) -> None:
    samples = [(p if i % 2 else p[:40], rest) for i, (p, rest) in enumerate(PAIRS[:64])]
    write_shard(tmp_path / "data/0.tar", samples)
    done = run(train(tmp_path, "r", tmp_path / "data", "--samples", "200"))
    assert_said(done, 4, "data.max_broken_share = 1.0%", "skipped.jsonl", "0.tar#000", "--allow-config-change")
    skipped, last = lines(tmp_path / "r", "skipped.jsonl"), trace(tmp_path / "r")[-1]
    assert len(skipped) == last["skipped"] > 10
    message = f"{last['skipped']} broken samples were met for {last['samples']} that were trained on"
    assert message in done.text, "more can be broken than were trained on: it was '18 of 16 samples are broken'"
    assert all(int(line["key"].rpartition("#")[2]) % 2 == 0 and line["reason"] for line in skipped)


def test_row_15_bombs_are_skipped_in_bounded_memory(tmp_path: Path) -> None:
    text = (b"zTXt", b"k\0\0" + zlib.compress(bytes(300 << 20), 9))
    progressive = encode(Image.new("RGB", (4000, 4000)), "JPEG", progressive=True)
    bombs = {
        "3600000000 pixels": png(60_000, 60_000),
        "MAX_TEXT_CHUNK": png(4, 4, text),
        "scans of 4000": with_scans(progressive, 4000),
        "bytes are above the limit": encode(Image.new("RGB", (8, 8)), "BMP") + bytes(65 << 20),
    }
    samples = PAIRS[:96]
    write_shard(tmp_path / "clean/0.tar", samples)
    for place, data in enumerate(bombs.values()):
        samples[20 * place] = (data, samples[20 * place][1])
    write_shard(tmp_path / "bombs/0.tar", samples)
    flags = ("--samples", "96", "--set", "data.workers=0", "data.max_broken_share=0.1")
    commands = {name: train(tmp_path, name, tmp_path / name, *flags) for name in ("clean", "bombs")}
    for done in run_all(commands).values():
        assert_said(done, 0)
    peaks = {name: max(line.get("peak_memory_gb", 0) for line in lines(tmp_path / name)) for name in commands}
    reasons = {line["key"].rpartition("#")[2]: line["reason"] for line in lines(tmp_path / "bombs", "skipped.jsonl")}
    (manifest,) = (tmp_path / "bombs/.clips").glob("*/manifest.json")
    reasons |= dict(json.loads(manifest.read_text())["parts"][0]["examples"])
    assert len(reasons) == len(bombs)
    for place, words in enumerate(bombs):
        assert words in reasons[f"{20 * place:05d}"]
    assert 0.1 < peaks["bombs"] < peaks["clean"] + 0.4, peaks


def rotated(pixels: np.ndarray) -> bytes:
    """Stored so that a viewer which obeys the tag shows `pixels`."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(Image.fromarray(np.ascontiguousarray(np.rot90(pixels, 1))), exif=exif)


def twins(rgb: np.ndarray) -> list[tuple[np.ndarray, bytes]]:
    """(the pixels that a viewer shows, an image of some lossless kind) of each kind."""
    grey, image = rgb[..., 0], Image.fromarray(rgb)
    opaque, clear = np.full_like(grey, 255), np.zeros_like(grey)
    as_grey = np.dstack([grey] * 3)
    red = Image.new("RGB", image.size, "red")
    return [
        (rgb, encode(Image.fromarray(np.dstack([rgb, opaque]), "RGBA"))),
        (np.full_like(rgb, 255), encode(Image.fromarray(np.dstack([rgb, clear]), "RGBA"))),
        (rgb, encode(image.quantize(8))),
        (rgb, encode(Image.fromarray(np.dstack([255 - rgb, clear]), "CMYK"), "TIFF")),
        (as_grey, encode(Image.fromarray(grey.astype(np.uint16) * 257))),
        (as_grey, encode(Image.fromarray(grey))),
        (rgb, rotated(rgb)),
        (rgb, encode(image, save_all=True, append_images=[red])),
    ]


def test_row_16_every_kind_of_image_trains_as_its_plain_twin(tmp_path: Path) -> None:
    """The same training, to the last digit, on images of each lossless kind and on their pixels as plain RGB."""
    plain, kinds = [], []
    for i, (image, rest) in enumerate(PAIRS[:64]):
        of_all = twins(np.asarray(decode_image(image)))
        shown, kind = of_all[i % len(of_all)]
        plain.append((encode(Image.fromarray(shown)), rest))
        kinds.append((kind, rest))
    write_shard(tmp_path / "plain/0.tar", plain)
    write_shard(tmp_path / "kinds/0.tar", kinds)
    commands = {name: train(tmp_path / "runs", name, tmp_path / name, "--samples", "64") for name in ("plain", "kinds")}
    for done in run_all(commands).values():
        assert done.code == 0, done.text
    assert lines(tmp_path / "runs/kinds", "skipped.jsonl") == []
    assert trace(tmp_path / "runs/kinds") == trace(tmp_path / "runs/plain") != []


MEMORY_MIB = 1024


@pytest.mark.parametrize("route", bad_corpus.ROUTES)
def test_each_kind_comes_out_as_it_must(route: str, tmp_path: Path) -> None:
    done = run_python(
        "tests/bad_corpus.py", tmp_path, route,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "CLIPS_MLLM_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    wrong = []
    assert result["reasons"].keys() <= result["wanted"].keys()
    for name, outcome in result["wanted"].items():
        reason = result["reasons"].get(name)
        if (reason is None) != (outcome == bad_corpus.USED) or not re.search(outcome, reason or ""):
            wrong.append(f"{name}: wanted {outcome or 'used'!r}, found {reason!r:.200}")
    assert not wrong, "\n".join(wrong)
    assert result["grown_mib"] < MEMORY_MIB, result["grown_mib"]
