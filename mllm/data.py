"""LLaVA data: JSON or JSONL records beside a folder (or a tar) of pictures, in a deterministic order.

The dataset gives token ids, labels and the *names* of the pictures; what a name becomes (pixels, or rows of a feature
cache) is the business of the `load_images` that the collator is given.

Shapes: B samples of a batch · L longest of them · N pictures of the batch, in the order of their placeholders.
"""

from __future__ import annotations

import itertools
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from clips.data.images import decode_image
from clips.data.sample import BrokenSample
from clips.errors import UserError
from mllm.conversation import IGNORE, ConversationEncoder

AspectRatio = Literal["square", "pad"]


@dataclass(frozen=True)
class Record:
    """One sample of a LLaVA file: picture names relative to the image folder, and its turns as they stand there."""

    index: int
    id: str
    images: tuple[str, ...]
    turns: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """How messages call the sample."""
        return f"sample {self.index} (id {self.id})"


def read_json_records(path: Path) -> list[Any]:
    """The raw records of a .json list or a .jsonl file; UserError where it is neither."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data file {path} cannot be read: {error}; give a LLaVA JSON or JSONL file") from None
    if path.suffix == ".jsonl":
        records = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                records += [json.loads(line)] if line.strip() else []
            except ValueError as error:
                raise UserError(f"{path} line {number} is not JSON: {error}") from None
    else:
        try:
            records = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path} is not JSON: {error} (one record a line? then name it .jsonl)") from None
    if not isinstance(records, list) or not records:
        raise UserError(f"{path} must hold a list of records that is not empty")
    return records


def parse_record(raw: Any, index: int) -> Record:
    """Check one raw record's fields (its turns are checked by the encoder); UserError with its index and id."""
    sample_id = str(raw.get("id", index)) if isinstance(raw, dict) else "?"
    where = f"sample {index} (id {sample_id})"
    if not isinstance(raw, dict) or not isinstance(raw.get("conversations"), list):
        raise UserError(f"{where}: a record must be an object with a list 'conversations', found {str(raw)[:120]}")
    images = raw.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(name, str) and name for name in images):
        raise UserError(f"{where}: 'image' must be a path or a list of paths, found {str(raw['image'])[:120]}")
    for name in images:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name:
            raise UserError(f"{where}: image path {name!r} leaves the image folder; it must be relative to it")
    return Record(index, sample_id, tuple(images), raw["conversations"])


class ImageStore:
    """Pictures by name, from a folder or an uncompressed tar; each process opens the tar for itself.

    Args:
        location: the image folder or tar file.
        aspect_ratio: "square" hands pictures out as they are (the encoder's own preprocessing shapes them);
            "pad" first pads them to a square.
        background: colour of the padding, the vision encoder's mean (three numbers of 0…1).
    """

    def __init__(
        self,
        location: Path | str,
        aspect_ratio: AspectRatio = "square",
        background: Sequence[float] = (0.485, 0.456, 0.406),
    ) -> None:
        if aspect_ratio not in get_args(AspectRatio):
            raise UserError(f"image_aspect_ratio {aspect_ratio!r} is not known; choose square or pad")
        self.location = Path(location)
        self.aspect_ratio = aspect_ratio
        self.background = tuple(int(channel * 255) for channel in background)
        self._members: dict[str, tuple[int, int]] | None = None
        self._file: tuple[int, BinaryIO] | None = None
        if self.location.is_dir():
            self._root = os.path.realpath(self.location)
        elif self.location.is_file():
            self._members = _index_tar(self.location)
        else:
            raise UserError(f"image folder {self.location} does not exist; name it with --image_folder")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}

    def problem(self, name: str) -> str | None:
        """Why picture `name` cannot be read, or None; opens nothing."""
        if self._members is not None:
            return None if name in self._members else f"image {name!r} is not in {self.location}"
        path = os.path.realpath(os.path.join(self._root, name))
        if os.path.commonpath([path, self._root]) != self._root:
            return f"image {name!r} is a link out of {self.location}; name the real folder with --image_folder"
        return None if os.path.isfile(path) else f"image {name!r} is not in {self.location}"

    def read(self, name: str) -> bytes:
        """The encoded picture; BrokenSample where there is none."""
        problem = self.problem(name)
        if problem:
            raise BrokenSample(name, problem)
        if self._members is None:
            return Path(self._root, name).read_bytes()
        if self._file is None or self._file[0] != os.getpid():  # a forked worker must not share the file position
            self._file = (os.getpid(), open(self.location, "rb"))  # noqa: SIM115 - lives as long as the store
        offset, size = self._members[name]
        self._file[1].seek(offset)
        return self._file[1].read(size)

    def load(self, name: str) -> Image.Image:
        """The picture as RGB, padded to a square if asked; BrokenSample where it cannot be decoded."""
        image = decode_image(self.read(name), name)
        return pad_to_square(image, self.background) if self.aspect_ratio == "pad" else image


