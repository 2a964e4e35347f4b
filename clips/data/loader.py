"""From positions of the run to batches: worker processes read, decode, augment, draw sub-captions and tokenise.

What a batch holds is a pure function of (seed, position): any number of ranks and workers gives the same samples
with the same augmentation and the same sub-captions, and a resumed run goes on exactly.

A batch is a dict of torch tensors: images float32 [B, 3, S, S] normalised; web int64 [B, Lw]; for the objective
"clips" also sub int64 [B, Ls] and, with a captioner, caption int64 [B, T]; and of lists: keys, positions,
skipped = [(key, reason)] of the broken samples that substitutes stand for.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from clips.common.errors import BrokenDataError, CommandError, UserError
from clips.config import PhaseConfig, RunConfig
from clips.data.ahead import ReadAhead
from clips.data.images import Preprocess, decode_image, normalise
from clips.data.sample import BrokenSample, RawSample
from clips.data.sentences import has_words, kept_tokens, sub_caption
from clips.data.sources import Source
from clips.data.tokenizer import CaptionTokenizer

Batch = dict[str, Any]
MAX_ATTEMPTS = 16
"""Broken samples in a row, drawn from the whole set, after which the data counts as broken."""
_DEAD_WORKER = re.compile(r"DataLoader worker \(pid\S* [\d, ]+\)")


def make_loader(
    source: Source,
    tokenizer: CaptionTokenizer,
    run: RunConfig,
    phase: PhaseConfig,
    *,
    start: int,
    stop: int,
    first_position: int,
    rank: int,
    world_size: int,
) -> Iterator[Batch]:
    """This rank's micro-batches of the phase's optimizer steps `start` … `stop - 1`, in order.

    Step k covers the run's positions `first_position` + [k · batch_size, (k + 1) · batch_size), cut into
    accumulation steps, and each of those into ranks.
    Raises UserError for a batch that cannot be cut so; while iterating BrokenDataError when a sample and
    MAX_ATTEMPTS - 1 substitutes are broken, and CommandError when a worker process died.
    """
    accumulation = run.train.accumulation
    micro = micro_batch_size(phase, accumulation, world_size)
    loader = DataLoader(
        BatchDataset(source, tokenizer, run, phase),
        batch_size=None,  # an item is a whole batch: texts and images are handled together
        sampler=MicroBatches(
            phase.batch_size, accumulation, micro, rank, world_size, first_position, range(start, stop)
        ),
        num_workers=run.data.workers,
        collate_fn=_unchanged,
        worker_init_fn=start_worker,
        pin_memory=torch.cuda.is_initialized(),
    )
    return _iterate(loader)


def micro_batch_size(phase: PhaseConfig, accumulation: int, world_size: int) -> int:
    """Samples of one rank's micro-batch; raises UserError when the batch is not divisible."""
    parts = accumulation * world_size
    if phase.batch_size % parts:
        below = phase.batch_size // parts * parts
        raise UserError(
            f"phase {phase.name}: batch_size {phase.batch_size} is not divisible by {world_size} ranks × "
            f"{accumulation} accumulation steps = {parts}; use a batch size of "
            f"{f'{below} or ' if below else ''}{below + parts}, another train.accumulation, or other ranks"
        )
    return phase.batch_size // parts


class MicroBatches:
    """The positions of each micro-batch of one rank, as ranges; nothing is held, however long the run."""

    def __init__(
        self, batch: int, accumulation: int, micro: int, rank: int, world_size: int, first: int, steps: range
    ) -> None:
        self.batch, self.accumulation, self.micro, self.first, self.steps = batch, accumulation, micro, first, steps
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return len(self.steps) * self.accumulation

    def __iter__(self) -> Iterator[range]:
        for step in self.steps:
            for part in range(self.accumulation):
                begin = self.first + step * self.batch + (part * self.world_size + self.rank) * self.micro
                yield range(begin, begin + self.micro)


