"""One command for the day a GPU is there: its tests, training speed and memory, LLaVA stages, chat, within minutes.

Each part is a process with a time limit, so that one that fails or hangs costs its own figures only; it is named. What
the towers' part measures is here (`towers`), the others are this project's own commands.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from clips.common.errors import CommandError, UserError
from clips.common.files import write_json
from clips.common.page import Table, render
from clips.common.peaks import peak_flops
from clips.common.runtime import choose_device, environment, has_bf16, init_distributed
from clips.config import RunConfig
from clips.data.tokenizer import build_tokenizer
from clips.model.flops import training_flops
from clips.recipes import debug_twin, recipe
from clips.studies.benchmark import STEPS, PeakMemory
from clips.studies.calibrate import random_batch
from clips.training.engine import DEFAULT_DS_CONFIG
from clips.training.memory import usage
from clips.training.prepare import fullest_shape

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 590
"""Seconds for all parts together."""
SIZES = {"S/16": "s16", "B/16": "b16", "L/14": "l14"}
"""Preset → the recipe whose first phase is measured."""
SLOWEST_STEP = 3.0
"""Seconds; a batch is not doubled beyond."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    name: str
    command: tuple[str, ...]
    limit: int
    """Seconds."""
    result: Path | None = None
    """JSON that the command leaves."""


@dataclass
class Outcome:
    name: str
    command: str
    seconds: float
    problem: str
    """Empty where all went well."""
    result: Any


