"""Build what a stage needs before its first step: encoder, language model, data, projector, freezing, LoRA, DeepSpeed.

`build_stage` calls all else of this file but what follows the engine's plan: the features of the images and the
projector's fit to the captions. Only functions for LoRA import PEFT, because its import takes seconds.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import trange
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from clips import Fields, RunConfig, parse_fields
from clips.common.distributed import Start
from clips.common.errors import UserError
from clips.common.paths import DS_CONFIGS, cache_root
from clips.common.runtime import LANGUAGE_MODEL_KEYS, attends_plainly
from clips.engine.engine import read_ds_config
from mllm.data.captions import CaptionStore, open_store
from mllm.data.conversation import IGNORE, ConversationEncoder
from mllm.data.dataset import ImageTokens, LlavaDataset
from mllm.data.demo import ALIGN, DEMO_DIR, IMAGES, INSTRUCT, ensure_any_llava_demo
from mllm.data.formats import format_name
from mllm.data.images import ImageStore, pixel_loader
from mllm.data.video import is_video
from mllm.encoders.encoder import VisionEncoder
from mllm.encoders.load import load_vision
from mllm.encoders.registry import image_pixels
from mllm.model.llava import build_model
from mllm.model.llm import load_llm
from mllm.model.projector import load_projector, trainable_layers
from mllm.model.projector_start import (
    START_IMAGES,
    START_TOKENS,
    sharpen,
    start_bytes,
    start_from_captions,
    start_in_words,
)
from mllm.model.quantize import dequantize, quantize
from mllm.model.tiles import Llava, LlavaProcessors, TokenLayout, llava_of, newline_of, placeholder_ids
from mllm.training.config import StageConfig
from mllm.training.features import FeatureCache, feature_bytes
from mllm.training.recipes import PARTS, TrainMode, freeze_table
from mllm.training.trainer import Collator, TrainingModel

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig, PeftModel

PROJECTOR = "mm_projector.bin"
IMAGE_NEWLINE = "image_newline"
"""The embedding at the ends of rows in a model with tiles. It trains with the projector."""
START_BATCH = 64
"""Number of images that the fit of the projector reads at a time."""


@dataclass(kw_only=True)
class BuiltStage:
    """The result of `build_stage`: a stage and its parts."""

    config: StageConfig
    device: torch.device
    deepspeed: dict[str, Any]
    """The engine's settings."""
    model: Llava | PeftModel
    processor: LlavaProcessors
    vision: VisionEncoder
    dataset: LlavaDataset
    store: ImageStore | None
    freeze: dict[str, TrainMode]
    facts: dict[str, str]
    """For the plan and the model card."""
    data: dict[str, Any]
    """For data.json, by which a stage goes on with the same data only."""

    @property
    def run_dir(self) -> Path:
        """Directory of the run, shared by both stages."""
        return Path(self.config.output_dir)

    @property
    def stage_dir(self) -> Path:
        """Directory of this stage in the run."""
        return self.run_dir / self.config.stage_info.name

    @property
    def zero(self) -> int:
        """ZeRO stage of the DeepSpeed config; 0 for none."""
        return zero_stage(self.deepspeed)


