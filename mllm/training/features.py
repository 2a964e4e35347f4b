"""Image features computed once and kept on disk, so that training starts from features instead of pixels.

A frozen vision tower gives an image the same tokens every time, so epochs, stages, seeds and runs share the features.

Cache layout: `<root>/<encoder fingerprint>/<random>.npy` [n, N, W] in float16 (fp32 if a value would overflow) and
`<random>.json` with its n keys, one for each crop; those of an image follow each other. A pair of files counts
once its .json is in place, and never changes. So several processes may write, and a killed process leaves nothing that
counts.
float16 keeps 11 bits: cached features differ by at most 2^-11 of their value from computed ones.

Shapes: B crops (an image is one, or with tiles several) · N image tokens · W width of a token.
"""

import hashlib
import itertools
import json
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from clips import BrokenSample
from clips.common.errors import first_line
from clips.common.files import from_json, placing, read_bytes, write_atomically
from clips.common.live import say
from mllm.data.images import ImageStore, broken_image, pixel_loader
from mllm.encoders.encoder import VisionEncoder
from mllm.encoders.registry import image_pixels

IMAGES_AT_ONCE = 64
"""Number of crops that the encoder sees in one pass of the feature cache."""
FILE_BYTES = 256 * 2**20
"""Size of one cache file."""


class FeatureCache:
    """Features of one encoder for the images of one store, kept on disk in a folder of this encoder below `root`.

    The constructor makes this folder, and reads which features are there. `mllm.training.trainer.Collator` calls `get`.
    The key of an image is the hash of its bytes. A pickled copy in a data worker can `get`, but not `fill`.
    """

    def __init__(self, encoder: VisionEncoder, store: ImageStore, root: Path | str) -> None:
        self.encoder: VisionEncoder | None = encoder
        self.store = store
        self.shape = (encoder.num_tokens, encoder.width)
        self.directory = Path(root) / encoder.fingerprint[:32]
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "ENCODER.txt").write_text(encoder.describe() + "\n", encoding="utf-8")
        self._rows: dict[str, tuple[str, int, int]] = {}  # key → file, first row, rows
        self._keys: dict[str, str] = {}  # name → key
        self._files: set[str] = set()
        self._arrays: dict[str, np.ndarray] = {}
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"encoder": None, "_arrays": {}}

    def refresh(self) -> None:
        """Read the keys that other processes have written since. A damaged pair is removed, and `fill` encodes anew."""
        for path in sorted(self.directory.glob("*.json")):
            if path.stem in self._files:
                continue
            self._files.add(path.stem)
            features = path.with_suffix(".npy")
            try:
                keys = from_json(read_bytes(path))
                rows, *shape = np.load(features, mmap_mode="r").shape
                if (rows, tuple(shape)) != (len(keys), self.shape):
                    raise ValueError(f"{rows:,} × {shape} features for {len(keys):,} keys")
            except (FileNotFoundError, ValueError, TypeError, EOFError) as error:
                say(f"{features} or its .json is damaged ({first_line(error)}): its images are encoded anew")
                features.unlink(missing_ok=True)
                path.unlink(missing_ok=True)
                continue
            first = 0
            for key, group in itertools.groupby(keys):
                count = len(list(group))
                self._rows[key] = (path.stem, first, count)
                first += count

    def get(self, names: Sequence[str]) -> Tensor:
        """Return features [B, N, W], fp32, of the crops of cached images. Raises KeyError for other images."""
        entries = [self._rows[self._key(name)] for name in names]
        features = np.empty((sum(count for *_, count in entries), *self.shape), dtype=np.float32)
        filled = 0
        for file, row, count in entries:
            if file not in self._arrays:
                self._arrays[file] = np.load(self.directory / f"{file}.npy", mmap_mode="r")
            features[filled : filled + count] = self._arrays[file][row : row + count]
            filled += count
        return torch.from_numpy(features)

    def fill(
        self,
        names: Sequence[str],
        *,
        batch_size: int = IMAGES_AT_ONCE,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
    ) -> int:
        """Encode the images of `names` that are not cached yet, and return their number.

        Each of several ranks encodes its share; then a barrier and `refresh` give every rank all features.
        Raises UserError for a broken image. What was written before a disk was full stays usable.
        """
        assert self.encoder is not None, "a copy of the cache in another process cannot fill it"
        self.refresh()
        missing: dict[str, str] = {}  # key → name
        for name in names:
            if self._key(name) not in self._rows:
                missing.setdefault(self._key(name), name)
        # Shared by the image's key, not its index, because a late rank finds other images missing than the first.
        todo = [name for key, name in missing.items() if int(key, 16) % world_size == rank]
        if not todo:
            return 0
        crops = max(1 + self.encoder.most_tiles, self.encoder.frames)  # at most; a batch must not grow with them
        batch_size = max(1, batch_size // crops)
        bytes_each = 2 * self.shape[0] * self.shape[1] * crops
        per_file = max(1, FILE_BYTES // bytes_each // batch_size) * batch_size
        model: Any = self.encoder.model  # PreTrainedModel.to is annotated without its `self`
        model.to(device)
        preprocess = partial(image_pixels, self.encoder.image_processor)
        load = pixel_loader(self.store, preprocess, self.encoder.frames)
        with tqdm(total=len(todo), unit="img", desc="image features", disable=None) as bar:
            for start in range(0, len(todo), per_file):
                chunk = todo[start : start + per_file]
                parts: list[np.ndarray] = []
                keys: list[str] = []
                for begin in range(0, len(chunk), batch_size):
                    batch = chunk[begin : begin + batch_size]
                    pixels = [load([name]) for name in batch]
                    with torch.inference_mode():
                        features = self.encoder.features(torch.cat(pixels).to(device, model.dtype))
                        parts.append(features.float().cpu().numpy())
                    keys += [self._key(name) for name, part in zip(batch, pixels, strict=True) for _ in part]
                    bar.update(len(batch))
                self._write(keys, np.concatenate(parts))
        self.refresh()
        return len(todo)

    def _key(self, name: str) -> str:
        if name not in self._keys:
            try:
                digest = hashlib.blake2b(self.store.read(name), digest_size=16)
            except BrokenSample as broken:
                raise broken_image(self.store, broken) from None
            self._keys[name] = digest.hexdigest()
        return self._keys[name]

    def _write(self, keys: list[str], features: np.ndarray) -> None:
        with np.errstate(over="ignore"):
            half = features.astype(np.float16)
        path = self.directory / uuid.uuid4().hex
        with placing(path.with_suffix(".npy")) as file:
            np.save(file, half if np.isfinite(half).all() else features)
        write_atomically(path.with_suffix(".json"), json.dumps(keys))  # last: it makes the pair count
