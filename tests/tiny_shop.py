"""A shop of drawn products in the layouts of published sets: tar shards with JSON members, and the hub's Parquet."""

import json
import random
from itertools import chain
from pathlib import Path
from typing import Any

import launched
import pyarrow as pa
from bad_corpus import encode
from PIL import Image
from pyarrow import parquet

TEXTS = (
    "gender",
    "masterCategory",
    "subCategory",
    "articleType",
    "baseColour",
    "season",
    "usage",
    "productDisplayName",
)
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
STRINGS = [(name, pa.string()) for name in TEXTS]
HUB = pa.schema([("id", pa.int64()), ("year", pa.float64()), *STRINGS, ("image", PICTURE)])
"""Columns of ashraq/fashion-product-images-small."""


def products(count: int) -> list[dict[str, Any]]:
    """Attributes by the hub's names; four of five are casual."""
    rng = random.Random(0)
    rows = []
    for number in range(count):
        kind = rng.choice(("Shirts", "Belts", "Flip Flops"))
        colour = rng.choice(("Blue", "Red", "Navy Blue"))
        whom = rng.choice(("Men", "Women"))
        use = "Formal" if rng.random() < 0.2 else "Casual"
        values = (whom, "Apparel", kind, kind, colour, "Summer", use, f"Acme {whom} {colour} {kind}")
        rows.append({"id": 15000 + number, "year": 2012.0, **dict(zip(TEXTS, values, strict=True))})
    return rows


def make_image(kind: str = "JPEG", number: int = 0) -> bytes:
    """Other bytes for each number."""
    return encode(Image.new("RGB", (24, 32), (200, number // 16 % 16 * 16, number % 16 * 16)), kind)


def write_tar(path: Path, rows: list[dict[str, Any]], number: str = "id") -> Path:
    """KEY.jpg and KEY.json; an image for each `number`."""
    images = [(f"{row['id']}.jpg", make_image(number=row[number])) for row in rows]
    texts = [(f"{row['id']}.json", json.dumps(row).encode()) for row in rows]
    return launched.write_tar(path, chain(*zip(images, texts, strict=True)))


def write_hub(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """The set as `hf download` leaves it: two files with images inside."""
    (folder / "data").mkdir(parents=True)
    (folder / ".gitattributes").write_text("*.parquet filter=lfs\n")
    for part, digest in enumerate(("6cff4c59f91661c3", "bb459e5ac5f01e71")):
        of_part = [row | {"image": {"bytes": make_image(number=row["id"]), "path": None}} for row in rows[part::2]]
        table = pa.Table.from_pylist(of_part, schema=HUB)
        parquet.write_table(table, folder / "data" / f"train-0000{part}-of-00002-{digest}.parquet")
    return folder