def build_stage(config: StageConfig, device: torch.device, deepspeed: dict[str, Any]) -> BuiltStage:
    """Load and assemble encoder, language model, data and the freeze plan; the result is the same on every rank.

    The model is on the CPU, except for the layers that are quantised on `device`. With `deepspeed` of ZeRO-3 and bf16
    weights, the language model keeps the precision of its files: its weights stay mapped to the files, and take no
    memory before the engine cuts them into parts.
    """
    freeze = freeze_table(
        config.stage_info, lora=config.lora_enable, bits=config.bits,
        unfreeze_mm_vision_tower=config.unfreeze_mm_vision_tower, tune_mm_mlp_adapter=config.tune_mm_mlp_adapter,
        freeze_mm_mlp_adapter=config.freeze_mm_mlp_adapter, freeze_backbone=config.freeze_backbone,
        freeze_word_embeddings=bool(config.freeze_word_embeddings),
    )  # fmt: skip
    format_name(config.version)  # refuses an unknown one before anything is read
    data_path, _ = data_of(config)
    vision = encoder_of(config)
    store = open_data(config, vision)
    # fp32 if a weight trains without ZeRO's fp32 masters: an update of 2e-5 is lost in bf16.
    zero = zero_stage(deepspeed)
    half = config.bf16 and device.type == "cuda" and (zero > 0 or freeze["language_model"] != "full")
    dtype = torch.bfloat16 if half else torch.float32
    llm = load_llm(
        config.model_name_or_path, version=config.version, dtype="auto" if config.bf16 and zero == 3 else dtype,
        layers=config.llm_layers, llm_adapter=config.llm_adapter, videos=bool(vision.frames),
    )  # fmt: skip
    llava, processor = build_model(vision, llm, projector=config.mm_projector_type, seed=config.seed)
    layout = TokenLayout.of(llava.config)
    max_length = min(config.model_max_length, llm.context_length or config.model_max_length)
    encoder = ConversationEncoder(llm.tokenizer, config.version, layout.of_every, max_length)
    tokens = ImageTokens(layout.most, layout.tokens if layout.pinpoints else None, layout.frames)
    dataset = LlavaDataset(data_path, encoder, store, config.on_bad_sample, tokens)
    started = load_start(llava, config, len(dataset))
    model = trainable(llava, config, freeze, device, dtype=dtype if zero else torch.float32)
    longest = min(max_length, int(1.4 * max(abs(n) for n in dataset.modality_lengths)))  # tokens, 1.4 for a word
    if config.bf16 and attends_plainly(device, torch.bfloat16, longest, LANGUAGE_MODEL_KEYS):  # if it trains padded
        llava.model.language_model.set_attn_implementation("eager")

    skipped = f", {len(dataset.skipped):,} skipped (skipped.jsonl)" if dataset.skipped else ""
    if isinstance(store, CaptionStore):
        skipped += f", {len(store.test):,} held out" if store.test else ", none held out (few images, or by a flag)"
    facts = {
        "vision encoder": vision.describe(),
        "language model": llm.source,
        "projector": f"{config.mm_projector_type}, {started}",
        "data": f"{data_path}: {len(dataset):,} samples, format {config.version}{skipped}",
        "features": "computed in every step",
    }
    if config.caches_features:
        size = feature_bytes(vision, len(dataset.images)) / 1e9
        facts["features"] = f"computed once and cached, up to {size:.2g} GB (--feature_cache_gb)"
    data = dataset.facts() | (store.facts if isinstance(store, CaptionStore) else {})
    return BuiltStage(
        config=config, device=device, deepspeed=with_hidden_size(deepspeed, llava.config.get_text_config().hidden_size),
        model=model, processor=processor, vision=vision, dataset=dataset, store=store, freeze=freeze, facts=facts,
        data=data,
    )  # fmt: skip


def trainable(
    llava: Llava, config: StageConfig, freeze: dict[str, TrainMode], device: torch.device, *, dtype: torch.dtype
) -> Llava | PeftModel:
    """Make `llava` ready to train, in place, and return it, wrapped in a PeftModel if the language model gets adapters.

    Casts projector and newline to `dtype`, quantises the language model, switches on activation checkpointing, adds
    LoRA, and sets `requires_grad` by `freeze`, as `config` says.
    """
    language_model = llava.model.language_model
    llava.model.multi_modal_projector.to(dtype)
    newline = newline_of(llava)
    if newline is not None:
        newline.data = newline.data.to(dtype)
    if config.bits < 16:
        quantize(language_model, config.bits, torch.bfloat16 if config.bf16 else torch.float32, device)
    if config.gradient_checkpointing:
        # Earlier versions of transformers have the old name alone, which later ones deprecate.
        enable = getattr(language_model, "activation_checkpointing_enable", None)
        (enable or language_model.gradient_checkpointing_enable)({"use_reentrant": False})
    model = add_lora(llava, config) if freeze["language_model"] == "lora" else llava
    apply_freeze(model, freeze)
    return model


# ------------------------------------------------------------------------------------------- encoder, data, projector
def encoder_of(config: StageConfig) -> VisionEncoder:
    """Load the vision encoder that the flags name."""
    return load_vision(
        config.vision_tower,
        select_layer=config.mm_vision_select_layer,
        select_feature="default" if config.mm_vision_select_feature == "patch" else "full",
        image_aspect_ratio=config.image_aspect_ratio,
        image_grid_pinpoints=config.image_grid_pinpoints,
        frames=config.frames_upbound,
        seed=config.seed,
    )


def data_of(config: StageConfig) -> tuple[Path | str, Path | str | None]:
    """Return data and image folder as the user wrote them (a Path changes a URL), or the demo's, built if missing.

    Raises UserError if only the image folder is given.
    """
    if config.data_path is not None:
        return config.data_path, config.image_folder or None
    if config.image_folder is not None:
        raise UserError("--image_folder is given without --data_path")
    demo = ensure_any_llava_demo(DEMO_DIR)
    return demo / (ALIGN if config.stage == 1 else INSTRUCT), demo / IMAGES


