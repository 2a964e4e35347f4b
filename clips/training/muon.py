"""Muon's step on whole matrices, those of one shape together: many small products become a few large ones.

DeepSpeed's optimizer orthogonalises one matrix after the other, which is what ZeRO 1 to 3 need, whose ranks hold parts.
In ZeRO 0 all matrices are there at once. The Newton–Schulz iteration is DeepSpeed's, in the precision that it chooses.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
from deepspeed.runtime.zero.muon.original_muon import zeropower_via_newtonschulz5
from torch import Tensor

AT_ONCE = 2**24
"""Most elements of the matrices that are orthogonalised together, which bounds the memory that it takes."""


class BatchedMuon(MuonWithAuxAdam):
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, step_id: Any = None) -> Any:
        groups = [group for group in self.param_groups if group["use_muon"]]
        if any(p.ndim < 2 for group in groups for p in group["params"]):  # ZeRO's flat parts, orthogonalised before
            return super().step(closure, step_id)
        for group in groups:
            shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for matrix in group["params"]:
                shapes[matrix.shape].append(matrix)
            for shape, matrices in shapes.items():
                count = max(1, AT_ONCE // shape.numel())
                for first in range(0, len(matrices), count):
                    self._step_equal(matrices[first : first + count], group)
        for parameter in (p for group in self.aux_optimizer.param_groups for p in group["params"]):
            if parameter.grad is None:  # as DeepSpeed has it, in every stage
                parameter.grad = torch.zeros_like(parameter)
        return self.aux_optimizer.step()

    def _step_equal(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        """One step of matrices [rows, columns] of one shape."""
        beta, lr = group["momentum"], group["lr"]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in matrices]
        momenta = [self.state[p]["momentum_buffer"] for p in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - beta)
        nesterov = torch.stack(torch._foreach_lerp(gradients, momenta, beta))
        rows, columns = matrices[0].shape
        updates = zeropower_via_newtonschulz5(nesterov, steps=5).to(nesterov.dtype)
        torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
        torch._foreach_add_(matrices, list(updates.unbind()), alpha=-lr * max(1, rows / columns) ** 0.5)
