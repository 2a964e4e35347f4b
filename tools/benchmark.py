#!/usr/bin/env python
"""Compare training speed with open_clip (`train` steps, whole `program`s), or time `parts`, a `llava` stage or `data`.

`train` and `program` compare plain CLIP on the demo's .txt with equal towers, batch, precision, threads, crops and
fused AdamW. `train` takes steps on ready batches in one process; open_clip pads each text to the context. `program`
runs scripts/pretrain_clips.py and `open_clip_train.main` as a user starts them, and measures samples/s between the
first log line after the warm-up and the last one. `parts` measures a step of a recipe that grows by one part at a
time, and `llava` does so with a stage of LLaVA, given by flags of scripts/train_llava.py. All things that are
compared take turns. `data` writes a million small samples as shards and as Parquet, and imports, opens and reads them.
"""

import argparse
import io
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import torch
import torch.nn.functional as F
from PIL import Image
from pyarrow import parquet
from torch import Tensor

from clips.common.distributed import Start, init_distributed
from clips.common.errors import CommandError, run_command
from clips.common.files import write_json
from clips.common.flags import Parser
from clips.common.live import LINE_SECONDS
from clips.common.page import print_table, table_of
from clips.common.paths import SCRIPTS
from clips.common.runtime import autocast, choose_device, has_bf16
from clips.config import ModelConfig, RunConfig
from clips.data.dataset import Dataset
from clips.data.demo import ensure_demo
from clips.data.images import normalise
from clips.data.loader import make_loader, texts_of
from clips.data.splits import open_split
from clips.data.tokenizer import CaptionTokenizer, build_tokenizer
from clips.engine.checkpoint import TrainState
from clips.engine.engine import Batch, Engine, Reduced
from clips.engine.loop import accumulate
from clips.model.clips import CLIPSModel
from clips.training import cli
from clips.training.optim import make_engine
from clips.training.trainer import Task, limit_logit_scale, rates_of, shared_inputs
from clips.weights.open_clip import open_clip_config
from mllm.model.forward import hidden_states
from mllm.training.build import build_stage, collator_of, make_optimizer
from mllm.training.config import parse_stage
from mllm.training.recipes import PARTS
from mllm.training.trainer import LlavaTrainer, TrainingModel

SIZES = {
    "demo": ("demo", 128, 100),
    "small": ("small_captioner", 128, 100),
    "s16": ("s16", 32, 20),
    "b16": ("b16", 16, 10),
}
"""Size → recipe (its first phase), samples per step that a CPU can process, and steps in a turn of `program`."""
SETTINGS = ("train.accumulation=1", "train.activation_checkpointing=false")
"""Settings for `parts`."""
STEP_PARTS = ("", "forward, ms", "backward, ms", "of a step")
"""Columns of `parts` and `llava`."""
PER_SHARD, READ_SAMPLES, LOADER_SECONDS = 10_000, 2_000, 20
"""For `data`: samples of a shard, samples that are read before memory is measured, and seconds of the loader."""
TURN, WARM = 2, 0.2
"""Steps in a turn of `train`, and the share of a program's samples that is not timed, as warm-up."""
OURS = re.compile(r"^([\d,]+) of [\d,]+ samples ")
THEIRS = re.compile(r"Train Epoch: \d+ \[\s*(\d+)/")
"""These match the number of samples so far in a log line of each program."""


def compare_steps(run: RunConfig, device: torch.device, repeats: int) -> list[list[Any]]:
    """Measure samples/s of both models on the same batches, and the ratio of our speed to each."""
    init_distributed(device)
    phase = replace(run.phases[0], samples=TURN * run.phases[0].batch_size, warmup_samples=0)
    vision = replace(run.model.vision, image_size=phase.image_size)
    run = replace(run, model=replace(run.model, vision=vision), phases=(phase,), data=replace(run.data, workers=0))
    source, tokenizer = open_data(run)
    batches = list(make_loader(source, tokenizer, run, rank=0, world_size=1))
    torch.manual_seed(0)
    engine = make_engine(Task(CLIPSModel(run.model, tokenizer.pad_id), run.task, run.train), run, device, {})
    engine.set_rates(rates_of(run.phases[0].lr / 10, run.phases[0].muon_lr / 10))
    stock = stock_step(run.model, tokenizer, run.task.texts, device)
    parts = {
        "ours": lambda: [optimizer_step(engine, [batch]) for batch in batches],
        "open_clip": lambda: [stock(batch) for batch in batches],
    }
    seconds = fastest(parts, repeats, device)
    return [[kind, run.samples / by_kind, by_kind / seconds["ours"]] for kind, by_kind in seconds.items()]


