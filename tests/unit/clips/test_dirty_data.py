"""Rows and members as strangers make them: each breaks itself alone, in bounded time, and says what is wrong."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from clips.common.errors import CommandError, UserError
from clips.config import Fields
from clips.data.sample import BrokenSample
from clips.data.sources import MAX_CAPTION, open_source
from clips.data.tokenizer import build_tokenizer
from clips.recipes import recipe
from clips.training.log import RunLog
from mllm.data.images import ImageStore

TABLE = Fields(image="image", web="web", long="long")
TAR = Fields(image="png", web="json:org_caption", long="txt")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPS_MLLM_CACHE", str(tmp_path / "cache"))


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "PNG")
    return buffer.getvalue()


def reason(source, index: int) -> str:
    with pytest.raises(BrokenSample) as broken:
        source.read(index)
    return broken.value.reason


# -------------------------------------------------------------------------------------------------- tables
def test_paths_that_are_none_break_their_rows(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    paths = ["a.png", "a\0.png", "\ud800.png", "x" * 5000 + ".png", "pipe", "."]
    os.mkfifo(tmp_path / "pipe")
    lines = [json.dumps({"image": path, "web": "w", "long": "Long."}) for path in paths]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    source = open_source(str(tmp_path / "t.jsonl"), TABLE, need_long=True)
    assert source.read(0).web == "w"
    assert "is no path" in reason(source, 1)
    assert "is no path" in reason(source, 2)
    assert "name too long" in reason(source, 3)
    assert "not a regular file" in reason(source, 4)  # reading a pipe would never end
    assert "directory" in reason(source, 5) or "regular file" in reason(source, 5)


def test_a_picture_that_is_a_pipe_hangs_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises((OSError, BrokenSample)):
        ImageStore(tmp_path).read("pipe.png")


def test_a_column_that_is_not_used_may_hold_anything(tmp_path: Path) -> None:
    """A time that Python does not have, a zone that nobody knows."""
    odd = pa.array([2**60, 1], pa.timestamp("ms", tz="Mars/Olympus"))
    table = pa.table({"image": [png(), png()], "web": ["w", "v"], "long": ["Long.", "Short."], "when": odd})
    pa.parquet.write_table(table, tmp_path / "t.parquet")
    source = open_source(str(tmp_path / "t.parquet"), TABLE, need_long=True)
    assert [source.read(i).web for i in range(2)] == ["w", "v"]
    assert source.read(0).extra == {}
    used = open_source(str(tmp_path / "t.parquet"), Fields(image="image", web="when", long="long"), need_long=True)
    assert "column when" in reason(used, 0)


def test_a_cell_in_another_encoding_breaks_its_row_where_it_is_used(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    rows = [b"image,web,long,note", b"a.png,w,Long.,caf\xe9", b"a.png,caf\xe9,Long.,x"]
    (tmp_path / "t.csv").write_bytes(b"\n".join(rows))
    source = open_source(str(tmp_path / "t.csv"), TABLE, need_long=True)
    assert source.read(0).web == "w"
    assert "column web" in reason(source, 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "image,web,long\na.png,w,l\n".encode("utf-16"), "UTF-16: save it as UTF-8"),
        ("t.jsonl", '{"image": "a", "web": "w", "long": "l"}'.encode("utf-16"), "UTF-16: save it as UTF-8"),
        ("t.csv", b"image,web,long,web\na.png,w,l,v\n", "more than one column 'web'"),
        ("t.csv", b"image,w\xffeb,long\na.png,w,l\n", "not a readable table"),
    ],
)
def test_a_table_that_cannot_be_used_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        open_source(str(tmp_path / name), TABLE, need_long=True)
    assert name in str(refused.value)


# ------------------------------------------------------------------------------------------------- captions
def test_captions_have_a_length(tmp_path: Path) -> None:
    row = {"image": "a.png", "web": "w " * MAX_CAPTION, "long": "x" * 2**20}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    web, long = open_source(str(tmp_path / "t.jsonl"), TABLE, need_long=True).texts(0)
    assert len(web) == MAX_CAPTION - 1
    assert len(long) == MAX_CAPTION


def test_a_word_of_a_megabyte_costs_a_tokenizer_nothing() -> None:
    texts = ["a red cat and two dogs"] * 3
    begin = time.process_time()
    with_giant = build_tokenizer("wordpiece", [*texts, "x" * 2**20, "ab" * 2**19], vocab_size=64)
    assert time.process_time() - begin < 60  # it was minutes
    assert with_giant.encode(["a red cat"]) == build_tokenizer("wordpiece", texts, vocab_size=64).encode(["a red cat"])


# ---------------------------------------------------------------------------------------------- tar members
def write_tar(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], **options: object) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(name: str) -> list[tuple[tarfile.TarInfo, bytes]]:
    parts = {"png": png(), "json": json.dumps({"org_caption": name}).encode(), "txt": b"Long."}
    return [(tarfile.TarInfo(f"{name}.{extension}"), data) for extension, data in parts.items()]


def webs(path: Path) -> list[str]:
    source = open_source(str(path), TAR, need_long=True)
    return [source.read(i).web for i in range(len(source))]


def test_names_that_are_not_utf8_stay_apart(tmp_path: Path) -> None:
    """Both were read as caf?, and one's picture was paired with the other's text."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name in ("café", "cafè"):
            for info, data in sample(name):
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    assert webs(tmp_path / "a.tar") == ["café", "cafè"]


@pytest.mark.parametrize("size", ["9" * 5000, str(10**17), "9" * 30])
def test_a_size_that_cannot_be_costs_its_own_member(tmp_path: Path, size: str) -> None:
    members = sample("a") + sample("b") + sample("c")
    members[3][0].pax_headers = {"size": size}
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for info, data in members:
            if "size" not in info.pax_headers:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
                continue
            # tarfile writes the header's own size beside the record; whoever reads the record is misled.
            body = b"%d size=%s\n"
            length = next(n for n in range(1, 10**5) if len(body % (n, size.encode())) == n)
            record = body % (length, size.encode())
            extended = tarfile.TarInfo("PaxHeaders/b")
            extended.type, extended.size = tarfile.XHDTYPE, len(record)
            tar.addfile(extended, io.BytesIO(record))
            info.pax_headers, info.size = {}, len(data)
            tar.addfile(info, io.BytesIO(data))
    assert webs(tmp_path / "a.tar") == ["a", "c"]


def test_sparse_members_are_not_read_as_plain(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = sample("a") + sample("b")
    members[0][0].pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a.png"}
    write_tar(tmp_path / "a.tar", members, format=tarfile.PAX_FORMAT)
    assert webs(tmp_path / "a.tar") == ["b"]
    assert "a.png is sparse" in caplog.text


# --------------------------------------------------------------------------------------------------- a full disk
def test_a_record_that_cannot_be_written_ends_the_run_with_the_reason(tmp_path: Path) -> None:
    log = RunLog(recipe("demo"), tmp_path, start_step=0, wandb=False, active=True)
    log.metrics = open("/dev/full", "a", buffering=1)  # noqa: SIM115 - closed by the log
    with pytest.raises(CommandError, match="record of step 3 cannot be written") as ended:
        log.record("train", {"step": 3, "samples": 30, "loss": 1.0})
    assert "No space left" in str(ended.value)
    log.close()
