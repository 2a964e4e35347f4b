"""An open tar shard, and the members of one of its samples."""

from collections.abc import Sequence
from typing import Any, BinaryIO

from clips.common.files import from_json
from clips.common.paths import without_secrets
from clips.data.images import MAX_BYTES
from clips.data.sample import BrokenSample, cell_of
from clips.data.tar import ShardIndex


class OpenShard:
    """A shard's file and index, and the rows of its complete samples."""

    def __init__(self, url: str, index: ShardIndex, file: BinaryIO, rows: Sequence[int]) -> None:
        self.label = without_secrets(url)
        self.index, self.file, self.rows = index, file, rows
        self.column = {extension: i for i, extension in enumerate(index.extensions)}


class Members:
    """The members of one sample, read on demand."""

    def __init__(self, shard: OpenShard, row: int) -> None:
        self.shard, self.row = shard, row
        self.key = f"{shard.label}#{shard.index.keys[row]}"
        self._json: dict[str, dict[str, Any] | None] = {}

    def read(self, extension: str) -> bytes | None:
        """Return a member's bytes, or None if there is none. Raises BrokenSample if it is too large or cut off."""
        column = self.shard.column.get(extension)
        if column is None:
            return None
        offset = int(self.shard.index.offsets[self.row, column])
        size = int(self.shard.index.sizes[self.row, column])
        if offset < 0:
            return None
        if size > MAX_BYTES:
            raise BrokenSample(self.key, f"{extension}: {size} bytes are above the limit of {MAX_BYTES}")
        try:
            self.shard.file.seek(offset)
            data = self.shard.file.read(size)
        except OSError as error:
            raise BrokenSample(self.key, f"{extension}: {error}") from None
        if len(data) != size:
            raise BrokenSample(self.key, f"{extension}: cut off, {len(data)} of {size} bytes are there")
        return data

    def json(self, extension: str) -> dict[str, Any] | None:
        """Return the parsed JSON member, or None if there is none. Raises BrokenSample if it is no object."""
        if extension not in self._json:
            data = self.read(extension)
            try:
                value = None if data is None else from_json(data)
            except ValueError as error:
                raise BrokenSample(self.key, f"{extension}: bad JSON ({error})") from None
            if value is not None and not isinstance(value, dict):
                raise BrokenSample(self.key, f"{extension}: not a JSON object")
            self._json[extension] = value
        return self._json[extension]

    def text(self, extension: str, key: str | None) -> Any:
        """Return a text member, or the value of `key` in a JSON member. Raises BrokenSample."""
        if key is not None:
            return cell_of(self.json(extension) or {}, key)
        data = self.read(extension)
        try:
            return None if data is None else data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BrokenSample(self.key, f"{extension}: not UTF-8 ({error})") from None
