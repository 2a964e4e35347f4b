#!/usr/bin/env python
"""Check a GPU machine, then test and measure this project on it: tests/gpu, speed and memory of both halves, chat.

Parts run in the order of their worth within an hour, so that a cut leaves the most valuable figures in the JSON file.
The first four parts end within ten minutes. Each measured figure stands beside the expected figure. Each part is a
process with a time limit, so that a part that fails or hangs costs its own figures only; it is named.
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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from clips.common.errors import CommandError, UserError, first_line, run_command
from clips.common.files import write_json
from clips.common.flags import Parser
from clips.common.peaks import peak_flops
from clips.common.runtime import autocast, choose_device, environment, has_bf16, import_deepspeed, init_distributed
from clips.config import RunConfig
from clips.data.tokenizer import build_tokenizer
from clips.model.flops import BatchShape, training_flops
from clips.recipes import debug_twin, recipe
from clips.studies.benchmark import STEPS
from clips.studies.measuring import PeakMemory, fastest
from clips.training.prepare import compute_dtype, full_batch, fullest_shape
from clips.training.rehearsal import rehearse

if TYPE_CHECKING:
    from mllm.training.rehearsal import Planned

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"B/16": "b16", "L/14": "l14", "S/16": "s16", "H/14": "h14"}
"""Preset → the recipe whose first phase is measured."""
LIMITS = {
    **{"checks": 60, "B/16": 120, "LLaVA": 240, "tests": 150},
    **{"L/14": 600, "LLaVA, large": 900, "S/16": 300, "H/14": 900, "chat": 120},
}
"""Seconds of each part, in the order of the run."""
LLAVA = {
    "LLaVA": {
        "stage 2, LoRA": ("qwen2.5-7b", 2, True),
        "stage 1": ("vicuna-7b", 1, False),
        "stage 2, whole": ("smollm2-135m", 2, False),
    },
    "LLaVA, large": {"stage 2, LoRA": ("vicuna-13b", 2, True), "stage 1": ("llama3-8b", 1, False)},
}
"""Part → row → (language model, stage, whether LoRA trains it); with CLIP's L/14 at 336 pixels, as LLaVA-1.5."""
TOWER = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
TOWER |= {"image_size": 336, "patch_size": 14}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
MFU = 0.2
"""Share of the card's peak that the expected time of a step assumes, as scripts/plan_run.py."""
KINDS = {
    "ours, towers": ("ours, towers", False),
    "ours, towers, compiled": ("ours, towers", True),
    "open_clip, equal towers": ("open_clip", False),
    "ours, with the captioner": ("ours, CLIPS", False),
}
"""Row → (its kind in clips/studies/benchmark.py, whether it is compiled)."""
FIGURES = {
    "memory": ("peak_memory_gb", "predicted_gb", " GB"),
    "step": ("step_s", "expected_s", " s"),
    "first token": ("first_token_s", "expected_first_s", " s"),
    "tokens/s": ("tokens_s", "expected_tokens_s", ""),
}
"""A figure's name → the row's measured and expected values, and the unit."""
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
    "driver": (lambda device: torch.zeros(1, device=device) + 1, "install NVIDIA driver 580 or newer"),
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
    found = []
    for name, (measured_, expected, unit) in FIGURES.items():
        if measured_ in row:
            text = f"{name} {row[measured_]:.3g}{unit}"
            if expected in row:
                text += f" expected {row[expected]:.3g} ({row[measured_] / row[expected] - 1:+.0%})"
            found.append(text)
    if "batch" in row:
        found.insert(0, f"{row['batch']:,} samples")
    return f"{row['size']} {row['what']}: {'; '.join(found)}" + (f" [expected: {row['from']}]" if "from" in row else "")


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
            row = largest(partial(measured, variant, kind, device), rows[0]["batch"], at_most=rows[0]["batch"])
        else:
            row = largest(partial(measured, variant, kind, device), 2 if tiny else 64, at_most=4 if tiny else 8192)
        rows.append({"what": what, "size": name, **row})
    return [row | {"of ours": row["samples_per_s"] / rows[0]["samples_per_s"]} for row in rows]


