"""One shard from pairs to whole: captions, what is wrong with them, a second attempt, then the file.

What comes out is a function of the shard's data, the captioner and the options: calls have the same pairs however
often the work is interrupted, and what was written down of a call (journal.py) is taken as it was.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from clips import CLIPS, BrokenSample, Source, StoredSample, decode_image, stamp
from clips.common.errors import BrokenDataError
from clips.common.escape import clip
from mllm.recaption.captioner import Captioner, Pair, Written
from mllm.recaption.claims import Claims
from mllm.recaption.journal import Journal, Outcome
from mllm.recaption.manifest import Folder, publish
from mllm.recaption.options import Options
from mllm.recaption.quality import Judged, judge, words
from mllm.recaption.shards import ContentHash, Shard, ShardWriter, read_samples, with_caption

CHUNK = 64
"""Samples that are read at once where no captioner asks for more."""
SURE = 1000
"""Pairs after which the share of broken ones is held against its limit while the work goes on."""
WORD_BINS = (0, 5, 10, 20, 30, 40, 60, 80, 120, 160, 240, 320, 480)
TOTALS = ("trimmed", "mended", "kept although bad", "web words", "long words")
BROKEN, DISSIMILAR, NOT_CAPTIONED = "broken", "dissimilar", "not captioned"
"""Reasons beside those of quality.py. "dissimilar": below the quantile that was asked for."""
LONGEST_REJECTED = 2000
"""Characters that are kept of a caption which was refused."""
ItemT = TypeVar("ItemT")
MadeT = TypeVar("MadeT")


class LostClaim(Exception):
    """Another process took the shard over: this one was stopped for too long, or its machine was out of reach."""


@dataclass
class Tally:
    """What a process has done so far."""

    pairs: int = 0
    """Captions of the first attempt, broken ones counted."""
    shards: int = 0
    tokens: int = 0
    broken: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    """First attempts by reason."""
    seconds: float = 0.0
    """In which the captioner wrote."""
    found: int = 0
    """Pairs whose first attempt another process had made, which this one took as it was."""

    def add(self, other: Tally) -> None:
        for name in ("pairs", "shards", "tokens", "broken", "seconds", "found"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.bad.update(other.bad)

    def less(self, before: Tally) -> Tally:
        names = ("pairs", "shards", "tokens", "broken", "seconds", "found")
        rest = {name: getattr(self, name) - getattr(before, name) for name in names}
        return Tally(**rest, bad=self.bad - before.bad)


@dataclass
class Caption:
    """The one that counts of a pair, with what the first attempt was refused for."""

    judged: Judged
    tokens: int
    first_reason: str = ""


class Worker:
    """Shards one after the other. `changed` is called whenever the tally has changed."""

    def __init__(
        self,
        options: Options,
        folder: Folder,
        source: Source,
        captioner: Captioner,
        claims: Claims,
        tally: Tally,
        *,
        encoder: CLIPS | None = None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        """`encoder`: what --min-similarity-quantile asks."""
        self.options, self.folder, self.source = options, folder, source
        self.captioner, self.claims, self.encoder, self.changed = captioner, claims, encoder, changed
        self.tally = tally
        self._prompt = options.prompt.fill("")

    def make(self, shard: Shard) -> dict[str, Any]:
        """Write the shard, which is claimed; returns its manifest.

        Raises LostClaim, BrokenDataError where too many pairs are broken, and what source and captioner raise.
        """
        place = self.folder.work(shard.name)
        place.mkdir(parents=True, exist_ok=True)
        made_of = f"{shard.url} {stamp(shard.url)} {shard.first} {shard.stop}"
        with Journal(place, self.claims.owner, made_of) as journal:
            captions, refused = self._captions(shard, journal)
        dissimilar = self._dissimilar(shard, captions)
        path = place / f"{self.claims.owner}.tar"
        manifest, rejected = self._write(shard, path, captions, refused, dissimilar)
        self._check_claim(shard)
        publish(self.folder, shard.name, path, iter(rejected), manifest)
        shutil.rmtree(place, ignore_errors=True)  # what stays is in the way of nobody
        self.tally.shards += 1
        self.changed()
        return manifest

    # ---------------------------------------------------------------------------------------------- captions
    def _captions(self, shard: Shard, journal: Journal) -> tuple[dict[int, Caption], dict[int, Exception]]:
        """By sample: what was written, and why nothing was."""
        webs: dict[int, str] = {}
        first = self._attempt(shard, journal, 0, range(shard.first, shard.stop), webs)
        captions = {i: self._judged(i, outcome, webs) for i, outcome in first.items() if isinstance(outcome, Written)}
        refused = {i: outcome for i, outcome in first.items() if not isinstance(outcome, Written)}
        for caption in captions.values():
            caption.first_reason = caption.judged.reason
        again = sorted(
            [i for i, caption in captions.items() if caption.judged.reason]
            + [i for i, error in refused.items() if not isinstance(error, BrokenSample)]
        )
        for i, outcome in self._attempt(shard, journal, 1, again, webs).items():
            if not isinstance(outcome, Written):
                continue
            second = self._judged(i, outcome, webs)
            if i in refused:
                del refused[i]
                second.first_reason = NOT_CAPTIONED
                captions[i] = second
            elif not second.judged.reason or not captions[i].judged.text:
                second.first_reason = captions[i].first_reason
                captions[i] = second
        return captions, refused

    def _judged(self, index: int, written: Written, webs: dict[int, str]) -> Caption:
        web = webs.get(index)
        if web is None:  # of a call that was made before an interruption
            web = self.source.stored(index).web
        return Caption(judge(written, web, self._prompt, self.options.bounds), written.tokens)

    def _attempt(
        self, shard: Shard, journal: Journal, attempt: int, indices: Sequence[int], webs: dict[int, str]
    ) -> dict[int, Outcome]:
        """What the calls for `indices` came to, those that were made before included; `webs` is filled."""
        size = self.captioner.batch_size
        calls = [indices[start : start + size] for start in range(0, len(indices), size)]
        missing = [number for number in range(len(calls)) if journal.found(attempt, number) is None]
        if not attempt:
            self.tally.found += len(indices) - sum(len(calls[number]) for number in missing)
        reading = ahead(lambda number: read_samples(self.source, shard, calls[number]), missing)
        for number, samples in zip(missing, reading, strict=True):
            webs |= {
                i: sample.web
                for i, sample in zip(calls[number], samples, strict=True)
                if isinstance(sample, StoredSample)
            }
            begin = time.monotonic()
            outcomes = journal.add(attempt, number, self._call(shard, samples, attempt))
            self.tally.seconds += time.monotonic() - begin
            self._count(calls[number], outcomes, webs, attempt)
            self._check_claim(shard)
        found: dict[int, Outcome] = {}
        for number, call in enumerate(calls):
            found |= zip(call, journal.found(attempt, number) or (), strict=True)
        return found

    def _call(self, shard: Shard, samples: Sequence[StoredSample | BrokenSample], attempt: int) -> list[Outcome]:
        whole = [i for i, sample in enumerate(samples) if isinstance(sample, StoredSample)]
        pairs = [
            Pair(f"{shard.url}#{sample.name}", sample.image, sample.web.strip())
            for sample in samples
            if isinstance(sample, StoredSample)
        ]
        outcomes: list[Any] = list(samples)
        for i, outcome in zip(whole, self.captioner.write(pairs, attempt) if pairs else (), strict=True):
            outcomes[i] = outcome
        return outcomes

    def _count(self, indices: Sequence[int], outcomes: Sequence[Outcome], webs: dict[int, str], attempt: int) -> None:
        tally = self.tally
        for i, outcome in zip(indices, outcomes, strict=True):
            if isinstance(outcome, Written):
                tally.tokens += outcome.tokens
                if not attempt and (reason := self._judged(i, outcome, webs).judged.reason):
                    tally.bad[reason] += 1
            elif not attempt:
                tally.broken += isinstance(outcome, BrokenSample)
                tally.bad[BROKEN if isinstance(outcome, BrokenSample) else NOT_CAPTIONED] += 1
        if not attempt:
            tally.pairs += len(indices)
        self.changed()
        if tally.pairs >= SURE:
            check_broken(tally.broken, tally.pairs, self.options)

    # ------------------------------------------------------------------------------------------------ similarity
    def _dissimilar(self, shard: Shard, captions: dict[int, Caption]) -> set[int]:
        """Those that would be written and whose caption fits its picture less than the quantile of this shard."""
        if self.encoder is None or self.options.min_similarity_quantile is None:
            return set()
        written = [i for i in sorted(captions) if self._is_written(captions[i])]
        chunks = [written[start : start + CHUNK] for start in range(0, len(written), CHUNK)]
        found: dict[int, float] = {}
        for chunk, samples in zip(chunks, ahead(lambda c: read_samples(self.source, shard, c), chunks), strict=True):
            pictures = {}
            for i, sample in zip(chunk, samples, strict=True):
                try:
                    if isinstance(sample, StoredSample):
                        pictures[i] = decode_image(sample.image, sample.name)
                except BrokenSample:  # its captioner made something of it; what the encoder cannot see is no match
                    found[i] = -1.0
            texts = [captions[i].judged.text for i in pictures]
            cosines = (self.encoder.encode_image(pictures.values()) * self.encoder.encode_text(texts)).sum(dim=1)
            found |= zip(pictures, cosines.tolist(), strict=True)
            self._check_claim(shard)
        if not found:
            return set()
        bound = float(np.quantile(list(found.values()), self.options.min_similarity_quantile))
        return {i for i, cosine in found.items() if cosine < bound}

    def _is_written(self, caption: Caption) -> bool:
        """An empty one never is: pretraining would count it as broken."""
        return bool(caption.judged.text) and (not caption.judged.reason or self.options.on_bad == "keep")

    # ---------------------------------------------------------------------------------------------- the file
    def _write(
        self, shard: Shard, path: Any, captions: dict[int, Caption], refused: dict[int, Exception], dissimilar: set[int]
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The manifest, and a record of each pair that is not in the file."""
        content, rejected = ContentHash(), []
        first, final = Counter(c.first_reason for c in captions.values() if c.first_reason), Counter[str]()
        lengths = {"web": Counter[int](), "long": Counter[int]()}
        totals = Counter[str]()
        chunks = [range(i, min(i + CHUNK, shard.stop)) for i in range(shard.first, shard.stop, CHUNK)]
        with ShardWriter(path) as writer:
            for chunk, samples in zip(
                chunks, ahead(lambda c: read_samples(self.source, shard, c), chunks), strict=True
            ):
                for i, sample in zip(chunk, samples, strict=True):
                    content.add(sample)
                    caption = captions.get(i)
                    reason, error = "", refused.get(i)
                    members: list[tuple[str, bytes]] = []
                    if isinstance(sample, BrokenSample):
                        reason, error = BROKEN, sample
                    elif caption is None:
                        reason = BROKEN if isinstance(error, BrokenSample) else NOT_CAPTIONED
                    elif not self._is_written(caption):
                        reason = caption.judged.reason
                    elif i in dissimilar:
                        reason = DISSIMILAR
                    else:
                        try:
                            members = list(with_caption(sample, caption.judged.text))
                        except (ValueError, RecursionError) as unwritable:  # JSON that can be read and not written
                            reason, error = BROKEN, unwritable
                    if reason:
                        final[reason] += 1
                        rejected.append(_rejected(shard, i, sample, reason, error, caption))
                        continue
                    assert caption is not None
                    assert isinstance(sample, StoredSample)
                    writer.add(sample.name, members)
                    totals["trimmed"] += caption.judged.trimmed
                    totals["mended"] += bool(caption.first_reason) and not caption.judged.reason
                    totals["kept although bad"] += bool(caption.judged.reason)
                    for part, text in (("web", sample.web), ("long", caption.judged.text)):
                        count = len(words(text))
                        totals[f"{part} words"] += count
                        lengths[part][_bin(count)] += 1
        manifest = {
            "input": {"file": shard.url, "samples": len(shard), "sha256": content.hexdigest()},
            "output": {
                "file": f"{shard.name}.tar", "samples": writer.samples, "bytes": writer.size, "sha256": writer.sha256,
            },
            "captioner": self.captioner.describe(),
            "settings": self.options.settings(),
            "counts": {
                "pairs": len(shard), "left_out": shard.left_out, "written": writer.samples,
                "tokens": sum(caption.tokens for caption in captions.values()),
                **{name: totals[name] for name in TOTALS},
            },
            "first_attempts_refused": dict(sorted(first.items())),
            "rejected": dict(sorted(final.items())),
            "words": {part: {str(edge): lengths[part][edge] for edge in WORD_BINS} for part in lengths},
        }  # fmt: skip
        return manifest, rejected

    def _check_claim(self, shard: Shard) -> None:
        if not self.claims.holds(shard.name):
            raise LostClaim(shard.name)


