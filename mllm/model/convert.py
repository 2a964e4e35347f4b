"""Convert checkpoints of the original LLaVA to stock transformers directories, and back, with equal logits.

    read_original → to_stock → save_model                 original → stock
    load_llava → to_original → write_original             stock → original

A converted stock directory keeps the original's small files in `original_llava/`, and the way back restores them.
"""

import dataclasses
import json
import re
import shlex
import tempfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import CLIPVisionModel, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from clips.common.errors import UserError
from clips.common.files import read_json, replacing, write_json
from clips.common.hub import HUB_ID, resolve
from clips.common.opening import loading, opening
from clips.common.tensors import write_weights
from mllm.data.conversation import ConversationEncoder
from mllm.data.formats import SAVED, backend_with_bos, get_format
from mllm.encoders.encoder import ImageProcessor, VisionEncoder
from mllm.encoders.load import load_vision
from mllm.model.llava import build_model, save_model
from mllm.model.llm import check_sentencepiece_ids, read_tokenizer, ready_for_images
from mllm.model.load import load_llava
from mllm.model.original import (
    LANGUAGE_MODELS,
    SELECT_FEATURE,
    TOWER,
    OriginalLlava,
    is_original_llava,
    kept_files,
    read_original,
)
from mllm.model.projector import assign_projector, llava_tensors, projector_kind
from mllm.model.tiles import Llava, LlavaProcessors, newline_of

KEPT, KEPT_TOWER = "original_llava", "vision_tower.json"
"""A directory in a converted model, and a file in it with the tower's name and the hash of the weights of that name."""
TOWER_DIRECTORY = "vision_tower"
"""The directory, in an original checkpoint that was written here, of a tower that has no name."""
PROCESSOR_FIELDS = (
    *("size", "crop_size", "do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"),
    *("resample", "rescale_factor", "image_mean", "image_std"),
)
"""The fields of a saved CLIPImageProcessor."""
WORD_IN_NAME = {"llama": "llava", "mistral": "mistral", "qwen2": "qwen"}
"""The word beside "llava" by which LLaVA's loader recognises each kind of language model in the directory's name."""
CONV_MODES = {"plain": "plain", "v1": "vicuna_v1", "llava_v1": "llava_v1", "chatml_direct": "chatml_direct"}
"""LLaVA's --conv-mode with the same texts, for each conversation format that has one."""
QUESTION = "<image>\nWhat is in the image, and what is to the left of it?"
TOLERANCE, TOLERANCE_OF_HALF = 1e-4, 3e-2
"""Largest difference of logits that counts as equal, relative to their spread: in fp32, and in bf16 and fp16."""


def is_llava_source(source: str, to: str) -> bool:
    """Return True if convert.py should use this module: `source` is an original LLaVA model, or is to become one.

    Of a hub id only config.json is fetched. Without that file the result is False.
    """
    if to == "llava":
        return True
    directory = Path(source)
    if not directory.is_dir() and HUB_ID.fullmatch(source):
        try:
            directory = Path(snapshot_download(source, allow_patterns=["config.json"]))
        except (HfHubHTTPError, HFValidationError, OSError):
            return False  # the converter of encoders will say what is wrong
    return is_original_llava(directory)


def convert_llava_from_flags(flags: Namespace) -> None:
    """Run scripts/convert.py for a LLaVA model."""
    target, quoted = Path(flags.target), shlex.quote(flags.target)
    difference, mode = convert_llava(
        flags.source, target, flags.to, base=flags.base, vision_tower=flags.vision_tower,
        conv_mode=flags.conv_mode, check_only=flags.check,
    )  # fmt: skip
    print(f"logits: largest difference {difference:.1e} of their spread")
    if flags.check:
        print(f"{flags.source} can be converted; nothing was written")
    elif flags.to == "transformers":
        print(f"written: {target}\nnext: python scripts/chat.py --model {quoted}")
    else:
        prompts = f"--conv-mode {CONV_MODES[mode]}" if mode in CONV_MODES else f"{mode}, which LLaVA does not have"
        print(f"written: {target}\nin LLaVA: python -m llava.serve.cli --model-path {quoted} --image-file IMAGE")
        print(f"conversation format: {prompts}")


