"""The wrapper around DeepSpeed's engine: a model with its loss, its optimizer, and what the loop asks of them.

Choices made here, and why
- Where weights are fp32, bf16 is autocast inside the module's forward pass, so the weights and the optimizer state are
  exact in every ZeRO stage. With `bf16_weights` they are bf16, and ZeRO keeps fp32 masters: a language model of 7B does
  not fit otherwise.
- Optimizers are torch's, with parameter groups of the run's own. DeepSpeed's own Adam would have to be compiled on
  first use, and decays everything it is given.
- A checkpoint is gathered by parameter name (clips/engine/zero_state.py) instead of DeepSpeed's own per-rank pickles:
  it holds no code, does not depend on the number of ranks or the ZeRO stage, and is exact.

DeepSpeed is imported by four files: this one, zero_state.py, clips/training/muon.py, and clips/common/runtime.py, which
switches off what would be compiled.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clips.common.errors import NotFiniteError, UserError
from clips.common.files import from_json, read_bytes
from clips.common.runtime import import_deepspeed
from clips.common.signals import STOP_SIGNALS
from clips.engine.zero_state import ZeroState, partition

Batch = dict[str, Any]
OF_THE_TRAINING = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("optimizer", "scheduler", "bf16", "fp16"),
)
"""DeepSpeed's settings that the run's own configuration or flags decide."""


def read_ds_config(path: str | Path | None, flag: str) -> dict[str, Any]:
    """Return DeepSpeed's settings in the file that `flag` names, or none without a file (ZeRO 0).

    Raises UserError for an unreadable file or one of another form, and for a setting of OF_THE_TRAINING that is not
    left "auto".
    """
    if path is None:
        return {}
    try:
        config = from_json(read_bytes(path))
        if not isinstance(config, dict) or not isinstance(config.get("zero_optimization", {}), dict):
            raise ValueError("expected an object of DeepSpeed's settings, with another in zero_optimization")
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {path} is not a readable JSON file: {error}") from None
    if taken := [name for name in OF_THE_TRAINING if not _is_auto(config.pop(name, "auto"))]:
        raise UserError(f"{flag} {path} holds {', '.join(taken)}, which the run's own settings decide: leave them out")
    return config


def _is_auto(value: Any) -> bool:
    """Return True if a setting or section leaves its choice open, as in LLaVA's files."""
    if not isinstance(value, dict):
        return value == "auto"
    choices = {"enabled": value["enabled"]} if "enabled" in value else value.get("params") or {}
    return value.get("type", "AdamW") in ("AdamW", "WarmupLR") and all(_is_auto(choice) for choice in choices.values())


class Objective(nn.Module):
    """A model with its loss as one module, because DeepSpeed wraps a forward pass that ends in the loss.

    `forward(batch, shared)` turns a micro-batch on the device into (loss, detached loss terms with the "loss" to log).
    `shared` is what `Trainer.shared_inputs` (clips/engine/loop.py) returns for this micro-batch. The engine averages
    losses over the micro-batches of a step and over the ranks.
    """

    def to_device(self, batch: Batch, device: torch.device) -> Batch:
        """Return a micro-batch of the loader with its tensors on `device`."""
        return {name: x.to(device, non_blocking=True) if torch.is_tensor(x) else x for name, x in batch.items()}


class Reduced(NamedTuple):
    """What the ranks know of a step before it is taken; the values are equal, bit for bit, on every rank."""

    finite: bool
    """True if every loss and gradient is finite."""
    stopping: int
    """Number of the signal that asked a rank to stop, the highest one of several; 0 for none."""
    unsaved: bool
    """True if a checkpoint could not be written."""
    loss: float
    """Mean over ranks."""
    grad_norm: float | None
    """Norm of the gradient of the parameters that AdamW updates, before clipping; None if it is zero, NaN or, as in
    ZeRO-3 with offload, not visible. Muon's parameters are not included: the size of Muon's update does not depend on
    the gradient, and ZeRO 1 and 2 do not keep it.
    """


