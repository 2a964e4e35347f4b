"""What a LLaVA stage gives to the loop: its model with the loss, its batches, its rates, and what a batch costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import get_scheduler

from clips.common.errors import UserError
from clips.common.flops import forward_flops, training_flops
from clips.common.runtime import autocast
from clips.engine.checkpoint import TrainState
from clips.engine.engine import Batch, Engine, Objective
from clips.engine.loader import load_batches
from clips.engine.loop import Trainer
from mllm.data.batches import EpochSampler, pad_rows
from mllm.data.conversation import IGNORE
from mllm.data.dataset import LlavaDataset
from mllm.encoders.encoder import gives_map, keep_statistics, prefix_tokens
from mllm.model.forward import PACKED, Counts, Packing, can_pack, causal_lm_loss, embed_inputs, pairs_of
from mllm.model.tiles import Llava, TokenLayout, llava_of, newline_of, placeholder_ids
from mllm.training.config import StageConfig
from mllm.training.recipes import PARTS


class TrainingModel(Objective):
    """The module that the engine wraps, from batch to loss. `model` is the LLaVA model, plain or as a PeftModel.

    With tiles the newline is a parameter of this module too, because ZeRO-3 gathers parameters while their module runs.
    """

    def __init__(self, model: nn.Module, *, features: bool, packed: bool = True, bf16: bool = False) -> None:
        """Wrap `model`.

        Args:
            features: Batches hold `image_features`, not `pixel_values`.
            packed: Pack batches (mllm/model/forward.py) if the language model allows it.
            bf16: Compute in bf16 with weights of any precision (autocast).
        """
        super().__init__()
        self.model = model
        self.features, self.bf16 = features, bf16
        self.image_newline = newline_of(self.llava)
        self.packed = packed and can_pack(self.llava.config.get_text_config())
        if self.packed:
            self.llava.model.language_model.set_attn_implementation(PACKED)

    @property
    def llava(self) -> Llava:
        """The LLaVA model, without adapters around it."""
        return llava_of(self.model)

    def forward(self, batch: Batch, label_count: Tensor | float | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch in the layout of `Collator`, and the same loss without its graph.

        Args:
            label_count: Number by which the sum over labels is divided; None: the number of labels in this batch.
        """
        with autocast(batch["input_ids"].device, enabled=self.bf16):
            loss = self._loss(batch, label_count)
        return loss, {"loss": loss.detach()}

    def inputs_of(self, batch: Batch) -> tuple[Tensor, Packing | None, Counts]:
        """Return the embeddings [B, L, D] that the language model reads, how they are packed, and the counts."""
        llava, ids = self.llava, batch["input_ids"]
        counts, features, pixels = (batch.get(name) for name in ("counts", "image_features", "pixel_values"))
        if counts is None:  # without them the host waits for the GPU
            counts = Counts.of(batch, *placeholder_ids(llava.config))
        if not self.features and pixels is None:  # a batch without images, see `embed_inputs`
            side = llava.model.vision_tower.config.image_size
            pixels = torch.zeros(0, 3, side, side, dtype=llava.dtype, device=ids.device)
        embeds = embed_inputs(llava, ids, features, pixels, counts.image_tokens, batch.get("image_sizes", ()))
        return embeds, Packing.of(batch["attention_mask"], counts) if self.packed else None, counts

    def _loss(self, batch: Batch, label_count: Tensor | float | None) -> Tensor:
        embeds, packing, counts = self.inputs_of(batch)
        mask, labels = batch["attention_mask"], batch["labels"]
        return causal_lm_loss(self.llava, embeds, mask, labels, label_count, learned=counts.learned, packing=packing)

    def to_device(self, batch: Batch, device: torch.device) -> Batch:
        """Return the batch with its tensors on `device`, the pixels in the encoder's precision."""
        moved = super().to_device(batch, device)
        if "pixel_values" in moved:
            moved["pixel_values"] = moved["pixel_values"].to(self.llava.model.vision_tower.dtype)
        return moved

    def train(self, mode: bool = True) -> TrainingModel:
        """Set the mode of all modules, but keep the encoder in eval mode unless it trains, and its batch statistics."""
        super().train(mode)
        tower = self.llava.model.vision_tower
        if not any(parameter.requires_grad for parameter in tower.parameters()):
            tower.eval()
        keep_statistics(tower)
        return self

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that train by name; a checkpoint holds these."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


