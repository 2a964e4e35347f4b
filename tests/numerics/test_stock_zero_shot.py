"""Stock open_clip on an export, on the demo's test scenes: the same class and rank for every item as our evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import random_model, tiny_run
from PIL import Image

from clips.config import DataConfig
from clips.data.demo import CONCEPTS, PROMPTS, ensure_demo
from clips.data.images import decode_image, eval_transform
from clips.data.tokenizer import build_tokenizer
from clips.evaluation.encode import encode_images, encode_texts, prompt_features
from clips.evaluation.evaluate import labelled_rows, measure, retrieval_rows
from clips.evaluation.testsets import load_classes, open_test_set
from clips.weights.export import export_all

CORPUS = [template.format(concept) for template in PROMPTS for concept in CONCEPTS]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"train": 8, "val": 8, "test": 200}
    return ensure_demo(tmp_path_factory.mktemp("demo") / "data", sizes=sizes, image_size=32)


@pytest.mark.parametrize("pad_mask", [False, True])
@torch.no_grad()
def test_zero_shot_and_retrieval_through_stock_open_clip_are_ours(demo: Path, tmp_path: Path, pad_mask: bool) -> None:
    tokenizer = build_tokenizer("wordpiece", CORPUS, vocab_size=400)
    run = tiny_run(pad_mask=pad_mask)
    text = replace(run.model.text, vocab_size=tokenizer.vocab_size, context_length=24)
    data = DataConfig(train=str(demo / "train"), test=str(demo / "test"), workers=0)
    run = replace(run, model=replace(run.model, text=text), data=data)
    model = random_model(run)
    items, classes = open_test_set(run.data, "test")[0], load_classes(demo / "concepts.json")
    pixels = torch.stack([eval_transform(32)(decode_image(items.read(index).image)) for index in range(len(items))])
    # What all features of an untrained model have in common is taken out by the last norms' biases.
    model.eval().visual.norm.bias -= model.visual(pixels)[0].mean(dim=0)
    model.text.norm.bias -= model.text(tokenizer(classes.prompts(), 24, trim=pad_mask))[0].pooled.mean(dim=0)
    images = encode_images(model, items, batch_size=64)
    export_all(model, run, tokenizer, tmp_path / "export", torch.randn(2, 3, 32, 32), ["a cat", "two dogs"])

    source = f"local-dir:{tmp_path / 'export' / 'open_clip'}"
    stock, _, preprocess = open_clip.create_model_and_transforms(source)
    stock_tokenizer = open_clip.get_tokenizer(source)
    pictures = [tmp_path / f"{index}.png" for index in images.indices]
    for index, path in zip(images.indices, pictures, strict=True):
        path.write_bytes(items.read(index).image)
    features = stock.eval().encode_image(torch.stack([preprocess(Image.open(path)) for path in pictures]), True)

    labelled = labelled_rows(images)
    heads = open_clip.build_zero_shot_classifier(
        stock, stock_tokenizer, classes.names, [lambda name, t=t: t.format(name) for t in classes.templates]
    )
    theirs = (features[list(labelled)] @ heads).argmax(1)
    prompts = prompt_features(model, tokenizer, classes, batch_size=64)
    weights = F.normalize(prompts.mean(dim=1), dim=-1)
    ours = (images.features[list(labelled)] @ weights.T).argmax(1)
    assert len(labelled) == 100
    assert len(set(ours.tolist())) > 10  # otherwise equality would say nothing
    assert torch.equal(theirs, ours)
    figures = measure(model, tokenizer, images, classes, batch_size=64)
    labels = torch.tensor(classes.index(list(labelled.values())))
    assert figures["zero_shot_top1"].value == pytest.approx(100 * (theirs == labels).double().mean().item(), abs=1e-4)

    rows = retrieval_rows(images, "sentence")
    captions = [images.captions[row]["sentence"][0] for row in rows]
    assert len(set(captions)) == len(captions) == 100
    stock_similarity = features[rows] @ stock.encode_text(stock_tokenizer(captions), True).T
    similarity = images.features[rows] @ encode_texts(model, tokenizer, captions, batch_size=64).T
    for name, found, own in [("i2t", stock_similarity, similarity), ("t2i", stock_similarity.T, similarity.T)]:
        ranks = [(scores > scores.diagonal()[:, None]).sum(1) for scores in (found, own)]
        assert torch.equal(*ranks)
        assert len(set(ranks[0].tolist())) > 10
        for k in (1, 5, 10):
            recall = 100 * (ranks[0] < k).double().mean().item()
            assert figures[f"sentence_{name}_r{k}"].value == pytest.approx(recall, abs=1e-4)
