"""What training costs on this machine: steps beside stock open_clip. program.py compares whole programs."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clips.common.errors import UserError
from clips.common.files import write_json
from clips.common.page import print_table
from clips.common.runtime import autocast, choose_device, has_bf16, init_distributed
from clips.config import ModelConfig, RunConfig
from clips.data.demo import ensure_demo
from clips.data.loader import Batch, make_loader, to_device
from clips.data.sources import Source
from clips.data.splits import open_split
from clips.data.tokenizer import CaptionTokenizer, build_tokenizer
from clips.model.clips import CLIPSModel
from clips.recipes import recipe
from clips.studies.measuring import PeakMemory, Row, fastest, in_child
from clips.studies.program import compare_programs
from clips.training.engine import DEFAULT_DS_CONFIG, Engine
from clips.training.meter import Meter
from clips.training.step import optimizer_step
from clips.training.task import Task
from clips.weights.checkpoint import TrainState
from clips.weights.open_clip import open_clip_config


def benchmark_from_flags(flags: argparse.Namespace) -> None:
    """What scripts/benchmark.py does: measure, print a table, write it as JSON with the machine it ran on."""
    repeats, what = flags.repeats, flags.what
    found: dict[str, Any] = {}
    if repeats < 1:
        raise UserError(f"--repeats {repeats} must be at least 1")
    on = choose_device(flags.device)
    _warn_if_busy(on)
    if what == "train":
        rows = [row for name in SETTINGS for row in train_rows(name, on, repeats, flags.data)]
    else:  # this project's trainer against open_clip's as whole programs
        train, what = ensure_demo(flags.data) / "train", f"program, {flags.size},"
        found = compare_programs(flags.size, device=on, repeats=repeats, train=train, their_python=flags.their_python)
        shown = {"ours": found["ours"], "theirs": found["theirs"], "ours / theirs": found["ratios"]}
        rows = [{"program": n} | {k: v for k, v in row.items() if k != "turns"} for n, row in shown.items()]
        found = {"size": flags.size} | found
    _report(what, found or {"rows": rows}, rows, on, flags.output)


def _warn_if_busy(on: torch.device) -> None:
    if on.type == "cpu" and os.getloadavg()[0] > 1:
        print(
            f"note: this machine is busy (load {os.getloadavg()[0]:.1f}); figures will scatter, and with more threads "
            f"than free cores each step may take many times as long (now {torch.get_num_threads()}: OMP_NUM_THREADS)",
            file=sys.stderr,
        )


def _report(what: str, found: dict[str, Any], rows: list[Row], on: torch.device, out: str | None) -> None:
    machine = {
        "device": torch.cuda.get_device_name(on) if on.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "platform": platform.platform(),
        "torch": torch.__version__,
        "load_average": os.getloadavg()[0],
    }
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = ((row.get(column, "") for column in columns) for row in rows)
    shown = ([f"{cell:,.4g}" if isinstance(cell, float) else str(cell) for cell in of_row] for of_row in cells)
    print_table(f"{what} on {machine['device']}", [column.replace("_", " ") for column in columns], shown)
    if out:
        write_json(Path(out), {"benchmark": what.partition(",")[0], "machine": machine, **found})
        print(f"wrote {out}", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------- train
SETTINGS = ("demo", "b16 112 px")


def setting(name: str, device: torch.device, demo_dir: str) -> RunConfig:
    """A recipe on the demo data: the demo's own, or the low-resolution phase of B/16 (a sixth of its depth on CPU)."""
    precision = "bf16" if has_bf16(device) else "fp32"
    demo = recipe("demo").override([f"train.precision={precision}"])
    data = replace(demo.data, demo_dir=demo_dir)
    if name == "demo":
        return replace(demo, data=data)
    b16 = recipe("b16").override([f"train.precision={precision}"])
    batch, depth = (256, 1.0) if device.type == "cuda" else (16, 1 / 6)
    phase = replace(b16.phases[0], batch_size=batch, lr=1e-4, warmup_samples=0)
    return replace(b16, model=_shallower(b16.model, depth, phase.image_size), data=data, phases=(phase,))


