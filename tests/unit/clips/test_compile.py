"""train.compile: each block is one graph, and one compilation serves every length and batch size."""

from collections.abc import Iterator

import pytest
import torch
from conftest import random_model, tiny_batch, tiny_run
from torch._dynamo.utils import counters

from clips.model.clips import CLIPSModel

SHAPES = [(8, 12, 10, 14, 2), (8, 7, 11, 9, 2), (3, 9, 9, 13, 3), (5, 12, 6, 8, 1)]
"""(samples, slots of the web caption, of the sub-caption, of the caption, patches along a side)"""


@pytest.fixture(autouse=True)
def _dynamo() -> Iterator[None]:
    """Compiling is on, whatever an engine of another test switched off, and nothing is compiled yet."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(disable=False):
        yield
    torch._dynamo.reset()


def cut(ids: torch.Tensor, slots: int) -> torch.Tensor:
    """Longer or shorter by the slots before the last, which is CLS."""
    padding = ids.new_zeros(len(ids), max(0, slots - ids.shape[1]))
    return torch.cat([ids[:, : min(slots, ids.shape[1]) - 1], padding, ids[:, -1:]], dim=1)


def pass_both_ways(model: CLIPSModel, shape: tuple[int, ...]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    samples, web, sub, caption, side = shape
    batch = tiny_batch(0, size=samples)
    images = batch["images"].repeat(1, 1, 2, 2)[:, :, : 16 * side, : 16 * side]
    model.visual.set_image_size(16 * side)
    out = model(images, [cut(batch["web"], web), cut(batch["sub"], sub)], batch["caption"][:, :caption])
    outputs = [out.image_features, *out.text_features, out.caption_states]
    used = [p for p in model.parameters() if p.requires_grad]
    loss = torch.stack([x.pow(3).sum() for x in outputs]).sum()
    return outputs, [g for g in torch.autograd.grad(loss, used, allow_unused=True) if g is not None]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_block_is_compiled_once_for_a_tower(checkpointing: bool) -> None:
    plain, compiled = random_model(tiny_run()), random_model(tiny_run())
    for model in (plain, compiled):
        model.set_activation_checkpointing(checkpointing)
    compiled.compile_blocks(backend="aot_eager")  # Inductor takes a minute, and traces the same graphs
    for turn, shape in enumerate(SHAPES):
        with torch._dynamo.config.patch(error_on_recompile=turn > 0):  # which says why
            outputs = pass_both_ways(compiled, shape)
        for ours, theirs in zip(outputs, pass_both_ways(plain, shape), strict=True):
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        assert not counters["graph_break"], counters["graph_break"]
        assert counters["stats"]["unique_graphs"] == 3  # of the image tower, the text tower, the captioner