def time_parts(run: RunConfig, device: torch.device, repeats: int) -> list[list[Any]]:
    """Measure a step that grows by one part at a time. Return milliseconds of each part's forward and backward pass."""
    init_distributed(device)
    source, tokenizer = open_data(run)
    loader = make_loader(source, tokenizer, replace(run, data=replace(run.data, workers=0)), rank=0, world_size=1)
    host = next(loader)
    torch.manual_seed(0)
    engine = make_engine(Task(CLIPSModel(run.model, tokenizer.pad_id), run.task, run.train), run, device, {})
    engine.module.model.visual.set_image_size(run.phases[0].image_size)
    engine.set_rates(rates_of(run.phases[0].lr / 10, run.phases[0].muon_lr / 10))
    task, model, batch = engine.module, engine.module.model, engine.module.to_device(host, device)
    kept, texts = task.kept(batch), texts_of(batch)

    def outputs(count: int, caption: Tensor | None = None) -> list[Tensor]:
        out = model(batch["images"], texts[:count], caption, kept)
        return [out.image_features, *out.text_features, *([] if caption is None else [out.caption_states])]

    growing: dict[str, Callable[[], Sequence[Tensor]]] = {
        "image tower": lambda: [model.visual(batch["images"], kept.patches)[0]],
        "text tower, web caption": lambda: outputs(1),
        "text tower, sub-caption": lambda: outputs(2),
        "captioner's blocks": lambda: outputs(2, batch["caption"]),
        "output layer and losses": lambda: [task(batch)[0]],
    }

    whole = {"step": lambda: optimizer_step(engine, [host]), "data, in another process": lambda: next(loader)}
    return time_growing(growing, whole, device, bf16=task.bf16, repeats=repeats)


def time_growing(
    growing: Mapping[str, Callable[[], Sequence[Tensor]]],
    whole: Mapping[str, Callable[[], Any]],
    device: torch.device,
    *,
    bf16: bool,
    repeats: int,
) -> list[list[Any]]:
    """Return a row of milliseconds for each part, the rest of the step, the step, and its data.

    Args:
        growing: Each computes what the one before it does and its own part, and returns the outputs.
        whole: A whole "step", and under any other name the reading of its data.
    """

    def measure(part: Callable[[], Sequence[Tensor]], backward: bool) -> None:
        with torch.set_grad_enabled(backward), autocast(device, enabled=bf16):
            total = torch.stack([x.float().sum() for x in part()]).sum()
        if backward:
            total.backward()

    timed: dict[str, Callable[[], Any]] = {
        f"{name}/forward": partial(measure, part, False) for name, part in growing.items()
    }
    timed |= {name: partial(measure, part, True) for name, part in growing.items()}
    seconds = fastest(timed | dict(whole), repeats, device)
    rows: list[list[Any]] = []
    before = (0.0, 0.0)
    for name in growing:
        now = (seconds[f"{name}/forward"], seconds[name])
        forward, both = now[0] - before[0], now[1] - before[1]
        rows.append([name, 1e3 * forward, 1e3 * (both - forward), f"{both / seconds['step']:.0%}"])
        before = now
    rest = seconds["step"] - before[1]
    rows.append(["optimizer and agreement", 1e3 * rest, "", f"{rest / seconds['step']:.0%}"])
    rows.append(["step", 1e3 * seconds["step"], "", "100%"])
    return [*rows, *([name, 1e3 * seconds[name], "", ""] for name in whole if name != "step")]


def time_llava_parts(words: Sequence[str], device: torch.device, repeats: int) -> list[list[Any]]:
    """Measure a step of a LLaVA stage, given by flags of scripts/train_llava.py, as `time_parts` does."""
    init_distributed(device)
    arguments = parse_stage([*words, "--dry_run"]).on(device)  # a dry run needs no projector of stage 1
    prepared = build_stage(arguments, device, {})
    collator = collator_of(prepared, Start())
    module = TrainingModel(prepared.model, features=arguments.caches_features, bf16=arguments.bf16).train()
    engine = Engine(
        module, make_optimizer(module, arguments.rates, arguments.weight_decay), device, {},
        micro_batch=arguments.per_device_train_batch_size, accumulation=1, clip_grad=arguments.max_grad_norm,
        bf16_weights=False, checkpointed=module.trained(),
    )  # fmt: skip
    trainer = LlavaTrainer(arguments, engine, prepared.dataset, collator, TrainState(seed=arguments.seed), {})
    engine.set_rates(dict.fromkeys(PARTS, 1e-6))
    loader = trainer.batches()
    host = next(loader)
    batch = module.to_device(host, device)

    def states() -> list[Tensor]:
        embeds, packing, _ = module.inputs_of(batch)
        return [hidden_states(module.llava, embeds, batch["attention_mask"], packing)]

    growing: dict[str, Callable[[], Sequence[Tensor]]] = {
        "embeddings, projector, blocks": states,
        "output layer and loss": lambda: [module(batch)[0]],
    }

    def step() -> None:
        terms = accumulate(engine, [host], trainer.shared_inputs([host]))
        engine.agree(terms[0]["loss"], stop=0)
        engine.step()

    tokens, trained = host["counts"].real, sum(p.numel() for p in module.trained().values())
    print(f"{len(host['keys'])} samples, {tokens:,} tokens, {trained / 1e6:.1f} M trained weights")
    whole = {"step": step, "data, in the same process": lambda: next(loader)}
    return time_growing(growing, whole, device, bf16=module.bf16, repeats=repeats)


