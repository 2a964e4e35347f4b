"""Gradients, weights and optimizer state by parameter name, wherever a ZeRO stage keeps them.

All code that reads or writes inside DeepSpeed is here: attributes that it does not document, and documented calls
whose limits were found by trying. tests/dist/test_zero.py uses them in engines of every stage; run it before raising
the cap of `deepspeed` in pyproject.toml.

Where to find the flat fp32 tensors that the inner (torch) optimizer steps on:

    stage   the tensor of a group                its members     its gradient before the step
    0       no flat tensors: each parameter      the parameter   parameter.grad
    1, 2    single_partition_of_fp32_groups      bit16_groups    averaged_gradients; with offload the tensor's .grad
    3       fp32_partitioned_groups_flat         fp16_groups     averaged_gradients; with offload out of sight

The names say fp16 and bit16 for historical reasons. The weights are fp32, or bf16 with these fp32 masters.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

ADAM_STATE = ("exp_avg", "exp_avg_sq")
MUON_STATE = ("momentum_buffer",)


def partition(module: nn.Module, config: dict[str, Any], dtype: torch.dtype | None) -> None:
    """Cut the parameters of `module` into the parts that the ranks hold in ZeRO-3, in place. Collective.

    One parameter at a time is cast to `dtype`, unless that is None, and moved to the device; all ranks get rank 0's
    values. So no device ever holds the whole module, and weights that are mapped to their file are read only here.
    """
    from deepspeed.runtime.zero import Init

    init = Init(config_dict_or_path=config)
    for parameter in module.parameters():
        value = parameter.data
        # The others receive rank 0's value: into a mapped file it would be written as a copy that stays in memory.
        parameter.data = value.to(dtype) if dist.get_rank() == 0 else torch.empty_like(value, dtype=dtype)
        init._convert_to_zero_parameters([parameter])


@contextmanager
def full_on_rank_0(module: nn.Module, folder: Path, stage: int) -> Iterator[None]:
    """Context manager in which rank 0 holds all parameters of `module` in full under ZeRO `stage`. Collective.

    In stage 3 one parameter at a time is gathered and written to a file in `folder`, to which the parameter is mapped
    then, so that the whole module is in no memory. The files are removed at the end, when the module must be used no
    more. Raises OSError on rank 0 if there is no room for them.
    """
    from deepspeed.runtime.zero import GatheredParameters

    with ExitStack() as stack:
        if stage == 3:
            is_first = dist.get_rank() == 0
            place = stack.enter_context(tempfile.TemporaryDirectory(dir=folder)) if is_first else ""
            for number, parameter in enumerate(module.parameters()):
                with GatheredParameters([parameter]):
                    mapped = _mapped(Path(place, str(number)), parameter.data) if is_first else parameter.data
                if is_first:
                    parameter.data = mapped
        yield


def _mapped(path: Path, value: Tensor) -> Tensor:
    """Write `value` to a new file at `path`, and return a tensor that is mapped to this file."""
    with path.open("wb") as file:  # writing to a mapped file that finds no room ends the process
        os.posix_fallocate(file.fileno(), 0, max(1, value.nbytes))
    return torch.from_file(str(path), shared=True, size=value.numel(), dtype=value.dtype).view_as(value).copy_(value)


class ZeroState:
    """The state that DeepSpeed's `engine` and its optimizer hold of the parameters `names`, in any ZeRO stage.

    `muon` holds the ids of the parameters that Muon steps; AdamW steps the others. Methods marked collective are called
    by every rank. Gathered state is on the CPU of rank 0, full and by name, so it depends neither on the number of
    ranks nor on the stage, and it is exact because everything is fp32.
    """

    def __init__(self, engine: Any, names: Mapping[str, nn.Parameter], muon: set[int], device: torch.device) -> None:
        self.optimizer, self.names, self.muon, self.device = engine.optimizer, names, muon, device
        self.trained = {name: parameter for name, parameter in names.items() if parameter.requires_grad}
        """Parameters with an optimizer state; those of a frozen tower have none."""
        self.stage: int = engine.zero_optimization_stage()
        self.world_size = dist.get_world_size()
        if self.stage == 0 and self.world_size == 1:
            # Nothing to reduce; DeepSpeed would copy every gradient into buckets and back (72 ms a step at 38 M).
            engine.enable_backward_allreduce = False
        self.reset_optimizer()

    def gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return this rank's parts of the reduced gradients, AdamW's and Muon's, after a step's last backward pass.

        In ZeRO 1 and 2 DeepSpeed has replaced Muon's gradient by its update by then. With offload the gradients are
        those on the CPU; in stage 3 with offload none can be seen, but DeepSpeed itself skips a step whose gradient is
        not finite (`was_step_applied`).
        """
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        for member, gradients in self._gradients_by_group():
            parts[self._is_muon(member)].extend(gradient for gradient in gradients if gradient is not None)
        return parts

    def _gradients_by_group(self) -> Iterator[tuple[nn.Parameter, Iterable[Tensor | None]]]:
        """Yield (a member, the gradients) of each group, whose members are all Muon's or all AdamW's."""
        optimizer = self.optimizer
        if self.stage == 0:
            yield from ((parameter, [parameter.grad]) for parameter in self.names.values())
            return
        if self.stage == 3:
            members, has_offload = optimizer.fp16_groups, optimizer.offload_optimizer
        else:
            members, has_offload = optimizer.bit16_groups, optimizer.cpu_offload
        if has_offload:
            flats = optimizer.single_partition_of_fp32_groups if self.stage < 3 else []
            yield from ((members[i][0], [flat.grad]) for i, flat in enumerate(flats))
            return
        for i, held in optimizer.averaged_gradients.items():
            yield members[i][0], held or []  # None stands for a group that was stepped already

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """Make DeepSpeed's step clear the gradients and leave weights and optimizer state as they are.

        Inside the context an overflow is reported to DeepSpeed as in fp16, its only way to skip a step.
        """
        optimizer = self.optimizer

        def overflows(*_: Any, **__: Any) -> bool:
            optimizer.overflow = True
            return True

        if self.stage == 0:
            optimizer.step = lambda: None
        elif self.stage == 3:
            optimizer._overflow_check_and_loss_scale_update = overflows  # asked before Muon's momentum moves
        else:
            optimizer.check_grad_overflow, optimizer.check_overflow = True, overflows
        try:
            yield
        finally:  # the methods are the class's again
            if self.stage == 0:
                del optimizer.step
            elif self.stage == 3:
                del optimizer._overflow_check_and_loss_scale_update
            else:
                optimizer.check_grad_overflow = False
                del optimizer.check_overflow

    def copies(self, name: str) -> Iterator[Tensor]:
        """Yield what this rank holds of a parameter, to be changed in place: the computing value and its fp32 master.

        DeepSpeed's setters change only the master, and the forward pass would keep using the old value.
        """
        parameter: Any = self.names[name]  # with the attributes that DeepSpeed adds
        yield parameter.data  # empty in stage 3, outside the forward pass
        if self.stage == 3:
            from deepspeed.utils import safe_get_local_fp32_param

            yield parameter.ds_tensor.data
            yield safe_get_local_fp32_param(parameter)
        elif self.stage > 0 and parameter._hp_mapping is not None:  # None: another rank's
            yield parameter._hp_mapping.hp_fragment

    def gather_weights(self, *, everywhere: bool = False) -> dict[str, Tensor]:
        """Return weights by name on the CPU of rank 0; empty on other ranks unless `everywhere`. Collective."""
        weights = {}
        for name, parameter in self.names.items():
            with self._full(parameter) as full:
                if everywhere or dist.get_rank() == 0:
                    weights[name] = full.detach().to("cpu", copy=True)
        return weights

    @contextmanager
    def _full(self, parameter: nn.Parameter) -> Iterator[Tensor]:
        """Yield a parameter's fp32 value, gathered if ranks hold parts of it. Collective."""
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        if self.stage > 0 and parameter.requires_grad:
            yield safe_get_full_fp32_param(parameter)
        elif self.stage == 3:  # frozen: cut like the others, but without a master that the getter could gather
            with GatheredParameters([parameter]):
                yield parameter.data
        else:
            yield parameter.data

    def gather_optimizer(self) -> dict[str, Tensor]:
        """Return optimizer state as `name/key` on the CPU of rank 0; empty on other ranks. Collective."""
        state = {}
        for name, parameter in self.trained.items():
            for key in self._keys(parameter):
                full = self._get(parameter, key)
                if dist.get_rank() == 0:
                    state[f"{name}/{key}"] = full.detach().to("cpu", copy=True)
        return state

    def restore_optimizer(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Put the state of `gather_optimizer` back after `steps` optimizer steps; every rank passes all of it.

        One tensor at a time is copied, in ZeRO 3 only this rank's part, so a `state` that is mapped from a file stays
        there. The weights are not restored here, because they are loaded into the model before the engine is built.
        Raises KeyError if `state` is of another kind of optimizer.
        """
        self.reset_optimizer(steps)
        for name, parameter in self.trained.items():
            for key in self._keys(parameter):
                self._set(parameter, key, state[f"{name}/{key}"])

    def restore_masters(self, weights: Mapping[str, Tensor]) -> None:
        """Set the fp32 masters of bf16 weights; every rank passes all of them.

        Masters made when the engine was built are only as precise as the bf16 weights that were loaded before.
        """
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        for name, parameter in self.trained.items():
            if self.stage == 3:
                safe_set_local_fp32_param(parameter, self._part(weights[name]).float())
            else:
                safe_set_full_fp32_param(parameter, weights[name].to(self.device, torch.float32))

    def reset_optimizer(self, steps: int = 0) -> None:
        """Replace the optimizer state by zeros, as if after `steps` optimizer steps.

        The state is created here, before a step, and not during it as DeepSpeed and torch would do.
        ZeRO-3 otherwise spends a dummy step on it that shifts Adam's bias correction, and ZeRO-1/2 link only
        the first group's state to the parameters (DeepSpeed 0.19.8), so that the others cannot be gathered.
        """
        optimizer = self.optimizer
        inner = optimizer if self.stage == 0 else optimizer.optimizer
        tensors: Iterable[tuple[Tensor, Sequence[nn.Parameter]]]
        if self.stage == 0:
            tensors = [(p, [p]) for p in self.trained.values()]
        elif self.stage == 3:
            tensors = zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
        else:
            tensors = zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True)
        for i, (flat, members) in enumerate(tensors):
            state = inner.state[flat]
            for key in self._keys(members[0]):  # a group is all Muon's or all AdamW's
                state[key] = torch.zeros_like(flat)
            if self._keeps_full_momenta(members[0]):
                state["momentum_buffer"] = flat.new_zeros(sum(p.numel() for p in optimizer.params_in_partition[i]))
            if not self._is_muon(members[0]):
                state["step"] = torch.tensor(float(steps), device=flat.device)
        if self.stage in (1, 2):  # link it to the parameters again, which DeepSpeed does once only
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()

    def _is_muon(self, parameter: nn.Parameter) -> bool:
        return id(parameter) in self.muon

    def _keys(self, parameter: nn.Parameter) -> tuple[str, ...]:
        return MUON_STATE if self._is_muon(parameter) else ADAM_STATE

    def _get(self, parameter: nn.Parameter, key: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        if self.stage == 0:
            return self.optimizer.state[parameter][key]
        if not self._keeps_full_momenta(parameter):
            return safe_get_full_optimizer_state(parameter, key)
        full = torch.zeros_like(parameter)
        momentum, is_owner = self._full_momentum(parameter)
        if momentum is not None and is_owner:
            full.copy_(momentum)
        dist.all_reduce(full)  # one owner, so the sum is its value
        return full

    def _set(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.stage == 0:
            self.optimizer.state[parameter][key].copy_(value)
        elif self.stage == 3:
            safe_set_local_optimizer_state(parameter, self._part(value), key)
        elif self._keeps_full_momenta(parameter):
            momentum, _ = self._full_momentum(parameter)
            if momentum is not None:
                momentum.copy_(value)
        else:
            safe_set_full_optimizer_state(parameter, value.to(self.device), key)

    def _part(self, value: Tensor) -> Tensor:
        """Return what this rank holds of a value in stage 3, on its device: one of equal parts, the last one padded.

        (DeepSpeed's setter of full values fails on the padding.)
        """
        size = -(-value.numel() // self.world_size)
        part = value.flatten()[dist.get_rank() * size :][:size].to(self.device)
        return nn.functional.pad(part, (0, size - part.numel()))

    def _keeps_full_momenta(self, parameter: nn.Parameter) -> bool:
        """Return True if Muon's full momentum is on every rank with a part of the matrix: ZeRO-1/2 without offload.

        Newton-Schulz needs the full matrix, and DeepSpeed's getters only know state that is split like the weights.
        """
        return self.stage in (1, 2) and self._is_muon(parameter) and not self.optimizer.cpu_offload

    def _full_momentum(self, parameter: nn.Parameter) -> tuple[Tensor | None, bool]:
        """Return this rank's copy of the momentum of `parameter`, or None, and whether this rank owns it.

        The matrices of a rank's partition lie one after the other in one buffer. The first of them may begin on the
        previous rank (`first_offset` > 0); that rank then owns it.
        """
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
