"""What things cost on this machine: attention, the data path, sentences, training steps, the caption loss, checkpoints.

Beside this file: the loader against bare decoding, and opening many shards, in data_speed.py; accumulation in
accumulation.py; whole programs in program.py; the parts of a step in step_parts.py; samples and seconds to a figure in
to_quality.py; how is measured, in measuring.py.

Shapes: B batch · H heads · L sequence · K head width.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from clips.common.errors import UserError
from clips.common.files import write_json
from clips.common.peaks import peak_flops
from clips.common.runtime import choose_device, has_bf16, init_distributed
from clips.config import AugmentConfig, CaptionerConfig, ModelConfig, RunConfig
from clips.data.demo import ensure_demo
from clips.data.images import Preprocess, decode_image, normalise, stacked
from clips.data.loader import Batch, make_loader, to_device
from clips.data.sentences import kept_tokens, split_sentences, sub_caption
from clips.data.sources import Source
from clips.data.splits import open_split
from clips.data.tokenizer import CaptionTokenizer, build_tokenizer
from clips.model.clips import CLIPSModel
from clips.recipes import PRESETS, recipe
from clips.studies.accumulation import accumulation_rows
from clips.studies.data_speed import loader_rows, startup_rows
from clips.studies.measuring import PeakMemory, Row, fastest, in_child, in_ranks
from clips.studies.program import Captions, Objective, coca_config, compare_programs
from clips.studies.sentence_set import captions, score
from clips.studies.step_parts import WARM, part_rows
from clips.studies.to_quality import Target, leaderboard, read_variants, table_rows, to_quality
from clips.training.engine import DEFAULT_DS_CONFIG, Engine
from clips.training.losses import IGNORE, caption_loss
from clips.training.meter import Meter
from clips.training.task import Task
from clips.weights import checkpoint
from clips.weights.checkpoint import TrainState
from clips.weights.open_clip import open_clip_config


def benchmark(
    what: str, *, device: str, repeats: int, demo_dir: str, shards: int, out: str | None, as_json: bool = False
) -> list[Row]:
    """Run one of the benchmarks, print its table, write it to `out` as JSON with the machine it ran on.

    `as_json`: that JSON is printed in place of the table.
    """
    on = _device(device, {"repeats": repeats, "shards": shards})
    run = {
        "attention": lambda: attention_rows(on, repeats),
        "sentences": lambda: sentence_rows(repeats),
        "data": lambda: [row for name in SETTINGS for row in in_child(data_rows, name, on, repeats, demo_dir)],
        "loader": lambda: loader_rows(repeats),
        "startup": lambda: startup_rows(shards),
        "train": lambda: [row for name in SETTINGS for row in train_rows(name, on, repeats, demo_dir)],
        "chunk": lambda: chunk_rows(on, repeats),
        "gradcache": lambda: accumulation_rows(on, repeats),
        "tokens": lambda: [row for name in SETTINGS for row in token_rows(name, on, repeats, demo_dir)],
        "checkpoint": lambda: [in_child(checkpoint_row, name, on, repeats, demo_dir) for name in SETTINGS],
        "profile": lambda: [row for name in PROFILED for row in profiled_setting(name, on, demo_dir)],
    }[what]
    rows = run()
    _report(what, {"rows": rows}, rows, on, out, as_json)
    return rows


def benchmark_programs(
    size: str, objective: Objective, captions: Captions, *,
    device: str, repeats: int, demo_dir: str, their_python: str, out: str | None, as_json: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """This project's trainer against open_clip's as whole programs (clips/studies/program.py); reported as above."""
    on = _device(device, {"repeats": repeats})
    found = compare_programs(
        size,
        objective,
        captions,
        device=on,
        repeats=repeats,
        train=ensure_demo(demo_dir) / "train",
        their_python=their_python,
    )
    rows = [
        {"program": name, **{key: value for key, value in found[name].items() if key != "turns"}}
        for name in ("ours", "theirs")
    ]
    rows.append({"program": "ours / theirs", **found["ratios"]})
    asked = {"size": size, "objective": objective, "captions": captions}
    _report(f"program, {', '.join(asked.values())} captions,", asked | found, rows, on, out, as_json)
    return found


def benchmark_to_quality(
    variants: Sequence[Sequence[str]], figures: Sequence[str], threshold: float, *,
    output: str, seeds: int, every: int, rates: Sequence[float], average: int,
    device: str, demo_dir: str, out: str | None, as_json: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Samples and seconds to a figure (clips/studies/to_quality.py); reported as above, with the leaderboard's rows."""
    on = _device(device, {"seeds": seeds, "every": every})
    target = Target(tuple(figures), threshold)
    found = to_quality(
        Path(output), read_variants(variants), target,
        seeds=seeds, every=every, rates=rates, average=average, demo_dir=demo_dir, device=device,
    )  # fmt: skip
    rows, without = leaderboard(found)
    _report("to-quality", found | {"leaderboard": rows}, table_rows(found), on, out, as_json)
    if not as_json:
        print("\n".join(["", *without, "", *rows]))
    return found


