"""`from clips import CLIPS`: the towers' own features, whatever form images and texts come in; search in folders."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_model, run_python, tiny_run
from range_server import serving
from tiny_mllm import make_image, write_export

from clips import CLIPS
from clips.common.errors import UserError
from clips.data.images import eval_transform
from clips.data.tokenizer import build_tokenizer
from clips.search import Index
from clips.weights.export import write_native

TEXTS = ["a dog", "a cat at a dog", "", "a dog"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and a folder with twelve images, one of them in a folder of its own, and a broken one."""
    place = tmp_path_factory.mktemp("search")
    write_export(place / "runs" / "clips")
    (place / "images" / "more").mkdir(parents=True)
    for i in range(12):
        make_image(40, seed=i).save(place / "images" / ("more/11.png" if i == 11 else f"{i:02}.png"))
    (place / "images" / "broken.jpg").write_bytes(b"no image")
    return place


@pytest.fixture(scope="module")
def opened(place: Path) -> CLIPS:
    return CLIPS.from_pretrained(place / "runs" / "clips", device="cpu")


def test_images_of_every_form_give_the_tower_s_features(opened: CLIPS, tmp_path: Path) -> None:
    images = [make_image(40 + i, seed=i) for i in range(70)]  # more than one batch
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


def test_texts_and_similarity(opened: CLIPS) -> None:
    with torch.no_grad():
        expected = torch.cat([opened.model.encode_text(opened.tokenize([text])) for text in TEXTS])
    features = opened.encode_text(TEXTS)
    torch.testing.assert_close(features, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(opened.encode_text("a dog"), expected[:1], atol=1e-6, rtol=0)
    torch.testing.assert_close(opened.encode_text(text for text in TEXTS), expected, atol=1e-6, rtol=0)
    image = make_image()
    torch.testing.assert_close(opened.similarity(image, TEXTS), opened.encode_image(image) @ features.T)
    assert opened.similarity([image, image], "a dog").shape == (2, 1)
    assert not features.requires_grad


def test_labels_are_the_mean_over_prompts(opened: CLIPS) -> None:
    prompts = [template.format("dog") for template in opened.templates]
    expected = torch.nn.functional.normalize(opened.encode_text(prompts).mean(dim=0), dim=0)
    for labels in (("dog",), ["dog", "cat"], iter(["dog"]), "dog"):
        torch.testing.assert_close(opened.encode_labels(labels)[0], expected, atol=1e-6, rtol=0)
    plain = opened.encode_labels(["dog"], templates=["a {} at a {"])
    torch.testing.assert_close(plain, opened.encode_text("a dog at a {"), atol=1e-6, rtol=0)
    assert opened.encode_labels([]).shape == (0, opened.embed_dim)
    with pytest.raises(UserError, match=r"'a dog' has no \{\}"):
        opened.encode_labels(["dog"], templates="a dog")


def test_classify_gives_the_softmax_of_open_clip_by_label(opened: CLIPS) -> None:
    images, labels = [make_image(40, seed=i) for i in range(3)], ["dog", "cat", "two dogs"]
    expected = (opened.logit_scale * opened.encode_image(images) @ opened.encode_labels(labels, "a {}").T).softmax(-1)
    found = opened.classify(images, labels, templates="a {}")
    torch.testing.assert_close(torch.tensor([[scores[label] for label in labels] for scores in found]), expected)
    assert [next(iter(scores)) for scores in found] == [labels[i] for i in expected.argmax(dim=1)]
    assert opened.classify(images[0], labels)[0].keys() == set(labels)


def test_captions_are_the_captioner_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run()
    tokenizer = build_tokenizer("wordpiece", ["a red cat and two dogs"] * 3, vocab_size=run.model.text.vocab_size)
    model = random_model(run).eval()
    write_native(model, run, tokenizer, tmp_path / "native")
    opened = CLIPS.from_pretrained(tmp_path / "native", device="cpu")
    monkeypatch.setattr("clips.encoder.BATCH", 2)
    images, webs = [make_image(seed=i) for i in range(3)], ["a cat", "two red dogs", ""]
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
    (tmp_path / "no.png").write_bytes(b"dear image")
    with pytest.raises(UserError, match=r"no\.png"):
        opened.encode_image(tmp_path / "no.png")
    with pytest.raises(TypeError, match="int"):
        opened.encode_text(["a", 3])
    with pytest.raises(UserError, match="has no captioner"):
        opened.caption(make_image())
    with pytest.raises(UserError, match="holds no trained model"):
        CLIPS.from_pretrained(tmp_path)


def test_an_index_finds_what_a_sorted_list_of_cosines_finds(opened, place, tmp_path, caplog):
    index = opened.index(place / "images")
    assert len(caplog.messages) == 1
    assert "broken.jpg" in caplog.text, "the unreadable image is named"
    assert len(opened.index(place / "images", "0*.png")) == 10
    assert (len(index), index.skipped, index.features.nbytes) == (12, 1, 4 * 12 * opened.embed_dim)
    cosines = torch.from_numpy(index.features) @ opened.encode_text("a dog at a cat in the sun")[0]
    matches = index.search("a dog at a cat in the sun", k=5)
    assert [match.path for match in matches] == [index.paths[i] for i in cosines.argsort(descending=True)[:5]]
    assert [match.score for match in matches] == pytest.approx(sorted(cosines.tolist(), reverse=True)[:5], abs=1e-6)
    assert len(index.search("dog", k=100)) == 12
    own = place / "images" / "more" / "11.png"
    assert index.search(own, k=1)[0].path == index.search(str(own), k=1)[0].path == str(own.resolve())
    with pytest.raises(UserError, match=r"a/25\.gif: No such file"):  # no search for the words of a path
        index.search("a/25.gif")

    index.save(tmp_path / "made" / "images.idx")  # which every further run refused for its name
    loaded = opened.load_index(tmp_path / "made" / "images.idx")
    assert loaded.search("dog") == index.search("dog")
    Index(index.paths, torch.from_numpy(index.features), index.encode, "other").save(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="weights: remove it"):
        opened.load_index(tmp_path / "other.safetensors")
    for file in (place / "runs/clips/export/native/model.safetensors", tmp_path):
        with pytest.raises(UserError, match="is "):
            opened.load_index(file)


def test_a_kept_index_is_made_once_and_anew_after_a_change(opened: CLIPS, tmp_path: Path) -> None:
    """No time decides: clocks tick slowly, or stand wrong."""
    folder = tmp_path / "images"
    file = folder / "kept.safetensors"
    folder.mkdir()
    make_image(40, seed=0).save(folder / "0.png")
    os.utime(folder / "0.png", (4e9, 4e9))
    opened.kept_index(folder, file=file)
    written = file.stat().st_mtime_ns
    assert len(opened.kept_index(folder, file=file)[0]) == 1
    assert file.stat().st_mtime_ns == written
    make_image(40, seed=1).save(folder / "1.png")
    assert [len(opened.kept_index(folder, file=file)[0]) for _ in range(2)] == [2, 2]


def test_an_index_in_its_folder_by_a_relative_path_is_made_once(opened, tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    make_image(40).save(tmp_path / "photos" / "0.png")
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    made, path = opened.kept_index("photos", file="photos/index.safetensors")
    assert path == tmp_path / "photos/index.safetensors"
    monkeypatch.setattr(opened, "index", lambda *_, **__: pytest.fail("it is made again"))
    assert opened.kept_index("photos", file="photos/index.safetensors")[0].paths == made.paths
    with pytest.raises(UserError, match="nothing can be written to"):  # asked for before an hour's work
        opened.kept_index("photos", file="file/index.safetensors")


def test_the_command_indexes_once_and_shows_images(place, tmp_path):
    words = ["--model", place / "runs/clips", "--image-folder", place / "images", "--k", "3", "--device", "cpu"]
    env = {"CLIPS_MLLM_CACHE": str(tmp_path / "cache")}
    first = run_python("scripts/search.py", "a dog", *words, "--output", tmp_path / "found.html", env=env)
    assert "12 images of" in first.stderr
    assert "1 could not be read" in first.stderr
    (made,) = (tmp_path / "cache/search").iterdir()
    time = made.stat().st_mtime_ns
    assert (tmp_path / "found.html").read_text().count("data:image/png;base64,") == 3
    again = run_python("scripts/search.py", place / "images/03.png", *words, env=env)
    assert made.stat().st_mtime_ns == time
    assert again.stdout.splitlines()[0].endswith("03.png")  # the name of an image is that image, and no text


def test_folders_and_addresses_are_images_too(opened: CLIPS, place: Path, tmp_path: Path) -> None:
    make_image(40).save(tmp_path / "a.png")
    make_image(40, seed=1).save(tmp_path / "b.png")
    wanted = opened.encode_image([tmp_path / "a.png", tmp_path / "b.png"])
    assert torch.equal(opened.encode_image(str(tmp_path)), wanted)
    with pytest.raises(UserError, match="folder"):
        opened.encode_image([tmp_path])
    with serving(tmp_path) as server:
        assert torch.allclose(opened.encode_image(f"{server.url}/a.png"), wanted[:1], atol=1e-6)
        with pytest.raises(UserError, match=r"none\.png: FileNotFoundError"):
            opened.encode_image(f"{server.url}/none.png")
