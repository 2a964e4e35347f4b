"""The wrapper around DeepSpeed's engine: a Task, its optimizer, and what the loop asks of them.

Choices made here, and why
- Weights are fp32 and bf16 is autocast inside the forward pass (clips/training/task.py), so the weights, the optimizer
  state and the temperature are exact in every ZeRO stage.
- AdamW is torch's, with parameter groups made here (no decay on biases, norms and the logit scale). DeepSpeed's
  own Adam would have to be compiled on first use, and decays everything it is given.
- Muon is DeepSpeed's `MuonWithAuxAdam`, since torch's does not work on ZeRO's flat partitions; where matrices are whole
  (ZeRO 0), those of one shape are orthogonalised together (clips/training/muon.py). It is built here
  rather than from a JSON section because DeepSpeed would choose the matrices by name; here exactly the blocks'
  2-D weights get Muon. Its scaling of an update is sqrt(max(1, rows / columns)), torch.optim.Muon's "original".
- Clipping with Muon is refused (clips/config.py): in ZeRO 1-3 DeepSpeed takes the norm after the orthogonalisation.
- A checkpoint is gathered by parameter name (clips/training/zero_state.py) instead of DeepSpeed's own per-rank
  pickles: it holds no code, does not depend on the number of ranks or the ZeRO stage, and is exact.

DeepSpeed is imported by three files only: muon.py and zero_state.py beside this one, and clips/common/runtime.py,
which switches off what would be compiled.
"""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any, NamedTuple

import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor, nn

from clips.common.errors import NotFiniteError, UserError
from clips.common.files import from_json, read_bytes
from clips.common.runtime import import_deepspeed
from clips.common.signals import STOP_SIGNALS
from clips.config import ModelConfig, OptimConfig, RunConfig
from clips.model.clips import MAX_LOGIT_SCALE, CLIPSModel, Outputs
from clips.training.task import Part, Task
from clips.training.zero_state import ZeroState

DEFAULT_DS_CONFIG = {"zero_optimization": {"stage": 0}}
OF_THE_RUN = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("optimizer", "scheduler", "bf16", "fp16"),
)
"""DeepSpeed's settings that the run configuration decides."""


def parameter_groups(task: Task, optim: OptimConfig) -> list[dict[str, Any]]:
    """Who is optimised how: "muon" (the blocks' matrices), "decay" (other matrices), "no_decay" (the rest).

    Every trainable parameter is in exactly one group; empty groups are left out. A name has a group for each `scale`,
    its parameters' share of the learning rate (`optim.layer_decay`). Each parameter is tagged with `use_muon`, which
    DeepSpeed's ZeRO optimizers read.
    """
    members: dict[str, dict[float, list[nn.Parameter]]] = {"muon": {}, "decay": {}, "no_decay": {}}
    parameter: Any  # nn.Parameter knows of no `use_muon`
    for name, parameter in task.named_parameters():
        if not parameter.requires_grad:
            continue
        in_block = ".blocks." in name and parameter.ndim == 2
        parameter.use_muon = optim.kind == "muon" and in_block
        # Positions, queries and the CLS token carry no decay in the reference either: they are no weights of a map.
        undecayed = ("pos_embed", "queries") + (() if optim.decay_embeddings else ("token_embed.weight",))
        decays = parameter.ndim >= 2 and not name.endswith(undecayed)
        kind = "muon" if parameter.use_muon else "decay" if decays else "no_decay"
        scale = optim.layer_decay ** layers_above(name, task.model.config)
        members[kind].setdefault(scale, []).append(parameter)
    groups = []
    for name, by_scale in members.items():
        decay = 0.0 if name == "no_decay" else optim.weight_decay
        for scale, parameters in by_scale.items():
            groups.append({"name": name, "params": parameters, "lr": 0.0, "scale": scale, "weight_decay": decay})
    return groups


