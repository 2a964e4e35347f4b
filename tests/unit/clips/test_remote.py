"""Data behind URLs, from a real HTTP server that fails: what is read equals local files, and copies have a size."""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from launched import make_images, recap, write_shard, write_table
from range_server import RangeServer, serving

from clips.common.errors import CommandError, UserError
from clips.common.paths import without_secrets
from clips.common.runtime import unused_port
from clips.config import Fields, RunConfig
from clips.data import order, remote
from clips.data.dataset import open_data
from clips.data.loader import ReadAhead, make_loader
from clips.data.order import SampleOrder
from clips.data.remote import Copies, stamp
from clips.data.sample import BrokenSample
from clips.data.tokenizer import CaptionTokenizer, build_tokenizer
from tests.conftest import tiny_run

pytest.importorskip("aiohttp", reason="fsspec[http] is not installed")
SHARDS, SAMPLES = 6, 16
TABLE = Fields(image="image", web="web", long="long")


@pytest.fixture(autouse=True)
def _soon_again(own_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "DELAYS", (0.01, 0.02, 0.04))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards whose groups are two shards each, with small_groups."""
    folder = tmp_path_factory.mktemp("data")
    samples = [(image, recap(web, long)) for image, web, long in make_images(SHARDS * SAMPLES)]
    for i in range(SHARDS):
        write_shard(folder / f"{i}.tar", samples[i * SAMPLES : (i + 1) * SAMPLES])
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[RangeServer]:
    with serving(folder) as server:
        yield server


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order.SampleOrder.__init__, "__defaults__", (SAMPLES, 2 * SAMPLES))


@pytest.fixture(scope="module")
def tokenizer() -> CaptionTokenizer:
    return build_tokenizer("wordpiece", [long for *_, long in make_images(8)], vocab_size=64)


def a_run(workers: int = 0, cache_gb: float = 1) -> RunConfig:
    run = tiny_run()
    return replace(run, data=replace(run.data, workers=workers, cache_gb=cache_gb))


def batches(spec: str, tokenizer: CaptionTokenizer, run: RunConfig) -> list[dict]:
    source = open_data(spec, Fields(), need_long=True)
    return list(make_loader(source, tokenizer, lasting(run, 2 * SHARDS * SAMPLES), rank=0, world_size=1))


def lasting(run: RunConfig, samples: int) -> RunConfig:
    return replace(run, phases=(replace(run.phases[0], samples=samples),))


def assert_equal(found: list[dict], expected: list[dict]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert [key.rpartition("/")[2] for key in a["keys"]] == [key.rpartition("/")[2] for key in b["keys"]]
        assert a["skipped"] == b["skipped"] == []
        for name in ("images", "web", "sub", "caption"):
            assert torch.equal(a[name], b[name])


def taken(cache: Path) -> int:
    total = 0
    for entry in os.scandir(cache / "remote"):
        with contextlib.suppress(FileNotFoundError):  # a copy that makes room for another one meanwhile
            total += entry.stat().st_size if "-" in entry.name else 0
    return total


def spec(server: RangeServer) -> str:
    return f"{server.url}/{{0..{SHARDS - 1}}}.tar"


def test_batches_equal_those_of_local_files(folder, server, small_groups, tokenizer) -> None:
    remote = batches(spec(server), tokenizer, a_run(workers=2))
    assert_equal(remote, batches(str(folder), tokenizer, a_run()))
    for i in range(SHARDS):
        size = (folder / f"{i}.tar").stat().st_size
        assert server.sent[f"{i}.tar"] == size, "once, for the import and the training"


def test_a_server_that_fails_now_and_then_changes_nothing(folder, server, small_groups, tokenizer) -> None:
    faults = (503, "cut", 429, None, "slow")
    server.fault = lambda method, name, before: faults[before % 5] if method == "GET" else (503, None)[before % 2]
    assert_equal(batches(spec(server), tokenizer, a_run()), batches(str(folder), tokenizer, a_run()))


def test_one_that_goes_on_failing_ends_the_run_with_its_url(server, tokenizer) -> None:
    source = open_data(spec(server), Fields(), need_long=True, cache_gb=0)  # else it has copies
    server.fault = lambda method, name, before: "cut" if name == "3.tar" and method == "GET" else None
    run = a_run(cache_gb=0)
    loader = make_loader(source, tokenizer, lasting(run, 12 * run.phases[0].batch_size), rank=0, world_size=1)
    with pytest.raises(CommandError, match=rf"{server.url}/3.tar cannot be read: .*4 attempts") as ended:
        list(loader)
    assert ended.value.exit_code == 1


def test_what_cannot_be_read_is_refused_at_once(server, folder: Path) -> None:
    with pytest.raises(UserError, match=rf"{server.url}/none.tar cannot be read"):
        open_data(f"{server.url}/none.tar", Fields(), need_long=True)
    server.fault = lambda method, name, before: 403
    with pytest.raises(UserError, match="403"):
        open_data(spec(server), Fields(), need_long=True)
    assert sum(server.asked.values()) < 20, "nothing is tried again"
    with serving(folder, ranges=False) as without, pytest.raises(UserError, match="supports ranges"):
        open_data(f"{without.url}/0.tar", Fields(), need_long=True).read(3)
    url = f"http://127.0.0.1:{unused_port()}/0.tar"
    with pytest.raises(CommandError, match=f"{url} cannot be read"):
        open_data(url, Fields(), need_long=True)


@pytest.mark.parametrize(
    ("attack", "kind", "said"),
    [
        *(("endless", UserError, "ranges"), ("packed", UserError, "gzip"), ("drip", CommandError, "bytes came")),
        ("silent", CommandError, "TimeoutError"),
    ],
)
def test_an_answer_is_bounded_by_what_was_asked(server, monkeypatch, attack, kind, said):
    """In bytes and in time: little of an endless answer is read, and none is unpacked."""
    monkeypatch.setattr(remote, "PATIENCE", 0.2)
    monkeypatch.setattr(remote, "LISTING_BYTES", 10_000)
    server.fault = lambda method, name, before: attack
    with pytest.raises(kind, match=said):
        remote.read_range(f"{server.url}/0.tar", 100, 200)
    if attack == "endless":
        with pytest.raises(UserError, match="no data at"):
            open_data(f"{server.url}/*.tar", Fields(), need_long=True)
    assert server.sent[attack] < 2**25  # what the sockets hold


def test_passwords_and_signatures_stand_in_no_message(server: RangeServer, caplog: pytest.LogCaptureFixture) -> None:
    shown = f"{server.url}/0.tar#"
    url = f"http://me:secret@127.0.0.1:{server.server_port}/{{0..1}}.tar"
    source = open_data(url, Fields(), need_long=True)
    assert source.read(0).key.startswith(shown)
    assert without_secrets(f"{url} cannot be read") == f"{server.url}/{{0..1}}.tar cannot be read"
    assert without_secrets("no: 's3://b/x.tar?X-Amz-Signature=ab&c=d' (x?)") == "no: 's3://b/x.tar' (x?)"
    server.fault = lambda method, name, before: 503
    with pytest.raises(CommandError):
        source.read(20)
    assert "trying again" in caplog.text
    assert "secret" not in caplog.text + str(BrokenSample(url, url))


def test_a_shard_that_changes_under_the_run_is_noticed(folder, server, tokenizer, tmp_path: Path) -> None:
    server.root = tmp_path / "served"
    server.root.mkdir()
    for i in range(SHARDS):
        (server.root / f"{i}.tar").write_bytes((folder / f"{i}.tar").read_bytes())
    source = open_data(spec(server), Fields(), need_long=True, cache_gb=0)
    data = bytearray((server.root / "2.tar").read_bytes())
    data[600] ^= 1  # of the same size
    (server.root / "2.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"2\.tar has changed since this run opened it"):
        source.read(2 * SAMPLES)  # by ranges
    ReadAhead(source, source.order(0), 10**9).at(range(8))
    with pytest.raises(UserError, match=r"2\.tar has changed since this run opened it"):
        source.read(2 * SAMPLES)
    assert source.read(0).web
    assert open_data(spec(server), Fields(), need_long=True).read(2 * SAMPLES).web, "opened again, it is indexed anew"


def test_copies_keep_to_their_size(folder, server, small_groups, tokenizer, tmp_path: Path) -> None:
    """Two groups of three shares fit; of four shards of a group those without a copy are read by ranges."""
    size = (folder / "0.tar").stat().st_size
    for room, most in ((6.5, 6), (3.5, 3)):
        run = a_run(cache_gb=room * size / 1e9)
        source = open_data(spec(server), Fields(), need_long=True)
        seen = []
        run = lasting(run, 24 * run.phases[0].batch_size)
        for batch in make_loader(source, tokenizer, run, rank=0, world_size=1):
            assert not batch["skipped"]
            seen.append(taken(tmp_path / "cache"))
        assert 0 < max(seen) <= most * size * 1.05
    assert_equal(batches(spec(server), tokenizer, a_run(cache_gb=0)), batches(str(folder), tokenizer, a_run()))


def test_the_least_recently_used_copy_goes_first(folder, server, tmp_path: Path) -> None:
    urls = [f"{server.url}/{i}.tar" for i in range(4)]
    limit = int(3.5 * (folder / "0.tar").stat().st_size)
    cache = Copies(limit, tmp_path / "copies")
    states = {url: stamp(url) for url in urls}
    for url in (*urls[:3], urls[0], urls[3]):
        with cache.open(url, states[url]) as file:
            assert file.read() == (folder / url[-5:]).read_bytes()
        time.sleep(0.02)  # times of use that differ
    before = dict(server.sent)
    for url in (urls[0], urls[3]):
        cache.open(url, states[url]).close()
    assert server.sent == before, "still there"
    cache.open(urls[1], states[urls[1]]).close()
    assert server.sent["1.tar"] == 2 * before["1.tar"]
    assert Copies(limit // 4, tmp_path / "copies").open(urls[2], states[urls[2]]) is None, "larger than all there is"


def _read_all(url: str, folder: Path, ready, into) -> None:
    """A process of its own: copies of every shard, in the same order as the others."""
    ready.wait()
    cache = Copies(10**9, folder)
    texts = []
    for i in range(SHARDS):
        shard = f"{url}/{i}.tar"
        with cache.open(shard, stamp(shard)) as file:
            texts.append(file.read())
    into.put(texts)


def test_processes_share_what_one_fetches(folder, server, tmp_path: Path) -> None:
    server.fault = lambda method, name, before: "slow" if method == "GET" else None
    context = multiprocessing.get_context("fork")
    ready, found = context.Barrier(2), context.SimpleQueue()
    both = [context.Process(target=_read_all, args=(server.url, tmp_path / "c", ready, found)) for _ in range(2)]
    for process in both:
        process.start()
    expected = [(folder / f"{i}.tar").read_bytes() for i in range(SHARDS)]
    assert [found.get(), found.get()] == [expected, expected]
    for process in both:
        process.join()
    assert server.sent == {f"{i}.tar": len(data) for i, data in enumerate(expected)}


def test_a_process_killed_while_it_fetches_leaves_nothing_wrong(folder, server, tmp_path: Path) -> None:
    cache, url = tmp_path / "c", f"{server.url}/0.tar"
    server.fault = lambda method, name, before: "slow" if method == "GET" and before == 0 else None
    process = multiprocessing.get_context("fork").Process(
        target=_read_all, args=(server.url, cache, multiprocessing.Barrier(1), multiprocessing.SimpleQueue())
    )
    process.start()
    while not list(cache.glob("*.part")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert list(cache.glob("*.part"))
    with Copies(10**9, cache).open(url, stamp(url)) as file:
        assert file.read() == (folder / "0.tar").read_bytes()
    (cache / f"{'0' * 24}-dead.part").write_bytes(b"x" * 10)
    size = (folder / "1.tar").stat().st_size
    Copies(int(1.2 * size), cache).open(f"{server.url}/1.tar", stamp(f"{server.url}/1.tar")).close()
    assert [path.name for path in cache.glob("*.part")] == [], "removed with what had to go"


def test_a_table_behind_a_url_holds_its_images(server, tmp_path: Path) -> None:
    server.root = tmp_path
    image, web, long = make_images(1)[0]
    write_table(tmp_path / "t.parquet", [{"image": image, "web": web, "long": long}])
    assert open_data(f"{server.url}/t.parquet", TABLE, need_long=True).read(0).image == image
    write_table(tmp_path / "t.jsonl", [{"image": "0.png", "web": web, "long": long}])
    with pytest.raises(UserError, match="img2dataset"):
        open_data(f"{server.url}/t.jsonl", TABLE, need_long=True)


def test_the_order_names_its_shards_and_the_next(small_groups) -> None:
    sizes = [5, 40, 16, 1, 33, 20]
    drawn = SampleOrder(sizes, 3)
    ends = np.cumsum(sizes)
    for position in range(0, 3 * sum(sizes), 5):
        now, then = drawn.shards(position)
        shard = int(np.searchsorted(ends, drawn.sample(position), side="right"))
        assert shard in now
        following = int(np.searchsorted(ends, drawn.sample(position + 40), side="right"))
        assert following in {*now, *then, *drawn.shards(position + 40)[0]}
    last = drawn.shards(sum(sizes) - 1)[1]
    assert last == drawn.shards(sum(sizes))[0], "after the last group comes the first of the next epoch"
