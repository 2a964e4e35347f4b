"""Muon's step on matrices of one shape at a time is DeepSpeed's own, which takes them one after the other."""

import pytest
import torch

from clips.training import muon

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
