"""Projectors: LLaVA's own modules and files, refusals, and the closed-form start."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny_original import projector as llava_projector
from torch import nn
from torch.nn.functional import normalize
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from mllm.model import projector_start
from mllm.model.projector import (
    init_projector,
    load_projector,
    projector_activation,
    projector_kind,
    save_projector,
    trainable_layers,
)
from mllm.model.projector_start import (
    FEWEST,
    Places,
    caption_targets,
    least_squares_init,
    sharpen,
    start_from_captions,
    telling_words,
)
from mllm.training.build import places_of_tokens


def make(kind="mlp2x_gelu", width=24, dim=64, seed=0):
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=width, num_attention_heads=2),
        text_config=LlamaConfig(hidden_size=dim, num_attention_heads=2),
        projector_hidden_act=projector_activation(kind),
    )
    torch.manual_seed(seed)
    projector = LlavaMultiModalProjector(config)
    init_projector(projector)
    return projector


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_files_of_llava_both_ways(tmp_path, kind):
    original = llava_projector(kind, sizes=(24, 64)).float()
    tensors = {f"model.mm_projector.{name}": tensor for name, tensor in original.state_dict().items()}
    torch.save(tensors, tmp_path / "llava.bin")
    projector = make(kind)
    load_projector(projector, tmp_path / "llava.bin")
    x = torch.randn(5, 24)
    assert torch.allclose(projector(x), original(x), atol=1e-6)

    save_projector(projector, tmp_path / "out" / "mm_projector.bin")
    written = torch.load(tmp_path / "out" / "mm_projector.bin", weights_only=True)
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)
    again = make(kind, seed=1)
    load_projector(again, tmp_path / "out")  # the directory stands for the file in it
    assert torch.equal(again(x), projector(x))


def test_other_names_are_read(tmp_path):
    """LLaVA's other prefixes, and transformers' names among other weights."""
    projector, path = make(), tmp_path / "p.bin"
    for seed, prefix in enumerate(("", "base_model.model.model.mm_projector.")):
        original = llava_projector("mlp2x_gelu", seed, (24, 64)).float()
        torch.save({prefix + name: tensor for name, tensor in original.state_dict().items()}, path)
        load_projector(projector, path)
        assert torch.equal(projector.linear_2.weight, original[2].weight)
    source = make("linear", seed=3)
    tensors = {f"model.multi_modal_projector.{name}": tensor for name, tensor in source.state_dict().items()}
    torch.save(tensors | {"lm_head.weight": torch.zeros(3)}, path)
    target = make("linear")
    load_projector(target, path)
    assert torch.equal(source.linear_1.weight, target.linear_1.weight)
    assert (projector_kind(target), list(trainable_layers(target))) == ("linear", ["linear_1"])


def ridge_reference(x, y, ridge):
    """Ridge regression with an unpenalised intercept, through the augmented normal equations."""
    x, y = x.double(), y.double()
    penalty = ridge * x.var(dim=0, correction=0).mean() * len(x)
    augmented = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    regular = penalty * torch.eye(augmented.shape[1], dtype=x.dtype)
    regular[-1, -1] = 0
    solution = torch.linalg.solve(augmented.T @ augmented + regular, augmented.T @ y)
    return solution[:-1].T, solution[-1]


def test_least_squares_linear_equals_ridge_regression():
    x, y = torch.randn(300, 24) * 3 + 1, torch.randn(300, 64)
    projector = make("linear")
    r2 = least_squares_init(projector, x, y, ridge=0.05)
    weight, bias = ridge_reference(x, y, 0.05)
    assert torch.allclose(projector.linear_1.weight.double(), weight, atol=1e-6)
    assert torch.allclose(projector.linear_1.bias.double(), bias, atol=1e-6)
    residual = (projector(x) - y).square().sum() / (y - y.mean(0)).square().sum()
    assert r2 == pytest.approx(1 - residual.item(), abs=1e-5)
    assert torch.equal(projector.linear_2.weight, torch.eye(64))


def test_least_squares_mlp_reaches_linear_maps_and_more():
    """24 features fit twice into 64 hidden units, so a linear target is met; a curved one better than linearly."""
    torch.manual_seed(0)
    x = torch.randn(4000, 24) @ torch.randn(24, 24) + 2
    linear = x @ torch.randn(24, 64) + torch.randn(64)
    mlp, straight = make(), make("linear")
    assert least_squares_init(mlp, x, linear, ridge=1e-6) > 0.9999
    assert torch.allclose(mlp(x), linear, atol=0.05 * linear.std())
    z = (x - x.mean(0)) / x.std(0)
    curved = linear / linear.std() + (z @ torch.randn(24, 64) / 5).abs()
    assert least_squares_init(mlp, x, curved, ridge=1e-4) > least_squares_init(straight, x, curved, ridge=1e-4) + 0.01


def test_caption_targets_weigh_words_by_rarity():
    embeddings = torch.randn(10, 4)
    captions = [[1, 2], [1, 3, 3], [1, 2, 4], [1, 2]]  # 1 in all, 2 in three, 3 and 4 in one of four
    targets = caption_targets(captions, embeddings)
    assert torch.allclose(targets[0], embeddings[2], atol=1e-4)
    assert torch.allclose(targets[1], embeddings[3], atol=1e-4)
    two, four = math.log(4 / 3), math.log(4)
    assert torch.allclose(targets[2], (two * embeddings[2] + four * embeddings[4]) / (two + four), atol=1e-4)
    with pytest.raises(ValueError, match="without a token"):
        caption_targets([[1], []], embeddings)


def scenes(count: int = 2000, things: int = 8) -> tuple[torch.Tensor, list[list[int]], torch.Tensor]:
    """Looks of things and of background, captions of images of four such patches, and their features."""
    torch.manual_seed(0)
    looks = torch.randn(things + 1, 24)
    shown = torch.randint(0, things + 1, (count, 4))  # the last is background, which no caption names
    captions = [[101, *{int(thing) for thing in row if thing < things}, 102] for row in shown]
    return looks, captions, looks[shown] + 0.3 * torch.randn(count, 4, 24)


def test_telling_words_are_neither_rare_nor_common():
    captions = [[1, 2, 2]] * FEWEST + [[1, 3]] * (FEWEST - 1) + [[1, 4]] * (FEWEST + 1) + [[1]] * 1000
    assert telling_words(captions, 9) == [4, 2]
    assert telling_words(captions, 1) == [4]


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_sharpened_tokens_point_at_what_they_show_and_at_their_place(kind):
    torch.manual_seed(1)
    _, captions, features = scenes()
    shown = torch.tensor([[caption[1]] for caption in captions if len(caption) == 3])  # captions of one thing
    of_one = torch.tensor([len(caption) == 3 for caption in captions])
    features = features + torch.randn(4, 24)
    words, projector = torch.randn(110, 64) * 3 + 1, make(kind)
    places = Places(
        torch.arange(4).expand(len(features), -1), normalize(torch.randn(4, 64)), [[200 + i] for i in range(4)]
    )
    start_from_captions(projector, features, captions, words)

    def metrics() -> tuple[float, float, float]:
        tokens = projector(features).detach() - words.mean(0)
        cosines = normalize(tokens, dim=-1) @ normalize(words[:8] - words.mean(0)).T
        named = (cosines[of_one].amax(1).argmax(-1) == shown[:, 0]).float().mean()
        placed = ((tokens @ places.directions.T).argmax(-1) == places.of_token).float().mean()
        return named.item(), placed.item(), (tokens.norm(dim=-1).mean() / 24).item()

    before = metrics()
    sharpen(projector, features, captions, words, places)
    named, placed, spread = metrics()
    assert named >= before[0] - 0.02
    assert named > 0.9
    assert before[1] < 0.6 < 0.9 < placed
    assert spread == pytest.approx(1, abs=0.2)
    if kind == "linear":
        assert torch.equal(projector.linear_2.weight, torch.eye(64))


def test_what_a_caption_says_of_a_place_is_what_stands_before_it():
    places = Places(torch.zeros(4), torch.zeros(3, 8), [[7, 8], [7, 9], [5]])
    said = places.said([[1, 2, 7, 8, 3, 7, 9, 1], [4, 4, 1, 5], [7, 8, 2], []], [1, 2, 3])
    assert said[0].tolist() == [[0.5, 0.5, 0], [0, 0, 1], [0, 0, 0]], "the last word stands behind the last place"
    assert said[1].tolist() == [[0, 0, 0], [0, 0, 0], [1, 0, 0]], "4 is none of the words"
    assert not said[2:].any()


def test_where_captions_name_places_tokens_learn_what_is_there():
    """Each token mixes the looks of all things of its image, its own thing most: only clauses tell them apart."""
    torch.manual_seed(2)
    looks = torch.randn(9, 24)
    shown = torch.stack([torch.randperm(9)[:2] for _ in range(2000)])
    features = (looks[shown] + 0.8 * looks[shown.flip(1)]).repeat_interleave(2, dim=1) + 0.3 * torch.randn(2000, 4, 24)
    features[:, :2] += torch.randn(24)
    words = torch.randn(110, 64) * 3 + 1
    captions = [[int(a), 100, int(b), 101] for a, b in shown]
    placed = Places(torch.tensor([0, 0, 1, 1]).expand(2000, -1), normalize(torch.randn(2, 64)), [[100], [101]])

    def named(places: Places) -> float:
        torch.manual_seed(0)
        projector = make("mlp2x_gelu")
        start_from_captions(projector, features, captions, words)
        sharpen(projector, features, captions, words, places)
        tokens = projector(features).detach() - words.mean(0)
        cosines = tokens @ normalize(words[:9] - words.mean(0)).T
        return (cosines.argmax(-1) == shown.repeat_interleave(2, dim=1)).float().mean().item()

    silent = replace(placed, words=[[102], [103]])  # places that no caption names
    assert named(silent) < 0.8 < named(placed)


def test_places_of_tokens_are_those_of_a_square_grid():
    words = torch.randn(200, 16)
    places = places_of_tokens(36, words, lambda text, **_: {"input_ids": [len(text), ord(text[1])]})
    rows, directions = places.of_token.view(6, 6).tolist(), places.directions
    assert (rows[0][0], rows[0][5], rows[5][0], rows[5][5], rows[2][3]) == (0, 1, 2, 3, 4), "in PLACES' order"
    assert directions.shape == (5, 16)
    assert (directions @ directions.T - torch.eye(5)).max() < 0.6, "told apart"
    assert places_of_tokens(35, words, None) is None


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_a_start_from_captions_puts_patches_near_the_words_for_what_they_show(kind):
    looks, captions, features = scenes()
    words, projector = torch.randn(110, 64) * 3 + 1, make(kind)
    r2 = start_from_captions(projector, features, captions, words)
    assert 0.1 < r2 < 0.9
    everything = projector(features).flatten(0, 1)
    tokens = projector(looks[:8]) - everything.mean(0)
    names = words[:8] - words[:8].mean(0)
    assert (nn.functional.cosine_similarity(tokens[:, None], names[None], dim=-1).argmax(1) == torch.arange(8)).all()
    assert torch.allclose(everything.mean(0), words.mean(0), atol=0.02), "the words' mean"
    spread = [(rows - rows.mean(0)).square().sum(-1).mean().sqrt().item() for rows in (everything, words)]
    assert spread[0] == pytest.approx(spread[1], rel=0.1), "and spread, up to the overlap of fitted and random part"


def test_words_that_few_captions_hold_have_units_of_their_own():
    """A quarter of them: each speaks most for its own thing, with the word's embedding, for a share of the variance."""
    looks, captions, features = scenes(4000, things=60)
    words, projector = torch.randn(110, 64), make()
    start_from_captions(projector, features, captions, words)
    telling = telling_words(captions, 16)
    units = projector.act(projector.linear_1(looks[telling]))[:, -16:]
    assert (units.argmax(1) == torch.arange(16)).all()
    columns = projector.linear_2.weight[:, -16:].T
    assert torch.allclose(nn.functional.cosine_similarity(columns, words[telling] - words.mean(0)), torch.ones(16))
    outputs = projector.act(projector.linear_1(features.flatten(0, 1)))[:, -16:] @ columns
    variance = (outputs - outputs.mean(0)).square().sum(-1).mean() / (words - words.mean(0)).square().sum(-1).mean()
    assert variance.item() == pytest.approx(projector_start.WORD_SHARE, rel=1e-3)
    assert torch.allclose(projector(features).flatten(0, 1).mean(0), words.mean(0), atol=0.02)