def _index_tar(path: Path) -> dict[str, tuple[int, int]]:
    """Name → (offset, size) of the regular files in a tar; links are left out."""
    try:
        with tarfile.open(path, "r:") as tar:
            return {
                member.name.removeprefix("./"): (member.offset_data, member.size) for member in tar if member.isfile()
            }
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"--image_folder {path} is neither a folder nor an uncompressed tar: {error}") from None


def pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """Centre the picture on a square of `colour` (LLaVA's `expand2square`)."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


class LlavaDataset(Dataset):
    """Samples as `{"input_ids": list, "labels": list, "images": names}`; decodes no picture.

    Construction checks every record (fields, turns, placeholders against images, files that exist, a question that
    alone fills the context) and raises UserError naming the first bad one; `store` may be None for a set without
    pictures.
    """

    def __init__(self, data_path: Path | str, encoder: ConversationEncoder, store: ImageStore | None) -> None:
        self.encoder = encoder
        self.store = store
        self.records = [parse_record(raw, index) for index, raw in enumerate(read_json_records(Path(data_path)))]
        problems: dict[str, str | None] = {}
        for record in self.records:
            encoder.check(record.turns, len(record.images), record.name)
            if record.images and store is None:
                raise UserError(f"{record.name} has an image, but no --image_folder is given")
            for name in record.images:
                if name not in problems:
                    problems[name] = store.problem(name)
                if problems[name]:
                    raise UserError(f"{record.name}: {problems[name]}")
            if self._may_lose_its_answers(record):
                encoder.encode(record.turns, len(record.images), record.name)
        # Shared with the workers, so that the main process can count.
        self._truncated = torch.zeros(len(self.records), dtype=torch.bool).share_memory_()

    def _may_lose_its_answers(self, record: Record) -> bool:
        """Whether what stands before the first answer could fill the context: such a sample would end the training.

        A token is hardly ever less than a byte, so the few long ones are found without tokenising all.
        """
        if self.encoder.max_length is None:
            return False
        before = itertools.takewhile(lambda turn: turn["from"] != "gpt", record.turns)
        size = sum(len(turn["value"].encode()) for turn in before if isinstance(turn["value"], str))
        return size + len(record.images) * self.encoder.num_image_tokens >= self.encoder.max_length

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        encoded = self.encoder.encode(record.turns, len(record.images), record.name)
        self._truncated[index] = encoded.truncated
        return {"input_ids": encoded.input_ids, "labels": encoded.labels, "images": list(record.images)}

    @property
    def truncated(self) -> int:
        """Samples seen so far that did not fit the context."""
        return int(self._truncated.sum())

    @property
    def modality_lengths(self) -> list[int]:
        """LLaVA's lengths for grouping: words plus image tokens, negative for text-only samples."""
        lengths = []
        for record in self.records:
            words = sum(len(turn["value"].split()) for turn in record.turns if isinstance(turn["value"], str))
            image_tokens = len(record.images) * self.encoder.num_image_tokens
            lengths.append(words + image_tokens if record.images else -max(words, 1))
        return lengths


