"""The pre-flight of pretraining pairs: pictures are decoded and captions tokenised, as a training does."""

from __future__ import annotations

import argparse
import random
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from clips.common.errors import BrokenDataError
from clips.common.live import say_next
from clips.common.page import thumbnail
from clips.common.paths import without_secrets
from clips.common.preflight import THUMBNAIL, Findings, Sample, publish, scan, shown
from clips.config import RunConfig, parse_fields, parse_mix
from clips.data.images import decode_image
from clips.data.sample import BrokenSample, mend_broken
from clips.data.sources import Source
from clips.data.splits import open_split
from clips.data.tokenizer import CaptionTokenizer, build_tokenizer
from clips.recipes import recipe

NAMED = 5
"""Broken samples that the error names."""


class PairReader:
    """Checks pairs by index; each process has one."""

    def __init__(self, source: Source, tokenizer: CaptionTokenizer, run: RunConfig, shown: frozenset[int]) -> None:
        self.source, self.tokenizer, self.shown = source, tokenizer, shown
        captioner = run.model.captioner
        self.room = {
            "web caption": run.model.text.words,
            "long caption": captioner.length - 2 if captioner else run.model.text.words,
        }

    def __call__(self, indices: Sequence[int]) -> Findings:
        findings = Findings(checked=len(indices))
        captions: dict[str, list[str]] = {name: [] for name in self.room}
        for index in indices:
            sample = Sample("")
            try:
                raw = self.source.read(index)
                web, long = raw.texts.draw(random.Random(0))  # one step's; equal samples draw alike, and are counted
                sample = Sample(raw.key, {"web caption": web, "long caption": long or ""})
                image = decode_image(raw.image, raw.key)
            except BrokenSample as error:
                findings.add_broken(replace(sample, key=error.key, reason=error.reason))
                continue

            findings.add_part("picture", raw.image)
            for name, text in sample.texts.items():
                if text:
                    findings.add_part(name, text.encode("utf-8", "surrogatepass"))
                    captions[name].append(text)
            if index in self.shown:
                sample.picture = thumbnail(image, THUMBNAIL)
                findings.good.append(sample)
        for name, texts in captions.items():
            findings.cut[name] += sum(len(ids) > self.room[name] for ids in self.tokenizer.encode(texts))
        return findings


def check_from_flags(flags: argparse.Namespace) -> None:
    """scripts/check_data.py with DATA, --mix or --karpathy. Raises as `check_pairs`."""
    run = recipe(flags.recipe)
    flag, data, splits = ("--data", flags.data, "")
    if flags.karpathy:
        flag, data, splits = ("--karpathy", flags.karpathy, "#train+restval+val+test")
    train = {"train": "mix", "mix": parse_mix(flags.mix)} if flags.mix else {"train": f"{data}{splits}", "mix": ()}
    fields = parse_fields(flags.fields or [], run.data.fields)
    run = replace(run, data=replace(run.data, **train, fields=fields, image_root=flags.image_root))
    check_pairs(run, flags.output, samples=flags.limit, workers=flags.jobs, seed=flags.seed)
    words = [] if flags.recipe == "small" else ["--recipe", flags.recipe]
    words += ["--mix", *flags.mix] if flags.mix else [flag, data]
    words += ["--fields", *flags.fields] if flags.fields else []
    words += ["--image-root", flags.image_root] if flags.image_root else []
    say_next(f"python scripts/pretrain_clips.py --name mine {shlex.join(words)}")


def check_pairs(
    run: RunConfig, output: Path | str, *, samples: int | None = None, workers: int = 1, seed: int = 0
) -> dict[str, Any]:
    """Check `run.data.train` as `run` would read it, publish the report in `output`, and return its summary.

    `samples` limits the check to so many samples, drawn with `seed`. Raises UserError (exit 2) at the first sample that
    would stop a training at once, and at the end BrokenDataError (exit 4) if more than `data.max_broken_share` are
    broken.
    """
    everything = replace(run.data, held_out=0.0)  # those that will validate too
    source = open_split(everything, "train", need_long=run.task.captions)
    indices: Sequence[int] = range(len(source))
    if samples is not None and samples < len(source):
        indices = sorted(random.Random(seed).sample(indices, samples))
    tokenizer = build_tokenizer(run.captions.tokenizer, source.captions(indices), vocab_size=run.model.text.vocab_size)
    findings = scan(PairReader(source, tokenizer, run, shown(indices)), indices, workers)

    data = run.data.train if run.data.train != "mix" else "; ".join(part.data for part in run.data.mix)
    summary = publish(
        output,
        findings,
        data=without_secrets(data),
        samples=len(source),
        left_out=source.unreadable,
        of_rows=source.rows,
        problems=list(map(without_secrets, source.problems)),
    )
    share, limit = summary["broken_share"], run.data.max_broken_share
    if share > limit:
        named = [f"{sample.key}: {sample.reason}" for sample in findings.broken[:NAMED]] or summary["problems"][:NAMED]
        first = "\n  ".join(named)
        raise BrokenDataError(
            f"{summary['broken']:,} of {findings.checked + source.unreadable:,} samples are broken, {share:.1%}: above "
            f"data.max_broken_share = {limit:.1%} a training stops. {Path(output) / 'summary.json'} lists them, and "
            f"the first are\n  {first}\n{mend_broken(share)}"
        )
    return summary
