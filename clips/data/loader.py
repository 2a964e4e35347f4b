"""From positions of the run to batches: worker processes read, decode, augment, draw sub-captions and tokenise.

A batch is a pure function of (seed, position): any number of ranks and workers gives the same samples, augmentation and
sub-captions, and a resumed run continues exactly.

A batch is a dict of
- images: uint8 [B, 3, H, W]; the device normalises them, since uint8 is a quarter of the size;
- web: int64 [B, Lw] and sub: int64 [B, Ls], the texts that the objective reads (`TaskConfig.texts`);
- caption: int64 [B, T], if a captioner trains; a row of padding where it is not predicted (`task.caption_share`);
- patches and image_tokens: int64, if image tokens are dropped (`clips.model.clips.Kept`);
- counts: the tokens to compute (`clips.model.clips.Counts`), for which the model would otherwise wait for the device;
- keys, positions, and skipped: [(key, reason)] of broken samples that were substituted.
"""

import contextlib
import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from clips.common.errors import BrokenDataError, CommandError, UserError
from clips.common.paths import is_remote
from clips.config import CaptionerConfig, ModelConfig, PhaseConfig, RunConfig
from clips.data.dataset import Dataset
from clips.data.images import Preprocess, stacked
from clips.data.order import MixedOrder, Order, SampleOrder
from clips.data.remote import Copies, remote_facts
from clips.data.sample import BrokenSample, RawSample
from clips.data.sentences import has_words, kept_tokens, sub_caption
from clips.data.tokenizer import CaptionTokenizer
from clips.engine.engine import Batch
from clips.engine.loader import load_batches
from clips.model.clips import Kept, count_tokens

MAX_ATTEMPTS = 16
"""Samples drawn in a row that must all be broken before the data counts as broken."""
SHARD_THREADS = 4
"""Number of shards that a process fetches at once."""
GROUPS = 3
"""Groups of the order that have copies at once: this one, the next, and that of a process that is behind."""


def make_loader(
    dataset: Dataset,
    tokenizer: CaptionTokenizer,
    run: RunConfig,
    *,
    rank: int,
    world_size: int,
    phase: int = 0,
    step: int = 0,
) -> Iterator[Batch]:
    """Return this rank's micro-batches from optimizer step `step` of phase `phase` to the end of the run.

    The workers start once for all phases. A step's batch_size positions are cut into accumulation steps, and each of
    these into ranks. Raises UserError if a batch is not divisible. Iterating raises BrokenDataError if a sample and
    MAX_ATTEMPTS - 1 substitutes are broken, and CommandError if a worker died.
    """
    micro = [micro_batch_size(one, run.train.accumulation, world_size) for one in run.phases]
    places = _places(run.phases, run.train.accumulation, micro, rank, world_size, phase, step)
    return load_batches(BatchReader(dataset, tokenizer, run), places, run.data.workers, "data.workers")


def texts_of(batch: Batch) -> list[Tensor]:
    """Return the token ids of the texts that the objective reads, the web caption first."""
    return [batch[name] for name in ("web", "sub") if name in batch]


def counted(batch: Batch, config: ModelConfig, pad_id: int) -> Batch:
    """Return `batch`, which is on the host and padded with `pad_id`, with its `counts` for a model of `config`."""
    kept = Kept(batch.get("patches"), batch.get("image_tokens"))
    side = batch["images"].shape[-1]
    return batch | {"counts": count_tokens(config, pad_id, side, texts_of(batch), batch.get("caption"), kept)}


def micro_batch_size(phase: PhaseConfig, accumulation: int, world_size: int) -> int:
    """Return the number of samples in one rank's micro-batch. Raises UserError if the batch is not divisible."""
    parts = accumulation * world_size
    if phase.batch_size % parts:
        what = f"{world_size} ranks × train.accumulation {accumulation}"
        raise UserError(f"phase {phase.name}: batch_size {phase.batch_size} is not a multiple of {parts} = {what}")
    return phase.batch_size // parts


Place = tuple[int, range]
"""A micro-batch's phase and its positions."""


def _places(
    phases: Sequence[PhaseConfig], accumulation: int, micro: list[int], rank: int, ranks: int, phase: int, step: int
) -> Iterator[Place]:
    """Yield the place of each micro-batch of one rank, from a step to the end of the run."""
    first = 0
    for index, config in enumerate(phases):
        done = step if index == phase else 0 if index > phase else config.steps
        for number in range(done, config.steps):
            for part in range(accumulation):
                begin = first + number * config.batch_size + (part * ranks + rank) * micro[index]
                yield index, range(begin, begin + micro[index])
        first += config.seen


