"""FLOPs from shapes against what torch counts while the model really runs, forward and backward."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import drawn_tokens, dropping, tiny_batch, tiny_run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clips.config import Freeze
from clips.model.clips import CLIPSModel
from clips.model.flops import training_flops
from clips.training.task import Task


@pytest.mark.parametrize(
    ("drops", "pool", "freeze"),
    [*((False, "eos", freeze) for freeze in ("none", "vision", "text")), (True, "cls", "none")],
)
def test_the_real_task_on_a_padded_batch(drops: bool, pool: str, freeze: Freeze) -> None:
    """Web and sub-captions of different lengths, padding, the loss itself: what one step really computes.

    Dropped tokens cost nothing. The caption head is recomputed in the backward pass, to save memory;
    that is not counted twice.
    """
    run = dropping(tiny_run()) if drops else tiny_run()
    model = replace(run.model, text=replace(run.model.text, pool=pool))
    run = replace(run, model=model, train=replace(run.train, freeze=freeze))
    batch = tiny_batch(3) | (drawn_tokens(3) if drops else {})
    task = Task(CLIPSModel(run.model, pad_id=0), run)
    task.model.freeze(freeze)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss, _ = task(batch)
        loss.backward()
    predicted = int((batch["caption"][:, 1:] != 0).sum())
    assert predicted < 8 * (batch["caption"].shape[1] - 1), "nothing is padded here"
    again = predicted * 2 * run.model.captioner.width * run.model.text.vocab_size
    assert task.flops(batch) + again == counter.get_total_flops()
    if drops:
        whole = replace(run.model, vision=replace(run.model.vision, patch_dropout=0.0))
        assert sum(training_flops(whole, task.shape(batch), freeze).values()) > task.flops(batch)
