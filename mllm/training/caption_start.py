"""The closed-form start of stage 1: gathers features and captions of samples, and fits the projector to them."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist

from clips.common.errors import UserError
from mllm.data.conversation import IGNORE
from mllm.data.dataset import Collator
from mllm.model.projector_start import start_from_captions
from mllm.training.arguments import TrainArguments
from mllm.training.freeze import llava_of
from mllm.training.prepare import START_IMAGES, Prepared

START_TOKENS, START_BATCH = 16, 64
"""The fit takes this many tokens of each image; images are read in batches of START_BATCH."""


def fit_to_captions(arguments: TrainArguments, prepared: Prepared, collator: Collator, device: torch.device) -> float:
    """Fit the projector to up to `START_IMAGES` samples with one picture; returns R². The same on every rank."""
    single = [i for i, record in enumerate(prepared.dataset.records) if len(record.images) == 1]
    generator = torch.Generator().manual_seed(arguments.seed)
    chosen = [single[i] for i in torch.randperm(len(single), generator=generator)[:START_IMAGES].tolist()]
    if not chosen:
        raise UserError("--mm_projector_init captions needs samples with one picture, and the data has none")
    captions, parts, encoder = [], [], prepared.vision
    tower: Any = encoder.model  # PreTrainedModel.to is annotated without its `self`
    tower.to(device)
    for begin in range(0, len(chosen), START_BATCH):
        samples = [prepared.dataset[i] for i in chosen[begin : begin + START_BATCH]]
        captions += [[label for label in sample["labels"] if label != IGNORE] for sample in samples]
        features = collator.load_images([sample["images"][0] for sample in samples])
        if not arguments.caches_features:  # then `features` are pixels
            with torch.no_grad():
                features = encoder.features(features.to(device)).cpu()
        kept = torch.randperm(features.shape[1], generator=generator)[:START_TOKENS]
        parts.append(features[:, kept])
    model = llava_of(prepared.model)
    projector = model.model.multi_modal_projector  # with DeepSpeed it is not on the GPU yet
    fitted = copy.deepcopy(projector).float().cpu()
    words = model.get_input_embeddings().get_parameter("weight").cpu()
    r2 = start_from_captions(fitted, torch.cat(parts), captions, words, seed=arguments.seed)
    for parameter, value in zip(projector.parameters(), fitted.parameters(), strict=True):
        value = value.data.to(device)  # NCCL broadcasts only from the GPU
        if dist.is_initialized():
            dist.broadcast(value, src=0)
        parameter.data.copy_(value)
    return r2
