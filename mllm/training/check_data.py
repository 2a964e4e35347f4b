"""The pre-flight of a LLaVA data set: records are read, pictures decoded and conversations tokenised as in training."""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clips import BrokenSample, Fields, parse_fields
from clips.common.errors import UserError
from clips.common.escape import printable
from clips.common.live import say_next
from clips.common.page import thumbnail
from clips.common.preflight import THUMBNAIL, Findings, Sample, publish, scan, shown
from mllm.data.captions import CaptionStore, open_store, raw_records
from mllm.data.conversation import IGNORE, ConversationEncoder
from mllm.data.dataset import BadSample, ImageTokens, Record, RecordReader, bad_sample
from mllm.data.formats import IMAGE_TOKEN, VIDEO_TOKEN
from mllm.data.images import ImageStore
from mllm.model.llm import find_llm, read_tokenizer, version_for

FRAMES = 8
"""Frames of each video that are decoded."""


class ConversationReader:
    """Checks raw records by index; each process has one."""

    def __init__(
        self, raws: Sequence[Any], encoder: ConversationEncoder, store: ImageStore | None, shown: frozenset[int]
    ) -> None:
        self.raws, self.encoder, self.store, self.shown = raws, encoder, store, shown
        self.records = RecordReader(encoder, store, ImageTokens(encoder.num_image_tokens or 0, frames=FRAMES))

    def __call__(self, indices: Sequence[int]) -> Findings:
        findings = Findings(checked=len(indices))
        for index in indices:
            raw = self.raws[index]
            try:
                record = self.records.read(raw, index)
                tokens = self.records.tokens.at_most(record.images)
                with bad_sample("conversation", raw, index):
                    findings.cut["conversation"] += self.encoder.encode(record.turns, tokens, record.name).truncated
                for name in record.images:
                    assert self.store is not None  # else RecordReader refuses pictures
                    try:
                        self.store.shown(name, FRAMES)
                    except (BrokenSample, OSError) as error:
                        raise BadSample(index, record.id, "broken image", f"{record.name}: {error}") from None
            except BadSample as bad:
                findings.add_broken(Sample(f"sample {index}", reason=str(bad)), bad.problem["kind"])
                continue

            findings.add_part("sample", json.dumps([record.images, record.turns]).encode())
            if index in self.shown:
                sample = Sample(record.name, {"as the model sees it": as_the_model_sees(self.encoder, record)})
                if record.images and self.store is not None:
                    sample.picture = thumbnail(self.store.load(record.images[0]), THUMBNAIL)
                findings.good.append(sample)
        return findings


def as_the_model_sees(encoder: ConversationEncoder, record: Record) -> str:
    """The sample's tokens as text: ⟦trained⟧ ones in brackets, images counted."""
    tokens = ImageTokens(encoder.num_image_tokens or 0, frames=FRAMES).at_most(record.images)
    encoded = encoder.encode(record.turns, tokens, record.name)

    def kind(pair: tuple[int, int]) -> str:
        return "image" if pair[0] in encoder.placeholder_ids else "trained" if pair[1] != IGNORE else "masked"

    pieces = []
    for name, pairs in itertools.groupby(zip(encoded.input_ids, encoded.labels, strict=True), kind):
        ids = [token for token, _ in pairs]
        words = printable(str(encoder.tokenizer.decode(ids)), None)
        text = f"[{len(ids)} × {IMAGE_TOKEN}]" if name == "image" else words
        pieces.append(f"⟦{text}⟧" if name == "trained" else text)
    return "".join(pieces)


def check_from_flags(flags: argparse.Namespace) -> None:
    """scripts/check_data.py with --conversations. Raises as `check_data`."""
    store = open_store(flags.conversations, flags.image_folder, fields=parse_fields(flags.fields or [], Fields()))
    tokenizer = read_tokenizer(find_llm(flags.language_model)[0])
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN, VIDEO_TOKEN]})
    version = version_for(tokenizer, flags.conv_mode)
    encoder = ConversationEncoder(tokenizer, version, flags.image_tokens, flags.max_length)
    drawn = {"samples": flags.limit, "workers": flags.jobs, "seed": flags.seed}
    check_data(flags.conversations, encoder, store, flags.output, **drawn)
    words = [] if isinstance(store, CaptionStore) else ["--stage", "1" if version == "plain" else "2"]
    words += ["--data_path", flags.conversations]
    words += ["--image_folder", flags.image_folder] if flags.image_folder else []
    words += ["--fields", *flags.fields] if flags.fields else []
    print("nothing found that would stop a training")
    say_next(f"bash scripts/train_llava.sh --vision clips {shlex.join(words)}")


def check_data(
    data_path: Path | str,
    encoder: ConversationEncoder,
    store: ImageStore | None,
    output: Path | str,
    *,
    samples: int | None = None,
    workers: int = 1,
    seed: int = 0,
) -> Findings:
    """Check a data set against the encoder's format and context, publish the report in `output`; returns the findings.

    `samples` limits the check to so many records, drawn with `seed`. Raises UserError (exit 2) at the end if something
    was found that would stop the training.
    """
    raws = raw_records(data_path, store)
    indices: Sequence[int] = range(len(raws))
    if samples is not None and samples < len(raws):
        indices = sorted(random.Random(seed).sample(indices, samples))
    findings = scan(ConversationReader(raws, encoder, store, shown(indices)), indices, workers)
    left_out = store.unreadable if store is not None else 0
    publish(output, findings, data=f"{data_path} (format {encoder.format.name})", samples=len(raws), left_out=left_out)
    if findings.reasons:
        skip = ", or train with --on_bad_sample skip" if set(findings.reasons) != {"broken image"} else ""
        raise UserError(
            f"{findings.reasons.total():,} sample(s) of {data_path} would stop the training; "
            f"{Path(output) / 'summary.json'} lists them: mend or remove them{skip}"
        )
    return findings