def open_data(config: StageConfig, vision: VisionEncoder | None = None) -> ImageStore | None:
    """Open the images or captions of a stage; return None for data without images.

    Fields of captions that no flag sets are those of the run of `vision`, or guessed.
    """

    def opened(fields: Fields) -> ImageStore | None:
        fields, share = parse_fields(list(config.fields or ()), fields), config.held_out or 0.0
        return open_store(*data_of(config), fields=fields, held_out=share, test=config.test_data, key=config.key)

    source = vision.source.removeprefix("the architecture of ") if vision else ""  # random and blind
    for path in (folder / "config.json" for folder in Path(source).parents if (folder / "export").is_dir()):
        with suppress(UserError):  # the fields of other data than the encoder's are guessed
            return opened(RunConfig.load(path).data.fields)
    return opened(Fields())


def load_start(llava: Llava, config: StageConfig, samples: int) -> str:
    """Load the projector that the stage starts from, if it comes from a file, and describe the start in words.

    Stage 2 starts from the projector of stage 1 unless --pretrain_mm_mlp_adapter names another. `samples` is the size
    of the training set, for the memory that a fit to captions takes. Raises UserError if stage 1 has not finished, or
    if the file does not fit.
    """
    adapter = config.pretrain_mm_mlp_adapter
    align = Path(config.output_dir) / "align"
    if adapter is None and config.stage == 1:
        assert config.mm_projector_init is not None  # stage 1 has a default
        words = start_in_words(config.mm_projector_init, samples)
        if config.mm_projector_init != "random":
            memory = start_bytes(llava.config.get_text_config().hidden_size, samples) / 1e9
            words += f", which takes {memory:.2g} GB of one machine's memory"
        return f"{words}, seed {config.seed}"
    if adapter is None and not ((align / PROJECTOR).is_file() and (align / "done.json").is_file()):
        if config.dry_run:
            return "from stage 1"
        missing = "done.json: stage 1 has not finished" if (align / PROJECTOR).is_file() else f"{PROJECTOR}"
        raise UserError(
            f"stage 2 starts from the projector of stage 1, but there is no {align / missing}: run stage 1 first, or "
            "give --pretrain_mm_mlp_adapter"
        )
    start = align / PROJECTOR if adapter is None else Path(adapter)
    load_projector(llava.model.multi_modal_projector, start, newline_of(llava))
    return f"from {start}"


def collator_of(built: BuiltStage, start: Start) -> Collator:
    """Fill the feature cache, each rank with its share, and return the collator of the stage's batches.

    Rank 0 hashes the images for all, and removes old features if there is too little room.
    """
    config, device = built.config, built.device
    pad_id = built.processor.tokenizer.pad_token_id
    image_ids = placeholder_ids(llava_of(built.model).config)
    if built.store is None:
        return Collator(pad_id, image_ids, None)
    if not config.caches_features:
        preprocess = partial(image_pixels, built.processor.image_processor)
        return Collator(pad_id, image_ids, pixel_loader(built.store, preprocess, built.vision.frames))
    root = Path(config.cache_dir) if config.cache_dir else cache_root() / "features"
    cache = FeatureCache(built.vision, built.store, root, gb=config.feature_cache_gb)
    names = built.dataset.images
    if start.rank == 0:
        cache.make_room(names)
    if start.ranks > 1:
        cache.trust(names, start.of_rank_0(cache.keys(names) if start.rank == 0 else None))
    cache.fill(names, device=device, rank=start.rank, world_size=start.ranks)
    if start.ranks > 1:
        start.all_have(True)
        cache.fill(names, device=device)  # what this rank still lacks, as its cache may be a folder of its own
    return Collator(pad_id, image_ids, cache.get, "image_features")


def fit_to_captions(built: BuiltStage, collator: Collator, start: Start) -> float:
    """Fit the projector to at most `START_IMAGES` samples with one image, and return R².

    Rank 0 fits it and broadcasts it, so that one process alone needs the memory. The steps on whole captions follow
    only for `--mm_projector_init captions`. Collective. Raises UserError if no sample has exactly one image.
    """
    projector = llava_of(built.model).model.multi_modal_projector  # not on the GPU yet
    # The other ranks wait here, because a collective has a time limit.
    r2 = start.of_rank_0(_fit(projector, built, collator) if start.rank == 0 else None)
    for parameter in projector.parameters():
        value = parameter.data.to(built.device)  # NCCL broadcasts only from the GPU
        dist.broadcast(value, src=0)
        parameter.data.copy_(value)
    return r2


