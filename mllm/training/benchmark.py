"""What packed rows save in training: the same steps on the same batches, packed and padded, in turns within one run.

A step is forward and backward pass of one micro-batch and AdamW's update, in the arithmetic that the stage trains in.
Each pair of steps gives one ratio; the median of the ratios counts, so a machine that is slower for a while slows both
sides of a pair. On a CPU the time is what its threads computed, each of them: what else runs there counts little.
"""

from __future__ import annotations

import copy
import itertools
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from clips.common.errors import UserError
from clips.common.runtime import choose_device
from clips.common.timing import busy_seconds
from mllm.data.sampler import EpochSampler
from mllm.model.packing import can_pack
from mllm.training.arguments import parse_train_arguments
from mllm.training.freeze import llava_of
from mllm.training.prepare import collator_of, prepare
from mllm.training.trainer import TrainingModel


def benchmark_training(flags: list[str], *, repeats: int) -> dict[str, Any]:
    """Tokens per second of the stage that training's `flags` describe, packed ("ours") and padded ("theirs").

    UserError where its language model trains padded in any case, or the data hold fewer batches than `repeats` asks.
    """
    if repeats < 1:
        raise UserError(f"--repeats {repeats} must be at least 1")
    # A dry run's parts: stage 2 needs no projector of a stage 1.
    arguments = parse_train_arguments([*flags, "--dry-run"]).resolve(1)
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
    return {
        "what": f"stage {arguments.stage}, tokens/s, {arguments.per_device_train_batch_size} samples, "
        f"{1 - tokens / padded:.0%} padding",
        "ours": tokens / sum(ours for ours, _, _ in measured),
        "theirs": tokens / sum(theirs for _, theirs, _ in measured),
        "ratio": statistics.median(theirs / ours for ours, theirs, _ in measured),
    }


class _Side:
    def __init__(self, model: TrainingModel, device: torch.device, *, bf16: bool) -> None:
        self.model, self.device, self.bf16 = model, device, bf16
        self.optimizer = torch.optim.AdamW(model.trained().values(), lr=1e-5)

    def step(self, batch: dict[str, Tensor]) -> float:
        """Seconds of one step."""
        begin = busy_seconds(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.model(**{name: tensor.to(self.device) for name, tensor in batch.items()})["loss"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return busy_seconds(self.device) - begin
