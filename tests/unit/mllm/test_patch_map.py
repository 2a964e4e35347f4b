"""The patch map of a tiny CLIPS export."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from tiny_mllm import picture, write_export

from clips import CLIPS
from clips.data.images import eval_transform
from mllm.chat.patch_map import patch_map

LABELS = ("a cat", "dog", "act", "god")


@pytest.fixture(scope="module", params=[{}, {"pre_norm": True}, {"cls": False}], ids=str)
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CLIPS:
    run = tmp_path_factory.mktemp("runs") / "clips"
    write_export(run, **request.param)
    return CLIPS.from_pretrained(run, device="cpu")


def text_features(encoder: CLIPS, texts: list[str]) -> torch.Tensor:
    ids = encoder.tokenizer(texts, encoder.model.config.text.context_length, trim=True)
    with torch.no_grad():
        return encoder.model.encode_text(ids)


def image_feature(encoder: CLIPS, image: Image.Image) -> torch.Tensor:
    with torch.no_grad():
        return encoder.model.encode_image(eval_transform(32)(image)[None])[0]


def test_patches_add_up_to_the_encoder_s_own_similarity(encoder: CLIPS) -> None:
    image, sentence = picture(), "a dog and a cat at a dog"
    expected = float(image_feature(encoder, image) @ text_features(encoder, [sentence])[0])
    heat = patch_map(encoder, image, sentence)
    assert heat.patches.shape == (4, 4)
    assert heat.similarity == pytest.approx(expected, abs=1e-5)
    assert heat.usual == 0
    assert heat.patches.mean() == pytest.approx(expected, abs=1e-5)
    assert heat.patches.std() > 1e-3
    relative = patch_map(encoder, image, sentence, LABELS)
    assert relative.similarity == pytest.approx(expected, abs=1e-5)
    assert relative.patches.mean() == pytest.approx(relative.similarity - relative.usual, abs=1e-5)
    assert abs(relative.usual) > 1e-4


def test_rows_of_the_map_go_down_and_columns_to_the_right(encoder: CLIPS) -> None:
    """The term of a patch is that of its token, in the order in which the tower cuts the image."""
    image = picture()
    with torch.no_grad():
        pooled, tokens = encoder.model.visual(eval_transform(32)(image)[None])
        length = encoder.model.visual.proj(pooled).norm()
        row, column = 2, 1
        patches = encoder.model.visual.patches(tokens)[0]
        token = patches[4 * row + column]
        mean = patches.mean(dim=0)
        norm = encoder.model.visual.norm
        scaled = (token - token.mean()) / (mean.var(unbiased=False) + norm.eps).sqrt() * norm.weight + norm.bias
        expected = encoder.model.visual.proj(scaled) @ text_features(encoder, ["a cat is a cat"])[0] / length
    assert patch_map(encoder, image, "a cat is a cat").patches[row, column] == pytest.approx(float(expected), abs=1e-4)