def _fit(projector: LlavaMultiModalProjector, built: BuiltStage, collator: Collator) -> float:
    """Fit `projector` in place, through a copy in fp32 on the CPU, and return R²."""
    config, device, encoder = built.config, built.device, built.vision
    single = [i for i, r in enumerate(built.dataset.records) if len(r.images) == 1 and not is_video(r.images[0])]
    generator = torch.Generator().manual_seed(config.seed)
    chosen = [single[i] for i in torch.randperm(len(single), generator=generator)[:START_IMAGES].tolist()]
    if not chosen:
        init = config.mm_projector_init
        raise UserError(f"--mm_projector_init {init} needs samples with one image, and the data has none")
    assert collator.load_images is not None  # there are images
    captions, parts = [], []
    tower: Any = encoder.model  # PreTrainedModel.to is annotated without its `self`
    tower.to(device)
    for begin in trange(0, len(chosen), START_BATCH, desc="projector's start", unit="batch", disable=None):
        samples = [built.dataset[i] for i in chosen[begin : begin + START_BATCH]]
        captions += [[label for label in sample["labels"] if label != IGNORE] for sample in samples]
        crops = [collator.load_images(sample["images"]) for sample in samples]
        features = torch.stack([image[0] for image in crops])  # with tiles, of the whole image
        if not config.caches_features:  # then `features` are pixels
            with torch.no_grad():
                features = encoder.features(features.to(device)).cpu()
        parts.append(features[:, torch.randperm(features.shape[1], generator=generator)[:START_TOKENS]])
    fitted = copy.deepcopy(projector).float().cpu()
    words = llava_of(built.model).get_input_embeddings().get_parameter("weight").cpu()
    sample = torch.cat(parts)
    r2 = start_from_captions(fitted, sample, captions, words, seed=config.seed)
    if config.mm_projector_init == "captions":
        sharpen(fitted, sample, captions, words, seed=config.seed)
    for parameter, value in zip(projector.parameters(), fitted.parameters(), strict=True):
        parameter.data.copy_(value)
    return r2


# ------------------------------------------------------------------------------------------- freezing


def parts_of(model: nn.Module) -> dict[str, str]:
    """Return the part to which each parameter of a LLaVA model, wrapped or not, belongs, by the parameter's name."""
    llava = llava_of(model)
    words = {id(p) for layer in (llava.get_input_embeddings(), llava.lm_head) for p in layer.parameters()}

    def part(name: str, parameter: nn.Parameter) -> str:
        if "vision_tower." in name:
            return "vision_tower"
        if "multi_modal_projector." in name or name.endswith(IMAGE_NEWLINE):
            return "projector"
        return "word_embeddings" if id(parameter) in words else "language_model"

    return {name: part(name, parameter) for name, parameter in model.named_parameters()}


def wanted(model: nn.Module, freeze: dict[str, TrainMode]) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Yield (name, parameter, whether `freeze` lets it train) for every parameter of a LLaVA model and its adapters."""
    projector = llava_of(model).model.multi_modal_projector
    # The second layer of a `linear` projector is a fixed identity.
    projector_trains = {id(p) for layer in trainable_layers(projector).values() for p in layer.parameters()}
    parts = parts_of(model)
    for name, parameter in model.named_parameters():
        part = parts[name]
        trains = freeze[part] == "full" or (freeze[part] == "lora" and ".lora_" in name)
        fixed = part == "projector" and id(parameter) not in projector_trains and not name.endswith(IMAGE_NEWLINE)
        yield name, parameter, trains and not fixed


def apply_freeze(model: nn.Module, freeze: dict[str, TrainMode]) -> None:
    """Set `requires_grad` of every parameter by `freeze`."""
    for _, parameter, trains in wanted(model, freeze):
        parameter.requires_grad_(trains)


def assert_freeze(model: nn.Module, freeze: dict[str, TrainMode]) -> None:
    """Raise RuntimeError with the parameters that contradict `freeze`, or the parts that should train and do not."""
    wrong = [name for name, parameter, trains in wanted(model, freeze) if parameter.requires_grad != trains]
    counts = count_parameters(model)
    missing = [part for part in PARTS if freeze[part] != "frozen" and not counts[part][1]]
    if wrong or missing:
        raise RuntimeError(f"the freeze table is not kept: {', '.join(wrong[:5] or missing)}")


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Count all and trained parameters of each part. Shared tensors count once, 4-bit weights at original size."""
    counts = {part: [0, 0] for part in PARTS}
    parts = parts_of(model)
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        size = state.shape.numel() if state is not None else getattr(parameter, "ds_numel", parameter.numel())
        counts[parts[name]][0] += size
        counts[parts[name]][1] += size * parameter.requires_grad
    return {part: (total, trained) for part, (total, trained) in counts.items()}


