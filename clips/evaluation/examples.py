"""Examples of what a model does, for a person to look at: retrieval, zero-shot predictions, generated captions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from clips.common.page import thumbnail
from clips.config import RunConfig, sides
from clips.data.images import decode_image, eval_transform
from clips.data.tokenizer import CaptionTokenizer
from clips.evaluation.encode import encode_images, encode_texts, evaluating, prompt_features
from clips.evaluation.evaluate import labelled_rows, retrieval_rows
from clips.evaluation.testsets import PROTOCOLS, classes_of, open_test_set
from clips.model.clips import CLIPSModel

THUMBNAIL = 144
"""Longest side of an example's picture, pixels."""


@dataclass
class Retrieved:
    """A caption and the images found for it, best first; `rank` counts from 1."""

    query: str
    truth: bytes
    found: list[bytes]
    rank: int


@dataclass
class Classified:
    image: bytes
    label: str
    classes: list[str]
    """Best first."""
    probabilities: list[float]


@dataclass
class Captioned:
    image: bytes
    web: str
    truth: str
    generated: str


@dataclass
class Examples:
    """Pictures (encoded, at most THUMBNAIL pixels) and what the model made of them."""

    retrieval: list[Retrieved] = field(default_factory=list)
    zero_shot: list[Classified] = field(default_factory=list)
    captions: list[Captioned] = field(default_factory=list)


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
) -> Examples:
    """n examples of each kind from `pool` images of a split, half of them misses if there are enough."""
    items, classes = open_test_set(run.data, split, run.captions.splitter)
    size, batch = image_size or model.visual.image_size, run.eval.batch_size
    images = encode_images(model, items, sizes=[sides(size)], batch_size=batch, workers=run.data.workers, limit=pool)

    def small(row: int) -> bytes:
        return thumbnail(decode_image(items.read(images.indices[row]).image), THUMBNAIL)

    examples = Examples()
    protocol = next((name for name in PROTOCOLS if len(retrieval_rows(images, name)) > 1), "web")
    scene = retrieval_rows(images, protocol)
    has_text_features = model.config.embed_dim > 0
    if len(scene) > 1 and has_text_features:
        queries = [images.captions[row][protocol][0] for row in scene]
        similarity = encode_texts(model, tokenizer, queries, batch_size=batch) @ images.features[scene].T
        own = similarity.diagonal()[:, None]
        ranks = (similarity >= own).sum(dim=1).tolist()
        for i in _half_misses([rank == 1 for rank in ranks], n):
            best = similarity[i].topk(min(5, len(scene))).indices.tolist()
            found = [small(scene[j]) for j in best]
            examples.retrieval.append(Retrieved(queries[i], small(scene[i]), found, ranks[i]))

    labels_by_row = labelled_rows(images) if has_text_features else {}
    if labels_by_row and (classes := classes or classes_of(labels_by_row.values())):
        labelled, names = list(labels_by_row), list(labels_by_row.values())
        prompts = prompt_features(model, tokenizer, classes, batch_size=batch)
        weights = torch.nn.functional.normalize(prompts.mean(dim=1), dim=-1)
        scale = model.logit_scale.exp().clamp(max=100).cpu()
        odds = (scale * images.features[labelled] @ weights.T).softmax(dim=-1)
        labels = classes.index(names)
        right = (odds.argmax(dim=1) == torch.tensor(labels)).tolist()
        for i in _half_misses(right, n):
            likely = odds[i].topk(min(5, len(classes.names)))
            guesses = [classes.names[j] for j in likely.indices]
            examples.zero_shot.append(
                Classified(small(labelled[i]), classes.names[labels[i]], guesses, likely.values.tolist())
            )

    if model.captioner is not None:
        device = model.visual.patch_embed.weight.device
        rows = [row for row in scene if images.captions[row].get("web") and images.captions[row].get("long")][:n]
        transform = eval_transform(size)
        for row in rows:
            item = items.read(images.indices[row])
            web = item.captions["web"]
            ids = tokenizer.for_tower(web, run.model.text).to(device)
            pixels = transform(decode_image(item.image))[None].to(device)
            with evaluating(model, size):
                generated = model.caption(pixels, ids, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)[0]
            truth = item.captions["long"][0]
            examples.captions.append(Captioned(small(row), web[0], truth, tokenizer.decode(generated)))
    return examples


def _half_misses(hits: Sequence[bool], n: int) -> list[int]:
    """n indices: half hits, half misses, each filled up by the other kind; hits first."""
    order = random.Random(0).sample(range(len(hits)), len(hits))
    kinds = [[i for i in order if hits[i] is kind] for kind in (True, False)]
    misses = kinds[1][: max(n // 2, n - len(kinds[0]))]
    return kinds[0][: n - len(misses)] + misses