@dataclass(frozen=True)
class Collator:
    """Turns samples into a batch for training: ids, labels and mask [B, L], and `image_key` from `load_images`.

    A batch also holds its `counts`, counted before it goes to the device, the `keys` of its samples, which an error
    shows if a loss is not finite, and `image_sizes` of all images if the samples have them. A batch without images has
    no `image_key`; the model makes that safe under ZeRO-3.
    """

    pad_id: int
    image_ids: tuple[int, ...]
    """Ids of the placeholders of images and videos."""
    load_images: Callable[[list[str]], Tensor] | None
    """Returns pixels or features of the images of these names; None for a data set without images."""
    image_key: str = "pixel_values"

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        ids = [sample["input_ids"] for sample in samples]
        batch: dict[str, Any] = {
            "input_ids": pad_rows(ids, self.pad_id),
            "labels": pad_rows([sample["labels"] for sample in samples], IGNORE),
            "attention_mask": pad_rows([[1] * len(row) for row in ids], 0),
            "keys": [sample["key"] for sample in samples],
        }
        batch["counts"] = Counts.of(batch, *self.image_ids)
        names = [name for sample in samples for name in sample["images"]]
        if names and self.load_images is not None:
            batch[self.image_key] = self.load_images(names)
        sizes = [size for sample in samples for size in sample.get("image_sizes", ())]
        if sizes:
            batch["image_sizes"] = sizes
        return batch


def read_batch(dataset: LlavaDataset, collator: Collator, indices: Sequence[int]) -> Batch:
    """Read the micro-batch of these samples. Raises UserError for an image that cannot be read."""
    return collator([dataset[index] for index in indices])


class LlavaTrainer(Trainer):
    """The trainer of a LLaVA stage: its batches, its learning rates, and the number of labels of each step."""

    def __init__(
        self, config: StageConfig, engine: Engine, dataset: LlavaDataset, collator: Collator, state: TrainState,
        costs: Mapping[str, int],
    ) -> None:  # fmt: skip
        """`costs` are those of `costs_of` before the engine was made."""
        self.config, self.engine, self.dataset, self.collator = config, engine, dataset, collator
        self.state = state
        self.steps = steps_of(config, len(dataset))
        self.samples = samples_after(self.steps, len(dataset), config.batch_size)
        state.samples = samples_after(state.step, len(dataset), config.batch_size)  # an old one counted full steps
        self.log_every, self.logged_group = config.logging_steps, "language_model"
        self.peaks, self.costs = config.rates, costs
        self.local_module = engine.module
        self.factor = schedule(config, self.steps)

    def batches(self) -> Iterator[Batch]:
        """Return the loader of this rank's micro-batches, from the current step on."""
        sampler = EpochSampler(
            self.dataset.modality_lengths,
            batch_size=self.config.per_device_train_batch_size,
            chunks=self.engine.world_size * self.engine.accumulation,
            seed=self.config.seed,
            group_by_modality_length=self.config.group_by_modality_length,
        )
        indices = sampler.batches(rank=dist.get_rank(), ranks=self.engine.world_size, step=self.state.step)
        left = islice(indices, (self.steps - self.state.step) * self.engine.accumulation)
        read = partial(read_batch, self.dataset, self.collator)
        return load_batches(read, left, self.config.dataloader_num_workers or 0, "--dataloader_num_workers")

    def begin_step(self) -> tuple[int, dict[str, float]]:
        """Seed the dropout of the adapters, so that a resumed stage draws what it would have drawn."""
        config, step = self.config, self.state.step
        torch.manual_seed(hash((config.seed, step, dist.get_rank())))
        size = samples_after(step + 1, len(self.dataset), config.batch_size) - self.state.samples
        return size, {part: self.factor(step) * self.peaks[part] for part in PARTS}

    def shared_inputs(self, batches: Sequence[Batch]) -> Sequence[Tensor | float]:
        """Return the step's mean number of labels of a micro-batch, by which the sum over labels is divided.

        So the mean over micro-batches and ranks, which the engine takes, is the mean over all labels of the step.
        """
        engine, local = self.engine, sum(batch["counts"].learned for batch in batches)
        if engine.world_size == 1:
            return [max(1, local) / len(batches)] * len(batches)
        labels = torch.full((), float(local), device=engine.device)  # filled there: nothing waits for the device
        dist.all_reduce(labels)
        return [labels.clamp(min=1) / (len(batches) * engine.world_size)] * len(batches)

    def cost(self, batch: Batch) -> tuple[int, int]:
        """Return the FLOPs of a micro-batch, and its number of tokens without padding."""
        return flops_of(batch, self.costs, packed=self.engine.module.packed), batch["counts"].real

    def saves(self) -> bool:
        """Return True after every --save_steps steps; with 0 never."""
        every = self.config.save_steps
        return every > 0 and self.state.step % every == 0


