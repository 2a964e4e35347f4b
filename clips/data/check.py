"""Pre-flight of pretraining pairs: finds before a training what it would skip or stop at, and shows the data.

Samples are read as training reads them (all, or a seeded part), pictures are decoded and captions are tokenised.
Memory does not grow with the set: figures are counts, and duplicates are estimated from a share of the hashes.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import shlex
import unicodedata
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from clips.common.errors import BrokenDataError, CommandError, UserError
from clips.common.escape import clip
from clips.common.live import say_next
from clips.common.page import thumbnail
from clips.common.preflight import THUMBNAIL, Preflight, Shown
from clips.config import RunConfig, parse_fields, parse_mix
from clips.data.images import decode_image
from clips.data.sample import BrokenSample, mend_broken
from clips.data.sentences import split_sentences
from clips.data.sources import Source
from clips.data.splits import open_split
from clips.data.tokenizer import CaptionTokenizer, build_tokenizer
from clips.recipes import recipe

CHUNK = 128
"""Samples that a worker checks at once."""
MOST = 1 << 19
"""Different hashes of each kind that are kept, about 100 MB in all. Above it a share of the hashes is kept."""
SHOWN, SHOWN_BROKEN, OF_A_REASON = 24, 24, 4
"""On the page: good samples, broken samples, and broken samples of one reason."""
CLASSES = 500
"""Reasons that are counted apart; further reasons are counted together."""
SIDES = (0, 32, 64, 128, 224, 336, 512, 1024, 2048)
ASPECTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.34, 2.0, 4.0)
LENGTHS = (0, 8, 16, 32, 64, 80, 128, 256, 512, 1024)
FLAT = 4
"""Grey levels between neighbours that count in a sketch; noise and flat pictures stay below."""
KINDS = {"picture": "pictures, byte by byte", "look": "pictures that look alike", "web": "web captions",
         "long": "long captions"}  # fmt: skip
"""What may repeat."""


# ------------------------------------------------------------------------------------------------ what is counted
class Distinct:
    """Counts repeats by 64-bit hashes; keeps at most `most` different hashes.

    If there are more, only hashes below a bound count, and the bound is halved each time. Every repeat of such a hash
    is counted, so their share estimates the share of all.
    """

    def __init__(self, most: int = MOST) -> None:
        self.most, self.halvings = most, 0
        self.first: dict[int, int] = {}
        self.again: Counter[int] = Counter()

    def add(self, digest: int, index: int) -> None:
        if digest >> (64 - self.halvings):
            return
        if digest in self.first:
            self.again[digest] += 1
            return
        self.first[digest] = index
        while len(self.first) > self.most:
            self.halvings += 1
            self.first = {d: i for d, i in self.first.items() if not d >> (64 - self.halvings)}
            self.again = Counter({d: n for d, n in self.again.items() if d in self.first})

    def summary(self) -> dict[str, float]:
        repeats, looked_at = sum(self.again.values()), len(self.first) + sum(self.again.values())
        return {
            "share": repeats / looked_at if looked_at else 0.0,
            "repeats": repeats,
            "looked_at": looked_at,
            "of_hashes": 2.0**-self.halvings,
        }


@dataclass
class Findings:
    """What was found in a chunk of samples, or in all of them."""

    checked: int = 0
    broken: Counter[str] = field(default_factory=Counter)
    """Reason class → samples."""
    refused: list[str] = field(default_factory=list)
    """Messages of samples that would stop a training at once, such as a path that climbs out."""
    tokens: dict[str, Counter[int]] = field(default_factory=lambda: {"web": Counter(), "long": Counter()})
    scripts: dict[str, Counter[str]] = field(default_factory=lambda: {"web": Counter(), "long": Counter()})
    one_sentence: int = 0
    sides: Counter[int] = field(default_factory=Counter)
    """Index in SIDES of the shorter side → samples."""
    aspects: Counter[int] = field(default_factory=Counter)
    """Index in ASPECTS of width / height → samples."""
    hashes: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    """Kind → (hash, sample)."""
    good: list[Shown] = field(default_factory=list)
    bad: list[Shown] = field(default_factory=list)

    def add(self, other: Findings) -> None:
        """Add the figures of `other`, without its hashes."""
        self.checked += other.checked
        self.one_sentence += other.one_sentence
        for reason, count in other.broken.items():
            self.broken[reason if reason in self.broken or len(self.broken) < CLASSES else "yet another"] += count
        self.refused += other.refused[: SHOWN_BROKEN - len(self.refused)]
        for part in self.tokens:
            self.tokens[part].update(other.tokens[part])
            self.scripts[part].update(other.scripts[part])
        self.sides.update(other.sides)
        self.aspects.update(other.aspects)
        self.good += other.good
        of_reason = Counter(reason_class(shown.reason) for shown in self.bad)
        for shown in other.bad:
            if len(self.bad) < SHOWN_BROKEN and of_reason[reason_class(shown.reason)] < OF_A_REASON:
                of_reason[reason_class(shown.reason)] += 1
                self.bad.append(shown)


_QUOTED = re.compile(r"(['\"]).*?\1|<[^>]*>|\b[a-z]+://\S+|(?<![\w/])/\S+")
_NUMBER = re.compile(r"\d[\d,.]*(?<=\d)")


def reason_class(reason: str) -> str:
    """`reason` without names, paths and numbers of the single sample."""
    return _NUMBER.sub("N", _QUOTED.sub("…", clip(reason, 300)))


@lru_cache(1 << 16)
def _script_of_letter(letter: str) -> str:
    """The first word of the letter's Unicode name; wide and styled forms are normalised first."""
    name = unicodedata.name(unicodedata.normalize("NFKC", letter)[0], "OTHER").split()[0].split("-")[0]
    return {"CJK": "Han"}.get(name, name.title())


