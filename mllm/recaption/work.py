"""One shard from pairs to file: a first attempt, the judgement, a second attempt, the file.

The result depends on the shard's data, the captioner and the options alone. Calls hold the same pairs however often
the work is interrupted, and a call in the journal is not made again.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from clips import BrokenSample, Source, StoredSample, stamp
from clips.common.errors import BrokenDataError
from clips.common.escape import clip
from mllm.recaption.captioner import Captioner, Pair, Written
from mllm.recaption.journal import Journal, Outcome
from mllm.recaption.manifest import Folder, publish
from mllm.recaption.options import Options
from mllm.recaption.quality import Judged, judge, words
from mllm.recaption.shards import ContentHash, Shard, ShardWriter, read_samples, with_caption

CHUNK = 16
"""Samples that are read at once outside calls of the captioner; a picture may have 64 MB."""
SURE = 1000
"""Pairs after which a running process checks the share of broken pairs."""
WORD_BINS = (0, 5, 10, 20, 30, 40, 60, 80, 120, 160, 240, 320, 480)
BROKEN, NOT_CAPTIONED = "broken", "not captioned"
"""The reasons that quality.py does not know."""
LONGEST_REJECTED = 2000
"""Characters of a refused caption that rejected/ keeps."""
Read = StoredSample | BrokenSample
ItemT = TypeVar("ItemT")
MadeT = TypeVar("MadeT")


@dataclass
class Caption:
    """The final caption of a pair, and the reason for which the first attempt was refused."""

    judged: Judged
    tokens: int
    first_reason: str = ""


@dataclass(frozen=True)
class Line:
    """The outcome of one pair; `reason` is empty if the pair is in the file."""

    row: int
    key: str
    caption: Caption | None
    reason: str = ""
    error: Exception | None = None
    words: tuple[int, int] = (0, 0)
    """Words of the web caption and of the new caption."""


class Worker:
    """Makes one shard after the other.

    Args:
        owner: names this process's files of a shard.
        tally: counts the work so far: pairs and broken pairs (of first attempts), tokens, shards, `seconds` in the
            captioner, pairs `found` in a journal, and "bad REASON" for refused first attempts.
        changed: is called whenever the tally has changed.
    """

    def __init__(
        self,
        options: Options,
        folder: Folder,
        source: Source,
        captioner: Captioner,
        owner: str,
        tally: Counter[str],
        *,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.options, self.folder, self.source, self.captioner = options, folder, source, captioner
        self.owner, self.tally, self.changed = owner, tally, changed
        self._prompt = options.prompt.fill("")

    def make(self, shard: Shard) -> dict[str, Any]:
        """Write the shard, whose lock the caller holds. Returns its manifest.

        Raises BrokenDataError if too many pairs are broken, and the errors of source and captioner.
        """
        place = self.folder.work(shard.name)
        place.mkdir(parents=True, exist_ok=True)
        made_of = f"{shard.url} {stamp(shard.url)} {shard.first} {shard.stop}"
        with closing(Journal(place, self.owner, made_of)) as journal:
            made = self._captions(shard, journal)
        path = place / f"{self.owner}.tar"
        lines, content, writer = self._write(shard, path, made)
        manifest = {
            "input": {"file": shard.url, "samples": len(shard), "sha256": content.hexdigest()},
            "output": {
                "file": f"{shard.name}.tar", "samples": writer.samples, "bytes": writer.size, "sha256": writer.sha256,
            },
            "captioner": self.captioner.describe(),
            "settings": self.options.settings(),
            **counts(lines, shard.left_out),
        }  # fmt: skip
        publish(self.folder, shard.name, path, (_rejected(line) for line in lines if line.reason), manifest)
        shutil.rmtree(place, ignore_errors=True)  # remaining files disturb nobody
        self.tally["shards"] += 1
        self.changed()
        return manifest

    # ---------------------------------------------------------------------------------------------- captions
    def _captions(self, shard: Shard, journal: Journal) -> dict[int, Caption | Exception]:
        """Sample → its final caption, or the reason why it has none."""
        final = self._attempt(shard, journal, 0, range(shard.first, shard.stop))
        bad = {i: first_reason(made) for i, made in final.items()}
        again = [i for i, reason in bad.items() if reason and reason != BROKEN]
        for i, made in self._attempt(shard, journal, 1, sorted(again)).items():
            before = final[i]
            if isinstance(made, Caption) and (
                not isinstance(before, Caption) or not made.judged.reason or not before.judged.text
            ):
                final[i] = made
        for i, found in final.items():
            if isinstance(found, Caption):
                found.first_reason = bad[i]
        return final

    def _attempt(
        self, shard: Shard, journal: Journal, attempt: int, indices: Sequence[int]
    ) -> dict[int, Caption | Exception]:
        """Make the calls for `indices` that the journal does not have."""
        size = self.captioner.batch_size
        calls = [indices[start : start + size] for start in range(0, len(indices), size)]
        made: dict[int, Caption | Exception] = {}
        for number, samples in enumerate(self._read(shard, calls)):
            outcomes = journal.found(attempt, number, len(samples))
            is_new = outcomes is None
            if outcomes is None:
                begin = time.monotonic()
                outcomes = journal.add(attempt, number, self._call(shard, samples, attempt))
                self.tally["seconds"] += time.monotonic() - begin  # type: ignore[assignment]
            judged = [self._judged(outcome, sample) for outcome, sample in zip(outcomes, samples, strict=True)]
            made |= zip(calls[number], judged, strict=True)
            if is_new:
                self._count(judged, attempt)
            elif not attempt:
                self.tally["found"] += len(outcomes)
            self.changed()
        return made

    def _read(self, shard: Shard, parts: Sequence[Sequence[int]]) -> Iterator[list[Read]]:
        """The samples of each part; a thread reads the next part meanwhile."""
        return ahead(lambda part: read_samples(self.source, shard, part), parts)

    def _judged(self, outcome: Outcome, sample: Read) -> Caption | Exception:
        if isinstance(sample, BrokenSample):
            return sample
        if not isinstance(outcome, Written):
            return outcome
        return Caption(judge(outcome, sample.web, self._prompt, self.options.bounds), outcome.tokens)

    def _call(self, shard: Shard, samples: Sequence[Read], attempt: int) -> list[Outcome]:
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
        tally["tokens"] += sum(caption.tokens for caption in made if isinstance(caption, Caption))
        if attempt:
            return
        reasons = Counter(filter(None, map(first_reason, made)))
        tally["pairs"] += len(made)
        tally["broken"] += reasons[BROKEN]
        tally.update({f"bad {reason}": count for reason, count in reasons.items()})
        if tally["pairs"] >= SURE:
            check_broken(tally["broken"], tally["pairs"], self.options)

    def _is_good(self, caption: Caption) -> bool:
        """An empty caption never is: pretraining would count it as broken."""
        return bool(caption.judged.text) and (not caption.judged.reason or self.options.on_bad == "keep")

    # ---------------------------------------------------------------------------------------------- the file
    def _write(
        self, shard: Shard, path: Path, made: dict[int, Caption | Exception]
    ) -> tuple[list[Line], ContentHash, ShardWriter]:
        """Write the good pairs to `path`. Returns a line for each pair, the hash of the input, and the closed file."""
        lines, content = [], ContentHash()
        chunks = [range(i, min(i + CHUNK, shard.stop)) for i in range(shard.first, shard.stop, CHUNK)]
        with ShardWriter(path) as writer:
            for chunk, samples in zip(chunks, self._read(shard, chunks), strict=True):
                for i, sample in zip(chunk, samples, strict=True):
                    content.add(sample)
                    line, members = self._line(shard, i, sample, made[i])
                    lines.append(line)
                    if members:
                        writer.add(line.key, members)
        return lines, content, writer

    def _line(
        self, shard: Shard, index: int, sample: Read, made: Caption | Exception
    ) -> tuple[Line, list[tuple[str, bytes]]]:
        """The outcome of a pair, and its members of the file."""
        row = index - shard.first
        caption = made if isinstance(made, Caption) else None
        if isinstance(sample, BrokenSample):
            return Line(row, sample.key.removeprefix(f"{shard.url}#"), caption, BROKEN, sample), []
        if caption is None:
            assert isinstance(made, Exception)
            return Line(row, sample.name, None, first_reason(made), made), []
        if not self._is_good(caption):
            return Line(row, sample.name, caption, caption.judged.reason), []
        try:
            members = list(with_caption(sample, caption.judged.text))
        except (ValueError, RecursionError) as error:  # JSON that can be read and not written
            return Line(row, sample.name, caption, BROKEN, error), []
        return Line(row, sample.name, caption, words=(len(words(sample.web)), len(words(caption.judged.text)))), members


def first_reason(made: Caption | Exception) -> str:
    """The reason why an attempt is refused; empty for a good caption."""
    if isinstance(made, Caption):
        return made.judged.reason
    return BROKEN if isinstance(made, BrokenSample) else NOT_CAPTIONED


def counts(lines: Sequence[Line], left_out: int) -> dict[str, Any]:
    """The counts of a manifest; `left_out` is the number of samples that are no pairs."""
    captions = [line.caption for line in lines if line.caption is not None]
    written = [line for line in lines if not line.reason]
    kept = [line.caption for line in written if line.caption is not None]
    lengths = {part: [line.words[i] for line in written] for i, part in enumerate(("web", "long"))}
    binned = {part: Counter(max(e for e in WORD_BINS if e <= n) for n in found) for part, found in lengths.items()}
    return {
        "counts": {
            "pairs": len(lines),
            "left_out": left_out,
            "written": len(written),
            "tokens": sum(caption.tokens for caption in captions),
            "trimmed": sum(caption.judged.trimmed for caption in kept),
            "mended": sum(bool(caption.first_reason) and not caption.judged.reason for caption in kept),
            "kept although bad": sum(bool(caption.judged.reason) for caption in kept),
            **{f"{part} words": sum(found) for part, found in lengths.items()},
        },
        "first_attempts_refused": _sorted(caption.first_reason for caption in captions if caption.first_reason),
        "rejected": _sorted(line.reason for line in lines if line.reason),
        "words": {part: {str(edge): found[edge] for edge in WORD_BINS} for part, found in binned.items()},
    }


def check_broken(broken: int, pairs: int, options: Options) -> None:
    """Raise BrokenDataError if the share of broken pairs is above --max-broken-share."""
    share = broken / max(1, pairs)
    if share > options.max_broken_share:
        raise BrokenDataError(
            f"{broken:,} of {pairs:,} pairs are broken, {share:.1%}: above --max-broken-share "
            f"{options.max_broken_share:g}. {options.output / 'rejected'} lists those of finished shards; the same "
            "command with a larger share goes on"
        )


def ahead(make: Callable[[ItemT], MadeT], items: Iterable[ItemT]) -> Iterator[MadeT]:
    """`make` of each item, in order; a thread makes the next one meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        coming = None
        for item in items:
            following = pool.submit(make, item)
            if coming is not None:
                yield coming.result()
            coming = following
        if coming is not None:
            yield coming.result()


def _rejected(line: Line) -> dict[str, Any]:
    record: dict[str, Any] = {"row": line.row, "key": line.key, "reason": line.reason}
    if line.error is not None:
        said = line.error.reason if isinstance(line.error, BrokenSample) else str(line.error)
        record["error"] = clip(said, LONGEST_REJECTED)
    if line.caption is not None:
        record["caption"] = clip(line.caption.judged.text, LONGEST_REJECTED)
    return record


def _sorted(reasons: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(reasons).items()))
