"""Captions as conversations: both stages read the pairs that pretraining reads, without a file of LLaVA's form."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from clips import BrokenSample, DataConfig, Fields, Source, decode_image, expand, open_split, split_spec
from clips.common.errors import UserError
from clips.common.files import from_json, open_regular, read_json_records, replacing
from clips.common.paths import is_remote
from mllm.data.images import ImageStore

log = logging.getLogger("mllm.data")
DESCRIBE = "Describe it."
QUESTION = f"<image>\n{DESCRIBE}"
HINT = (
    "The records of a LLaVA file, .json or .jsonl, have 'conversations'. Of captions --image_folder is the --image-root"
)
TEST, TEST_IMAGES = "held_out/description.jsonl", "held_out/images.tar"
"""In the run of a model that learned captions: what it is asked for at the end."""


class CaptionStore(ImageStore):
    """The pictures of pairs, each by its pair's number.

    Args:
        location: a table, a folder or shards, as `--data` of pretraining.
        image_root: the folder of a table's image paths; None: it is guessed.
        fields: where a sample keeps its parts; None: they are guessed.
        held_out: share of the images that is no part of the store, but is its `test`.
        test: captions that are its `test` instead.
    """

    def __init__(
        self, location: Path | str, image_root: Path | str | None = None, fields: Fields | None = None,
        held_out: float = 0.0, test: str | None = None,
    ) -> None:  # fmt: skip
        self.location = Path(location)
        root = None if image_root is None else str(image_root)
        data = DataConfig(train=str(location), test=test, held_out=held_out, fields=fields or Fields(), image_root=root)
        part = "test" if test else "val"
        try:
            self._source = open_split(data, "train", need_long=False)
            self.test = open_split(data, part, need_long=False) if split_spec(data, part) else None
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


def write_test(run_dir: Path, source: Source) -> None:
    """Write the images of `source` into the run, and a question file that asks for a description of each.

    Its `references` are all captions of the image, or its long ones if it has both kinds, as `CaptionStore.records`.
    """
    questions: dict[bytes, dict[str, Any]] = {}
    with replacing((run_dir / TEST).parent) as work, tarfile.open(work / Path(TEST_IMAGES).name, "w") as archive:
        for number in range(len(source)):
            try:
                raw = source.read(number)
                decode_image(raw.image, raw.key)
            except BrokenSample as broken:
                log.warning("left out of the test: %s", broken)
                continue
            info = tarfile.TarInfo(f"{number:08}.jpg")
            info.size = len(raw.image)
            line = {"question_id": number, "image": info.name, "text": DESCRIBE, "references": []}
            question = questions.setdefault(hashlib.sha256(raw.image).digest(), line)
            if question is line:  # no other row of this image came before
                archive.addfile(info, io.BytesIO(raw.image))
            texts = raw.texts
            question["references"] += texts.web if texts.others or not texts.long else texts.long
        lines = [json.dumps(question) + "\n" for question in questions.values()]
        (work / Path(TEST).name).write_text("".join(lines))


def is_captions(data_path: Path | str) -> bool:
    """Return True for data of pretraining: no .json, and no .jsonl whose first record has `conversations`."""
    suffix = Path(data_path).suffix
    if suffix not in (".json", ".jsonl") or is_remote(str(data_path)):
        return True
    with suppress(OSError, ValueError, UserError), open_regular(expand(str(data_path))[0]) as file:
        record = from_json(next(filter(bytes.strip, file), b""))
        return isinstance(record, dict) and "conversations" not in record
    return False


def open_store(data_path: Path | str, image_folder: Path | str | None, **captions: Any) -> ImageStore | None:
    """The pictures of a LLaVA file, or of captions, whose further arguments are those of `CaptionStore`."""
    if is_captions(data_path):
        return CaptionStore(data_path, image_folder, **captions)
    return ImageStore(image_folder) if image_folder else None


def count_records(data_path: Path | str, store: ImageStore | None) -> int:
    """Samples that an epoch has. Raises UserError if a LLaVA file cannot be read."""
    return len(store) if isinstance(store, CaptionStore) else len(read_json_records(Path(data_path)))


def raw_records(data_path: Path | str, store: ImageStore | None) -> list[Any]:
    """The unchecked records of a LLaVA file, or of the captions of `store`. Raises UserError for a damaged file."""
    return list(store.records()) if isinstance(store, CaptionStore) else read_json_records(Path(data_path))
