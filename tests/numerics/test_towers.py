"""Text towers of every shape against a plain reference, one token at a time; what a shape must never depend on.

Other image towers are compared with transformers, timm and open_clip: test_foreign_weights.py, test_open_clip.py.
"""

import dataclasses
import itertools
import math
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from conftest import random_model, tiny_batch, tiny_run
from tiny_mllm import SHAPES, clips_model

from clips.common.errors import UserError
from clips.common.tensors import assign_weights
from clips.config import RunConfig, TextConfig, VisionConfig
from clips.data.tokenizer import CaptionTokenizer, build_tokenizer
from clips.model.captioner import Captioner, caption_mask
from clips.model.clips import CLIPSModel, count_tokens
from clips.model.text import TextStates, TextTower, word_slots
from clips.model.vision import VisionTower
from clips.training.trainer import Task
from clips.weights.foreign import read_transformers
from clips.weights.hf_vit import write_hf_vit

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
TEXT = [
    {"pool": pool, "causal": causal, "pad_mask": pad_mask, "activation": activation}
    for (pool, causal, pad_mask), activation in zip(
        itertools.product(("cls", "eos"), (False, True), (False, True)),
        itertools.cycle(("gelu", "gelu_tanh", "quick_gelu")),
    )
]


ACTIVATIONS = {
    "quick_gelu": lambda x: x / (1 + (-1.702 * x).exp()),
    "gelu": lambda x: x * 0.5 * (1 + (x / math.sqrt(2)).erf()),
    "gelu_tanh": lambda x: 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh()),
}


def norm(x, w, name, eps):
    return (x - x.mean()) / (x.var(unbiased=False) + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x, w, name):
    return w[f"{name}.weight"] @ x + w[f"{name}.bias"]


def blocks(x_LD, w, config, sees):
    """`sees(i, j)`: whether slot i attends to slot j."""
    D, H = config.width, config.heads
    for layer in range(config.layers):
        name = f"blocks.{layer}"
        qkv = [linear(norm(x, w, f"{name}.norm1", config.norm_eps), w, f"{name}.attn.qkv").view(3, H, -1) for x in x_LD]
        out = []
        for i, x in enumerate(x_LD):
            heads = []
            for h in range(H):
                seen = [j for j in range(len(x_LD)) if sees(i, j)]
                scores = torch.stack([qkv[i][0, h] @ qkv[j][1, h] / math.sqrt(D / H) for j in seen]).softmax(0)
                heads.append(sum(s * qkv[j][2, h] for s, j in zip(scores, seen, strict=True)))
            x = x + linear(torch.cat(heads), w, f"{name}.attn.proj")
            hidden = linear(norm(x, w, f"{name}.norm2", config.norm_eps), w, f"{name}.mlp.fc1")
            out.append(x + linear(ACTIVATIONS[config.activation](hidden), w, f"{name}.mlp.fc2"))
        x_LD = out
    return x_LD


def slow_text(tower, ids):
    """Pooled feature of one row of ids; the padding id is 0."""
    config, w = tower.config, tower.state_dict()
    last = max(i for i, token in enumerate(ids[:-1] if config.pool == "cls" else ids) if token)  # eos
    slots = [*range(len(ids) - 1), config.context_length - 1 if config.pool == "cls" else len(ids) - 1]
    tokens = [w["token_embed.weight"][token] + w["pos_embed"][slot] for token, slot in zip(ids, slots, strict=True)]

    def sees(i, j):
        first_padding = last + 1 if config.pool == "cls" else last  # as open_clip masks for a CLS
        return (not config.causal or j <= i) and (not config.pad_mask or j <= first_padding)

    tokens = blocks(tokens, w, config, sees)
    return norm(tokens[-1] if config.pool == "cls" else tokens[last], w, "norm", config.norm_eps)


def moved(tower):
    """`tower` with every parameter moved from where it starts."""
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return tower.eval()


def vision(**fields):
    return VisionConfig(**({"width": 16, "layers": 2, "heads": 2, "image_size": 12, "patch_size": 4} | fields))