def _shallower(model: ModelConfig, depth: float, image_size: int) -> ModelConfig:
    vision, text, captioner = model.vision, model.text, model.captioner
    assert captioner is not None
    return replace(
        model,
        vision=replace(vision, layers=round(vision.layers * depth), image_size=image_size),
        text=replace(text, layers=round(text.layers * depth)),
        captioner=replace(captioner, layers=round(captioner.layers * depth)),
    )


def _open(run: RunConfig) -> tuple[Source, CaptionTokenizer]:
    source = open_split(run.data, "train", need_long=True)
    texts = source.captions() if run.captions.tokenizer == "wordpiece" else None
    return source, build_tokenizer(run.captions.tokenizer, texts, vocab_size=run.model.text.vocab_size)


def _loader(
    run: RunConfig, source: Source, tokenizer: CaptionTokenizer, steps: int, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """The first `steps` steps of the first phase."""
    phase = run.phases[0]
    run = replace(run, phases=(replace(phase, samples=steps * phase.batch_size),))
    return make_loader(source, tokenizer, run, rank=rank, world_size=world_size)


Step = Callable[[Batch], object]
TURN = 2
"""Optimizer steps of one turn."""
RECIPE_SECONDS = 10
"""How long the recipe itself is timed, loader included."""


def train_rows(name: str, device: torch.device, repeats: int, demo_dir: str) -> list[Row]:
    """The setting's recipe through loader and engine; then steps on ready batches against stock open_clip.

    The comparison is of one process, fp32 weights (under bf16 autocast where the device computes in it), and fused
    AdamW on both sides; ours goes through the DeepSpeed engine with its check for finite gradients, open_clip's
    through the plain loop of its trainer. Image and two texts, two InfoNCE losses, no captioner; the towers are the
    same, layer for layer. open_clip pads each text to the context, as its tokenizer gives it; "at our length" cuts its
    texts like ours.
    """
    arguments = (name, device, demo_dir)
    rows = [in_child(recipe_row, *arguments)]
    print(f"{name}: towers", file=sys.stderr)
    rates = in_child(paired_rates, *arguments, repeats)
    for kind, rate in rates.items():
        row = {"setting": name, "what": kind, "samples_per_s": rate, "ours / this": rates[COMPARED[0]] / rate}
        rows.append(row | {"peak_MB": in_child(peak_of, *arguments, kind)})
    return rows


def recipe_row(name: str, device: torch.device, demo_dir: str) -> Row:
    """The recipe as scripts/pretrain_clips.py runs it: its optimizer, loader and workers."""
    init_distributed(device)
    run = setting(name, device, demo_dir)
    source, tokenizer = _open(run)
    memory, step = PeakMemory(device), clips_step(run, tokenizer, device)
    meter = Meter(device, TrainState(seed=0))
    warmup, count, elapsed = 3, 0, 0.0
    for index, batch in enumerate(meter.timed(_loader(run, source, tokenizer, run.phases[0].steps))):
        step(batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if index == warmup - 1:
            begin, meter.waiting = time.perf_counter(), 0.0
        elif index >= warmup:
            count, elapsed = index + 1 - warmup, time.perf_counter() - begin
        if elapsed > RECIPE_SECONDS:
            break
    return {
        "setting": name, "what": f"the recipe: {run.optim.kind}, {run.data.workers} workers",
        "samples_per_s": count * run.phases[0].batch_size / elapsed,
        "data_wait_share": meter.waiting / elapsed, "peak_MB": memory.read(),
    }  # fmt: skip


def clips_engine(run: RunConfig, tokenizer: CaptionTokenizer, device: torch.device) -> Engine:
    torch.manual_seed(0)
    model = CLIPSModel(run.model, tokenizer.pad_id)
    model.visual.set_image_size(run.phases[0].image_size)
    engine = Engine(Task(model, run), run, device, DEFAULT_DS_CONFIG)
    engine.set_lr(run.phases[0].lr / 10, run.phases[0].muon_lr / 10)
    return engine


def clips_step(run: RunConfig, tokenizer: CaptionTokenizer, device: torch.device) -> Step:
    """The training step of our engine on one batch."""
    engine = clips_engine(run, tokenizer, device)
    return lambda batch: optimizer_step(engine, [batch])


def stock_step(model: Any, loss_of: Callable[[Batch], Tensor], device: torch.device) -> Step:
    """The training step of an open_clip `model`: autocast, backward, optimizer, clamp of the temperature."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        with autocast(device, enabled=has_bf16(device)):
            loss = loss_of(to_device(batch, device))
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)

    return step


def _stock_towers(run: RunConfig, tokenizer: CaptionTokenizer, device: torch.device, *, full_context: bool) -> Step:
    import open_clip

    config = open_clip_config(run.model, tokenizer)["model_cfg"]
    del config["custom_text"]
    model, loss = open_clip.CustomTextCLIP(**config), open_clip.loss.ClipLoss()
    slots = config["text_cfg"]["context_length"]

    def loss_of(batch: Batch) -> Tensor:
        image = model.encode_image(batch["images"], normalize=True)
        losses = []
        for ids in (batch["web"][:, :-1], batch["sub"][:, :-1]):  # open_clip appends CLS itself
            if full_context:
                ids = F.pad(ids, (0, slots - ids.shape[1]), value=tokenizer.pad_id)
            losses.append(loss(image, model.encode_text(ids, normalize=True), model.logit_scale.exp()))
        return torch.stack(losses).mean()

    return stock_step(model, loss_of, device)


def _ours(run: RunConfig, tokenizer: CaptionTokenizer, device: torch.device, *, captioner: bool) -> Step:
    run = replace(run, optim=replace(run.optim, kind="adamw"))
    if not captioner:
        run = replace(run, model=replace(run.model, captioner=None), task=replace(run.task, caption_weight=0.0))
    run = replace(run, train=replace(run.train, activation_checkpointing=False))  # open_clip's default as well
    return clips_step(run, tokenizer, device)


STEPS: dict[str, Callable[[RunConfig, CaptionTokenizer, torch.device], Step]] = {
    "ours, towers": lambda *a: _ours(*a, captioner=False),
    "open_clip": lambda *a: _stock_towers(*a, full_context=True),
    "open_clip, at our length": lambda *a: _stock_towers(*a, full_context=False),
    "ours, CLIPS": lambda *a: _ours(*a, captioner=True),
}
COMPARED = ("ours, towers", "open_clip", "open_clip, at our length")


def _ready(name: str, device: torch.device, demo_dir: str) -> tuple[RunConfig, CaptionTokenizer, list[Batch]]:
    init_distributed(device)
    run = setting(name, device, demo_dir)
    source, tokenizer = _open(run)
    one_process = replace(run, data=replace(run.data, workers=0))
    return run, tokenizer, list(islice(_loader(one_process, source, tokenizer, TURN), TURN))


def paired_rates(name: str, device: torch.device, demo_dir: str, repeats: int) -> dict[str, float]:
    """Samples/s of what is compared on the same batches, in turns."""
    run, tokenizer, batches = _ready(name, device, demo_dir)
    steps = {kind: STEPS[kind](run, tokenizer, device) for kind in COMPARED}
    turns = {kind: lambda step=step: [step(batch) for batch in batches] for kind, step in steps.items()}
    seconds = fastest(turns, repeats, device)
    return {kind: TURN * run.phases[0].batch_size / s for kind, s in seconds.items()}


def peak_of(name: str, device: torch.device, demo_dir: str, kind: str) -> float:
    """Peak memory in MB of a few steps of `kind`, the model and its optimizer included."""
    run, tokenizer, batches = _ready(name, device, demo_dir)
    memory, step = PeakMemory(device), STEPS[kind](run, tokenizer, device)
    for batch in batches:
        step(batch)
    return memory.read()
