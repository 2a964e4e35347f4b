#!/usr/bin/env python
"""Test and measure this project on a GPU machine: tests/gpu, speed and memory of both halves, chat.

Parts run in the order of their worth within an hour, so that a cut leaves the most valuable figures in the JSON file.
The first three end within ten minutes. Each part is a process with a time limit: one that fails or hangs costs its own
figures only, and is named. The peak of memory stands beside that of a rehearsal.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from clips.common.errors import CommandError, run_command
from clips.common.files import write_json
from clips.common.flags import Parser
from clips.common.peaks import peak_flops
from clips.common.runtime import autocast, choose_device, environment, has_bf16, init_distributed
from clips.config import RunConfig
from clips.model.clips import CLIPSModel
from clips.model.flops import training_flops
from clips.recipes import debug_twin, recipe
from clips.training.engine import DEFAULT_DS_CONFIG, Engine
from clips.training.grad_cache import optimizer_step
from clips.training.prepare import full_batch, fullest_shape
from clips.training.rehearsal import rehearse
from clips.training.task import Task
from mllm.training import rehearsal
from mllm.training.arguments import TrainArguments
from mllm.training.freeze import parameter_groups

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # tools is no installed package
from tools.benchmark import fastest  # noqa: E402

SIZES = {"B/16": "b16", "L/14": "l14", "S/16": "s16", "H/14": "h14"}
"""Preset → the recipe whose first phase is measured."""
LIMITS = {
    **{"B/16": 120, "LLaVA": 240, "tests": 150},
    **{"open_clip": 300, "L/14": 600, "S/16": 300, "H/14": 900, "chat": 120},
}
"""Seconds of each part, in the order of the run."""
LLAVA = (("qwen2.5-7b", 2, True), ("vicuna-7b", 1, False), ("smollm2-135m", 2, False))
"""(Language model, stage, whether LoRA trains it); with CLIP's L/14 at 336 pixels, as LLaVA-1.5."""
TOWER = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
TOWER |= {"image_size": 336, "patch_size": 14}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
COMMANDS = {
    "tests": ["-m", "pytest", "-q", "tests/gpu"],
    "open_clip": ["tools/benchmark.py", "train", "--size", "b16", "--device", "cuda"],
    "chat": ["scripts/chat.py", "--image", "docs/images/results.png", "--prompt", "Describe it.", "--stats"],
}
"""Parts that are other programs; their last lines are the figures."""
Row = dict[str, Any]


def take(name: str, command: list[str], limit: float) -> Row:
    """Run one part: what went wrong, if anything, and the last lines that it printed."""
    begin, lines = time.monotonic(), None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=ROOT)
        lines = (done.stdout.strip() or done.stderr.strip() or "nothing printed").splitlines()[-6:]
        problem = f"failed with exit code {done.returncode}: {lines[-1]}" if done.returncode else ""
    except subprocess.TimeoutExpired:
        problem = f"stopped after {limit:.0f} s"
    return {"part": name, "seconds": time.monotonic() - begin, "problem": problem, "lines": lines}


def pretraining(name: str, device: torch.device, *, tiny: bool) -> list[Row]:
    """The row of a recipe's first phase with the largest batch that fits."""
    init_distributed(device)
    run = debug_twin(recipe(SIZES[name])) if tiny else recipe(SIZES[name])
    precision = "bf16" if has_bf16(device) else "fp32"
    run = replace(run, train=replace(run.train, precision=precision, activation_checkpointing=False))
    return [{"size": name, **largest(lambda samples: measured(run, device, samples), 4 if tiny else 8192)}]


def largest(measure: Callable[[int], Row], samples: int) -> Row:
    """The figures of the largest batch that fits: `samples`, or a half, a quarter, … of it."""
    while samples:
        try:
            return measure(samples)
        except torch.OutOfMemoryError:
            samples //= 2
        gc.collect()  # an engine holds itself
        torch.cuda.empty_cache()
    raise CommandError("not even one sample fits")


def measured(run: RunConfig, device: torch.device, samples: int) -> Row:
    """Time and memory of a step of the first phase; texts have full length."""
    phase = replace(run.phases[0], samples=samples, batch_size=samples, warmup_samples=0)
    vision = replace(run.model.vision, image_size=phase.image_size)
    run = replace(run, model=replace(run.model, vision=vision), phases=(phase,))
    engine = Engine(Task(CLIPSModel(run.model, pad_id=0), run), run, device, DEFAULT_DS_CONFIG)
    engine.set_lr(1e-5, 1e-4)
    shape = fullest_shape(run, phase, samples, 1)
    batch = full_batch(run, shape, torch.device("cpu"))
    batch["images"].random_(0, 256)  # the speed of a GPU depends on the values
    flops = sum(training_flops(run.model, shape).values())
    row = timed(lambda: optimizer_step(engine, [batch]), samples, flops, device)
    return row | {"rehearsed_gb": rehearse(run, phase, 1).on_rank({"stage": 0}, 1) / 1e9}