def convert_llava(
    source: str,
    target: Path,
    to: str,
    *,
    base: str | None = None,
    vision_tower: str | None = None,
    conv_mode: str = "auto",
    check_only: bool = False,
) -> tuple[float, str]:
    """Convert the LLaVA model `source` (directory or hub id), check that the logits stay equal, and write `target`.

    Returns the `logit_difference` and the name of the model's conversation format. Raises UserError if it fails.

    Args:
        to: "transformers" or "llava".
        base: the base of LoRA adapters or of a projector (LLaVA's --model-base). With to="llava" the language model
            on which it was trained, because LLaVA needs its tokenizer files if they are SentencePiece's.
        vision_tower: directory or hub id of the tower, instead of the one in the checkpoint's config. With to="llava"
            the name to write for the tower, whose weights must be equal to the last bit.
        conv_mode: conversation format to save with the model; "auto" is its tokenizer's, or "v1" if that has none.
        check_only: write nothing.
    """
    if target.exists():
        raise UserError(f"{target} exists; convert.py overwrites nothing: choose another directory, or remove it")
    directory = resolve(source, "LLaVA model")
    if is_original_llava(directory) != (to == "transformers"):
        raise UserError(f"--to {to} is not for {source}: mm_vision_tower in config.json marks an original LLaVA")
    if to == "llava" and conv_mode != "auto":
        raise UserError("--conv-mode is for original checkpoints: leave it out with --to llava")
    with opening("LLaVA model", directory):
        if to == "transformers":
            original = read_original(directory, base)
            model, processor, vision = to_stock(original, vision_tower=vision_tower, conv_mode=conv_mode)
            tower = vision.model
        else:
            model, processor = load_llava(str(directory), torch.device("cpu"), "stored")
            if newline_of(model) is not None:
                raise UserError(f"{source} sees images in tiles (anyres); only models of one square are converted")
            original = to_original(model, processor, directory, base=base, vision_tower=vision_tower)
            _check_name(original.kind, target.name)
            vision_config: Any = model.config.vision_config
            with loading("vision tower", directory):
                tower = CLIPVisionModel.from_pretrained(
                    None, config=vision_config, state_dict=original.part(TOWER), dtype=model.dtype
                )
        difference = logit_difference(original, model, processor, tower.eval())
    if not check_only and to == "transformers":
        encoder = vision.describe()
        for place in (vision.name.partition(":")[2], vision.source):  # the card shows no directory of this machine
            if Path(place).is_dir():
                encoder = encoder.replace(place, Path(place).name)
        card = {"Converted from": "a checkpoint of the original LLaVA", "Vision encoder": encoder}
        save_model(model, processor, target, card=card, beside=_kept(original, vision))
    elif not check_only:
        write_original(original, vision_config, processor.image_processor, target)
    return difference, get_format("auto", processor.tokenizer).name


@torch.no_grad()
def logit_difference(
    original: OriginalLlava, model: Llava, processor: LlavaProcessors, tower: PreTrainedModel
) -> float:
    """Return the largest difference between the logits of the stock model and of LLaVA, relative to their spread.

    The input is random pixels and a real question; `tower` is LLaVA's. Raises UserError if the logits are not equal.
    """
    encoder = ConversationEncoder(processor.tokenizer, "auto", model.config.image_seq_length)
    ids = encoder.prompt([{"from": "human", "value": QUESTION}], images=1)
    start, count = ids.index(encoder.image_id), ids.count(encoder.image_id)
    side = processor.image_processor.crop_size["height"]
    pixel_values = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    expected = original.logits(tower, ids[:start], pixel_values, ids[start + count :]).float()
    logits = model(input_ids=torch.tensor([ids]), pixel_values=pixel_values).logits[0, :, : expected.shape[1]].float()
    difference = ((logits - expected).abs().max() / expected.std()).item()
    if not difference <= (TOLERANCE if model.dtype == torch.float32 else TOLERANCE_OF_HALF):  # also when it is NaN
        raise UserError(f"{original.source}: the logits of both sides differ by {difference:.1e} of their spread")
    return difference


