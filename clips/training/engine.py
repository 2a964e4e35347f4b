"""DeepSpeed, and everything that must know about it: this is the only file that imports it.

Choices made here, and why
- Weights are fp32 and bf16 is autocast inside the forward pass (clips/training/task.py), so the weights, the optimizer
  state and the temperature are exact in every ZeRO stage.
- AdamW is torch's, with parameter groups made here (no decay on biases, norms and the logit scale). DeepSpeed's
  own Adam would have to be compiled on first use, and decays everything it is given.
- Muon is DeepSpeed's `MuonWithAuxAdam`, the only Muon that works on ZeRO's flat partitions. It is built here
  rather than from a JSON section because DeepSpeed would choose the matrices by name; here exactly the blocks'
  2-D weights get Muon. Its scaling of an update is sqrt(max(1, rows / columns)), torch.optim.Muon's "original".
- Clipping with Muon is refused (clips/config.py): in ZeRO 1-3 DeepSpeed takes the norm after the orthogonalisation.
- A checkpoint is gathered by parameter name instead of DeepSpeed's own per-rank pickles: it holds no code,
  does not depend on the number of ranks or the ZeRO stage, and is exact because everything is fp32.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor, nn

from clips.common.errors import NotFiniteError, UserError
from clips.common.runtime import import_deepspeed
from clips.config import OptimConfig, RunConfig
from clips.model.clips import CLIPS, MAX_LOGIT_SCALE
from clips.training.task import Task

ADAM_STATE = ("exp_avg", "exp_avg_sq")
MUON_STATE = ("momentum_buffer",)
DEFAULT_DS_CONFIG = {"zero_optimization": {"stage": 0}}


def parameter_groups(task: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Who is optimised how: "muon" (the blocks' matrices), "decay" (other matrices), "no_decay" (the rest).

    Every trainable parameter is in exactly one group; empty groups are left out. Each parameter is
    tagged with `use_muon`, which DeepSpeed's ZeRO optimizers read.
    """
    members: dict[str, list[nn.Parameter]] = {"muon": [], "decay": [], "no_decay": []}
    for name, parameter in task.named_parameters():
        if not parameter.requires_grad:
            continue
        in_block = ".blocks." in name and parameter.ndim == 2
        parameter.use_muon = optim.kind == "muon" and in_block
        # Positions and the CLS token carry no decay in the reference either; they are not 2-D weights of a map.
        decays = parameter.ndim >= 2 and not name.endswith(("pos_embed", "queries"))
        members["muon" if parameter.use_muon else "decay" if decays else "no_decay"].append(parameter)
    groups = []
    for name, parameters in members.items():
        if parameters:
            decay = 0.0 if name == "no_decay" else optim.weight_decay
            groups.append({"name": name, "params": parameters, "lr": 0.0, "weight_decay": decay})
    return groups


def build_optimizer(groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.Optimizer:
    adam = {"betas": optim.betas, "eps": optim.eps}
    if optim.kind == "adamw":
        return torch.optim.AdamW(groups, **adam, fused=True)
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    for group in groups:
        group["use_muon"] = group["name"] == "muon"
        group.update({"momentum": optim.muon_momentum, "ns_method": "standard"} if group["use_muon"] else adam)
    return MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={"fused": True})


def read_ds_config(path: str | None) -> dict[str, Any]:
    """The engine settings of `--ds-config`; keys that belong to the RunConfig are refused."""
    if path is None:
        return json.loads(json.dumps(DEFAULT_DS_CONFIG))
    try:
        config = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--ds-config {path} is not a readable JSON file: {error}") from None
    ours = {
        "train_batch_size": "phase batch_size",
        "train_micro_batch_size_per_gpu": "phase batch_size",
        "gradient_accumulation_steps": "train.accumulation",
        "gradient_clipping": "optim.clip_grad",
        "optimizer": "optim",
        "scheduler": "the phases",
        "bf16": "train.precision",
        "fp16": "train.precision",
    }
    taken = [f"{key} (set by {ours[key]})" for key in config if key in ours]
    if taken:
        raise UserError(f"--ds-config {path} holds settings that belong to the run configuration: {', '.join(taken)}")
    return config