def timed(step: Callable[[], object], samples: int, flops: float, device: torch.device) -> Row:
    """Time and peak memory of a step of so many FLOPs, what was there before included."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = fastest({"step": step}, 4, device)["step"]
    memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
    row = {"batch": samples, "step_s": seconds, "samples_per_s": samples / seconds, "tflops": flops / seconds / 1e12}
    peak = peak_flops(device)
    if peak is not None:
        row["mfu"] = flops / seconds / peak
    return row | {"peak_gb": memory}


def llava(device: torch.device, *, tiny: bool) -> list[Row]:
    """A row for each of LLAVA: the largest micro-batch that fits, with random weights and gradient checkpointing."""
    rows: list[Row] = []
    for name, stage, lora in LLAVA:
        if tiny:
            rehearsal.LANGUAGE_MODELS[name] = TINY | {"vocab_size": 200}
        planned = rehearsal.Planned(name, TINY | {"image_size": 32, "patch_size": 8} if tiny else TOWER)
        flags = TrainArguments(stage=stage, data_path="data.json", lora_enable=lora, gradient_checkpointing=True)
        arguments = flags.resolve(1)
        row = largest(lambda n: measured_llava(planned, arguments, device, n), 2 if tiny else 64)  # noqa: B023
        rows.append({"size": name, "what": f"stage {stage}{', LoRA' if lora else ''}", **row})
    return rows


def measured_llava(planned: rehearsal.Planned, arguments: TrainArguments, device: torch.device, samples: int) -> Row:
    """Time and memory of a step with LLaVA-1.5's lengths, without DeepSpeed."""
    half, stage = has_bf16(device), arguments.stage
    training, twin = (training_model(planned, arguments, place) for place in (device, rehearsal.META))
    batch = rehearsal.batch_of(training, samples, stage=stage)
    optimizer = torch.optim.AdamW(parameter_groups(training.model, arguments.rates, 0.0), fused=True)

    def step() -> None:
        with autocast(device, enabled=half):
            loss = training(**batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    length, answers = planned.layout.most + rehearsal.WORDS[stage], samples * rehearsal.ANSWERS[stage]
    shape = {"samples": samples, "length": length, "pictures": samples, "predicted": answers}
    forward = planned.flops(planned.build())(**shape)["language_model"]  # checkpointing computes it again
    flops = sum(planned.flops(training.llava)(**shape).values()) + forward
    row = timed(step, samples, flops, device)
    with autocast(rehearsal.META, enabled=half):
        predicted = rehearsal.rehearse(twin, rehearsal.batch_of(twin, samples, stage=stage))
    return row | {"rehearsed_gb": predicted.on_rank({"stage": 0}, 1) / 1e9}


def training_model(planned: rehearsal.Planned, arguments: TrainArguments, place: torch.device) -> Any:
    """A stage's model with random weights; what trains is fp32, for an update of 2e-5 is lost in bf16."""
    model = planned.build(str(place))
    model.config.image_token_id = 2  # the published vocabularies have no `<image>` yet
    training = rehearsal.staged(model, arguments)
    for parameter in filter(lambda p: p.requires_grad, training.parameters()):
        parameter.data = parameter.data.float()
    return training.float() if model.lm_head.weight.requires_grad else training


def parser() -> argparse.ArgumentParser:
    p = Parser(__doc__)
    p.add_argument("--output", default="runs/gpu_report.json", help="the JSON file")
    p.add_argument("--device", default="cuda", help="cuda; or cpu: tiny models, to see whether every part runs")
    p.add_argument("--part", choices=LIMITS.keys() - COMMANDS.keys(), help="measure this part alone")
    return p


def main() -> None:
    flags = parser().parse_args()
    device = choose_device(flags.device)
    tiny = device.type == "cpu"
    if flags.part is not None:
        is_llava = flags.part == "LLaVA"
        print(json.dumps(llava(device, tiny=tiny) if is_llava else pretraining(flags.part, device, tiny=tiny)))
        return
    report: Row = {"machine": environment(device, 1), "tiny": tiny, "parts": []}
    for name, limit in LIMITS.items():
        words = COMMANDS.get(name, [__file__, *sys.argv[1:], "--part", name])
        row = take(name, [sys.executable, *words], limit)
        report["parts"].append(row)
        print(f"{name}: {row['problem'] or 'done'} ({row['seconds']:.0f} s)", *row["lines"] or (), sep="\n  ")
        write_json(Path(flags.output), report)  # what is there so far, whatever happens to the rest
    failed = [row["part"] for row in report["parts"] if row["problem"]]
    if failed:
        raise CommandError(f"{flags.output} is written, without: {', '.join(failed)}")


if __name__ == "__main__":
    sys.exit(run_command(main))
