"""Quantise a frozen language model to 4 or 8 bits (bitsandbytes) for QLoRA, and dequantise it to merge the adapter."""

from typing import Any

import torch
from torch import nn
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from clips.common.errors import UserError


def quantize(model: nn.Module, bits: int, compute_dtype: torch.dtype, device: torch.device) -> None:
    """Quantise every linear layer of `model` in place, to 8 bits or to 4 (NF4 with quantised scales, as in QLoRA).

    Raises UserError if bitsandbytes changes weights by more than LARGEST_ERROR on this device.
    """
    import bitsandbytes as bnb

    for name, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear:
            continue
        size, bias = (layer.in_features, layer.out_features), layer.bias is not None
        weight = layer.weight.detach().clone()
        new: Any  # the two kinds of layers, and their weights, have no common type
        if bits == 4:
            kind: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4"}
            new = bnb.nn.Linear4bit(*size, bias, compute_dtype=compute_dtype, device="meta", **kind)
            new.weight = bnb.nn.Params4bit(weight, requires_grad=False, **kind)
            # Otherwise a forward in eval mode on a CPU repacks the weights in place, and later gradients are wrong.
            new.support_avx512bf16_for_cpu = False
        else:
            new = bnb.nn.Linear8bitLt(*size, bias, has_fp16_weights=False, device="meta")
            new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        new.bias = layer.bias
        new = new.to(device)  # moving quantises
        _check(new, weight, name, bits)
        _replace(model, name, new)


LARGEST_ERROR = {4: 0.15, 8: 0.05}
"""Largest norm of the rounding error relative to the weights, by bits; for normally distributed ones 0.09 and 0.006."""


@torch.no_grad()
def _check(layer: nn.Linear, weight: torch.Tensor, name: str, bits: int) -> None:
    # bitsandbytes 0.50 on CPUs dequantises rows wrongly if their length is not a multiple of its block size, 64.
    packed = layer.get_parameter("weight")
    restored = dequantize_bnb_weight(packed, state=getattr(layer, "state", None)).float().to(weight.device)
    error = ((restored - weight.float()).norm() / weight.float().norm()).item()
    if not error < LARGEST_ERROR[bits]:
        where = f"layer {name} {tuple(weight.shape)} by {error:.0%} on this {weight.device.type}"
        raise UserError(f"{bits} bits: bitsandbytes changes {where}: use 16 bits or a GPU")


@torch.no_grad()
def dequantize(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Undo `quantize` in place: replace each bitsandbytes layer by an nn.Linear with dequantised weights in `dtype`.

    Returns the model.
    """
    import bitsandbytes as bnb

    for name, layer in list(model.named_modules()):
        if isinstance(layer, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            packed = layer.get_parameter("weight")
            weight = dequantize_bnb_weight(packed, state=getattr(layer, "state", None)).to(dtype)
            new = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            new.weight, new.bias = nn.Parameter(weight, requires_grad=False), layer.bias
            _replace(model, name, new)
    return model


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
