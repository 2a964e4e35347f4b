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

CHUNK = 16
"""Samples that are read at once where no captioner asks for more; a picture may have 64 MB."""
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
        captions: dict[int, Caption] = {}
        refused: dict[int, Exception] = {}
        for i, made in self._attempt(shard, journal, 0, range(shard.first, shard.stop)).items():
            if isinstance(made, Caption):
                made.first_reason = made.judged.reason
                captions[i] = made
            else:
                refused[i] = made
        again = [i for i, caption in captions.items() if caption.judged.reason]
        again += [i for i, error in refused.items() if not isinstance(error, BrokenSample)]
        for i, made in self._attempt(shard, journal, 1, sorted(again)).items():
            if not isinstance(made, Caption):
                continue
            if refused.pop(i, None) is not None:
                made.first_reason = NOT_CAPTIONED
                captions[i] = made
            elif not made.judged.reason or not captions[i].judged.text:
                made.first_reason = captions[i].first_reason
                captions[i] = made
        return captions, refused

    def _attempt(
        self, shard: Shard, journal: Journal, attempt: int, indices: Sequence[int]
    ) -> dict[int, Caption | Exception]:
        """What the calls for `indices` came to, those that were made before included."""
        size = self.captioner.batch_size
        calls = [indices[start : start + size] for start in range(0, len(indices), size)]
        missing = [number for number in range(len(calls)) if journal.found(attempt, number) is None]
        made: dict[int, Caption | Exception] = {}
        reading = ahead(lambda number: read_samples(self.source, shard, calls[number]), missing)
        for number, samples in zip(missing, reading, strict=True):
            begin = time.monotonic()
            outcomes = journal.add(attempt, number, self._call(shard, samples, attempt))
            self.tally.seconds += time.monotonic() - begin
            fresh = [self._judged(outcome, sample) for outcome, sample in zip(outcomes, samples, strict=True)]
            made |= zip(calls[number], fresh, strict=True)
            self._count(fresh, attempt)
            self._check_claim(shard)
        for number in sorted(set(range(len(calls))) - set(missing)):  # before an interruption
            outcomes = journal.found(attempt, number) or []
            for chunk in chunked(range(len(outcomes))):
                samples = read_samples(self.source, shard, [calls[number][i] for i in chunk])
                for i, sample in zip(chunk, samples, strict=True):
                    made[calls[number][i]] = self._judged(outcomes[i], sample)
            self.tally.found += 0 if attempt else len(outcomes)
        self.changed()
        return made

    def _judged(self, outcome: Outcome, sample: StoredSample | BrokenSample) -> Caption | Exception:
        if isinstance(sample, BrokenSample):
            return sample
        if not isinstance(outcome, Written):
            return outcome
        return Caption(judge(outcome, sample.web, self._prompt, self.options.bounds), outcome.tokens)

    def _call(self, shard: Shard, samples: Sequence[StoredSample | BrokenSample], attempt: int) -> list[Outcome]:
        pairs = {
            i: Pair(f"{shard.url}#{sample.name}", sample.image, sample.web.strip())
            for i, sample in enumerate(samples)
            if isinstance(sample, StoredSample)
        }
        written = self.captioner.write(list(pairs.values()), attempt) if pairs else []
        outcomes = dict(zip(pairs, written, strict=True))
        return [sample if isinstance(sample, BrokenSample) else outcomes[i] for i, sample in enumerate(samples)]

    def _count(self, made: Sequence[Caption | Exception], attempt: int) -> None:
        tally = self.tally
        tally.tokens += sum(caption.tokens for caption in made if isinstance(caption, Caption))
        if not attempt:
            broken = sum(isinstance(error, BrokenSample) for error in made)
            tally.pairs += len(made)
            tally.broken += broken
            tally.bad.update({BROKEN: broken} if broken else {})
            for one in made:
                if isinstance(one, Caption):
                    tally.bad.update([one.judged.reason] if one.judged.reason else [])
                elif not isinstance(one, BrokenSample):
                    tally.bad[NOT_CAPTIONED] += 1
        self.changed()
        if tally.pairs >= SURE:
            check_broken(tally.broken, tally.pairs, self.options)

    # ------------------------------------------------------------------------------------------------ similarity
    def _dissimilar(self, shard: Shard, captions: dict[int, Caption]) -> set[int]:
        """Those that would be written and whose caption fits its picture less than the quantile of this shard."""
        if self.encoder is None or self.options.min_similarity_quantile is None:
            return set()
        written = [i for i in sorted(captions) if self._is_written(captions[i])]
        chunks = chunked(written)
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
        chunks = chunked(range(shard.first, shard.stop))
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


def chunked(indices: Sequence[int]) -> list[Sequence[int]]:
    """In parts of CHUNK."""
    return [indices[start : start + CHUNK] for start in range(0, len(indices), CHUNK)]


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