def steps_of(config: StageConfig, samples: int) -> int:
    """Return the number of optimizer steps of a stage; the last step of an epoch may have fewer samples."""
    if config.max_steps > 0:
        return config.max_steps
    return math.ceil(config.num_train_epochs * math.ceil(samples / config.batch_size))


def samples_after(steps: int, samples: int, batch_size: int) -> int:
    """Return how many samples `steps` optimizer steps train on, of a data set of `samples`."""
    epochs, rest = divmod(steps, math.ceil(samples / batch_size))
    return epochs * samples + rest * batch_size


def schedule(config: StageConfig, steps: int) -> Callable[[int], float]:
    """Return the learning rate schedule of transformers, a function from the step (0-based) to the share of the peak.

    Raises UserError for a schedule that is no function of the step alone.
    """
    warmup = config.warmup_steps
    if warmup is None:
        warmup = math.ceil(steps * config.warmup_ratio)
    unused = torch.optim.AdamW([nn.Parameter(torch.zeros(()))])
    try:
        created = get_scheduler(config.lr_scheduler_type, unused, warmup, steps)
        return created.lr_lambdas[0]
    except (AttributeError, TypeError, ValueError):
        raise UserError(
            f"--lr_scheduler_type {config.lr_scheduler_type} is not supported; choose one of: linear, cosine, "
            "cosine_with_restarts, polynomial, constant, constant_with_warmup, inverse_sqrt"
        ) from None


# ------------------------------------------------------------------------------------------- cost
def costs_of(model: Llava, image_size: int) -> dict[str, int]:
    """Return the FLOPs of the forward and backward pass for each unit of work, with the parts that train now.

    What a step runs without using it is not counted: an encoder's pooler, and the zero image that a batch without
    images sends through the encoder (mllm/model/forward.py). In a mixture of experts every expert is counted.

    Args:
        image_size: Side of a square that the encoder sees, in pixels; 0 if its features are cached.
    """
    inner: Any = model.model
    tower, projector, language_model = inner.vision_tower, inner.multi_modal_projector, inner.language_model
    sees = _trains(tower)
    into = sees or _trains(projector) or _trains(language_model.get_input_embeddings())
    learns = into or _trains(language_model)
    text = model.config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    square = TokenLayout.of(model.config).tokens_per_crop * training_flops(projector, sees)
    return {
        "images": square + (_tower(tower, model.config.vision_feature_layer, image_size) if image_size else 0),
        "positions": training_flops(_blocks(language_model), into),
        "pairs": (3 if learns else 1) * 4 * text.num_hidden_layers * text.num_attention_heads * head,
        "predicted": training_flops(model.lm_head, learns),
    }


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _blocks(model: nn.Module) -> nn.ModuleList:
    """Return the blocks of a transformer: its longest list of modules."""
    return max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len)


def _tower(tower: Any, feature_layer: int | list[int], image_size: int) -> int:
    """Return the FLOPs of one square through all blocks of an encoder, and back through those whose output is used."""
    if gives_map(tower.config):
        from mllm.encoders.maps import map_flops  # not at the top: it imports timm

        return map_flops(tower, image_size)
    (patches,) = (module for module in tower.modules() if isinstance(module, nn.Conv2d))
    blocks = _blocks(tower)
    count = (image_size // patches.kernel_size[0]) ** 2
    tokens = count + prefix_tokens(tower.config)
    layers = [feature_layer] if isinstance(feature_layer, int) else feature_layer
    used = max(layer if layer >= 0 else len(blocks) + 1 + layer for layer in layers)
    total = count * training_flops(patches, False)
    for index, block in enumerate(blocks):
        passes = 3 if patches.weight.requires_grad and index < used else 1
        total += passes * tokens * (forward_flops(block) + 4 * tokens * tower.config.hidden_size)
    return total


def flops_of(batch: Mapping[str, Any], costs: Mapping[str, int], *, packed: bool) -> int:
    """Return the FLOPs of the forward and backward pass over a batch; `costs` are those that `costs_of` returns.

    The units of work are those of `units_of`, which explains `packed`.
    """
    return sum(count * costs[unit] for unit, count in units_of(batch, packed=packed).items())


def units_of(batch: Mapping[str, Any], *, packed: bool) -> dict[str, int]:
    """Return the units of work in a batch of `Collator`.

    Units are crops of images, positions of sequences, pairs of query and key (causal or not), and tokens that are
    learned. If the batch is `packed` (mllm/model/forward.py), padding costs nothing.
    """
    samples, length = batch["input_ids"].shape
    counts = batch["counts"]
    return {
        "images": sum(len(batch[name]) for name in ("image_features", "pixel_values") if name in batch),
        "positions": counts.row if packed else samples * length,
        "pairs": pairs_of(samples, length, counts.shared if packed else 0),
        "predicted": counts.learned,
    }
