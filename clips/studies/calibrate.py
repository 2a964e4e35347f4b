"""Peak memory of real training steps beside what clips/training/memory.py says of them.

Each case runs in processes of its own. On a CPU two figures are measured: what torch's allocator handed out at most,
which is what the formula means and what `torch.cuda.max_memory_allocated` tells on a GPU; and the resident memory above
that of the process once everything is imported, which has what the allocator never sees (oneDNN's packed weights, the C
library's gaps) and lacks what was asked for and never touched.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from clips.common.page import markdown
from clips.common.runtime import choose_device, has_bf16, init_distributed
from clips.config import RunConfig
from clips.data.loader import to_device
from clips.model.clips import CLIPSModel
from clips.model.flops import BatchShape
from clips.recipes import recipe
from clips.studies.benchmark import PeakMemory
from clips.training.engine import DEFAULT_DS_CONFIG, Engine
from clips.training.memory import usage
from clips.training.task import Task


@dataclass(frozen=True)
class Case:
    """Steps of a recipe's model on random pictures and texts of full length."""

    recipe: str
    samples: int
    """Of a micro-batch."""
    image_size: int
    checkpointing: bool = False
    accumulation: int = 1

    def run(self, device: torch.device) -> RunConfig:
        run = recipe(self.recipe)
        train = replace(
            run.train,
            precision="bf16" if has_bf16(device) else "fp32",
            activation_checkpointing=self.checkpointing,
            accumulation=self.accumulation,
        )
        batch = self.samples * self.accumulation
        phase = replace(
            run.phases[0], batch_size=batch, samples=batch, image_size=self.image_size, warmup_samples=0, lr=1e-4
        )
        return replace(run, train=train, phases=(phase,))

    def shape(self, run: RunConfig) -> BatchShape:
        words, captioner = run.model.text.context_length, run.model.captioner
        caption = captioner.length if captioner is not None else 0
        texts = (words,) if captioner is None else (words, words)
        return BatchShape(self.samples, self.image_size, texts, caption, self.samples * max(0, caption - 1))


CASES = (
    Case("demo", 128, 64),
    Case("demo", 128, 64, checkpointing=True),
    Case("s16", 16, 112),
    Case("s16", 16, 112, checkpointing=True),
    Case("s16", 8, 224, accumulation=2),
    Case("b16", 8, 112),
    Case("b16", 8, 112, checkpointing=True),
)
WARM_UP = Case("demo", 2, 32)


def print_calibration(device: str) -> None:
    """A row for each of CASES, in Markdown, as docs/planning.md has them."""
    rows = [compare(case, choose_device(device)) for case in CASES]
    head = [name.replace("_", " ") for name in rows[0]]
    print(markdown(head, ([shown(value) for value in row.values()] for row in rows)))


def shown(value: object) -> str:
    """A figure of three digits, or megabytes without a point."""
    return (f"{value:,.0f}" if value >= 10 else f"{value:.2f}") if isinstance(value, float) else str(value)


def compare(case: Case, device: torch.device) -> dict[str, Any]:
    """What is measured of `case`, and what the formula says, in MB."""
    run = case.run(device)
    predicted = usage(run, case.shape(run), device.type, DEFAULT_DS_CONFIG["zero_optimization"]).total / 1e6
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        measured = pool.submit(allocated_mb, case, device).result()
        resident = pool.submit(resident_mb, case, device).result() if device.type == "cpu" else None
    row = {
        "recipe": case.recipe,
        "micro_batch": f"{case.accumulation} × {case.samples}",
        "px": case.image_size,
        "checkpointing": "yes" if case.checkpointing else "no",
        "precision": run.train.precision,
        "predicted_MB": predicted,
        "measured_MB": measured,
        "predicted / measured": predicted / measured,
    }
    return row | ({"resident_MB": resident, "predicted / resident": predicted / resident} if resident else {})


def allocated_mb(case: Case, device: torch.device) -> float:
    """The most that torch's allocator had handed out at one time, the model included."""
    if device.type == "cuda":
        return resident_mb(case, device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train_steps(case, device)
    now = most = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most / 1e6


def resident_mb(case: Case, device: torch.device) -> float:
    """Peak of the process above what it was before the model; on a GPU, of the allocator."""
    train_steps(WARM_UP, device)  # imports what is imported late
    memory = PeakMemory(device)
    train_steps(case, device)
    return memory.read()


def train_steps(case: Case, device: torch.device, steps: int = 2) -> None:
    """The second step has the optimizer's state of the first."""
    init_distributed(device)
    run = case.run(device)
    shape = case.shape(run)
    model = CLIPSModel(run.model, pad_id=0)
    model.visual.set_image_size(case.image_size)
    engine = Engine(Task(model, run), run, device, DEFAULT_DS_CONFIG)
    engine.set_lr(1e-4, 1e-3)
    for _ in range(steps):
        for micro in range(case.accumulation):
            loss, _ = engine(to_device(random_batch(run, shape), device))
            engine.backward(loss)
            if micro == case.accumulation - 1:
                engine.agree(loss, stop=0)
            engine.step()
            del loss


def random_batch(run: RunConfig, shape: BatchShape) -> dict[str, torch.Tensor]:
    """In the layout of clips/data/loader.py, without padding."""
    size, image_size = shape.samples, shape.image_size
    slots = dict(zip(("web", "sub"), shape.texts, strict=False)) | ({"caption": shape.caption} if shape.caption else {})
    ids = {name: torch.randint(4, run.model.text.vocab_size, (size, count)) for name, count in slots.items()}
    return {"images": torch.randint(0, 256, (size, 3, image_size, image_size), dtype=torch.uint8), **ids}
