"""Rehearse training steps with torch's FakeTensor: tensors that have shapes and types but no data.

Activations are counted as they come and go; optimizer state and what ZeRO splits are arithmetic (`Rehearsed.on_rank`).
Autocast and attention are the CPU's, which gave 0.92 to 1.02 of what a simulation with a GPU's lists of operators gave
for the models of tests/rehearsal.
"""

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend "fake"
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META, CPU = torch.device("meta"), torch.device("cpu")
FP32 = 4
BUCKET = 500_000_000
"""Elements of DeepSpeed's reduce_bucket_size, and of the bucket of ZeRO 0, if its settings give no other."""
LIVE = 1_000_000_000
"""Parameters that ZeRO 3 leaves gathered: DeepSpeed's stage3_max_live_parameters."""
SIMULATED = FakeTensorMode(allow_non_fake_inputs=True)
"""Tensors that are made while this mode is active have no data."""


def without_data(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return `batch` with tensors of the same shapes and types that have no data."""
    with SIMULATED:
        return {k: torch.empty(v.shape, dtype=v.dtype) if isinstance(v, Tensor) else v for k, v in batch.items()}


def leave_meta(module: nn.Module) -> None:
    """Move `module` from the device "meta" to the CPU, in place, with parameters and buffers that have no data."""
    moved: dict[int, tuple[Tensor, Tensor]] = {}  # of shared ones, too, there is one; both are kept, so ids stay theirs
    with SIMULATED:
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and id(tensor) not in moved:
                        new = torch.empty_like(tensor, device=CPU)
                        is_parameter = isinstance(tensor, nn.Parameter)
                        moved[id(tensor)] = tensor, nn.Parameter(new, tensor.requires_grad) if is_parameter else new
                    if tensor is not None:
                        tensors[name] = moved[id(tensor)][1]  # type: ignore[assignment]


@contextlib.contextmanager
def rehearsed_ranks(count: int) -> Iterator[None]:
    """Make this process rank 0 of a pretended group of `count` ranks, whose collectives move no data.

    One rank needs no group.
    """
    if count > 1:
        dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        yield
    finally:
        if count > 1:
            dist.destroy_process_group()


class Rehearsal(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside, in the mode `SIMULATED`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        """Bytes in use now, and at the fullest moment."""
        self._known: set[int] = set()

    def hold(self, tensors: Iterable[Tensor]) -> int:
        """Count tensors that were made before, and return their bytes."""
        before = self.live
        for tensor in tensors:
            self._count(tensor)
        return self.live - before

    def __enter__(self) -> Any:
        SIMULATED.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        SIMULATED.__exit__(*exception)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size).atexit = False

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


@dataclass(frozen=True)
class Rehearsed:
    """Bytes of one rank's step, as rehearsed without an optimizer and without sharding."""

    parameters: int
    """Number of parameters that train."""
    weights: int
    gradients: int
    state: int
    """Bytes of the optimizer's state: two fp32 numbers per parameter for AdamW, one for Muon."""
    peak: int
    """At the fullest moment of forward and backward pass, weights and gradients included."""

    def on_rank(self, zero: Mapping[str, Any], ranks: int) -> int:
        """Return the bytes that one of `ranks` GPUs needs under `zero`, the `zero_optimization` of an engine.

        From stage 1 on DeepSpeed splits the optimizer's state, from stage 2 on the gradients, in stage 3 the weights.
        From stage 2 on the step must have been rehearsed with `drop_gradients`.
        """
        stage = zero.get("stage", 0)
        if stage == 0:
            return self.peak + self.state

        element = self.gradients // self.parameters
        state = self.state
        if stage < 3 or element < FP32:  # an fp32 copy of the weights, which the optimizer steps on
            state += FP32 * self.parameters
        if zero.get("offload_optimizer", {}).get("device") == "cpu":
            state = 0

        bucket = zero.get("reduce_bucket_size", BUCKET)
        buffers = element * (BUCKET if bucket == "auto" else bucket)
        if stage == 1:
            return self.peak + state // ranks + buffers
        if stage == 2:
            return self.peak + (state + self.gradients) // ranks + buffers * (2 if zero.get("overlap_comm") else 1)
        live = min(self.weights, element * LIVE)  # what it leaves gathered
        weights = 0 if zero.get("offload_param", {}).get("device") == "cpu" else self.weights
        return self.peak - self.weights + (state + self.gradients + weights) // ranks + buffers + live


def drop_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Drop each gradient once it is made, as ZeRO does from stage 2 on with gradients that belong to other ranks."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in parameters:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(drop)