def largest(measure: Callable[[int], Row], samples: int, *, at_most: int) -> Row:
    """The figures of the largest batch that fits: doubled from `samples` while steps are fast, or halved."""
    best: Row | None = None
    while 1 <= samples <= at_most:
        try:
            best = measure(samples)
        except torch.OutOfMemoryError:
            if best is not None:
                break
            samples, at_most = samples // 2, samples // 2
            continue
        if samples / best["samples_per_s"] > SLOWEST_STEP:
            break
        samples *= 2
    if best is None:
        raise CommandError("not even one sample fits")
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
    row["predicted_gb"] = rehearse(run, phase, 1).on_rank({"stage": 0}, 1) / 1e9
    if not kind.startswith("ours"):
        row["from"] = "memory of a rehearsal of our towers of the same sizes; other code may keep more"
    return row


def random_batch(run: RunConfig, shape: BatchShape) -> dict[str, Any]:
    """`full_batch` with random pictures and ids: the speed of a GPU depends on both."""
    batch = full_batch(run, shape, torch.device("cpu"))
    batch["images"].random_(0, 256)
    for name in (*run.task.texts, "caption"):  # in this order: one seed makes one batch
        if name in batch:
            batch[name].random_(4, run.model.text.vocab_size)
    return batch


def llava(part: str, device: torch.device, *, tiny: bool) -> list[Row]:
    """A row for each stage of `part`: the largest micro-batch that fits, with random weights, LLaVA-1.5's lengths."""
    from mllm.training.rehearsal import LANGUAGE_MODELS, Planned

    rows: list[Row] = []
    for what, (name, stage, lora) in LLAVA[part].items():
        if tiny:
            LANGUAGE_MODELS[name] = TINY | {"vocab_size": 200}
        step = LlavaStep(
            Planned(name, TINY | {"image_size": 32, "patch_size": 8} if tiny else TOWER), stage, device, lora
        )
        rows.append({"what": what, "size": name, **largest(step.measured, 1 if tiny else 4, at_most=2 if tiny else 64)})
        del step  # its memory is the next row's
        torch.cuda.empty_cache()
    return rows


class LlavaStep:
    """The optimizer steps of one stage on one device, without DeepSpeed, with gradient checkpointing."""

    def __init__(self, planned: Planned, stage: int, device: torch.device, lora: bool) -> None:
        from mllm.training.arguments import TrainArguments
        from mllm.training.rehearsal import staged

        self.planned, self.stage, self.device, self.lora = planned, stage, device, lora
        model = planned.build(str(device))
        model.config.image_token_id = 2  # the published vocabularies have no `<image>` yet
        self.forward = planned.flops(model)
        """Of the forward pass, while nothing trains: checkpointing computes the language model's again."""
        flags = TrainArguments(stage=stage, data_path="data.json", lora_enable=lora, gradient_checkpointing=True)
        self.arguments = flags.resolve(1)
        self.training = staged(model, self.arguments)
        if model.lm_head.weight.requires_grad:  # as mllm/training/prepare.py: an update of 2e-5 is lost in bf16
            self.training.float()
        for parameter in filter(lambda p: p.requires_grad, self.training.parameters()):
            parameter.data = parameter.data.float()

    def measured(self, samples: int) -> Row:
        """Time and memory of a step, beside the rehearsed memory."""
        from mllm.model.flops import LlavaShape
        from mllm.training.freeze import parameter_groups
        from mllm.training.rehearsal import ANSWERS, META, WORDS, batch_of, rehearse

        training, batch, device = self.training, batch_of(self.training, samples, stage=self.stage), self.device
        half = has_bf16(device)
        optimizer = torch.optim.AdamW(parameter_groups(training.model, self.arguments.rates, 0.0), fused=True)

        def step() -> None:
            with autocast(device, enabled=half):
                loss = training(**batch)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        memory, seconds = PeakMemory(device), fastest({"step": step}, 4, device)["step"]
        found = memory.read() / 1e3
        answers, length = ANSWERS[self.stage], self.planned.layout.most + WORDS[self.stage]
        shape = LlavaShape(samples=samples, length=length, pictures=samples, predicted=samples * answers)
        flops = self.planned.flops(training.llava)(shape)
        work = sum(flops.values()) + self.forward(shape)["language_model"]
        peak, _ = peak_flops(device, torch.bfloat16 if half else torch.float32)
        twin = LlavaStep(self.planned, self.stage, META, self.lora).training
        with autocast(META, enabled=half):
            rehearsed = rehearse(twin, batch_of(twin, samples, stage=self.stage))
        return {
            "batch": samples, "samples_per_s": samples / seconds, "tflops": work / seconds / 1e12,
            "mfu": work / seconds / peak, "step_s": seconds, "expected_s": work / (MFU * peak),
            "peak_memory_gb": found, "predicted_gb": rehearsed.on_rank({"stage": 0}, 1) / 1e9,
        }  # fmt: skip