# ---------------------------------------------------------------------------------------------- original → stock
def to_stock(
    original: OriginalLlava, *, vision_tower: str | None = None, conv_mode: str = "auto"
) -> tuple[Llava, LlavaProcessors, VisionEncoder]:
    """Return the stock model in the checkpoint's precision, its processor and its encoder; see `convert_llava`.

    Raises UserError if tokenizer, vision tower or projector cannot be read or do not fit.
    """
    causal = original.language_model()
    causal.generation_config = original.generation_config()
    with tempfile.TemporaryDirectory() as place:
        for name, content in original.files.items():
            (Path(place) / name).write_bytes(content)
        original.text_config.save_pretrained(place)
        try:
            tokenizer = read_tokenizer(Path(place))
            if "tokenizer.model" in original.files:  # LLaVA reads this file alone, even if there are others
                check_sentencepiece_ids(tokenizer, Path(place) / "tokenizer.model")
        except UserError as error:
            raise UserError(str(error).replace(place, original.source)) from None
    llm = ready_for_images(causal, tokenizer, original.source, conv_mode)
    vision = _vision(original, vision_tower, causal.dtype)
    model, processor = build_model(vision, llm, projector=original.field("mm_projector_type"))
    assign_projector(model.model.multi_modal_projector, original.tensors, original.source)
    return model, processor, vision


def _vision(original: OriginalLlava, name: str | None, dtype: torch.dtype) -> VisionEncoder:
    """Load the vision tower that LLaVA would use, with the weights in the checkpoint if they were trained."""
    recorded = original.config["mm_vision_tower"]
    inside = Path(original.source) / TOWER_DIRECTORY
    place = name or (str(inside) if inside.is_dir() and not Path(recorded).is_dir() else recorded)
    try:
        vision = load_vision(
            f"hf:{place}",
            select_layer=original.config["mm_vision_select_layer"],
            select_feature=SELECT_FEATURE[original.field("mm_vision_select_feature")],
            image_aspect_ratio=original.field("image_aspect_ratio"),
        )
    except UserError as error:
        raise UserError(f"{error} (the checkpoint's tower is {recorded}; another place: --vision-tower DIR)") from None
    tower: Any = vision.model  # transformers declares `to` so that mypy misses its self
    loaded = tower.to(dtype).state_dict()
    tower.config.dtype = dtype
    stored = {}
    for long_name, tensor in original.part(TOWER).items():
        short = long_name if long_name in loaded else long_name.removeprefix("vision_model.")
        if not short.endswith("position_ids"):
            stored[short] = tensor
    wrong = [n for n, t in stored.items() if n not in loaded or t.shape != loaded[n].shape]
    if not wrong and not original.tower_is_trained:
        # Not exactly, because a model that was trained in bf16 holds a rounded tower.
        wrong = [n for n, t in stored.items() if not torch.allclose(t.float(), loaded[n].float(), rtol=1e-2, atol=1e-4)]
    if wrong:
        mend = "give another one with --vision-tower, or set unfreeze_mm_vision_tower in config.json"
        raise UserError(f"{original.source}: {wrong[0]} of its vision tower is not that of {place}: {mend}")
    if original.tower_is_trained:
        tower.load_state_dict(loaded | stored)
    return vision


def _kept(original: OriginalLlava, vision: VisionEncoder) -> dict[str, bytes]:
    """Return files, path → content, that only `to_original` needs. They contain no path of this machine."""
    config = {name: value for name, value in original.config.items() if name not in ("_name_or_path", "auto_map")}
    files = dict(original.files)
    if Path(config["mm_vision_tower"]).is_absolute() or Path(config["mm_vision_tower"]).is_dir():
        del config["mm_vision_tower"]
    else:
        tower = {"mm_vision_tower": config["mm_vision_tower"], "weights": vision.weights_fingerprint}
        files[KEPT_TOWER] = _json(tower)
    files["config.json"] = _json(config)
    return {f"{KEPT}/{name}": content for name, content in files.items()}


