"""What accumulation costs in memory and time: a step in micro-batches, contrasted each by itself or as one batch.

The demo's model and optimizer on random pictures and texts, of which nothing here depends but the speed. What the
batches of a step take on the host, pictures as bytes, is stated apart: they are there before memory is measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from clips.common.runtime import has_bf16, init_distributed
from clips.config import Contrastive, Precision, RunConfig
from clips.data.loader import Batch, to_device
from clips.model.clips import CLIPSModel
from clips.recipes import recipe
from clips.studies.measuring import PeakMemory, Row, fastest, in_child
from clips.training.engine import DEFAULT_DS_CONFIG, Engine
from clips.training.grad_cache import forward_passes
from clips.training.task import Task

MICRO_BATCH, MICRO_BATCHES = 32, (1, 4, 16, 64)
WHOLE = 512
"""Samples up to which the same step is measured as one batch, too."""
WEB, SUB = 32, 16
"""Tokens of the texts; the long caption fills its positions."""


def accumulation_rows(device: torch.device, repeats: int) -> list[Row]:
    """Peak memory of a step of 1, 4, 16 and 64 micro-batches in both modes, and the time of "global" over "micro"."""
    rows = []
    for count in MICRO_BATCHES:
        samples = count * MICRO_BATCH
        row: Row = {"micro_batches": count, "samples": samples, "batches_MB": batches_bytes(count) / 1e6}
        if samples <= WHOLE:
            row["one_batch_peak_MB"] = in_child(peak_memory, device, 1, samples, "micro")
        row["micro_peak_MB"] = in_child(peak_memory, device, count, MICRO_BATCH, "micro")
        row["global_peak_MB"] = in_child(peak_memory, device, count, MICRO_BATCH, "global")
        rows.append(row | in_child(times, device, count, repeats))
    return rows


def a_run(device: torch.device, count: int, size: int, contrastive: Contrastive) -> RunConfig:
    """The demo in `count` micro-batches of `size` samples."""
    run = recipe("demo")
    phase = replace(run.phases[0], batch_size=count * size, samples=count * size)
    precision: Precision = "bf16" if has_bf16(device) else "fp32"
    train = replace(run.train, accumulation=count, contrastive=contrastive, precision=precision)
    return replace(run, phases=(phase,), train=train)


def random_batches(run: RunConfig, count: int, size: int) -> list[Batch]:
    """In the layout of clips/data/loader.py; no text holds padding, whose id is 0."""
    side, length, words = run.phases[0].image_size, run.model.captioner, run.model.text.vocab_size
    assert length is not None
    ids = {"web": WEB, "sub": SUB, "caption": length.length}
    return [
        {"images": torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8)}
        | {name: torch.randint(1, words, (size, slots)) for name, slots in ids.items()}
        for _ in range(count)
    ]


def batches_bytes(count: int) -> int:
    (batch,) = random_batches(recipe("demo"), 1, MICRO_BATCH)
    return count * sum(x.nbytes for x in batch.values())


def an_engine(run: RunConfig, device: torch.device) -> Engine:
    torch.manual_seed(0)
    model = CLIPSModel(run.model, pad_id=0)
    model.visual.set_image_size(run.phases[0].image_size)
    engine = Engine(Task(model, run), run, device, DEFAULT_DS_CONFIG)
    engine.set_lr(1e-5, 1e-5)
    return engine


def step_of(engine: Engine, batches: list[Batch]) -> Callable[[], None]:
    """An optimizer step of `batches`, as the loop takes it."""

    def step() -> None:
        losses = []
        for micro, (_, loss, parts) in enumerate(forward_passes(engine, batches)):
            losses.append(parts["loss"])
            engine.backward(loss)
            if micro < len(batches) - 1:
                engine.step()
        engine.agree(torch.stack(losses).mean(), 0)
        engine.step()
        engine.limit_logit_scale()

    return step


def peak_memory(device: torch.device, count: int, size: int, contrastive: Contrastive) -> float:
    """Of two steps in MB, the model and its optimizer included, the batches on the host not."""
    init_distributed(device)
    run = a_run(device, count, size, contrastive)
    batches, memory = random_batches(run, count, size), PeakMemory(device)
    step = step_of(an_engine(run, device), batches)
    step()
    step()
    return memory.read()


def times(device: torch.device, count: int, repeats: int) -> Row:
    """The same step in both modes and the towers' forward passes alone, in turns.

    On a CPU in seconds of this process's own work, which others on the machine hardly change.
    """
    init_distributed(device)
    modes: tuple[Contrastive, ...] = ("micro", "global")
    engines = {mode: an_engine(a_run(device, count, MICRO_BATCH, mode), device) for mode in modes}
    batches = random_batches(engines["micro"].run, count, MICRO_BATCH)

    def towers() -> None:
        for batch in batches:
            engines["micro"].features(to_device(batch, device))

    parts = {mode: step_of(engine, batches) for mode, engine in engines.items()} | {"towers": towers}
    seconds = fastest(parts, repeats, device, time.process_time if device.type == "cpu" else None)
    return {
        "micro_ms": 1e3 * seconds["micro"],
        "towers_ms": 1e3 * seconds["towers"],
        "global / micro": seconds["global"] / seconds["micro"],
        "extra / towers": (seconds["global"] - seconds["micro"]) / seconds["towers"],
    }