class Engine:
    """The DeepSpeed engine around an objective: backward, finite check, step, gather and restore."""

    def __init__(
        self,
        module: Objective,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        ds_config: Mapping[str, Any],
        *,
        micro_batch: int,
        accumulation: int = 1,
        clip_grad: float = 0.0,
        bf16_weights: bool = False,
        checkpointed: Mapping[str, nn.Parameter],
    ) -> None:
        """Wrap `module`.

        Args:
            optimizer: Its groups have a "name", and may have a "scale" of their learning rate.
            ds_config: DeepSpeed's settings other than those that are set here.
            micro_batch: Samples per micro-batch and rank.
            clip_grad: The norm to which gradients are clipped; 0: no clipping.
            bf16_weights: Compute with bf16 weights; needs a ZeRO stage above 0, because that keeps fp32 masters.
            checkpointed: Parameters by their name in a checkpoint.
        """
        deepspeed = import_deepspeed()
        self.world_size, self.accumulation, self.device = dist.get_world_size(), accumulation, device
        sizes: dict[str, list[int]] = {}
        for group in optimizer.param_groups:
            sizes.setdefault(group["name"], []).extend(p.numel() for p in group["params"])
        # Before DeepSpeed replaces the groups' parameters by its flat tensors.
        muon = {id(p) for group in optimizer.param_groups if group["name"] == "muon" for p in group["params"]}
        config = {
            **ds_config,
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": clip_grad,
            "bf16": {"enabled": bf16_weights},
            "zero_allow_untested_optimizer": True,  # DeepSpeed's word for torch's AdamW with groups of our own
            "zero_force_ds_cpu_optimizer": False,  # its CPU Adam would be compiled for offload
            "steps_per_print": 10**9,  # clips/engine/log.py prints
            "timers": {"throughput": {"enabled": False}},  # it would synchronise the device in every micro-batch
        }
        if config.get("zero_optimization", {}).get("stage") == 3:
            partition(module, config, torch.bfloat16 if bf16_weights else None)
        module.to(device)
        if bf16_weights:  # the user asked for them, also where import_deepspeed keeps Muon's products in fp32
            vars(deepspeed.accelerator.get_accelerator()).pop("is_bf16_supported", None)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, dist_init_required=False
        )
        self.zero_state = ZeroState(self.engine, checkpointed, muon, device)
        """The sharded state; it is gathered for a checkpoint and restored from one."""
        self.zero_stage = self.zero_state.stage
        self.facts = {
            "zero_stage": self.zero_stage,
            "parameter_groups": {name: {"tensors": len(s), "parameters": sum(s)} for name, s in sizes.items()},
        }
        """What env.json records about the engine."""

    def __call__(self, batch: Batch, shared: Any = None, **options: Any) -> Any:
        """Return the output of the module's forward pass for a micro-batch of the loader."""
        return self.engine(self.module.to_device(batch, self.device), shared, **options)

    @property
    def module(self) -> Any:
        """The `Objective` that is trained, with the model in it."""
        return self.engine.module

    def set_rates(self, rates: Mapping[str, float]) -> None:
        """Set the learning rate of each parameter group by its name."""
        for group in self.optimizer.param_groups:
            group["lr"] = rates[group["name"]] * group.get("scale", 1.0)

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Accumulate gradients; after the `last` micro-batch of a step they are reduced over the ranks."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)

    def step(self, *, skip: bool = False) -> None:
        """Update the weights, once all micro-batches of the step have passed.

        With `skip` the gradients are dropped, and weights and optimizer state stay as they are. Raises NotFiniteError
        if DeepSpeed itself skips the step, because with offload it sees gradients that `agree` does not.
        """
        with self.zero_state.skipping() if skip else contextlib.nullcontext():
            self.engine.step()
        if not skip and not self.engine.was_step_applied():
            raise NotFiniteError("a gradient is not finite; DeepSpeed skipped this step and no weight was changed")

    def agree(self, loss: Tensor, stop: int, unsaved: bool = False) -> Reduced:
        """Reduce what all ranks must know before the step is taken. Collective; the only synchronisation of a step.

        `loss` is this rank's mean over the step's micro-batches. It is checked together with every gradient that this
        rank holds, because DeepSpeed itself would let non-finite gradients into fp32 weights. `stop` is the number of
        the signal that this rank received, or 0, and `unsaved` says that a checkpoint could not be written here.
        """
        zero = loss.new_zeros((), dtype=torch.float32)

        def norm_of(gradients: list[Tensor]) -> Tensor:
            norms = torch._foreach_norm(gradients, dtype=torch.float32) if gradients else [zero]
            return torch.stack([norm.to(self.device) for norm in norms]).norm()

        adamw, muon = map(norm_of, self.zero_state.gradients())
        loss = loss.detach().float()
        broken = ~torch.isfinite(loss + adamw + muon)
        square = adamw.double().square()
        if self.zero_stage == 0:
            square = square / self.world_size  # every rank holds the whole gradient
        signals = square.new_tensor([unsaved, *(stop == number for number in STOP_SIGNALS)])
        sums = torch.cat([torch.stack([broken.double(), loss.double(), square]), signals])
        dist.all_reduce(sums)
        broken_ranks, total, squares, unsaved_ranks, *stops = sums.tolist()
        return Reduced(
            finite=broken_ranks == 0,
            stopping=max((n for n, ranks in zip(STOP_SIGNALS, stops, strict=True) if ranks), default=0),
            unsaved=unsaved_ranks > 0,
            loss=total / self.world_size,
            grad_norm=math.sqrt(squares) if squares > 0 else None,
        )
