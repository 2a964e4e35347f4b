"""`from clips import CLIPS`: the towers' own features, whatever form pictures and texts come in."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_model, tiny_run
from PIL import Image
from tiny_mllm import picture, write_export

from clips import CLIPS
from clips.common.errors import UserError
from clips.data.images import eval_transform
from clips.data.tokenizer import build_tokenizer
from clips.weights.export import write_native

TEXTS = ["a dog", "a cat at a dog", "", "a dog"]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> CLIPS:
    run = tmp_path_factory.mktemp("runs") / "clips"
    write_export(run)
    return CLIPS.from_pretrained(run, device="cpu")


def test_images_of_every_form_give_the_tower_s_features(opened: CLIPS, tmp_path: Path) -> None:
    images = [picture(40 + i, seed=i) for i in range(70)]  # more than one batch
    for i, image in enumerate(images[:2]):
        image.save(tmp_path / f"{i}.png")
    pixels = torch.stack([eval_transform(32)(image) for image in images])
    with torch.no_grad():
        expected = opened.model.encode_image(pixels)
    torch.testing.assert_close(opened.encode_image(images), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(opened.encode_image(pixels), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(opened.preprocess(images[3]), pixels[3])
    for one in (images[0], str(tmp_path / "0.png"), [tmp_path / "0.png"]):
        torch.testing.assert_close(opened.encode_image(one), expected[:1], atol=1e-6, rtol=0)
    arrays = [np.asarray(image) for image in images]
    for several in (iter(images), arrays, np.stack(arrays[:1]), list(pixels), pixels.double()):
        features = opened.encode_image(several)
        torch.testing.assert_close(features, expected[: len(features)], atol=1e-6, rtol=0)
    torch.testing.assert_close(opened.encode_image(pixels[0]), expected[:1], atol=1e-6, rtol=0)
    assert opened.encode_image([]).shape == opened.encode_text([]).shape == (0, opened.embed_dim)


def test_a_photo_is_upright_however_it_comes(opened: CLIPS, tmp_path: Path) -> None:
    tags = Image.Exif()
    tags[0x0112] = 6  # orientation: to be turned by 90°
    picture().save(tmp_path / "photo.png", exif=tags)
    turned = opened.encode_image(tmp_path / "photo.png")
    torch.testing.assert_close(opened.encode_image(Image.open(tmp_path / "photo.png")), turned, atol=1e-6, rtol=0)
    assert (opened.encode_image(picture()) - turned).abs().max() > 1e-4


def test_texts_and_similarity(opened: CLIPS) -> None:
    with torch.no_grad():
        expected = torch.cat([opened.model.encode_text(opened.tokenize([text])) for text in TEXTS])
    features = opened.encode_text(TEXTS)
    torch.testing.assert_close(features, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(opened.encode_text("a dog"), expected[:1], atol=1e-6, rtol=0)
    torch.testing.assert_close(opened.encode_text(text for text in TEXTS), expected, atol=1e-6, rtol=0)
    image = picture()
    torch.testing.assert_close(opened.similarity(image, TEXTS), opened.encode_image(image) @ features.T)
    assert opened.similarity([image, image], "a dog").shape == (2, 1)
    assert not features.requires_grad


def test_labels_are_the_mean_over_prompts(opened: CLIPS) -> None:
    prompts = [template.format("dog") for template in opened.templates]
    expected = torch.nn.functional.normalize(opened.encode_text(prompts).mean(dim=0), dim=0)
    torch.testing.assert_close(opened.encode_labels(("dog",))[0], expected, atol=1e-6, rtol=0)


def test_captions_are_the_captioner_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run()
    tokenizer = build_tokenizer("wordpiece", ["a red cat and two dogs"] * 3, vocab_size=run.model.text.vocab_size)
    model = random_model(run).eval()
    write_native(model, run, tokenizer, tmp_path / "native")
    opened = CLIPS.from_pretrained(tmp_path / "native", device="cpu")
    monkeypatch.setattr("clips.encoder.BATCH", 2)
    images, webs = [picture(seed=i) for i in range(3)], ["a cat", "two red dogs", ""]
    pixels = torch.stack([opened.preprocess(image) for image in images])
    ids = model.caption(pixels, opened.tokenize(webs), bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
    expected = [tokenizer.decode(row) for row in ids.tolist()]
    assert opened.caption(images, webs) == expected
    assert opened.caption(iter(images), iter(webs)) == expected
    assert opened.caption(images[2]) == opened.caption([images[2]], [""])
    assert opened.caption([]) == []
    with pytest.raises(ValueError, match="web captions"):
        opened.caption(images, webs[:2])


def test_mistakes_are_named(opened: CLIPS, tmp_path: Path) -> None:
    (tmp_path / "no.png").write_bytes(b"dear picture")
    with pytest.raises(UserError, match=r"no\.png"):
        opened.encode_image(tmp_path / "no.png")
    with pytest.raises(TypeError, match="int"):
        opened.encode_text(["a", 3])
    with pytest.raises(UserError, match="has no captioner"):
        opened.caption(picture())
    with pytest.raises(UserError, match="holds no trained model"):
        CLIPS.from_pretrained(tmp_path)