def _device(device: str, counts: Mapping[str, int]) -> torch.device:
    """The one that `device` means, with a word where it is busy; UserError for a flag of `counts` below 1."""
    for flag, value in counts.items():
        if value < 1:
            raise UserError(f"--{flag} {value} must be at least 1")
    on = choose_device(device)
    if on.type == "cpu" and os.getloadavg()[0] > 1:
        print(
            f"note: this machine is busy (load {os.getloadavg()[0]:.1f}); figures will scatter, and with more threads "
            f"than free cores each step may take many times as long (now {torch.get_num_threads()}: OMP_NUM_THREADS)",
            file=sys.stderr,
        )
    return on


def _report(
    what: str, found: dict[str, Any], rows: list[Row], on: torch.device, out: str | None, as_json: bool
) -> None:
    machine = {
        "device": torch.cuda.get_device_name(on) if on.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "platform": platform.platform(),
        "torch": torch.__version__,
        "load_average": os.getloadavg()[0],
    }
    report = {"benchmark": what.partition(",")[0], "machine": machine, **found}
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _print(f"{what} on {machine['device']}", rows)
    if out:
        write_json(Path(out), report)
        print(f"wrote {out}", file=sys.stderr)


def _print(title: str, rows: list[Row]) -> None:
    table = Table(title=title, title_justify="left")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(column.replace("_", " "), justify="left" if isinstance(rows[0].get(column), str) else "right")
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        table.add_row(*(f"{cell:,.4g}" if isinstance(cell, float) else str(cell) for cell in cells))
    Console(emoji=False, width=None if sys.stdout.isatty() else 140).print(table)


def captioner_of(model: ModelConfig) -> CaptionerConfig:
    """Its captioner, which every model measured here has; ValueError where there is none."""
    if model.captioner is None:
        raise ValueError("what is measured here needs a model with a captioner: model.captioner is null")
    return model.captioner


