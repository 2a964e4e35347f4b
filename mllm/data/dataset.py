"""LLaVA data: JSON or JSONL records, and a folder or tar of images, in a deterministic order.

The dataset returns token ids, labels and the names of images. `Collator` (mllm/training/trainer.py) turns the
names into pixels or into rows of a feature cache.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import Dataset

from clips import BrokenSample
from clips.common.errors import UserError
from clips.common.escape import one_line
from mllm.data.captions import raw_records
from mllm.data.conversation import IGNORE, ConversationEncoder, check_turns
from mllm.data.images import ImageStore, broken_image
from mllm.data.video import ENDINGS, NO_VIDEOS, VideoTokens, is_video

NAMED = 10
"""Most bad samples that an error lists; scripts/check_data.py lists all of them."""


class BadSample(UserError):
    """A sample that cannot be trained on."""

    def __init__(self, index: int, sample_id: str, kind: str, message: str) -> None:
        super().__init__(message)
        self.problem: dict[str, Any] = {"index": index, "id": sample_id, "kind": kind, "message": message}
        """Its kind is record, conversation, missing image, or broken image, which shows if a header is read."""


@contextmanager
def bad_sample(kind: str, raw: Any, index: int) -> Iterator[None]:
    """Turn a UserError inside the block into a BadSample of the raw record."""
    try:
        yield
    except UserError as error:
        raise BadSample(index, sample_id_of(raw, index), kind, str(error)) from None


@dataclass(frozen=True)
class Record:
    """One sample of a LLaVA file: the names of its images and videos in the image folder, and its unchanged turns."""

    index: int
    id: str
    images: tuple[str, ...]
    turns: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """The sample's index and id, for messages."""
        return f"sample {self.index} (id {self.id})"


def parse_record(raw: Any, index: int) -> Record:
    """Parse a raw record and check its fields but not its turns. Raises UserError with its index and id."""
    sample_id = sample_id_of(raw, index)
    where = f"sample {index} (id {sample_id})"
    if isinstance(raw, BrokenSample):  # a pair without a caption
        raise UserError(f"sample {index}: {raw}")
    if not isinstance(raw, dict) or not isinstance(raw.get("conversations"), list):
        raise UserError(f"{where}: a record must be an object with a list 'conversations', found {str(raw)[:120]}")
    if raw.get("image") and raw.get("video"):
        raise UserError(f"{where}: it has 'image' and 'video': list images and videos in 'image', in their order")
    field = "video" if raw.get("video") else "image"
    images = raw.get(field) or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(name, str) and name for name in images):
        raise UserError(f"{where}: {field!r} must be a path or a list of paths, found {str(raw[field])[:120]}")
    for name in images:
        if field == "video" and not is_video(name):
            raise UserError(f"{where}: 'video' {name!r} must end in one of {', '.join(ENDINGS)}")
    return Record(index, sample_id, tuple(images), raw["conversations"])


def sample_id_of(raw: Any, index: int) -> str:
    """Return the id of a raw record for a message, or its index if it has no id; "?" for anything but an object."""
    return str(raw.get("id", index)).encode("utf-8", "backslashreplace").decode() if isinstance(raw, dict) else "?"


@dataclass(frozen=True)
class ImageTokens:
    """The number of language model tokens that an image or a video takes.

    `of_size` computes it from (height, width), and `most` is its upper limit. If `of_size` is None, every image takes
    `most`.
    """

    most: int
    of_size: Callable[[tuple[int, int]], int] | None = None
    frames: int = 0
    """Number of frames of a video, or 0 if the model takes no videos."""

    def at_most(self, names: Sequence[str]) -> list[int]:
        """Return the largest number of tokens that each image or video can have."""
        return [VideoTokens(self.most) if is_video(name) else self.most for name in names]

    def read(self, names: Sequence[str], store: ImageStore | None) -> tuple[list[tuple[int, int]], list[int]]:
        """Return sizes, empty if they are not needed, and numbers of tokens. Raises UserError for a broken header."""
        if self.of_size is None or store is None:
            return [], self.at_most(names)
        try:
            sizes = [store.size(name) for name in names]
        except BrokenSample as broken:
            raise broken_image(store, broken) from None
        return sizes, [self.of_size(size) for size in sizes]


