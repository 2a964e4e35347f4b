"""The parts that a stage needs before its first step: encoder, language model, data, projector, freeze plan."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from tqdm import trange
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from clips import Fields, RunConfig, parse_fields
from clips.common import rundir
from clips.common.distributed import Start
from clips.common.errors import UserError
from clips.common.files import read_json, write_atomically, write_json
from clips.common.paths import cache_root
from clips.common.runtime import LANGUAGE_MODEL_KEYS, attends_plainly
from mllm.data.captions import TEST, CaptionStore, open_store, write_test
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
from mllm.model.packing import can_pack
from mllm.model.projector import load_projector
from mllm.model.projector_start import (
    START_IMAGES,
    START_TOKENS,
    sharpen,
    start_bytes,
    start_from_captions,
    start_in_words,
)
from mllm.model.quantize import quantize
from mllm.model.tiles import Llava, LlavaProcessors, TokenLayout, newline_of, placeholder_ids
from mllm.training.arguments import AROUND_PROJECTOR, TrainArguments
from mllm.training.features import FeatureCache, feature_bytes
from mllm.training.freeze import apply_freeze, llava_of
from mllm.training.stages import TrainMode, freeze_table
from mllm.training.task import Collator, steps_of
from mllm.training.zero import with_hidden_size, zero_stage

if TYPE_CHECKING:  # its import takes seconds, and only LoRA needs it
    from peft import PeftModel

PROJECTOR = "mm_projector.bin"
START_BATCH = 64
"""Number of images that the fit of the projector reads at a time."""


@dataclass(kw_only=True)
class PreparedStage:
    """The result of `prepare_stage`: a stage and its parts."""

    arguments: TrainArguments
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
        return Path(self.arguments.output_dir)

    @property
    def stage_dir(self) -> Path:
        """Directory of this stage in the run."""
        return self.run_dir / self.arguments.stage_info.name

    @property
    def zero(self) -> int:
        """ZeRO stage of the DeepSpeed config; 0 for none."""
        return zero_stage(self.deepspeed)


def prepare_stage(arguments: TrainArguments, device: torch.device, deepspeed: dict[str, Any]) -> PreparedStage:
    """Load and assemble encoder, language model, data and the freeze plan; the result is the same on every rank.

    Every rank holds the whole model on the CPU, except for the layers that are quantised on `device`; ZeRO-3 splits it
    when the engine is made.
    """
    freeze = freeze_table(
        arguments.stage_info, lora=arguments.lora_enable, bits=arguments.bits,
        unfreeze_mm_vision_tower=arguments.unfreeze_mm_vision_tower, tune_mm_mlp_adapter=arguments.tune_mm_mlp_adapter,
        freeze_mm_mlp_adapter=arguments.freeze_mm_mlp_adapter, freeze_backbone=arguments.freeze_backbone,
        freeze_word_embeddings=bool(arguments.freeze_word_embeddings),
    )  # fmt: skip
    format_name(arguments.version)  # refuses an unknown one before anything is read
    data_path, _ = data_of(arguments)
    vision = encoder_of(arguments)
    store = open_data(arguments, vision)
    # fp32 if a weight trains without ZeRO's fp32 masters: an update of 2e-5 is lost in bf16.
    zero = zero_stage(deepspeed)
    half = arguments.bf16 and device.type == "cuda" and (zero > 0 or freeze["language_model"] != "full")
    llm = load_llm(
        arguments.model_name_or_path, version=arguments.version, dtype=torch.bfloat16 if half else torch.float32,
        layers=arguments.llm_layers, llm_adapter=arguments.llm_adapter, videos=bool(vision.frames),
    )  # fmt: skip
    llava, processor = build_model(vision, llm, projector=arguments.mm_projector_type, seed=arguments.seed)
    layout = TokenLayout.of(llava.config)
    max_length = min(arguments.model_max_length, llm.context_length or arguments.model_max_length)
    encoder = ConversationEncoder(llm.tokenizer, arguments.version, layout.of_every, max_length)
    tokens = ImageTokens(layout.most, layout.tokens if layout.pinpoints else None, layout.frames)
    dataset = LlavaDataset(data_path, encoder, store, arguments.on_bad_sample, tokens)
    started = load_start(llava, arguments, len(dataset))
    model = trainable(llava, arguments, freeze, device, dtype=llm.model.dtype if zero else torch.float32)
    longest = min(max_length, int(1.4 * max(abs(n) for n in dataset.modality_lengths)))  # tokens, 1.4 for a word
    if arguments.bf16 and attends_plainly(device, torch.bfloat16, longest, LANGUAGE_MODEL_KEYS):  # if it trains padded
        llava.model.language_model.set_attn_implementation("eager")

    skipped = f", {len(dataset.skipped):,} skipped (skipped.jsonl)" if dataset.skipped else ""
    if isinstance(store, CaptionStore):
        skipped += f", {len(store.test):,} held out" if store.test else ", none held out (few images, or by a flag)"
    facts = {
        "vision encoder": vision.describe(),
        "language model": llm.source,
        "projector": f"{arguments.mm_projector_type}, {started}",
        "data": f"{data_path}: {len(dataset):,} samples, format {arguments.version}{skipped}",
        "features": "computed in every step",
    }
    if arguments.caches_features:
        size = feature_bytes(vision, len(dataset.images)) / 1e9
        facts["features"] = f"computed once and cached, up to {size:.2g} GB (--feature_cache_gb)"
    width = llava.config.get_text_config().hidden_size
    data = dataset.facts() | (store.facts if isinstance(store, CaptionStore) else {})
    return PreparedStage(
        arguments=arguments, device=device, deepspeed=with_hidden_size(deepspeed, width),
        model=model, processor=processor, vision=vision, dataset=dataset, store=store, freeze=freeze, facts=facts,
        data=data,
    )  # fmt: skip


def trainable(
    llava: Llava, arguments: TrainArguments, freeze: dict[str, TrainMode], device: torch.device, *, dtype: torch.dtype
) -> Llava | PeftModel:
    """Make `llava` ready to train, in place, and return it, wrapped in a PeftModel if the language model gets adapters.

    Casts projector and newline to `dtype`, quantises the language model, switches on activation checkpointing, adds
    LoRA, and sets `requires_grad` by `freeze`, as `arguments` say.
    """
    language_model = llava.model.language_model
    llava.model.multi_modal_projector.to(dtype)
    newline = newline_of(llava)
    if newline is not None:
        newline.data = newline.data.to(dtype)
    if arguments.bits < 16:
        quantize(language_model, arguments.bits, torch.bfloat16 if arguments.bf16 else torch.float32, device)
    if arguments.gradient_checkpointing:
        # Earlier versions of transformers have the old name alone, which later ones deprecate.
        enable = getattr(language_model, "activation_checkpointing_enable", None)
        (enable or language_model.gradient_checkpointing_enable)({"use_reentrant": False})
    model: Llava | PeftModel = llava
    if freeze["language_model"] == "lora":
        from mllm.training.lora import add_lora  # imports PEFT

        model = add_lora(llava, arguments)
    apply_freeze(model, freeze)
    return model


def encoder_of(arguments: TrainArguments) -> VisionEncoder:
    """Load the vision encoder that resolved flags name."""
    return load_vision(
        arguments.vision_tower,
        select_layer=arguments.mm_vision_select_layer,
        select_feature="default" if arguments.mm_vision_select_feature == "patch" else "full",
        image_aspect_ratio=arguments.image_aspect_ratio,
        image_grid_pinpoints=arguments.image_grid_pinpoints,
        frames=arguments.frames_upbound,
        seed=arguments.seed,
    )


def data_of(arguments: TrainArguments) -> tuple[Path | str, Path | str | None]:
    """Return data and image folder as the user wrote them (a Path changes a URL), or the demo's, built if missing.

    Raises UserError if only the image folder is given.
    """
    if arguments.data_path is not None:
        return arguments.data_path, arguments.image_folder or None
    if arguments.image_folder is not None:
        raise UserError("--image_folder is given without --data_path")
    demo = ensure_any_llava_demo(DEMO_DIR)
    return demo / (ALIGN if arguments.stage == 1 else INSTRUCT), demo / IMAGES


def open_data(arguments: TrainArguments, vision: VisionEncoder | None = None) -> ImageStore | None:
    """Open the images or captions of a stage; return None for data without images.

    Fields of captions that no flag sets are those of the run of `vision`, or guessed.
    """

    def opened(fields: Fields) -> ImageStore | None:
        fields, share = parse_fields(list(arguments.fields or ()), fields), arguments.held_out or 0.0
        test, key = arguments.test_data, arguments.key
        return open_store(*data_of(arguments), fields=fields, held_out=share, test=test, key=key)

    source = vision.source.removeprefix("the architecture of ") if vision else ""  # random and blind
    for config in (folder / "config.json" for folder in Path(source).parents if (folder / "export").is_dir()):
        with suppress(UserError):  # the fields of other data than the encoder's are guessed
            return opened(RunConfig.load(config).data.fields)
    return opened(Fields())


def load_start(llava: Llava, arguments: TrainArguments, samples: int) -> str:
    """Load the projector that the stage starts from, if it comes from a file, and describe the start in words.

    Stage 2 starts from the projector of stage 1 unless --pretrain_mm_mlp_adapter names another. `samples` is the size
    of the training set, for the memory that a fit to captions takes. Raises UserError if there is no projector from
    stage 1, or if the file does not fit.
    """
    adapter = arguments.pretrain_mm_mlp_adapter
    aligned = Path(arguments.output_dir) / "align" / PROJECTOR
    if adapter is None and arguments.stage == 1:
        assert arguments.mm_projector_init is not None  # stage 1 has a default
        words = start_in_words(arguments.mm_projector_init, samples)
        if arguments.mm_projector_init != "random":
            memory = start_bytes(llava.config.get_text_config().hidden_size, samples) / 1e9
            words += f", which takes {memory:.2g} GB of one machine's memory"
        return f"{words}, seed {arguments.seed}"
    if adapter is None and not aligned.is_file():
        if arguments.dry_run:
            return "from stage 1"
        raise UserError(
            f"stage 2 starts from the projector of stage 1, but there is no {aligned}: run stage 1 first, or give "
            "--pretrain_mm_mlp_adapter"
        )
    start = aligned if adapter is None else Path(adapter)
    load_projector(llava.model.multi_modal_projector, start, newline_of(llava))
    return f"from {start}"


def record_config(prepared: PreparedStage, *, write: bool) -> None:
    """Check config.json, and if `write` is set, write it with the list of skipped samples.

    Raises UserError if config.json records another run, if stage 1 trained its projector between another encoder and
    language model, or if another process trains the run.
    """
    arguments = prepared.arguments
    run_dir = prepared.run_dir
    stage = arguments.stage_info
    path = run_dir / "config.json"
    derived = {
        "vision_fingerprint": prepared.vision.fingerprint,
        "packed": can_pack(llava_of(prepared.model).config.get_text_config()),
    }
    parts = {name: getattr(arguments, name) for name in AROUND_PROJECTOR}
    parts["vision tower's weights"] = prepared.vision.weights_fingerprint
    record = {
        "trains": arguments.what_trains() | derived,  # a resumed run must have the same values; the rest is for people
        "facts": prepared.facts,
        "freeze": prepared.freeze,
        "projector_of": parts,
    }
    config = read_json(path)
    if stage.number == 2 and arguments.pretrain_mm_mlp_adapter is None:
        aligned = config.get("align", {}).get("projector_of", parts)
        rundir.refuse(
            rundir.changed({name: aligned.get(name) for name in parts}, parts),
            f"stage 1 in {run_dir} trained its projector with other settings",
            "Run stage 1 again under another --output_dir, or name a projector with --pretrain_mm_mlp_adapter",
        )
        before = config.get("align", {}).get("trains", {})
        share, now = before.get("held_out") or 0.0, arguments.held_out or 0.0
        if before.get("data_path") == arguments.data_path and share < now:
            raise UserError(
                f"stage 1 in {run_dir} held out {share:g} of {arguments.data_path}, so it has seen images that stage 2 "
                f"would hold out: give --held_out {share:g}, or another --output_dir"
            )
    if stage.name in config:
        rundir.refuse(
            rundir.changed(config[stage.name]["trains"], record["trains"]),
            f"{run_dir} holds a run whose stage {stage.name} has other settings",
            "Give the new run another --output_dir, or remove that directory",
        )
    check_same_data(prepared)
    if not write:
        return
    prepared.stage_dir.mkdir(parents=True, exist_ok=True)
    rundir.hold(run_dir)
    write_json(prepared.stage_dir / rundir.DATA, prepared.data)
    store = prepared.store
    if stage.number == 2 and isinstance(store, CaptionStore) and store.test and not (run_dir / TEST).is_file():
        write_test(run_dir, store.test)
    write_json(path, config | {stage.name: record})
    if prepared.dataset.skipped:
        lines = "".join(json.dumps(problem) + "\n" for problem in prepared.dataset.skipped)
        write_atomically(prepared.stage_dir / "skipped.jsonl", lines)


def check_same_data(prepared: PreparedStage) -> None:
    """Raise UserError if the stage has trained on other data, or stage 1 on images that stage 2 would hold out.

    Older runs have no record and go on. A stage that has no checkpoint yet takes other data.
    """
    stage_dir, run_dir, now = prepared.stage_dir, prepared.run_dir, prepared.data
    before = read_json(stage_dir / rundir.DATA)
    trained = max((int(path.name[5:]) for path in rundir.checkpoints(stage_dir)), default=0)
    changed = ""
    if before not in ({}, now) and (trained or (stage_dir / "done.json").is_file()):
        was, number = before["samples"], now["samples"]
        changed = f"{was:,} samples, now {number:,}" if was != number else f"as many, {was:,} samples"
    elif trained > steps_of(prepared.arguments, now["samples"]):
        changed = f"step {trained:,} is beyond the end with the {now['samples']:,} samples of now"
    if changed:
        raise UserError(
            f"{stage_dir} has trained on other data ({changed}): give another --output_dir to begin anew, or put the "
            "data back as it was to go on"
        )
    if prepared.arguments.stage == 2 and prepared.arguments.pretrain_mm_mlp_adapter is None:
        held_out = now.get("held_out", [])
        leaked = set(held_out) & set(read_json(run_dir / "align" / rundir.DATA).get("trained_on", []))
        if leaked:
            raise UserError(
                f"stage 1 in {run_dir} has trained on {len(leaked):,} of the {len(held_out):,} images that stage 2 "
                "would hold out, because its data had other images: give --instruct.held_out 0, "
                "or another --output_dir to train both stages on the data of now"
            )


def collator_of(prepared: PreparedStage, start: Start) -> Collator:
    """Fill the feature cache, each rank with its share, and return the collator of the stage's batches.

    Rank 0 hashes the images for all, and removes old features if there is too little room.
    """
    arguments = prepared.arguments
    device = prepared.device
    pad_id = prepared.processor.tokenizer.pad_token_id
    image_ids = placeholder_ids(llava_of(prepared.model).config)
    if prepared.store is None:
        return Collator(pad_id, image_ids, None)
    if not arguments.caches_features:
        preprocess = partial(image_pixels, prepared.processor.image_processor)
        return Collator(pad_id, image_ids, pixel_loader(prepared.store, preprocess, prepared.vision.frames))
    root = Path(arguments.cache_dir) if arguments.cache_dir else cache_root() / "features"
    cache = FeatureCache(prepared.vision, prepared.store, root, gb=arguments.feature_cache_gb)
    names = prepared.dataset.images
    if start.rank == 0:
        cache.make_room(names)
    if start.ranks > 1:
        cache.trust(names, start.of_rank_0(cache.keys(names) if start.rank == 0 else None))
    cache.fill(names, device=device, rank=start.rank, world_size=start.ranks)
    if start.ranks > 1:
        start.all_have(True)
        cache.fill(names, device=device)  # what this rank still lacks, as its cache may be a folder of its own
    return Collator(pad_id, image_ids, cache.get, "image_features")


def fit_to_captions(prepared: PreparedStage, collator: Collator, start: Start) -> float:
    """Fit the projector to at most `START_IMAGES` samples with one image, and return R².

    Rank 0 fits it and broadcasts it, so that one process alone needs the memory. The steps on whole captions follow
    only for `--mm_projector_init captions`. Collective. Raises UserError if no sample has exactly one image.
    """
    model = llava_of(prepared.model)
    projector = model.model.multi_modal_projector  # with DeepSpeed it is not on the GPU yet
    fitted, r2 = copy.deepcopy(projector).float().cpu(), 0.0
    if start.rank == 0:
        r2 = _fit(fitted, prepared, collator)
    r2 = start.of_rank_0(r2)  # the ranks wait here, because a collective has a time limit
    for parameter, value in zip(projector.parameters(), fitted.parameters(), strict=True):
        value = value.data.to(prepared.device)  # NCCL broadcasts only from the GPU
        if dist.is_initialized():
            dist.broadcast(value, src=0)
        parameter.data.copy_(value)
    return r2


def _fit(projector: LlavaMultiModalProjector, prepared: PreparedStage, collator: Collator) -> float:
    """Fit `projector`, in fp32 on the CPU, and return R²."""
    arguments, encoder = prepared.arguments, prepared.vision
    device = prepared.device
    single = [i for i, r in enumerate(prepared.dataset.records) if len(r.images) == 1 and not is_video(r.images[0])]
    generator = torch.Generator().manual_seed(arguments.seed)
    chosen = [single[i] for i in torch.randperm(len(single), generator=generator)[:START_IMAGES].tolist()]
    if not chosen:
        init = arguments.mm_projector_init
        raise UserError(f"--mm_projector_init {init} needs samples with one image, and the data has none")
    assert collator.load_images is not None  # there are images
    captions, parts = [], []
    tower: Any = encoder.model  # PreTrainedModel.to is annotated without its `self`
    tower.to(device)
    for begin in trange(0, len(chosen), START_BATCH, desc="projector's start", unit="batch", disable=None):
        samples = [prepared.dataset[i] for i in chosen[begin : begin + START_BATCH]]
        captions += [[label for label in sample["labels"] if label != IGNORE] for sample in samples]
        crops = [collator.load_images(sample["images"]) for sample in samples]
        features = torch.stack([image[0] for image in crops])  # with tiles, of the whole image
        if not arguments.caches_features:  # then `features` are pixels
            with torch.no_grad():
                features = encoder.features(features.to(device)).cpu()
        parts.append(features[:, torch.randperm(features.shape[1], generator=generator)[:START_TOKENS]])
    words = llava_of(prepared.model).get_input_embeddings().get_parameter("weight").cpu()
    sample = torch.cat(parts)
    r2 = start_from_captions(projector, sample, captions, words, seed=arguments.seed)
    if arguments.mm_projector_init == "captions":
        sharpen(projector, sample, captions, words, seed=arguments.seed)
    return r2
