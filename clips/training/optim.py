"""The optimizer of a pretraining run, and the engine around it.

- AdamW is torch's, with parameter groups made here (no decay on biases, norms and the logit scale).
- Muon is DeepSpeed's `MuonWithAuxAdam`, since torch's does not work on ZeRO's flat partitions; where ranks hold full
  matrices (ZeRO 0), those of one shape are orthogonalised together (clips/training/muon.py). It is built here
  rather than from a JSON section because DeepSpeed would choose the matrices by name; here exactly the blocks'
  2-D weights get Muon. Its scaling of an update is sqrt(max(1, rows / columns)), torch.optim.Muon's "original".
- Clipping with Muon is refused (clips/config.py): in ZeRO 1-3 DeepSpeed takes the norm after the orthogonalisation.
"""

from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
from torch import nn

from clips.config import ModelConfig, OptimConfig, RunConfig
from clips.engine.engine import Engine
from clips.training.trainer import Task


def parameter_groups(task: Task, optim: OptimConfig) -> list[dict[str, Any]]:
    """Return the parameter groups "muon" (the blocks' matrices), "decay" (other matrices) and "no_decay" (the rest).

    Every trainable parameter is in exactly one group; empty groups are omitted. A name has a group for each `scale`,
    its parameters' share of the learning rate (`optim.layer_decay`). Each parameter is tagged with `use_muon` for
    DeepSpeed's ZeRO optimizers.
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
    """Return how many layers of its tower follow after the parameter `name` of a Task, for `optim.layer_decay`.

    It is 0 for the final norm, the projection and everything outside the towers, and the number of blocks plus one for
    embeddings and positions.
    """
    _, part, *rest = name.split(".")
    if part not in ("visual", "text") or rest[0] in ("norm", "proj"):
        return 0
    layers = model.vision.layers if part == "visual" else model.text.layers
    return layers - int(rest[1]) if rest[0] == "blocks" else layers + 1


def build_optimizer(groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.Optimizer:
    """Return AdamW, or Muon for the group `muon` and AdamW for the others."""
    adam: dict[str, Any] = {"betas": optim.betas, "eps": optim.eps}
    if optim.kind == "adamw":
        return torch.optim.AdamW(groups, **adam, fused=True)
    from clips.training.muon import BatchedMuon  # here, for its import decorates kernels with torch.compile

    for group in groups:
        group["use_muon"] = group["name"] == "muon"
        group.update({"momentum": optim.muon_momentum, "ns_method": "standard"} if group["use_muon"] else adam)
    return BatchedMuon(groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={"fused": True})


def make_engine(task: Task, run: RunConfig, device: torch.device, ds_config: dict[str, Any]) -> Engine:
    """Return the engine of a pretraining run, with its optimizer. Collective."""
    task.model.set_activation_checkpointing(run.train.activation_checkpointing)
    zero = ds_config.get("zero_optimization", {})
    if run.optim.kind == "muon" and zero.get("stage") == 3:
        # DeepSpeed refuses Muon with it, because Muon needs the full gradient.
        ds_config = {**ds_config, "zero_optimization": {**zero, "reduce_scatter": False}}
    engine = Engine(
        task, build_optimizer(parameter_groups(task, run.optim), run.optim), device, ds_config,
        micro_batch=run.phases[0].batch_size // (dist.get_world_size() * run.train.accumulation),
        accumulation=run.train.accumulation, clip_grad=run.optim.clip_grad,
        checkpointed=dict(task.model.named_parameters()),
    )  # fmt: skip
    # Muon's kernels are decorated with torch.compile: on a CPU that is 20 s of C++ for microseconds of work.
    torch._dynamo.config.disable = not run.train.compile
    if run.train.compile:
        task.model.compile_blocks()
    return engine