def parts(out: Path, device: str, *, tiny: bool, llava: Sequence[str]) -> list[Part]:
    """All of the report in its order; `llava` are further flags of the LLaVA stages."""
    python, runs = sys.executable, out / "runs"
    script = {name: str(ROOT / "scripts" / f"{name}.py") for name in
              ("gpu_report", "pretrain_clips", "train_llava", "benchmark_chat")}  # fmt: skip
    found = []
    if device == "cuda":  # there are none for a CPU
        found.append(
            Part("tests", (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests/gpu")), 100)
        )
    for name, of in SIZES.items():
        result = out / f"{of}.json"
        command = [python, script["gpu_report"], "--part", name, "--device", device, "--out", str(result)]
        found.append(Part(name, (*command, *(["--tiny"] if tiny else [])), 65, result))
    pretrain = [python, script["pretrain_clips"], "--name", "encoder", "--output-dir", str(runs), "--device", device]
    found.append(Part("pretraining", (*pretrain, *(["--debug"] if tiny else ["--samples", "12800"])), 75))
    stage = [python, script["train_llava"], "--vision_tower", f"clips:{runs / 'encoder'}", "--device", device, *llava]
    stage += ["--max_steps", "4" if tiny else "20", "--logging_steps", "1"]
    for name, number, flags in (
        ("align", "1", ()),
        ("LoRA", "2", ("--lora_enable", "True")),
        ("LoRA on 4 bits", "2", ("--bits", "4")),
    ):
        run = runs / ("llava-4bit" if "4" in name else "llava")
        more = [*flags, "--stage", number, "--output_dir", str(run)]
        if number == "2":
            more += ["--pretrain_mm_mlp_adapter", str(runs / "llava" / "align" / "mm_projector.bin")]
        summary = run / ("align" if number == "1" else "instruct") / "done.json"
        found.append(Part(name, (*stage, *more), 60, summary))
    chat = [python, script["benchmark_chat"], "--model-path", str(runs / "llava" / "model"), "--device", device]
    chat += ["--repeats", "1" if tiny else "3", "--new-tokens", "8" if tiny else "64", "--out", str(out / "chat.json")]
    return [*found, Part("chat", tuple(chat), 50, out / "chat.json")]


def gpu_report(out: Path, device: str, *, tiny: bool, llava: Sequence[str] = ()) -> None:
    """Run all parts, write `out`/report.json and index.html; CommandError naming the parts that went wrong.

    UserError without a GPU, unless the device is said to be the CPU.
    """
    on = choose_device("cuda" if device == "auto" else device)
    if on.type == "cpu" and not tiny:
        raise UserError("--device cpu measures nothing of interest here: give --tiny too, to see whether the parts run")
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + LIMIT
    outcomes = []
    for part in parts(out, on.type, tiny=tiny, llava=llava):
        outcomes.append(take(part, out, min(part.limit, end - time.monotonic())))
        print(f"{part.name}: {outcomes[-1].problem or 'done'} ({outcomes[-1].seconds:.0f} s)", file=sys.stderr)
        write(out, on, outcomes, tiny=tiny)  # what is there so far, whatever happens to the rest
    if wrong := [outcome.name for outcome in outcomes if outcome.problem]:
        raise CommandError(f"{out / 'index.html'} is written, without: {', '.join(wrong)}")
    print(f"wrote {out / 'index.html'} and {out / 'report.json'}", file=sys.stderr)


def take(part: Part, out: Path, limit: float) -> Outcome:
    """Run one part; what it prints goes to a file of its name."""
    log, begin = out / f"{part.name.replace('/', '').replace(' ', '-')}.log", time.monotonic()
    problem, result = "", None
    if limit <= 1:
        problem = "not run: no time was left"
    else:
        with log.open("w") as file:
            try:
                done = subprocess.run(
                    part.command, stdout=file, stderr=subprocess.STDOUT, timeout=limit, cwd=ROOT, check=False
                )
                problem = f"failed with exit code {done.returncode}: {last_line(log)}" if done.returncode else ""
            except subprocess.TimeoutExpired:
                problem = f"stopped after {limit:.0f} s"
    if part.result is None:
        result = last_line(log) if log.is_file() else None
    elif not problem:
        result = json.loads(part.result.read_text())
    return Outcome(part.name, " ".join(part.command[1:]), time.monotonic() - begin, problem, result)


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "nothing printed"


def write(out: Path, device: torch.device, outcomes: Sequence[Outcome], *, tiny: bool) -> None:
    machine = environment(device, 1)
    write_json(out / "report.json", {"machine": machine, "tiny": tiny, "parts": [asdict(o) for o in outcomes]})
    towers = [row for outcome in outcomes if isinstance(outcome.result, list) for row in outcome.result]
    stages = [o.result | {"what": o.name} for o in outcomes if isinstance(o.result, dict) and "mfu" in o.result]
    chat = [row for o in outcomes if isinstance(o.result, dict) for row in o.result.get("rows", [])]
    page = render(
        "clips.studies", "gpu_report.html.j2",
        title="What this GPU does",
        note=f"{machine['device']}, torch {machine['packages'].get('torch')}" + (", TINY MODELS: no figures" * tiny),
        parts=Table(("part", "seconds", "outcome"), [
            (o.name, f"{o.seconds:.0f}", o.problem or (o.result if isinstance(o.result, str) else "done"))
            for o in outcomes
        ]),
        sections=[(title, table(rows)) for title, rows in
                  (("Training steps", towers), ("LLaVA stages", stages), ("Chat", chat)) if rows],
    )  # fmt: skip
    (out / "index.html").write_text(page, encoding="utf-8")


def table(rows: Sequence[Row]) -> Table:
    """Of the figures and names in `rows`; what is longer stands in report.json."""
    names = ["what", *dict.fromkeys(name for row in rows for name in row if name != "what")]
    names = [name for name in names if all(isinstance(row.get(name, ""), (str, int, float)) for row in rows)]
    return Table(
        [name.replace("_", " ") for name in names], [[_shown(row.get(name, "")) for name in names] for row in rows]
    )


def _shown(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------------------------------- towers


def measure_part(name: str, device: str, *, tiny: bool, out: Path) -> None:
    """The figures of one size, written as JSON: what `parts` calls for in a process of its own."""
    if name not in SIZES:
        raise UserError(f"--part {name!r} is not known; choose one of: {', '.join(SIZES)}")
    write_json(out, towers(name, choose_device(device), tiny=tiny))


def towers(name: str, device: torch.device, *, tiny: bool) -> list[Row]:
    """A row for each of KINDS: our towers with the largest batch that fits, then the others with the same batch, or the
    largest below it that they can hold. Texts have full length.
    """
    init_distributed(device)
    run = recipe(SIZES[name])
    run = debug_twin(run) if tiny else run
    run = replace(run, train=replace(run.train, precision="bf16" if has_bf16(device) else "fp32"))
    largest, rows = 0, list[Row]()
    for what, (kind, compiled) in KINDS.items():
        if compiled and device.type == "cpu":
            continue  # minutes of a C++ compiler
        variant = replace(run, train=replace(run.train, compile=compiled))
        if not rows:
            largest, row = grow(variant, kind, device, 2 if tiny else 64, 4 if tiny else 8192)
        else:
            _, row = shrink(variant, kind, device, largest)
        rows.append({"what": what, "size": name, **row})
    return [row | {"of ours": row["samples_per_s"] / rows[0]["samples_per_s"]} for row in rows]


KINDS = {
    "ours, towers": ("ours, towers", False),
    "ours, towers, compiled": ("ours, towers", True),
    "open_clip, equal towers": ("open_clip", False),
    "ours, with the captioner": ("ours, CLIPS", False),
}
"""What is measured → (its kind in benchmark.STEPS, whether it is compiled)."""


def grow(run: RunConfig, kind: str, device: torch.device, samples: int, most: int) -> tuple[int, Row]:
    """Double the batch until the memory is full or a step is slow; the last one that fitted, and its figures."""
    best: tuple[int, Row] | None = None
    while samples <= most:
        try:
            row = measured(run, kind, device, samples)
        except torch.OutOfMemoryError:
            break
        best = samples, row
        if samples / row["samples_per_s"] > SLOWEST_STEP:
            break
        samples *= 2
    if best is None:
        raise CommandError(f"{kind}: not even {samples} samples fit")
    return best


def shrink(run: RunConfig, kind: str, device: torch.device, samples: int) -> tuple[int, Row]:
    """Halve the batch until it fits."""
    while samples:
        try:
            return samples, measured(run, kind, device, samples)
        except torch.OutOfMemoryError:
            samples //= 2
    raise CommandError(f"{kind}: not even one sample fits")


def measured(run: RunConfig, kind: str, device: torch.device, samples: int, steps: int = 4) -> Row:
    """Samples/s of `steps` steps after two to warm up, and the peak of memory beside what was predicted of ours."""
    phase = replace(run.phases[0], samples=samples, batch_size=samples, warmup_samples=0, lr=1e-4)
    model = replace(run.model, vision=replace(run.model.vision, image_size=phase.image_size))
    train = replace(run.train, activation_checkpointing=False)  # as benchmark.STEPS sets it
    run = replace(run, model=model, phases=(phase,), train=train)
    batch = {"keys": [], **random_batch(run, fullest_shape(run, phase, samples, 1))}
    memory = PeakMemory(device)
    step = STEPS[kind](run, build_tokenizer("bert"), device)
    seconds = timed(lambda: step(batch), device, steps)
    if kind != "ours, CLIPS":  # what else there is has no captioner
        run = replace(run, model=replace(model, captioner=None), task=replace(run.task, caption_weight=0.0))
    shape = fullest_shape(run, phase, samples, 1)
    flops = sum(training_flops(run.model, shape).values())
    peak, _ = peak_flops(device, torch.bfloat16 if run.train.precision == "bf16" else torch.float32)
    row: Row = {
        "batch": samples,
        "samples_per_s": samples / seconds,
        "tflops": flops / seconds / 1e12,
        "mfu": flops / seconds / peak,
        "peak_memory_gb": memory.read() / 1e3,
    }
    if kind.startswith("ours"):
        predicted = usage(run, shape, device.type, DEFAULT_DS_CONFIG["zero_optimization"]).total
        row["predicted_gb"] = predicted / 1e9
    return row


def timed(step: Callable[[], None], device: torch.device, steps: int) -> float:
    """Seconds of one call, of the mean over `steps`."""
    for _ in range(2):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begin) / steps
