"""Whole programs side by side: scripts/pretrain_clips.py against open_clip's own trainer, `open_clip_train.main`.

Both train CLIP: one text a picture, the shards' .txt, and InfoNCE. Both are started as a user starts them and read the
same tar files with one worker each. Towers have the same sizes; batch, precision, threads and AdamW are equal. Pictures
are cropped to 90–100 % of their area. The programs take turns. Each is watched from outside by its own log: when a line
comes, and how many samples it says were seen. Samples/s are those between the first line after the warm-up and the last
one; all before the first line is start-up. Then the program is ended: its last checkpoint and evaluation are not
measured.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from clips.common.errors import CommandError, UserError
from clips.common.files import write_json
from clips.common.live import LINE_SECONDS
from clips.common.paths import SCRIPTS
from clips.common.runtime import has_bf16
from clips.config import RunConfig
from clips.data.splits import open_split
from clips.data.tokenizer import build_tokenizer
from clips.studies.measuring import resident
from clips.training.cli import config_from_flags, parser
from clips.weights.open_clip import open_clip_config

SCRIPT = SCRIPTS / "pretrain_clips.py"
SIZES: Mapping[str, tuple[str, int, int]] = {
    "demo": ("clip_baseline", 128, 100),
    "s16": ("s16", 32, 20),
    "b16": ("b16", 16, 10),
}
"""Size → recipe, samples a step, steps of a turn. Of s16 and b16 it is their first phase, at 112 px, at a batch and for
a time that a CPU can bear."""
LINES = 10
"""Lines of the log in a turn."""
WARM = 0.2
"""Share of a turn's samples that are not timed."""
OURS = re.compile(r"^([\d,]+) of [\d,]+ samples ")
THEIRS = re.compile(r"Train Epoch: \d+ \[\s*(\d+)/")
"""Where a line of the log tells how many samples were seen."""


@dataclass(frozen=True)
class Turn:
    """One run of a program."""

    samples_per_s: float
    samples_per_cpu_s: float
    """By the processor time of the training process and its worker, which a busy machine leaves comparable."""
    startup_s: float
    """Until the first line of its log, less what the samples before that take at this speed."""
    peak_memory_MB: float
    """Of the training process, resident, without its data worker; on a GPU what the device holds more than before."""


def compare_programs(
    size: str, *, device: torch.device, repeats: int, train: Path, their_python: str
) -> dict[str, Any]:
    """{"ratios": …, "ours": …, "theirs": …}: medians over the turns, of the ratio of samples/s the extremes too.

    `train`: the folder of shards, laid out as the demo's. UserError where `their_python` has no trainer of open_clip,
    CommandError where a program ends before its turn does.
    """
    _check_trainer(their_python)
    _, batch, steps = SIZES[size]
    turns: dict[str, list[Turn]] = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory() as folder:
        flags = our_flags(size, device, train, Path(folder, "runs"))
        run = config_from_flags(parser().parse_args(flags))
        stock = write_stock_config(run, Path(folder))
        for turn in range(repeats):
            ours = [sys.executable, str(SCRIPT), *flags, "--name", f"{turn}"]
            theirs = [their_python, "-m", "open_clip_train.main"]
            theirs += their_flags(run, device, train, stock, Path(folder, "logs", f"{turn}"))
            turns["ours"].append(watch(ours, OURS, batch * steps, device))
            turns["theirs"].append(watch(theirs, THEIRS, batch * steps, device))
            rates = ", ".join(f"{name} {found[-1].samples_per_s:,.4g}" for name, found in turns.items())
            print(f"turn {turn + 1} of {repeats}, samples/s: {rates}", file=sys.stderr)
    return summary(turns["ours"], turns["theirs"])


def summary(ours: Sequence[Turn], theirs: Sequence[Turn]) -> dict[str, Any]:
    """See `compare_programs`; a ratio is of the two programs of one turn."""
    both = list(zip(ours, theirs, strict=True))
    rates = [a.samples_per_s / b.samples_per_s for a, b in both]
    processor = [a.samples_per_cpu_s / b.samples_per_cpu_s for a, b in both]
    memory = [a.peak_memory_MB / b.peak_memory_MB for a, b in both]
    return {
        "ratios": {
            "samples_per_s": statistics.median(rates), "samples_per_s_lowest": min(rates),
            "samples_per_s_highest": max(rates), "samples_per_cpu_s": statistics.median(processor),
            "peak_memory": statistics.median(memory),
        },
        "ours": _medians(ours),
        "theirs": _medians(theirs),
    }  # fmt: skip


def _medians(turns: Sequence[Turn]) -> dict[str, Any]:
    rows = [asdict(turn) for turn in turns]
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]} | {"turns": rows}


def _check_trainer(python: str) -> None:
    try:
        done = subprocess.run([python, "-c", "import open_clip_train.main"], capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"--their-python {python} cannot be started: {error}") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(
            f"--their-python {python} cannot import open_clip_train.main ({reason}): "
            "pip install 'open_clip_torch[training]' into it, or name an environment that has it"
        )