class ReadAhead:
    """Downloads remote shards in background threads while training reads, and makes `dataset` read the local copies.

    It fetches the shards from which training draws now and those that come next (a group of `SampleOrder`). Call `at`
    with each batch's positions before its samples are read. Local data needs no copies, and remote data that is read
    without a `ReadAhead`, as in an evaluation, is read by range requests.
    """

    def __init__(self, dataset: Dataset, order: Order, limit: int) -> None:
        """`limit`: bytes of all copies on this machine together; 0 makes no copies."""
        self.order = order
        orders = order.parts if isinstance(order, MixedOrder) else [order]
        remote = [
            (i, numbers)
            for i, numbers in enumerate(dataset.sets())
            if limit > 0 and any(_is_copied(dataset, number) for number in numbers)
        ]
        copies = Copies(limit) if remote else None
        self._parts: dict[int, _Shards] = {}
        if copies is not None:
            share = copies.limit // (GROUPS * len(remote))
            self._parts = {i: _Shards(dataset, numbers.start, orders[i], copies, share) for i, numbers in remote}
            dataset.read_copies(self._open)

    def _open(self, number: int) -> BinaryIO | None:
        copies = (shards.open(number) for shards in self._parts.values())
        return next((copy for copy in copies if copy is not None), None)

    def at(self, positions: Sequence[int]) -> None:
        """Start to fetch the shards that hold the samples at `positions` of the order, and the shards after those."""
        if not self._parts:
            return
        first: dict[int, int] = {}
        for position in positions:
            part, turn = self.order.draw(position) if isinstance(self.order, MixedOrder) else (0, position)
            first[part] = min(turn, first.get(part, turn))
        for part in first.keys() & self._parts.keys():
            self._parts[part].at(first[part])


def _is_copied(dataset: Dataset, number: int) -> bool:
    """Return True for a remote shard. Images of remote tables were stored by the import."""
    part = dataset.parts[number]
    return is_remote(part.url) and part.facts["images"] is None


class _Shards:
    """Copies of the shards of one set, at most `share` bytes for a group of its order."""

    def __init__(self, dataset: Dataset, first: int, order: SampleOrder, copies: Copies, share: int) -> None:
        self.dataset, self.first, self.order, self.copies, self.share = dataset, first, order, copies, share
        self._group: tuple[list[int], list[int]] | None = None
        self._copied: list[int] = []
        self._sizes: dict[int, int] = {}

    def at(self, turn: int) -> None:
        group = self.order.shards(turn)
        if group == self._group:
            return
        self._group = group
        self._copied = [number for shards in group for number in self._fitting([self.first + s for s in shards])]
        self.dataset.close()  # what is read by ranges may have a copy now
        left = iter(self._copied)
        for _ in range(SHARD_THREADS):
            # Daemons: the process does not wait for them when it ends.
            threading.Thread(target=self._fetch, args=(self._copied, left), daemon=True).start()

    def _fitting(self, numbers: list[int]) -> list[int]:
        """Return the first shards that fit into the share; the others are read by ranges."""
        unknown = [number for number in numbers if number not in self._sizes and _is_copied(self.dataset, number)]
        with ThreadPoolExecutor(SHARD_THREADS) as pool:
            sizes = pool.map(lambda number: remote_facts(self.dataset.parts[number].url)[0], unknown)
            self._sizes |= dict(zip(unknown, sizes, strict=True))
        fitting = []
        total = 0
        for number in numbers:
            total += self._sizes.get(number, 0)
            if number in self._sizes and total <= self.share:
                fitting.append(number)
        return fitting

    def _fetch(self, numbers: list[int], left: Iterator[int]) -> None:
        for number in left:
            if numbers is not self._copied:  # the next group has begun
                return
            # The reader of the file meets the same error and reports it; a file that another process fetches is fine.
            with contextlib.suppress(CommandError, OSError):
                copy = self.open(number, wait=False)
                if copy is not None:
                    copy.close()

    def open(self, number: int, *, wait: bool = True) -> BinaryIO | None:
        """Return the copy of a shard, or None if it has none."""
        if number not in self._copied:
            return None
        part = self.dataset.parts[number]
        return self.copies.open(part.url, part.facts["state"], wait=wait)


