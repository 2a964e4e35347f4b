"""Read checkpoints of the original LLaVA (haotian-liu/LLaVA): a full model, or LoRA or a projector on a base.

All three kinds are read as one configuration, one set of tensors and some small files. The names of the tensors:

    model.embed_tokens…, model.layers…, lm_head…   the language model
    model.mm_projector…                            the projector, see `mllm.model.projector`
    model.vision_tower.vision_tower…               the vision tower, if the checkpoint repeats it or trained it

Shapes: T text tokens · N image tokens · V words · S pixels.
"""

import shlex
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from clips.common.errors import UserError
from clips.common.files import from_json, read_json
from clips.common.hub import resolve
from clips.common.opening import load_weights, loading
from clips.common.tensors import MODEL_WEIGHTS, read_model, read_weights
from mllm.encoders.encoder import SelectFeature, select_features
from mllm.model.lora import read_plain_lora
from mllm.model.projector import ACTIVATION

LANGUAGE_MODELS = {
    "llama": ("LlavaLlamaForCausalLM", "llava_llama"),
    "mistral": ("LlavaMistralForCausalLM", "llava_mistral"),
    "qwen2": ("LlavaQwenForCausalLM", "llava_qwen"),
}
"""LLaVA's class and `model_type` for each `model_type` of transformers' language models. Qwen is from LLaVA-NeXT."""
SELECT_FEATURE: dict[str, SelectFeature] = {"patch": "default", "cls_patch": "full"}
"""transformers' `vision_feature_select_strategy` for each of LLaVA's `mm_vision_select_feature`."""
PROJECTOR, TOWER = "model.mm_projector.", "model.vision_tower.vision_tower."
TRAINABLES = "non_lora_trainables.bin"
KEPT_FILES = (
    "generation_config.json",
    *("tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)
"""Small files that LLaVA reads beside config.json and the weights."""
EXPRESSIBLE: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "mm_projector_type": ("linear", tuple(ACTIVATION)),
    "mm_vision_select_feature": ("patch", tuple(SELECT_FEATURE)),
    "image_aspect_ratio": ("square", ("square", "pad")),
    "mm_patch_merge_type": ("flat", ("flat",)),
    "mm_use_im_start_end": (False, (False,)),
    "mm_resampler_type": (None, (None,)),
    "s2": (False, (False,)),
}
"""For fields of config.json LLaVA's default, and the values that a stock `LlavaForConditionalGeneration` can hold."""


@dataclass(frozen=True, kw_only=True)
class OriginalLlava:
    """A full model in the form in which the original LLaVA stores it."""

    config: dict[str, Any]
    """config.json: the fields of the language model, and those of LLaVA (`mm_vision_tower`, `mm_projector_type`, …)."""
    tensors: dict[str, Tensor]
    """All weights under LLaVA's names, with LoRA merged."""
    files: dict[str, bytes]
    """The contents of those KEPT_FILES that the checkpoint has."""
    source: str

    @property
    def kind(self) -> str:
        """The key in LANGUAGE_MODELS of its language model. Raises UserError if there is none."""
        model_type = self.config.get("model_type")
        classes = self.config.get("architectures") or []
        for kind, (name, own_type) in LANGUAGE_MODELS.items():
            if model_type == own_type or name in classes:
                return kind
        if model_type == "llava":  # LLaVA's first releases
            return "llama"
        known = ", ".join(name for name, _ in LANGUAGE_MODELS.values())
        raise UserError(f"{self.source}/config.json: {', '.join(classes) or model_type} is not one of {known}")

    def field(self, name: str) -> Any:
        """Return the value of a field of EXPRESSIBLE, or LLaVA's default if the field is missing."""
        value = self.config.get(name)
        return EXPRESSIBLE[name][0] if value is None else value

    @property
    def text_config(self) -> PreTrainedConfig:
        """The configuration of the language model, without LLaVA's fields."""
        cls = CONFIG_MAPPING[self.kind]
        known = {*cls().to_dict(), "rope_theta", "rope_scaling"} - {"architectures", "_name_or_path", "dtype"}
        return cls.from_dict(
            {name: value for name, value in self.config.items() if name in known} | {"model_type": self.kind}
        )

    @property
    def tower_is_trained(self) -> bool:
        """True if LLaVA would take the tower's weights from the checkpoint, not from `mm_vision_tower`."""
        parts = self.config.get("mm_tunable_parts") or ""  # LLaVA-NeXT
        return bool(self.config.get("unfreeze_mm_vision_tower")) or "mm_vision_tower" in parts

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names start with `prefix`, under their names without it."""
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}

    def language_model(self) -> PreTrainedModel:
        """Return the causal language model alone. It shares the tensors and has their precision.

        Raises UserError if weights are missing, have another shape, or belong to no part of the model.
        """
        others = (PROJECTOR, "model.vision_tower.", "model.image_newline")  # the newline is unused with flat patches
        state = {
            name: tensor
            for name, tensor in self.tensors.items()
            if not name.startswith(others) and not name.endswith("rotary_emb.inv_freq")
        }
        config, words = self.text_config, state.get("model.embed_tokens.weight")
        dtype = None if words is None else words.dtype
        with loading("LLaVA checkpoint", self.source):
            cls = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            model, info = load_weights(
                cls, "LLaVA checkpoint", self.source, config=config, state_dict=state, dtype=dtype
            )
        if info["unexpected_keys"]:
            unknown = ", ".join(sorted(info["unexpected_keys"])[:5])
            raise UserError(f"{self.source}: these weights belong to no part of a LLaVA model: {unknown}")
        return model

    def generation_config(self) -> GenerationConfig:
        """Return generation_config.json, or the defaults of config.json, without `max_length`, which LLaVA ignores."""
        if "generation_config.json" not in self.files:
            return GenerationConfig.from_model_config(self.text_config)
        return GenerationConfig.from_dict(from_json(self.files["generation_config.json"]) | {"max_length": None})

    @torch.no_grad()
    def logits(
        self, tower: PreTrainedModel, before: Sequence[int], pixel_values: Tensor, after: Sequence[int]
    ) -> Tensor:
        """Compute the logits [T + N, V] over a text, one image [1, 3, S, S] and a text as LLaVA's own classes do.

        `tower` is the vision tower. No part of a stock LLaVA model is used, because these are compared with the result.
        """
        language = self.language_model().eval()
        words = language.get_input_embeddings()
        tokens = select_features(
            tower, pixel_values, self.config["mm_vision_select_layer"],
            SELECT_FEATURE[self.field("mm_vision_select_feature")],
        )  # fmt: skip
        image = _projector(self.part(PROJECTOR))(tokens.to(words.weight.dtype))
        texts = [words(torch.tensor(ids, dtype=torch.long))[None] for ids in (before, after)]
        return language(inputs_embeds=torch.cat([texts[0], image, texts[1]], dim=1)).logits[0]


def _projector(tensors: Mapping[str, Tensor]) -> nn.Module:
    """Build the projector as LLaVA's `build_vision_projector` does: one linear layer, or two with a GELU in between."""
    weights = [tensors[name] for name in sorted(tensors) if name.endswith("weight")]
    layers: list[nn.Module] = []
    for weight in weights:
        layers += [nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype), nn.GELU()]
    projector = layers[0] if len(weights) == 1 else nn.Sequential(*layers[:-1])
    projector.load_state_dict(dict(tensors))
    return projector