def test_a_start_from_captions_keeps_what_captions_do_not_tell():
    """A feature that no caption speaks of (say, the patch's place) can still be read from the tokens, linearly."""
    _, captions, features = scenes()
    features[..., 0] = torch.randn(features.shape[:2])
    projector = make()
    start_from_captions(projector, features, captions, torch.randn(110, 64))
    x, y = projector(features).flatten(0, 1).double(), features[..., 0].flatten().double()
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    rest = y - x @ torch.linalg.lstsq(x, y).solution
    assert rest.square().mean() < 0.05 * y.var()


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_a_start_survives_the_rounding_of_bf16_also_where_all_images_have_the_same_tokens(kind):
    """As those of a blind encoder, whose few tokens leave most axes of the features empty."""
    _, captions, _ = scenes()
    words = torch.randn(110, 64)
    tokens = 2 + torch.randn(1, 9, 24, generator=torch.Generator().manual_seed(0))
    features = tokens.expand(len(captions), -1, -1).contiguous()
    projector = make(kind)
    start_from_captions(projector, features, captions, words)
    exact, rounded = projector(tokens), projector(tokens.bfloat16().float())
    spread = (words - words.mean(dim=0)).norm(dim=1).mean()
    assert (exact - rounded).norm(dim=-1).max() < 0.1 * spread