# ------------------------------------------------------------------------------------------------------- attention
def plain_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """What clips/model/layers.py does on a CPU, here on any device and at any length."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if visible is not None:
        scores = scores + torch.zeros_like(visible, dtype=scores.dtype).masked_fill_(~visible, -torch.inf)
    return scores.softmax(-1) @ v


def attention_rows(device: torch.device, repeats: int) -> list[Row]:
    """Forward and backward pass of plain matrix products and of scaled_dot_product_attention, side by side."""
    rows = []
    for place, heads, width, L, masked in _attention_places():
        B = max(1, (65_536 if device.type == "cuda" else 4096) // L)
        visible = None
        if masked:  # every text is filled to three quarters
            visible = (torch.arange(L, device=device) < 3 * L // 4).expand(B, 1, 1, L)
        for dtype in (torch.bfloat16, torch.float32) if has_bf16(device) else (torch.float32,):  # else it is emulated
            q, k, v, grad = (torch.randn(B, heads, L, width, device=device, dtype=dtype) for _ in range(4))
            inputs = [x.requires_grad_() for x in (q, k, v)]
            parts = {
                "plain": partial(_both_passes, plain_attention, inputs, visible, grad),
                "fused": partial(_both_passes, F.scaled_dot_product_attention, inputs, visible, grad),
            }
            seconds = fastest(parts, repeats, device)
            rows.append({
                "place": place, "length": L, "batch": B, "masked": masked, "dtype": str(dtype).removeprefix("torch."),
                "plain_ms": 1e3 * seconds["plain"], "fused_ms": 1e3 * seconds["fused"],
                "fused / plain": seconds["fused"] / seconds["plain"],
            })  # fmt: skip
    return rows


def _both_passes(
    attention: Callable[..., Tensor], inputs: Sequence[Tensor], visible: Tensor | None, grad: Tensor
) -> None:
    torch.autograd.grad(attention(*inputs, visible), inputs, grad)


def _attention_places() -> Iterator[tuple[str, int, int, int, bool]]:
    """(name, heads, head width, length, masked) of each attention of the presets."""
    for name, size in (("demo", 64), ("S/16", 112), ("B/16", 224), ("L/14", 336)):
        model = PRESETS[name]
        vision, text, captioner = model.vision, model.text, captioner_of(model)
        patches = vision.tokens(size)
        yield f"{name} image, {size} px", vision.heads, vision.width // vision.heads, patches + 1, False
        yield f"{name} text", text.heads, text.width // text.heads, text.context_length, True
        length = patches + text.context_length - 1 + captioner.length - 1
        yield f"{name} captioner", captioner.heads, captioner.width // captioner.heads, length, True


# ------------------------------------------------------------------------------------------------------- sentences
def splitters() -> dict[str, Callable[[str], list[str]]]:
    """This project's two rules, and those of the libraries that are installed, given one line at a time as here."""
    found: dict[str, Callable[[str], list[str]]] = {
        "smart": split_sentences,
        "reference": partial(split_sentences, splitter="reference"),
    }
    stock: dict[str, Callable[[Any], Callable[[str], list[str]]]] = {
        "pysbd": lambda library: library.Segmenter(language="en", clean=False).segment,
        "sentencex": lambda library: lambda line: list(library.segment("en", line)),
        "blingfire": lambda library: lambda line: library.text_to_sentences(line).split("\n"),
    }
    for name, make in stock.items():
        if importlib.util.find_spec(name) is not None:
            found[name] = partial(_by_lines, make(importlib.import_module(name)))
    return found


def _by_lines(split: Callable[[str], list[str]], text: str) -> list[str]:
    return [piece for line in text.splitlines() if line.strip() for piece in split(line) if piece.strip()]


def _split_all(split: Callable[[str], list[str]], texts: Sequence[str]) -> None:
    for text in texts:
        split(text)


def sentence_rows(repeats: int) -> list[Row]:
    """Precision and recall of sentence boundaries on captions whose sentences are known, and captions per second."""
    sets = {part: captions(2000, part) for part in ("tuned", "held_out")}
    texts = [caption.text for caption in sets["held_out"]]
    rows: list[Row] = []
    for name, split in splitters().items():
        # In turns with nothing else: a library of 300 captions/s would keep the fast ones waiting for minutes.
        seconds = fastest({name: partial(_split_all, split, texts)}, repeats, torch.device("cpu"))
        row: Row = {"splitter": name}
        for part, known in sets.items():
            row[f"precision_{part}"], row[f"recall_{part}"] = score(split, known)
        rows.append(row | {"captions_per_s": len(texts) / seconds[name]})
    return rows


# ------------------------------------------------------------------------------------------------------------ data
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
    vision, text, captioner = model.vision, model.text, captioner_of(model)
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


