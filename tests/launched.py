"""What the tests of the pretraining command share: starting and watching real processes, small real data."""

import contextlib
import csv
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet
from bad_corpus import encode
from conftest import ROOT, run_group
from PIL import Image

from clips.common.runtime import unused_port

SCRIPT = "scripts/pretrain_clips.py"
MACHINE = (
    *("time", "samples_per_s", "step_seconds", "rank_seconds", "data_wait_share", "peak_memory_gb"),
    *("memory_gb", "samples_per_s_per_gpu", "tflops", "mfu"),
    "validation_seconds",
)
"""What a line of metrics.jsonl holds that tells of the machine: two equal runs differ in it."""
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


@dataclass
class Done:
    code: int
    text: str


def python(*arguments: str | Path) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def torchrun(*arguments: str | Path, per_host: int = 2) -> list[str]:
    """Ranks on this host alone, unless the arguments say where several hosts meet."""
    meet = () if any(str(word).startswith("--rdzv") for word in arguments) else ("--standalone",)
    return python("-m", "torch.distributed.run", *meet, f"--nproc-per-node={per_host}", *arguments)


def deepspeed(*arguments: str | Path, per_host: int = 2) -> list[str]:
    port = unused_port()
    launcher = Path(sys.executable).with_name("deepspeed")
    return [str(launcher), "--num_accelerators", str(per_host), "--master_port", str(port), *map(str, arguments)]


def run(command: list[str], timeout: float = 300, env: Mapping[str, str] | None = None) -> Done:
    """Run to the end, as a user would; both streams together."""
    done = run_group(command, cwd=ROOT, env=ENV | (env or {}), stderr=subprocess.STDOUT, timeout=timeout)
    return Done(done.returncode, done.stdout)


def run_all(commands: dict[str, list[str]], **options: Any) -> dict[str, Done]:
    """Independent commands, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(commands, pool.map(partial(run, **options), commands.values()), strict=True))


@contextlib.contextmanager
def started(command: list[str], log: Path, env: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process group of its own, with nothing left of it at the end."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=ENV | (env or {}), stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield process
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                for below in psutil.Process(process.pid).children(
                    recursive=True
                ):  # torchrun's have groups of their own
                    with contextlib.suppress(psutil.NoSuchProcess):
                        below.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(
    condition: Callable[[], Any], process: subprocess.Popen[bytes] | None, log: Path, timeout: float = 120
) -> None:
    """Fails when the time is over, or when `process` ends before."""
    end = time.monotonic() + timeout
    while not condition():
        assert process is None or process.poll() is None, (
            f"ended with {process and process.returncode}:\n{log.read_text(encoding='utf-8')[-3000:]}"
        )
        assert time.monotonic() < end, log.read_text(encoding="utf-8")[-3000:]
        time.sleep(0.005)


def lines(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    file = run_dir / name
    whole = file.read_text().rpartition("\n")[0] if file.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def make_images(count: int, kind: str = "PNG") -> list[tuple[bytes, str, str]]:
    """(image, web caption, long caption), each different."""
    samples = []
    for i in range(count):
        image = Image.new("RGB", (40, 36), ((i * 37) % 256, (i * 91) % 256, (i * 53) % 256))
        image.paste((255, 255, 255), (i % 30, i % 20, i % 30 + 8, i % 20 + 8))
        samples.append((encode(image, kind), f"stock photo {i}", f"A plain image. It has number {i}. A box is white."))
    return samples


def write_shard(path: Path, samples: list[tuple[bytes, dict[str, bytes]]], extension: str = "png") -> Path:
    rows = enumerate({extension: image, **rest} for image, rest in samples)
    return write_tar(path, ((f"{i:05d}.{name}", data) for i, row in rows for name, data in row.items()))


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write a table in the form that the suffix names: parquet, JSON lines, or text with tabs or commas."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def recap(web: str, long: str) -> dict[str, bytes]:
    """The default layout: img2dataset's, with a recaption in .txt."""
    return {"txt": long.encode(), "json": json.dumps({"org_caption": web}).encode()}


