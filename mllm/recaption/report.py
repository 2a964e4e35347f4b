"""The page at the end: pictures with both captions, lengths, refused captions, the command that trains on them."""

from __future__ import annotations

import io
import json
import random
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from rich.console import Console

from clips import Fields, RawSample, decode_image, open_source
from clips.common.errors import BrokenDataError
from clips.common.escape import clip, for_rich
from clips.common.files import placing
from clips.common.page import data_uri, render
from mllm.recaption.manifest import Folder
from mllm.recaption.options import Options
from mllm.recaption.work import WORD_BINS

SHOWN, REJECTED = 24, 12
"""Pictures, and refused captions, on the page."""
THUMBNAIL = 256
NAMES = {
    "cut off": "cut off before the first sentence ended",
    "prompt echo": "repeats the prompt or the web caption",
    "repetition": "comes to no end: the same words again and again",
    "short": "too few words",
    "long": "too many words",
    "script": "in another script",
    "refusal": "a refusal",
    "empty": "nothing",
    "broken": "the pair cannot be read: a broken picture, mostly",
    "not captioned": "the captioner gave an error",
    "dissimilar": "fits its picture less than the others",
}


NOTHING = (
    "no pair was written, so there is nothing to train on. The page shows what the captioner wrote: --prompt, "
    "--max-new-tokens and another --captioner change that, --words, --script and --on-bad what is let through; in "
    "another --output, for this one is done"
)


def write_report(
    options: Options, folder: Folder, names: Sequence[str], manifests: Sequence[dict[str, Any]], console: Console
) -> None:
    """Write the page and print the summary. `names`, `manifests`: of all shards.

    Raises BrokenDataError after the page is written if it shows no pair: a training would find nothing.
    """
    total, first, final = Counter[str](), Counter[str](), Counter[str]()
    words = {"web": Counter[str](), "long": Counter[str]()}
    for manifest in manifests:
        total.update(manifest["counts"])
        first.update(manifest["first_attempts_refused"])
        final.update(manifest["rejected"])
        for part, counts in words.items():
            counts.update(manifest["words"][part])
    command = training_command(folder)
    written = max(1, total["written"])
    mean = {part: total[f"{part} words"] / written for part in words}
    page = render(
        "mllm.recaption",
        "recaption.html.j2",
        title="Recaptioned pairs",
        note=f"{options.data} → {folder.root} · {options.captioner}",
        tiles=[
            (f"{total['written']:,}", "pairs written", f"of {total['pairs']:,}"),
            (f"{mean['web']:.0f} → {mean['long']:.0f}", "words a caption", "web → new, mean"),
            (f"{mean['long'] - mean['web']:+.0f}", "words gained", "over the web caption, mean"),
            (f"{final.total():,}", "left out", f"{final.total() / max(1, total['pairs']):.1%} of the pairs"),
        ],
        rows=_rows(total),
        command=command,
        examples=list(_examples(folder, names, manifests)),
        bars={f"words of {part} captions": _trimmed(counts) for part, counts in words.items() if counts.total()},
        reasons=[
            (NAMES.get(reason, reason), f"{first[reason]:,}", f"{final[reason]:,}")
            for reason in sorted(first.keys() | final.keys(), key=lambda r: (-first[r] - final[r], r))
        ],
        rejected=list(_rejected(folder, names, manifests)),
        captioner=json.dumps(manifests[0]["captioner"], indent=2),
        prompt=options.prompt.template,
    )
    folder.report.parent.mkdir(exist_ok=True)
    with placing(folder.report) as file:
        file.write(page.encode())
    gained = f", {mean['web']:.0f} → {mean['long']:.0f} words a caption" if total["written"] else ""
    said = [f"{total['written']:,} of {total['pairs']:,} pairs written{gained}"]
    if final:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in final.most_common())
        said.append(f"left out: {reasons}; {folder.root / 'rejected'} lists them")
    said.append(f"wrote {folder.report}")
    if total["written"]:
        said += ["Next:", f"  {command}"]
    for line in said:
        console.print(for_rich(line), highlight=False, soft_wrap=True)
    if not total["written"]:
        raise BrokenDataError(NOTHING)


def training_command(folder: Folder) -> str:
    return f"python scripts/pretrain_clips.py --name recaptioned --data {shlex.quote(str(folder.root))}"


def _rows(total: Counter[str]) -> list[tuple[str, str]]:
    return [
        ("pairs", f"{total['pairs']:,}"),
        ("samples without a picture or a web caption", f"{total['left_out']:,}, not counted as pairs"),
        ("refused first, good at the second attempt", f"{total['mended']:,}"),
        ("cut off, and trimmed to whole sentences", f"{total['trimmed']:,}"),
        ("bad and kept all the same (--on-bad keep)", f"{total['kept although bad']:,}"),
        ("tokens written", f"{total['tokens']:,} in the captions that count"),
    ]


def _trimmed(counts: Counter[str]) -> dict[str, int]:
    """Label → count, without the empty bins at both ends."""
    labels = [f"{low} – {high - 1}" for low, high in pairwise(WORD_BINS)]
    binned = dict(zip([*labels, f"{WORD_BINS[-1]} and more"], (counts[str(edge)] for edge in WORD_BINS), strict=True))
    filled = [place for place, count in enumerate(binned.values()) if count]
    return dict(list(binned.items())[filled[0] : filled[-1] + 1])


def _examples(folder: Folder, names: Sequence[str], manifests: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A random draw with a fixed seed."""
    draw = random.Random(0)
    sizes = [manifest["output"]["samples"] for manifest in manifests]
    chosen: Counter[int] = Counter(draw.choices(range(len(sizes)), sizes, k=SHOWN)) if any(sizes) else Counter()
    for shard in sorted(chosen):
        path = folder.shard(names[shard])
        source = open_source(str(path), Fields(), need_long=True)
        for index in sorted(draw.sample(range(len(source)), min(chosen[shard], len(source)))):
            sample = source.read(index)
            yield {
                "key": names[shard] + sample.key.removeprefix(str(path)),
                "picture": data_uri(_thumbnail(sample)),
                "web": sample.web,
                "long": sample.long,
            }


def _thumbnail(sample: RawSample) -> bytes:
    image = decode_image(sample.image, sample.key, reduce_to=16 * THUMBNAIL**2)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def _rejected(folder: Folder, names: Sequence[str], manifests: Sequence[dict[str, Any]]) -> Iterator[dict[str, str]]:
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
                    yield {"key": f"{name}#{record['key']}", "reason": record["reason"], "text": clip(text, 400)}
        if of_reason.total() > 50 * REJECTED:
            return
