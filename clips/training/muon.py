"""Muon's step on full matrices, those of one shape together, so that many small products become a few large ones.

DeepSpeed's optimizer orthogonalises one matrix after the other, as ZeRO 1 to 3 need, whose ranks hold parts of them.
In ZeRO 0 every rank has all matrices at once, so each rank orthogonalises a share of them. The Newton–Schulz iteration
is DeepSpeed's, in the precision that it chooses.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
from deepspeed.runtime.zero.muon.original_muon import zeropower_via_newtonschulz5
from torch import Tensor

AT_ONCE = 2**24
"""Largest number of elements of the matrices that are orthogonalised together; it bounds the memory."""


class BatchedMuon(MuonWithAuxAdam):
    """DeepSpeed's Muon with AdamW for the other parameters; matrices of one shape are orthogonalised together."""

    param_groups: list[dict[str, Any]]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, step_id: Any = None) -> Any:
        """Update all parameters. Collective under ZeRO 0, where each rank orthogonalises a share of the matrices."""
        groups = self.param_groups  # ZeRO 1 and 2 put one group at a time in their place
        full = [group for group in groups if group["use_muon"] and all(p.ndim == 2 for p in group["params"])]
        for group in full:
            shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for matrix in group["params"]:
                shapes[matrix.shape].append(matrix)
            for shape, matrices in shapes.items():
                count = max(1, AT_ONCE // shape.numel())
                for first in range(0, len(matrices), count):
                    self._step_equal(matrices[first : first + count], group)
        self.param_groups = [group for group in groups if all(group is not done for done in full)]
        try:  # AdamW's, and flat parts of matrices that ZeRO orthogonalised before
            return super().step(closure, step_id)
        finally:
            self.param_groups = groups

    def _step_equal(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        """Take one step on matrices [rows, columns] of one shape."""
        beta, lr = group["momentum"], group["lr"]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in matrices]
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        momenta = [self.state[p]["momentum_buffer"] for p in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - beta)
        nesterov = torch.stack(torch._foreach_lerp(gradients, momenta, beta))
        rows, columns = matrices[0].shape
        # Scaled in the precision of the iteration, as DeepSpeed does it: the stages agree to the last bit.
        updates = _orthogonalised(nesterov).mul_(math.sqrt(max(1, rows / columns)))
        torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
        torch._foreach_add_(matrices, list(updates.to(nesterov.dtype).unbind()), alpha=-lr)


def _orthogonalised(matrices: Tensor) -> Tensor:
    """Orthogonalise [n, rows, columns], equal on all ranks. Each rank does a share, and all get the results."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks == 1:
        return zeropower_via_newtonschulz5(matrices, steps=5)
    share = -(-len(matrices) // ranks)
    mine = matrices[dist.get_rank() * share :][:share]
    padded = torch.cat([mine, mine.new_zeros(share - len(mine), *mine.shape[1:])])  # the last ranks may have fewer
    local = zeropower_via_newtonschulz5(padded, steps=5).contiguous()
    everywhere = local.new_empty(ranks * share, *local.shape[1:])
    dist.all_gather(list(everywhere.chunk(ranks)), local)
    return everywhere[: len(matrices)]