def optimizer_step(engine: Engine, batches: Sequence[Batch]) -> Reduced:
    """Take the loop's step (clips/engine/loop.py) without its log and checks, for benchmarks and tests. Collective.

    `batches` are this rank's micro-batches, run.train.accumulation of them.
    """
    terms = accumulate(engine, batches, shared_inputs(engine, batches))
    reduced = engine.agree(torch.stack([micro["loss"] for micro in terms]).mean(), stop=0)
    engine.step()
    limit_logit_scale(engine)
    return reduced


def write_samples(folder: Path, rows: int, kind: str) -> str:
    """Write `rows` pairs of a 32 px JPEG and captions as tar shards or as one Parquet file; return their --data."""
    images = []
    for value in range(256):
        Image.new("RGB", (32, 32), (value, 255 - value, value * 7 % 256)).save(file := io.BytesIO(), "jpeg")
        images.append(file.getvalue())

    def sample(row: int) -> dict[str, Any]:
        return {"caption": f"thing {row}", "long_caption": f"This is thing {row}. It stands alone.", "label": row % 10}

    if kind == "parquet":
        schema = pa.schema([("image", pa.binary()), ("caption", pa.string()), ("long_caption", pa.string())])
        with parquet.ParquetWriter(folder / "set.parquet", schema) as writer:
            for first in range(0, rows, PER_SHARD):
                cells = [
                    sample(row) | {"image": images[row % 256]} for row in range(first, min(first + PER_SHARD, rows))
                ]
                # One byte more makes each image another one: rows of equal images would become one sample.
                for row, cell in enumerate(cells, first):
                    cell["image"] += row.to_bytes(4, "big")
                writer.write_table(pa.Table.from_pylist(cells, schema))
        return str(folder / "set.parquet")
    for shard, first in enumerate(range(0, rows, PER_SHARD)):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as archive:
            for row in range(first, min(first + PER_SHARD, rows)):
                for name, data in (("jpg", images[row % 256]), ("json", json.dumps(sample(row)).encode())):
                    info = tarfile.TarInfo(f"{row:08}.{name}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return str(folder)


def time_data(run: RunConfig, rows: int) -> list[list[Any]]:
    """Measure how data of `rows` rows is imported, opened and read, as tar shards and as one Parquet file."""
    measured: list[list[Any]] = []
    for kind in ("tar", "parquet"):
        with tempfile.TemporaryDirectory() as folder:
            data = write_samples(Path(folder), rows, kind)
            seconds = []
            for _ in range(2):  # the first one imports
                begin = time.perf_counter()
                dataset = open_split(replace(run.data, train=data), "train", need_long=True)
                seconds.append(time.perf_counter() - begin)
            index = sum(file.stat().st_size for file in Path(folder, ".clips").rglob("*.*"))
            tokenizer = build_tokenizer("wordpiece", dataset.all_captions(range(1000)), vocab_size=512)
            process = psutil.Process()
            before, order = process.memory_full_info().uss, dataset.order(0)
            for position in range(READ_SAMPLES):
                dataset.read(order.sample(position))
            memory = process.memory_full_info().uss - before
            loader = make_loader(
                dataset, tokenizer, replace(run, data=replace(run.data, workers=1)), rank=0, world_size=1
            )
            next(loader)
            begin, count = time.perf_counter(), 0
            while time.perf_counter() - begin < LOADER_SECONDS:
                count += len(next(loader)["keys"])
            speed = count / (time.perf_counter() - begin)
        measured += [
            [f"{kind}: import, rows/s", rows / seconds[0]], [f"{kind}: index, MB", index / 1e6],
            [f"{kind}: open, s", seconds[1]], [f"{kind}: memory of a reader, MB", memory / 1e6],
            [f"{kind}: loader with a worker, samples/s", speed],
        ]  # fmt: skip
    return measured


def open_data(run: RunConfig) -> tuple[Dataset, CaptionTokenizer]:
    source = open_split(run.data, "train", need_long=run.task.captions)
    texts = source.all_captions() if run.captions.tokenizer == "wordpiece" else None
    return source, build_tokenizer(run.captions.tokenizer, texts, vocab_size=run.model.text.vocab_size)


def stock_step(
    config: ModelConfig, tokenizer: CaptionTokenizer, texts: Sequence[str], device: torch.device
) -> Callable[[Batch], object]:
    """Return a function that takes one step as open_clip's trainer does, including the clamp of the logit scale.

    `texts` are the names of the texts in a batch, as in `TaskConfig.texts`.
    """
    import open_clip

    stock = open_clip_config(config, tokenizer)["model_cfg"]
    del stock["custom_text"]
    model = open_clip.CustomTextCLIP(**stock).to(device).train()
    contrastive = open_clip.loss.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def text_loss(image: Tensor, ids: Tensor) -> Tensor:
        ids = ids[:, :-1]  # open_clip appends the CLS token itself
        ids = F.pad(ids, (0, stock["text_cfg"]["context_length"] - ids.shape[1]), value=tokenizer.pad_id)
        return contrastive(image, model.encode_text(ids, normalize=True), model.logit_scale.exp())

    def step(batch: Batch) -> Tensor:
        images = normalise(batch["images"].to(device))
        optimizer.zero_grad()
        with autocast(device, enabled=has_bf16(device)):
            image = model.encode_image(images, normalize=True)
            loss = torch.stack([text_loss(image, batch[name].to(device)) for name in texts]).mean()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)
        return loss.detach()

    return step


