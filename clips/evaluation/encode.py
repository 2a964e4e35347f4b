"""Run images and texts through the towers, for the features from which every metric of an encoder is computed.

Shapes: I images · N tokens of all long captions · T texts · C classes · P prompts per class · E embedding width ·
D width of the image tower.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from clips.common.distributed import all_shares, my_share
from clips.common.errors import CommandError, UserError
from clips.common.signals import start_worker
from clips.data.images import decode_image, eval_transform, normalise, stacked
from clips.data.sample import BrokenSample
from clips.data.tokenizer import CaptionTokenizer
from clips.evaluation.testsets import Classes, Item, TestSet
from clips.model.clips import CLIPSModel
from clips.model.text import count_computed, word_slots

_Entry = tuple[np.ndarray, Item, int] | str | CommandError
"""Pixels, item and index of a sample, or why it is broken, or the error that ends the command."""


class _Pixels(Dataset):
    """Samples of a test set with their image decoded and squashed."""

    def __init__(self, items: TestSet, indices: Sequence[int], image_size: int) -> None:
        self.items, self.indices, self.transform = items, indices, eval_transform(image_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> _Entry:
        index = self.indices[position]
        try:
            item = self.items.read(index)
            pixels = self.transform.pixels(decode_image(item.image, item.key))
            return pixels, replace(item, image=b""), index
        except BrokenSample as broken:
            return str(broken)
        except CommandError as error:  # raised in the main process, where it keeps its type and exit code
            return error


@dataclass
class ImageSet:
    """A test set that has gone through the image tower."""

    features: Tensor
    """[I, E], L2-normalised, on the CPU."""
    pooled: Tensor
    """[I, D] before the projection, for a linear probe."""
    captions: list[dict[str, list[str]]]
    labels: list[str | None]
    indices: list[int]
    """Each image's index in the test set."""
    skipped: list[str]
    """Why samples were skipped."""
    caption_tokens: tuple[Tensor, Tensor] | None = None
    """Predicted and true tokens [N] of all long captions, on the CPU; None if no caption is predicted."""


class _Encoded(NamedTuple):
    """The results of a batch, on the CPU."""

    towers: list[tuple[Tensor, Tensor]]
    """`features` and `pooled` of the images; empty if every image of the batch is broken."""
    caption_tokens: list[tuple[Tensor, Tensor]]
    """Predicted and true; empty if no caption is predicted."""
    items: list[tuple[Item, int]]
    skipped: list[str]


@torch.no_grad()
def encode_images(
    model: CLIPSModel,
    items: TestSet,
    *,
    image_size: int | None = None,
    batch_size: int,
    workers: int = 0,
    limit: int | None = None,
    sharded: bool = False,
    tokenizer: CaptionTokenizer | None = None,
    bar: str | None = None,
) -> ImageSet:
    """Run `items` (the first `limit` of a fixed shuffle) through the image tower, on the model's device.

    Each image is squashed to a square of `image_size` pixels (default: the tower's size). If `sharded` (collective),
    each rank encodes some of the batches that a single rank would encode, so every metric is the same. With a
    `tokenizer` the captioner, if there is one, predicts the long captions in the same pass, so each image is read and
    encoded only once. `bar` is the title of a progress bar in a terminal. Raises UserError if no image can be read,
    and CommandError if a worker died.
    """
    image_size = image_size or model.visual.image_size
    indices: Sequence[int] = range(len(items))
    if limit is not None and limit < len(items):
        indices = sorted(torch.randperm(len(items), generator=torch.Generator().manual_seed(0))[:limit].tolist())
    positions = range(len(indices))
    batches = [list(positions[i : i + batch_size]) for i in positions[::batch_size]]
    loader = DataLoader(
        _Pixels(items, indices, image_size), batch_sampler=my_share(batches, sharded=sharded), num_workers=workers,
        collate_fn=list, worker_init_fn=start_worker,
    )  # fmt: skip
    with evaluating(model, image_size):
        shown = tqdm(loader, bar, unit="batch", disable=bar is None or not sys.stderr.isatty())
        try:
            mine = [_encode(model, tokenizer, batch) for batch in shown]
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            what = "a process that reads images died, probably for lack of memory or /dev/shm"
            raise CommandError(f"{what}: use fewer workers (data.workers, --jobs)") from error
    full = all_shares(mine, sharded=sharded)
    towers = [pair for batch in full for pair in batch.towers]
    tokens = [pair for batch in full for pair in batch.caption_tokens]
    entries = [entry for batch in full for entry in batch.items]
    skipped = [reason for batch in full for reason in batch.skipped]
    if not entries:
        raise UserError(f"no image of the test set can be read: {skipped[0] if skipped else 'it is empty'}")
    return ImageSet(
        features=torch.cat([features for features, _ in towers]),
        pooled=torch.cat([pooled for _, pooled in towers]),
        captions=[item.captions for item, _ in entries],
        labels=[item.label for item, _ in entries],
        indices=[index for _, index in entries],
        skipped=skipped,
        caption_tokens=(torch.cat([p for p, _ in tokens]), torch.cat([t for _, t in tokens])) if tokens else None,
    )


