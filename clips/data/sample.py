"""The samples that a source returns, and the error of a broken sample."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from clips.common.paths import without_secrets


def mend_broken(share: float) -> str:
    """What to do with data of which `share` is broken: the limit that is named is above it."""
    limit = min(1.0, math.floor(100 * share + 2) / 100)
    return f"Take them out of the data, or train with more of them: --set data.max_broken_share={limit:g}"


@dataclass(frozen=True)
class RawSample:
    """One image with its texts, nothing decoded yet."""

    key: str
    """The sample's name in messages: shard and key, or table and row with the picture's path."""
    image: bytes
    web: str
    long: str | None
    extra: dict[str, Any] = field(default_factory=dict)
    """The rest of the sample's JSON member or table row (label, captions, …)."""


class BrokenSample(Exception):
    """One sample cannot be used; training counts it and takes a substitute."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)
        self.key = without_secrets(key)
        self.reason = without_secrets(reason)

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"
