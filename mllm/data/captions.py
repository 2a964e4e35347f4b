"""Captions as conversations: both stages read the pairs that pretraining reads, without a file of LLaVA's form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clips import BrokenSample, Fields, open_source
from clips.common.errors import UserError
from clips.common.files import read_json_records
from mllm.data.images import ImageStore

QUESTION = "<image>\nDescribe it."
HINT = "A LLaVA file ends in .json or .jsonl. Of captions --image_folder is the --image-root"


class CaptionStore(ImageStore):
    """The pictures of pairs, each by its pair's number.

    Args:
        location: a table, a folder or shards, as `--data` of pretraining.
        image_root: the folder of a table's image paths; None: it is guessed.
    """

    def __init__(self, location: Path | str, image_root: Path | str | None = None) -> None:
        self.location = Path(location)
        root = None if image_root is None else str(image_root)
        try:
            self._source = open_source(str(location), Fields(), image_root=root, need_long=False)
        except UserError as error:
            raise UserError(f"{error}\n  {HINT}") from None
        self.unreadable = self._source.unreadable

    def __len__(self) -> int:
        """Pairs, those without a caption among them."""
        return len(self._source)

    def records(self) -> Iterator[Any]:
        """A record for each pair, of its long caption if it has one; a BrokenSample for a pair without a caption.

        Several captions of one picture joined would repeat each other: the first one is told.
        """
        for number in range(len(self._source)):
            try:
                texts = self._source.texts(number)
            except BrokenSample as broken:
                yield broken
                continue
            web, long = texts.pair()
            response = web if texts.others else long or web
            turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": response}]
            yield {"id": str(number), "image": str(number), "conversations": turns}

    def problem(self, name: str) -> str | None:
        """As for a LLaVA file; a picture of a shard or at a URL is met when it is read."""
        return self._source.missing(int(name))

    def read(self, name: str) -> bytes:
        return self._source.read(int(name)).image


def is_captions(data_path: Path | str) -> bool:
    """Whether `data_path` is data of pretraining: no LLaVA file, .json or .jsonl."""
    return Path(data_path).suffix not in (".json", ".jsonl")


def open_store(data_path: Path | str, image_folder: Path | str | None) -> ImageStore | None:
    """The pictures of a LLaVA file or of captions. Raises UserError if they cannot be opened."""
    if is_captions(data_path):
        return CaptionStore(data_path, image_folder)
    return ImageStore(image_folder) if image_folder else None


def count_records(data_path: Path | str, image_folder: Path | str | None) -> int:
    """Samples that an epoch has. Raises UserError if the data cannot be opened."""
    if is_captions(data_path):
        return len(CaptionStore(data_path, image_folder))
    return len(read_json_records(Path(data_path)))


def raw_records(data_path: Path | str, store: ImageStore | None) -> list[Any]:
    """The unchecked records of a LLaVA file, or of the captions of `store`. Raises UserError for a damaged file."""
    return list(store.records()) if isinstance(store, CaptionStore) else read_json_records(Path(data_path))