def small_data(folder: Path) -> tuple[str, ...]:
    """Write 64 training samples in two shards, and 16 for validation and test. Returns the flags that name them."""
    samples = [(image, recap(web, long)) for image, web, long in make_images(80)]
    write_shard(folder / "train/0.tar", samples[:40])
    write_shard(folder / "train/1.tar", samples[40:64])
    write_shard(folder / "test.tar", samples[64:])
    return splits(folder)


def splits(folder: Path) -> tuple[str, ...]:
    """Flags that name the data of `small_data` in `folder`."""
    held_out = str(folder / "test.tar")
    return ("--recipe", "demo", "--data", f"{folder}/train", "--val-data", held_out, "--test-data", held_out)


def endless(out: Path, shards: tuple[str, ...], *flags: str) -> list[str]:
    """The run OUT/r with more steps than any test waits for."""
    return [SCRIPT, "--debug", "--name", "r", "--output", str(out), *shards, "--samples", "400000", *flags]


# What a run leaves


def trace(run_dir: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Every logged metric that does not depend on the machine."""
    return [{k: v for k, v in line.items() if k not in MACHINE} for line in lines(run_dir) if line["kind"] == kind]


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))


def latest(run_dir: Path) -> Path:
    """The newest checkpoint."""
    return run_dir / "checkpoints" / (run_dir / "LATEST").read_text().strip()


def state(run_dir: Path) -> dict[str, Any]:
    return json.loads((latest(run_dir) / "state.json").read_text())


def last_step(run_dir: Path) -> int:
    """The last step that the run has logged; 0 before the first."""
    return found[-1]["step"] if (found := lines(run_dir)) else 0


def assert_saved_at_the_end(run_dir: Path) -> None:
    assert latest(run_dir).name == f"step-{last_step(run_dir):08d}"


def assert_same_training(run_dir: Path, other: Path, checkpoint: str) -> None:
    """Equal loss traces and evaluations, and an equal checkpoint, bit for bit."""
    for kind in ("train", "eval"):
        assert trace(run_dir, kind) == trace(other, kind)
    for name in ("model.safetensors", "optimizer.safetensors"):
        files = [folder / "checkpoints" / checkpoint / name for folder in (run_dir, other)]
        assert files[0].read_bytes() == files[1].read_bytes(), name


def assert_finished(run_dir: Path) -> None:
    for name in ("config.json", "env.json", "metrics.jsonl", "skipped.jsonl", "LATEST", "report/index.html"):
        assert (run_dir / name).is_file(), name
    for name in ("native", "open_clip", "hf_vit"):
        assert any((run_dir / "export" / name).glob("*.safetensors")), name
    assert "<img" in (run_dir / "report/index.html").read_text()
    assert list((run_dir / "tensorboard").iterdir())
    values = json.loads((run_dir / "evaluation.json").read_text())["metrics"]
    assert values
    assert all(0 <= metric["value"] <= 100 for metric in values.values())


def assert_said(done: Done, code: int, *words: str) -> None:
    """The command ended with `code`, without a traceback, and said the words."""
    assert done.code == code, done.text
    assert "Traceback" not in done.text
    for word in words:
        assert word in done.text, f"{word!r} is not in:\n{done.text}"


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


def of_run(out: Path) -> list[psutil.Process]:
    """Those whose command names the output directory `out`."""

    def is_ours(process: psutil.Process) -> bool:
        try:
            return str(out) in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    return [process for process in psutil.process_iter() if is_ours(process)]


def wait_until_gone(out: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while of_run(out) and time.monotonic() < end:
        time.sleep(0.1)
    assert of_run(out) == []


def environment(process: psutil.Process) -> dict[str, str]:
    """The environment of a process, or nothing if it has ended."""
    try:
        return process.environ() if process.status() != psutil.STATUS_ZOMBIE else {}
    except psutil.Error:
        return {}


def rank(out: Path, number: int) -> psutil.Process | None:
    """The training process of a rank, or None if it has ended."""
    processes = [process for process in of_run(out) if environment(process).get("RANK") == str(number)]
    return min(processes, key=psutil.Process.create_time, default=None)  # its workers came later
