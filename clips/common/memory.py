"""Bytes of one rank that do not depend on the batch: weights, gradients, optimizer state, DeepSpeed's buffers.

From ZeRO 1 on, DeepSpeed's buffers have the size that its settings give them (reduce_bucket_size,
stage3_max_live_parameters), which is 2 GB and more whatever the model's size. tests/unit/clips/test_memory.py compares
each figure with a real engine's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FP32 = 4
BUCKET = 500_000_000
"""Elements of DeepSpeed's reduce_bucket_size, and of the bucket of ZeRO 0, if its settings give no other."""
LIVE = 1_000_000_000
"""Parameters that ZeRO-3 leaves gathered, its stage3_max_live_parameters."""


def gigabytes(size: float) -> str:
    """`size` bytes in GB with one decimal; two digits below 1 GB, since 0.0 says nothing."""
    gb = size / 1e9
    return f"{gb:.1f}" if gb >= 0.95 or gb == 0 else f"{gb:.2g}"


@dataclass(frozen=True)
class Parameters:
    """The numbers of a model's parameters."""

    groups: Mapping[str, int]
    """Optimizer group → parameters that train in it."""
    frozen: int
    products: int = 0
    """Parameters of linear layers and convolutions, which autocast copies to bf16."""
    element: int = FP32
    """Bytes of a trained weight and of its gradient. Below 4 DeepSpeed keeps fp32 weights beside them."""
    frozen_element: float = FP32
    """Bytes of a frozen weight, which may be quantised."""

    @property
    def trained(self) -> int:
        return sum(self.groups.values())

    @property
    def state(self) -> int:
        """Elements of the optimizer's state: two per parameter of AdamW, one of Muon."""
        return sum((1 if name == "muon" else 2) * count for name, count in self.groups.items())


@dataclass(frozen=True)
class Held:
    """Bytes that one rank holds from step to step, and what DeepSpeed adds in a step."""

    weights: int
    gradients: int
    """At the end of a backward pass."""
    optimizer: int
    """Its state, and the fp32 copy of the weights that it steps on."""
    buffers: int
    """From the first gradient on, beside activations."""
    reducing: int
    """Beside gradients and buffers, while gradients are reduced or stepped on."""
    host: int = 0
    """In the machine's memory, with offload."""
    bucket: float = math.inf
    """Parameters whose gradients make DeepSpeed reduce before the backward pass is over."""


def held(parameters: Parameters, zero: Mapping[str, Any], ranks: int) -> Held:
    """What ZeRO as configured (`zero_optimization` of a DeepSpeed config) leaves on a rank.

    Offload without `pin_memory` would hold the same.
    """
    trained, element = parameters.trained, parameters.element
    weights = int(element * trained + parameters.frozen_element * parameters.frozen)
    stage, share = zero.get("stage", 0), -(-trained // ranks)
    if stage == 0:  # gradients are reduced in one copy
        reduced = element * min(trained, BUCKET) if ranks > 1 else 0
        return Held(weights, element * trained, FP32 * parameters.state, 0, reduced)
    on_host = zero.get("offload_optimizer", {}).get("device") == "cpu"
    size = int(zero.get("reduce_bucket_size", BUCKET))
    bucket, reduced = element * size, element * min(trained, size)
    copy = FP32 * share if stage < 3 or element < FP32 else 0
    kept = copy + FP32 * -(-parameters.state // ranks)
    if stage < 3:
        # ZeRO 1 reduces after the backward pass, in which all gradients lie until then.
        gradients = element * (trained if stage == 1 else 0 if on_host else share)
        buffers = bucket * (2 if zero.get("overlap_comm") else 1)
        # The rank's own gradients are copied out of the first bucket after that bucket's copy is gone.
        reducing = element * share - bucket if stage == 1 else reduced - (gradients if trained <= size else 0)
        # Before it steps on a group, DeepSpeed makes one tensor of the group's gradients.
        flat = 0 if on_host else FP32 * -(-max(parameters.groups.values(), default=0) // ranks)
        host = kept + 2 * FP32 * share if on_host else 0  # the gradient, and a copy of the weights on their way back
        kept, reducing = 0 if on_host else kept, max(0, reducing, flat - buffers)
        return Held(weights, gradients, kept, buffers, reducing, host, size if stage == 2 else math.inf)
    weights = -(-weights // ranks)
    live = element * min(trained + parameters.frozen, int(zero.get("stage3_max_live_parameters", LIVE)))
    if not on_host:
        return Held(weights, element * share, kept, bucket + live, reduced, bucket=size)
    params_on_host = zero.get("offload_param", {}).get("device") == "cpu"
    host = 2 * FP32 * share + kept + (weights if params_on_host else 0)
    return Held(0 if params_on_host else weights, 0, 0, bucket + live, reduced, host, size)