def script_of(text: str) -> str:
    """The Unicode script of most letters of `text`; "none" if it has no letter."""
    letters = Counter(filter(str.isalpha, text))
    scripts: Counter[str] = Counter()
    for letter, count in letters.items():
        scripts["Latin" if letter.isascii() else _script_of_letter(letter)] += count
    return scripts.most_common(1)[0][0] if scripts else "none"


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def sketch(image: Image.Image) -> int | None:
    """A hash that resized and re-encoded copies mostly share: where grey rises in 8 × 8 places, and the mean colour.

    None for flat pictures.
    """
    colour = np.asarray(image.resize((1, 1), Image.Resampling.BOX)) // 32
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX)).astype(int)
    rises = np.diff(grey, axis=1) > FLAT
    return _digest(np.packbits(rises).tobytes() + colour.tobytes()) if rises.any() else None


# -------------------------------------------------------------------------------------------------- in the workers
class Checker:
    """Checks samples by index; each worker has one."""

    def __init__(self, source: Source, tokenizer: CaptionTokenizer, run: RunConfig, shown: frozenset[int]) -> None:
        self.source, self.tokenizer, self.run, self.shown = source, tokenizer, run, shown

    def __call__(self, indices: Sequence[int]) -> Findings:
        found = Findings(checked=len(indices))
        texts: dict[str, list[str]] = {"web": [], "long": []}
        for index in indices:
            try:
                sample = self.source.read(index)
            except BrokenSample as error:
                _broken(found, Shown(error.key, reason=error.reason))
                continue
            except UserError as error:
                found.broken["refused: " + reason_class(str(error).partition(": ")[2])] += 1
                found.refused.append(clip(str(error)))
                continue
            for part, text in (("web", sample.web), ("long", sample.long)):
                if text:
                    texts[part].append(text)
                    found.scripts[part][script_of(text)] += 1
                    found.hashes[part].append((_digest(text.encode("utf-8", "surrogatepass")), index))
            if sample.long:
                found.one_sentence += len(split_sentences(sample.long, self.run.captions.splitter)) <= 1
            shown = Shown(sample.key, {"web caption": sample.web, "long caption": sample.long or ""})
            found.hashes["picture"].append((_digest(sample.image), index))
            try:
                image = decode_image(sample.image, sample.key)
            except BrokenSample as error:
                shown.reason = error.reason
                _broken(found, shown)
                continue
            if (look := sketch(image)) is not None:
                found.hashes["look"].append((look, index))
            found.sides[_place(SIDES, min(image.size))] += 1
            found.aspects[_place(ASPECTS, image.width / image.height)] += 1
            if index in self.shown:
                shown.size = f"{image.width} × {image.height}"
                shown.picture = thumbnail(image, THUMBNAIL)
                found.good.append(shown)
        for part, of_part in texts.items():
            found.tokens[part].update(map(len, self.tokenizer.encode(of_part)))
        return found


