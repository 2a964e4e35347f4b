"""The parts that a stage needs before its first step: encoder, language model, data, projector, freeze plan."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from clips.common import rundir
from clips.common.errors import UserError
from clips.common.files import read_json
from clips.common.paths import cache_root
from mllm.data.conversation import ConversationEncoder
from mllm.data.dataset import Collator, LlavaDataset
from mllm.data.demo import ALIGN, DEMO_DIR, IMAGES, INSTRUCT, ensure_llava_demo
from mllm.data.formats import format_name
from mllm.data.images import ImageStore, pixel_loader
from mllm.encoders.encoder import VisionEncoder
from mllm.encoders.registry import image_pixels, load_vision
from mllm.model.llava import build_model
from mllm.model.llm import load_llm
from mllm.model.packing import SHORT
from mllm.model.projector import load_projector
from mllm.model.quantize import quantize
from mllm.training.arguments import TrainArguments
from mllm.training.features import FeatureCache
from mllm.training.freeze import apply_freeze
from mllm.training.lora import add_lora
from mllm.training.stages import Training, freeze_table

PROJECTOR = "mm_projector.bin"
START_IMAGES = 8_192
"""The closed-form start (mllm/training/caption_start.py) takes this many images at most."""


@dataclass(kw_only=True)
class Prepared:
    """The result of `prepare`."""

    model: LlavaForConditionalGeneration | PeftModel
    processor: LlavaProcessor
    vision: VisionEncoder
    dataset: LlavaDataset
    store: ImageStore | None
    freeze: dict[str, Training]
    facts: dict[str, str]
    """For the plan and the model card."""


def prepare(
    arguments: TrainArguments, run_dir: Path, device: torch.device, deepspeed: dict[str, Any] | None
) -> Prepared:
    """Load and assemble encoder, language model, data and the freeze plan; the result is the same on every rank.

    Every rank holds the whole model on the CPU; ZeRO-3 splits it when the engine is made.
    """
    stage = arguments.description
    freeze = freeze_table(
        stage, lora=arguments.lora_enable, bits=arguments.bits,
        unfreeze_mm_vision_tower=arguments.unfreeze_mm_vision_tower, tune_mm_mlp_adapter=arguments.tune_mm_mlp_adapter,
        freeze_mm_mlp_adapter=arguments.freeze_mm_mlp_adapter, freeze_backbone=arguments.freeze_backbone,
    )  # fmt: skip
    format_name(arguments.version)
    data_path, image_folder = data_of(arguments)
    store = ImageStore(image_folder) if image_folder else None
    vision = encoder_of(arguments)
    # fp32 if a weight trains outside of DeepSpeed: an update of 2e-5 is lost in bf16.
    half = arguments.bf16 and device.type == "cuda" and (bool(deepspeed) or freeze["language_model"] != "full")
    dtype = torch.bfloat16 if half else torch.float32
    llm = load_llm(arguments.model_name_or_path, version=arguments.version, dtype=dtype)
    llava, processor = build_model(vision, llm, projector=arguments.mm_projector_type, seed=arguments.seed)
    max_length = min(arguments.model_max_length, llm.context_length or arguments.model_max_length)
    if vision.num_tokens >= max_length:
        raise UserError(
            f"one image takes {vision.num_tokens} tokens ({vision.name}), but --model_max_length is {max_length}: "
            "raise it, or choose an encoder with a smaller image or larger patches"
        )
    encoder = ConversationEncoder(llm.tokenizer, arguments.version, vision.num_tokens, max_length)
    dataset = LlavaDataset(data_path, encoder, store, arguments.on_bad_sample)
    projector = llava.model.multi_modal_projector
    started = _start_projector(projector, arguments, run_dir, len(dataset))
    projector.float() if not deepspeed else projector.to(llm.model.dtype)
    if arguments.bits < 16:
        compute_dtype = torch.bfloat16 if arguments.bf16 else torch.float32
        quantize(
            llava.model.language_model, arguments.bits, compute_dtype, device,
            quant_type=arguments.quant_type or "nf4", double_quant=arguments.double_quant is not False,
        )  # fmt: skip
    if device.type == "cpu" and arguments.bf16 and longest(dataset) <= SHORT:  # if it trains padded
        llava.model.language_model.set_attn_implementation("eager")
    if arguments.gradient_checkpointing:
        llava.model.language_model.activation_checkpointing_enable({"use_reentrant": False})
    model = add_lora(llava, arguments) if freeze["language_model"] == "lora" else llava
    apply_freeze(model, freeze)
    skipped = f", {len(dataset.skipped):,} left out (skipped.jsonl)" if dataset.skipped else ""
    facts = {
        "vision encoder": vision.describe(),
        "language model": llm.source,
        "projector": f"{arguments.mm_projector_type}, {started}",
        "data": f"{data_path}: {len(dataset):,} samples, format {arguments.version}" + skipped,
        "features": "computed once and cached" if arguments.caches_features else "computed in every step",
    }
    return Prepared(
        model=model, processor=processor, vision=vision, dataset=dataset, store=store, freeze=freeze, facts=facts
    )  # fmt: skip


def encoder_of(arguments: TrainArguments) -> VisionEncoder:
    """The vision encoder of resolved flags."""
    return load_vision(
        arguments.vision_tower,
        select_layer=arguments.mm_vision_select_layer,
        select_feature="default" if arguments.mm_vision_select_feature == "patch" else "full",
        image_aspect_ratio=arguments.image_aspect_ratio,
        seed=arguments.seed,
    )


def data_of(arguments: TrainArguments) -> tuple[Path, Path | None]:
    """Data file and image folder: the user's, or the demo's for this stage (built if missing)."""
    if arguments.data_path is not None:
        return Path(arguments.data_path), Path(arguments.image_folder) if arguments.image_folder else None
    if arguments.image_folder is not None:
        raise UserError("--image_folder is given without --data_path")
    demo = ensure_llava_demo(DEMO_DIR)
    return demo / (ALIGN if arguments.stage == 1 else INSTRUCT), demo / IMAGES


def _start_projector(
    projector: LlavaMultiModalProjector, arguments: TrainArguments, run_dir: Path, samples: int
) -> str:
    """Load the projector's start if it is a file; returns the start in words."""
    given, aligned = arguments.pretrain_mm_mlp_adapter, run_dir / "align" / PROJECTOR
    if given is None and arguments.stage == 1:
        fitted = f"fitted in closed form to the captions of {min(samples, START_IMAGES):,} samples"
        return f"{fitted if arguments.mm_projector_init == 'captions' else 'random'}, seed {arguments.seed}"
    if given is None and not aligned.is_file():
        if arguments.dry_run:
            return "from stage 1"
        raise UserError(
            f"stage 2 starts from the projector of stage 1, but there is no {aligned}: run stage 1 first, or give "
            "--pretrain_mm_mlp_adapter"
        )
    start = aligned if given is None else Path(given)
    load_projector(projector, start)
    return f"from {start}"