class BatchReader:
    """Reads and decodes one micro-batch, given the number of its phase and its positions in the run."""

    def __init__(self, dataset: Dataset, tokenizer: CaptionTokenizer, run: RunConfig) -> None:
        self.dataset, self.tokenizer, self.run = dataset, tokenizer, run
        self.order = dataset.order(run.train.seed)
        self.ahead = ReadAhead(dataset, self.order, int(run.data.cache_gb * 1e9))

    def __call__(self, place: Place) -> Batch:
        phase, positions = place
        task, text = self.run.task, self.run.model.text
        captioner = self.run.model.captioner if task.captions else None
        keys, pixels, skipped = [], [], []
        texts: dict[str, list[str]] = {name: [] for name in task.texts}
        captions: dict[int, str] = {}
        draws: list[random.Random] = []
        size = self.run.phases[phase].image_size
        preprocess = Preprocess(size, self.run.phases[phase].augment)
        self.ahead.at(positions)
        for position in positions:
            sample, image, rng, broken = self._read(position, preprocess)
            skipped += broken
            keys.append(sample.key)
            pixels.append(image)
            if task.objective == "clip":
                texts["web"].append(sample.texts.draw_one(rng, task.synthetic_share))
                continue
            web, long = sample.texts.draw(rng)
            texts["web"].append(web)
            texts["sub"].append(sub_caption(web, long, self.run.captions, rng))
            draws.append(rng)
            if captioner is not None and self._is_captioned(position):
                # Also an image with a long caption lacks it in a step whose web caption is that same text.
                captions[len(keys) - 1] = web if long is None or not has_words(long) else long
        batch: Batch = {"images": stacked(pixels)}
        for name, batch_texts in texts.items():
            encoded = self.tokenizer.encode(batch_texts)
            if name == "sub":
                encoded = [kept_tokens(e, self.run.captions, rng) for e, rng in zip(encoded, draws, strict=True)]
            if self.run.captions.token_dropout:
                encoded = [self._dropped(e, position, name) for e, position in zip(encoded, positions, strict=True)]
            batch[name] = self.tokenizer.ids_for_tower(encoded, text)
        if captioner is not None:
            ids = self.tokenizer.caption_ids(self.tokenizer.encode(list(captions.values())), captioner.length)
            batch["caption"] = torch.full((len(keys), ids.shape[1]), self.tokenizer.pad_id)
            batch["caption"][list(captions)] = ids
        batch = counted(batch | self._kept_tokens(size, positions, captioner), self.run.model, self.tokenizer.pad_id)
        return batch | {"keys": keys, "positions": list(positions), "skipped": skipped}

    def _read(
        self, position: int, preprocess: Preprocess
    ) -> tuple[RawSample, np.ndarray, random.Random, list[tuple[str, str]]]:
        """Return the sample at `position`, or the first usable one of its fixed substitutes; its pixels; its random
        generator in the state after augmentation; and (key, reason) of the broken samples before it."""
        index = self.order.sample(position)
        substitutes: random.Random | None = None
        broken: list[tuple[str, str]] = []
        for _ in range(MAX_ATTEMPTS):
            try:
                sample, rng = self.dataset.read(index), self._rng(position)
                return sample, preprocess.decoded(sample.image, sample.key, rng), rng, broken
            except BrokenSample as error:
                broken.append((error.key, error.reason))
                substitutes = substitutes or self._rng(position, "substitute")
                index = self.order.substitute(position, substitutes)
        reasons = "\n  ".join(f"{key}: {reason}" for key, reason in broken[:5])
        raise BrokenDataError(f"{MAX_ATTEMPTS} samples drawn one after another are all broken:\n  {reasons}")

    def _kept_tokens(self, size: int, positions: Sequence[int], captioner: CaptionerConfig | None) -> Batch:
        """Draw the image tokens that each sample keeps, by a generator of its own, so that nothing else changes."""
        vision = self.run.model.vision
        seen = vision.kept_tokens(size)
        counts = {}
        if vision.patch_dropout:
            counts["patches"] = (vision.tokens(size), seen)
        if captioner is not None and captioner.image_token_keep < 1:
            counts["image_tokens"] = (seen, captioner.kept_tokens(seen))
        rngs = [self._rng(position, "image tokens") for position in positions] if counts else []
        return {
            name: torch.tensor([sorted(rng.sample(range(total), count)) for rng in rngs])
            for name, (total, count) in counts.items()
        }

    def _is_captioned(self, position: int) -> bool:
        """Return True if the caption of this sample is predicted, drawn by a generator of its own."""
        share = self.run.task.caption_share
        return share == 1 or self._rng(position, "caption").random() < share

    def _dropped(self, tokens: list[int], position: int, name: str) -> list[int]:
        """Return what `captions.token_dropout` leaves of a text, by a generator of its own; at least one token."""
        rng = self._rng(position, f"{name} tokens")
        return [token for token in tokens if rng.random() >= self.run.captions.token_dropout] or tokens[:1]

    def _rng(self, position: int, purpose: str = "sample") -> random.Random:
        return random.Random(f"{self.run.train.seed}/{self.order.epoch(position)}/{position}/{purpose}")
