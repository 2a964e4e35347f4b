"""Tar shards and tables: what is there is found, what is damaged is named, what climbs out is refused."""

import json
import os
import pickle
import re
import tarfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import fsspec
import pyarrow as pa
import pytest
from bad_corpus import square as make_image
from launched import write_table, write_tar
from pyarrow import parquet

from clips.common.errors import BrokenDataError, UserError
from clips.config import Fields
from clips.data.dataset import Dataset, open_data
from clips.data.importing.index import MOST_ROWS
from clips.data.importing.layouts import expand, warn_once
from clips.data.sample import BrokenSample
from clips.data.splits import check_readable

pytestmark = pytest.mark.usefixtures("own_cache")
FIELDS = Fields(image="jpg;png", web="json:org_caption", long="txt")


def sample(i: int, **changes: bytes | None) -> dict[str, bytes]:
    members = {
        "png": make_image(i % 256),
        "json": json.dumps({"org_caption": f"web {i}", "label": i}).encode(),
        "txt": f"Long {i}.".encode(),
    }
    members |= changes
    return {f"s{i:03d}.{extension}": data for extension, data in members.items() if data is not None}


def shard(path: Path, first: int, count: int) -> Path:
    return write_tar(path, [member for i in range(first, first + count) for member in sample(i).items()])


def numbers(source: Dataset) -> list[int]:
    return [source.read(i).extra["label"] for i in range(len(source))]


def open_tar(spec: object, fields: Fields = FIELDS, need_long: bool = True) -> Dataset:
    return open_data(str(spec), fields, need_long=need_long)