def fastest(parts: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, float]:
    """Time each part. Return the minimum of `repeats` turns after a warm-up, because other work only adds time."""
    times = {name: float("inf") for name in parts}
    for turn in range(repeats + 1):
        for name, part in parts.items():
            begin = time.perf_counter()
            part()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                times[name] = min(times[name], time.perf_counter() - begin)
    return times


def compare_programs(run: RunConfig, flags: Sequence[str], repeats: int, device: str) -> list[list[Any]]:
    """Measure both programs in turns. Return median samples/s, and median and range of the ratio of ours to theirs."""
    ours, others = [], []
    with tempfile.TemporaryDirectory() as folder:
        stock = [sys.executable, "-m", "open_clip_train.main", *their_flags(run, Path(folder)), "--device", device]
        for turn in range(repeats):
            mine = [sys.executable, str(SCRIPTS / "pretrain_clips.py"), *flags, "--output", folder, "--name", f"{turn}"]
            ours.append(watch(mine, OURS, run.phases[0].samples))
            others.append(watch([*stock, "--name", f"{turn}"], THEIRS, run.phases[0].samples))

    ratios = [our / other for our, other in zip(ours, others, strict=True)]
    text = f"{statistics.median(ratios):.3g} ({min(ratios):.3g} to {max(ratios):.3g})"
    return [["ours", statistics.median(ours), "1"], ["open_clip", statistics.median(others), text]]


def our_flags(size: str, device: torch.device, train: str) -> list[str]:
    name, batch, steps = SIZES[size]
    settings = [
        "optim.kind=adamw", "data.workers=1", f"train.precision={'bf16' if has_bf16(device) else 'fp32'}",
        "train.activation_checkpointing=false", "train.eval_every=0", "train.checkpoint_every=0",
        f"train.log_every={steps // 10}", "phases.*.augment.min_crop_area=0.9", "phases.*.augment.jitter=0",
        "phases.*.augment.hue=0", "phases.*.augment.grayscale=0", "task.objective=clip", "task.caption_weight=0",
        "task.synthetic_share=0", "model.captioner=null",
    ]  # fmt: skip
    return [
        *("--recipe", name, "--data", train, "--fields", "web=txt", "long=txt"),
        *("--batch-size", str(batch), "--samples", str(batch * steps), "--device", device.type, "--set", *settings),
    ]


