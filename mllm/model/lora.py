"""Plain LoRA adapters from files: which configurations are taken, and how an adapter is merged into weights."""

import re
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from clips.common.errors import UserError
from clips.common.escape import clip
from clips.common.files import read_json, sha256
from clips.common.opening import naming
from clips.common.tensors import listed, read_shapes, read_weights

LORA_FIELDS = {
    "r", "lora_alpha", "target_modules", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "lora_dropout", "peft_version", "auto_mapping", "megatron_core", "qalora_group_size",
}  # fmt: skip
"""Fields of PEFT's adapter_config.json that `merge_adapter` reads, or that change nothing in a merged weight."""
LORA_DEFAULTS = {"peft_type": "LORA", "bias": "none", "init_lora_weights": True}
"""Values of further fields under which an adapter is plain LoRA; the fields beside these must be empty."""
MOST_RANK = 4096
FACTOR_TYPES = ("F32", "BF16", "F16", "F8_E4M3", "F8_E5M2")


@torch.no_grad()
def merge_adapter(model: PreTrainedModel, directory: Path, layers: str | None) -> None:
    """Merge the LoRA adapter in `directory` into the weights of `model`, whose `--llm_layers` are `layers`.

    Only plain LoRA is merged, and all shapes are compared before a factor is read, so an untrusted configuration
    decides neither memory nor time. Raises UserError for any other adapter, and for one taught to other layers.
    """
    file = directory / "adapter_model.safetensors"
    with naming("adapter", directory):
        rank, scale, targets = read_plain_lora(directory / "adapter_config.json")
        weights: dict[tuple[str, str], Tensor] = {}
        expected: dict[str, tuple[int, ...]] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and not targets.isdisjoint((name, name.rpartition(".")[2])):
                a, b = (f"base_model.model.{name}.lora_{letter}.weight" for letter in "AB")
                weights[a, b] = module.weight
                expected |= {a: (rank, module.in_features), b: (module.out_features, rank)}
        stored = read_shapes(file)
        found = {name: shape for name, (_, shape) in stored.items()}
        if expected != found:
            differing = sorted(name for name in expected | found if expected.get(name) != found.get(name))
            raise UserError(f"adapter: {directory} is not of these layers of the language model: {listed(differing)}")
        if kinds := {kind for kind, _ in stored.values()} - {*FACTOR_TYPES}:
            raise UserError(f"{file} holds factors of type {listed(sorted(kinds))}: convert them to F32, BF16 or F16")
        facts = read_json(directory / "taught.json")
        if facts.get("layers", layers) != layers:
            taught = clip(str(facts["layers"]), 20)
            raise UserError(f"adapter: {directory} was taught to --llm_layers {taught}: use these, or none")
        if "sha256" in facts and facts["sha256"] != sha256(file):
            raise UserError(f"{file} does not have the SHA-256 that taught.json records: restore it")
        factors = read_weights(file)
        for (a, b), weight in weights.items():
            weight += (factors[b].float() @ factors[a].float() * scale).to(weight.dtype)
            if not weight.isfinite().all():
                raise UserError(f"{file}: {a} or {b} makes a weight NaN or infinite: use another adapter")


def read_plain_lora(path: Path) -> tuple[int, float, set[str]]:
    """Return rank, scale and the names of the layers of the adapter_config.json at `path`.

    Raises UserError if it asks for anything beyond LoRA of one rank and one scale on layers with plain names.
    """
    config = read_json(path)
    rank, alpha, targets = (config.get(name) for name in ("r", "lora_alpha", "target_modules"))
    if type(rank) is not int or not 0 < rank <= MOST_RANK or not isinstance(alpha, (int, float)):
        raise UserError(f"{path}: r must be a number from 1 to {MOST_RANK}, and lora_alpha a number")
    if not isinstance(targets, list) or not all(isinstance(t, str) and re.fullmatch(r"[\w.]+", t) for t in targets):
        raise UserError(f"{path}: target_modules must be a list of plain names, such as q_proj")
    values = {name: value for name, value in config.items() if name not in LORA_FIELDS}
    others = [name for name, value in values.items() if value not in (None, False, {}, [], LORA_DEFAULTS.get(name))]
    if others:
        raise UserError(f"{path} asks for more than plain LoRA: {clip(listed(others), 200)}. Merge it with PEFT first")
    return rank, alpha / rank, set(targets)
