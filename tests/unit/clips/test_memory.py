"""What an engine of each ZeRO stage holds, against the shares that a plan takes (`Rehearsed.on_rank`)."""

from pathlib import Path

import pytest
import torch
from conftest import ROOT, random_model, run_python, tiny_run
from zero_worker import STAGES

from clips.common.rehearsal import Rehearsed


@pytest.mark.slow
def test_engines_hold_what_is_said_in_every_stage(tmp_path: Path) -> None:
    """Two ranks; weights, gradients, the state and the fp32 copy, in whatever tensors DeepSpeed keeps them."""
    out = tmp_path / "held.pt"
    run_python(ROOT / "tests" / "zero_worker.py", "hold", out, ranks=2)
    count = sum(p.numel() for p in random_model(tiny_run()).parameters())
    step = Rehearsed(count, weights=4 * count, gradients=4 * count, state=8 * count, peak=8 * count)
    for name, ranks in torch.load(out, weights_only=True).items():
        zero = STAGES[name] | {"reduce_bucket_size": 0}
        rehearsed = step if zero["stage"] < 2 else Rehearsed(count, 4 * count, 4 * count, 8 * count, 4 * count)
        expected = rehearsed.on_rank(zero, ranks=2)
        if name == "zero3":
            expected -= 4 * count  # all of this model stays gathered
        if name == "offload":  # on a CPU "the machine's memory" is where the optimizer is
            expected += (8 + 4) * count // 2
        for rank in ranks:
            gradients = rank["gradients"] if zero["stage"] in (0, 3) else None
            held = rank["weights"] + rank["optimizer"]
            if gradients is None:  # those of the others lie in DeepSpeed's buckets as well
                gradients = 4 * count if zero["stage"] == 1 else 2 * count
            assert held + gradients == pytest.approx(expected, rel=0.02), name
