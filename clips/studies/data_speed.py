"""The data path at speed: the loader against bare decoding of the same files, and what opening many shards takes."""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from clips.common.paths import CACHE_VARIABLE
from clips.common.ranks import once_per_machine
from clips.common.runtime import unused_port
from clips.config import AugmentConfig, Fields, RunConfig
from clips.data.images import decode_image
from clips.data.loader import Batch, make_loader
from clips.data.sources import Source, open_source
from clips.data.tokenizer import CaptionTokenizer, build_tokenizer
from clips.recipes import recipe
from clips.studies.measuring import PeakMemory, Row, in_child
from clips.studies.sentence_set import captions

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------- loader
PHOTOS = ((500, 375, 64, 5), (1600, 1200, 16, 6))
"""(width, height, pictures, how often each is read in a turn)"""
SIDE = 224
"""Pixels that they are squashed to; 1600 × 1200 is decoded at half its size for it, 500 × 375 whole."""
BATCH = 16
FALL = 0.7
"""By which power of the octave its waves weaken: a picture of 500 × 375 then takes 100 KB, as ImageNet's do."""
Speed = tuple[float, float]
"""Pictures a second, and milliseconds of processor time a picture, over all processes."""


def loader_rows(repeats: int) -> list[Row]:
    """Pictures/s of the loader, texts and all, against processes that only read, decode and squash the same files.

    Both decode at the same scale, and neither augments (`data` measures that). Turns alternate; figures are medians,
    of the ratio of pictures/s also the lowest and highest. Processor time is what a busy machine leaves comparable.
    """
    rows = []
    tokenizer = build_tokenizer(recipe("b16").captions.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        for width, height, count, times in PHOTOS:
            files, source = write_photos(Path(folder, f"{width}"), width, height, count)
            for workers in (1, 2):
                rows.append({
                    "pictures": f"{width} × {height}", "KB": sum(f.stat().st_size for f in files) / count / 1e3,
                    "workers": workers, **_loader_row(files, times, source, tokenizer, workers, repeats),
                })  # fmt: skip
                print(f"{width} × {height}, {workers} workers done", file=sys.stderr)
    return rows


def _loader_row(
    files: list[Path], times: int, source: Source, tokenizer: CaptionTokenizer, workers: int, repeats: int
) -> Row:
    run = _loader_run(workers, len(files) * times)
    width, height = decode_image(files[0].read_bytes()).size
    factor = 2 if min(width, height) >= 4 * SIDE else 1
    with ProcessPoolExecutor(workers, multiprocessing.get_context("forkserver")) as pool:
        turns: dict[str, Callable[[], Speed]] = {
            "bare": partial(_bare_speed, pool, workers, files * times, width * height // factor**2),
            "loader": partial(_loader_speed, run, source, tokenizer),
        }
        for turn in turns.values():
            turn()
        whole = _bare_speed(pool, workers, files, None)
        speeds: dict[str, list[Speed]] = {name: [] for name in turns}
        for _ in range(repeats):
            for name, turn in turns.items():
                speeds[name].append(turn())
    ratios = [loader[0] / bare[0] for loader, bare in zip(speeds["loader"], speeds["bare"], strict=True)]
    rates = {name: statistics.median(rate for rate, _ in found) for name, found in speeds.items()}
    cpu = {name: statistics.median(ms for _, ms in found) for name, found in speeds.items()}
    batch = next(make_loader(source, tokenizer, _loader_run(0, BATCH), rank=0, world_size=1))
    shared, images = _bytes(batch), batch["images"].nbytes
    return {
        "bare_per_s": rates["bare"], "loader_per_s": rates["loader"],
        "loader / bare": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios),
        "bare_cpu_ms": cpu["bare"], "loader_cpu_ms": cpu["loader"], "bare / loader, cpu": cpu["bare"] / cpu["loader"],
        "whole_cpu_ms": whole[1], "batch_MB": shared / 1e6, "as_float32_MB": (shared + 3 * images) / 1e6,
    }  # fmt: skip


def _bytes(batch: Batch) -> int:
    """What a batch takes of shared memory on its way from a worker."""
    return sum(x.nbytes for x in batch.values() if torch.is_tensor(x))


def _loader_run(workers: int, samples: int) -> RunConfig:
    run = recipe("b16")
    phase = replace(
        run.phases[0], image_size=SIDE, batch_size=BATCH, samples=samples, warmup_samples=0, augment=AugmentConfig()
    )
    return replace(run, data=replace(run.data, workers=workers), phases=(phase,))


def _loader_speed(run: RunConfig, source: Source, tokenizer: CaptionTokenizer) -> Speed:
    """From the first batch of each worker on: their start, and what a fork has to copy, comes once in a run."""
    others = set(multiprocessing.active_children())
    loader = make_loader(source, tokenizer, run, rank=0, world_size=1)
    first, steps = run.data.workers, run.phases[0].steps
    list(islice(loader, first))
    workers = [child.pid for child in set(multiprocessing.active_children()) - others]
    begin, before = time.perf_counter(), _cpu_seconds(workers)
    seen = sum(len(batch["keys"]) for batch in islice(loader, steps - first))
    rate, used = seen / (time.perf_counter() - begin), _cpu_seconds(workers) - before
    return rate, 1e3 * used / seen


def _cpu_seconds(processes: Sequence[int | None]) -> float:
    """Of this process and of `processes` (Linux)."""
    stat = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in processes]
    ticks = sum(int(fields[11]) + int(fields[12]) for fields in stat)  # utime and stime, counted from behind the name
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def _bare_speed(pool: ProcessPoolExecutor, processes: int, files: Sequence[Path], reduce_to: int | None) -> Speed:
    parts = [files[i::processes] for i in range(processes)]
    begin = time.perf_counter()
    used = sum(pool.map(partial(_decode_and_squash, reduce_to=reduce_to), parts))
    return len(files) / (time.perf_counter() - begin), 1e3 * used / len(files)