def chat(model: str | None, device: torch.device) -> list[Row]:
    """A second answer about one picture: memory, seconds to the first token, and tokens/s behind it."""
    from PIL import Image

    from mllm.chat.model import ChatModel, Sampling
    from mllm.chat.session import ChatSession
    from mllm.model.flops import LlavaFlops, LlavaShape

    memory = PeakMemory(device)
    loaded = ChatModel.load(model, device=str(device), dtype="auto")
    picture = Image.radial_gradient("L").convert("RGB")
    for _ in range(2):
        session = ChatSession(loaded)
        list(session.ask("Describe it.", [picture], Sampling(max_new_tokens=64)))
    assert session.last is not None
    last, llava, layout = session.last, loaded.model.requires_grad_(False), loaded.layout
    side, text = llava.config.vision_config.image_size, llava.config.get_text_config()
    squares = layout.squares((picture.height, picture.width))
    shape = LlavaShape(samples=1, length=last.prompt_tokens, pictures=squares, predicted=1)
    work = sum(LlavaFlops(llava, image_size=side, image_tokens=layout.square, features=False)(shape).values())
    weights, head = sum(p.nbytes for p in llava.parameters()), llava.lm_head.weight
    embedding = llava.get_input_embeddings().weight  # of which a token reads one row, if it is not the head too
    read = sum(p.nbytes for p in llava.model.language_model.parameters() if p is not embedding) + head.nbytes
    heads, width = text.num_attention_heads, text.hidden_size // text.num_attention_heads
    heads, width = getattr(text, "num_key_value_heads", None) or heads, getattr(text, "head_dim", None) or width
    positions = last.prompt_tokens + last.new_tokens
    cache = positions * 2 * text.num_hidden_layers * heads * width * llava.dtype.itemsize
    return [{
        "size": loaded.name, "what": "chat",
        "peak_memory_gb": memory.read() / 1e3, "predicted_gb": (weights + cache) / 1e9,
        "first_token_s": last.first_token_s, "expected_first_s": work / (MFU * peak_flops(device, llava.dtype)[0]),
        "tokens_s": last.tokens_per_s, "expected_tokens_s": bandwidth(device) / (read + cache),
        "from": f"memory of weights, keys and values; first token at {MFU:.0%} of the card's peak; each further token "
        "reads the language model's weights, keys and values once, as fast as a copy of a tensor does here",
    }]  # fmt: skip


def bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy of a large tensor reads and writes."""
    source = torch.empty(2**29 if device.type == "cuda" else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / fastest({"copy": lambda: target.copy_(source)}, 8, device)["copy"]


def parser() -> argparse.ArgumentParser:
    p = Parser(__doc__)
    p.add_argument("--output", default="runs/gpu_report.json", help="the JSON file")
    p.add_argument("--device", default="cuda", help="cuda, or cpu with --tiny")
    p.add_argument("--model", help="the model to chat with (default: the newest runs/*/model)")
    p.add_argument("--tiny", action="store_true", help="tiny models, to see whether every part runs")
    parts = ("checks", *SIZES, *LLAVA, "chat")
    p.add_argument("--part", choices=parts, help="measure this part alone and print its figures")
    return p


def main() -> None:
    flags = parser().parse_args()
    device = choose_device(flags.device)
    if device.type == "cpu" and not flags.tiny:
        raise UserError("--device cpu measures nothing of interest here: give --tiny too, to see whether the parts run")
    if flags.part is not None:
        found: Any
        if flags.part == "chat":
            found = chat(flags.model, device)
        elif flags.part in LLAVA:
            found = llava(flags.part, device, tiny=flags.tiny)
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