# ---------------------------------------------------------------------------------------------- reading
def is_original_llava(directory: Path) -> bool:
    """Return True if `directory` is a checkpoint of the original LLaVA: its config.json has `mm_vision_tower`."""
    return "mm_vision_tower" in read_json(Path(directory) / "config.json")


def refuse_original(directory: Path, what: str) -> None:
    """Raise UserError with the command that converts `directory` if it is a checkpoint of the original LLaVA."""
    if is_original_llava(directory):
        place = Path(directory)
        parts = "" if _is_whole(place) else " --base LANGUAGE_MODEL"
        words = shlex.join(["python", "scripts/convert.py", str(place), f"{place.name}-hf"])
        raise UserError(f"{what}: {place} is an original LLaVA; convert it first: {words} --to transformers{parts}")


def read_original(directory: Path, base: str | None = None) -> OriginalLlava:
    """Read an original checkpoint of any of the three kinds. No pickled code is run.

    `base` (directory or hub id) is LLaVA's --model-base: the language model, or the LLaVA checkpoint, on which LoRA
    adapters or a projector were trained. Raises UserError for a checkpoint that a stock model cannot hold.
    """
    directory = Path(directory)
    config = read_json(directory / "config.json")
    full = _is_whole(directory)
    lora = not full and (directory / "adapter_config.json").is_file()
    extra = directory / (TRAINABLES if lora else "mm_projector.bin")
    if full and base is not None:
        raise UserError(f"{directory} is a full model: leave out --base")
    if not full and not extra.is_file():
        raise UserError(f"{directory} holds no weights: expected one of {', '.join(MODEL_WEIGHTS)}, or {extra.name}")
    if not full and base is None:
        adapter = read_json(directory / "adapter_config.json") if lora else {}
        recorded = adapter.get("base_model_name_or_path") or config.get("_name_or_path")
        raise UserError(f"{directory} is only part of a model: give its base with --base (it was made on {recorded})")
    place = directory if base is None else resolve(base, "base model")
    original = OriginalLlava(config=config, tensors=read_model(place), files=kept_files(place), source=str(directory))
    assert original.kind  # raises
    problems = [
        f"{name} is {original.field(name)!r}, possible are: {', '.join(map(repr, values))}"
        for name, (_, values) in EXPRESSIBLE.items()
        if original.field(name) not in values
    ]
    if not isinstance(config.get("mm_vision_select_layer"), int):
        problems.append("mm_vision_select_layer is missing")
    if problems:
        raise UserError(f"{directory}/config.json: a stock LLaVA model cannot hold this model: {'; '.join(problems)}")
    if not full:
        added = {n.removeprefix("base_model.model."): t for n, t in read_weights(extra).items()}  # PEFT's prefix
        added = {f"model.{n}" if n.startswith("mm_projector.") else n: tensor for n, tensor in added.items()}
        original = replace(original, tensors=original.tensors | added)
    if lora:
        original = replace(original, tensors=original.tensors | _merged(original, directory))
    if not original.part(PROJECTOR):
        raise UserError(f"{directory} holds no projector ({PROJECTOR}*)")
    return original