def test_samples_are_read_by_index(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", 0, 3)
    shard(tmp_path / "b.tar", 3, 5)
    source = open_tar(tmp_path)
    assert source.part_sizes == [3, 5]
    for i in (7, 0, 3, 2):
        sample = source.read(i)
        assert (sample.web, sample.long, sample.image) == (f"web {i}", f"Long {i}.", make_image(i))
        assert sample.extra["label"] == i
        assert sample.key.endswith(f"{'ab'[i >= 3]}.tar#s{i:03d}")
    assert list(source.all_captions()) == [text for i in range(8) for text in (f"web {i}", f"Long {i}.")]
    with pytest.raises(IndexError):
        source.read(8)


def test_every_way_to_name_shards(tmp_path: Path) -> None:
    files = [shard(tmp_path / f"{i:05d}.tar", i, 1) for i in range(4)]
    for i, file in enumerate(files):
        fsspec.filesystem("memory").pipe(f"/set/{i}.tar", file.read_bytes())
    for spec in (
        tmp_path, tmp_path / "*.tar", tmp_path / "{00000..00003}.tar", ";".join(map(str, files)),
        f"file://{tmp_path}/*.tar", "memory://set/*.tar", "memory://set/{0..3}.tar",
    ):  # fmt: skip
        assert numbers(open_tar(spec)) == [0, 1, 2, 3], spec
    assert expand(f"{tmp_path}/{{00001..00002}}.tar") == [str(file) for file in files[1:3]]


def test_the_index_follows_its_shard(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", 0, 2)
    assert len(open_tar(path)) == 2
    (index,) = tmp_path.glob(".a.tar.*.idx.safetensors")
    written = index.stat().st_mtime_ns
    assert numbers(open_tar(path)) == [0, 1]
    assert index.stat().st_mtime_ns == written, "an index that fits is used again"
    shard(path, 10, 3)
    assert numbers(open_tar(path)) == [10, 11, 12]
    assert len(list(tmp_path.glob(".a.tar.*"))) == 1, "the old index is gone"


def test_an_index_that_cannot_stand_beside_goes_to_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shard(tmp_path / "a.tar", 0, 2)
    placing = sidecar_module.placing

    def refuse(target: Path) -> object:
        if target.parent == tmp_path:
            raise PermissionError(f"read-only: {target}")
        return placing(target)

    monkeypatch.setattr(sidecar_module, "placing", refuse)
    assert numbers(open_tar(path)) == [0, 1]
    assert len(list((tmp_path / "cache").rglob("*.idx.safetensors"))) == 1
    assert not list(tmp_path.glob(".a.tar.*"))


def test_it_travels_to_a_worker_and_opens_its_own_files(tmp_path: Path) -> None:
    source = open_tar(shard(tmp_path / "a.tar", 0, 3))
    source.read(0)
    (index,) = tmp_path.glob(".a.tar.*")
    index.unlink()  # and makes an index again that is gone
    assert numbers(pickle.loads(pickle.dumps(source))) == [0, 1, 2]
    source.read(0)
    position = source._shard(0).file.tell()
    if (child := os.fork()) == 0:
        os._exit(0 if numbers(source) == [0, 1, 2] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert source._shard(0).file.tell() == position, "a forked process must not move its parent's file"


def test_field_alternatives_and_nested_extensions(tmp_path: Path) -> None:
    members = {
        "d/a.seg.png": b"mask", "d/a.jpg": b"one", "d/a.txt": b" web a ", "d/a.long.txt": b"long a", "d/a.cls": b"7\n",
        "d/b.png": b"two", "d/b.json": b'{"alt": "web b", "long": "long b"}', "d/.hidden": b"x", "README": b"x",
    }  # fmt: skip
    write_tar(tmp_path / "a.tar", members.items())
    source = open_tar(tmp_path, Fields(image="jpg;png", web="json:alt;txt", long="long.txt;json:long"))
    samples = [source.read(i) for i in range(2)]
    assert [(s.image, s.web, s.long) for s in samples] == [(b"one", "web a", "long a"), (b"two", "web b", "long b")]
    assert samples[0].extra == {"cls": "7"}


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path: Path, format: int) -> None:
    stem = "ä/" * 60 + "日" * 100
    members = {f"{stem}{name.removeprefix('s000')}": data for name, data in sample(0).items()}
    source = open_tar(write_tar(tmp_path / "a.tar", members.items(), format=format))
    assert source.read(0).key.endswith(f"#{stem}")


def test_wrong_fields_list_what_is_there(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", 0, 2)
    for fields in (Fields(image="jpeg"), Fields(web="json:caption"), Fields(long="json:long")):
        with pytest.raises(UserError) as raised:
            open_tar(tmp_path, fields)
        for name in ("png", "txt", "json:org_caption", "json:label", "--fields"):
            assert name in str(raised.value)
    assert open_tar(tmp_path, Fields(long="json:long"), need_long=False).read(1).long is None


def headers(path: Path) -> dict[str, int]:
    with tarfile.open(path) as tar:
        return {member.name: member.offset for member in tar}


@pytest.mark.parametrize(
    ("damage", "left", "said"),
    [
        (lambda data, at: data[: at["s002.png"]] + bytes(at["s004.png"] - at["s002.png"]) + data[at["s004.png"] :],
         [0, 1, 4, 5], r"after member s001\.txt"),
        (lambda data, at: data[: at["s004.json"] + 100], [0, 1, 2, 3], "ends inside a header"),
    ],
    ids=["hole", "cut in a header"],
)  # fmt: skip
def test_damage_costs_its_samples_only(tmp_path, damage, left, said, caplog):
    path = shard(tmp_path / "a.tar", 0, 6)
    path.write_bytes(damage(bytearray(path.read_bytes()), headers(path)))
    assert numbers(open_tar(path)) == left
    assert re.search(said, caplog.text)


def test_a_shard_that_shrinks_under_the_run_breaks_samples(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", 0, 3)
    source = open_tar(path)
    with open(path, "r+b") as file:
        file.truncate(headers(path)["s002.png"])
    assert source.read(0).web == "web 0"
    with pytest.raises(BrokenSample, match="cut off"):
        source.read(2)


ROWS = [
    {"image": "pics/0.png", "alt": 'a "quoted", text', "long": "Line one.\nLine two.", "label": "x"},
    {"image": "pics/1.png", "alt": "ünïcode", "long": "Long 1.", "label": "y"},
    {"image": "pics/2.png", "alt": "", "long": "Long 2.", "label": "z"},
    {"image": "pics/gone.png", "alt": "web 3", "long": "Long 3.", "label": "x"},
]
TABLE_FIELDS = Fields(image="image", web="alt", long="long")


@pytest.mark.parametrize("suffix", [".tsv", ".jsonl", ".parquet"])
def test_tables(tmp_path: Path, suffix: str) -> None:
    path = write_table(tmp_path / f"t{suffix}", ROWS)
    (tmp_path / "pics").mkdir()
    for i in range(3):
        (tmp_path / f"pics/{i}.png").write_bytes(make_image(i))
    for source in (open_tar(path, TABLE_FIELDS), pickle.loads(pickle.dumps(open_tar(path, TABLE_FIELDS)))):
        assert len(source) == 4
        for i in range(2):
            sample = source.read(i)
            assert (sample.image, sample.web, sample.long) == (make_image(i), ROWS[i]["alt"], ROWS[i]["long"])
            assert sample.extra == {"label": ROWS[i]["label"]}
            assert sample.key == f"{path}#{i} (pics/{i}.png)"
        with pytest.raises(BrokenSample, match="web caption is empty"):
            source.read(2)
        with pytest.raises(BrokenSample, match=r"gone\.png"):
            source.read(3)
        assert len(list(source.all_captions())) == 6


def test_an_image_of_bytes_that_are_text_is_broken(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": value, "path": None}, "alt": "w", "long": "l"} for value in ("t.jsonl", 10**12)]
    path = write_table(tmp_path / "t.jsonl", rows)
    source = open_tar(path, TABLE_FIELDS)
    for index in range(2):
        with pytest.raises(BrokenSample, match="neither a path nor bytes"):
            source.read(index)


def test_rows_that_repeat_each_other_cost_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Millions of equal rows fit in a small Parquet file; a copy of theirs is bounded, and so is a sample of them."""
    (tmp_path / "a.png").write_bytes(make_image(1))
    count = 100_000
    column = {name: pa.array([text]).take(pa.array([0] * count)) for name, text in (("image", "a.png"), ("alt", "w"))}
    parquet.write_table(pa.table(column), path := tmp_path / "t.parquet")
    source = open_tar(path, replace(TABLE_FIELDS, long=""), need_long=False)
    with mock.patch.object(table.Table, "row", autospec=True, side_effect=table.Table.row) as rows:
        assert source.read(0).web == "w"
    assert 1 < rows.call_count <= MOST_ROWS
    monkeypatch.setattr(table, "UNPACKED", 2**16)
    os.utime(path, (0, 0))  # else its copy is there
    with pytest.raises(UserError, match="repeat each other"):
        open_tar(path, replace(TABLE_FIELDS, long=""), need_long=False)


def csv_of(path: Path, rows: list[str]) -> Path:
    for name in "abc":
        (path.parent / f"{name}.png").write_bytes(make_image(ord(name)))
    path.write_text("\n".join(["image,alt,long", *rows, ""]), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("rows", "left", "said"),
    [
        (
            ["a.png,w,l", "b.png,w,l", *["a.png,one, two,l"] * 3000],
            2,
            "3,000 of 3,002 rows skipped, the first is row 4",
        ),
        (["a.png,w,l", 'a.png,"open,l', 'b.png,"w, w",l', "c.png,w,l"], 3, "1 of 4 rows skipped, the first is row 3"),
        (['a.png,"two\nlines, ""quoted""",l', 'b.png,5" wide,l', 'c.png,"say "hi" to",l'], 3, ""),
    ],
    ids=["comma", "quote", "whole"],
)
def test_rows_that_are_left_out_are_counted_by_every_command(tmp_path, caplog, rows, left, said):
    path = csv_of(tmp_path / "t.csv", rows)
    for _ in range(2):  # the second time the copy is there
        warn_once.cache_clear()
        caplog.clear()
        source = open_tar(path, TABLE_FIELDS)
        assert len(source) == left
        assert source.left_out == [source.unreadable]
        assert said in caplog.text
        assert len(caplog.records) == bool(said)
    if said:
        with pytest.raises(BrokenDataError, match="rows do not fit"):
            check_readable(source, 0.01)
