"""What a source hands out: one raw sample, or the reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RawSample:
    """One image with its texts, nothing decoded yet."""

    key: str
    """Names the sample for a person: shard and key, or table and row."""
    image: bytes
    web: str
    long: str | None
    extra: dict[str, Any] = field(default_factory=dict)
    """Whatever else the sample's JSON member or table row holds (label, captions, …)."""


@dataclass(frozen=True)
class StoredSample:
    """A sample as its source keeps it, for what writes it elsewhere: neither stripped nor cut."""

    name: str
    """Within its shard or table; a row's number in nine digits."""
    image: bytes
    web: str
    picture: str
    """Extension of the member, or column, that the image was in."""
    others: dict[str, bytes]
    """The other members by extension, captions among them. Of a table's row: `json`, its cells, and those of bytes."""


class BrokenSample(Exception):
    """One sample cannot be used; training takes a substitute and counts it."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)
        self.key = key
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"
