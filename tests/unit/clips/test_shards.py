"""The indexes of a set of shards: made once, and made again when a shard changes."""

import pickle
from pathlib import Path

import pytest
from launched import write_shard

from clips.config import Fields
from clips.data.shards import open_shards
from clips.data.sources import open_source

FIELDS = Fields(image="png", web="web", long="txt")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPS_MLLM_CACHE", str(tmp_path / "cache"))


def write(path: Path, count: int, *, without_long: int = 0) -> None:
    texts = [{"web": b"web"} | ({} if i < without_long else {"txt": b"txt"}) for i in range(count)]
    write_shard(path, [(b"png", text) for text in texts])


def make(folder: Path) -> list[str]:
    folder.mkdir()
    for i in range(6):
        write(folder / f"{i}.tar", i + 1, without_long=2 * (i == 5))
    return [str(path) for path in sorted(folder.glob("*.tar"))]


def test_a_set_is_what_its_shards_say(tmp_path: Path) -> None:
    shards = open_shards(make(tmp_path / "data"))
    assert shards.layouts == [("png", "txt", "web"), ("png", "web")]
    assert shards.counts.tolist() == [[1, 0], [2, 0], [3, 0], [4, 0], [5, 0], [4, 2]]


def test_an_index_that_is_gone_is_made_again(tmp_path: Path) -> None:
    make(tmp_path / "data")
    source = open_source(str(tmp_path / "data"), FIELDS, need_long=True)
    keys = [source.read(i).key for i in range(len(source))]
    assert len(keys) == 1 + 2 + 3 + 4 + 5 + 4
    for index in (tmp_path / "data").glob(".*"):
        index.unlink()
    source = pickle.loads(pickle.dumps(source))
    assert [source.read(i).key for i in range(len(source))] == keys