class Engine:
    """The DeepSpeed engine around a Task: backward, finite check, step, gather and restore."""

    def __init__(self, task: Task, run: RunConfig, device: torch.device, ds_config: dict[str, Any]) -> None:
        deepspeed = import_deepspeed()
        self.run = run
        self.world_size = dist.get_world_size()
        self.accumulation = run.train.accumulation
        task.model.set_activation_checkpointing(run.train.activation_checkpointing)
        self.names = {name: parameter for name, parameter in task.model.named_parameters()}
        self.groups = parameter_groups(task, run.optim)
        self.group_of = {id(p): g["name"] for g in self.groups for p in g["params"]}
        self.split = {g["name"]: (len(g["params"]), sum(p.numel() for p in g["params"])) for g in self.groups}
        zero = ds_config.get("zero_optimization", {})
        if run.optim.kind == "muon" and zero.get("stage") == 3:
            zero["reduce_scatter"] = False  # DeepSpeed refuses Muon with it: the full gradient is needed
        config = ds_config | {
            "train_micro_batch_size_per_gpu": run.phases[0].batch_size // (self.world_size * self.accumulation),
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": run.optim.clip_grad,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
            "timers": {"throughput": {"enabled": False}},  # it would synchronise the device in every micro-batch
        }
        task.to(device)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=task,
            optimizer=build_optimizer(self.groups, run.optim),
            config=config,
            dist_init_required=False,
        )
        self.stage = self.engine.zero_optimization_stage()
        if self.stage == 0 and self.world_size == 1:
            # Nothing to reduce; DeepSpeed would copy every gradient into buckets and back (72 ms a step at 38 M).
            self.engine.enable_backward_allreduce = False
        self.device = device
        self._whole_grad_norm: Tensor | None = None
        self._create_optimizer_state(steps=0)
        # Muon's kernels are decorated with torch.compile: on a CPU that is 20 s of C++ for microseconds of work.
        torch._dynamo.config.disable = not run.train.compile
        if run.train.compile:
            self.engine.compile()

    def __call__(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.engine(batch)

    @property
    def model(self) -> nn.Module:
        return self.engine.module.model

    def set_lr(self, lr: float, muon_lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = muon_lr if group["name"] == "muon" else lr

    def to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {k: v.to(self.device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients; DeepSpeed divides by the accumulation steps and reduces at the boundary."""
        self.engine.backward(loss)

    def step(self) -> None:
        """Called after each micro-batch; DeepSpeed acts at the accumulation boundary only.

        NotFiniteError where DeepSpeed skips a step: with offload it sees a gradient that `agree` does not hold.
        """
        is_boundary = self.engine.is_gradient_accumulation_boundary()
        self.engine.step()
        if is_boundary and not self.engine.was_step_applied():
            raise NotFiniteError("a gradient is not finite; DeepSpeed left this step out and no weight was changed")

    def grad_norm(self) -> float | None:
        """Norm of the last step's gradient over all parameters; with Muon in ZeRO 1-3, of its update (see the top)."""
        norm = self._whole_grad_norm if self.stage == 0 else self.engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def agree(self, loss: Tensor, stop: bool) -> tuple[bool, bool]:
        """(everything finite, somebody wants to stop), the same on every rank; between the last backward and the step.

        Looks at the loss and at every gradient that this rank holds. DeepSpeed itself would let non-finite
        gradients into fp32 weights.
        """
        if self.stage == 0:
            grads = [p.grad for p in self.names.values() if p.grad is not None]
        elif self.optimizer.cpu_offload if self.stage < 3 else self.optimizer.offload_optimizer:
            flats = self.optimizer.single_partition_of_fp32_groups if self.stage < 3 else []
            grads = [flat.grad for flat in flats if flat.grad is not None]
        else:
            held = self.optimizer.averaged_gradients.values()
            grads = [grad for part in held if part is not None for grad in part if grad is not None]
        total = loss.detach().float()
        if grads:
            norm = torch.stack([part.to(self.device) for part in torch._foreach_norm(grads)]).norm()
            self._whole_grad_norm = norm if self.stage == 0 else None
            total = total + norm
        flags = torch.stack([(~torch.isfinite(total)).float(), total.new_tensor(float(stop))])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        broken, stopping = flags.tolist()
        return broken == 0, stopping > 0

    @torch.no_grad()
    def limit_logit_scale(self) -> None:
        """After a step, put the temperature back to its limit where it went beyond.

        The forward pass clamps, which stops the gradient there: left above the limit it could never come back.
        Clamped is whatever this rank holds of it, the value that computes and its fp32 master: DeepSpeed's setters
        change the latter only.
        """
        parameter = self.names["logit_scale"]
        held = [parameter.data]
        if self.stage == 3:
            from deepspeed.utils import safe_get_local_fp32_param

            held += [parameter.ds_tensor.data, safe_get_local_fp32_param(parameter)]
        elif self.stage > 0 and parameter._hp_mapping is not None:
            held.append(parameter._hp_mapping.hp_fragment)
        for value in held:
            value.clamp_(max=math.log(MAX_LOGIT_SCALE))

    def plain_model(self) -> CLIPS | None:
        """A copy of the model outside DeepSpeed on rank 0, None elsewhere, for evaluation and export. Collective."""
        weights = self.gather_weights()
        if dist.get_rank() != 0:
            return None
        model = CLIPS(self.run.model, self.model.text.pad_id)
        model.load_state_dict(weights)
        return model.to(self.device).eval()

    # Checkpoint state: by parameter name, independent of ranks and of the ZeRO stage.

    def gather_weights(self) -> dict[str, Tensor]:
        """Weights by name on the CPU of rank 0, empty elsewhere. Collective."""
        from deepspeed.utils import safe_get_full_fp32_param

        weights = {}
        for name, parameter in self.names.items():
            full = parameter.data if self.stage == 0 else safe_get_full_fp32_param(parameter)
            if dist.get_rank() == 0:
                weights[name] = full.detach().to("cpu", copy=True)
        return weights

    def gather_optimizer(self) -> dict[str, Tensor]:
        """Optimizer state as `name/key` on the CPU of rank 0, empty elsewhere. Collective."""
        state = {}
        for name, parameter in self.names.items():
            for key in self._state_keys(parameter):
                full = self._get_state(parameter, key)
                if dist.get_rank() == 0:
                    state[f"{name}/{key}"] = full.detach().to("cpu", copy=True)
        return state

    def restore_optimizer(self, state: dict[str, Tensor], steps: int) -> None:
        """Put the state of `gather_optimizer` back after `steps` optimizer steps; every rank passes all of it.

        The weights are not restored here: they are loaded into the model before the engine is built.
        """
        self._create_optimizer_state(steps)
        for name, parameter in self.names.items():
            for key in self._state_keys(parameter):
                self._set_state(parameter, key, state[f"{name}/{key}"].to(self.device))

    def _is_muon(self, parameter: nn.Parameter) -> bool:
        return self.group_of[id(parameter)] == "muon"

    def _state_keys(self, parameter: nn.Parameter) -> tuple[str, ...]:
        return MUON_STATE if self._is_muon(parameter) else ADAM_STATE

    def _get_state(self, parameter: nn.Parameter, key: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        if self.stage == 0:
            return self.optimizer.state[parameter][key]
        if not self._keeps_whole_momenta(parameter):
            return safe_get_full_optimizer_state(parameter, key)
        full = torch.zeros_like(parameter)
        momentum, is_owner = self._whole_momentum(parameter)
        if is_owner:
            full.copy_(momentum)
        dist.all_reduce(full)
        return full

    def _set_state(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.stage == 0:
            self.optimizer.state[parameter][key].copy_(value)
        elif self.stage == 3:
            # Equal parts, the last one padded past the end (DeepSpeed's setter of whole values fails on that).
            flat = nn.functional.pad(value.flatten(), (0, -value.numel() % self.world_size))
            safe_set_local_optimizer_state(parameter, flat.chunk(self.world_size)[dist.get_rank()], key)
        elif self._keeps_whole_momenta(parameter):
            momentum, _ = self._whole_momentum(parameter)
            if momentum is not None:
                momentum.copy_(value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def _keeps_whole_momenta(self, parameter: nn.Parameter) -> bool:
        """ZeRO-1/2 without offload keeps Muon's momentum of a matrix whole on every rank that holds a part of it."""
        return self.stage in (1, 2) and self._is_muon(parameter) and not self.optimizer.cpu_offload

    def _whole_momentum(self, parameter: nn.Parameter) -> tuple[Tensor | None, bool]:
        """This rank's copy of the momentum of `parameter`, or None, and whether this rank speaks for it."""
        optimizer = self.optimizer
        for i, group in enumerate(optimizer.params_in_partition):
            offset = 0
            for j, member in enumerate(group):
                if member is parameter:
                    flat = optimizer.optimizer.state[optimizer.single_partition_of_fp32_groups[i]]["momentum_buffer"]
                    starts_here = j > 0 or optimizer.first_offset[i] == 0
                    return flat.narrow(0, offset, member.numel()).view_as(member), starts_here
                offset += member.numel()
        return None, False

    def _create_optimizer_state(self, steps: int) -> None:
        """Zero state after `steps` optimizer steps, made before the first step instead of during it.

        ZeRO-3 otherwise spends a dummy step on it, which shifts Adam's bias correction, and ZeRO-1/2 link only
        the first group's state to the parameters (DeepSpeed 0.19.8), so that the others cannot be gathered.
        """
        if self.stage == 0:
            inner, tensors = self.optimizer, [(p, [p]) for p in self.names.values()]
        elif self.stage == 3:
            inner = self.optimizer.optimizer
            tensors = zip(self.optimizer.fp32_partitioned_groups_flat, self.optimizer.fp16_groups, strict=True)
        else:
            inner = self.optimizer.optimizer
            tensors = zip(self.optimizer.single_partition_of_fp32_groups, self.optimizer.bit16_groups, strict=True)
        for i, (flat, members) in enumerate(tensors):
            state = inner.state[flat]
            for key in self._state_keys(members[0]):
                state[key] = torch.zeros_like(flat)
            if self._keeps_whole_momenta(members[0]):
                state["momentum_buffer"] = flat.new_zeros(sum(p.numel() for p in self.optimizer.params_in_partition[i]))
            if not self._is_muon(members[0]):
                state["step"] = torch.tensor(float(steps), device=flat.device)
        if self.stage in (1, 2):
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()
