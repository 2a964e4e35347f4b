"""The pre-flight of a data set, for pairs and for conversations: one scan, one table, one page, one summary.json.

A reader checks samples by index as a training reads them (clips/data/check.py, mllm/training/check_data.py).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from tqdm import tqdm

from clips.common.errors import CommandError
from clips.common.escape import clip, for_rich
from clips.common.files import write_atomically, write_json
from clips.common.page import Card, Cards, Page, Picture, Section, Table, as_html, table_of

CHUNK = 128
"""Samples that a reader checks at once."""
SHOWN = 12
"""Good samples on the page."""
THUMBNAIL = 176
"""Longest side in pixels of a picture on the page."""
LISTED = 1_000
"""Broken samples that summary.json lists."""
PRINTED = 20
"""Reasons and problems that the table and the page list."""


@dataclass
class Sample:
    """A sample that is shown, or that is broken."""

    key: str
    texts: Mapping[str, str] = field(default_factory=dict)
    picture: bytes | None = None
    reason: str = ""


@dataclass
class Findings:
    """The findings in a chunk of samples, or in all of them."""

    checked: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """Why samples are broken → samples."""
    cut: Counter[str] = field(default_factory=Counter)
    """Name of a text → samples of which the model reads only the beginning of it."""
    repeated: Counter[str] = field(default_factory=Counter)
    """Part of a sample → samples in which it is that of an earlier sample."""
    broken: list[Sample] = field(default_factory=list)
    good: list[Sample] = field(default_factory=list)
    hashes: dict[str, list[int]] = field(default_factory=dict)
    """Part of a sample → 64-bit hashes of a chunk."""

    def add_broken(self, sample: Sample, kind: str = "") -> None:
        """Count a broken sample under `kind`, or under its reason without names and numbers."""
        self.reasons[kind or reason_class(sample.reason)] += 1
        self.broken.append(sample)

    def add_part(self, name: str, content: bytes) -> None:
        digest = hashlib.blake2b(content, digest_size=8).digest()
        self.hashes.setdefault(name, []).append(int.from_bytes(digest, "big"))


_NAME = re.compile(r"(['\"]).*?\1|<[^>]*>|\b[a-z]+://\S+|(?<![\w/])/\S+")
_NUMBER = re.compile(r"\d[\d,.]*(?<=\d)")


def reason_class(reason: str) -> str:
    """`reason` without names, paths and numbers of the single sample."""
    return _NUMBER.sub("N", _NAME.sub("…", clip(reason, 300)))


Reader = Callable[[Sequence[int]], Findings]


def scan(reader: Reader, indices: Sequence[int], workers: int = 1) -> Findings:
    """The findings of `reader` in all samples `indices`, in their order, by `workers` processes.

    A million samples take about 100 MB for the hashes of their parts. Raises CommandError if a process died.
    """
    total = Findings()
    seen: dict[str, set[int]] = {}
    chunks = [indices[i : i + CHUNK] for i in range(0, len(indices), CHUNK)]
    with ExitStack() as stack:
        results: Iterable[Findings] = map(reader, chunks)
        if workers > 1:
            # spawned, as in clips/data/shards.py: a forked child may inherit a lock of this one's threads
            pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, (reader,))
            results = stack.enter_context(pool).map(_check, chunks)
        bar = stack.enter_context(tqdm(desc="samples", total=len(indices), unit="", leave=False, disable=None))
        try:
            for chunk in results:
                _add(total, chunk, seen)
                bar.update(chunk.checked)
        except BrokenProcessPool:
            raise CommandError(f"a process died, mostly for want of memory: use fewer than --jobs {workers}") from None
    return total


def _add(total: Findings, chunk: Findings, seen: dict[str, set[int]]) -> None:
    total.checked += chunk.checked
    total.reasons.update(chunk.reasons)
    total.cut.update(chunk.cut)
    total.good += chunk.good
    total.broken += chunk.broken[: LISTED - len(total.broken)]
    for part, digests in chunk.hashes.items():
        known = seen.setdefault(part, set())
        for digest in digests:
            total.repeated[part] += digest in known
            known.add(digest)


_reader: Reader | None = None


def _start(reader: Reader) -> None:
    global _reader
    _reader = reader
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _check(indices: Sequence[int]) -> Findings:
    assert _reader is not None
    return _reader(indices)


def shown(indices: Sequence[int]) -> frozenset[int]:
    """SHOWN of the samples, evenly spread."""
    count = min(SHOWN, len(indices))
    return frozenset(indices[i * len(indices) // count] for i in range(count))


def publish(
    output: Path | str, findings: Findings, *, data: str, samples: int, left_out: int = 0, of_rows: int = 0,
    problems: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Write summary.json and samples.html into `output`, print the table, and return the summary.

    `left_out`: rows that are no samples of the set, and count as broken; `of_rows`, where samples have several rows.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    broken = findings.reasons.total() + left_out
    left_out_share = left_out / max(1, of_rows or samples + left_out)  # of the others a part may be checked
    summary = {
        "data": data,
        "samples": samples,
        "checked": findings.checked,
        "left_out": left_out,
        "broken": broken,
        "broken_share": left_out_share + (1 - left_out_share) * findings.reasons.total() / max(1, findings.checked),
        "reasons": dict(findings.reasons.most_common()),
        "cut": dict(findings.cut),
        "repeated": dict(findings.repeated),
        "problems": list(problems),
        "broken_samples": [{"key": sample.key, "reason": sample.reason} for sample in findings.broken],
    }
    rows = [
        ("samples", f"{samples:,}, of which {findings.checked:,} were checked"),
        ("broken", f"{broken:,} ({summary['broken_share']:.2%})"),
        *([("  left out", f"{left_out:,} rows that do not fit their table's header")] if left_out else []),
        *(("  broken", f"{count:,} × {reason}") for reason, count in findings.reasons.most_common(PRINTED)),
        *((f"cut: {name}", f"{count:,}") for name, count in findings.cut.items()),
        *((f"repeated: {name}", f"{count:,}") for name, count in findings.repeated.items()),
        *(("  problem", clip(problem)) for problem in problems[:PRINTED]),
    ]
    if len(problems) > PRINTED:
        rows.append(("  problem", f"… and {len(problems) - PRINTED:,} more, all in summary.json"))

    write_json(output / "summary.json", summary)
    sections = [Section("Figures", [Table(("", ""), rows, lambda column, text: "wrap")])]
    for title, listed in (("Broken samples", findings.broken[:PRINTED]), ("Samples", findings.good)):
        cards = []
        for sample in listed:
            texts = [(name, text, None) for name, text in sample.texts.items() if text]
            pictures = [Picture(sample.picture)] if sample.picture else []
            cards.append(Card(sample.key, pictures, texts, note=sample.reason))
        if cards:
            sections.append(Section(title, [Cards(cards)]))
    write_atomically(output / "samples.html", as_html(Page("Data before a training", data, sections)))
    console = Console(emoji=False)
    console.print(table_of(data, (), rows))
    for name in ("summary.json", "samples.html"):
        console.print(f"wrote {for_rich(str(output / name))}", highlight=False)
    return summary