@pytest.mark.parametrize("fields", TEXT, ids=str)
@torch.no_grad()
def test_text_towers_equal_the_plain_reference(fields):
    torch.manual_seed(0)
    config = TextConfig(width=16, layers=2, heads=2, context_length=9, vocab_size=20, norm_eps=1e-4, **fields)
    tower = moved(TextTower(config, 8, pad_id=0))
    words = [[1, 5, 6, 2], [1, 2], [1, 7, 8, 9, 10, 11, 2]]
    slots = 8 if config.pool == "cls" else 9
    rows = [row + [0] * (slots - len(row)) + [3] * (config.pool == "cls") for row in words]
    pooled = tower(torch.tensor(rows))[0].pooled
    for actual, row in zip(pooled, rows, strict=True):
        torch.testing.assert_close(actual, slow_text(tower, row), **CLOSE)
    if config.trim:  # the same at the batch's own length
        short = [[*row[:8], 3] if config.pool == "cls" else row[:7] for row in rows]
        torch.testing.assert_close(tower(torch.tensor(short))[0].pooled, pooled, **CLOSE)
    else:
        with pytest.raises(ValueError, match="context is 9"):
            tower(torch.tensor([row[1:] for row in rows]))


@pytest.mark.parametrize("cls", [True, False])
@torch.no_grad()
def test_an_image_of_another_size_equals_the_plain_reference(cls):
    torch.manual_seed(0)
    tower = moved(VisionTower(vision(cls=cls), 8))
    tower.set_image_size(20)
    image, w = torch.randn(3, 20, 20), tower.state_dict()

    def token(row, column):
        patch = image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        angles = [place / 10_000 ** (torch.arange(4) / 4) for place in (column, row)]
        position = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)])
        return (w["patch_embed.weight"] * patch).sum((1, 2, 3)) + w["patch_embed.bias"] + position

    tokens = ([w["cls_token"]] if cls else []) + [token(row, column) for row in range(5) for column in range(5)]
    tokens = torch.stack(blocks(tokens, w, tower.config, lambda i, j: True))
    pooled, actual = tower(image[None])
    torch.testing.assert_close(actual[0], tokens, **CLOSE)
    torch.testing.assert_close(pooled[0], norm(tokens[cls:].mean(0), w, "norm", 1e-6), **CLOSE)


@torch.no_grad()
def test_learned_positions_keep_their_shape_and_are_resampled_as_open_clip_does():
    from open_clip.model import resize_pos_embed

    torch.manual_seed(0)
    tower = moved(VisionTower(vision(pos_embed="learned", pre_norm=True), 8))
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    tower.set_image_size(20)
    assert tower(torch.randn(1, 3, 20, 20))[1].shape == (1, 26, 16)
    for name, value in tower.state_dict().items():
        assert torch.equal(value, before[name]), name
    stock = type("Stock", (), {"visual": type("Visual", (), {"grid_size": (5, 5)})})
    state = {"visual.positional_embedding": before["pos_embed"]}
    resize_pos_embed(state, stock)
    assert torch.equal(tower.positions(), state["visual.positional_embedding"])
    tower.set_image_size(12)
    assert torch.equal(tower.positions(), before["pos_embed"])
    with pytest.raises(ValueError, match="call set_image_size"):
        tower(torch.randn(1, 3, 20, 20))


def test_learned_positions_train_at_every_size():
    torch.manual_seed(0)
    tower = moved(VisionTower(vision(pos_embed="learned", cls=False), 8))
    for size in (8, 12, 20):
        tower.set_image_size(size)
        tower.zero_grad()
        tower(torch.randn(1, 3, size, size))[0].sum().backward()
        assert tower.pos_embed.grad.abs().sum(dim=1).min() > 0, size


def reshaped(**fields) -> RunConfig:
    run = tiny_run(inputs="tokens")
    return dataclasses.replace(
        run,
        model=dataclasses.replace(
            run.model,
            vision=dataclasses.replace(run.model.vision, cls=False),
            text=dataclasses.replace(run.model.text, **fields),
        ),
    )


@pytest.mark.parametrize("pad_mask", [False, True])
def test_a_captioner_never_sees_the_padding_of_a_text_without_cls(pad_mask):
    model = random_model(reshaped(pool="eos", causal=True, pad_mask=pad_mask)).eval()
    batch = tiny_batch(1, size=3)
    web = batch["web"][:, :-1]
    longer = torch.cat([web, torch.zeros(3, 5, dtype=torch.long)], dim=1)
    a, b = (model(batch["images"], [ids], batch["caption"]) for ids in (web, longer))
    torch.testing.assert_close(a.caption_states, b.caption_states, **CLOSE)
    torch.testing.assert_close(a.text_features[0], b.text_features[0], **CLOSE)
    out = [model.caption(batch["images"], ids, bos_id=1, eos_id=2).tolist() for ids in (web, longer)]
    assert out[0] == out[1]