def check_broken(broken: int, pairs: int, options: Options) -> None:
    """BrokenDataError where more pictures are broken than is allowed."""
    share = broken / max(1, pairs)
    if share > options.max_broken_share:
        raise BrokenDataError(
            f"{broken:,} of {pairs:,} pairs are broken, {share:.1%}: above --max-broken-share "
            f"{options.max_broken_share:g}. {options.out / 'rejected'} lists those of finished shards; the same "
            "command with a larger share goes on"
        )


def ahead(make: Callable[[ItemT], MadeT], items: Iterable[ItemT]) -> Iterator[MadeT]:
    """`make` of each item in order, the next one made in a thread meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        coming = None
        for item in items:
            following = pool.submit(make, item)
            if coming is not None:
                yield coming.result()
            coming = following
        if coming is not None:
            yield coming.result()


def _rejected(
    shard: Shard,
    index: int,
    sample: StoredSample | BrokenSample,
    reason: str,
    error: Exception | None,
    caption: Caption | None,
) -> dict[str, Any]:
    key = sample.key.removeprefix(f"{shard.url}#") if isinstance(sample, BrokenSample) else sample.name
    record: dict[str, Any] = {"row": index - shard.first, "key": key, "reason": reason}
    if error is not None:
        record["error"] = clip(error.reason if isinstance(error, BrokenSample) else str(error), LONGEST_REJECTED)
    if caption is not None:
        record["caption"] = clip(caption.judged.text, LONGEST_REJECTED)
    return record


def _bin(count: int) -> int:
    return max(edge for edge in WORD_BINS if edge <= count)