class BatchDataset(Dataset):
    """Maps a range of positions to a batch."""

    def __init__(self, source: Source, tokenizer: CaptionTokenizer, run: RunConfig, phase: PhaseConfig) -> None:
        self.source, self.tokenizer, self.run = source, tokenizer, run
        self.order = source.order(run.train.seed)
        self.ahead = ReadAhead(source, self.order, int(run.data.cache_gb * 1e9))
        self.preprocess = Preprocess(phase.image_size, phase.augment)

    def __getitem__(self, positions: range) -> Batch | CommandError:
        try:
            return self._batch(positions)
        except CommandError as error:  # raised in the main process, where it keeps its type and exit code
            return error

    def _batch(self, positions: range) -> Batch:
        task, text = self.run.task, self.run.model.text
        captioner = self.run.model.captioner if task.objective == "clips" else None
        keys, pixels, skipped = [], [], []
        texts: dict[str, list[str]] = {"web": []} if task.objective == "clip" else {"web": [], "sub": []}
        captions: list[str] = []
        draws: list[random.Random] = []
        self.ahead.at(positions)
        for position in positions:
            sample, image, broken = self._read(position)
            skipped += broken
            rng = self._rng(position)
            keys.append(sample.key)
            pixels.append(self.preprocess.pixels(image, rng))
            if task.objective == "clip":
                synthetic = sample.long if rng.random() < task.synthetic_share else None
                texts["web"].append(synthetic or sample.web)
                continue
            texts["web"].append(sample.web)
            texts["sub"].append(sub_caption(sample.web, sample.long, self.run.captions, rng))
            draws.append(rng)
            if captioner is not None:
                if sample.long is None:
                    raise ValueError(f"{sample.key} has no long caption: open the source with need_long=True")
                captions.append(sample.long if has_words(sample.long) else sample.web)
        batch: Batch = {"images": normalise(pixels)}
        for name, batch_texts in texts.items():
            encoded = self.tokenizer.encode(batch_texts)
            if name == "sub":
                encoded = [kept_tokens(e, self.run.captions, rng) for e, rng in zip(encoded, draws, strict=True)]
            batch[name] = self.tokenizer.ids_for_tower(encoded, text)
        if captioner is not None:
            batch["caption"] = self.tokenizer.caption_ids(self.tokenizer.encode(captions), captioner.length)
        return batch | {"keys": keys, "positions": list(positions), "skipped": skipped}

    def _read(self, position: int) -> tuple[RawSample, Any, list[tuple[str, str]]]:
        """The sample at `position` with its decoded picture, or else the first whole one of its fixed substitutes."""
        index = self.order.sample(position)
        substitutes: random.Random | None = None
        broken: list[tuple[str, str]] = []
        for _ in range(MAX_ATTEMPTS):
            try:
                sample = self.source.read(index)
                return sample, decode_image(sample.image, sample.key), broken
            except BrokenSample as error:
                broken.append((error.key, error.reason))
                substitutes = substitutes or self._rng(position, "substitute")
                index = self.order.substitute(position, substitutes)
        reasons = "\n  ".join(f"{key}: {reason}" for key, reason in broken[:5])
        raise BrokenDataError(f"{MAX_ATTEMPTS} samples drawn one after another are all broken:\n  {reasons}")

    def _rng(self, position: int, purpose: str = "sample") -> random.Random:
        return random.Random(f"{self.run.train.seed}/{self.order.epoch(position)}/{position}/{purpose}")


def _iterate(loader: DataLoader) -> Iterator[Batch]:
    # torch sets a SIGCHLD handler that raises wherever the main process happens to be, even in the middle of a
    # save. Without it a dead worker is noticed (within 5 s) only where a batch is awaited.
    # (It is set once per process, by the first loader with workers, whoever that was.)
    iterator = iter(loader)
    workers = multiprocessing.active_children()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        while True:
            batch = next(iterator, None)
            if batch is None:
                return
            if isinstance(batch, CommandError):
                raise batch
            yield batch
    except (RuntimeError, OSError, EOFError) as error:
        if (worker := _dead_worker(error, workers)) is None:
            raise
        raise CommandError(
            f"{worker} died, most often because memory (or shared memory, /dev/shm) ran out; "
            f"use fewer than data.workers = {loader.num_workers}, or a smaller batch"
        ) from error
    finally:
        del iterator  # a traceback that is kept would keep the workers too


def _dead_worker(error: Exception, workers: Sequence[BaseProcess]) -> str | None:
    """Which worker's death `error` tells of, or None.

    A batch comes through its worker's socket, which is closed a moment before the process can be seen to be dead.
    """
    if found := _DEAD_WORKER.search(str(error)):
        return found.group()
    if not workers or (isinstance(error, RuntimeError) and "Pin memory thread" not in str(error)):
        return None
    time.sleep(1)
    dead = [str(worker.pid) for worker in workers if not worker.is_alive()]
    return f"DataLoader worker (pid(s) {', '.join(dead)})" if dead else None


def _unchanged(item: Any) -> Any:
    return item


def start_worker(worker: int) -> None:
    # A stop signal reaches the whole group, but the main process still ends its step, with this worker's batches.
    # Launchers send more than one. SIGTERM is obeyed a minute later: torch sends it too, to a worker that hangs.
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
