"""Pictures by name from a folder or a tar file, and their pixels as an encoder wants them."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from PIL import Image

from clips.common.errors import UserError
from clips.data.images import decode_image
from clips.data.sample import BrokenSample


class ImageStore:
    """Pictures by name, from a folder or an uncompressed tar; each process opens the tar for itself.

    They are handed out as they are; their shape is the business of the encoder's image processor.

    Args:
        location: the image folder or tar file.
    """

    def __init__(self, location: Path | str) -> None:
        self.location = Path(location)
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
        """The picture as RGB; BrokenSample where it cannot be decoded."""
        return decode_image(self.read(name), name)


def _index_tar(path: Path) -> dict[str, tuple[int, int]]:
    """Name → (offset, size) of the regular files in a tar; links are left out."""
    try:
        with tarfile.open(path, "r:") as tar:
            return {
                member.name.removeprefix("./"): (member.offset_data, member.size) for member in tar if member.isfile()
            }
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"--image_folder {path} is neither a folder nor an uncompressed tar: {error}") from None


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
