"""Rehearse a step of a LLaVA stage on tensors without data, and print what it takes on a GPU (scripts/plan_run.py).

This is clips/training/rehearsal.py for LLaVA. The weights are bf16, as DeepSpeed trains them, the data is LLaVA-1.5's.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, ViTConfig

from clips.common.errors import UserError
from clips.common.page import print_table, table_of
from clips.common.paths import DS_CONFIGS
from clips.common.rehearsal import FP32, META, Rehearsal, Rehearsed, drop_gradients, leave_meta, without_data
from clips.engine.metrics import Machine
from mllm.encoders.encoder import select_features
from mllm.model.forward import Counts
from mllm.model.llava import stock_classes
from mllm.model.projector_start import start_bytes
from mllm.model.tiles import MOST_TILES_WITH_VIDEO, Llava, TokenLayout, llava_of
from mllm.training.build import count_parameters, trainable, with_hidden_size
from mllm.training.config import StageConfig, TrainFlags
from mllm.training.features import IMAGES_AT_ONCE
from mllm.training.recipes import DEFAULTS, STAGES, freeze_table
from mllm.training.trainer import TrainingModel, costs_of, flops_of, steps_of, units_of

FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    "vocab_size",
)
SIZES = {  # as published
    "smollm2-135m": (576, 1536, 30, 9, 3, 49_152),
    "vicuna-7b": (4096, 11_008, 32, 32, 32, 32_000),
    "vicuna-13b": (5120, 13_824, 40, 40, 40, 32_000),
    "llama3-8b": (4096, 14_336, 32, 32, 8, 128_256),
    "qwen2.5-7b": (3584, 18_944, 28, 28, 4, 152_064),
}
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    name: dict(zip(FIELDS, sizes, strict=True)) for name, sizes in SIZES.items()
}
"""Fields of the config of `model_type`, which is llama if it is not given."""
LANGUAGE_MODELS["smollm2-135m"]["tie_word_embeddings"] = True
LANGUAGE_MODELS["qwen2.5-7b"]["model_type"] = "qwen2"
SAMPLES = {1: 558_128, 2: 665_298}
"""Number of samples in LLaVA-1.5's two stages."""
WORDS = {1: 30, 2: 250}
"""Tokens of a sample beside its image; rough numbers for that data."""
ANSWERS = {1: 20, 2: 150}
"""How many of those tokens are learned."""


