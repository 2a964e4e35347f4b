#!/usr/bin/env python
"""Check a GPU machine, then test and measure this project on it: tests/gpu, training speed and memory, chat.

Parts run in the order of their worth, so that a cut leaves the most valuable figures in the JSON file. Each measured
figure stands beside the expected figure. Each part is a process with a time limit, so that a part that fails or hangs
costs its own figures only; it is named.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from clips.common.errors import CommandError, UserError, first_line, run_command
from clips.common.files import write_json
from clips.common.flags import Parser
from clips.common.peaks import peak_flops
from clips.common.runtime import choose_device, environment, has_bf16, import_deepspeed, init_distributed
from clips.config import RunConfig
from clips.data.tokenizer import build_tokenizer
from clips.model.flops import BatchShape, training_flops
from clips.recipes import debug_twin, recipe
from clips.studies.benchmark import STEPS
from clips.studies.measuring import PeakMemory, fastest
from clips.training.engine import DEFAULT_DS_CONFIG
from clips.training.memory import usage
from clips.training.prepare import compute_dtype, fullest_shape

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"B/16": "b16", "L/14": "l14", "S/16": "s16"}
"""Preset → the recipe whose first phase is measured."""
LIMITS = {"checks": 60, "B/16": 100, "tests": 150, "L/14": 100, "S/16": 100, "chat": 60}
"""Seconds of each part, in the order of the run."""
MFU = 0.2
"""Share of the card's peak that the expected time of a step assumes, as scripts/plan_run.py."""
KINDS = {
    "ours, towers": ("ours, towers", False),
    "ours, towers, compiled": ("ours, towers", True),
    "open_clip, equal towers": ("open_clip", False),
    "ours, with the captioner": ("ours, CLIPS", False),
}
"""Row → (its kind in clips/studies/benchmark.py, whether it is compiled)."""
SLOWEST_STEP = 3.0
"""Seconds; a batch is not doubled beyond."""
Row = dict[str, Any]


def take(name: str, command: list[str], limit: float) -> Row:
    """Run one part: what went wrong, if anything, and its result (for the tests: the last line)."""
    begin, done = time.monotonic(), None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=ROOT)
        last = (done.stdout.strip() or done.stderr.strip() or "nothing printed").splitlines()[-1]
        problem = f"failed with exit code {done.returncode}: {last}" if done.returncode else ""
    except subprocess.TimeoutExpired:
        problem = f"stopped after {limit:.0f} s"
    return {"part": name, "seconds": time.monotonic() - begin, "problem": problem, "result": None if problem else last}


def quantised(device: torch.device) -> bool:
    """Whether bitsandbytes packs a matrix into 4 bits on `device`; raises what the library raises."""
    from bitsandbytes.functional import quantize_4bit

    return quantize_4bit(torch.randn(64, 64, device=device))[0].device == device


CHECKS: dict[str, tuple[Callable[[torch.device], object], str]] = {
    "driver": (
        lambda device: torch.zeros(1, device=device) + 1,
        "install NVIDIA driver 580 or newer",
    ),
    "bf16": (has_bf16, "this device only emulates bf16: give --set train.precision=fp32"),
    "NCCL": (lambda device: dist.is_nccl_available(), "this torch has no NCCL: install a CUDA build of torch"),
    "bitsandbytes": (quantised, "pip install -U bitsandbytes; without it leave --bits out"),
    "DeepSpeed": (lambda device: import_deepspeed(), "pip install 'deepspeed>=0.19.8,<0.20'"),
    "g++": (lambda device: shutil.which("g++"), "apt install g++; only train.compile=true needs it"),
}
"""What is checked → (the check, which raises or returns something false, and the sentence that mends it)."""


def checks(device: torch.device) -> list[Row]:
    """A row for each of CHECKS; `mend` is empty where all is well."""
    rows: list[Row] = []
    for what, (check, mend) in CHECKS.items():
        try:
            problem = "" if check(device) else mend
        except Exception as error:  # whatever a library raises is what this machine lacks
            problem = f"{mend} ({type(error).__name__}: {first_line(error)})"
        rows.append({"what": what, "mend": problem})
    return rows


def said(row: Row) -> str:
    """A measured row in words, each figure beside its expected figure."""
    if "mend" in row:
        return f"{row['what']}: {row['mend'] or 'ok'}"
    words = f"{row['size']} {row['what']}: {row['batch']:,} samples; "
    pairs = {"memory": ("peak_memory_gb", "predicted_gb", " GB"), "step": ("step_s", "expected_s", " s")}
    found = []
    for name, (measured_, expected, unit) in pairs.items():
        text = f"{name} {row[measured_]:.3g}{unit}"
        if expected in row:
            text += f" expected {row[expected]:.3g} ({row[measured_] / row[expected] - 1:+.0%})"
        found.append(text)
    return words + "; ".join(found)


def towers(name: str, device: torch.device, *, tiny: bool) -> list[Row]:
    """A row for each of KINDS: our towers with the largest batch that fits, then the others with the same batch, or the
    largest batch below it that they can hold. Texts have full length.
    """
    init_distributed(device)
    run = debug_twin(recipe(SIZES[name])) if tiny else recipe(SIZES[name])
    precision = "bf16" if has_bf16(device) else "fp32"
    rows: list[Row] = []
    for what, (kind, compiled) in KINDS.items():
        if compiled and device.type == "cpu":
            continue  # minutes of a C++ compiler
        variant = replace(run, train=replace(run.train, precision=precision, compile=compiled))
        if rows:
            row = largest(variant, kind, device, rows[0]["batch"], at_most=rows[0]["batch"])
        else:
            row = largest(variant, kind, device, 2 if tiny else 64, at_most=4 if tiny else 8192)
        rows.append({"what": what, "size": name, **row})
    return [row | {"of ours": row["samples_per_s"] / rows[0]["samples_per_s"]} for row in rows]