# ---------------------------------------------------------------------------------------------- stock → original
def to_original(
    model: Llava,
    processor: LlavaProcessors,
    directory: Path,
    *,
    base: str | None = None,
    vision_tower: str | None = None,
) -> OriginalLlava:
    """Convert a stock model, which was read from `directory`, into the form of the original LLaVA; see `convert_llava`.

    Its configuration has no `mm_vision_tower` if the tower has no name; see `write_original`. Raises UserError if LLaVA
    cannot hold the tower, the tokenizer or the language model, and if `base` or `vision_tower` is another one.
    """
    config: Any = model.config
    fields = read_json(directory / KEPT / "config.json")
    if fields:
        files = kept_files(directory / KEPT)
    else:
        fields = _config(model, processor)
        if base is None:
            files = _tokenizer_files(processor.tokenizer)
        else:
            place = resolve(base, "language model")
            files = kept_files(place)
            fields |= {name: read_json(place / "config.json").get(name) for name in ("vocab_size", "pad_token_id")}
            vocabulary, base_vocabulary = processor.tokenizer.get_vocab(), read_tokenizer(place).get_vocab()
            is_part = base_vocabulary.items() <= vocabulary.items()
            if not is_part or not len(base_vocabulary) <= (fields["vocab_size"] or 0):
                raise UserError(f"{base}: its tokenizer is not that of {directory}, which was trained on another model")
        generation = json.loads(model.generation_config.to_json_string())
        files["generation_config.json"] = _json(generation | {"pad_token_id": fields["pad_token_id"]})
    tower: Any = model.model.vision_tower
    if not isinstance(tower, CLIPVisionModel):
        kind = type(tower).__name__
        raise UserError(f"{directory}: LLaVA's tower is a CLIPVisionModel, not a {kind}: pretrain with --tower clip")
    language = model.model.language_model
    tensors = {f"model.{name}": tensor for name, tensor in language.state_dict().items()}
    if not config.text_config.tie_word_embeddings:
        tensors["lm_head.weight"] = model.lm_head.weight.detach()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:  # without the rows of `<image>` and `<pad>` if conversion added them
            tensors[name] = tensors[name][: fields["vocab_size"]].clone()
    tensors |= llava_tensors(model.model.multi_modal_projector)
    for name, tensor in tower.state_dict().items():
        # LLaVA has the names that transformers had before 5.x.
        tensors[f"{TOWER}vision_model.{name.removeprefix('vision_model.')}"] = tensor
    encoder = VisionEncoder(name="", source="", model=tower, image_processor=processor.image_processor)
    tower_name = _tower_name(encoder, directory, vision_tower, model.dtype)
    fields = {key: value for key, value in fields.items() if key != "mm_vision_tower"}
    return OriginalLlava(
        config=fields if tower_name is None else fields | {"mm_vision_tower": tower_name},
        tensors=tensors,
        files=files,
        source=str(directory),
    )


def _tower_name(encoder: VisionEncoder, directory: Path, name: str | None, dtype: torch.dtype) -> str | None:
    """Return the name under which the original LLaVA finds exactly this tower, or None if there is none."""
    if name is not None:
        named: Any = load_vision(f"hf:{name}").model
        if dataclasses.replace(encoder, model=named.to(dtype)).weights_fingerprint != encoder.weights_fingerprint:
            raise UserError(f"{directory}: its vision tower is not {name}: leave out --vision-tower")
        return str(Path(name).resolve()) if Path(name).is_dir() else name
    stored = read_json(directory / KEPT / KEPT_TOWER)
    return stored["mm_vision_tower"] if stored.get("weights") == encoder.weights_fingerprint else None