def _broken(found: Findings, shown: Shown) -> None:
    reason = reason_class(shown.reason)
    found.broken[reason] += 1
    if found.broken[reason] <= OF_A_REASON:
        found.bad.append(shown)


def _place(edges: Sequence[float], value: float) -> int:
    return int(np.searchsorted(edges, value, side="right")) - 1


_checker: Checker | None = None


def _start(checker: Checker) -> None:
    global _checker
    _checker = checker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _check(indices: Sequence[int]) -> Findings:
    assert _checker is not None
    return _checker(indices)


def _results(checker: Checker, chunks: Iterable[Sequence[int]], workers: int) -> Iterator[Findings]:
    """Findings in order; a bounded number of chunks is in flight. CommandError if a worker died."""
    if workers <= 1:
        yield from map(checker, chunks)
        return
    # spawned, as in clips/data/shards.py: a forked child may inherit a lock of this one's threads
    with ProcessPoolExecutor(workers, get_context("spawn"), _start, (checker,)) as pool:
        pending: deque[tuple[Sequence[int], Future[Findings]]] = deque()

        def next_one() -> Findings:
            chunk, future = pending.popleft()
            try:
                return future.result()
            except BrokenProcessPool:
                raise CommandError(
                    f"a worker died at samples {chunk[0]:,} to {chunk[-1]:,} or a little later, most often because "
                    f"memory ran out; use fewer than --jobs {workers}"
                ) from None

        for chunk in chunks:
            pending.append((chunk, pool.submit(_check, chunk)))
            if len(pending) > 4 * workers:
                yield next_one()
        while pending:
            yield next_one()


# ------------------------------------------------------------------------------------------------------ the report
def check_from_flags(flags: argparse.Namespace) -> None:
    """scripts/check_data.py with DATA or --mix. Raises UserError for flags that do not fit, and as check_triples."""
    for name, value in (("--limit", flags.limit), ("--jobs", flags.jobs)):
        if value is not None and value < 1:
            raise UserError(f"{name} {value} must be at least 1")
    run = recipe(flags.recipe)
    train = {"train": "mix", "mix": parse_mix(flags.mix)} if flags.mix else {"train": flags.data, "mix": ()}
    fields = parse_fields(flags.fields or [], run.data.fields)
    run = replace(run, data=replace(run.data, **train, fields=fields, image_root=flags.image_root))
    check_triples(run, flags.output, samples=flags.limit, workers=flags.jobs, seed=flags.seed)
    words = ["--recipe", flags.recipe, *(["--mix", *flags.mix] if flags.mix else ["--data", flags.data])]
    words += ["--fields", *flags.fields] if flags.fields else []
    words += ["--image-root", flags.image_root] if flags.image_root else []
    say_next(f"python scripts/pretrain_clips.py --name mine {shlex.join(words)}")


