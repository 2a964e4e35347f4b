"""Towers and captioner: published sizes, masks entry by entry, padding, resolutions, generation; Muon's step."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import random_model, tiny_batch, tiny_run
from open_clip.pos_embed import get_2d_sincos_pos_embed

from clips.model.captioner import caption_mask
from clips.model.clips import CLIPSModel
from clips.model.layers import attention
from clips.model.vision import sincos_positions
from clips.training import muon


def test_sincos_positions_are_those_of_open_clip() -> None:
    stock = torch.from_numpy(get_2d_sincos_pos_embed(64, 5, cls_token=True)).float()
    torch.testing.assert_close(sincos_positions(64, 5), stock, atol=1e-6, rtol=0)


def test_the_reference_s_parts_are_absent_not_zero() -> None:
    run = tiny_run().model
    reference = replace(
        run, vision=replace(run.vision, patch_bias=False), captioner=replace(run.captioner, head_bias=False)
    )
    ours, theirs = CLIPSModel(run, pad_id=0), CLIPSModel(reference, pad_id=0)
    assert set(ours.state_dict()) - set(theirs.state_dict()) == {"visual.patch_embed.bias", "captioner.head.bias"}
    batch = tiny_batch(1, size=2)
    assert theirs.caption(batch["images"], batch["web"], bos_id=1, eos_id=2).shape[0] == 2


@pytest.mark.parametrize("visible", [None, [[1, 1, 0], [1, 1, 1]]])
def test_caption_mask_entry_by_entry(visible: list | None) -> None:
    """[2 image tokens; 3 web states; 4 positions]: the rule of the paper, spelled out for each entry."""
    images, states, positions = 2, 3, 4
    prefix = images + states
    marks = None if visible is None else torch.tensor(visible, dtype=torch.bool)
    mask = caption_mask(prefix, positions, marks, torch.device("cpu"))
    mask = mask.expand(2, 1, -1, -1) if visible is None else mask
    for b in range(2):
        for row in range(prefix + positions):
            for column in range(prefix + positions):
                if column < images:
                    expected = True
                elif column < prefix:
                    expected = visible is None or bool(visible[b][column - images])
                else:
                    expected = row >= prefix and column <= row  # queries see earlier ones and themselves
                assert mask[b, 0, row, column].item() is expected, (b, row, column)


@pytest.mark.parametrize("pad_mask", [True, False])
def test_generating_with_the_cache_equals_recomputing_everything(pad_mask: bool) -> None:
    model = random_model(tiny_run(inputs="tokens", pad_mask=pad_mask)).eval()
    batch = tiny_batch(1, size=3)
    web = batch["web"]
    if not pad_mask:
        web = torch.cat([web[:, :-1], torch.zeros(3, 4, dtype=torch.long), web[:, -1:]], dim=1)
    out = model.caption(batch["images"], web, bos_id=1, eos_id=2)
    _, tokens = model.visual(batch["images"])
    ((_, states, visible),) = model.text(web)
    ids = torch.ones(3, 1, dtype=torch.long)
    done = torch.zeros(3, dtype=torch.bool)
    for k in range(out.shape[1]):
        hidden = model.captioner(tokens[:, 1:], states, visible, ids)
        token = model.captioner.head(hidden[:, -1]).argmax(-1).masked_fill(done, 0)
        assert out[:, k].tolist() == token.tolist(), k
        done |= token == 2
        ids = torch.cat([ids, token[:, None]], dim=1)


def test_queries_read_out_stops_at_eos() -> None:
    torch.manual_seed(0)
    model = CLIPSModel(tiny_run().model, pad_id=0).eval()
    model.captioner.head.bias.data[2] = 100  # always eos
    out = model.caption(torch.randn(1, 3, 32, 32), tiny_batch(1, size=1)["web"], bos_id=1, eos_id=2)
    assert out.tolist() == [[2] + [0] * 14]


def test_the_logit_scale_is_at_most_100() -> None:
    model = CLIPSModel(tiny_run().model, pad_id=0)
    model.logit_scale.data.fill_(9.0)
    out = model(torch.randn(2, 3, 32, 32), [tiny_batch(0, size=2)["web"]])
    assert out.logit_scale.item() == pytest.approx(100, rel=1e-5)


@pytest.mark.parametrize("part", ["vision", "text"])
def test_a_frozen_tower_keeps_no_graph_and_its_projection_trains(part):
    run = tiny_run()
    model = random_model(run)
    model.freeze(part)
    batch = tiny_batch(0)
    towers = {"vision": (model.visual, batch["images"]), "text": (model.text, batch["web"])}
    for name, (tower, inputs) in towers.items():
        pooled = tower(inputs)[0] if name == "vision" else tower(inputs)[0].pooled
        assert pooled.requires_grad == (name != part)
        assert tower.proj(pooled).requires_grad


@pytest.mark.parametrize("masked", [False, True])
def test_both_attention_kernels_compute_the_same(masked: bool) -> None:
    q, k, v = torch.randn(3, 2, 4, 9, 8, dtype=torch.float64)
    visible = (torch.arange(9) < 6).expand(2, 1, 1, 9) if masked else None
    stock = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    torch.testing.assert_close(attention(q, k, v, visible), stock)
    plain = attention(*(x.bfloat16() for x in (q, k, v)), visible)  # a CPU computes short ones by plain products
    torch.testing.assert_close(plain.double(), stock, atol=2e-2, rtol=2e-2)


SHAPES = [(24, 8), (8, 24), (24, 8), (16, 16), (24, 8)]


def parameters() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in [*SHAPES, (7,), (5,)]]


def trained(kind: type[torch.optim.Optimizer]) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    weights = parameters()
    groups = [
        {"params": weights[: len(SHAPES)], "use_muon": True, "lr": 0.02, "momentum": 0.9, "weight_decay": 0.1},
        {"params": weights[len(SHAPES) :], "use_muon": False, "lr": 0.01, "weight_decay": 0.1, "eps": 1e-8},
    ]
    groups[0]["ns_method"] = "standard"
    optimizer = kind(groups, adam_optimizer=torch.optim.AdamW)
    for _ in range(3):
        for parameter in weights[:-1]:  # the last one takes no part in the loss
            parameter.grad = torch.randn_like(parameter)  # DeepSpeed's step writes into it
        optimizer.step()
    return weights, optimizer


@pytest.mark.parametrize("at_once", [muon.AT_ONCE, 300])
def test_equal_shapes_together_are_one_after_the_other(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """300 elements are one matrix at a time."""
    monkeypatch.setattr(muon, "AT_ONCE", at_once)
    with torch._dynamo.config.patch(disable=True):
        ours, our_optimizer = trained(muon.BatchedMuon)
        theirs, their_optimizer = trained(muon.MuonWithAuxAdam)
    for a, b, start in zip(ours, theirs, parameters(), strict=True):
        assert not torch.equal(a, start)
        assert torch.equal(a, b)
    for a, b in zip(ours[: len(SHAPES)], theirs, strict=False):
        momenta = (optimizer.state[p]["momentum_buffer"] for optimizer, p in ((our_optimizer, a), (their_optimizer, b)))
        assert torch.equal(*momenta)
