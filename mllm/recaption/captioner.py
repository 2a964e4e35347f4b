"""What writes captions, as the rest of the recaptioning sees it: pairs in, texts out, nothing that is remembered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Pair:
    """One image and its web caption."""

    key: str
    image: bytes
    """Encoded, as in the source; decoded only by the decoder that has bounds (`clips.decode_image`)."""
    web: str


@dataclass(frozen=True)
class Written:
    """What a captioner wrote for one pair."""

    text: str
    finished: bool
    """False: cut off by the limit on tokens, without an end token."""
    tokens: int


class Captioner(Protocol):
    """Writes a caption for each pair. What it writes depends on the pairs of the call and on `attempt` alone."""

    batch_size: int
    """Pairs of one call; the last of a shard has fewer."""

    def describe(self) -> dict[str, Any]:
        """What the manifests keep, as plain JSON: kind, fingerprint of the weights or name of the model, hash of the
        prompt, settings. Two captioners that would write different captions differ in it."""
        ...

    def write(self, pairs: Sequence[Pair], attempt: int) -> list[Written | Exception]:
        """One for each pair, in order; an Exception stands for a pair without a caption (a broken picture, …).

        Attempt 0 is greedy; 1 is the retry of what was refused, with another seed and temperature. What would fail
        for every pair (a full GPU, no server left) is raised, not returned.
        """
        ...

    def close(self) -> None:
        """Let go of what it holds; called once, also after an error."""
        ...
