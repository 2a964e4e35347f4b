"""Pairs without long captions as users have them, and a captioner for tests whose every outcome is known."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from clips import BrokenSample, decode_image
from mllm.recaption.captioner import Pair, Written

BROKEN = b"\x89PNG\r\n\x1a\n no picture"


def write_pairs(folder: Path, shards: int, each: int, *, broken: Iterable[int] = ()) -> str:
    """Shards as img2dataset leaves them: png, the caption in txt and in json; returns their pattern.

    `broken`: numbers of pairs, over all shards, whose picture is none.
    """
    from launched import pictures, write_shard  # which the processes of a recaptioning, where Known is, do not need

    folder.mkdir(parents=True, exist_ok=True)
    made = pictures(shards * each)
    for shard in range(shards):
        samples = []
        for i in range(shard * each, (shard + 1) * each):
            picture, web, _ = made[i]
            rest = {"txt": web.encode(), "json": json.dumps({"caption": web, "key": f"{i:09d}", "w": 1.5}).encode()}
            samples.append((BROKEN if i in broken else picture, rest))
        write_shard(folder / f"{shard:05d}.tar", samples)
    return f"{folder}/*.tar"


class Known:
    """Writes what the web caption asks for: "refuse" and "once" are refused, the latter at the first attempt only.

    Of another web caption the text depends on the picture, the caption and the attempt.
    """

    def __init__(self, batch_size: int = 4, seconds: float = 0.0, **texts: str) -> None:
        """`texts`: captions by web caption. `seconds`: what a call takes."""
        self.batch_size, self.seconds, self.texts = batch_size, seconds, texts
        self.calls: list[tuple[int, list[str]]] = []
        self.is_closed = False

    def describe(self) -> dict[str, Any]:
        return {"kind": "known", "batch_size": self.batch_size}

    def write(self, pairs: Sequence[Pair], attempt: int) -> list[Written | Exception]:
        assert 0 < len(pairs) <= self.batch_size
        self.calls.append((attempt, [pair.key for pair in pairs]))
        time.sleep(self.seconds)
        return [self._one(pair, attempt) for pair in pairs]

    def _one(self, pair: Pair, attempt: int) -> Written | Exception:
        try:
            decode_image(pair.image, pair.key)
        except BrokenSample as broken:
            return broken
        if "refuse" in pair.web or ("once" in pair.web and not attempt):
            return Written("I'm sorry, I cannot see any picture here at all.", True, 12)
        if "error" in pair.web and not attempt:
            return ValueError("a server that says no")
        if pair.web in self.texts:
            return Written(self.texts[pair.web], True, 9)
        digest = hashlib.sha256(pair.image + pair.web.encode("utf-8", "surrogatepass") + bytes([attempt])).digest()
        said = " ".join(
            ["red", "green", "small", "large", "round", "old", "new", "dark"][byte % 8] for byte in digest[:6]
        )
        number = int(re.sub(r"\D", "", pair.web) or 0) if len(pair.web) < 20 else 0
        return Written(f"A picture of something that is {said}. It has the number {number}.", True, 15)

    def close(self) -> None:
        self.is_closed = True


def outcome(folder: Path) -> dict[str, bytes]:
    """All that a recaptioning leaves and that must not depend on how it was disturbed."""
    kept = ("manifests", "rejected", "report")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    named = {str(path.relative_to(folder)): path for path in files}
    return {name: path.read_bytes() for name, path in named.items() if "/" not in name or name.startswith(kept)}
