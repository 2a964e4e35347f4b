"""The overview of many shards: the same as their own indexes, made once, and made again when a shard changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from launched import write_shard

from clips.config import Fields
from clips.data import shards
from clips.data.shards import open_shards
from clips.data.sources import index_data, open_source

FIELDS = Fields(image="png", web="web", long="txt")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPS_MLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shards, "OVERVIEW_FROM", 4)


def write(path: Path, count: int, *, without_long: int = 0) -> None:
    texts = [{"web": b"web"} | ({} if i < without_long else {"txt": b"txt"}) for i in range(count)]
    write_shard(path, [(b"png", text) for text in texts])


def make(folder: Path) -> list[str]:
    folder.mkdir()
    for i in range(6):
        write(folder / f"{i}.tar", i + 1, without_long=2 * (i == 5))
    return [str(path) for path in sorted(folder.glob("*.tar"))]


def overviews(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("shards-*.safetensors"))


def test_an_overview_is_what_the_shards_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = make(tmp_path / "data")
    first = open_shards(urls)
    assert len(overviews(tmp_path)) == 1
    monkeypatch.setattr(shards, "shard_summary", None)  # no shard's own index is read again
    again = open_shards(urls)
    assert (again.urls, again.indexes, again.layouts) == (first.urls, first.indexes, first.layouts)
    np.testing.assert_array_equal(again.counts, first.counts)
    assert again.layouts == [("png", "txt", "web"), ("png", "web")]
    assert again.counts.tolist() == [[1, 0], [2, 0], [3, 0], [4, 0], [5, 0], [4, 2]]


def test_a_changed_shard_is_seen(tmp_path: Path) -> None:
    urls = make(tmp_path / "data")
    open_shards(urls)
    for count in (9, 7):
        write(Path(urls[2]), count)
        assert open_shards(urls).counts[2].tolist() == [count, 0]
        assert len(list((tmp_path / "data").glob(".*.idx.safetensors"))) == 6, "and so is the outdated index"
    assert len(overviews(tmp_path)) == 1, "the outdated one is left behind"


def test_a_source_reads_alike_with_and_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "data")

    def keys() -> list[str]:
        source = open_source(str(tmp_path / "data"), FIELDS, need_long=True)
        return [source.read(i).key for i in range(len(source))]

    with_overview, from_overview = keys(), keys()
    monkeypatch.setattr(shards, "OVERVIEW_FROM", 1000)
    assert keys() == with_overview == from_overview
    assert len(with_overview) == 1 + 2 + 3 + 4 + 5 + 4
    monkeypatch.setattr(shards, "OVERVIEW_FROM", 4)
    for index in (tmp_path / "data").glob(".*"):
        index.unlink()  # the overview names indexes that are gone
    assert keys() == with_overview


def test_the_command_makes_what_training_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "data")
    index_data(str(tmp_path / "data"), 2)
    assert "6 shards, 21 samples" in capsys.readouterr().out
    assert len(list((tmp_path / "data").glob(".*.idx.safetensors"))) == 6