def largest(run: RunConfig, kind: str, device: torch.device, samples: int, *, at_most: int) -> Row:
    """The figures of the largest batch that fits: doubled from `samples` while steps are fast, or halved."""
    best: Row | None = None
    while 1 <= samples <= at_most:
        try:
            best = measured(run, kind, device, samples)
        except torch.OutOfMemoryError:
            if best is not None:
                break
            samples, at_most = samples // 2, samples // 2
            continue
        if samples / best["samples_per_s"] > SLOWEST_STEP:
            break
        samples *= 2
    if best is None:
        raise CommandError(f"{kind}: not even one sample fits")
    return best


def measured(run: RunConfig, kind: str, device: torch.device, samples: int) -> Row:
    """Samples/s and the peak of memory, for our own kinds beside the predicted peak."""
    phase = replace(run.phases[0], samples=samples, batch_size=samples, warmup_samples=0, lr=1e-4)
    model = replace(run.model, vision=replace(run.model.vision, image_size=phase.image_size))
    run = replace(run, model=model, phases=(phase,), train=replace(run.train, activation_checkpointing=False))
    batch = random_batch(run, fullest_shape(run, phase, samples, 1))
    memory, step = PeakMemory(device), STEPS[kind](run, build_tokenizer("bert"), device)
    seconds = fastest({kind: lambda: step(batch)}, 4, device)[kind]
    if kind != "ours, CLIPS":
        run = replace(run, model=replace(model, captioner=None), task=replace(run.task, caption_weight=0.0))
    shape = fullest_shape(run, phase, samples, 1)
    speed, (peak, _) = sum(training_flops(run.model, shape).values()) / seconds, peak_flops(device, compute_dtype(run))
    row = {"batch": samples, "samples_per_s": samples / seconds, "tflops": speed / 1e12, "mfu": speed / peak}
    row |= {"step_s": seconds, "expected_s": seconds * speed / (MFU * peak)}
    row["peak_memory_gb"] = memory.read() / 1e3
    if kind.startswith("ours"):
        row["predicted_gb"] = usage(run, shape, device.type, DEFAULT_DS_CONFIG["zero_optimization"]).total / 1e9
    return row


def random_batch(run: RunConfig, shape: BatchShape) -> dict[str, Any]:
    """In the layout of clips/data/loader.py, without padding."""
    slots = dict(zip(("web", "sub"), shape.texts, strict=False)) | ({"caption": shape.caption} if shape.caption else {})
    ids = {name: torch.randint(4, run.model.text.vocab_size, (shape.samples, count)) for name, count in slots.items()}
    size = (shape.samples, 3, shape.image_size, shape.image_size)
    return {"keys": [], "images": torch.randint(0, 256, size, dtype=torch.uint8), **ids}


def chat(model: str | None, device: str) -> Row:
    """Seconds to the first token and tokens/s of a second answer about one picture."""
    from PIL import Image

    from mllm.chat.model import ChatModel, Sampling
    from mllm.chat.session import ChatSession

    loaded = ChatModel.load(model, device=device, dtype="auto")
    for _ in range(2):
        session = ChatSession(loaded)
        list(session.ask("Describe it.", [Image.radial_gradient("L").convert("RGB")], Sampling(max_new_tokens=64)))
    assert session.last is not None
    return {"model": loaded.name, "first_token_s": session.last.first_token_s, "tokens_s": session.last.tokens_per_s}


def parser() -> argparse.ArgumentParser:
    p = Parser(__doc__)
    p.add_argument("--output", default="runs/gpu_report.json", help="the JSON file")
    p.add_argument("--device", default="cuda", help="cuda, or cpu with --tiny")
    p.add_argument("--model", help="the model to chat with (default: the newest runs/*/model)")
    p.add_argument("--tiny", action="store_true", help="tiny models, to see whether every part runs")
    p.add_argument("--part", choices=("checks", *SIZES, "chat"), help="measure this part alone and print its figures")
    return p


def main() -> None:
    flags = parser().parse_args()
    device = choose_device(flags.device)
    if device.type == "cpu" and not flags.tiny:
        raise UserError("--device cpu measures nothing of interest here: give --tiny too, to see whether the parts run")
    if flags.part is not None:
        found: Any
        if flags.part == "chat":
            found = chat(flags.model, flags.device)
        else:
            found = checks(device) if flags.part == "checks" else towers(flags.part, device, tiny=flags.tiny)
        print(json.dumps(found))
        return
    report: Row = {"machine": environment(device, 1), "tiny": flags.tiny, "parts": []}
    for name, limit in LIMITS.items():
        command = [sys.executable, __file__, *sys.argv[1:], "--part", name]
        if name == "tests":
            command = [sys.executable, "-m", "pytest", "-q", "tests/gpu"]
        row = take(name, command, limit)
        if not row["problem"] and name != "tests":
            row["result"] = json.loads(row["result"])
        report["parts"].append(row)
        print(f"{name}: {row['problem'] or 'done'} ({row['seconds']:.0f} s)", file=sys.stderr)
        for line in map(said, row["result"] if isinstance(row["result"], list) else []):
            print(f"  {line}", file=sys.stderr)
        write_json(Path(flags.output), report)  # what is there so far, whatever happens to the rest
    if wrong := [row["part"] for row in report["parts"] if row["problem"]]:
        raise CommandError(f"{flags.output} is written, without: {', '.join(wrong)}")


if __name__ == "__main__":
    sys.exit(run_command(main))
