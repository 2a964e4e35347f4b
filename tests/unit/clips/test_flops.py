"""FLOPs by layers against what torch counts while the model really runs, forward and backward."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import drawn_tokens, dropping, tiny_batch, tiny_run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clips.common.rundir import read_metrics
from clips.config import Freeze
from clips.data.loader import counted
from clips.engine.checkpoint import TrainState
from clips.engine.log import RunLog
from clips.engine.metrics import Meter
from clips.model.clips import CLIPSModel
from clips.training.trainer import Task, flops_of


def test_the_log_shows_what_torch_counts(tmp_path: Path) -> None:
    run = tiny_run().override(["task.caption_chunk=1000"])  # nothing is computed twice
    task, state = Task(CLIPSModel(run.model, pad_id=0), run.task, run.train), TrainState(seed=0)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        meter = Meter(torch.device("cpu"), state)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            for seed in range(2):
                loss, parts = task(tiny_batch(seed))
                loss.backward()
                meter.add(parts, [], flops_of(task, counted(tiny_batch(seed), run.model, 0)))
        state.step = 2
        log = RunLog(tmp_path, run.samples, {}, start_step=0, active=True, report_to=())
        meter.log(log, state, lr=0.0, grad_norm=None)
        log.close()
    finally:
        dist.destroy_process_group()
    (line,) = [line for line in read_metrics(tmp_path) if line["kind"] == "train"]
    assert line["tflops"] * 1e12 * line["step_seconds"] * line["steps"] == pytest.approx(counter.get_total_flops())


@pytest.mark.parametrize(
    ("drops", "pool", "freeze"),
    [*((False, "eos", freeze) for freeze in ("none", "vision", "text")), (True, "cls", "none")],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_real_task_on_a_padded_batch(drops: bool, pool: str, freeze: Freeze, checkpointing: bool) -> None:
    """Web and sub-captions of different lengths, padding, the loss itself: what one step really computes.

    Dropped tokens cost nothing. The caption head is computed a second time, as all blocks are with checkpointing;
    without that an MFU counts a step the same.
    """
    run = dropping(tiny_run()) if drops else tiny_run()
    model = replace(run.model, text=replace(run.model.text, pool=pool))
    run = replace(run, model=model, train=replace(run.train, freeze=freeze))
    batch = counted(tiny_batch(3) | (drawn_tokens(3) if drops else {}), run.model, 0)
    task = Task(CLIPSModel(run.model, pad_id=0), run.task, run.train)
    task.model.freeze(freeze)
    once = flops_of(task, batch)
    task.model.set_activation_checkpointing(checkpointing)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss, _ = task(batch)
        loss.backward()
    predicted = int((batch["caption"][:, 1:] != 0).sum())
    assert predicted < 8 * (batch["caption"].shape[1] - 1), "nothing is padded here"
    assert flops_of(task, batch, repeated=True) == counter.get_total_flops()
    assert flops_of(task, batch) == once < counter.get_total_flops()
