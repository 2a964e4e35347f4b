"""The captioner that the rest of recaptioning sees: pairs in, texts out, no memory between calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Pair:
    """One image and its web caption."""

    key: str
    image: bytes
    """Encoded, as in the source. Only the bounded decoder (`clips.decode_image`) decodes it."""
    web: str


@dataclass(frozen=True)
class Written:
    """The text that a captioner wrote for one pair."""

    text: str
    finished: bool
    """False if the limit on tokens cut the text off."""
    tokens: int


class Captioner(Protocol):
    """Writes a caption for each pair. The captions depend on the pairs of the call and on `attempt` alone."""

    batch_size: int
    """Pairs of one call; the last call of a shard has fewer."""

    def describe(self) -> dict[str, Any]:
        """Plain JSON for the manifests: kind, weights or model, hash of the prompt, settings.

        Two captioners that would write different captions have different descriptions.
        """
        ...

    def write(self, pairs: Sequence[Pair], attempt: int) -> list[Written | Exception]:
        """The result for each pair, in order; an Exception is the reason why a pair has no caption.

        Attempt 0 is greedy. Attempt 1 retries refused captions with another seed and temperature. An error that would
        hit every pair (a full GPU, no server left) is raised.
        """
        ...

    def close(self) -> None:
        """Free all resources; called once, also after an error."""
        ...
