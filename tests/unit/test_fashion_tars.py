"""Tars of the measured split, from tables as the hub has them."""

import json
import tarfile
from pathlib import Path

import pytest
from tiny_shop import make_image, products, write_hub

from clips.common.errors import UserError
from clips.common.files import read_json, sha256
from tools.fashion_tars import KEPT, SPLIT, write_tars


def test_each_split_has_its_products_in_its_order(tmp_path: Path) -> None:
    rows = products(12)
    hub, split = write_hub(tmp_path / "hub", rows), tmp_path / "split.json"
    split.write_text(json.dumps({"train": [15007, 15002, 15011], "test": [15000]}))
    assert write_tars(hub, tmp_path / "tars", split) == {"train": 3, "test": 1}
    with tarfile.open(tmp_path / "tars" / "fashion-train.tar") as archive:
        names = archive.getnames()
        members = {name: archive.extractfile(name).read() for name in names}  # type: ignore[union-attr]
    assert names == [f"{n}.{ending}" for n in (15007, 15002, 15011) for ending in ("jpg", "json")]
    assert members["15002.jpg"] == make_image(number=15002)
    cells = json.loads(members["15002.json"])
    row = rows[2]
    assert cells == {"name": row["productDisplayName"], **{key: row[key] for key in KEPT}, "year": "2012"}
    write_tars(hub, tmp_path / "again", split)
    train = "fashion-train.tar"
    assert sha256(tmp_path / "again" / train) == sha256(tmp_path / "tars" / train)


def test_what_is_refused(tmp_path: Path) -> None:
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": [15000, 99]}))
    hub = write_hub(tmp_path / "hub", products(4))
    with pytest.raises(UserError, match="lacks 1 of 2 products, such as 99"):
        write_tars(hub, tmp_path / "tars", split)
    with pytest.raises(UserError, match=r"no \.parquet file"):
        write_tars(tmp_path / "none", tmp_path / "tars", split)
    with pytest.raises(UserError, match="exists"):
        write_tars(hub, hub, split)


def test_the_measured_splits_share_no_product() -> None:
    splits = read_json(SPLIT)
    assert {name: len(numbers) for name, numbers in splits.items()} == {"train": 7983, "val": 600, "test": 1000}
    assert len({number for numbers in splits.values() for number in numbers}) == 9583