def check_triples(
    run: RunConfig, output: Path | str, *, samples: int | None = None, workers: int = 1, seed: int = 0
) -> dict[str, Any]:
    """Check `run.data.train` as `run` would read it, publish the report in `output`, and return its summary.

    `samples` limits the check to so many samples, drawn with `seed`. At the end raises UserError (exit 2) if a sample
    would stop a training at once, and BrokenDataError (exit 4) if more than `data.max_broken_share` are broken.
    """
    source = open_split(run.data, "train", need_long=run.task.captions)
    draw = random.Random(seed)
    indices: Sequence[int] = range(len(source))
    if samples is not None and samples < len(source):
        indices = sorted(draw.sample(indices, samples))
    tokenizer = build_tokenizer(run.captions.tokenizer, source.captions(indices), vocab_size=run.model.text.vocab_size)
    shown = frozenset(draw.sample(indices, min(SHOWN, len(indices))))
    found, kinds = Findings(), {kind: Distinct() for kind in KINDS}
    chunks = (indices[i : i + CHUNK] for i in range(0, len(indices), CHUNK))
    with tqdm(desc="samples", total=len(indices), unit="", leave=False, disable=None) as bar:
        for part in _results(Checker(source, tokenizer, run, shown), chunks, workers):
            found.add(part)
            for kind, pairs in part.hashes.items():
                for digest, index in pairs:
                    kinds[kind].add(digest, index)
            bar.update(part.checked)
    summary = _summary(run, source, found, kinds)
    report = _report(run, summary, found, _most_repeated(source, kinds), source)
    report.publish(output)
    if found.refused:
        raise UserError("a training would stop at the first of these samples:\n  " + "\n  ".join(found.refused))
    share, limit = summary["broken_share"], run.data.max_broken_share
    if share > limit:
        first = "\n  ".join(f"{shown.key}: {shown.reason}" for shown in found.bad[:5])
        raise BrokenDataError(
            f"{summary['broken']:,} of {summary['checked'] + source.unreadable:,} samples are broken, {share:.1%}: "
            f"above data.max_broken_share = {limit:.1%} a training stops. {Path(output) / 'contact_sheet.html'} shows "
            f"some, and the first are\n  {first}\n{mend_broken(share)}"
        )
    return summary


def _summary(run: RunConfig, source: Source, found: Findings, kinds: Mapping[str, Distinct]) -> dict[str, Any]:
    long_captions = sum(found.tokens["long"].values())
    room = {"web": run.model.text.words, "long": (run.model.captioner.length - 2) if run.model.captioner else None}
    return {
        "data": run.data.train if run.data.train != "mix" else "; ".join(part.data for part in run.data.mix),
        "samples": len(source),
        "checked": found.checked,
        "left_out": source.unreadable,
        "broken": found.broken.total() + source.unreadable,
        "broken_share": (found.broken.total() + source.unreadable) / max(1, found.checked + source.unreadable),
        "reasons": dict(found.broken.most_common()),
        "problems_of_shards": list(source.problems),
        "tokenizer": run.captions.tokenizer,
        "captions": {part: _lengths(found.tokens[part], room[part]) for part in ("web", "long")},
        "long_with_one_sentence_share": found.one_sentence / long_captions if long_captions else None,
        "scripts": {part: dict(found.scripts[part].most_common()) for part in ("web", "long")},
        "duplicates": {kind: kinds[kind].summary() for kind in KINDS},
        "shorter_side": _binned(SIDES, found.sides),
        "aspect": _binned(ASPECTS, found.aspects),
    }


def _lengths(tokens: Counter[int], room: int | None) -> dict[str, Any]:
    """Statistics of caption lengths in tokens; `room` is what the model reads of a caption."""
    count = tokens.total()
    if not count:
        return {"captions": 0}
    lengths = np.array(sorted(tokens))
    numbers = np.array([tokens[length] for length in lengths])
    reached = np.cumsum(numbers) / count

    bins: Counter[int] = Counter()
    for length, number in tokens.items():
        bins[_place(LENGTHS, length)] += number

    def quantile(q: float) -> int:
        return int(lengths[np.searchsorted(reached, q)])

    return {
        "captions": count,
        "mean": float(lengths @ numbers / count),
        "median": quantile(0.5),
        "95 %": quantile(0.95),
        "longest": int(lengths[-1]),
        "room": room,
        "beyond_room_share": float(numbers[lengths > room].sum() / count) if room is not None else None,
        "histogram": _binned(LENGTHS, bins),
    }


def _binned(edges: Sequence[float], counts: Mapping[int, int]) -> dict[str, int]:
    """Bin, as "from – below", → count; the last bin is open."""
    names = [f"{low:g} – {high:g}" for low, high in pairwise(edges)] + [f"{edges[-1]:g} and more"]
    return {name: counts.get(place, 0) for place, name in enumerate(names)}