class EpochSampler(Sampler[int]):
    """The order of an epoch, a pure function of (seed, epoch); the same for any number of ranks at one global batch.

    With `group_by_modality_length` as LLaVA: every global batch (`batch_size` × `chunks`) holds one modality and
    similar lengths, is dealt into `chunks` micro-batches of nearly equal token sums, and the global batches are
    shuffled; what is left over of the two modalities comes last.

    Args:
        lengths: `LlavaDataset.modality_lengths`.
        batch_size: samples of one micro-batch on one rank.
        chunks: micro-batches of one optimizer step, ranks × accumulation steps.
    """

    def __init__(
        self, lengths: Sequence[int], *, batch_size: int, chunks: int, seed: int, group_by_modality_length: bool
    ) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size, self.chunks, self.seed = batch_size, chunks, seed
        self.group = group_by_modality_length
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration (the Trainer calls this)."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.lengths))
        return iter((self._grouped(order, rng) if self.group else order).tolist())

    def _grouped(self, order: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        size = self.batch_size * self.chunks
        whole, rest = [], []
        for modality in (order[self.lengths[order] > 0], order[self.lengths[order] < 0]):
            cut = len(modality) - len(modality) % size
            # Sorting inside a pool of 50 global batches keeps lengths alike and the order random.
            for start in range(0, cut, 50 * size):
                pool = modality[start : min(start + 50 * size, cut)]
                pool = pool[np.argsort(-np.abs(self.lengths[pool]), kind="stable")]
                whole += [self._deal(batch) for batch in pool.reshape(-1, size)]
            rest.append(modality[cut:])
        return np.concatenate([*(whole[i] for i in rng.permutation(len(whole))), *rest])

    def _deal(self, batch: np.ndarray) -> np.ndarray:
        """Deal a global batch, longest first, each sample to the micro-batch that is shortest so far."""
        hands: list[list[int]] = [[] for _ in range(self.chunks)]
        sums = [0] * self.chunks
        for sample in batch:
            hand = min((i for i in range(self.chunks) if len(hands[i]) < self.batch_size), key=sums.__getitem__)
            hands[hand].append(sample)
            sums[hand] += abs(int(self.lengths[sample]))
        return np.concatenate(hands)


def pad_rows(rows: Sequence[Sequence[int]], value: int, *, left: bool = False) -> torch.Tensor:
    """int64 [B, L]: rows padded with `value`, on the right for training, on the `left` for generation."""
    padded = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.long)
    for target, row in zip(padded, rows, strict=True):
        target[len(target) - len(row) if left else 0 :][: len(row)] = torch.tensor(row, dtype=torch.long)
    return padded


@dataclass
class Collator:
    """Samples → `input_ids`, `labels`, `attention_mask` [B, L], and `image_key` as `load_images(names)` gives it.

    A batch without pictures has no `image_key`; the model's side makes that safe under ZeRO-3.
    """

    pad_id: int
    load_images: Callable[[list[str]], torch.Tensor]
    image_key: str = "pixel_values"

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [sample["input_ids"] for sample in samples]
        batch = {
            "input_ids": pad_rows(ids, self.pad_id),
            "labels": pad_rows([sample["labels"] for sample in samples], IGNORE),
            "attention_mask": pad_rows([[1] * len(row) for row in ids], 0),
        }
        names = [name for sample in samples for name in sample["images"]]
        if names:
            batch[self.image_key] = self.load_images(names)
        return batch


def pixel_loader(
    store: ImageStore, preprocess: Callable[[Image.Image], torch.Tensor]
) -> Callable[[list[str]], torch.Tensor]:
    """A `load_images` that decodes: names → float [N, 3, H, W]. UserError naming a picture that is broken."""

    def load(names: list[str]) -> torch.Tensor:
        try:
            return torch.stack([preprocess(store.load(name)) for name in names])
        except BrokenSample as broken:
            raise UserError(
                f"picture {broken.key} in {store.location}: {broken.reason}; "
                "scripts/check_data.py lists every broken picture of a data set"
            ) from None

    return load
