"""Captions as conversations: both stages can train on the data of pretraining, without a file in LLaVA's format."""

import hashlib
import io
import json
import logging
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from clips import (
    BrokenSample,
    DataConfig,
    Dataset,
    Fields,
    check_readable,
    count_shared,
    decode_image,
    expand,
    held_out_images,
    open_split,
    split_spec,
)
from clips.common.errors import UserError
from clips.common.files import open_regular, read_json_records, replacing
from clips.common.paths import is_remote
from mllm.data.images import ImageStore

log = logging.getLogger("mllm.data")
DESCRIBE = "Describe it."
QUESTION = f"<image>\n{DESCRIBE}"
HINT = (
    "A LLaVA file, .json or .jsonl, has records with 'conversations'. For captions --image_folder is the --image-root"
)
FIRST_RECORD = 1 << 20
"""Bytes of a .json file in which its first record must end."""
TEST, TEST_IMAGES = "held_out/description.jsonl", "held_out/images.tar"
"""Paths in the run of a model that was trained on captions: the questions of its evaluation, and their images."""


class CaptionStore(ImageStore):
    """The images of pairs of image and caption. The name of an image is the number of its pair.

    Args:
        location: a table, a folder or shards, like `--data` of pretraining.
        image_root: the folder for a table's image paths, or None to guess it.
        fields: the names of a sample's fields, or None to guess them.
        held_out: share of the images that are held out as `test`.
        test: captions to use as `test` instead; UserError is raised if `location` has some of their images.
        key: the field whose equal values are held out together, or None for equal images.
    """

    def __init__(
        self, location: Path | str, image_root: Path | str | None = None, fields: Fields | None = None,
        held_out: float = 0.0, test: str | None = None, key: str | None = None,
    ) -> None:  # fmt: skip
        self.location = Path(location)
        root = None if image_root is None else str(image_root)
        data = DataConfig(
            train=str(location), test=test, held_out=held_out, key=key, fields=fields or Fields(), image_root=root
        )
        part = "test" if test else "val"
        try:
            self._dataset = open_split(data, "train", need_long=False)
            check_readable(self._dataset, data.max_broken_share)
            self.test = open_split(data, part, need_long=False) if split_spec(data, part) else None
        except UserError as error:
            raise UserError(f"{error}\n  {HINT}") from None
        if test and self.test is not None:
            shared, total = count_shared(self._dataset, self.test)
            if shared:
                raise UserError(
                    f"--test_data {test}: {shared:,} of its {total:,} images are in {location} too: take them "
                    "out of one of the two, or hold out a share (--held_out)"
                )
        self.facts: dict[str, Any] = {"source": self._dataset.metadata()}
        """For data.json: also the hashes of the images held out, and of those that another set could hold out."""
        if held_out and not test:
            for name, images in zip(("held_out", "trained_on"), held_out_images(data)[::2], strict=True):
                self.facts[name] = [f"{image:016x}" for image in images]

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self._dataset)

    def records(self) -> Iterator[Any]:
        """Yield a record for each pair, with its long caption if it has one.

        If an image has several captions, only the first one is used, because together they would repeat each other.
        """
        for number in range(len(self._dataset)):
            texts = self._dataset.captions(number)
            web, long = texts.pair()
            response = web if texts.others else long or web
            turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": response}]
            yield {"id": str(number), "image": str(number), "conversations": turns}

    def problem(self, name: str) -> str | None:
        """Return why an image is missing, or None. Images in shards or at URLs are checked only when they are read."""
        return self._dataset.missing(int(name))

    def read(self, name: str) -> bytes:
        """Return the bytes of the image of pair `name`. Raises BrokenSample."""
        return self._dataset.read(int(name)).image


def write_test(run_dir: Path, dataset: Dataset) -> None:
    """Write the images of `dataset` into the run, and a question file that asks for a description of each.

    The files of an earlier call are replaced. Equal images are written once, and broken ones are skipped with a
    warning. The `references` of a question are all captions of its image, or only the long ones of a row that has both
    kinds.
    """
    questions: dict[bytes, dict[str, Any]] = {}
    with replacing((run_dir / TEST).parent) as work, tarfile.open(work / Path(TEST_IMAGES).name, "w") as archive:
        for number in range(len(dataset)):
            try:
                raw = dataset.read(number)
                decode_image(raw.image, raw.key)
            except BrokenSample as broken:
                log.warning("skipped in the test: %s", broken)
                continue
            info = tarfile.TarInfo(f"{number:08}.jpg")
            info.size = len(raw.image)
            line = {"question_id": number, "image": info.name, "text": DESCRIBE, "references": []}
            question = questions.setdefault(hashlib.sha256(raw.image).digest(), line)
            if question is line:  # the first row with this image
                archive.addfile(info, io.BytesIO(raw.image))
            texts = raw.texts
            question["references"] += texts.web if texts.others or not texts.long else texts.long
        lines = [json.dumps(question) + "\n" for question in questions.values()]
        (work / Path(TEST).name).write_text("".join(lines))


def is_captions(data_path: Path | str) -> bool:
    """Return True for data of pretraining, which is no .json or .jsonl whose first record has `conversations`."""
    suffix = Path(data_path).suffix
    if suffix not in (".json", ".jsonl") or is_remote(str(data_path)):
        return True
    with suppress(OSError, ValueError, RecursionError, UserError), open_regular(expand(str(data_path))[0]) as file:
        head = next(filter(bytes.strip, file), b"") if suffix == ".jsonl" else file.read(FIRST_RECORD)
        text = head.decode("utf-8-sig", "ignore").lstrip()
        if suffix == ".json" and text.startswith("{"):  # COCO's; LLaVA's is a list
            return True
        record, _ = json.JSONDecoder().raw_decode(text.lstrip("[ \t\r\n"))
        return isinstance(record, dict) and "conversations" not in record
    return False


def open_store(data_path: Path | str, image_folder: Path | str | None, **captions: Any) -> ImageStore | None:
    """Open the images of a LLaVA file, or of captions; return None for a LLaVA file without `image_folder`.

    `captions` holds more arguments of `CaptionStore`.
    """
    if is_captions(data_path):
        return CaptionStore(data_path, image_folder, **captions)
    return ImageStore(image_folder) if image_folder else None


def count_records(data_path: Path | str, store: ImageStore | None) -> int:
    """Return the number of training samples in one epoch: those of `store` if it holds captions, else of `data_path`.

    Raises UserError if the LLaVA file `data_path` cannot be read.
    """
    return len(store) if isinstance(store, CaptionStore) else len(read_json_records(Path(data_path)))


def raw_records(data_path: Path | str, store: ImageStore | None) -> list[Any]:
    """Return the raw records of a LLaVA file, or of the captions in `store`. Raises UserError for a broken file."""
    return list(store.records()) if isinstance(store, CaptionStore) else read_json_records(Path(data_path))