def _is_whole(directory: Path) -> bool:
    return any((directory / name).is_file() for name in MODEL_WEIGHTS)


def kept_files(directory: Path) -> dict[str, bytes]:
    """Return {name: bytes} of those KEPT_FILES that `directory` has."""
    return {name: (directory / name).read_bytes() for name in KEPT_FILES if (directory / name).is_file()}


def _merged(original: OriginalLlava, directory: Path) -> dict[str, Tensor]:
    """Return the language model's tensors with the LoRA adapters in `directory` merged, in the base's precision."""
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

    files = [directory / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
    read_plain_lora(directory / "adapter_config.json")  # PEFT does whatever an untrusted one asks for
    adapters = read_weights(next((path for path in files if path.is_file()), files[0]))
    with loading("LoRA adapters", directory), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "The PEFT config's `base_model_name_or_path` was renamed")
        adapted: Any = get_peft_model(original.language_model(), PeftConfig.from_pretrained(str(directory)))
        fitted: Any = set_peft_model_state_dict(adapted, adapters)
        wrong = sorted(name for name in (*fitted.missing_keys, *fitted.unexpected_keys) if "lora_" in name)
        if wrong:
            raise UserError(f"the LoRA adapters in {directory} do not fit the base: {', '.join(wrong[:5])}")
        return adapted.merge_and_unload(safe_merge=True).state_dict()