def _encode(model: CLIPSModel, tokenizer: CaptionTokenizer | None, batch: Sequence[_Entry]) -> _Encoded:
    for entry in batch:
        if isinstance(entry, CommandError):
            raise entry
    encoded = _Encoded([], [], [], [entry for entry in batch if isinstance(entry, str)])
    good = [entry for entry in batch if isinstance(entry, tuple)]
    device = model.visual.patch_embed.weight.device
    if good:
        pixels, items, indices = zip(*good, strict=True)
        pooled, tokens = model.visual(normalise(sent(stacked(pixels), device)))
        features = F.normalize(model.visual.proj(pooled).float(), dim=-1)
        predicted = [] if tokenizer is None else predict(model, tokenizer, tokens, items)
        encoded.towers.append((features.cpu(), pooled.float().cpu()))
        encoded.caption_tokens.extend((guessed.cpu(), true) for guessed, true in predicted)
        encoded.items.extend(zip(items, indices, strict=True))
    return encoded


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return `tensor` on `device`; the host does not wait for earlier work of the GPU."""
    pinned = tensor.pin_memory() if device.type == "cuda" else tensor  # a copy from other memory would wait
    return pinned.to(device, non_blocking=True)


def predict(
    model: CLIPSModel, tokenizer: CaptionTokenizer, image_tokens: Tensor, items: Sequence[Item]
) -> list[tuple[Tensor, Tensor]]:
    """Return predicted tokens (on the device) and true tokens (on the host), each [N], of the long captions of `items`.

    With `captioner.inputs = "tokens"` each token is predicted from the true ones before it, as in training. The list is
    empty without a captioner or long captions. `image_tokens` are the tower's output, CLS included.
    """
    rows = [row for row, item in enumerate(items) if item.captions.get("long")]
    if model.captioner is None or not rows:
        return []
    encoded = tokenizer.encode([items[row].captions["long"][0] for row in rows])
    device, config = image_tokens.device, model.config.text
    caption = tokenizer.caption_ids(encoded, model.captioner.config.length)
    web = tokenizer.for_tower([items[row].captions["web"][0] for row in rows], config)
    words = count_computed(web, config, model.pad_id)
    present = word_slots(caption, model.pad_id)[:, 1:]
    tokens = image_tokens.index_select(0, sent(torch.tensor(rows), device))
    prefix = model.caption_prefix(tokens, sent(web, device), words)
    slots = prefix[0].shape[1] + present.shape[1]
    count = len(rows) * (slots - (config.pool == "cls")) + words
    states = model.captioner(*prefix, sent(caption[:, :-1], device), count=count)
    predicting = states.flatten(0, 1).index_select(0, sent(present.flatten().nonzero().squeeze(1), device))
    return [(model.captioner.head(predicting).argmax(-1), caption[:, 1:][present])]


@torch.no_grad()
def encode_texts(
    model: CLIPSModel, tokenizer: CaptionTokenizer, texts: Sequence[str], *, batch_size: int, sharded: bool = False
) -> Tensor:
    """Return L2-normalised features [T, E] on the CPU. Equal strings are encoded once, similar lengths together.

    `sharded` is as in `encode_images`: every rank passes the same texts and gets all features.
    """
    config = model.config.text
    unique = sorted(set(texts), key=lambda text: (len(text), text))
    row = {text: i for i, text in enumerate(unique)}
    batches = [unique[i : i + batch_size] for i in range(0, len(unique), batch_size)]
    with evaluating(model) as device:
        encoded = [
            text_features(model, tokenizer.for_tower(batch, config), device)
            for batch in my_share(batches, sharded=sharded)
        ]
    mine = [features.cpu() for features in encoded]  # the host waits for the GPU only here, at the end
    return torch.cat(all_shares(mine, sharded=sharded))[[row[text] for text in texts]]


def text_features(model: CLIPSModel, ids: Tensor, device: torch.device) -> Tensor:
    """Return L2-normalised features [B, E] on `device` of `ids` [B, L] on the host, where they are counted."""
    return model.encode_text(sent(ids, device), count_computed(ids, model.config.text, model.pad_id))


def prompt_features(
    model: CLIPSModel, tokenizer: CaptionTokenizer, classes: Classes, *, batch_size: int, sharded: bool = False
) -> Tensor:
    """Return L2-normalised features [C, P, E] of every class in every template."""
    features = encode_texts(model, tokenizer, classes.prompts(), batch_size=batch_size, sharded=sharded)
    return features.view(len(classes.names), len(classes.templates), -1)


@contextmanager
def evaluating(model: CLIPSModel, image_size: int | None = None) -> Iterator[torch.device]:
    """Put the model into evaluation mode at `image_size`, yield its device, and restore the model afterwards."""
    training, tower, before = model.training, model.visual, model.visual.image_size
    model.eval()
    if image_size is not None and image_size != before:
        tower.set_image_size(image_size)
    try:
        yield tower.patch_embed.weight.device
    finally:
        model.train(training)
        if tower.image_size != before:
            tower.set_image_size(before)
