"""FLOPs from shapes against what torch counts while the model really runs, forward and backward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import drawn_tokens, dropping, generative, tiny_batch, tiny_run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clips.config import Freeze
from clips.model.clips import CLIPSModel, Counts
from clips.model.flops import BatchShape, forward_flops, training_flops
from clips.recipes import PRESETS
from clips.training.task import Task


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_forward_and_backward(preset: str) -> None:
    """With fake tensors: shapes only, so that H/14 costs no memory. The head has a shape of its own here.

    Of their layers a few, of each part another number: FLOPs grow with them, and so does the time of this test.
    """
    config = PRESETS[preset]
    layers = {"vision": 3, "text": 2, "captioner": 1}
    config = replace(config, **{part: replace(getattr(config, part), layers=n) for part, n in layers.items()})
    size = config.vision.image_size, config.vision.patch_size * 3
    (web, sub), caption = (config.text.context_length,) * 2, 20
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):  # as matrix products; other kernels compute scores twice
        model = CLIPSModel(config, pad_id=0)
        model.visual.set_image_size(size)
        images = torch.empty(2, 3, size[1], size[0])
        texts = [torch.zeros(2, web, dtype=torch.long), torch.zeros(2, sub, dtype=torch.long)]
        ids = torch.zeros(2, caption, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            tokens = 2 * (config.vision.tokens(size) - 1 + web) + 30
            counts = Counts([2 * web, 2 * sub], predicted=30, captioner=tokens)
            out = model(images, texts, ids, counts=counts)
            assert model.captioner is not None
            assert out.caption_states is not None
            logits = model.captioner.head(out.caption_states.flatten(0, 1)[:30])
            pairs = [out.image_features @ text.T + text @ out.image_features.T for text in out.text_features]
            forward = counter.get_total_flops()
            (logits.sum() + sum(pair.sum() for pair in pairs)).backward()
    shape = BatchShape(samples=2, image_size=size, texts=(web, sub), caption=caption, predicted=30)
    assert sum(forward_flops(config, shape).values()) == forward
    assert sum(training_flops(config, shape).values()) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("objective", "drops", "pool", "freeze"),
    [
        *(("clips", False, "eos", freeze) for freeze in ("none", "vision", "text")),
        *((objective, True, "cls", "none") for objective in ("clips", "caption", "caption+web")),
    ],
)
def test_the_real_task_on_a_padded_batch(objective: str, drops: bool, pool: str, freeze: Freeze) -> None:
    """Web and sub-captions of different lengths, padding, the loss itself: what one step really computes.

    Dropped tokens and absent parts cost nothing. The caption head is recomputed in the backward pass, to save memory;
    that is not counted twice.
    """
    run = dropping(tiny_run()) if drops else tiny_run()
    run = run if objective == "clips" else generative(run, objective)
    model = replace(run.model, text=replace(run.model.text, pool=pool))
    run = replace(run, model=model, train=replace(run.train, freeze=freeze))
    batch = tiny_batch(3) | (drawn_tokens(3) if drops else {})
    batch = {name: batch[name] for name in batch if name not in ("web", "sub") or name in run.task.texts}
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
