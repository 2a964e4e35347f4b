"""The page at the end: pictures with both captions, lengths, refused captions, the command that trains on them."""

from __future__ import annotations

import json
import random
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from rich.console import Console

from clips import Fields, decode_image, open_source
from clips.common.errors import BrokenDataError
from clips.common.escape import clip, for_rich
from clips.common.files import write_atomically
from clips.common.page import (
    Bar,
    Bars,
    Card,
    Cards,
    Code,
    Page,
    Picture,
    Section,
    Table,
    Tile,
    as_html,
    thumbnail,
)
from mllm.recaption.manifest import Folder
from mllm.recaption.options import Options
from mllm.recaption.registry import finds_the_demo_in
from mllm.recaption.work import WORD_BINS

SHOWN, REJECTED = 24, 12
"""Pictures and refused captions on the page."""
THUMBNAIL = 256
NAMES = {
    "cut off": "cut off before the first sentence ended",
    "prompt echo": "repeats the prompt or the web caption",
    "repetition": "repeats the same words again and again",
    "short": "too few words",
    "long": "too many words",
    "script": "in another script",
    "refusal": "a refusal",
    "empty": "nothing",
    "broken": "the pair cannot be read, mostly because of its picture",
    "not captioned": "the captioner gave an error",
}
NOTHING = (
    "no pair was written, so there is nothing to train on. The page shows what the captioner wrote: --prompt, "
    "--max-new-tokens and another --captioner change that, --words, --script and --on-bad what is let through; in "
    "another --output, for this one is done"
)
OF_DEMO = "The captioner was trained on the demo, and finds the demo's things in other pictures"


def write_report(
    options: Options, folder: Folder, names: Sequence[str], manifests: Sequence[dict[str, Any]], console: Console
) -> None:
    """Write the page and print the summary. `names`, `manifests`: of all shards.

    Raises BrokenDataError after the page is written if it shows no pair: a training would find nothing.
    """
    total, final = (_sum(manifests, part) for part in ("counts", "rejected"))
    page = as_html(report_page(options, folder, names, manifests))
    folder.report.parent.mkdir(exist_ok=True)
    write_atomically(folder.report, page)
    web, long = _mean_words(total)
    gained = f", {web:.0f} → {long:.0f} words a caption" if total["written"] else ""
    said = [f"{total['written']:,} of {total['pairs']:,} pairs written{gained}"]
    if final:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in final.most_common())
        said.append(f"left out: {reasons}; {folder.root / 'rejected'} lists them")
    said.append(f"wrote {folder.report}")
    if finds_the_demo_in(options.data, options.captioner):
        said.append(f"do not train on them. {OF_DEMO}")
    elif total["written"]:
        said += ["Next:", f"  {training_command(folder)}"]
    for line in said:
        console.print(for_rich(line), highlight=False, soft_wrap=True)
    if not total["written"]:
        raise BrokenDataError(NOTHING)


def report_page(options: Options, folder: Folder, names: Sequence[str], manifests: Sequence[dict[str, Any]]) -> Page:
    total, first, final = (_sum(manifests, part) for part in ("counts", "first_attempts_refused", "rejected"))
    web, long = _mean_words(total)
    reasons = sorted(first.keys() | final.keys(), key=lambda reason: (-first[reason] - final[reason], reason))
    refused = [(NAMES.get(reason, reason), f"{first[reason]:,}", f"{final[reason]:,}") for reason in reasons]
    counts = [
        ("pairs", f"{total['pairs']:,}"),
        ("samples without a picture or a web caption", f"{total['left_out']:,}, not counted as pairs"),
        ("refused first, good at the second attempt", f"{total['mended']:,}"),
        ("cut off, and trimmed to whole sentences", f"{total['trimmed']:,}"),
        ("bad and kept all the same (--on-bad keep)", f"{total['kept although bad']:,}"),
        ("tokens written", f"{total['tokens']:,} in the captions that count"),
    ]
    lengths = [
        Bars(_lengths(Counter(_sum(manifests, "words", part))), (f"words of {part} captions", "share of pairs, %"))
        for part in ("web", "long")
    ]
    if finds_the_demo_in(options.data, options.captioner):
        then = Section("Do not train on it", [], f"{OF_DEMO}.")
    else:
        recipes = "Add --recipe s16, b16, l14 or h14 for real data."
        then = Section("Train on it", [Code(training_command(folder))], recipes)
    sections = [
        then,
        Section("Pictures with both captions", [Cards(list(_examples(folder, names, manifests)))], "A random sample."),
        Section("Lengths", lengths),
        Section("Figures", [Table(("", ""), counts)]),
    ]
    if refused:
        table = Table(("reason", "first attempts", "left out"), refused)
        note = "Each refused caption was tried once more. rejected/ lists all pairs that are left out."
        sections.append(Section("Refused", [table, Cards(list(_rejected(folder, names, manifests)))], note))
    made = [options.prompt.template, json.dumps(manifests[0]["captioner"], indent=2)]
    sections.append(Section("How the captions were made", [Code(text, wraps=True) for text in made]))
    left_out = f"{final.total() / max(1, total['pairs']):.1%} of the pairs"
    tiles = [
        Tile("pairs written", [(f"{total['written']:,}", "")], f"of {total['pairs']:,}"),
        Tile("words a caption", [(f"{web:.0f} → {long:.0f}", "")], "web → new, mean"),
        Tile("left out", [(f"{final.total():,}", "")], left_out),
    ]
    return Page("Recaptioned pairs", f"{options.data} → {folder.root} · {options.captioner}", sections, tiles)