def parameter_groups(model: nn.Module, rates: dict[str, float], weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's groups, one per part and kind; biases, norms and other vectors have no weight decay."""
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    parts = parts_of(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((parts[name], parameter.ndim >= 2), []).append(parameter)
    return [
        {"name": part, "params": members, "lr": rates[part], "weight_decay": weight_decay if decays else 0.0}
        for (part, decays), members in groups.items()
    ]


def make_optimizer(model: TrainingModel, rates: dict[str, float], weight_decay: float) -> torch.optim.Optimizer:
    """Return AdamW on the trained weights, a group for each part and kind. `rates` are the parts' peaks."""
    groups = parameter_groups(model, rates, weight_decay)
    # torch's own defaults, spelled out: another version's defaults would change a run. Fused reads and writes the
    # weights once, not ten times.
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=True)


# ------------------------------------------------------------------------------------------- LoRA
def add_lora(model: Llava, config: StageConfig) -> PeftModel:
    """Return `model` with new adapters, which are the same on every rank."""
    torch.manual_seed(config.seed)
    return _with_adapters(model, lora_config(model, config))


def lora_config(model: Llava, config: StageConfig) -> LoraConfig:
    """Return the configuration of adapters for every linear layer of the language model except its output layer.

    These are the layers that LLaVA adapts.
    """
    layers = model.model.language_model.named_modules()
    kinds = sorted({name.rpartition(".")[2] for name, module in layers if isinstance(module, nn.Linear)})
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=rf".*language_model\..*\.({'|'.join(kinds)})",
        task_type="CAUSAL_LM",
    )


def _with_adapters(model: nn.Module, config: PeftConfig) -> PeftModel:
    from peft import get_peft_model

    with warnings.catch_warnings():  # PEFT reads an attribute that transformers has deprecated
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, config)


def merge_lora(model: Llava | PeftModel) -> Llava:
    """Return the plain model with the adapters added to its weights; a model without adapters stays unchanged."""
    return model if isinstance(model, Llava) else model.merge_and_unload(safe_merge=True)


def merge_quantized_lora(model: Llava | PeftModel, dtype: torch.dtype) -> Llava:
    """Return the plain model with the adapters added to the dequantised weights; `model` is used up.

    The adapters were trained on the quantised weights, so with the original weights they would be another model.
    """
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

    assert isinstance(model, PeftModel)
    config, adapters = model.peft_config["default"], get_peft_model_state_dict(model)
    plain = _with_adapters(dequantize(model.unload(), dtype), config)
    set_peft_model_state_dict(plain, adapters)
    return merge_lora(plain)


# ------------------------------------------------------------------------------------------- DeepSpeed
def deepspeed_config(config: StageConfig, ranks: int) -> dict[str, Any]:
    """Return DeepSpeed's settings: those of --deepspeed, by default the stage's own for several ranks, or none for one.

    Raises UserError for a file that cannot be used, and for quantised weights under ZeRO-3, which cannot split them.
    """
    path, quantized = config.deepspeed, config.bits < 16
    if path is None and ranks > 1:
        path = str(DS_CONFIGS / f"llava_zero{2 if quantized else config.stage_info.zero}.json")
    settings = read_ds_config(None if path == "none" else path, "--deepspeed")
    if quantized and zero_stage(settings) == 3:
        raise UserError(f"--bits {config.bits} does not work with ZeRO-3: give --deepspeed ds_configs/llava_zero2.json")
    return settings


def with_hidden_size(config: dict[str, Any], hidden_size: int) -> dict[str, Any]:
    """Return `config` with values for the "auto" sizes that depend on the language model's width."""
    zero = config.get("zero_optimization", {})
    sizes = {
        "reduce_bucket_size": hidden_size**2,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    filled = {name: sizes[name] if value == "auto" and name in sizes else value for name, value in zero.items()}
    return config | {"zero_optimization": filled}


def zero_stage(config: Mapping[str, Any]) -> int:
    """Return the ZeRO stage of a DeepSpeed config; 0 without one."""
    return config.get("zero_optimization", {}).get("stage", 0)
