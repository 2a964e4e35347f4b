"""Texts and captions in rows without padding: the outputs and gradients of padded sequences, one text at a time."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from conftest import random_model, tiny_batch, tiny_run

from clips.model.captioner import Captioner, caption_mask
from clips.model.clips import CLIPSModel
from clips.model.text import TextStates, TextTower, word_slots

LAYOUTS = [
    {"pool": pool, "causal": causal, "pad_mask": mask}
    for pool, causal, mask in product(("cls", "eos"), (False, True), (False, True))
]


def padded(tower: TextTower, ids: torch.Tensor) -> TextStates:
    """Without rows: the blocks on the whole [B, L, D]."""
    return tower._states(tower.blocks(tower._embed(ids), tower._mask(ids)), ids)


def padded_captions(captioner: Captioner, patches, states, visible, ids) -> torch.Tensor:
    prefix = captioner.prefix(patches, states)
    x = torch.cat([prefix, captioner.positions(ids)], dim=1)
    mask = caption_mask(prefix.shape[1], ids.shape[1], visible, ids.device)
    return captioner.norm(captioner.blocks(x, mask)[:, -ids.shape[1] :])


def model_of(**fields) -> CLIPSModel:
    run = tiny_run(inputs="tokens")
    return random_model(replace(run, model=replace(run.model, text=replace(run.model.text, **fields))))


def a_text(tower: TextTower, name: str) -> torch.Tensor:
    """Five texts of many lengths, padded as far as the tower wants it."""
    ids = tiny_batch(0, size=5)[name]
    words, cls = ids[:, :-1], ids[:, -1:] if tower.config.pool == "cls" else ids[:, :0]
    room = 0 if tower.config.trim else tower.config.context_length - words.shape[1] - cls.shape[1]
    return torch.cat([words, words.new_zeros(5, room), cls], dim=1)


def read(texts: list[TextStates]) -> torch.Tensor:
    """A loss of all that may be read of them."""
    parts = []
    for weight, text in enumerate(texts, start=1):
        states = text.states if text.visible is None else text.states[text.visible]
        parts += [(text.pooled**3).sum(), weight * (states**3).sum()]
    return torch.stack(parts).sum()


def assert_equal_gradients(module: torch.nn.Module, expected: torch.Tensor, *losses: torch.Tensor) -> None:
    """A parameter that no loss reaches has none in either way."""
    names = [name for name, _ in module.named_parameters()]
    wanted, *others = (
        torch.autograd.grad(x, list(module.parameters()), allow_unused=True) for x in (expected, *losses)
    )
    for gradients in others:
        for name, ours, theirs in zip(names, gradients, wanted, strict=True):
            assert (ours is None) == (theirs is None), name
            if ours is not None:
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("fields", LAYOUTS, ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_texts_in_one_pass_are_two_padded_passes(fields: dict, checkpointing: bool) -> None:
    model = model_of(**fields)
    model.set_activation_checkpointing(checkpointing)
    tower, texts = model.text, [a_text(model.text, name) for name in ("web", "sub")]
    counts = model.counts(torch.zeros(5, 3, 32, 32), texts, None).texts
    if tower.config.trim:
        assert all(count < ids.numel() for count, ids in zip(counts, texts, strict=True)), "nothing is padded here"
    expected = [padded(tower, ids) for ids in texts]
    one, counted = tower(*texts), tower(*texts, counts=counts)
    for ours, theirs in zip(one, expected, strict=True):
        torch.testing.assert_close(ours.pooled, theirs.pooled, atol=1e-5, rtol=1e-5)
        shown = slice(None) if ours.visible is None else ours.visible
        torch.testing.assert_close(ours.states[shown], theirs.states[shown], atol=1e-5, rtol=1e-5)
    assert_equal_gradients(tower, read(expected), read(one), read(counted))


@pytest.mark.parametrize("pad_mask", [False, True])
def test_captions_in_rows_are_padded_captions(pad_mask: bool) -> None:
    model, batch = model_of(pad_mask=pad_mask), tiny_batch(2, size=5)
    web = batch["web"]
    if not pad_mask:
        web = torch.cat([web[:, :-1], web.new_zeros(5, 4), web[:, -1:]], dim=1)
    ids, predicts = batch["caption"][:, :-1], word_slots(batch["caption"], 0)[:, 1:]
    assert not predicts.all(), "nothing is padded here"
    tokens = model.visual(batch["images"])[1]
    (text,) = model.text(web)
    inputs = (model.visual.patches(tokens), text.states, text.visible, ids)
    count = model.counts(batch["images"], [web], batch["caption"]).captioner
    ways = [
        model.captioner(*inputs, predicts),
        model.captioner(*inputs, predicts, count),
        model.captioner(*inputs),
        padded_captions(model.captioner, *inputs),
    ]
    for states in ways[:-1]:
        torch.testing.assert_close(states[predicts], ways[-1][predicts], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ways[2], ways[3], atol=1e-5, rtol=1e-5)
    losses = [(states[predicts] ** 3).sum() for states in ways]
    for loss in losses[:-1]:
        retained = [torch.autograd.grad(x, tokens, retain_graph=True)[0] for x in (loss, losses[-1])]
        torch.testing.assert_close(*retained, atol=1e-5, rtol=1e-4)
