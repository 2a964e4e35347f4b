"""Everything before a stage's first step: encoder, language model, data, projector, freeze plan."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlavaProcessor

from clips.common import rundir
from clips.common.errors import UserError
from clips.common.files import read_json
from clips.common.paths import cache_root
from mllm.data.conversation import IGNORE, ConversationEncoder
from mllm.data.dataset import Collator, LlavaDataset
from mllm.data.demo import ALIGN, DEMO_DIR, IMAGES, INSTRUCT, ensure_llava_demo
from mllm.data.images import ImageStore, pixel_loader
from mllm.encoders.encoder import VisionEncoder
from mllm.encoders.registry import image_pixels, load_vision
from mllm.model.llava import build_model
from mllm.model.llm import load_llm
from mllm.model.projector import load_projector
from mllm.model.projector_start import start_from_captions
from mllm.model.quantize import quantize
from mllm.training.arguments import TrainArguments
from mllm.training.features import FeatureCache
from mllm.training.stages import Training, apply_plan, freeze_plan

PROJECTOR = "mm_projector.bin"
SHORT = 512
"""Up to this many tokens torch's fused attention is slower on CPUs in bf16 than plain products: a step of SmolLM2-135M
on 32 samples of 40 tokens took 3.1 s of one core with it and 2.1 s without."""
START_IMAGES, START_TOKENS, START_BATCH = 8_192, 16, 64
"""A closed-form start takes this many images, and this many tokens of each; read in batches of START_BATCH."""
DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"


@dataclass(kw_only=True)
class Prepared:
    """Everything a stage needs before its first step."""

    model: nn.Module
    """`LlavaForConditionalGeneration`, or that inside a `PeftModel`."""
    processor: LlavaProcessor
    vision: VisionEncoder
    dataset: LlavaDataset
    store: ImageStore | None
    plan: dict[str, Training]
    facts: dict[str, str]
    """For the plan and the model card."""


# ---------------------------------------------------------------------------------------------- before the first step
def prepare(
    arguments: TrainArguments, run_dir: Path, device: torch.device, deepspeed: dict[str, Any] | None
) -> Prepared:
    """Load and assemble encoder, language model, data and the freeze plan; the same on every rank.

    The model is whole on every rank here, on the CPU; ZeRO-3 takes it apart when the engine is made.
    """
    stage = arguments.description
    plan = freeze_plan(
        stage, lora=bool(arguments.lora_enable), bits=arguments.bits,
        unfreeze_mm_vision_tower=arguments.unfreeze_mm_vision_tower, tune_mm_mlp_adapter=arguments.tune_mm_mlp_adapter,
        freeze_mm_mlp_adapter=arguments.freeze_mm_mlp_adapter, freeze_backbone=arguments.freeze_backbone,
    )  # fmt: skip
    data_path, image_folder = data_of(arguments)
    store = ImageStore(image_folder) if image_folder else None
    vision = encoder_of(arguments)
    # fp32 wherever a weight trains outside of DeepSpeed: an update of 2e-5 is lost in bf16.
    half = arguments.bf16 and device.type == "cuda" and (bool(deepspeed) or plan["language_model"] != "full")
    llm = load_llm(
        arguments.model_name_or_path,
        version=arguments.version,
        dtype=torch.bfloat16 if half else torch.float32,
    )
    model, processor = build_model(vision, llm, projector=arguments.mm_projector_type, seed=arguments.seed)
    max_length = min(arguments.model_max_length, llm.context_length or arguments.model_max_length)
    if vision.num_tokens >= max_length:
        raise UserError(
            f"one image takes {vision.num_tokens} tokens ({vision.name}), but --model_max_length is {max_length}: "
            "raise it, or choose an encoder with a smaller image or larger patches"
        )
    encoder = ConversationEncoder(llm.tokenizer, arguments.version, vision.num_tokens, max_length)
    dataset = LlavaDataset(data_path, encoder, store)
    projector = model.model.multi_modal_projector
    start = _projector_start(arguments, run_dir)
    if start is not None:
        load_projector(projector, start)
        started = f"from {start}"
    elif arguments.stage == 2:  # a dry run
        started = "from stage 1"
    else:
        fitted = f"fitted in closed form to the captions of {min(len(dataset), START_IMAGES):,} samples"
        started = fitted if arguments.mm_projector_init == "captions" else "random"
        started += f", seed {arguments.seed}"
    projector.float() if not deepspeed else projector.to(llm.model.dtype)
    if arguments.bits < 16:
        compute_dtype = torch.bfloat16 if arguments.bf16 else torch.float32
        quantize(model.model.language_model, arguments.bits, compute_dtype, device)
    if device.type == "cpu" and arguments.bf16 and longest(dataset) <= SHORT:
        model.model.language_model.set_attn_implementation("eager")
    if arguments.gradient_checkpointing:
        model.model.language_model.activation_checkpointing_enable({"use_reentrant": False})
    if plan["language_model"] == "lora":
        torch.manual_seed(arguments.seed)
        model = get_peft_model(model, lora_config(model, arguments))
    apply_plan(model, plan)
    facts = {
        "vision encoder": vision.describe(),
        "language model": llm.source,
        "projector": f"{arguments.mm_projector_type}, {started}",
        "data": f"{data_path}: {len(dataset):,} samples, format {arguments.version}",
        "features": "computed once and cached" if arguments.caches_features else "computed in every step",
    }
    return Prepared(
        model=model, processor=processor, vision=vision, dataset=dataset, store=store, plan=plan, facts=facts
    )


def encoder_of(arguments: TrainArguments) -> VisionEncoder:
    """The vision encoder that resolved flags ask for."""
    return load_vision(
        arguments.vision_tower,
        select_layer=arguments.mm_vision_select_layer,
        select_feature="default" if arguments.mm_vision_select_feature == "patch" else "full",
        image_aspect_ratio=arguments.image_aspect_ratio,
        seed=arguments.seed,
    )


def data_of(arguments: TrainArguments) -> tuple[Path, Path | None]:
    """Data file and image folder: the user's, or the demo's for this stage (built where it is missing)."""
    if arguments.data_path is not None:
        return Path(arguments.data_path), Path(arguments.image_folder) if arguments.image_folder else None
    if arguments.image_folder is not None:
        raise UserError("--image_folder is given without --data_path")
    demo = ensure_llava_demo(DEMO_DIR)
    return demo / (ALIGN if arguments.stage == 1 else INSTRUCT), demo / IMAGES


def _projector_start(arguments: TrainArguments, run_dir: Path) -> Path | None:
    """The file that the projector starts from; None for a random start."""
    if arguments.pretrain_mm_mlp_adapter is not None:
        return Path(arguments.pretrain_mm_mlp_adapter)
    if arguments.stage == 1:
        return None
    aligned = run_dir / "align" / PROJECTOR
    if aligned.is_file():
        return aligned
    if arguments.dry_run:
        return None
    raise UserError(
        f"stage 2 starts from the projector of stage 1, but there is no {aligned}: run stage 1 first, or give "
        "--pretrain_mm_mlp_adapter"
    )


def projector_of(arguments: TrainArguments, prepared: Prepared) -> dict[str, Any]:
    """What a projector stands between: it is of no use between others."""
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


def lora_config(model: nn.Module, arguments: TrainArguments) -> LoraConfig:
    """Adapters on every linear layer inside the language model (not on its output layer), as LLaVA."""
    layers = model.model.language_model.named_modules()
    kinds = sorted({name.rpartition(".")[2] for name, module in layers if isinstance(module, nn.Linear)})
    return LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=rf".*language_model\..*\.({'|'.join(kinds)})",
        task_type="CAUSAL_LM",
    )


def deepspeed_config(arguments: TrainArguments, world_size: int) -> dict[str, Any] | None:
    """The engine's settings: the file that was named, or this stage's own where there are several ranks.

    Raises UserError for an unreadable file, and for quantised weights under ZeRO-3, which cannot take them apart.
    """
    name = arguments.deepspeed
    if name == "none" or (name is None and world_size == 1):
        return None
    quantized = arguments.bits < 16
    path = Path(name) if name else DS_CONFIGS / f"llava_zero{2 if quantized else arguments.description.zero}.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--deepspeed {path} is not a readable JSON file: {error}") from None
    if quantized and zero_stage(config) == 3:
        raise UserError(
            f"--bits {arguments.bits} does not go with ZeRO-3: give --deepspeed ds_configs/llava_zero2.json"
        )
    return config


def zero_stage(config: dict[str, Any] | None) -> int:
    return (config or {}).get("zero_optimization", {}).get("stage", 0)


def longest(dataset: LlavaDataset) -> int:
    """Roughly the longest sample in tokens (1.4 per word), for the memory estimate."""
    length = int(1.4 * max(abs(n) for n in dataset.modality_lengths))
    return min(length, dataset.encoder.max_length or length)


def _collator(arguments: TrainArguments, prepared: Prepared, device: torch.device) -> Collator:
    pad_id = prepared.processor.tokenizer.pad_token_id
    if not arguments.caches_features:
        load = pixel_loader(prepared.store, partial(image_pixels, prepared.processor.image_processor))
        return Collator(pad_id, load)
    if prepared.store is None:
        return Collator(pad_id, lambda names: torch.empty(0), "image_features")
    root = Path(arguments.cache_dir) if arguments.cache_dir else cache_root() / "features"
    cache = FeatureCache(prepared.vision, prepared.store, root)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    names = list(dict.fromkeys(name for record in prepared.dataset.records for name in record.images))
    cache.fill(names, device=device, rank=rank, world_size=world_size)
    if world_size > 1:
        dist.barrier()
        cache.refresh()
    return Collator(pad_id, cache.get, "image_features")


def _start_from_captions(
    arguments: TrainArguments, prepared: Prepared, collator: Collator, device: torch.device
) -> float:
    """`start_from_captions` on up to `START_IMAGES` samples that have one picture; the same on every rank."""
    single = [i for i, record in enumerate(prepared.dataset.records) if len(record.images) == 1]
    generator = torch.Generator().manual_seed(arguments.seed)
    chosen = [single[i] for i in torch.randperm(len(single), generator=generator)[:START_IMAGES].tolist()]
    if not chosen:
        raise UserError("--mm_projector_init captions needs samples with one picture, and the data has none")
    captions, parts, encoder = [], [], prepared.vision
    encoder.model.to(device)
    for begin in range(0, len(chosen), START_BATCH):
        samples = [prepared.dataset[i] for i in chosen[begin : begin + START_BATCH]]
        captions += [[label for label in sample["labels"] if label != IGNORE] for sample in samples]
        features = collator.load_images([sample["images"][0] for sample in samples])
        if not arguments.caches_features:  # then these are pixels
            with torch.no_grad():
                features = encoder.features(features.to(device)).cpu()
        kept = torch.randperm(features.shape[1], generator=generator)[:START_TOKENS]
        parts.append(features[:, kept])
    model = prepared.model
    projector = model.model.multi_modal_projector  # on a GPU already, or not yet: with DeepSpeed
    fitted = copy.deepcopy(projector).float().cpu()
    words = model.get_input_embeddings().weight.cpu()
    r2 = start_from_captions(fitted, torch.cat(parts), captions, words, seed=arguments.seed)
    for parameter, value in zip(projector.parameters(), fitted.parameters(), strict=True):
        value = value.data.to(device)  # NCCL takes no other
        if dist.is_initialized():
            dist.broadcast(value, src=0)
        parameter.data.copy_(value)
    return r2