def _decode_and_squash(files: Sequence[Path], reduce_to: int | None) -> float:
    """Seconds of processor time that it took."""
    begin = time.process_time()
    for file in files:
        decode_image(file.read_bytes(), reduce_to=reduce_to).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return time.process_time() - begin


def write_photos(folder: Path, width: int, height: int, count: int) -> tuple[list[Path], Source]:
    """`count` JPEGs as files, and with captions as a shard of img2dataset's layout."""
    folder.mkdir(parents=True)
    longs = [caption.text for caption in captions(count, "tuned")]
    files = [folder / f"{i:05d}.jpg" for i in range(count)]
    with tarfile.open(folder / "photos.tar", "w") as tar:
        for i, (file, long) in enumerate(zip(files, longs, strict=True)):
            photo(width, height, seed=i).save(file, "JPEG", quality=95)
            web = json.dumps({"org_caption": " ".join(long.split()[:10])})
            for extension, data in (("jpg", file.read_bytes()), ("json", web.encode()), ("txt", long.encode())):
                tar.addfile(_member(f"{i:05d}.{extension}", data), io.BytesIO(data))
    return files, open_source(str(folder / "photos.tar"), Fields(), need_long=True)


def _member(name: str, data: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    return member


def photo(width: int, height: int, seed: int) -> Image.Image:
    """Bent waves in each channel, from broad ones to some of four pixels: a photograph's structures, without noise."""
    rng = np.random.default_rng(seed)
    y, x = (np.mgrid[0:height, 0:width] / height).astype(np.float32)
    channels = []
    for _ in range(3):
        channel = np.zeros((height, width), dtype=np.float32)
        for octave in range(round(math.log2(height / 2))):
            frequency, (angle, phase) = 3 * 2.0**octave, rng.uniform(0, 2 * np.pi, 2)
            bent = np.cos(angle) * x + np.sin(angle) * y
            channel += np.sin(frequency * bent + phase + 2 * np.sin(0.7 * frequency * y + angle)) / (octave + 1) ** FALL
        channels.append(channel)
    return Image.fromarray((127.5 + 60 * np.stack(channels, axis=-1)).clip(0, 255).astype(np.uint8))


# --------------------------------------------------------------------------------------------------------- startup
def startup_rows(shards: int) -> list[Row]:
    """Seconds and peak memory until `shards` shards of one or two samples are open: indexed, warm, and on two ranks.

    Memory is what the process takes above its imports.
    """
    with tempfile.TemporaryDirectory() as folder:
        data, cache = Path(folder, "data"), Path(folder, "cache")
        print(f"making {shards:,} shards in {folder}", file=sys.stderr)
        write_small_shards(data, shards)
        rows = [
            {"shards": shards, "what": what, **in_child(_opened_alone, str(data), str(cache))}
            for what in ("one process, nothing indexed yet", "one process, all indexed")
        ]
        port = unused_port()
        with ProcessPoolExecutor(2, multiprocessing.get_context("forkserver")) as pool:
            ranks = list(pool.map(partial(_opened_by_rank, str(data), str(cache), port), range(2)))
    names = ("the first rank of a machine", "its others, which are handed what the first opened")
    return rows + [{"shards": shards, "what": name, **row} for name, row in zip(names, ranks, strict=True)]


def _opened_alone(data: str, cache: str) -> Row:
    os.environ[CACHE_VARIABLE] = cache
    return _measured(partial(open_source, data, Fields(), need_long=True))


def _opened_by_rank(data: str, cache: str, port: int, rank: int) -> Row:
    os.environ[CACHE_VARIABLE] = cache
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        return _measured(lambda: once_per_machine(partial(open_source, data, Fields(), need_long=True), data))
    finally:
        dist.destroy_process_group()


def _measured(make: Callable[[], Source]) -> Row:
    memory, begin = PeakMemory(CPU), time.perf_counter()
    source = make()
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "peak_MB": memory.read(), "samples": len(source)}


def write_small_shards(folder: Path, count: int) -> None:
    """`count` tars of img2dataset's layout, of one and of two samples in turns, with pictures of about 100 bytes."""
    folder.mkdir(parents=True)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "teal").save(buffer, "PNG")
    parts = {"png": buffer.getvalue(), "json": b'{"org_caption": "a tile"}', "txt": b"A tile. It is teal."}
    samples = [_tarred({f"{i}.{extension}": data for extension, data in parts.items()}) for i in range(2)]
    end = bytes(2 * tarfile.BLOCKSIZE)
    for i in range(count):
        (folder / f"{i:06d}.tar").write_bytes(b"".join(samples[: 1 + i % 2]) + end)


def _tarred(files: dict[str, bytes]) -> bytes:
    """The members as a tar holds them, without its end."""
    blocks = (
        (_member(name, data).tobuf(), data, bytes(-len(data) % tarfile.BLOCKSIZE)) for name, data in files.items()
    )
    return b"".join(chain.from_iterable(blocks))