class RecordReader:
    """Checks raw records and turns them into records that can be trained on, for training and check_data.py.

    It checks fields, turns, placeholders and missing files. It also checks that the question does not fill the context,
    and tokenises only samples that may be so long. `store` may be None for data without images.
    """

    def __init__(
        self, encoder: ConversationEncoder, store: ImageStore | None, tokens: ImageTokens | None = None
    ) -> None:
        if tokens is None:
            assert encoder.num_image_tokens is not None, "the images of this model differ in tokens: give them"
            tokens = ImageTokens(encoder.num_image_tokens)
        self.encoder = encoder
        self.store = store
        self.tokens = tokens
        self._problems: dict[str, str | None] = {}

    def read(self, raw: Any, index: int) -> Record:
        """Check a raw record. Raises BadSample if it cannot be trained on."""
        with bad_sample("record", raw, index):
            record = parse_record(raw, index)
        with bad_sample("conversation", raw, index):
            if any(map(is_video, record.images)) and not self.tokens.frames:
                raise UserError(f"{record.name}: {NO_VIDEOS}")
            self.encoder.check(record.turns, self.tokens.at_most(record.images), record.name)
        with bad_sample("missing image", raw, index):
            for name in record.images:
                if self.store is None:
                    raise UserError(f"{record.name}: it has an image, but no --image_folder is given")
                if name not in self._problems:
                    self._problems[name] = self.store.problem(name)
                if self._problems[name]:
                    raise UserError(f"{record.name}: {self._problems[name]}")
        if self._may_lose_its_answers(record):
            with bad_sample("broken image", raw, index):
                _, images = self.tokens.read(record.images, self.store)
            with bad_sample("conversation", raw, index):
                self.encoder.encode(record.turns, images, record.name)
        return record

    def _may_lose_its_answers(self, record: Record) -> bool:
        """Return True if all before the first trained answer could fill the context, as a token has at least one byte.

        The format's own texts are counted once for every turn, and a byte for the space that a tokenizer may add. This
        is more than there is, so that no sample fails later.
        """
        if self.encoder.max_length is None:
            return False
        form = self.encoder.format
        own = "".join([form.first, *(form.system or ()), form.next, form.middle, form.lead, form.end, "    "])
        turns = check_turns(record.turns, record.name)  # without a leading answer, which is not trained
        before = itertools.takewhile(lambda turn: turn[0] != "gpt" or not str(turn[1]).strip(), turns)
        texts = [own, *(f"{own}{value}" for _, value in before)]
        images = len(record.images) * (self.tokens.most + 1)  # each with its newline
        return sum(len(text.encode()) for text in texts) + images >= self.encoder.max_length


class LlavaDataset(Dataset):
    """A dataset of samples `{"key": str, "input_ids": list, "labels": list, "images": names}`. It decodes no images.

    If the number of tokens depends on the image's size, a sample also has `image_sizes`, (height, width) of each image,
    read from the headers. The constructor checks every record (see `RecordReader`). If samples are bad and
    `on_bad_sample` is "error", or if all are bad, it raises UserError with the first ten of them and their number;
    otherwise it moves them to `skipped`.
    """

    def __init__(
        self,
        data_path: Path | str,
        encoder: ConversationEncoder,
        store: ImageStore | None,
        on_bad_sample: Literal["error", "skip"] = "error",
        tokens: ImageTokens | None = None,
    ) -> None:
        reader = RecordReader(encoder, store, tokens)
        self.encoder = encoder
        self.store = store
        self.tokens = reader.tokens
        self.records: list[Record] = []
        self.skipped: list[dict[str, Any]] = []
        """`BadSample.problem` of each skipped sample."""
        for index, raw in enumerate(raw_records(data_path, store)):
            try:
                self.records.append(reader.read(raw, index))
            except BadSample as bad:
                self.skipped.append(bad.problem)
        if self.skipped and (on_bad_sample == "error" or not self.records):
            mend = "repair or remove them" + (", or skip them with --on_bad_sample skip" if self.records else "")
            first = "".join(f"\n  {one_line(problem['message'])}" for problem in self.skipped[:NAMED])
            raise UserError(f"{data_path}: {len(self.skipped):,} sample(s) cannot be trained on, {mend}:{first}")
        # Shared with the data workers, so that the main process can count.
        self._truncated = torch.zeros(len(self.records), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return sample `index`. `~index` gives the same sample with all labels masked."""
        if index < 0:
            sample = self[~index]
            return sample | {"labels": [IGNORE] * len(sample["labels"])}
        record = self.records[index]
        sizes, image_tokens = self.tokens.read(record.images, self.store)
        encoded = self.encoder.encode(record.turns, image_tokens, record.name)
        self._truncated[index] = encoded.truncated
        sample = {
            "key": record.name,
            "input_ids": encoded.input_ids,
            "labels": encoded.labels,
            "images": list(record.images),
        }
        if sizes:
            sample["image_sizes"] = sizes
        return sample

    def facts(self) -> dict[str, Any]:
        """Return the number of samples, and a hash of their ids, image names and turns in their order."""
        digest = hashlib.sha256()
        for record in self.records:
            digest.update(json.dumps([record.id, record.images, record.turns]).encode())
        return {"samples": len(self), "sha256": digest.hexdigest()}

    @property
    def images(self) -> list[str]:
        """The names of all images and videos, each once."""
        return list(dict.fromkeys(name for record in self.records for name in record.images))

    @property
    def truncated(self) -> torch.Tensor:
        """Bool [samples], True for those that this process or its workers read and had to cut to the context."""
        return self._truncated

    @property
    def modality_lengths(self) -> list[int]:
        """Length of each sample, by which `EpochSampler` groups samples as LLaVA does.

        With images it is the number of words plus the largest number of image tokens, without images minus the words.
        """
        lengths = []
        for record in self.records:
            words = sum(len(turn["value"].split()) for turn in record.turns if isinstance(turn["value"], str))
            image_tokens = len(record.images) * self.tokens.most
            lengths.append(words + image_tokens if record.images else -max(words, 1))
        return lengths
