"""Rehearse training steps for a GPU on torch's device "meta": shapes, types and devices are real, memory and time not.

Inside a `Rehearsal` tensors on "meta" behave as a GPU's: autocast casts by the GPU's lists, attention takes the GPU's
fused kernel. Code that would make a GPU's host wait, or mix devices, raises. Bytes are counted as torch's caching
allocator hands them out.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._C._distributed_c10d import FakeProcessGroup
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

META = torch.device("meta")
HALF = ("linear", "matmul", "__matmul__", "bmm", "baddbmm", "mm", "addmm", "einsum", "conv2d", "conv_transpose2d")
"""Functions that a GPU's autocast computes in bf16 (torch's autocast_mode.h, lower_precision_fp), as far as used."""
FULL = (
    *("layer_norm", "group_norm", "softmax", "log_softmax", "logsumexp", "cross_entropy_loss", "nll_loss", "sum"),
    *("exp", "log", "pow", "__pow__", "rsqrt", "reciprocal", "norm", "softplus", "cumsum", "prod"),
)
"""Functions that a GPU's autocast computes in fp32 (the same file, fp32), as far as used."""
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
FUSED = torch.ops.aten
FP32 = 4
BUCKET = 500_000_000
"""Elements of DeepSpeed's reduce_bucket_size, and of the bucket of ZeRO 0, if its settings give no other."""
LIVE = 1_000_000_000
"""Parameters that ZeRO 3 leaves gathered: DeepSpeed's stage3_max_live_parameters."""


@contextlib.contextmanager
def rehearsed_ranks(count: int) -> Iterator[None]:
    """Make this process rank 0 of a pretended group of `count` ranks, whose collectives have shapes and move no data.

    One rank needs no group.
    """
    if count == 1:
        yield
        return

    def fake(common: Any, options: Any) -> FakeProcessGroup:
        make: Any = FakeProcessGroup._create_internal  # torch's stub lacks the last argument
        return make(common.group_rank, common.group_size, options)

    if "rehearsed" not in dist.Backend.backend_list:
        dist.Backend.register_backend("rehearsed", fake, extended_api=True, devices=["meta"])
    dist.init_process_group("rehearsed", rank=0, world_size=count, store=dist.HashStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


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


class Waits(AssertionError):
    """On a GPU the rehearsed code would make the host wait for the device, mix devices, or use an unfused kernel."""


def attention_of_a_gpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Stand in for `F.scaled_dot_product_attention` on the meta device: call the fused kernel that a GPU would run.

    So its memory is counted. torch chooses the kernel in sdp_utils.cpp. query [B, H, L, D], key and value [B, H, S, D].
    Raises Waits if only the unfused kernel fits, because it holds every attention score in memory.
    """
    if attn_mask is None and query.dtype in (torch.bfloat16, torch.float16):
        flash = FUSED._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if query.shape[1] != key.shape[1]:
        raise Waits("attention with a mask and grouped heads has no fused kernel on a GPU: repeat keys and values")
    bias = attn_mask
    if bias is not None:
        if bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill_(~bias, -torch.inf)
        keys = bias.shape[-1]
        bias = F.pad(bias, (0, -keys % 16))[..., :keys]  # the kernel wants aligned rows
        bias = bias.expand(*query.shape[:3], keys)
    efficient = FUSED._scaled_dot_product_efficient_attention
    return efficient(query, key, value, bias, query.requires_grad, dropout_p, is_causal, scale=scale)[0]


class AsOnGpu(TorchFunctionMode):
    """Applies the autocast and the attention kernel of a GPU to tensors on "meta"."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: dict[int, tuple[Tensor, Tensor]] = {}
        """Autocast's cache: (weight, copy) by the weight's id."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if func is Tensor.backward:  # torch leaves the mode here, but what checkpoints recompute must be cast too
            with self:
                ones = torch.ones_like(args[0])
                return _engine_run_backward((args[0],), (ones,), False, False, (), True, accumulate_grad=True)
        attends = func is F.scaled_dot_product_attention
        if torch.is_autocast_enabled("cpu"):
            if attends or name in HALF:
                args, kwargs = tree_map_only(Tensor, self._half, (args, kwargs))
            elif name in FULL:
                args, kwargs = tree_map_only(Tensor, _full, (args, kwargs))
        if func is F.dropout and kwargs.get("training", True) and kwargs.get("p", 0.5):  # fused: its mask has a byte
            return torch.native_dropout(args[0], kwargs.get("p", 0.5), True)[0]
        return attention_of_a_gpu(*args, **kwargs) if attends else func(*args, **kwargs)

    def _half(self, tensor: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu")
        if tensor.device != META or tensor.dtype != torch.float32:
            return tensor
        if not (tensor.requires_grad and tensor.is_leaf):
            return tensor.to(dtype)
        if id(tensor) not in self.copies:
            self.copies[id(tensor)] = tensor, tensor.to(dtype)
        return self.copies[id(tensor)][1]


def _full(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.device == META and tensor.dtype == torch.bfloat16 else tensor


class Rehearsal(TorchDispatchMode):
    """Counts the bytes of what runs inside, and raises Waits where a GPU would wait or refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        """Bytes in use now, and at the fullest moment."""
        self._known: set[int] = set()
        self._gpu = AsOnGpu()

    def hold(self, tensors: Iterable[Tensor]) -> int:
        """Count tensors that were made before, and return their bytes."""
        before = self.live
        for tensor in tensors:
            self._count(tensor)
        return self.live - before

    def __enter__(self) -> Any:
        torch.clear_autocast_cache = self._gpu.copies.clear  # called where an autocast ends
        self._gpu.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._gpu.__exit__(*exception)
        torch.clear_autocast_cache = torch._C.clear_autocast_cache

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        sent = func in COPIES and kwargs.get("non_blocking")  # as a batch is, from pinned memory
        if not sent and len({t.device for t in tensors if t.ndim or t.device == META or func in COPIES}) > 1:
            what = "copies a tensor to the device, for which the host waits" if func in COPIES else "mixes devices"
            raise Waits(f"{func} {what}: {', '.join(f'{t.device.type} {tuple(t.shape)}' for t in tensors)}")
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return out

    def _count(self, tensor: Tensor) -> None:
        if tensor.device != META:
            return
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