def layers_above(name: str, model: ModelConfig) -> int:
    """How many layers of its tower lie above a parameter of a Task: 0 for the final norm, the projection and all that
    is in no tower; all blocks and one more for embeddings and positions."""
    _, part, *rest = name.split(".")
    if part not in ("visual", "text") or rest[0] in ("norm", "proj"):
        return 0
    layers = model.vision.layers if part == "visual" else model.text.layers
    return layers - int(rest[1]) if rest[0] == "blocks" else layers + 1


def build_optimizer(groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.Optimizer:
    adam: dict[str, Any] = {"betas": optim.betas, "eps": optim.eps}
    if optim.kind == "adamw":
        return torch.optim.AdamW(groups, **adam, fused=True)
    from clips.training.muon import BatchedMuon  # here, for its import decorates kernels with torch.compile

    for group in groups:
        group["use_muon"] = group["name"] == "muon"
        group.update({"momentum": optim.muon_momentum, "ns_method": "standard"} if group["use_muon"] else adam)
    return BatchedMuon(groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={"fused": True})


def read_ds_config(path: str | None) -> dict[str, Any]:
    """The engine settings of `--ds-config`; keys that belong to the RunConfig are refused."""
    if path is None:
        return json.loads(json.dumps(DEFAULT_DS_CONFIG))
    try:
        config = from_json(read_bytes(path))
    except (OSError, ValueError) as error:
        raise UserError(f"--ds-config {path} is not a readable JSON file: {error}") from None
    if taken := [key for key in config if key in OF_THE_RUN]:
        raise UserError(f"--ds-config {path} holds {', '.join(taken)}, which the run configuration sets (--set)")
    return config


class Agreed(NamedTuple):
    """What every rank knows of a step before it is taken; the same figures, bit for bit, on every rank."""

    finite: bool
    """Every loss and gradient."""
    stopping: int
    """Number of the signal that somebody was asked to stop by, the highest one; 0 for none."""
    unsaved: bool
    """A checkpoint could not be written."""
    loss: float
    """Mean over ranks."""
    grad_norm: float | None
    """Norm of the gradient of the parameters that AdamW steps, before clipping; None where there is none to be seen.
    Muon's are left out: the size of its update does not depend on the gradient's, nor is that at hand in ZeRO 1 and 2.
    """


class Engine:
    """The DeepSpeed engine around a Task: backward, finite check, step, gather and restore."""

    def __init__(self, task: Task, run: RunConfig, device: torch.device, ds_config: dict[str, Any]) -> None:
        deepspeed = import_deepspeed()
        self.run = run
        self.world_size = dist.get_world_size()
        self.accumulation = run.train.accumulation
        task.model.set_activation_checkpointing(run.train.activation_checkpointing)
        groups = parameter_groups(task, run.optim)
        # Now: DeepSpeed puts its flat tensors in the place of the groups' parameters.
        muon = {id(p) for group in groups if group["name"] == "muon" for p in group["params"]}
        sizes: dict[str, list[int]] = {}
        for group in groups:
            sizes.setdefault(group["name"], []).extend(p.numel() for p in group["params"])
        zero = ds_config.get("zero_optimization", {})
        if run.optim.kind == "muon" and zero.get("stage") == 3:
            zero["reduce_scatter"] = False  # DeepSpeed refuses Muon with it: the full gradient is needed
        config = ds_config | {
            "train_micro_batch_size_per_gpu": run.phases[0].batch_size // (self.world_size * self.accumulation),
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": run.optim.clip_grad,
            "zero_allow_untested_optimizer": True,  # DeepSpeed's word for torch's AdamW with groups of our own
            "zero_force_ds_cpu_optimizer": False,  # its CPU Adam would be compiled for offload
            "steps_per_print": 10**9,  # clips/training/log.py prints
            "timers": {"throughput": {"enabled": False}},  # it would synchronise the device in every micro-batch
        }
        task.to(device)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=task, optimizer=build_optimizer(groups, run.optim), config=config, dist_init_required=False
        )
        self.state = ZeroState(self.engine, dict(task.model.named_parameters()), muon, device)
        """The sharded state: to gather for a checkpoint, and to restore from one."""
        self.stage, self.device = self.state.stage, device
        self.facts = {
            "zero_stage": self.stage,
            "parameter_groups": {name: {"tensors": len(s), "parameters": sum(s)} for name, s in sizes.items()},
        }
        """What env.json tells of the engine."""
        # Muon's kernels are decorated with torch.compile: on a CPU that is 20 s of C++ for microseconds of work.
        torch._dynamo.config.disable = not run.train.compile
        if run.train.compile:
            task.model.compile_blocks()

    def __call__(self, batch: dict[str, Any], part: Part | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        return self.engine(batch, part)

    @torch.no_grad()
    def features(self, batch: dict[str, Any]) -> Outputs:
        """The model's outputs for `batch`, without a graph and without the captioner. Collective in ZeRO-3."""
        return self.engine(batch, features_only=True)

    @property
    def task(self) -> Task:
        return self.engine.module

    @property
    def model(self) -> CLIPSModel:
        return self.task.model

    def set_lr(self, lr: float, muon_lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = (muon_lr if group["name"] == "muon" else lr) * group["scale"]

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients; DeepSpeed divides by the accumulation steps and reduces at the boundary."""
        self.engine.backward(loss)

    def step(self, *, leave_out: bool = False) -> None:
        """Called after each micro-batch; DeepSpeed acts at the accumulation boundary only.

        `leave_out`: the gradients are dropped, and weights and optimizer state stay as they are.
        NotFiniteError where DeepSpeed skips a step: with offload it sees a gradient that `agree` does not hold.
        """
        is_boundary = self.engine.is_gradient_accumulation_boundary()
        with self.state.leaving_out() if leave_out else contextlib.nullcontext():
            self.engine.step()
        if is_boundary and not leave_out and not self.engine.was_step_applied():
            raise NotFiniteError("a gradient is not finite; DeepSpeed left this step out and no weight was changed")

    def agree(self, loss: Tensor, stop: int, unsaved: bool = False) -> Agreed:
        """What all ranks know of the step; between the last backward and the step. Collective, the step's only sync.

        `loss`: this rank's mean over the step's micro-batches. Looks at it and at every gradient that this rank
        holds. DeepSpeed itself would let non-finite gradients into fp32 weights. `stop`: number of the signal that
        this rank got, 0 for none; `unsaved`: a checkpoint could not be written here.
        """
        zero = loss.new_zeros((), dtype=torch.float32)
        adamw, muon = (
            torch.stack([norm.to(self.device) for norm in torch._foreach_norm(part)]).norm() if part else zero
            for part in self.state.gradients()
        )
        loss = loss.detach().float()
        broken = ~torch.isfinite(loss + adamw + muon)
        square = adamw.double().square()
        if self.stage == 0:
            square = square / self.world_size  # every rank holds the whole gradient
        signals = square.new_tensor([unsaved, *(stop == number for number in STOP_SIGNALS)])
        sums = torch.cat([torch.stack([broken.double(), loss.double(), square]), signals])
        dist.all_reduce(sums)
        broken_ranks, total, squares, unsaved_ranks, *stops = sums.tolist()
        return Agreed(
            finite=broken_ranks == 0,
            stopping=max((n for n, ranks in zip(STOP_SIGNALS, stops, strict=True) if ranks), default=0),
            unsaved=unsaved_ranks > 0,
            loss=total / self.world_size,
            grad_norm=math.sqrt(squares) if squares > 0 else None,
        )

    @torch.no_grad()
    def limit_logit_scale(self) -> None:
        """After a step, put the temperature back to its limit where it went beyond.

        The forward pass clamps, which stops the gradient there: left above the limit it could never come back.
        """
        for held in self.state.copies("logit_scale"):
            held.clamp_(max=math.log(MAX_LOGIT_SCALE))

    def plain_model(self, *, everywhere: bool = False) -> CLIPSModel | None:
        """A copy of the model outside DeepSpeed, for evaluation and export; None but on rank 0 or `everywhere`.

        Collective.
        """
        weights = self.state.gather_weights(everywhere=everywhere)
        if not weights:
            return None
        model = CLIPSModel(self.run.model, self.model.pad_id)
        model.load_state_dict(weights)
        return model.to(self.device).eval()
