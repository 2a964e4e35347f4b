"""A shop of drawn products in the layouts of published sets: tar shards with JSON members, and the hub's Parquet."""

from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image
from pyarrow import parquet

COLOURS = {"Blue": (20, 40, 220), "Red": (220, 30, 30), "Navy Blue": (10, 10, 90)}
COLUMNS = ("gender", "masterCategory", "subCategory", "articleType", "baseColour", "season", "year", "usage")


def products(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Attributes by the hub's names; four of five are casual."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        kind = rng.choice(("Shirts", "Belts", "Flip Flops"))
        colour = rng.choice(list(COLOURS))
        whom = rng.choice(("Men", "Women"))
        use = "Formal" if rng.random() < 0.2 else "Casual"
        values = (whom, "Apparel", kind, kind, colour, "Summer", 2012.0, use)
        named = {"id": 15000 + number, "productDisplayName": f"Acme {whom} {colour} {kind}"}
        rows.append(named | dict(zip(COLUMNS, values, strict=True)))
    return rows


def picture(row: dict[str, Any], kind: str = "JPEG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (24, 32), COLOURS.get(str(row.get("baseColour")), (9, 9, 9))).save(data, kind)
    return data.getvalue()


def write_tar(path: Path, rows: list[dict[str, Any]]) -> Path:
    """KEY.jpg and KEY.json, whose `name` is the hub's productDisplayName."""
    with tarfile.open(path, "w") as archive:
        for row in rows:
            attributes = {key: value for key, value in row.items() if key not in ("id", "productDisplayName")}
            member = json.dumps({"name": row.get("productDisplayName")} | attributes).encode()
            for ending, content in (("jpg", picture(row)), ("json", member)):
                info = tarfile.TarInfo(f"{row['id']}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def write_hub(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """ashraq/fashion-product-images-small as `hf download` leaves it: two files with pictures inside."""
    (folder / "data").mkdir(parents=True)
    (folder / ".gitattributes").write_text("*.parquet filter=lfs\n")
    for part, digest in enumerate(("6cff4c59f91661c3", "bb459e5ac5f01e71")):
        of_part = [row | {"image": {"bytes": picture(row), "path": None}} for row in rows[part::2]]
        schema = pa.schema(
            [("id", pa.int64())]
            + [(name, pa.float64() if name == "year" else pa.string()) for name in (*COLUMNS, "productDisplayName")]
            + [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))]
        )
        table = pa.Table.from_pylist(of_part, schema=schema)
        parquet.write_table(table, folder / "data" / f"train-0000{part}-of-00002-{digest}.parquet")
    return folder
