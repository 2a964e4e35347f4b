"""Image features computed once and kept on disk, so that training starts from features instead of pixels.

A frozen vision tower gives an image the same tokens every time, so epochs, stages, seeds and runs share the features.

Cache layout: `<root>/<encoder fingerprint>/<random>.npy` [n, N, W] in float16 (fp32 if a value would overflow) and
`<random>.json` with its n keys, one for each crop; those of an image follow each other. A pair of files counts
once its .json is in place, and never changes. So several processes may write, and a killed process leaves nothing that
counts.
float16 keeps 11 bits: cached features differ by at most 2^-11 of their value from computed ones.
ENCODER.txt describes the encoder. Its modification time is that of the last use, and a process that uses the folder
holds a shared lock on it, so that the folders used least recently can make room for others.

Shapes: B crops (an image is one, or with tiles several) · N image tokens · W width of a token.
"""

import fcntl
import hashlib
import itertools
import json
import shutil
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
from clips.common.errors import UserError, first_line
from clips.common.files import from_json, placing, read_bytes, write_atomically
from clips.common.live import say
from mllm.data.images import ImageStore, broken_image, pixel_loader
from mllm.encoders.encoder import VisionEncoder
from mllm.encoders.registry import image_pixels

ENCODER = "ENCODER.txt"
IMAGES_AT_ONCE = 64
"""Number of crops that the encoder sees in one pass of the feature cache."""
FILE_BYTES = 256 * 2**20
"""Size of one cache file."""
OF_DISK = 0.5
"""Without a bound in GB the cache takes at most this share of the disk: of what is free and what it holds already."""


def feature_bytes(encoder: VisionEncoder, images: int) -> int:
    """Return the bytes that the features of `images` images take at most, in float16."""
    return 2 * images * most_crops(encoder) * encoder.num_tokens * encoder.width


def most_crops(encoder: VisionEncoder) -> int:
    """Return the largest number of crops of one image or video."""
    return max(1 + encoder.most_tiles, encoder.frames)


class FeatureCache:
    """Features of one encoder for the images of one store, kept on disk in a folder of this encoder below `root`.

    The constructor makes this folder, and reads which features are there. `mllm.training.trainer.Collator` calls `get`.
    The key of an image is the hash of its bytes. A pickled copy in a data worker can `get`, but not `fill`.
    """

    def __init__(self, encoder: VisionEncoder, store: ImageStore, root: Path | str, *, gb: float | None = None) -> None:
        """Open the cache. `gb` bounds all folders below `root` together; None: by a share of the disk (`OF_DISK`)."""
        self.encoder: VisionEncoder | None = encoder
        self.store = store
        self.shape = (encoder.num_tokens, encoder.width)
        self.directory = Path(root) / encoder.fingerprint[:32]
        self.directory.mkdir(parents=True, exist_ok=True)
        self.gb = gb
        self._lock: Any = (self.directory / ENCODER).open("w", encoding="utf-8")
        fcntl.flock(self._lock, fcntl.LOCK_SH)  # until this object goes
        print(encoder.describe(), file=self._lock, flush=True)
        self._rows: dict[str, tuple[str, int, int]] = {}  # key → file, first row, rows
        self._keys: dict[str, str] = {}  # name → key
        self._files: set[str] = set()
        self._arrays: dict[str, np.ndarray] = {}
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"encoder": None, "_arrays": {}, "_lock": None}

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

    def keys(self, names: Sequence[str]) -> list[str]:
        """Return the keys of images, whose bytes are read and hashed once. Raises UserError for a broken image."""
        return [self._key(name) for name in names]

    def trust(self, names: Sequence[str], keys: Sequence[str]) -> None:
        """Take the keys that another process has made of images, instead of hashing them here too."""
        self._keys.update(zip(names, keys, strict=True))

    def make_room(self, names: Sequence[str]) -> None:
        """Remove the folders used least recently, until the features that `fill` would add are within the bound.

        Folders in use stay. Raises UserError if the features do not fit beside them.
        """
        assert self.encoder is not None, "a copy of the cache in another process cannot fill it"
        root = self.directory.parent
        sizes = {
            path.parent: sum(f.stat().st_size for f in path.parent.iterdir()) for path in root.glob(f"*/{ENCODER}")
        }
        images = len(set(self.keys(names)) - self._rows.keys())
        missing, present = feature_bytes(self.encoder, images), sum(sizes.values())
        free = shutil.disk_usage(root).free
        bound = OF_DISK * (free + present) if self.gb is None else min(1e9 * self.gb, free + present)
        others = sorted(sizes.keys() - {self.directory}, key=lambda folder: (folder / ENCODER).stat().st_mtime)
        while missing and present + missing > bound and others:
            oldest = others.pop(0)
            with (oldest / ENCODER).open() as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:  # another process reads its features
                    continue
                shutil.rmtree(oldest)
            present -= sizes[oldest]
            say(f"feature cache: {oldest} was used least recently and is removed ({sizes[oldest] / 1e9:.2g} GB)")
        if missing and present + missing > bound:
            share = f"{OF_DISK:.0%} of the disk" if self.gb is None else f"--feature_cache_gb {self.gb:g} or the disk"
            raise UserError(
                f"the features of {images:,} images take up to {missing / 1e9:.3g} GB in {root}, which holds "
                f"{present / 1e9:.3g} GB: more than {share}. Give --feature_cache False, which computes them in every "
                f"step, another --cache_dir, or a larger --feature_cache_gb"
            )

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
        batch_size = max(1, batch_size // most_crops(self.encoder))  # a batch must not grow with the crops
        per_file = max(1, FILE_BYTES // feature_bytes(self.encoder, 1) // batch_size) * batch_size
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
