"""Tar shards and tables: what is there is found, what is damaged is named, what climbs out is refused."""

import json
import pickle
import re
import tarfile
from dataclasses import replace
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from bad_corpus import square as make_image
from launched import write_table, write_tar
from pyarrow import parquet

from clips.common.errors import BrokenDataError, UserError
from clips.common.files import write_json
from clips.config import Fields
from clips.data.dataset import Dataset, open_data
from clips.data.importing import tables
from clips.data.importing.index import MOST_ROWS
from clips.data.importing.layouts import expand
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


def test_an_import_is_made_once_and_only_of_what_is_new(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    twice = [member for i in (0, 1, 0) for member in sample(i).items()]
    path = write_tar(tmp_path / "a.tar", twice)
    source = open_tar(tmp_path)
    assert capfd.readouterr().err.startswith(f"imported {path}: 2 samples, index of 0.0 MB in {tmp_path}/.clips/")
    written = {file: file.stat().st_mtime_ns for file in source.path.parent.glob("*.*")}
    assert numbers(pickle.loads(pickle.dumps(open_tar(tmp_path)))) == [0, 1]
    assert "imported" not in capfd.readouterr().err
    shard(tmp_path / "b.tar", 2, 2)
    assert numbers(open_tar(tmp_path)) == [0, 1, 2, 3]
    assert "imported" in capfd.readouterr().err
    again = {file for file, time in written.items() if file.stat().st_mtime_ns != time}
    assert again == {source.path}, "the index of a.tar is taken over"
    assert open_tar(tmp_path).notes == source.notes != [], "and what was said of it"

    shard(path, 10, 3)
    with pytest.raises(UserError, match=r"a\.tar has changed since it was imported: .*check_data\.py"):
        open_tar(source.path)
    assert numbers(open_tar(tmp_path)) == [10, 11, 12, 2, 3]
    capfd.readouterr()
    assert numbers(open_tar(source.path)) == [10, 11, 12, 2, 3], "by its manifest"
    assert "imported" not in capfd.readouterr().err
    write_tar(path, [])
    assert numbers(open_tar(tmp_path)) == [2, 3], "the fields are those of the first shard that has samples"
    with pytest.raises(BrokenDataError, match=r"no sample of .*a\.tar can be used"):
        open_tar(path)
    write_json(tmp_path / "manifest.json", {})
    with pytest.raises(UserError, match="is no manifest of an import"):
        open_tar(tmp_path / "manifest.json")


def test_an_index_that_cannot_stand_beside_goes_to_the_cache(tmp_path: Path) -> None:
    (tmp_path / ".clips").write_text("no folder")  # as for a folder that cannot be written, which root always can
    source = open_tar(shard(tmp_path / "a.tar", 0, 2))
    assert numbers(source) == [0, 1]
    assert source.path.is_relative_to(tmp_path / "cache/imports")
    index = source.path.parent / source.parts[0].facts["index"]
    index.write_bytes(b"")
    with pytest.raises(UserError, match=r"damaged .*: remove its folder"):
        open_tar(tmp_path / "a.tar").read(0)


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
        assert (len(source), source.skipped) == (2, (2, 4))
        for i in range(2):
            sample = source.read(i)
            assert (sample.image, sample.web, sample.long) == (make_image(i), ROWS[i]["alt"], ROWS[i]["long"])
            assert sample.extra == {"label": ROWS[i]["label"]}
            assert sample.key == f"{path}#{i} (pics/{i}.png)"
        reasons = dict(source.parts[0].facts["examples"])
        assert reasons == {"2": "web caption is empty", "3": f"missing image: 'pics/gone.png' is not in {tmp_path}"}
        assert len(list(source.all_captions())) == 4


def test_a_folder_of_links_is_read_and_a_way_out_is_not(tmp_path: Path) -> None:
    """As in the Hugging Face cache, DVC and git-annex: the images themselves are elsewhere."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "set").mkdir()
    for i in range(3):
        (tmp_path / f"blobs/{i}").write_bytes(make_image(i))
        (tmp_path / f"set/{i}.png").symlink_to(f"../blobs/{i}")
    (tmp_path / "set/linked").symlink_to(tmp_path / "blobs")
    names = ["0.png", "linked/1", "../blobs/2", "2.png", str(tmp_path / "blobs/0")]
    path = write_table(tmp_path / "set/t.jsonl", [{"image": name, "alt": name, "long": "l"} for name in names])
    source = open_tar(path, TABLE_FIELDS)
    assert [source.read(i).image for i in range(len(source))] == [make_image(i) for i in range(3)]
    assert source.skipped == (2, 5)
    assert re.search(r"2 image outside.*'../blobs/2' is outside .*--image-root .*allow_outside", source.notes[-1])
    taken = open_data(str(path), TABLE_FIELDS, need_long=True, allow_outside=True)
    assert (len(taken), taken.read(2).image) == (5, make_image(2))


def test_rows_that_repeat_each_other_cost_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Millions of equal rows fit in a small Parquet file; what it unpacks to is bounded, and so is a sample of them."""
    (tmp_path / "a.png").write_bytes(make_image(1))

    def repeated(count: int, text: str) -> Path:
        rows = {
            name: pa.array([cell]).take(pa.array([0] * count)) for name, cell in (("image", "a.png"), ("alt", text))
        }
        parquet.write_table(pa.table(rows), path := tmp_path / f"{count}.parquet")
        return path

    fields = replace(TABLE_FIELDS, long="")
    assert len(open_tar(repeated(5_000, "w"), fields, need_long=False).captions(0).web) == MOST_ROWS
    monkeypatch.setattr(tables, "UNPACKED", 2**16)
    with pytest.raises(UserError, match="repeat each other"):
        open_tar(repeated(100_000, "w"), fields, need_long=False)
    with pytest.raises(UserError, match="repeat each other"):
        open_tar(repeated(tables.ROWS_PER_BATCH, "w" * 2**16), fields, need_long=False)  # in the first batch


def csv_of(path: Path, rows: list[str]) -> Path:
    for name in "abc":
        (path.parent / f"{name}.png").write_bytes(make_image(ord(name)))
    path.write_text("\n".join(["image,alt,long", *rows, ""]), "utf-8", "surrogateescape")
    return path


@pytest.mark.parametrize(
    ("rows", "left", "said"),
    [
        (["a.png,w,l", "b.png,w,l", *["a.png,one, two,l"] * 3000], 2, "3,000 of 3,002 rows .* the first is line 4"),
        (["a.png,w,l", 'a.png,"open,l', 'b.png,"w, w",l', "c.png,w,l"], 3, "1 of 4 rows .* the first is line 3"),
        (["a.png,ä ö ü,l", "b.png,\udcff,l"], 1, "1 of 2 rows .* the first is 1: column alt: not UTF-8"),
        (['a.png,"two\nlines, ""quoted""",l', 'b.png,5" wide,l', 'c.png,"say "hi" to",l'], 3, ""),
    ],
    ids=["comma", "quote", "byte", "whole"],
)
def test_rows_that_do_not_fit_are_counted(tmp_path, caplog, rows, left, said):
    path = csv_of(tmp_path / "t.csv", rows)
    source = open_tar(path, TABLE_FIELDS)
    assert len(source) == left
    assert re.search(said, caplog.text)
    assert len(caplog.records) == bool(said)
    if said:
        with pytest.raises(BrokenDataError, match=r"rows cannot be used.*\n.*(more or fewer cells|not UTF-8)"):
            check_readable(source, 0.01)