# -------------------------------------------------------------------------------------------------------- what is run
def our_flags(size: str, device: torch.device, train: Path, output: Path) -> list[str]:
    """Of scripts/pretrain_clips.py."""
    recipe, batch, steps = SIZES[size]
    settings = [
        "optim.kind=adamw", "data.workers=1", f"train.precision={'bf16' if has_bf16(device) else 'fp32'}",
        "train.activation_checkpointing=false", "train.eval_every=0", "train.checkpoint_every=0",
        f"train.log_every={max(1, steps // LINES)}", "phases.*.augment.min_crop_area=0.9",
        "phases.*.augment.jitter=0", "phases.*.augment.hue=0",
        "phases.*.augment.grayscale=0", "task.objective=clip", "task.synthetic_share=0", "model.captioner=null",
    ]  # fmt: skip
    return [
        *("--recipe", recipe, "--data", str(train), "--fields", "web=txt", "long=txt"),
        *("--output", str(output), "--batch-size", str(batch), "--samples", str(batch * steps)),
        *("--device", device.type, "--set", *settings),
    ]


def write_stock_config(run: RunConfig, folder: Path) -> Path:
    """The directory with open_clip's configuration and tokenizer of the model that `run` begins with."""
    source = open_split(run.data, "train", need_long=False)
    texts = source.captions() if run.captions.tokenizer == "wordpiece" else None
    tokenizer = build_tokenizer(run.captions.tokenizer, texts, vocab_size=run.model.text.vocab_size)
    model = replace(run.model, vision=replace(run.model.vision, image_size=run.phases[0].image_size))
    directory = folder / "stock"
    directory.mkdir()
    tokenizer.save(directory)
    write_json(directory / "open_clip_config.json", open_clip_config(model, tokenizer))
    return directory


def their_flags(run: RunConfig, device: torch.device, train: Path, stock: Path, logs: Path) -> list[str]:
    """Of open_clip_train.main, for what `run` trains first."""
    phase, optim = run.phases[0], run.optim
    return [
        *("--model", f"local-dir:{stock}", "--train-data", "::".join(map(str, sorted(train.glob("*.tar"))))),
        *("--dataset-type", "webdataset", "--train-num-samples", str(phase.samples), "--epochs", "1"),
        *("--batch-size", str(phase.batch_size), "--workers", str(run.data.workers), "--device", device.type),
        *("--precision", "amp_bf16" if run.train.precision == "bf16" else "fp32", "--seed", str(run.train.seed)),
        *("--lr", str(phase.lr), "--wd", str(optim.weight_decay), "--eps", str(optim.eps)),
        *("--beta1", str(optim.betas[0]), "--beta2", str(optim.betas[1])),
        *("--warmup", str(phase.warmup_samples // phase.batch_size), "--log-every-n-steps", str(run.train.log_every)),
        *("--aug-cfg", "scale=(0.9,1.0)"),
        *("--logs", str(logs), "--name", "turn"),
    ]


# ----------------------------------------------------------------------------------------------------------- watching
def watch(command: Sequence[str], progress: re.Pattern[str], samples: int, device: torch.device) -> Turn:
    """Run `command` until its log says that `samples` were seen; then end it and its workers.

    `progress`: finds the samples seen, its first group, in a line of the log.
    """
    before = _device_memory(device)
    seen: list[tuple[int, float, float]] = []
    peak = 0.0
    last: deque[str] = deque(maxlen=15)
    begin = time.perf_counter()
    with _started(command) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last.append(line)
            if (found := progress.search(line)) is None:
                continue
            seen.append((int(found[1].replace(",", "")), time.perf_counter(), _cpu_seconds(process.pid)))
            memory = _device_memory(device) - before if device.type == "cuda" else resident("VmHWM", process.pid)
            peak = max(peak, memory)
            if seen[-1][0] >= samples:
                break
        else:
            code = process.wait()
            raise CommandError(f"{' '.join(command[:3])} … ended with {code} before its turn:\n{''.join(last)}")
    timed = [line for line in seen if line[0] >= WARM * samples]
    if len(timed) < 2:
        raise CommandError(f"{' '.join(command[:3])} … told of its progress too seldom to be timed: {seen}")
    count, seconds, cpu = (end - first for first, end in zip(timed[0], timed[-1], strict=True))
    rate = count / seconds
    return Turn(rate, count / cpu, seen[0][1] - begin - seen[0][0] / rate, peak)


def _cpu_seconds(pid: int) -> float:
    """Of a process and those that it started."""
    process = psutil.Process(pid)
    times = [found.cpu_times() for found in (process, *process.children(recursive=True))]
    return sum(found.user + found.system for found in times)


def _device_memory(device: torch.device) -> float:
    """MB in use on a GPU, over all processes; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / 1e6


@contextlib.contextmanager
def _started(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """The process, what it prints on both streams being `stdout`; killed with its children at the end."""
    env = os.environ | {LINE_SECONDS: "0"}  # every record is a line
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    try:
        yield process
    finally:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.send_signal(signal.SIGKILL)
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
