"""The language model as llama.cpp holds it: hyperparameters and tensors under GGUF's names.

Shapes: V rows of the vocabulary · D hidden size · H heads of a projection · d width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, RopeScalingType, TensorNameMap, get_tensor_name_map
from torch import Tensor

from clips.common.errors import UserError
from mllm.model.tiles import Llava

ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
}
"""transformers' `model_type` → the graph of llama.cpp that computes the same."""
PREFIX = "model.language_model."
ROPES = ("default", "linear", "llama3")


def architecture(config: Any) -> str:
    """llama.cpp's name for a text config; UserError for what its graph does not compute."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise UserError(
            f"language model {kind!r} is not written to GGUF, only {', '.join(ARCHITECTURES)} are: train with "
            "--model_name_or_path naming one of those, or convert it with llama.cpp's own convert_hf_to_gguf.py"
        )
    rope = config.rope_parameters
    window = getattr(config, "sliding_window", None)
    if kind.startswith("qwen") and not config.use_sliding_window:
        window = None
    act, scaling = config.hidden_act, rope["rope_type"]
    refused = {
        f"hidden_act {act!r}: llama.cpp's {kind} graph has silu": act != "silu",
        f"rope_type {scaling!r}: only default, linear and llama3 are written": scaling not in ROPES,
        "partial_rotary_factor: llama.cpp's graph rotates whole heads": rope.get("partial_rotary_factor", 1.0) != 1.0,
        f"sliding_window {window}: llama.cpp's {kind} graph attends to everything": (
            window is not None and window < config.max_position_embeddings
        ),
    }
    if reasons := [reason for reason, holds in refused.items() if holds]:
        raise UserError(
            f"language model {kind}, config.json, text_config: {'; '.join(reasons)}; train with another "
            "--model_name_or_path"
        )
    return MODEL_ARCH_NAMES[ARCHITECTURES[kind]]


def write_language_metadata(writer: GGUFWriter, config: Any) -> None:
    rope, heads = config.rope_parameters, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def language_tensors(model: Llava) -> Iterator[tuple[str, Tensor]]:
    """(GGUF name, tensor) of every weight of the language model; UserError for one that llama.cpp has no place for."""
    config: Any = model.config.text_config
    arch = ARCHITECTURES[config.model_type]
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    if config.rope_parameters["rope_type"] == "llama3":
        yield "rope_freqs.weight", _llama_3_factors(config)
    state = model.state_dict()
    for key, tensor in state.items():
        if key.startswith(PREFIX):
            tensor_name = "model." + key.removeprefix(PREFIX)
        elif key == "lm_head.weight":
            if torch.equal(tensor, state[PREFIX + "embed_tokens.weight"]):
                continue  # llama.cpp takes the embeddings if there is no output layer
            tensor_name = key
        else:
            continue
        if arch == MODEL_ARCH.LLAMA:
            tensor = _rotation_order(tensor, tensor_name, config)
        yield gguf_name(names, tensor_name), tensor


def gguf_name(names: TensorNameMap, key: str) -> str:
    """`key` under GGUF's name; UserError if the map has none."""
    found = names.get_name(key, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise UserError(f"weight {key} has no place in llama.cpp's graph of this model, so it cannot be exported")
    return found


def _rotation_order(tensor: Tensor, name: str, config: Any) -> Tensor:
    """Query and key rows of the llama graph: rotary pairs lie side by side there, half a head apart in transformers."""
    if ".q_proj." in name:
        heads = config.num_attention_heads
    elif ".k_proj." in name:
        heads = config.num_key_value_heads
    else:
        return tensor
    # [H·d, …] → [H, 2, d/2, …] → [H, d/2, 2, …]
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def _llama_3_factors(config: Any) -> Tensor:
    """The divisor of each rotary frequency, fp32 [d/2]: 1 for high, `factor` for low, blended between."""
    rope = config.rope_parameters
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).float()