@dataclass(frozen=True)
class Planned:
    """A model that does not exist yet. Raises UserError for parts that are not known or do not fit together."""

    language_model: str
    vision: Mapping[str, Any]
    """Fields of ViTConfig, all of them numbers."""
    tiles: str | None = None
    """Columns x rows of tiles beside the whole image, such as "2x2"; None: an image is one square."""
    frames: int = 0
    """Frames of a video; 0: no training on videos."""

    def __post_init__(self) -> None:
        if self.language_model not in LANGUAGE_MODELS:
            known = ", ".join(LANGUAGE_MODELS)
            raise UserError(f"--language-model {self.language_model!r} is not known; choose one of: {known}")
        if re.fullmatch(r"[1-6]x[1-6]", self.tiles or "1x1") is None:
            raise UserError(f"--tiles {self.tiles!r} must be columns x rows of tiles, from 1x1 to 6x6, such as 2x2")
        if self.frames and (self.tiles is None or math.prod(self.grid) > MOST_TILES_WITH_VIDEO):
            raise UserError(
                f"--frames needs --tiles with at most {MOST_TILES_WITH_VIDEO} tiles, such as 3x3: transformers' "
                "LlavaOnevision supports no more"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        columns, rows = (self.tiles or "1x1").split("x")
        return int(rows), int(columns)

    @property
    def layout(self) -> TokenLayout:
        """Token layout of the planned model: patches of a square, tile grid, frames."""
        side = self.vision["image_size"]
        rows, columns = self.grid
        pinpoints = ((rows * side, columns * side),) if self.tiles else ()
        return TokenLayout((side // self.vision["patch_size"]) ** 2, side, pinpoints, self.frames)

    def build(self) -> Llava:
        """Build the model without weights, in bf16 and frozen."""
        text = AutoConfig.for_model(**{"model_type": "llama"} | LANGUAGE_MODELS[self.language_model])
        parts: dict[str, Any] = {"vision_config": ViTConfig(**self.vision), "text_config": text}
        parts |= {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
        if self.tiles:
            parts["image_grid_pinpoints"] = [list(grid) for grid in self.layout.pinpoints]
        # num_frames is a field of our own, which the class keeps.
        parts |= {"num_frames": self.frames} if self.frames else {"image_seq_length": self.layout.tokens_per_crop}
        config_class, model_class = stock_classes(tiles=bool(self.tiles), videos=bool(self.frames))
        with torch.device(META):
            model = model_class(config_class(**parts))
        return llava_of(model.to(torch.bfloat16).requires_grad_(False))


def staged(
    model: Llava, arguments: StageConfig, *, features: bool = False, tower: bool = False, padded: bool = False
) -> TrainingModel:
    """Return the training model of a stage around `model`, as mllm/training/build.py makes it.

    Flags: `features` are cached, the encoder (`tower`) trains too, batches are `padded` instead of packed.
    """
    freeze = freeze_table(STAGES[arguments.stage], lora=arguments.lora_enable, unfreeze_mm_vision_tower=tower)
    with torch.device(model.device):
        full = trainable(model, arguments, freeze, model.device, dtype=model.dtype)
    return TrainingModel(full, features=features, packed=not padded).train()


def batch_of(training: TrainingModel, samples: int, *, stage: int = 2, images: bool = True) -> dict[str, Any]:
    """Return a batch of random values on the model's device, which was counted on the host as in training.

    All samples begin with the same token.
    """
    config, layout, device = training.llava.config, TokenLayout.of(training.llava.config), training.llava.device
    vision: Any = config.vision_config
    # The size with most tokens, whose crops may be fewer than those of a video.
    size = max(layout.sizes, key=layout.tokens, default=None)
    tokens, crops = layout.most, samples * (1 if size is None else layout.crops(size))
    length = tokens + WORDS[stage]
    ids = torch.randint(3, 90, (samples, length))
    ids[:, 0] = 7
    ids[:, 1] = 8 + torch.arange(samples)
    if images:
        ids[:, 10 : 10 + tokens] = config.image_token_id
    labels = ids.masked_fill(torch.arange(length) < length - ANSWERS[stage], -100)
    batch: dict[str, Any] = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    counts = Counts.of(batch, config.image_token_id)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}

    half: dict[str, Any] = {"dtype": training.llava.dtype, "device": device}
    if images and training.features:
        batch["image_features"] = torch.randn(crops, layout.tokens_per_crop, vision.hidden_size, **half)
    elif images:
        batch["pixel_values"] = torch.randn(crops, 3, vision.image_size, vision.image_size, **half)
    if layout.pinpoints:
        batch["image_sizes"] = [size] * samples
    return batch | {"counts": counts}


def rehearse(training: TrainingModel, batch: dict[str, Any], *, stage: int = 0) -> Rehearsed:
    """Rehearse the forward and backward pass under ZeRO `stage`, and return the bytes that they take.

    The model and `batch` (see `batch_of`) are on the device "meta"; the model leaves it. From stage 2 on, hooks stay on
    `training` that drop each gradient once it is made. Raises torch's error for a step that reads values.
    """
    leave_meta(training)
    trained = [parameter for parameter in training.parameters() if parameter.requires_grad]
    if stage >= 2:
        drop_gradients(trained)
    batch = without_data(batch)
    with Rehearsal() as rehearsal:
        weights = rehearsal.hold([*training.parameters(), *training.buffers()])
        rehearsal.hold(x for x in batch.values() if isinstance(x, torch.Tensor))
        training(batch)[0].backward()
    count = sum(p.numel() for p in trained)
    gradients = sum(p.nbytes for p in trained)
    return Rehearsed(count, weights, gradients, 2 * FP32 * count, rehearsal.peak)


def rehearse_features(model: Llava) -> int:
    """Return the bytes of a frozen encoder's pass over the images that it encodes at once (features.py)."""
    vision: Any = model.config.vision_config
    tower, size = model.model.vision_tower, vision.image_size
    leave_meta(tower)
    with Rehearsal() as rehearsal, torch.no_grad():
        rehearsal.hold([*tower.parameters(), *tower.buffers()])
        pixels = torch.empty(IMAGES_AT_ONCE, 3, size, size, dtype=model.dtype)
        select_features(tower, pixels, -2, "default")
    return rehearsal.peak


def print_stages(planned: Planned, machine: Machine, *, lora: bool) -> None:
    """Print a row for each of LLaVA-1.5's stages, with the largest micro-batch up to 16 that fits.

    Raises UserError if not even one sample at a time fits.
    """
    rows, days, notes = [], 0.0, ""
    width = LANGUAGE_MODELS[planned.language_model]["hidden_size"]
    for number, stage in STAGES.items():
        zero = {"stage": 0}
        if machine.gpus > 1:
            engine = json.loads((DS_CONFIGS / f"llava_zero{stage.zero}.json").read_text(encoding="utf-8"))
            zero = with_hidden_size(engine, width)["zero_optimization"]
        share = DEFAULTS[stage.name]["batch_size"] // machine.gpus
        for micro in (size for size in (16, 8, 4, 2, 1) if share % size == 0 or size == 1):
            arguments = TrainFlags(
                stage=number, data_path="data.json", per_device_train_batch_size=micro, bf16=True,
                gradient_checkpointing=True, feature_cache=False, lora_enable=lora and number == 2,
            ).resolve(machine.gpus)  # fmt: skip
            training = staged(planned.build(), arguments).to(torch.bfloat16)
            batch = batch_of(training, micro, stage=number)
            step = rehearse(training, batch, stage=zero["stage"])
            memory = step.on_rank(zero, machine.gpus)
            if machine.fits(memory):
                break
        else:
            raise UserError(
                f"stage {number} does not fit {machine}: one sample at a time takes {memory / 1e9:.1f} GB. Try --lora, "
                "more --gpus, a --kind with more memory, or a smaller --language-model"
            )

        forward, units = costs_of(planned.build(), 0), units_of(batch, packed=training.packed)  # nothing of it trains
        twice = sum(forward[unit] * units[unit] for unit in ("positions", "pairs"))  # gradient checkpointing
        costs = costs_of(training.llava, planned.vision["image_size"])
        flops = (flops_of(batch, costs, packed=training.packed) + twice) / micro
        days_of_stage = machine.days(SAMPLES[number] * flops)
        days += days_of_stage
        total = sum(count for count, _ in count_parameters(training.model).values())
        rows.append([
            stage.name, f"{total / 1e6:,.0f}", f"{step.parameters / 1e6:,.0f}", str(zero["stage"]),
            f"{arguments.gradient_accumulation_steps} × {micro}", f"{memory / 1e9:.3g}", f"{flops / 1e12:,.2f}",
            f"{steps_of(arguments, SAMPLES[number]):,}", f"{days_of_stage:.2f}",
        ])  # fmt: skip
        if zero["stage"] == 3:
            files, largest = 2 * total / 1e9, 2 * LANGUAGE_MODELS[planned.language_model]["vocab_size"] * width / 1e9
            at_most = files / machine.gpus + largest
            notes += (
                f"\nstage {number}, to load and to save, a rank holds its part and one weight, at most {at_most:.3g} "
                f"GB; the model is gathered into {files:.3g} GB of files first"
            )
    head = ("stage", "parameters, M", "trained, M", "ZeRO", "micro-batches", "memory per rank, GB", "TFLOP per sample")
    print_table(table_of(f"{planned.language_model} on {machine}", (*head, "steps", "days"), rows))
    layout = dataclasses.replace(planned.layout, frames=0)
    video = f", {planned.layout.most:,} per video" if planned.frames else ""
    print(
        f"{layout.most:,} tokens per image{video}; {days:.2f} days, {24 * days * machine.gpus:,.0f} GPU hours\n"
        f"before the first step, beside the weights: {rehearse_features(planned.build()) / 1e9:.2g} GB for the feature "
        f"cache's encoder and {IMAGES_AT_ONCE} crops at once (twice that in fp32, as on a CPU); with "
        f"--mm_projector_init captions {start_bytes(width) / 1e9:.2g} GB of the machine's memory\n"
        f"assumed: {machine.mfu:.0%} of the GPUs' peak (--mfu), including what is computed twice; the encoder runs in "
        f"every step; LLaVA-1.5's data: {SAMPLES[1]:,} and {SAMPLES[2]:,} samples of {WORDS[1]} and {WORDS[2]} tokens "
        f"beside the image, of which {ANSWERS[1]} and {ANSWERS[2]} are learned{notes}"
    )