def their_flags(run: RunConfig, folder: Path) -> list[str]:
    """Write model and tokenizer to `folder`, and return flags of open_clip_train.main for the first phase of `run`."""
    phase, optim = run.phases[0], run.optim
    shards = map(str, sorted(Path(run.data.train).glob("*.tar")))
    _, tokenizer = open_data(run)
    model = replace(run.model, vision=replace(run.model.vision, image_size=phase.image_size))
    tokenizer.save(folder)
    write_json(folder / "open_clip_config.json", open_clip_config(model, tokenizer))
    return [
        *("--model", f"local-dir:{folder}", "--train-data", "::".join(shards)),
        *("--dataset-type", "webdataset", "--train-num-samples", str(phase.samples), "--epochs", "1"),
        *("--batch-size", str(phase.batch_size), "--workers", str(run.data.workers)),
        *("--precision", "amp_bf16" if run.train.precision == "bf16" else "fp32", "--seed", str(run.train.seed)),
        *("--lr", str(phase.lr), "--wd", str(optim.weight_decay), "--eps", str(optim.eps)),
        *("--beta1", str(optim.betas[0]), "--beta2", str(optim.betas[1])),
        *("--warmup", str(phase.warmup_samples // phase.batch_size), "--log-every-n-steps", str(run.train.log_every)),
        *("--aug-cfg", "scale=(0.9,1.0)", "--logs", str(folder / "logs")),
    ]


def watch(command: Sequence[str], progress: re.Pattern[str], samples: int) -> float:
    """Run `command` until its log, matched by `progress`, shows `samples`, and return samples/s.

    Raises CommandError if the command ends before.
    """
    seen: list[tuple[int, float]] = []
    last: deque[str] = deque(maxlen=15)
    env = os.environ | {LINE_SECONDS: "0"}  # prints a line for every record
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as process:
        try:
            for line in process.stdout or ():
                last.append(line)
                match = progress.search(line)
                if match is not None:
                    seen.append((int(match[1].replace(",", "")), time.perf_counter()))
                    if seen[-1][0] >= samples:
                        break
        finally:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()

    timed = [line for line in seen if line[0] >= WARM * samples]
    if len(timed) < 2 or timed[-1][0] < samples:
        raise CommandError(f"{' '.join(command[:3])} … ended before its turn: {''.join(last)}")
    return (timed[-1][0] - timed[0][0]) / (timed[-1][1] - timed[0][1])


def parser() -> argparse.ArgumentParser:
    p = Parser((__doc__ or "").partition("\n")[0])
    p.add_argument("what", choices=("train", "program", "parts", "llava", "data"), help="what to measure")
    p.add_argument("--size", choices=tuple(SIZES), default="demo", help="towers and batch")
    p.add_argument("--repeats", type=int, default=5, help="turns of each thing that is compared")
    p.add_argument("--data", help="training data, as pretrain_clips.py takes it (default: the demo's)")
    p.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="settings of the recipe, for `parts`")
    p.add_argument("--llava", default="--stage 2", help="flags of scripts/train_llava.py, for `llava`, in one string")
    p.add_argument("--rows", type=int, default=1_000_000, help="rows of the sets that `data` writes")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return p


def main() -> None:
    flags = parser().parse_args()
    device = choose_device(flags.device)
    if flags.what == "llava":
        show(flags.what, time_llava_parts(shlex.split(flags.llava), device, flags.repeats), device, STEP_PARTS)
        return
    if flags.what == "data":
        run = cli.config_from_flags(cli.parser().parse_args(["--recipe", "small_captioner", "--data", "unused"]))
        run = replace(run, data=replace(run.data, held_out=0.0))
        show(f"data of {flags.rows:,} rows", time_data(run, flags.rows), device, ("", "measured"))
        return
    data = flags.data or str(ensure_demo("data/demo") / "train")
    own = our_flags(flags.size, device, data)
    columns = ("", "samples/s", "ours / this")
    if flags.what == "parts":
        name, batch, _ = SIZES[flags.size]
        own = ["--recipe", name, "--data", data, "--batch-size", str(batch), "--set", *SETTINGS, *flags.set]
        columns = STEP_PARTS
    run = cli.config_from_flags(cli.parser().parse_args(own))
    if run.train.precision == "auto":
        run = replace(run, train=replace(run.train, precision="bf16" if has_bf16(device) else "fp32"))
    if flags.what == "train":
        rows = compare_steps(run, device, flags.repeats)
    elif flags.what == "parts":
        rows = time_parts(run, device, flags.repeats)
    else:
        rows = compare_programs(run, own, flags.repeats, device.type)

    show(f"{flags.what}, {flags.size}", rows, device, columns)


def show(what: str, rows: Sequence[Sequence[Any]], device: torch.device, columns: Sequence[str]) -> None:
    """Print `rows` as a table, with the machine and its load in the title."""
    cells = [[f"{cell:,.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    where = f"{device.type}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"
    print_table(table_of(f"{what}: {where}", columns, cells))


if __name__ == "__main__":
    sys.exit(run_command(main))
