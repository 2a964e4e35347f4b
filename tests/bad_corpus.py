"""Bad pictures and records of more than a hundred kinds, each with what is to become of it: used, or why not.

`python tests/bad_corpus.py FOLDER ROUTE` sends them through one of ROUTES, and prints what came out as JSON, with the
most memory that it took. A new consumer of data becomes one more entry in ROUTES.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import struct
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

USED = ""
"""The outcome of a kind that is no reason to leave a sample out."""


@dataclass(frozen=True)
class Kind:
    make: Callable[[], Any]
    outcome: str = USED
    """USED, or a pattern of the reason that is given."""


# --------------------------------------------------------------------------------------------------- pictures
def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(*shape: int, seed: int = 0, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype)


def png(width: int, height: int, *chunks: tuple[bytes, bytes], data: bytes | None = None) -> bytes:
    """A PNG that says it is of this size, with these chunks before at most four rows of pixels (or `data`)."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    rest = b"".join(chunk(name, body) for name, body in chunks)
    rows = zlib.compress(b"\0" * (1 + 3 * width) * min(height, 4)) if data is None else data
    return b"\x89PNG\r\n\x1a\n" + header + rest + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def with_scans(jpeg: bytes, more: int) -> bytes:
    """The progressive picture with its last scan repeated."""
    last = jpeg.rindex(b"\xff\xda")
    return jpeg[:-2] + jpeg[last:-2] * more + jpeg[-2:]


def tiff(*tags: tuple[int, int, int, int], strip: bytes = b"") -> bytes:
    """Little-endian, one directory of (tag, type, count, value), its strip behind it."""
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + b"\0" * 4
    return b"II*\0" + struct.pack("<I", 8) + directory + strip


def _frames(kind: str, count: int, side: int = 8) -> bytes:
    frames = [Image.fromarray(noise(side, side, seed=i) // 2 + 60).convert("P") for i in range(count)]
    return encode(frames[0], kind, save_all=True, append_images=frames[1:])


def _rotated(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(RGB, "JPEG", exif=exif)


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


RGB = Image.fromarray(noise(48, 64, 3))
GREY = Image.fromarray(noise(48, 64))
ALPHA = Image.fromarray(noise(48, 64, 4), "RGBA")
FLOAT = Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8))
NAN = Image.fromarray(np.full((8, 8), np.nan, np.float32))
DEEP = Image.fromarray(noise(48, 64, dtype=np.uint16))
PROGRESSIVE = encode(RGB, "JPEG", progressive=True)
UNKNOWN, BROKEN, LARGE, MODE = "cannot identify", "image: ", "above the limit", "mode .* not supported"
WIDE_TAGS = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]