def _config(model: Llava, processor: LlavaProcessors) -> dict[str, Any]:
    """Return LLaVA's config.json for a model that was trained here, as LLaVA's transformers (4.37) reads it."""
    config: Any = model.config
    text = config.text_config
    if text.model_type not in LANGUAGE_MODELS:
        known = ", ".join(LANGUAGE_MODELS)
        raise UserError(f"LLaVA has no class for a language model of kind {text.model_type!r}; it has: {known}")
    rope = dict(text.rope_parameters)
    scaling = {"type": rope.get("rope_type", "default"), "factor": rope.get("factor")}
    head_dim = text.hidden_size // text.num_attention_heads
    lacks = {
        f"rotary positions of type {scaling['type']!r}": scaling["type"] not in ("default", "linear", "dynamic"),
        "attention heads of a custom width (head_dim)": getattr(text, "head_dim", None) not in (None, head_dim),
        "biases in the MLP (mlp_bias)": getattr(text, "mlp_bias", False),
    }
    for what, has in lacks.items():
        if has:
            raise UserError(f"LLaVA's transformers (4.37) has no {what}")
    if not isinstance(config.vision_feature_layer, int):
        raise UserError(f"LLaVA takes one layer of the vision tower, this model takes {config.vision_feature_layer}")
    select = {strategy: feature for feature, strategy in SELECT_FEATURE.items()}
    cls, model_type = LANGUAGE_MODELS[text.model_type]
    new_names = ("rope_parameters", "dtype", "head_dim", "mlp_bias", "layer_types", "transformers_version")
    return {name: value for name, value in text.to_diff_dict().items() if name not in new_names} | {
        "architectures": [cls],
        "model_type": model_type,
        "torch_dtype": str(model.dtype).removeprefix("torch."),
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if scaling["type"] == "default" else scaling,
        "vocab_size": text.vocab_size,
        "image_aspect_ratio": "pad" if getattr(processor.image_processor, "do_pad", False) else "square",
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_patch_merge_type": "flat",
        "mm_projector_type": projector_kind(model.model.multi_modal_projector),
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": select[config.vision_feature_select_strategy],
        "mm_vision_select_layer": config.vision_feature_layer,
        "tokenizer_model_max_length": text.max_position_embeddings,
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
    }


def _tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """Return tokenizer.json and tokenizer_config.json as LLaVA's tokenizers (0.15) and transformers read them."""
    state = json.loads(backend_with_bos(tokenizer).to_str())
    if {"Metaspace", "Prepend"} & set(re.findall(r'"type":"(\w+)"', json.dumps(state, separators=(",", ":")))):
        raise UserError("LLaVA reads a SentencePiece tokenizer.model: give the language model that has it with --base")
    merges = state["model"].get("merges", [])
    state["model"]["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    named = ("bos_token", "eos_token", "unk_token", "pad_token")
    config = {name: getattr(tokenizer, name) for name in named} | {
        "tokenizer_class": "PreTrainedTokenizerFast",  # also if LLaVA asks for a slow one
        "model_max_length": tokenizer.model_max_length,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "chat_template": tokenizer.chat_template,
        SAVED: tokenizer.init_kwargs.get(SAVED),
    }
    config = {name: value for name, value in config.items() if value is not None}
    return {"tokenizer.json": json.dumps(state, ensure_ascii=False).encode(), "tokenizer_config.json": _json(config)}


def _check_name(kind: str, name: str) -> None:
    """Raise UserError for a directory name by which LLaVA's loader would take the model for another kind."""
    words = {"llava", WORD_IN_NAME[kind]}
    others = {"lora", "mpt", *WORD_IN_NAME.values()} - words
    if {word for word in words | others if word in name.lower()} != words:
        needed, forbidden = " and ".join(sorted(words)), ", ".join(sorted(others))
        raise UserError(f"LLaVA's loader goes by names: {name!r} must contain {needed}, and none of {forbidden}")


def write_original(
    original: OriginalLlava, vision: PreTrainedConfig, image_processor: ImageProcessor, directory: Path
) -> None:
    """Write, atomically, a checkpoint that the original LLaVA loads.

    A tower without a name is saved in `vision_tower/` inside. `mm_vision_tower` is then an absolute path, which must
    be changed if the directory moves.
    """
    with replacing(directory) as partial:
        save_torch_state_dict(dict(original.tensors), partial)
        for name, content in original.files.items():
            (partial / name).write_bytes(content)
        config = dict(original.config)
        if "mm_vision_tower" not in config:
            tower = partial / TOWER_DIRECTORY
            tower.mkdir()
            settings = image_processor.to_dict()
            stock = {name: settings[name] for name in PROCESSOR_FIELDS} | {"image_processor_type": "CLIPImageProcessor"}
            write_json(tower / "preprocessor_config.json", stock)
            vision.save_pretrained(tower)
            write_weights(original.part(TOWER), tower / "model.safetensors")
            config["mm_vision_tower"] = str(directory.resolve() / TOWER_DIRECTORY)
        write_json(partial / "config.json", config)


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