def _most_repeated(source: Source, kinds: Mapping[str, Distinct]) -> list[tuple[str, int, str]]:
    """(kind, times, text or key) of what repeats most often."""
    rows = []
    for kind in KINDS:
        for digest, more in kinds[kind].again.most_common(8):
            index = kinds[kind].first[digest]
            try:
                texts = dict(zip(("web", "long"), source.texts(index), strict=True))
                example = texts[kind] if kind in texts else source.read(index).key
            except BrokenSample as error:
                example = error.key
            rows.append((KINDS[kind], more + 1, clip(example or "", 200)))
    return rows


def _rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("samples", f"{summary['samples']:,}, of which {summary['checked']:,} were checked"),
        ("broken", f"{summary['broken']:,} ({summary['broken_share']:.2%})"),
        ("problems of shards", f"{len(summary['problems_of_shards']):,}"),
    ]
    for part, lengths in summary["captions"].items():
        if not lengths["captions"]:
            rows.append((f"{part} captions", "none"))
            continue
        text = f"{lengths['captions']:,}; tokens: mean {lengths['mean']:.0f}, median {lengths['median']}, "
        text += f"95 % up to {lengths['95 %']}, longest {lengths['longest']:,}"
        if lengths["room"] is not None:
            text += f"; {lengths['beyond_room_share']:.1%} beyond the {lengths['room']} that are read"
        rows.append((f"{part} captions", text))
    if summary["long_with_one_sentence_share"] is not None:
        rows.append(("long with one sentence", f"{summary['long_with_one_sentence_share']:.1%}"))
    for part, scripts in summary["scripts"].items():
        if not (total := sum(scripts.values())):
            continue
        shares = [f"{name} {count / total:.1%}" for name, count in list(scripts.items())[:6]]
        rows.append((f"scripts, {part}", ", ".join(shares)))
    for kind, duplicates in summary["duplicates"].items():
        if not duplicates["looked_at"]:
            continue
        share = duplicates["of_hashes"]
        how = "" if share == 1 else f" (estimated from {share:.3%} of the hashes: memory is bounded)"
        rows.append((f"repeated {KINDS[kind]}", f"{duplicates['share']:.2%}{how}"))
    return rows


def _report(
    run: RunConfig, summary: dict[str, Any], found: Findings, repeated: list[tuple[str, int, str]], source: Source
) -> Preflight:
    captions, duplicates = summary["captions"], summary["duplicates"]
    one = summary["long_with_one_sentence_share"]
    tiles = [
        (f"{summary['checked']:,}", "samples checked", f"of {summary['samples']:,}"),
        (f"{summary['broken_share']:.2%}", "broken", f"a training stops above {run.data.max_broken_share:.1%}"),
        (f"{duplicates['picture']['share']:.2%}", "repeated pictures", f"{duplicates['look']['share']:.2%} look alike"),
        (f"{duplicates['web']['share']:.2%}", "repeated web captions", f"long ones: {duplicates['long']['share']:.2%}"),
        ("–" if one is None else f"{one:.1%}", "long with one sentence", "there is nothing to draw from these"),
    ]
    bars = {f"{part} captions, tokens": captions[part]["histogram"] for part in captions if captions[part]["captions"]}
    bars |= {"shorter side, pixels": summary["shorter_side"], "width / height": summary["aspect"]}
    bars |= {f"script of {part} captions": dict(list(summary["scripts"][part].items())[:10]) for part in captions}
    return Preflight(
        title=summary["data"],
        note=f"· tokenizer {summary['tokenizer']}",
        summary=summary,
        rows=_rows(summary),
        broken_note="Training takes a substitute for each, and lists it in skipped.jsonl.",
        tiles=tiles,
        reasons=summary["reasons"],
        problems=source.problems,
        refused=found.refused,
        bars=bars,
        good=found.good,
        bad=found.bad,
        repeated=repeated,
    )
