"""What packed rows save in training: the same steps on the same batches, packed and padded, in turns within one run.

A step is forward and backward pass of one micro-batch and AdamW's update, in the arithmetic that the stage trains in.
Each pair of steps gives one ratio; the median of the ratios counts, so a machine that is slower for a while slows both
sides of a pair. On a CPU the time is what its threads computed, each of them: what else runs there counts little.
"""

from __future__ import annotations

import copy
import itertools
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from clips.common.errors import UserError
from clips.common.files import write_json
from clips.common.runtime import choose_device
from mllm.data.sampler import EpochSampler
from mllm.model.packing import can_pack
from mllm.training.arguments import parse_train_arguments
from mllm.training.freeze import llava_of
from mllm.training.prepare import collator_of, prepare
from mllm.training.trainer import TrainingModel


def benchmark_training(flags: list[str], *, repeats: int, out: str | None) -> dict[str, Any]:
    """Measure the stage that training's `flags` describe, print a table, write it to `out` as JSON.

    UserError where its language model trains padded in any case, or the data hold fewer batches than `repeats` asks.
    """
    if repeats < 1:
        raise UserError(f"--repeats {repeats} must be at least 1")
    # A dry run's parts: stage 2 needs no projector of a stage 1.
    arguments = parse_train_arguments([*flags, "--dry_run", "True"]).resolve(1)
    device = choose_device(arguments.device)
    prepared = prepare(arguments, Path(arguments.output_dir), device, None)
    llava = llava_of(prepared.model)
    if not can_pack(llava.config.get_text_config()):
        raise UserError(f"language models of type {llava.config.get_text_config().model_type} train padded")
    sampler = EpochSampler(
        prepared.dataset.modality_lengths,
        batch_size=arguments.per_device_train_batch_size,
        chunks=arguments.gradient_accumulation_steps,
        seed=arguments.seed,
        group_by_modality_length=arguments.group_by_modality_length,
    )
    loader = DataLoader(
        prepared.dataset,
        batch_size=arguments.per_device_train_batch_size,
        sampler=sampler,
        collate_fn=collator_of(arguments, prepared, device),
    )
    batches = list(itertools.islice(loader, repeats + 1))
    if len(batches) <= repeats:
        raise UserError(f"the data hold {len(batches)} batches, --repeats {repeats} needs {repeats + 1}")
    sides = {}
    for packed in (True, False):
        model = TrainingModel(copy.deepcopy(prepared.model), features=arguments.caches_features, packed=packed)
        sides[packed] = _Side(model.to(device).train(), device, bf16=arguments.bf16)
    pairs = []
    for number, batch in enumerate(tqdm(batches, desc="packed, padded", unit="pair")):
        order = (True, False) if number % 2 else (False, True)
        seconds = {packed: sides[packed].step(batch) for packed in order}
        pairs.append((seconds[True], seconds[False], int(batch["attention_mask"].sum())))
    measured = pairs[1:]  # the first pair warms up
    tokens = sum(count for _, _, count in measured)
    padded = sum(batch["attention_mask"].numel() for batch in batches[1:])
    result = {
        "stage": arguments.stage,
        "samples a batch": arguments.per_device_train_batch_size,
        "padding": 1 - tokens / padded,
        "repeats": repeats,
        "ours": {"tokens_per_s": tokens / sum(ours for ours, _, _ in measured)},
        "theirs": {"tokens_per_s": tokens / sum(theirs for _, theirs, _ in measured)},
        "ratios": {"tokens_per_s": statistics.median(theirs / ours for ours, theirs, _ in measured)},
        "machine": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "platform": platform.platform(),
            "torch": torch.__version__,
        },
    }
    table = Table("tokens/s, packed", "padded", "ratio", "padding of a batch", title=f"stage {arguments.stage}")
    figures = [f"{result[side]['tokens_per_s']:,.0f}" for side in ("ours", "theirs")]
    table.add_row(*figures, f"{result['ratios']['tokens_per_s']:.2f}", f"{result['padding']:.0%}")
    Console(emoji=False).print(table)
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(out), result)
        print(f"wrote {out}", file=sys.stderr)
    return result


class _Side:
    def __init__(self, model: TrainingModel, device: torch.device, *, bf16: bool) -> None:
        self.model, self.device, self.bf16 = model, device, bf16
        self.optimizer = torch.optim.AdamW(model.trained().values(), lr=1e-5)

    def step(self, batch: dict[str, Tensor]) -> float:
        """Seconds of one step."""
        begin = self._now()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.model(**{name: tensor.to(self.device) for name, tensor in batch.items()})["loss"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self._now() - begin

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time() / torch.get_num_threads()