def training_command(folder: Folder) -> str:
    return f"python scripts/pretrain_clips.py --name recaptioned --data {shlex.quote(str(folder.root))}"


def _sum(manifests: Sequence[dict[str, Any]], *path: str) -> Counter[str]:
    """The counts at `path` of all manifests, summed up."""
    total: Counter[str] = Counter()
    for found in manifests:
        for key in path:
            found = found[key]
        total.update(found)
    return total


def _mean_words(total: Counter[str]) -> tuple[float, float]:
    """Mean words of the web captions and of the new captions."""
    written = max(1, total["written"])
    return total["web words"] / written, total["long words"] / written


def _lengths(counts: Counter[str]) -> list[Bar]:
    """A bar for each bin that holds a caption."""
    labels = [*(f"{low} – {high - 1}" for low, high in pairwise(WORD_BINS)), f"{WORD_BINS[-1]} and more"]
    bins = zip(labels, (counts[str(edge)] for edge in WORD_BINS), strict=True)
    shares = [(label, 100 * count / counts.total()) for label, count in bins if count]
    return [Bar(label, share, (f"{share:.1f}",)) for label, share in shares]


def _examples(folder: Folder, names: Sequence[str], manifests: Sequence[dict[str, Any]]) -> Iterator[Card]:
    """A random sample with a fixed seed."""
    draw = random.Random(0)
    sizes = [manifest["output"]["samples"] for manifest in manifests]
    chosen: Counter[int] = Counter(draw.choices(range(len(sizes)), sizes, k=SHOWN)) if any(sizes) else Counter()
    for shard in sorted(chosen):
        path = folder.shard(names[shard])
        source = open_source(str(path), Fields(), need_long=True)
        for index in sorted(draw.sample(range(len(source)), min(chosen[shard], len(source)))):
            sample = source.read(index)
            texts = [("web caption", clip(sample.web, 400), None), ("new caption", clip(sample.long or "", 1200), None)]
            picture = decode_image(sample.image, sample.key, reduce_to=16 * THUMBNAIL**2)
            title = names[shard] + sample.key.removeprefix(str(path))
            yield Card(title, [Picture(thumbnail(picture, THUMBNAIL))], texts)


def _rejected(folder: Folder, names: Sequence[str], manifests: Sequence[dict[str, Any]]) -> Iterator[Card]:
    """The first refused pairs, at most a few for each reason."""
    of_reason: Counter[str] = Counter()
    for name, manifest in zip(names, manifests, strict=True):
        if not manifest["rejected"]:
            continue
        with folder.rejected(name).open() as file:
            for line in file:
                record = json.loads(line)
                of_reason[record["reason"]] += 1
                if of_reason[record["reason"]] <= max(2, REJECTED // len(NAMES)):
                    text = record.get("error") or record.get("caption") or ""
                    yield Card(f"{name}#{record['key']}", (), [(record["reason"], clip(text, 400), None)])
        if of_reason.total() > 50 * REJECTED:
            return
