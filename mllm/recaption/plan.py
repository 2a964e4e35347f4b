"""What a recaptioning will take, told before it begins: pairs, shards, captioner, time, tokens, money."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

from clips.common.errors import UserError
from clips.common.escape import for_rich
from clips.common.peaks import peak_flops
from clips.common.runtime import choose_device, has_bf16
from mllm.model.flops import LlavaFlops
from mllm.model.load import newest_model
from mllm.recaption.manifest import Folder
from mllm.recaption.options import Options
from mllm.recaption.progress import measured
from mllm.recaption.shards import Shard
from mllm.training.cost import CAPTION, GENERATION, PROMPT, caption_flops

REACHED = 0.2
"""Share of the device's peak that training reaches, as scripts/plan_run.py assumes; generating reaches GENERATION of
it."""
ENOUGH = 100
"""Captions after which their measured speed is believed."""
PICTURE = 576
"""Tokens that a server counts for a picture, where nobody knows: those of LLaVA-1.5."""


def demo_captioners(out: Path) -> list[tuple[str, Path]]:
    """Without --captioner: the newest model trained here and the newest CLIPS captioner that writes word by word."""
    found = []
    with contextlib.suppress(UserError):  # the message below names both ways
        found.append((f"llava:{newest_model()}", out / "llava"))
    runs = []
    for path in (*Path("runs").glob("*/config.json"), *Path("runs").glob("*/*/config.json")):
        try:
            captioner = json.loads(path.read_text())["model"]["captioner"] or {}
        except (OSError, ValueError, KeyError, TypeError):
            continue  # no pretraining run
        if captioner.get("inputs") == "tokens" and (path.parent / "export").is_dir():
            runs.append((path.stat().st_mtime, path.parent))
    if runs:
        found.append((f"clips:{max(runs)[1]}", out / "clips"))
    if not found:
        raise UserError(
            "no captioner: there is no model trained here (bash scripts/train_llava.sh), nor a run of "
            "pretrain_clips.py with --set model.captioner.inputs=tokens. --captioner names another (docs/recaption.md)"
        )
    return found


def print_plan(
    options: Options,
    folder: Folder,
    shards: Sequence[Shard],
    missing: Sequence[Shard],
    processes: int,
    price: Sequence[float] | None,
    console: Console,
) -> None:
    """`missing`: what this command is to do; `price`: of a million tokens read and of a million written."""
    pairs, left = sum(map(len, shards)), sum(map(len, missing))
    so_far = measured(folder)
    known = so_far.pairs >= ENOUGH
    tokens = so_far.tokens / so_far.pairs if known else CAPTION
    table = Table(title="recaptioning", show_header=False, title_justify="left")
    rows = [
        ("pairs", f"{pairs:,} in {len(shards):,} shards, of which {left:,} in {len(missing):,} are to do here"),
        ("captioner", options.captioner + (f", {processes} processes" if processes > 1 else "")),
        ("time", _time(options, left, processes, so_far.pairs / so_far.seconds if known and so_far.seconds else None)),
        (
            "tokens",
            f"{left * tokens:,.0f} to write, {tokens:.0f} a pair "
            f"({'measured here, second attempts included' if known else 'assumed'}), at most {options.max_new_tokens} "
            "a caption",
        ),
        ("output", f"{options.out}, refused captions are tried again and then {_ON_BAD[options.on_bad]}"),
    ]
    if price is not None:
        read, written = price
        hint = len(options.prompt.fill("")) / 4 + PROMPT
        cost = (PICTURE + hint) * read + tokens * written
        rows.append(
            (
                "cost",
                f"{cost:,.2f} a million captions, {cost * left / 1e6:,.2f} here, at {PICTURE} tokens a picture "
                f"and {hint:.0f} of prompt (assumed); second attempts come on top",
            )
        )
    for name, text in rows:
        table.add_row(name, for_rich(text))
    console.print(table)


_ON_BAD = {"drop": "left out", "keep": "kept"}


def _time(options: Options, pairs: int, processes: int, measured_speed: float | None) -> str:
    if not pairs:
        return "nothing to do"
    if measured_speed is not None:
        seconds, how = pairs / measured_speed / processes, "at the speed measured in this folder"
    else:
        expected = _expected_seconds(options)
        if expected is None:
            return "known after the first captions"
        seconds, how = pairs * expected / processes, f"if generating reaches {REACHED * GENERATION:.0%} of the peak"
    return f"{seconds / 3600:,.1f} hours {how}" if seconds >= 3600 else f"{seconds / 60:,.1f} minutes {how}"


def _expected_seconds(options: Options) -> float | None:
    """For one caption on one device; None for what is no LLaVA in a directory here."""
    kind, _, name = options.captioner.partition(":")
    if kind not in ("llava", "hf") or not (Path(name) / "config.json").is_file():
        return None
    config = AutoConfig.from_pretrained(name)
    if not isinstance(config, LlavaConfig):
        return None
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config).requires_grad_(False)
    size, tokens = getattr(config.vision_config, "image_size", None), config.image_seq_length
    if size is None:
        return None
    flops = LlavaFlops(model, image_size=size, image_tokens=tokens, features=False)
    device = choose_device(options.device)
    peak, _ = peak_flops(device, torch.bfloat16 if has_bf16(device) else torch.float32)
    return caption_flops(flops, tokens) / (peak * REACHED * GENERATION)