def test_a_word_with_the_id_of_padding_is_no_padding():
    """CLIP pads with 0, which is "!": it is a target of the captioner and a word of the text wherever it stands."""
    ids = torch.tensor([[1, 0, 5, 0, 2, 0, 0], [1, 2, 0, 0, 0, 0, 0]])
    assert word_slots(ids, 0).tolist() == [[True] * 5 + [False] * 2, [True] * 2 + [False] * 5]
    run = reshaped(pool="eos", causal=True)
    task = Task(random_model(run), run.task, run.train)
    batch = tiny_batch(0, size=2) | {"web": ids, "sub": ids}
    plain, other = (task(batch | {"caption": caption})[1] for caption in (ids, ids.where(ids != 5, 0)))
    assert plain["caption_loss"] != other["caption_loss"]
    states = task.model(batch["images"], [ids], ids).caption_states
    logits = task.model.captioner.head(states).float()
    targets = [[0, 5, 0, 2], [2]]
    losses = [F.cross_entropy(logits[b, : len(t)], torch.tensor(t), reduction="sum") for b, t in enumerate(targets)]
    torch.testing.assert_close(plain["caption_loss"], sum(losses).detach() / 5, **CLOSE)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cls": False, "pool": "cls"}, r"vision\.pool=cls .* vision\.cls=false"),
        ({"cls": False, "pre_norm": True}, r"vision\.pre_norm=true with vision\.cls=false"),
        ({"activation": "relu"}, r"vision\.activation = 'relu'"),
        ({"pos_embed": "rotary"}, r"vision\.pos_embed = 'rotary'"),
        ({"width": 18}, r"divisible by 4"),
    ],
)
def test_impossible_image_towers_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        vision(**fields)
    assert vision(width=18, pos_embed="learned").width == 18


def test_clip_s_tokenizer_needs_a_tower_without_cls():
    run = tiny_run()
    with pytest.raises(UserError, match=r"set model\.text\.pool=eos"):
        run.override(["captions.tokenizer=clip"])
    assert run.override(["captions.tokenizer=clip", "model.text.pool=eos"]).model.text.words == 14
    with pytest.raises(UserError, match=r"model\.text\.pool=eos"):
        build_tokenizer("clip")(["a"], 16, trim=True)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_an_image_tower_comes_back_from_transformers_with_its_projection(shape, tmp_path):
    trained = clips_model(**SHAPES[shape])
    write_hf_vit(trained.visual, tmp_path)
    foreign = read_transformers(tmp_path)
    tower = VisionTower(foreign.vision, foreign.embed_dim)
    assign_weights(tower, {name.removeprefix("visual."): value for name, value in foreign.tensors.items()}, tmp_path)
    images = torch.randn(2, 3, 32, 32)
    for actual, expected in zip(tower(images), trained.visual(images), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    assert torch.equal(tower.proj.weight, trained.visual.proj.weight)


HOSTILE = [
    "",
    "  a  photo\tof\n a cat!",
    "It's the dog's; they'll I'M YOU'RE don't 'TIS",
    "Tom &amp;amp; Jerry &lt;b&gt; &#x1F600; &nbsp;",
    "ÐŸÑ€Ð¸Ð²ÐµÑ‚ cafÃ©, “quoted” ‘single’ …",
    "😀👨‍👩‍👧 emoji!!!🇩🇪",
    "ΟΔΟΣ ΣΊΣΥΦΟΣ İstanbul ſ 'ſ K ﬁ ﬆ ß ẞ",
    "日本語 テスト ١٢٣ ½ Ⅷ ²",
    "x\u200bz\u00a0y\u0085q\x1cw\ufeff\x00\x07",
    "!!! ! !? 3.50$ e-mail a_b",
    "a" * 300,
    "many words " * 60,
]


def test_clip_s_tokenizer_gives_open_clip_s_ids(tmp_path):
    import open_clip

    stock = open_clip.get_tokenizer("ViT-B-16")(HOSTILE)
    built = build_tokenizer("clip")
    assert (built.vocab_size, built.pad_id, built.bos_id, built.eos_id, built.cls_id) == (49408, 0, 49406, 49407, None)
    built.save(tmp_path)
    for tokenizer in (built, CaptionTokenizer.load(tmp_path)):
        assert tokenizer(HOSTILE, 77, trim=False, cls=False).tolist() == stock.tolist()
        assert tokenizer.decode(tokenizer(HOSTILE[3:4], 77, trim=False, cls=False)[0]) == "tom & jerry < b > 😀"
    tower = TextConfig(width=16, layers=1, heads=1, context_length=77, vocab_size=49408, causal=True, pool="eos")
    assert built.for_tower(["a cat", "a"], tower).shape == (2, 4)


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
    counts = count_tokens(model.config, 0, 32, texts, None).texts
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
    count = count_tokens(model.config, 0, batch["images"].shape[-1], [web], batch["caption"]).captioner
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