def projector_of(arguments: TrainArguments, prepared: Prepared) -> dict[str, Any]:
    """The parts that a projector is trained between; it is of no use between other parts."""
    fields = ("model_name_or_path", "mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature")
    found = {name: getattr(arguments, name) for name in fields}
    return found | {"vision tower's weights": prepared.vision.weights_fingerprint}


def check_aligned(run_dir: Path, wanted: dict[str, Any]) -> None:
    """UserError unless stage 1 of this run trained its projector between the same encoder and language model."""
    there = read_json(run_dir / "config.json").get("align", {}).get("projector_of", wanted)
    rundir.refuse(
        rundir.difference({name: there.get(name) for name in wanted}, wanted),
        f"stage 1 in {run_dir} trained its projector between other parts",
        "Run stage 1 again under another --output_dir, or name a projector with --pretrain_mm_mlp_adapter",
    )


def longest(dataset: LlavaDataset) -> int:
    """The estimated length of the longest sample in tokens, at 1.4 tokens per word."""
    length = int(1.4 * max(abs(n) for n in dataset.modality_lengths))
    return min(length, dataset.encoder.max_length or length)


def collator_of(arguments: TrainArguments, prepared: Prepared, device: torch.device) -> Collator:
    """The collator of the stage's batches; fills the feature cache first, each rank with its share."""
    pad_id = prepared.processor.tokenizer.pad_token_id
    if prepared.store is None:  # no sample has a picture
        return Collator(pad_id, lambda names: torch.empty(0))
    if not arguments.caches_features:
        load = pixel_loader(prepared.store, partial(image_pixels, prepared.processor.image_processor))
        return Collator(pad_id, load)
    root = Path(arguments.cache_dir) if arguments.cache_dir else cache_root() / "features"
    cache = FeatureCache(prepared.vision, prepared.store, root)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    names = list(dict.fromkeys(name for record in prepared.dataset.records for name in record.images))
    cache.fill(names, device=device, rank=rank, world_size=world_size)
    if world_size > 1:
        dist.barrier()
        cache.refresh()
    return Collator(pad_id, cache.get, "image_features")
