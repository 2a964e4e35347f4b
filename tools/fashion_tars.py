#!/usr/bin/env python
"""Make the splits of the fashion photographs that docs/results-photographs.md measures, from the hub's tables.

    hf download ashraq/fashion-product-images-small --repo-type dataset --local-dir data/fashion
    python tools/fashion_tars.py data/fashion data/fashion-tars
    PHOTOS=data/fashion-tars bash scripts/quickstart.sh photos

fashion_split.json, beside this file, lists the products of each split by the hub's `id`. OUTPUT gets fashion-train.tar,
fashion-val.tar and fashion-test.tar, with ID.jpg and ID.json for each product. Their bytes depend on the tables only.
"""

import io
import json
import sys
import tarfile
from pathlib import Path

from pyarrow import parquet

from clips.common.errors import UserError, run_command
from clips.common.files import read_json, replacing
from clips.common.flags import Parser

SPLIT = Path(__file__).with_name("fashion_split.json")
KEPT = ("gender", "masterCategory", "subCategory", "articleType", "baseColour", "season", "year", "usage")
"""Columns that go into ID.json under their own names; productDisplayName goes in as `name`."""


def write_tars(tables: Path, output: Path, split: Path = SPLIT) -> dict[str, int]:
    """Write OUTPUT/fashion-SPLIT.tar for each split, and return the number of products in each.

    Raises UserError if `output` exists, and if `tables` holds no Parquet or lacks a product of the split.
    """
    if output.exists():
        raise UserError(f"{output} exists: give a new folder")
    files = sorted(tables.rglob("*.parquet"))
    if not files:
        raise UserError(f"{tables}: no .parquet file (hf download ashraq/fashion-product-images-small)")
    splits = read_json(split)
    wanted = {number for numbers in splits.values() for number in numbers}
    found = {}
    for file in files:
        for batch in parquet.ParquetFile(file).iter_batches(512):
            found.update({row["id"]: row for row in batch.to_pylist() if row["id"] in wanted})
    missing = wanted - found.keys()
    if missing:
        raise UserError(f"{tables} lacks {len(missing):,} of {len(wanted):,} products, such as {min(missing)}")
    with replacing(output) as work:
        for name, numbers in splits.items():
            with tarfile.open(work / f"fashion-{name}.tar", "w") as archive:
                for number in numbers:
                    row = found[number]
                    cells = {"name": row["productDisplayName"]} | {key: row[key] for key in KEPT}
                    year = cells["year"]
                    cells["year"] = None if year is None or year != year else str(int(year))
                    for ending, content in (("jpg", row["image"]["bytes"]), ("json", json.dumps(cells).encode())):
                        member = tarfile.TarInfo(f"{number}.{ending}")
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
    return {name: len(numbers) for name, numbers in splits.items()}


def parser() -> Parser:
    p = Parser((__doc__ or "").partition("\n")[0])
    p.add_argument("tables", type=Path, help="folder of `hf download`")
    p.add_argument("output", type=Path, help="new folder for the tars")
    return p


def main() -> None:
    flags = parser().parse_args()
    for name, count in write_tars(flags.tables, flags.output).items():
        print(f"{flags.output}/fashion-{name}.tar: {count:,} products")


if __name__ == "__main__":
    sys.exit(run_command(main))
