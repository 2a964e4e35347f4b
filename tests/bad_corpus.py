"""Bad images and records, one for each class of damage, with what is to become of it: used, or why not.

`python tests/bad_corpus.py FOLDER ROUTE` sends them through one of ROUTES, and prints what came out as JSON, with the
most memory that it took. A new consumer of data becomes one more entry in ROUTES.
"""

import contextlib
import io
import itertools
import json
import os
import re
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

USED = ""
"""The outcome of what is no reason to leave a sample out; else a pattern of the reason."""
Kinds = dict[str, tuple[Any, str]]
"""Name → content and outcome."""


# --------------------------------------------------------------------------------------------------- images
def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def square(number: int = 0) -> bytes:
    """A small PNG of one colour, another one for each number."""
    return encode(Image.new("RGB", (4, 4), (number % 256, number // 256, 0)))


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, shape, np.uint8)


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that says it is of this size, with these chunks before at most four rows of pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    rest = b"".join(chunk(name, body) for name, body in chunks)
    rows = zlib.compress(b"\0" * (1 + 3 * width) * min(height, 4))
    return b"\x89PNG\r\n\x1a\n" + header + rest + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def with_scans(jpeg: bytes, more: int) -> bytes:
    """The progressive image with its last scan repeated."""
    last = jpeg.rindex(b"\xff\xda")
    return jpeg[:-2] + jpeg[last:-2] * more + jpeg[-2:]


def tiff(*tags: tuple[int, int, int, int], strip: bytes = b"") -> bytes:
    """Little-endian, one directory of (tag, type, count, value), its strip behind it."""
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + b"\0" * 4
    return b"II*\0" + struct.pack("<I", 8) + directory + strip


def make_images() -> Kinds:
    rgb = Image.fromarray(noise(48, 64, 3))
    jpeg = encode(rgb, "JPEG")
    wide = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]
    floats = Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8))
    flat = encode(Image.new("RGB", (4000, 4000)), "JPEG", progressive=True)
    bomb = zlib.compress(bytes(50 << 20), 9)
    return {
        "jpeg whose exif is garbage": (encode(rgb, "JPEG", exif=b"Exif\0\0" + noise(500).tobytes()), USED),
        "jpeg with bytes behind its end": (jpeg + noise(5000).tobytes(), USED),
        "one row of 60,000": (encode(Image.new("RGB", (60_000, 1))), USED),
        "empty": (b"", "empty"),
        "eps": (encode(rgb, "EPS"), "cannot identify"),
        "more than 64 MiB": (jpeg + bytes(64 * 2**20), "above the limit"),
        "jpeg cut in half": (jpeg[: len(jpeg) // 2], "truncated"),
        "jpeg of no height": (re.sub(rb"(\xff\xc0...)..", rb"\1\0\0", jpeg, flags=re.DOTALL), "image: "),
        "jpeg of thousands of scans": (with_scans(flat, 4000), "too long"),
        "png with a hole": (encode(rgb)[:1000] + bytes(500) + encode(rgb)[1500:], "image: "),
        "png bomb": (png(60_000, 60_000), "pixels"),
        "png text bomb": (png(4, 4, (b"zTXt", b"k\0\0" + bomb)), "MAX_TEXT_CHUNK"),
        "png profile bomb": (png(4, 4, (b"iCCP", b"k\0\0" + bomb)), "image: "),
        "tiff of floats": (encode(floats, "TIFF"), "mode .* not supported"),
        "tiff whose tag has 4 billion values": (tiff(*wide, (273, 4, 2**32 - 1, 90), strip=bytes(200)), "image: "),
    }


# --------------------------------------------------------------------------------------------------- texts
LONG = 2**17
"""Characters of a text that is far longer than any context."""
CAPTIONS: Kinds = {
    "markup": ("<script>alert(1)</script> [bold]x[/] [CLS] <image> $5_a^{b$ \u202eevil\x1b[31m\0", USED),
    "half a character": ("half \ud83d and \udc00", USED),
    "one long word": ("W" * LONG, USED),
    "no letter": ("— … !!! —", USED),
    "null": (None, "empty"),
    "white space": (" \t\n\u3000", "empty"),
    "an object": ({"a": "cat"}, "dict, not text"),
}
# Bytes of a JSON member (of a shard) or line (of a table) whose web caption is "w".
JSONS: Kinds = {
    "a list on top": (b'["w"]', "not a JSON object"),
    "in Latin-1": ('{"org_caption": "é"}'.encode("latin-1"), "JSON|decode"),
    "nested deeply": (b'{"org_caption": "w", "x": ' + b"[" * 100_000, "JSON|recursion|nested too deep"),
    "another key": (b'{"alt": "w"}', "empty"),
    "UTF-8 with a mark": (b'\xef\xbb\xbf{"org_caption": "w"}', USED),
}
TEXTS: Kinds = {"in UTF-16": ("long".encode("utf-16"), "not UTF-8"), "empty": (b"", "empty")}
# Of a table: what stands in the image column.
PATHS: Kinds = {
    "not there": ("gone.png", "missing image"),
    "NUL": ("good.png\0", "is no path"),
    "too long": ("x" * 5000, "missing image"),
    "a pipe": ("pipe", "missing image"),
    "a folder": ("folder", "missing image"),
    "null": (None, "neither a path nor bytes"),
}


def _turns(*values: Any) -> list[dict[str, Any]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def _asking(image: Any) -> dict[str, Any]:
    return {"image": image, "conversations": _turns("<image>", "b")}


RECORDS: Kinds = {
    "null": (None, "must be an object"),
    "without conversations": ({"id": "x", "image": "good.png"}, "list 'conversations'"),
    "no answer": ({"conversations": _turns("a")}, "no answer"),
    "a turn that is none": ({"conversations": [3]}, "turn|object"),
    "more images than places": ({"image": "good.png", "conversations": _turns("a", "b")}, "<image>"),
    "an image that is a number": (_asking(3), "path"),
    "an image that climbs": (_asking("../x.png"), "is outside"),
    "an image by a link": (_asking("link.png"), USED),
    "an image that is a pipe": (_asking("pipe"), "not in"),
    "an image that is not there": (_asking("gone"), "not in"),
    "a very long question": ({"conversations": _turns("a " * LONG, "b")}, "hold no answer"),
    "an answer that is null": ({"conversations": _turns("a", None)}, "must look like"),
    "an answer with half a character": ({"conversations": _turns("a", "\ud800")}, "half a character"),
}


# ----------------------------------------------------------------------------------------------------- the sets
def good_image(i: int) -> bytes:
    return encode(Image.fromarray(noise(24, 24, 3, seed=i + 1000)))


GOOD = 64
"""So many good samples that substitutes are found."""


def write_shards(folder: Path) -> tuple[str, dict[str, str]]:
    """Shards with one sample of each kind; what to open, and the outcome of each key."""
    plain = {"img": good_image(0), "json": b'{"org_caption": "a web caption"}', "txt": b"Long one. Long two."}
    from launched import write_tar  # which imports from here

    samples = [(f"image {name}", plain | {"img": data}, outcome) for name, (data, outcome) in make_images().items()]
    for name, (text, outcome) in CAPTIONS.items():
        samples.append((f"web {name}", plain | {"json": json.dumps({"org_caption": text}).encode()}, outcome))
    for part, kinds in (("json", JSONS), ("txt", TEXTS)):
        samples += [(f"{part} {name}", plain | {part: data}, outcome) for name, (data, outcome) in kinds.items()]
    samples += [(f"good {i}", plain | {"img": good_image(i)}, USED) for i in range(GOOD)]
    for part in range(2):
        parts = ((f"{key}.{name}", data) for key, members, _ in samples[part::2] for name, data in members.items())
        write_tar(folder / f"{part}.tar", parts)
    return str(folder), {key: outcome for key, _, outcome in samples}


def write_table(folder: Path) -> tuple[str, dict[str, str]]:
    """A table of JSON lines beside its images; what to open, and the outcome of each row."""
    (folder / "folder").mkdir(parents=True)
    os.mkfifo(folder / "pipe")
    names = map("good{}.png".format, itertools.count())  # rows of one image would be one sample

    def plain() -> dict[str, Any]:
        (folder / (name := next(names))).write_bytes(good_image(0))
        return {"image": name, "org_caption": "a web caption", "long": "Long one. Long two."}

    rows = [(plain() | {"org_caption": text}, outcome) for text, outcome in CAPTIONS.values()]
    rows += [(plain() | {"long": text}, outcome) for text, outcome in CAPTIONS.values()]
    rows += [(plain() | {"image": path}, outcome) for path, outcome in PATHS.values()]
    for i, (data, outcome) in enumerate(make_images().values()):
        (folder / f"{i}.bin").write_bytes(data)
        rows.append((plain() | {"image": f"{i}.bin"}, outcome))
    lines = [(json.dumps(row).encode(), outcome) for row, outcome in rows]
    lines += [(line, outcome) for line, outcome in JSONS.values() if outcome != USED]
    lines += [(json.dumps(plain()).encode(), USED) for _ in range(GOOD)]
    (folder / "table.jsonl").write_bytes(b"\n".join(line for line, _ in reversed(lines)))
    return str(folder / "table.jsonl"), {str(i): outcome for i, (_, outcome) in enumerate(reversed(lines))}


def write_llava(folder: Path) -> tuple[str, dict[str, str]]:
    """data.json beside images/; the outcome of each record by its number."""
    images = folder / "images"
    images.mkdir(parents=True)
    (images / "good.png").write_bytes(good_image(0))
    (folder / "outside.png").write_bytes(good_image(0))
    (images / "link.png").symlink_to(folder / "outside.png")
    os.mkfifo(images / "pipe")
    records = list(RECORDS.values())
    for i, (data, outcome) in enumerate(make_images().values()):
        (images / f"{i}.bin").write_bytes(data)
        records.append((_asking(f"{i}.bin"), outcome))
    (folder / "data.json").write_text(json.dumps([record for record, _ in records]))
    return str(folder / "data.json"), {str(i): outcome for i, (_, outcome) in enumerate(records)}


# ------------------------------------------------------------------------------------------------- the consumers
Reasons = dict[str, str]
"""Of each sample that was left out, by its key, row or number."""


def through_the_loader(spec: str, wanted: dict[str, str]) -> Reasons:
    """One epoch, after the import: each sample's own position holds it, or a substitute and the reason."""
    from conftest import tiny_run

    from clips.config import Fields
    from clips.data.dataset import KEY, Dataset, open_data
    from clips.data.loader import make_loader
    from clips.data.tokenizer import build_tokenizer

    def keys_of(dataset: Dataset) -> set[str]:
        return {key.decode() for part in dataset.parts for key in part.column(KEY).to_pylist()}

    is_table, run = spec.endswith(".jsonl"), tiny_run()
    fields = Fields(image="img", web="json:org_caption", long="txt")
    if is_table:
        fields = Fields(image="image", web="org_caption", long="long")
    source = open_data(spec, fields, need_long=False)
    reasons: Reasons = {key: reason for part in source.parts for key, reason in part.facts["examples"]}
    imported = keys_of(source)
    assert imported == wanted.keys() - reasons.keys()
    source = source.with_long()
    reasons |= dict.fromkeys(imported - keys_of(source), "long caption is empty")
    tokenizer = build_tokenizer("bert")
    run = replace(run, model=replace(run.model, text=replace(run.model.text, vocab_size=tokenizer.vocab_size)))
    run = replace(run, phases=(replace(run.phases[0], samples=8 * -(-len(source) // 8), batch_size=8),))

    def named(key: str) -> str:  # a table's row also names its image: t.jsonl#3 (a.png)
        return (key.partition(" (")[0] if is_table else key).rpartition("#")[2]

    keys: Counter[str] = Counter()
    for batch in make_loader(source, tokenizer, run, rank=0, world_size=1):
        assert batch["images"].float().isfinite().all()
        keys.update(map(named, batch["keys"]))
        reasons |= {named(key): reason for key, reason in batch["skipped"]}
    assert keys.total() == run.phases[0].samples
    assert keys.keys() == wanted.keys() - reasons.keys(), "each good one is used, and no bad one"
    return reasons


def through_llava_data(spec: str, wanted: dict[str, str]) -> Reasons:
    """As training reads it: the records when it begins, each image when its batch comes."""
    from tiny_tokenizers import make_tokenizer

    from clips import BrokenSample
    from mllm.data.conversation import ConversationEncoder
    from mllm.data.dataset import LlavaDataset
    from mllm.data.images import ImageStore

    encoder = ConversationEncoder(make_tokenizer("gpt2"), "chatml", 4, 120)
    store = ImageStore(Path(spec).parent / "images")
    dataset = LlavaDataset(spec, encoder, store, "skip")
    reasons = {str(problem["index"]): problem["message"] for problem in dataset.skipped}
    for row, record in enumerate(dataset.records):
        sample = dataset[row]
        assert len(sample["input_ids"]) == len(sample["labels"]) <= 120
        try:
            for name in sample["images"]:
                store.load(name)
        except BrokenSample as broken:
            reasons[str(record.index)] = broken.reason
    return reasons


ROUTES: dict[str, tuple[Callable[[Path], tuple[str, dict[str, str]]], Callable[..., Reasons]]] = {
    "shards": (write_shards, through_the_loader),
    "table": (write_table, through_the_loader),
    "LLaVA data": (write_llava, through_llava_data),
}
"""Set → what writes it, and what reads it."""


def main(folder: Path, route: str) -> None:
    import torch  # noqa: F401 - part of what is there before

    write, consumer = ROUTES[route]
    spec, wanted = write(folder / "set")
    # What writing took is no part of what reading takes.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = _peak()
    reasons = consumer(spec, wanted)
    result = {"wanted": wanted, "reasons": reasons, "grown_mib": _peak() - before}
    (folder / "result.json").write_text(json.dumps(result))


def _peak() -> float:
    """Most memory that this process had since it was last told to forget, MiB."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
