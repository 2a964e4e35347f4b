"""The check of pretraining pairs: images are decoded and captions tokenised, as a training does."""

import argparse
import hashlib
import random
import shlex
from dataclasses import replace
from pathlib import Path

from clips.common.errors import BrokenDataError
from clips.common.live import say_next
from clips.common.paths import unused, without_secrets
from clips.common.preflight import Checked, Found, check, drawn
from clips.config import RunConfig, parse_fields, parse_mix
from clips.data.images import decode_image
from clips.data.sample import BrokenSample, mend_broken
from clips.data.splits import open_split
from clips.data.tokenizer import build_tokenizer
from clips.recipes import recipe

SHOWN = 10
"""Skipped rows of each file that are printed; the manifest has more."""


def check_from_flags(flags: argparse.Namespace) -> None:
    """Run scripts/check_data.py with DATA, --mix or --karpathy. Raises the errors of `check_pairs`."""
    run = recipe(flags.recipe)
    flag, data, splits = ("--data", flags.data, "")
    if flags.karpathy:
        flag, data, splits = ("--karpathy", flags.karpathy, "#train+restval+val+test")
    train = {"train": "mix", "mix": parse_mix(flags.mix)} if flags.mix else {"train": f"{data}{splits}", "mix": ()}
    fields = parse_fields(flags.fields or [], run.data.fields)
    run = replace(run, data=replace(run.data, **train, fields=fields, image_root=flags.image_root))
    check_pairs(run, flags.limit, flags.jobs)
    words = [] if flags.recipe == "small" else ["--recipe", flags.recipe]
    words += ["--mix", *flags.mix] if flags.mix else [flag, data]
    words += ["--fields", *flags.fields] if flags.fields else []
    words += ["--image-root", flags.image_root] if flags.image_root else []
    name = unused(Path("runs/mine")).name
    say_next(f"python scripts/pretrain_clips.py --name {name} {shlex.join(words)}")


def check_pairs(run: RunConfig, limit: int | None = None, jobs: int = 1) -> Found:
    """Read `run.data.train`, or `limit` samples of it, as `run` would, print the faults, and return their counts.

    `jobs` is the number of processes. Raises UserError (exit 2) at the first sample that would stop a training at once,
    and at the end BrokenDataError (exit 4) if more than `data.max_broken_share` are broken.
    """
    everything = replace(run.data, held_out=0.0)  # also the images that will validate
    dataset = open_split(everything, "train", need_long=run.task.captions)
    indices = drawn(len(dataset), limit)
    texts_of_all = dataset.all_captions(indices)
    tokenizer = build_tokenizer(run.captions.tokenizer, texts_of_all, vocab_size=run.model.text.vocab_size)
    captioner = run.model.captioner
    room = {"web caption": run.model.text.words}
    if captioner:  # without one, a step reads a sentence of the long caption
        room["long caption"] = captioner.length - 2

    def read(index: int) -> Checked:
        try:
            raw = dataset.read(index)
            decode_image(raw.image, raw.key)
        except BrokenSample as error:
            return Checked(str(error), "missing image" if dataset.missing(index) else error.reason.partition(":")[0])
        pair = zip(("web caption", "long caption"), raw.texts.draw(random.Random(0)), strict=True)
        texts = {name: text for name, text in pair if text}  # of one step; equal samples draw alike
        tokens = zip(texts, tokenizer.encode([*texts.values()]), strict=True)
        cut = [name for name, ids in tokens if len(ids) > room.get(name, len(ids))]
        seen = texts | {"image": hashlib.sha256(raw.image).hexdigest()}  # also one of another name in a table of paths
        return Checked(f"{raw.key}: {texts}", texts=seen, cut=cut)

    skipped, rows = dataset.skipped
    for part in dataset.parts:
        for key, why in part.facts["examples"][:SHOWN]:
            print(without_secrets(f"skipped: {part.url}#{key}: {why}"))
    found = check(read, indices, jobs)
    unfit = skipped / max(1, rows)  # of all rows; of the samples only a part may be checked
    share = unfit + (1 - unfit) * found.faults.total() / max(1, found.checked)
    most = run.data.max_broken_share
    if share > most:
        broken = found.faults.total() + skipped
        what = f"{broken:,} of {found.checked + skipped:,} samples are broken, {share:.1%}"
        raise BrokenDataError(f"{what}: above data.max_broken_share = {most:.1%} training stops. {mend_broken(share)}")
    return found
