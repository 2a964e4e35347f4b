"""Pictures by name from a folder or a tar file, and their pixels as an encoder wants them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import torch
from PIL import Image

from clips.common.errors import UserError
from clips.common.paths import inside
from clips.data.images import decode_image
from clips.data.sample import BrokenSample
from clips.data.tar import read_members

log = logging.getLogger("mllm.data")
AspectRatio = Literal["square", "pad"]


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
        if self.location.is_file():
            self._members, problems = read_members(str(self.location))
            for problem in problems:
                log.warning("%s: %s", self.location, problem)
        elif self.location.is_dir():
            self._root = os.path.realpath(self.location)
        else:
            raise UserError(f"image folder {self.location} does not exist; name it with --image_folder")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}

    def _place(self, name: str) -> str | tuple[int, int]:
        """The file of picture `name`, or (offset, size) of its member; BrokenSample where there is none."""
        if self._members is not None:
            if name not in self._members:
                raise BrokenSample(name, f"image {name!r} is not in {self.location}")
            return self._members[name]
        try:
            path = inside(self._root, name)
        except ValueError:
            reason = f"image {name!r} leads out of {self.location}; name the real folder with --image_folder"
            raise BrokenSample(name, reason) from None
        if not os.path.isfile(path):
            raise BrokenSample(name, f"image {name!r} is not in {self.location}")
        return path

    def problem(self, name: str) -> str | None:
        """Why picture `name` cannot be read, or None; opens nothing."""
        try:
            self._place(name)
        except BrokenSample as broken:
            return broken.reason
        return None

    def read(self, name: str) -> bytes:
        """The encoded picture; BrokenSample where there is none."""
        place = self._place(name)
        if isinstance(place, str):
            return Path(place).read_bytes()
        if self._file is None or self._file[0] != os.getpid():  # a forked worker must not share the file position
            self._file = (os.getpid(), open(self.location, "rb"))  # noqa: SIM115 - lives as long as the store
        offset, size = place
        self._file[1].seek(offset)
        return self._file[1].read(size)

    def load(self, name: str) -> Image.Image:
        """The picture as RGB, padded to a square if asked; BrokenSample where it cannot be decoded."""
        image = decode_image(self.read(name), name)
        return pad_to_square(image, self.background) if self.aspect_ratio == "pad" else image


def pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """Centre the picture on a square of `colour` (LLaVA's `expand2square`)."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


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
