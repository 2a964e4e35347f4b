"""Faults in pictures, through the real training command: skipped, bounded, or decoded right."""

import zlib
from pathlib import Path

import numpy as np
import pytest
from bad_corpus import encode, png, with_scans
from launched import SCRIPT, assert_said, lines, pictures, python, recap, run, run_all, trace, write_shard
from PIL import Image

from clips.data.images import decode_image

pytestmark = pytest.mark.slow
Samples = list[tuple[bytes, dict[str, bytes]]]


def good(count: int) -> Samples:
    return [(picture, recap(web, long)) for picture, web, long in pictures(count)]


def train(out: Path, name: str, data: Path, *flags: str) -> list[str]:
    fixed = ("--recipe", "demo", "--set", "train.precision=fp32", "train.log_every=1")
    return python(SCRIPT, "--debug", "--data", data, "--output", out, "--name", name, *flags, *fixed)


def test_row_14_broken_pictures_are_skipped_counted_and_replaced_alike(tmp_path: Path) -> None:
    """Three of 400, in one epoch: any number of workers takes the same substitutes and trains to the same losses."""
    samples = good(400)
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
    assert {line["key"].rpartition("#")[2] for line in skipped} == {f"{place:05d}" for place in faults}
    assert all(line["reason"].startswith("image: ") for line in skipped)
    assert len(skipped) == trace(tmp_path / "a")[-1]["skipped"] >= 3

    def told(name: str) -> list[tuple[str, str]]:
        return [(line["key"], line["reason"]) for line in lines(tmp_path / name, "skipped.jsonl")]

    assert told("a") == told("b")
    assert trace(tmp_path / "a") == trace(tmp_path / "b")


def test_row_14_above_one_percent_the_run_ends_with_exit_4(tmp_path: Path) -> None:
    samples = [(p if i % 2 else p[:40], rest) for i, (p, rest) in enumerate(good(64))]
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
    samples = good(96)
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
    """(the pixels that a viewer shows, a picture of some lossless kind) of each kind."""
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


def test_row_16_every_kind_of_picture_trains_as_its_plain_twin(tmp_path: Path) -> None:
    """The same training, to the last digit, on pictures of each lossless kind and on their pixels as plain RGB."""
    plain, kinds = [], []
    for i, (picture, rest) in enumerate(good(64)):
        of_all = twins(np.asarray(decode_image(picture)))
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
