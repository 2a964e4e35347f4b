"""Examples of what a model does, as sections of a page: retrieval, zero-shot predictions, generated captions."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from clips.common.page import Bar, Card, Cards, Picture, Section, thumbnail
from clips.config import RunConfig
from clips.data.images import decode_image, eval_transform
from clips.data.tokenizer import CaptionTokenizer
from clips.evaluation.encode import ImageSet, encode_images, encode_texts, evaluating, prompt_features
from clips.evaluation.evaluate import labelled_rows, retrieval_rows
from clips.evaluation.testsets import PROTOCOLS, SourceSet, classes_of, open_test_set
from clips.model.clips import CLIPSModel

THUMBNAIL = 144
"""Longest side of an example's picture, pixels."""
FOUND = 5
"""Pictures, and classes, that an example shows."""
RETRIEVAL_NOTE = "A caption of the test set, its own image, and the images found for it, best first; green is its own."
ZERO_SHOT_NOTE = "Probabilities over all classes, mean of the prompts; green is the true class."


@torch.no_grad()
def collect_examples(
    model: CLIPSModel,
    tokenizer: CaptionTokenizer,
    run: RunConfig,
    split: str = "test",
    n: int = 8,
    *,
    image_size: int | None = None,
    pool: int = 1000,
) -> list[Section]:
    """n examples of each kind from `pool` images of a split, half of them misses if there are enough."""
    items, classes = open_test_set(run.data, split)
    size = image_size or model.visual.image_size
    batch = run.eval.batch_size
    images = encode_images(model, items, image_size=size, batch_size=batch, workers=run.data.workers, limit=pool)
    protocol = next((name for name in PROTOCOLS if len(retrieval_rows(images, name)) > 1), "web")
    scenes = retrieval_rows(images, protocol)
    sections = []

    if len(scenes) > 1:
        queries = [images.captions[row][protocol][0] for row in scenes]
        similarity = encode_texts(model, tokenizer, queries, batch_size=batch) @ images.features[scenes].T
        ranks = (similarity >= similarity.diagonal()[:, None]).sum(dim=1).tolist()
        cards = []
        for i in _half_misses([rank == 1 for rank in ranks], n):
            pictures = [Picture(_small(items, images, scenes[i]), "own image")]
            best = similarity[i].topk(min(FOUND, len(scenes))).indices.tolist()
            for rank, j in enumerate(best, start=1):
                pictures.append(Picture(_small(items, images, scenes[j]), str(rank), rank == ranks[i]))
            is_hit = ranks[i] == 1
            cards.append(Card(queries[i], pictures, badge=("hit" if is_hit else f"rank {ranks[i]}", is_hit)))
        sections.append(Section("Retrieval: hits and misses", [Cards(cards)], RETRIEVAL_NOTE))

    labels_by_row = labelled_rows(images)
    if labels_by_row and (classes := classes or classes_of(labels_by_row.values())):
        rows, names = list(labels_by_row), list(labels_by_row.values())
        prompts = prompt_features(model, tokenizer, classes, batch_size=batch)
        weights = torch.nn.functional.normalize(prompts.mean(dim=1), dim=-1)
        scale = model.logit_scale.exp().clamp(max=100).cpu()
        odds = (scale * images.features[rows] @ weights.T).softmax(dim=-1)
        right = (odds.argmax(dim=1) == torch.tensor(classes.index(names))).tolist()
        cards = []
        for i in _half_misses(right, n):
            label = classes.names[classes.index([names[i]])[0]]
            likely = odds[i].topk(min(FOUND, len(classes.names)))
            bars = []
            for share, j in zip(likely.values.tolist(), likely.indices.tolist(), strict=True):
                name = classes.names[j]
                bars.append(Bar(name, 100 * share, (f"{100 * share:.1f} %",), is_right=name == label))
            picture = Picture(_small(items, images, rows[i]))
            cards.append(Card(label, [picture], badge=("right" if right[i] else "wrong", right[i]), bars=bars))
        sections.append(Section("Zero-shot predictions", [Cards(cards)], ZERO_SHOT_NOTE))

    if model.captioner is not None:
        device = model.visual.patch_embed.weight.device
        transform = eval_transform(size)
        cards = []
        for row in [row for row in scenes if images.captions[row].get("web") and images.captions[row].get("long")][:n]:
            item = items.read(images.indices[row])
            web = item.captions["web"]
            ids = tokenizer.for_tower(web, run.model.text).to(device)
            pixels = transform(decode_image(item.image))[None].to(device)
            with evaluating(model, size):
                generated = model.caption(pixels, ids, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)[0]
            texts = {"long caption": item.captions["long"][0], "web caption": web[0]}
            picture = Picture(_small(items, images, row))
            cards.append(Card(tokenizer.decode(generated), [picture], [(*text, None) for text in texts.items()]))
        config = model.captioner.config
        note = "The captioner reads the image and the web caption; it learned the long caption."
        if config.inputs == "queries":
            note += " With learned queries each position names its likeliest word alone: no fluent text."
        sections.append(Section("Captions", [Cards(cards)], note))
    return [section for section in sections if section.blocks != [Cards([])]]


def _small(items: SourceSet, images: ImageSet, row: int) -> bytes:
    return thumbnail(decode_image(items.read(images.indices[row]).image), THUMBNAIL)


def _half_misses(hits: Sequence[bool], n: int) -> list[int]:
    """n indices: half hits, half misses, each filled up by the other kind; hits first."""
    order = random.Random(0).sample(range(len(hits)), len(hits))
    kinds = [[i for i in order if hits[i] is kind] for kind in (True, False)]
    misses = kinds[1][: max(n // 2, n - len(kinds[0]))]
    return kinds[0][: n - len(misses)] + misses
