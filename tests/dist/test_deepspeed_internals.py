"""Everything inside DeepSpeed that this project touches, by name, looked for in real engines of every ZeRO stage.

The test to run before raising the cap of `deepspeed` in pyproject.toml, with test_zero.py beside it: this one says
what is gone, that one whether what is there still means the same.
"""

from __future__ import annotations

import ast
import json
import os
import sys

import pytest
from conftest import ROOT, run_python

from clips.common.runtime import init_distributed, shutdown

IMPORTED = {
    "clips/common/runtime.py": {"deepspeed", "deepspeed.ops"},
    "clips/training/engine.py": set(),
    "clips/training/muon.py": {
        "deepspeed.runtime.zero.muon.muon_optimizer.MuonWithAuxAdam",
        "deepspeed.runtime.zero.muon.original_muon.zeropower_via_newtonschulz5",
    },
    "clips/training/zero_state.py": {
        "deepspeed.utils.safe_get_full_fp32_param",
        "deepspeed.utils.safe_get_full_optimizer_state",
        "deepspeed.utils.safe_get_local_fp32_param",
        "deepspeed.utils.safe_set_full_optimizer_state",
        "deepspeed.utils.safe_set_local_optimizer_state",
        "deepspeed.runtime.zero.GatheredParameters",
    },
}
ENGINE = {
    *("backward", "step", "module", "optimizer", "zero_optimization_stage"),
    *("is_gradient_accumulation_boundary", "was_step_applied", "enable_backward_allreduce"),
}
ONE_TWO = {"single_partition_of_fp32_groups", "bit16_groups", "params_in_partition", "first_offset", "cpu_offload"}
ONE_TWO |= {"averaged_gradients", "_hp_optimizer_states_linked", "_lazy_init_hp_params_optimizer_state", "optimizer"}
ONE_TWO |= {"overflow", "check_grad_overflow", "check_overflow"}
THREE = {"fp32_partitioned_groups_flat", "fp16_groups", "offload_optimizer", "averaged_gradients", "optimizer"}
THREE |= {"overflow", "_overflow_check_and_loss_scale_update"}
OPTIMIZER = {"zero0": {"state", "step"}, "zero1": ONE_TWO, "zero2": ONE_TWO, "zero3": THREE, "offload": ONE_TWO}
PARAMETER = {"zero0": set(), "zero1": {"_hp_mapping"}, "zero2": {"_hp_mapping"}, "offload": {"_hp_mapping"}}
PARAMETER |= {"zero3": {"ds_tensor", "ds_numel"}}
FRAGMENT = {"hp_fragment"}
OPS = "deepspeed_shm_comm"
"""The entry of `deepspeed.ops.__compatible_ops__` that is switched off."""


def accessed(path: str, *owners: str) -> set[str]:
    """Attributes that a file reads or sets on expressions written as one of `owners`."""
    nodes = ast.walk(ast.parse((ROOT / path).read_text()))
    return {node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) in owners}


def imported(path: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "deepspeed"}


def test_every_name_that_is_touched_is_listed_here() -> None:
    for path, names in IMPORTED.items():
        assert imported(path) == names
    state, engine = "clips/training/zero_state.py", "clips/training/engine.py"
    assert accessed(engine, "self.engine") | accessed(state, "engine") == ENGINE
    own = {"param_groups"}  # torch's own interface
    touched = accessed(state, "optimizer", "self.optimizer") | accessed(engine, "self.optimizer")
    assert touched - own == set().union(*OPTIMIZER.values())
    tensor = {"data", "grad", "numel", "ndim", "requires_grad", "use_muon"}
    assert accessed(state, "parameter") - tensor == set().union(*PARAMETER.values()) - {"ds_numel"}
    assert accessed(state, "parameter._hp_mapping") == FRAGMENT
    assert "ds_numel" in (ROOT / "mllm/training/freeze.py").read_text()
    assert OPS in (ROOT / "clips/common/runtime.py").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_installed_deepspeed_has_them_all(kind: str) -> None:
    done = run_python(__file__, kind, env={"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])})
    assert done.returncode == 0, done.stderr[-3000:]
    missing = json.loads(done.stdout.splitlines()[-1])
    assert missing.keys() == OPTIMIZER.keys() | {"ops"}
    assert not {stage: names for stage, names in missing.items() if names}


def main(kind: str) -> None:
    """Print what is missing, by stage, of a tiny engine between its backward pass and its step."""
    import deepspeed
    from conftest import tiny_batch
    from zero_worker import CPU, STAGES, build

    init_distributed(CPU)
    missing = {"ops": [] if OPS in deepspeed.ops.__compatible_ops__ else [OPS]}
    for stage, zero in STAGES.items():
        wrapper = build(kind, zero)
        loss, _ = wrapper(tiny_batch(0))
        wrapper.backward(loss)
        parameter = wrapper.state.names["logit_scale"]
        fragment = FRAGMENT if "_hp_mapping" in PARAMETER[stage] else set()
        wanted = [(wrapper.engine, ENGINE), (wrapper.optimizer, OPTIMIZER[stage]), (parameter, PARAMETER[stage])]
        wanted.append((getattr(parameter, "_hp_mapping", None), fragment))
        missing[stage] = [name for owner, names in wanted for name in names if not hasattr(owner, name)]
        state = wrapper.state.gather_optimizer()
        lacking = {name for name in wrapper.state.names if not any(key.startswith(f"{name}/") for key in state)}
        missing[stage] += [f"state of {name}" for name in lacking]
        if not any(wrapper.state.gradients()):
            missing[stage].append("gradients")
    print(json.dumps(missing))
    shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