PICTURES = {
    # What is odd, and used.
    "jpeg": Kind(lambda: encode(RGB, "JPEG")),
    "jpeg progressive": Kind(lambda: PROGRESSIVE),
    "jpeg grey": Kind(lambda: encode(GREY, "JPEG")),
    "jpeg cmyk": Kind(lambda: encode(RGB.convert("CMYK"), "JPEG")),
    "jpeg with bytes behind its end": Kind(lambda: encode(RGB, "JPEG") + noise(5000).tobytes()),
    "jpeg of a thousand small scans": Kind(lambda: with_scans(PROGRESSIVE, 1000)),
    "jpeg with two frames": Kind(lambda: encode(RGB, "MPO", save_all=True, append_images=[RGB])),
    "jpeg whose exif is garbage": Kind(lambda: encode(RGB, "JPEG", exif=b"Exif\0\0" + noise(500).tobytes())),
    "jpeg whose profile is garbage": Kind(lambda: encode(RGB, "JPEG", icc_profile=noise(70_000).tobytes())),
    **{f"jpeg rotated {i}": Kind(lambda i=i: _rotated(i)) for i in (3, 6, 8)},
    "jpeg rotated by no known way": Kind(lambda: _rotated(77)),
    "png": Kind(lambda: encode(RGB)),
    "png one bit": Kind(lambda: encode(GREY.convert("1"))),
    "png rgba": Kind(lambda: encode(ALPHA)),
    "png grey with alpha": Kind(lambda: encode(ALPHA.convert("LA"))),
    "png palette": Kind(lambda: encode(RGB.quantize(16))),
    "png palette with transparency": Kind(lambda: encode(RGB.quantize(16), transparency=3)),
    "png 16 bit": Kind(lambda: encode(DEEP)),
    "png animated": Kind(lambda: _frames("PNG", 5)),
    "png with a long text": Kind(lambda: png(4, 4, (b"zTXt", b"k\0\0" + zlib.compress(b"x" * 900_000)))),
    "png with an unknown chunk": Kind(lambda: png(4, 4, (b"abCd", noise(100).tobytes()))),
    "png of 64 million pixels": Kind(lambda: encode(Image.new("L", (8000, 8000)), compress_level=1)),
    "one pixel": Kind(lambda: encode(Image.new("RGB", (1, 1)))),
    "one row of 60,000": Kind(lambda: encode(Image.new("RGB", (60_000, 1)))),
    "one column of 60,000": Kind(lambda: encode(Image.new("L", (1, 60_000)), "BMP")),
    "gif": Kind(lambda: encode(RGB.quantize(16), "GIF")),
    "gif of three thousand frames": Kind(lambda: _frames("GIF", 3000, 4)),
    "webp": Kind(lambda: encode(RGB, "WEBP")),
    "webp animated": Kind(lambda: _frames("WEBP", 3)),
    "bmp": Kind(lambda: encode(RGB, "BMP")),
    "ppm": Kind(lambda: encode(RGB, "PPM")),
    "tiff": Kind(lambda: encode(RGB, "TIFF")),
    "tiff cmyk": Kind(lambda: encode(RGB.convert("CMYK"), "TIFF")),
    "tiff 16 bit": Kind(lambda: encode(DEEP, "TIFF")),
    "tiff of several pages": Kind(lambda: encode(RGB, "TIFF", save_all=True, append_images=[RGB, RGB])),
    # What cannot be.
    "empty": Kind(lambda: b"", "empty"),
    "zero bytes": Kind(lambda: bytes(1000), UNKNOWN),
    "random bytes": Kind(lambda: noise(1000).tobytes(), UNKNOWN),
    "text": Kind(lambda: b"not a picture", UNKNOWN),
    "html": Kind(lambda: b"<!doctype html><title>404 Not Found</title>", UNKNOWN),
    "svg": Kind(lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>', UNKNOWN),
    **{name: Kind(partial(encode, RGB, name), UNKNOWN) for name in ("PDF", "EPS", "ICO", "TGA", "PCX", "SGI", "DDS")},
    "icns": Kind(lambda: encode(RGB.resize((128, 128)), "ICNS"), UNKNOWN),
    "jpeg 2000": Kind(lambda: encode(RGB, "JPEG2000"), UNKNOWN),
    "xbm": Kind(lambda: encode(GREY.convert("1"), "XBM"), UNKNOWN),
    "psd": Kind(lambda: b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 8, 8, 8, 3) + bytes(200), UNKNOWN),
    "mp4": Kind(lambda: b"\0\0\0 ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(500), UNKNOWN),
    "zip": Kind(lambda: b"PK\3\4" + noise(500).tobytes(), UNKNOWN),
    "gzip": Kind(lambda: b"\x1f\x8b\x08\0" + noise(500).tobytes(), UNKNOWN),
    "a pickle": Kind(lambda: b"\x80\x04\x95" + b"cos\nsystem\n(S'false'\ntR.", UNKNOWN),
    "base64": Kind(lambda: b"data:image/png;base64,iVBORw0KGgo=", UNKNOWN),
    "more than 64 MiB": Kind(lambda: encode(RGB, "JPEG") + bytes(64 * 2**20), LARGE),
    "jpeg cut in half": Kind(lambda: _half(encode(RGB, "JPEG")), "truncated"),
    "jpeg of a header alone": Kind(lambda: encode(RGB, "JPEG")[:30], BROKEN),
    "jpeg of no height": Kind(
        lambda: re.sub(rb"(\xff\xc0...)..", rb"\1\0\0", encode(RGB, "JPEG"), flags=re.DOTALL), BROKEN
    ),
    "jpeg of thousands of scans": Kind(
        lambda: with_scans(encode(Image.new("RGB", (4000, 4000)), "JPEG", progressive=True), 4000), "too long"
    ),
    "png cut in half": Kind(lambda: _half(encode(RGB)), BROKEN),
    "png of a header alone": Kind(lambda: encode(RGB)[:40], BROKEN),
    "png with a hole": Kind(lambda: encode(RGB)[:1000] + bytes(500) + encode(RGB)[1500:], BROKEN),
    "png whose pixels are garbage": Kind(lambda: png(8, 8, data=noise(200).tobytes()), BROKEN),
    "png without pixels": Kind(lambda: png(8, 8, data=b""), BROKEN),
    "png of no width": Kind(lambda: png(0, 8), BROKEN),
    "png bomb": Kind(lambda: png(60_000, 60_000), "pixels"),
    "png just too large": Kind(lambda: png(9_000, 9_000), LARGE),
    "png of 2 billion columns": Kind(lambda: png(2**31 - 1, 1, data=zlib.compress(bytes(100))), "pixels"),
    "png text bomb": Kind(lambda: png(4, 4, (b"zTXt", b"k\0\0" + zlib.compress(bytes(50 << 20), 9))), "MAX_TEXT_CHUNK"),
    "png international text bomb": Kind(
        lambda: png(4, 4, (b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(50 << 20), 9))), "MAX_TEXT_CHUNK"
    ),
    "png profile bomb": Kind(lambda: png(4, 4, (b"iCCP", b"k\0\0" + zlib.compress(bytes(50 << 20), 9))), "image: "),
    "png of many texts": Kind(
        lambda: png(4, 4, *[(b"zTXt", b"k%d\0\0" % i + zlib.compress(bytes(900_000))) for i in range(8)]),
        "MAX_TEXT_MEMORY",
    ),
    "gif cut in half": Kind(lambda: _half(encode(RGB.quantize(64), "GIF")), BROKEN),
    "gif of a name alone": Kind(lambda: b"GIF89a", UNKNOWN),
    "gif of 4 billion pixels": Kind(lambda: b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\2\0;", BROKEN),
    "webp cut in half": Kind(lambda: _half(encode(RGB, "WEBP")), BROKEN),
    "webp too large": Kind(lambda: encode(Image.new("L", (16_000, 4_100)), "WEBP", method=0, quality=0), LARGE),
    "bmp cut in half": Kind(lambda: _half(encode(RGB, "BMP")), "truncated"),
    "bmp of 4 billion pixels": Kind(
        lambda: encode(RGB, "BMP")[:18] + struct.pack("<ii", 60_000, 60_000) + encode(RGB, "BMP")[26:], "pixels"
    ),
    "ppm of 10¹⁸ pixels": Kind(lambda: b"P6 1000000000 1000000000 255\n" + bytes(100), BROKEN),
    "ppm cut in half": Kind(lambda: _half(encode(RGB, "PPM")), BROKEN),
    "tiff cut in half": Kind(lambda: _half(encode(RGB, "TIFF")), BROKEN),
    "tiff of floats": Kind(lambda: encode(FLOAT, "TIFF"), MODE),
    "tiff of NaN": Kind(lambda: encode(NAN, "TIFF"), MODE),
    "tiff of 32-bit numbers": Kind(
        lambda: encode(Image.fromarray(noise(8, 8, dtype=np.int32)), "TIFF"), "16-bit range"
    ),
    "tiff of lab": Kind(lambda: encode(Image.new("LAB", (8, 8)), "TIFF"), MODE),
    "tiff whose tag has 4 billion values": Kind(
        lambda: tiff(*WIDE_TAGS, (273, 4, 2**32 - 1, 90), (279, 4, 1, 64), strip=bytes(200)), BROKEN
    ),
    "tiff whose directory is itself": Kind(lambda: b"II*\0\x08\0\0\0\0\0\x08\0\0\0", BROKEN),
    "tiff of 4 billion columns": Kind(
        lambda: tiff((256, 4, 1, 2**32 - 1), (257, 4, 1, 2**32 - 1), *WIDE_TAGS[2:], (273, 4, 1, 90)), BROKEN
    ),
}

# --------------------------------------------------------------------------------------------------- captions
LONG = 2**17
"""Characters of a text that is far longer than any context. A tokenizer takes seconds for a word of a megabyte."""
CAPTIONS: dict[str, Kind] = {
    "right to left": Kind(lambda: "שלום \u202eevil\u202c مرحبا"),
    "emoji": Kind(lambda: "👩‍👩‍👧 🦄"),
    "markup": Kind(lambda: "<script>alert(1)</script> [bold]x[/] $5_a^{b$"),
    "control characters": Kind(lambda: "\x1b[31mred\x07\x08\x00\x9b1m"),
    "NUL": Kind(lambda: "a\0b"),
    "half a character": Kind(lambda: "half \ud83d and \udc00"),
    "one long word": Kind(lambda: "W" * LONG),
    "very many words": Kind(lambda: "a. " * (LONG // 3)),
    "no letter": Kind(lambda: "— … !!! —"),
    "line breaks": Kind(lambda: "one\ntwo\r\nthree\u2028four\x85five"),
    "special tokens": Kind(lambda: "[CLS] <image> <s> <|im_end|> [PAD]"),
    "null": Kind(lambda: None, "empty"),
    "nothing": Kind(lambda: "", "empty"),
    "white space": Kind(lambda: " \t\n\u3000", "empty"),
    "a number": Kind(lambda: 3.5, "float, not text"),
    "a list": Kind(lambda: ["a cat"], "list, not text"),
    "an object": Kind(lambda: {"a": "cat"}, "dict, not text"),
    "a truth value": Kind(lambda: True, "bool, not text"),
}
# Bytes of a JSON member (of a shard) or line (of a table) whose web caption is "{w}".
JSONS: dict[str, Kind] = {
    "cut off": Kind(lambda: b'{"org_caption": "w', "bad JSON|Invalid control character"),
    "not JSON": Kind(lambda: b"org_caption: w", "JSON|Expecting"),
    "a list on top": Kind(lambda: b'["w"]', "not a JSON object"),
    "in Latin-1": Kind(lambda: '{"org_caption": "é"}'.encode("latin-1"), "JSON|decode"),
    "nested deeply": Kind(lambda: b'{"org_caption": "w", "x": ' + b"[" * 100_000, "JSON|recursion|nested too deep"),
    "a number of 5,000 digits": Kind(lambda: b'{"org_caption": "w", "x": ' + b"9" * 5000 + b"}", "JSON|digits"),
    "another key": Kind(lambda: b'{"alt": "w"}', "empty"),
    "one key twice": Kind(lambda: b'{"org_caption": "v", "org_caption": "w"}'),
    "NaN": Kind(lambda: b'{"org_caption": "w", "x": NaN}'),
    "UTF-8 with a mark": Kind(lambda: b'\xef\xbb\xbf{"org_caption": "w"}'),
}
TEXTS: dict[str, Kind] = {
    "in Latin-1": Kind(lambda: "é".encode("latin-1"), "not UTF-8"),
    "in UTF-16": Kind(lambda: "long".encode("utf-16"), "not UTF-8"),
    "empty": Kind(lambda: b"", "empty"),
    "UTF-8 with a mark": Kind(lambda: b"\xef\xbb\xbfA cat."),
}
# Of a table: what stands in the image column; the files are made by `write_table`.
PATHS: dict[str, Kind] = {
    "below a folder": Kind(lambda: "folder/../good.png"),
    "not there": Kind(lambda: "gone.png", "No such file"),
    "NUL": Kind(lambda: "good.png\0", "is no path"),
    "half a character": Kind(lambda: "\ud800.png", "is no path"),
    "too long": Kind(lambda: "x" * 5000, "name too long"),
    "a pipe": Kind(lambda: "pipe", "not a regular file"),
    "a socket": Kind(lambda: "socket", "No such device|not a regular file"),
    "a folder": Kind(lambda: "folder", "not a regular file|directory"),
    "null": Kind(lambda: None, "neither a path nor bytes"),
    "a number": Kind(lambda: 7, "neither a path nor bytes"),
    "nothing": Kind(lambda: "", "neither a path nor bytes"),
}
GOOD = 200
"""Samples beside the bad ones, so that substitutes are found."""


def good_picture(i: int) -> bytes:
    return encode(Image.fromarray(noise(24, 24, 3, seed=i + 1000)))


# ----------------------------------------------------------------------------------------------------- the sets
def write_shards(folder: Path) -> tuple[str, dict[str, str]]:
    """Shards with one sample of each kind; what to open, and the outcome of each key."""
    samples: list[tuple[str, dict[str, bytes], str]] = []
    plain = {"json": b'{"org_caption": "a web caption"}', "txt": b"Long one. Long two."}
    picture = good_picture(0)
    for name, kind in PICTURES.items():
        samples.append((f"picture {name}", {"img": kind.make(), **plain}, kind.outcome))
    for name, kind in CAPTIONS.items():
        web = json.dumps({"org_caption": kind.make()}).encode()
        samples.append((f"web {name}", {"img": picture, **plain, "json": web}, kind.outcome))
    for part, kinds in (("json", JSONS), ("txt", TEXTS)):
        for name, kind in kinds.items():
            samples.append((f"{part} {name}", {"img": picture, **plain, part: kind.make()}, kind.outcome))
    for i in range(_good(len(samples))):
        samples.append((f"good {i}", {"img": good_picture(i), **plain}, USED))
    random.Random(0).shuffle(samples)
    folder.mkdir(parents=True)
    for part in range(2):
        with tarfile.open(folder / f"{part}.tar", "w") as tar:
            for key, members, _ in samples[part::2]:
                for extension, data in members.items():
                    _add(tar, f"{key.replace('.', ' ')}.{extension}", data)
    _write_damaged(folder / "damaged.tar", plain, picture)
    outcomes = {key.replace(".", " "): outcome for key, _, outcome in samples}
    return str(folder), outcomes | {f"whole {i}": USED for i in range(8)}


def write_pair_shards(folder: Path) -> tuple[str, dict[str, str]]:
    """The same, for who needs no long caption: a bad one is the source's other member, and kept."""
    spec, outcomes = write_shards(folder)
    return spec, outcomes | {key: USED for key in outcomes if key.startswith("txt ")}


def _good(bad: int) -> int:
    """So many that all, with the eight whole ones of the damaged shard, are a number of batches of 8."""
    return GOOD + -(bad + GOOD) % 8


def _add(tar: tarfile.TarFile, name: str, data: bytes, **fields: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def _write_damaged(path: Path, plain: dict[str, bytes], picture: bytes) -> None:
    """Eight whole samples among members that are left out: each of another kind."""

    def whole(tar: tarfile.TarFile, i: int) -> None:
        for extension, data in {"img": picture, **plain}.items():
            _add(tar, f"whole {i}.{extension}", data)

    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        whole(tar, 0)
        _add(tar, "alone.img", picture)  # without captions
        _add(tar, ".hidden", b"x")
        _add(tar, "README", b"no extension")
        whole(tar, 1)
        _add(tar, "sparse.img", picture, pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"})
        _add(tar, "sparse.txt", b"Long.")
        whole(tar, 2)
        for kind, name in ((tarfile.DIRTYPE, "folder"), (tarfile.FIFOTYPE, "pipe.img"), (tarfile.CHRTYPE, "null.img")):
            _add(tar, name, b"", type=kind)
        whole(tar, 3)
        whole(tar, 3)  # once more
        _add(tar, "undecodable \udce9.img", picture)
        whole(tar, 4)
        record = b"%d size=%s\n"
        length = next(n for n in range(1, 10**5) if len(record % (n, b"9" * 4000)) == n)
        _add(tar, "PaxHeaders/x", record % (length, b"9" * 4000), type=tarfile.XHDTYPE)
        _add(tar, "of a size that cannot be.img", picture)
        whole(tar, 5)
        place = tar.offset
        _add(tar, "under a damaged header.img", picture)
        whole(tar, 6)
        whole(tar, 7)
        _add(tar, "cut off.img", picture)
    data = bytearray(path.read_bytes())
    data[place + 100 : place + 200] = b"\xff" * 100
    path.write_bytes(data[: data.rindex(b"cut off.img") + 520])


def write_table(folder: Path) -> tuple[str, dict[str, str]]:
    """A table of JSON lines beside its pictures; what to open, and the outcome of each row."""
    import socket

    folder.mkdir(parents=True)
    (folder / "folder").mkdir()
    (folder / "good.png").write_bytes(good_picture(0))
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(folder / "socket"))  # its path has a length
    rows: list[tuple[bytes, str]] = []

    def add(outcome: str, **columns: Any) -> None:
        columns = {"image": "good.png", "org_caption": "a web caption", "long": "Long one. Long two."} | columns
        rows.append((json.dumps(columns).encode(), outcome))

    for i, kind in enumerate(PICTURES.values()):
        (folder / f"{i}.bin").write_bytes(kind.make())
        add(kind.outcome, image=f"{i}.bin")
    for kind in CAPTIONS.values():
        add(kind.outcome, org_caption=kind.make())
        add(kind.outcome, long=kind.make())
    for kind in PATHS.values():
        add(kind.outcome, image=kind.make())
    for kind in JSONS.values():
        line: bytes = kind.make()
        whole = line.rstrip(b"}") + b', "image": "good.png", "long": "Long one."}' if kind.outcome == USED else line
        rows.append((whole, kind.outcome))
    for _ in range(_good(len(rows))):
        add(USED)
    random.Random(0).shuffle(rows)
    (folder / "table.jsonl").write_bytes(b"\n".join(line for line, _ in rows))
    return str(folder / "table.jsonl"), {str(i): outcome for i, (_, outcome) in enumerate(rows)}


def _turns(*values: Any) -> list[dict[str, Any]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


# LLaVA records that are broken in another way than by their picture or a text.
RECORDS: dict[str, Kind] = {
    "not an object": Kind(lambda: ["a"], "must be an object"),
    "null": Kind(lambda: None, "must be an object"),
    "without conversations": Kind(lambda: {"id": "x", "image": "good.png"}, "list 'conversations'"),
    "conversations of text": Kind(lambda: {"conversations": "a"}, "list 'conversations'"),
    "no turn": Kind(lambda: {"conversations": []}, "no answer|no turn|empty"),
    "no answer": Kind(lambda: {"conversations": _turns("a")}, "no answer"),
    "a turn of nobody": Kind(lambda: {"conversations": [{"from": "me", "value": "a"}]}, "from"),
    "a turn that is none": Kind(lambda: {"conversations": [3]}, "turn|object"),
    "more pictures than places": Kind(lambda: {"image": "good.png", "conversations": _turns("a", "b")}, "<image>"),
    "more places than pictures": Kind(
        lambda: {"image": "good.png", "conversations": _turns("<image><image>", "b")}, "placeholder"
    ),
    "a picture that is a number": Kind(lambda: {"image": 3, "conversations": _turns("<image>", "b")}, "path"),
    "a picture that climbs": Kind(lambda: {"image": "../x.png", "conversations": _turns("<image>", "b")}, "leaves"),
    "an absolute picture": Kind(lambda: {"image": "/etc/passwd", "conversations": _turns("<image>", "b")}, "leaves"),
    "a picture by a link": Kind(lambda: {"image": "link.png", "conversations": _turns("<image>", "b")}, "leads out"),
    "a picture of half a character": Kind(
        lambda: {"image": "\ud800.png", "conversations": _turns("<image>", "b")}, "image path"
    ),
    "a picture that is a pipe": Kind(lambda: {"image": "pipe", "conversations": _turns("<image>", "b")}, "not in"),
    "a picture that is not there": Kind(lambda: {"image": "gone", "conversations": _turns("<image>", "b")}, "not in"),
    "a picture that is a folder": Kind(lambda: {"image": "folder", "conversations": _turns("<image>", "b")}, "not in"),
    "a very long question": Kind(
        lambda: {"conversations": _turns("a " * LONG, "b")}, "first 120 tokens hold no answer"
    ),
    "an id that is an object": Kind(lambda: {"id": {"a": 1}, "conversations": _turns("a", "b")}),
}
LLAVA_TEXTS = dict.fromkeys(("null", "a number", "a list", "an object", "a truth value"), "must look like")
LLAVA_TEXTS |= {
    "nothing": "it has no answer",
    "white space": "it has no answer",
    "half a character": "half a character",
}
"""Outcomes of CAPTIONS as an answer, where they are others."""


def write_llava(folder: Path) -> tuple[str, dict[str, str]]:
    """data.json beside images/; the outcome of each record by its number."""
    images = folder / "images"
    (images / "folder").mkdir(parents=True)
    (images / "good.png").write_bytes(good_picture(0))
    (folder / "outside.png").write_bytes(good_picture(0))
    (images / "link.png").symlink_to(folder / "outside.png")
    os.mkfifo(images / "pipe")
    records: list[Any] = []
    outcomes: list[str] = []
    for i, kind in enumerate(PICTURES.values()):
        (images / f"{i}.bin").write_bytes(kind.make())
        records.append({"image": f"{i}.bin", "conversations": _turns("<image>\nWhat?", "A cat.")})
        outcomes.append(kind.outcome)
    for name, kind in CAPTIONS.items():
        records.append({"conversations": _turns("What?", kind.make())})
        outcomes.append(LLAVA_TEXTS.get(name, kind.outcome))
    for kind in RECORDS.values():
        records.append(kind.make())
        outcomes.append(kind.outcome)
    (folder / "data.json").write_text(json.dumps(records))
    return str(folder / "data.json"), {str(i): outcome for i, outcome in enumerate(outcomes)}


# ------------------------------------------------------------------------------------------------- the consumers
Reasons = dict[str, str]
"""Of each sample that was left out, by its key, row or number."""


def _fields(spec: str) -> Any:
    from clips.config import Fields

    if spec.endswith(".jsonl"):
        return Fields(image="image", web="org_caption", long="long")
    return Fields(image="img", web="json:org_caption", long="txt")


def through_the_loader(spec: str, wanted: dict[str, str], folder: Path, told: dict[str, Reasons]) -> Reasons:
    """One epoch: each sample's own position holds it, or a substitute and the reason."""
    from conftest import tiny_run

    from clips.data.loader import make_loader
    from clips.data.sources import open_source
    from clips.data.tokenizer import build_tokenizer

    source, run = open_source(spec, _fields(spec), need_long=True), tiny_run()
    assert len(source) == len(wanted), (len(source), len(wanted))
    tokenizer = build_tokenizer("bert")
    run = replace(run, model=replace(run.model, text=replace(run.model.text, vocab_size=tokenizer.vocab_size)))
    run = replace(run, phases=(replace(run.phases[0], samples=len(source), batch_size=8),))

    def named(key: str) -> str:  # a table's row also names its picture: t.jsonl#3 (a.png)
        return (key.partition(" (")[0] if spec.endswith(".jsonl") else key).rpartition("#")[2]

    reasons: Reasons = {}
    keys: Counter[str] = Counter()
    for batch in make_loader(source, tokenizer, run, rank=0, world_size=1):
        assert batch["images"].float().isfinite().all()
        keys.update(map(named, batch["keys"]))
        reasons |= {named(key): reason for key, reason in batch["skipped"]}
    assert keys.total() == len(source)
    assert keys.keys() == wanted.keys() - reasons.keys(), "each good one is used, and no bad one"
    return reasons


def through_the_check(spec: str, wanted: dict[str, str], folder: Path, told: dict[str, Reasons]) -> Reasons:
    """The pre-flight of triples counts what the loader said."""
    from clips.config import DataConfig
    from clips.data.check import check_triples, reason_class
    from clips.recipes import recipe

    run = replace(recipe("b16"), data=DataConfig(train=spec, fields=_fields(spec), max_broken_share=1.0))
    found = check_triples(run, folder / "report")
    reasons = told["loader"]
    assert found["checked"] == found["samples"] == len(wanted)
    assert found["broken"] == len(reasons)
    assert found["reasons"] == Counter(map(reason_class, reasons.values()))
    return reasons


def _llava(data: str) -> tuple[Any, Any]:
    from tiny_tokenizers import make_tokenizer

    from mllm.data.conversation import ConversationEncoder
    from mllm.data.images import ImageStore

    encoder = ConversationEncoder(make_tokenizer("gpt2"), "chatml", 4, 120)
    return encoder, ImageStore(Path(data).parent / "images")


def through_llava_s_check(spec: str, wanted: dict[str, str], folder: Path, told: dict[str, Reasons]) -> Reasons:
    from clips.common.errors import UserError
    from mllm.training.check_data import check_data

    with contextlib.suppress(UserError):  # there are bad ones
        check_data(spec, *_llava(spec), folder / "report")
        raise AssertionError("nothing was found")
    report = json.loads((folder / "report/summary.json").read_text())
    assert report["samples"] == len(wanted)
    return {str(problem["index"]): problem["message"] for problem in report["problems"]}


def through_llava_data(spec: str, wanted: dict[str, str], folder: Path, told: dict[str, Reasons]) -> Reasons:
    """As training reads it: the records when it begins, each picture when its batch comes."""
    from clips import BrokenSample
    from mllm.data.dataset import LlavaDataset

    encoder, store = _llava(spec)
    dataset = LlavaDataset(spec, encoder, store, "skip")
    reasons = {str(problem.index): problem.message for problem in dataset.skipped}
    for row, record in enumerate(dataset.records):
        sample = dataset[row]
        assert len(sample["input_ids"]) == len(sample["labels"]) <= 120
        try:
            for name in sample["images"]:
                store.load(name)
        except BrokenSample as broken:
            reasons[str(record.index)] = broken.reason
    return reasons


def through_recaptioning(spec: str, wanted: dict[str, str], folder: Path, told: dict[str, Reasons]) -> Reasons:
    """Every pair is written, and read again as pretraining reads it, or listed with the reason."""
    from pairs import Known

    from clips import Fields, decode_image, open_source
    from mllm.recaption.asking import Prompt
    from mllm.recaption.manifest import Folder
    from mllm.recaption.options import Options
    from mllm.recaption.shards import shards_of
    from mllm.recaption.work import Worker

    options = Options(spec, folder / "out", "known:0", Prompt(), fields=_fields(spec), max_broken_share=1.0)
    source, out = open_source(spec, options.fields, need_long=False), Folder(options.output)
    reasons: Reasons = {}
    written = 0
    worker = Worker(options, out, source, Known(), "owner", Counter())
    for shard in shards_of(source):
        written += worker.make(shard)["output"]["samples"]
        for line in out.rejected(shard.name).read_text().splitlines():
            record = json.loads(line)
            assert record["reason"] == "broken", record
            reasons[record["key"]] = record["error"]
    result = open_source(str(options.output), Fields(), need_long=True)
    assert len(result) == written == len(wanted) - len(reasons)
    for index in range(written):
        sample = result.read(index)
        decode_image(sample.image, sample.key)
        assert sample.long.startswith("A picture of something")
    return reasons


TRIPLES = {"loader": through_the_loader, "pre-flight": through_the_check}
ROUTES: dict[str, tuple[Callable[[Path], tuple[str, dict[str, str]]], dict[str, Callable[..., Reasons]]]] = {
    "shards": (write_shards, TRIPLES),
    "table": (write_table, TRIPLES),
    "pairs in shards": (write_pair_shards, {"recaptioning": through_recaptioning}),
    "LLaVA data": (write_llava, {"pre-flight": through_llava_s_check, "training": through_llava_data}),
}
"""Set → what writes it, and what reads it."""


def main(folder: Path, route: str) -> None:
    import torch  # noqa: F401 - part of what is there before

    write, consumers = ROUTES[route]
    spec, wanted = write(folder / "set")
    # What writing took is no part of what reading takes.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = _peak()
    told: dict[str, Reasons] = {}
    for name, consumer in consumers.items():
        told[name] = consumer(spec, wanted, folder, told)
    result = {"wanted": wanted, "told": told, "grown_mib": _peak() - before}
    (folder / "result.json").write_text(json.dumps(result))


def _peak() -> float:
    """Most memory that this process had since it was last told to forget, MiB."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
