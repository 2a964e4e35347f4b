"""Load images and videos by name from a folder or a tar file, and preprocess them for an encoder."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from PIL import Image

from clips import MAX_BYTES, BrokenSample, decode_image, decoded_size, read_members
from clips.common.errors import UserError
from clips.common.files import read_regular
from clips.common.paths import inside
from mllm.data.video import MAX_BYTES as MAX_VIDEO_BYTES
from mllm.data.video import VIDEO, decode_video, is_video

log = logging.getLogger("mllm.data")


class ImageStore:
    """Images and videos by name in a folder or an uncompressed tar `location`, which each process opens itself.

    Raises UserError if there is no such folder or tar.
    """

    def __init__(self, location: Path | str) -> None:
        self.location = Path(location)
        self._members: dict[str, tuple[int, int]] | None = None
        self._file: tuple[int, BinaryIO] | None = None
        if self.location.is_file():
            self._members, problems = read_members(str(self.location))
            for problem in problems:
                log.warning("%s: %s", self.location, problem)
        elif self.location.is_dir():
            self._root = os.path.realpath(self.location)
        else:
            raise UserError(f"image folder {self.location} does not exist; give the right one with --image_folder")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}

    def _place(self, name: str) -> str | tuple[int, int]:
        """Return the file of image `name`, or (offset, size) in the tar. Raises BrokenSample if it is missing."""
        missing = BrokenSample(name, f"image {name!r} is not in {self.location}")
        if self._members is not None:
            if name not in self._members:
                raise missing
            return self._members[name]
        try:
            path = inside(self._root, name)
        except ValueError:
            reason = f"image {name!r} is outside {self.location}; give the folder above it with --image_folder"
            raise BrokenSample(name, reason) from None
        if not os.path.isfile(path):
            raise missing
        return path

    def problem(self, name: str) -> str | None:
        """Return why image `name` cannot be found, or None. No file is opened."""
        try:
            self._place(name)
        except BrokenSample as broken:
            return broken.reason
        return None

    def read(self, name: str) -> bytes:
        """Read an encoded image or video. Raises BrokenSample if it is missing."""
        place = self._place(name)
        if isinstance(place, str):
            return read_regular(place, (MAX_VIDEO_BYTES if is_video(name) else MAX_BYTES) + 1)
        if self._file is None or self._file[0] != os.getpid():  # a forked worker must not share the file position
            self._file = (os.getpid(), open(self.location, "rb"))  # noqa: SIM115 - lives as long as the store
        offset, size = place
        self._file[1].seek(offset)
        return self._file[1].read(size)

    def size(self, name: str) -> tuple[int, int]:
        """Return (height, width) that the image has after `load`, from its header, or VIDEO for a video.

        Raises BrokenSample if the header of an image is broken.
        """
        return VIDEO if is_video(name) else decoded_size(self.read(name), name)

    def load(self, name: str) -> Image.Image:
        """Load an image, or the first frame of a video, as RGB. Raises BrokenSample if it cannot be decoded."""
        shown = self.shown(name, 1)
        return shown[0] if isinstance(shown, list) else shown

    def shown(self, name: str, frames: int) -> Image.Image | list[Image.Image]:
        """Load an image, or `frames` frames of a video, as RGB. Raises BrokenSample if it cannot be decoded."""
        data = self.read(name)
        return decode_video(data, frames, name) if is_video(name) else decode_image(data, name)


def broken_image(store: ImageStore, broken: BrokenSample) -> UserError:
    """Return the error for an image that cannot be read, with what to do about it."""
    return UserError(
        f"image {broken.key} in {store.location}: {broken.reason}; repair it or remove its sample. "
        "scripts/check_data.py lists every broken image of a data set"
    )


def pixel_loader(
    store: ImageStore, preprocess: Callable[[Any], torch.Tensor], frames: int = 0
) -> Callable[[list[str]], torch.Tensor]:
    """Return a function that decodes the images of the given names and returns all their crops, [N, 3, S, S].

    `preprocess` makes crops of an image, or of a list of `frames` frames. The function raises UserError for a broken
    image.
    """

    def load(names: list[str]) -> torch.Tensor:
        try:
            return torch.cat([preprocess(store.shown(name, frames)) for name in names])
        except BrokenSample as broken:
            raise broken_image(store, broken) from None

    return load