def data_rows(name: str, device: torch.device, repeats: int, demo_dir: str) -> list[Row]:
    """µs per sample of each part of the data path in one process, and samples/s of the loader with 0, 1, 2 workers.

    The loader without workers runs a second time without augmentation, which is what that costs.
    """
    run = setting(name, device, demo_dir)
    source, tokenizer = _open(run)
    count, text, captioner, rng = 256, run.model.text, captioner_of(run.model), random.Random(0)
    raw = [source.read(i) for i in range(count)]
    images = [decode_image(sample.image) for sample in raw]
    preprocess = Preprocess(run.phases[0].image_size, run.phases[0].augment)
    pixels = [preprocess.pixels(image, rng) for image in images]
    batch_pixels = stacked(pixels)
    subs = [sub_caption(sample.web, sample.long, run.captions, rng) for sample in raw]
    web = [sample.web for sample in raw]
    longs = [sample.long or "" for sample in raw]  # all are there: the source is opened with need_long

    def tokenise() -> None:
        sub_ids = [kept_tokens(ids, run.captions, rng) for ids in tokenizer.encode(subs)]
        for encoded in (tokenizer.encode(web), sub_ids):
            tokenizer.ids_for_tower(encoded, text)
        tokenizer.caption_ids(tokenizer.encode(longs), captioner.length)

    parts = {
        "read": lambda: [source.read(i) for i in range(count)],
        "decode": lambda: [decode_image(sample.image) for sample in raw],
        "resize and augment": lambda: [preprocess.pixels(image, rng) for image in images],
        "draw sub-captions": lambda: [sub_caption(s.web, s.long, run.captions, rng) for s in raw],
        "tokenise": tokenise,
        "collate": lambda: stacked(pixels),
        "normalise, on the device": lambda: normalise(batch_pixels),
    }
    seconds = fastest(parts, repeats, torch.device("cpu"))
    rows = [{"setting": name, "part": part, "us_per_sample": 1e6 * s / count} for part, s in seconds.items()]
    rows.append({"setting": name, "part": "all parts", "us_per_sample": 1e6 * sum(seconds.values()) / count})
    batch = run.phases[0].batch_size
    plain = replace(run, phases=(replace(run.phases[0], augment=AugmentConfig()),))
    loaders = {"loader, 0 workers, no augmentation": replace(plain, data=replace(run.data, workers=0))}
    loaders |= {f"loader, {n} workers": replace(run, data=replace(run.data, workers=n)) for n in (0, 1, 2)}
    rates = {part: 0.0 for part in loaders}
    for _ in range(min(repeats, 3)):
        for part, loaded in loaders.items():
            loader = _loader(loaded, source, tokenizer, 1 + 2048 // batch)
            next(loader)  # the workers' start is paid once per run
            begin = time.perf_counter()
            seen = sum(len(b["keys"]) for b in loader)
            rates[part] = max(rates[part], seen / (time.perf_counter() - begin))
    return rows + [{"setting": name, "part": part, "samples_per_s": rate} for part, rate in rates.items()]


# ----------------------------------------------------------------------------------------------------------- train
Step = Callable[[Batch], None]
TURN = 2
"""Optimizer steps of one turn."""
RECIPE_SECONDS = 10
"""How long the recipe itself is timed, loader included."""


def train_rows(name: str, device: torch.device, repeats: int, demo_dir: str) -> list[Row]:
    """The setting's recipe through loader and engine; then steps on ready batches against stock open_clip.

    The comparison is of one process, fp32 weights (under bf16 autocast where the device computes in it), and fused
    AdamW on both sides; ours goes through the DeepSpeed engine with its check for finite gradients, open_clip's
    through the plain loop of its trainer. Two pairs:
    - towers: image and two texts, two InfoNCE losses, no captioner; the towers are the same, layer for layer.
      open_clip pads each text to the context, as its tokenizer gives it; "at our length" cuts its texts like ours.
    - captioner: the whole CLIPS objective against open_clip's CoCa of the same widths and depths. CoCa has one text
      (the long caption, causal) and cross-attention, and holds the logits whole: the nearest stock objective, not
      the same one.
    """
    arguments = (name, device, demo_dir)
    rows = [in_child(recipe_row, *arguments)]
    for pair, kinds in PAIRS.items():
        print(f"{name}: {pair}", file=sys.stderr)
        rates = in_child(paired_rates, *arguments, kinds, repeats)
        for kind in kinds:
            row = {"setting": name, "pair": pair, "what": kind, "samples_per_s": rates[kind]}
            row["ours / this"] = rates[kinds[0]] / rates[kind]
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
        "setting": name, "pair": "recipe", "what": f"{run.optim.kind}, {run.data.workers} workers",
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
    return step_of(clips_engine(run, tokenizer, device))


def step_of(engine: Engine) -> Step:
    """The training step of `engine`, as the loop takes it."""

    def step(batch: Batch) -> None:
        loss, _ = engine(to_device(engine.task.counted(batch), engine.device))
        engine.backward(loss)
        engine.agree(loss, 0)
        engine.step()
        engine.limit_logit_scale()

    return step


def stock_step(model: Any, loss_of: Callable[[Batch], Tensor], device: torch.device) -> Step:
    """The training step of an open_clip `model`: autocast, backward, optimizer, clamp of the temperature."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
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


def _stock_coca(run: RunConfig, tokenizer: CaptionTokenizer, device: torch.device) -> Step:
    import open_clip

    captioner = captioner_of(run.model)
    config = coca_config(run.model, captioner, tokenizer)
    model = open_clip.CoCa(**{key: value for key, value in config.items() if key != "custom_text"})
    # open_clip leaves this one as the memory was: now and then the first loss is not finite.
    torch.nn.init.normal_(model.text_decoder.text_projection, std=captioner.width**-0.5)
    loss = open_clip.loss.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0, pad_id=tokenizer.pad_id)

    def loss_of(batch: Batch) -> Tensor:
        ids = F.pad(batch["caption"], (0, captioner.length - batch["caption"].shape[1]), value=tokenizer.pad_id)
        out = model(batch["images"], ids)
        return sum(loss(out["image_features"], out["text_features"], out["logits"], out["labels"], out["logit_scale"]))

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
    "open_clip CoCa": _stock_coca,
}
PAIRS = {
    "towers": ("ours, towers", "open_clip", "open_clip, at our length"),
    "captioner": ("ours, CLIPS", "open_clip CoCa"),
}


def _ready(name: str, device: torch.device, demo_dir: str) -> tuple[RunConfig, CaptionTokenizer, list[Batch]]:
    init_distributed(device)
    run = setting(name, device, demo_dir)
    source, tokenizer = _open(run)
    one_process = replace(run, data=replace(run.data, workers=0))
    return run, tokenizer, list(islice(_loader(one_process, source, tokenizer, TURN), TURN))


def paired_rates(
    name: str, device: torch.device, demo_dir: str, kinds: tuple[str, ...], repeats: int
) -> dict[str, float]:
    """Samples/s of each kind on the same batches, in turns."""
    run, tokenizer, batches = _ready(name, device, demo_dir)
    steps = {kind: STEPS[kind](run, tokenizer, device) for kind in kinds}
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


# ---------------------------------------------------------------------------------------------------------- tokens
KEEP, DROP = "model.captioner.image_token_keep=0.3", "model.vision.patch_dropout=0.5"
ALONE = "model.embed_dim=0", "task.objective=caption", "model.captioner.web=false"
DROPS: dict[str, tuple[str, ...]] = {
    "clips, all tokens": (),
    "clips, captioner on 30 %": (KEEP,),
    "clips, half of the patches": (DROP,),
    "clips, both": (KEEP, DROP),
    "caption, all tokens": ALONE,
    "caption, captioner on 30 %": (*ALONE, KEEP),
    "caption+web, captioner on 30 %": (*ALONE[:1], "task.objective=caption+web", KEEP),
}
"""What is compared → what of the setting is changed."""


def token_rows(name: str, device: torch.device, repeats: int, demo_dir: str) -> list[Row]:
    """Steps of the setting that drop image tokens, or the contrastive loss, each in turns with those that do not."""
    first, *others = DROPS
    rows: list[Row] = [{"setting": name, "what": first, "time / all": 1.0, "FLOPs / all": 1.0}]
    for what in others:
        print(f"{name}: {what}", file=sys.stderr)
        time_share, flops_share = in_child(token_shares, name, device, repeats, demo_dir, (first, what))
        rows.append({"setting": name, "what": what, "time / all": time_share, "FLOPs / all": flops_share})
    return [row | {"peak_MB": in_child(token_peak, name, device, demo_dir, row["what"])} for row in rows]


def _dropping(name: str, device: torch.device, demo_dir: str, what: str) -> tuple[Engine, list[Batch]]:
    init_distributed(device)
    run = setting(name, device, demo_dir).override([*DROPS[what], "data.workers=0"])
    source, tokenizer = _open(run)
    return clips_engine(run, tokenizer, device), list(_loader(run, source, tokenizer, TURN))


def token_shares(
    name: str, device: torch.device, repeats: int, demo_dir: str, kinds: tuple[str, str]
) -> tuple[float, float]:
    """Time and FLOPs of the second kind over those of the first, in turns of two steps.

    On a CPU seconds of this process's own work, which others on the machine hardly change.
    """
    engines = {what: _dropping(name, device, demo_dir, what) for what in kinds}
    steps = {what: step_of(engine) for what, (engine, _) in engines.items()}
    turns = {what: lambda what=what: [steps[what](batch) for batch in engines[what][1]] for what in kinds}
    seconds = fastest(turns, repeats, device, time.process_time if device.type == "cpu" else None)
    flops = {what: sum(map(engine.task.flops, batches)) for what, (engine, batches) in engines.items()}
    first, second = kinds
    return seconds[second] / seconds[first], flops[second] / flops[first]


def token_peak(name: str, device: torch.device, demo_dir: str, what: str) -> float:
    """Peak memory in MB of two steps, the model and its optimizer included."""
    memory = PeakMemory(device)
    engine, batches = _dropping(name, device, demo_dir, what)
    step = step_of(engine)
    for batch in batches:
        step(batch)
    return memory.read()


# --------------------------------------------------------------------------------------------------------- profile
PROFILED = {"clip_baseline, adamw": 1, "demo": 1, "demo, 2 ranks": 2, "b16 112 px": 1}
"""Setting → its ranks."""


def profiled_setting(name: str, device: torch.device, demo_dir: str) -> list[Row]:
    """The parts of a step of a setting; none where there are fewer GPUs than ranks."""
    ranks = PROFILED[name]
    if ranks == 1:
        return in_child(profile_rows, name, device, demo_dir)
    if device.type == "cuda" and torch.cuda.device_count() < ranks:
        return []
    return in_ranks(ranks, profile_rows, name, device, demo_dir)


def profile_rows(name: str, device: torch.device, demo_dir: str) -> list[Row]:
    """The parts of a step of a setting; of `clip_baseline` with AdamW, as `program` runs it."""
    if "LOCAL_RANK" in os.environ:
        device = choose_device(device.type)
    init_distributed(device)
    if (base := name.removesuffix(", 2 ranks")) in SETTINGS:
        run = setting(base, device, demo_dir)
    else:
        demo = setting("demo", device, demo_dir)
        run = replace(recipe("clip_baseline"), data=demo.data, train=demo.train)
        run = replace(run, optim=replace(run.optim, kind="adamw"))
    source, tokenizer = _open(run)
    peak, _ = peak_flops(device, torch.bfloat16 if run.train.precision == "bf16" else torch.float32)
    steps = WARM + (30 if device.type == "cuda" or name not in SETTINGS[1:] else 8)
    batches = _loader(run, source, tokenizer, steps, dist.get_rank(), dist.get_world_size())
    rows = part_rows(clips_engine(run, tokenizer, device), batches, peak)
    return [{"setting": name, **row} for row in rows]


# ----------------------------------------------------------------------------------------------------------- chunk
def chunk_rows(device: torch.device, repeats: int) -> list[Row]:
    """Forward and backward pass of the caption loss of B/16, all logits at once against in chunks."""
    rows: list[Row] = []
    for chunk in (None, 4096, 1024):
        row = in_child(chunk_row, device, repeats, chunk)
        whole = rows[0] if rows else row
        rows.append(row | {"memory / whole": row["peak_MB"] / whole["peak_MB"]})
    return rows


def chunk_row(device: torch.device, repeats: int, chunk: int | None) -> Row:
    captioner, vocabulary = captioner_of(PRESETS["B/16"]), PRESETS["B/16"].text.vocab_size
    B, T = 512 if device.type == "cuda" else 64, captioner.length - 1
    head = nn.Linear(captioner.width, vocabulary, device=device)
    states = torch.randn(B, T, captioner.width, device=device, requires_grad=True)
    targets = torch.randint(1, vocabulary, (B, T), device=device)
    targets[:, 3 * T // 4 :] = IGNORE  # padding

    def loss() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
            if chunk is None:
                value = F.cross_entropy(head(states).float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
            else:
                total, count = caption_loss(states, targets, head, chunk)
                value = total / count
        value.backward()

    memory = PeakMemory(device)
    seconds = fastest({"loss": loss}, repeats, device)["loss"]
    return {
        "logits": "whole batch" if chunk is None else f"{chunk} positions at a time",
        "positions": B * T, "vocabulary": vocabulary, "ms": 1e3 * seconds, "peak_MB": memory.read(),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------ checkpoint
def checkpoint_row(name: str, device: torch.device, repeats: int, demo_dir: str) -> Row:
    """How long a checkpoint stops the training: written before it goes on, or beside it; and a step meanwhile.

    Alternating, on the disk of the temporary directory; medians of the turns after the first.
    """
    run, tokenizer, batches = _ready(name, device, demo_dir)
    engine = clips_engine(run, tokenizer, device)
    step, state = step_of(engine), TrainState(seed=0)
    seconds: dict[str, list[float]] = {part: [] for part in ("before", "beside", "write", "step", "step beside")}

    def timed(part: str, what: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = what()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds[part].append(time.perf_counter() - begin)
        return result

    def copied() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return engine.state.gather_weights(), engine.state.gather_optimizer()

    with tempfile.TemporaryDirectory() as folder, checkpoint.Writer(Path(folder), keep=1) as writer:
        for batch in batches:
            step(batch)  # builds what the optimizer keeps
        for turn in range(repeats + 1):
            state.step += 1
            next_step = partial(step, batches[turn % len(batches)])
            timed("step", next_step)
            timed("before", lambda: checkpoint.save(Path(folder), *copied(), state, 1))
            state.step += 1
            begin = time.perf_counter()
            timed("beside", lambda: writer.begin(*copied(), state))
            timed("step beside", next_step)
            if (failure := writer.wait()) is not None:
                raise UserError(failure)
            seconds["write"].append(time.perf_counter() - begin)
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
    ms = {part: 1e3 * sorted(times[1:])[repeats // 2] for part, times in seconds.items()}
    return {
        "setting": name, "MB": size / 1e6, "stop_ms_written_before": ms["before"], "stop_ms_beside": ms["beside"],
        "beside / before": ms["beside"] / ms["before"], "written_after_ms": ms["write"],
        "step_ms": ms["step"], "step_ms_while_writing": ms["step beside"],
    }  # fmt: skip
