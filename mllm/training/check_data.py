"""The check of a LLaVA data set: records are read, images decoded and conversations tokenised as in training."""

import argparse
import itertools
import json
import shlex
from pathlib import Path

import torch

from clips import BrokenSample, Fields, parse_fields
from clips.common.errors import UserError
from clips.common.escape import printable
from clips.common.live import say_next
from clips.common.paths import unused
from clips.common.preflight import Checked, Found, check, drawn
from clips.common.rundir import newest_vision
from mllm import DEFAULT_LLM
from mllm.data.captions import CaptionStore, open_store, raw_records
from mllm.data.conversation import IGNORE, ConversationEncoder, Encoded
from mllm.data.dataset import BadSample, ImageTokens, RecordReader, bad_sample
from mllm.data.demo import ALIGN
from mllm.data.formats import IMAGE_TOKEN, VIDEO_TOKEN
from mllm.data.images import ImageStore
from mllm.model.llm import find_llm, read_tokenizer, version_for

FRAMES = 8
"""Number of frames that are decoded of each video."""


def check_from_flags(flags: argparse.Namespace) -> None:
    """Run scripts/check_data.py with --conversations. Raises like `check_data`."""
    store = open_store(flags.conversations, flags.image_folder, fields=parse_fields(flags.fields or [], Fields()))
    tokenizer = read_tokenizer(find_llm(flags.language_model)[0])
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN, VIDEO_TOKEN]})
    version = version_for(tokenizer, flags.conv_mode)
    encoder = ConversationEncoder(tokenizer, version, flags.image_tokens, flags.max_length)
    check_data(flags.conversations, encoder, store, flags.limit, flags.jobs)
    captions = Path(flags.conversations).parent / ALIGN
    words = ["--vision", newest_vision(Path("runs")), "--output_dir", str(unused(Path("runs/llava-mine")))]
    words += [] if torch.cuda.is_available() else ["--small"]
    words += [] if flags.language_model == DEFAULT_LLM else ["--model_name_or_path", flags.language_model]
    if isinstance(store, CaptionStore):
        words += ["--data_path", flags.conversations]
    elif version == "plain":
        words += ["--stage", "1", "--data_path", flags.conversations]
    else:  # stage 2 starts from the projector of stage 1
        words += ["--align.data_path", str(captions) if captions.is_file() else "CAPTIONS"]
        words += ["--instruct.data_path", flags.conversations]
    words += ["--image_folder", flags.image_folder] if flags.image_folder else []
    words += ["--fields", *flags.fields] if flags.fields else []
    say_next(f"bash scripts/train_llava.sh {shlex.join(words)}")


def check_data(
    data_path: Path | str,
    encoder: ConversationEncoder,
    store: ImageStore | None,
    limit: int | None = None,
    jobs: int = 1,
) -> Found:
    """Check a data set, or `limit` records of it, against the encoder's format and context, and return the counts.

    Raises UserError (exit 2) at the end if something was found that would stop the training.
    """
    raws = raw_records(data_path, store)
    records = RecordReader(encoder, store, ImageTokens(encoder.num_image_tokens or 0, frames=FRAMES))

    def read(index: int) -> Checked:
        raw = raws[index]
        try:
            record = records.read(raw, index)
            with bad_sample("conversation", raw, index):
                encoded = encoder.encode(record.turns, records.tokens.at_most(record.images), record.name)
            for name in record.images:
                assert store is not None  # else RecordReader refuses images
                try:
                    store.shown(name, FRAMES)
                except (BrokenSample, OSError) as error:
                    raise BadSample(index, record.id, "broken image", f"{record.name}: {error}") from None
        except BadSample as bad:
            return Checked(str(bad), bad.problem["kind"])
        texts = {"sample": json.dumps([record.images, record.turns])}
        shown = f"{record.name}, format {encoder.format.name}: {as_trained(encoder, encoded)}"
        return Checked(shown, texts=texts, cut=["conversation"] * encoded.truncated)

    found = check(read, drawn(len(raws), limit), jobs)
    if found.faults:
        # Training reads pixels late, so that it cannot skip a broken image.
        skip = ", or train with --on_bad_sample skip" if "broken image" not in found.faults else ""
        count = found.faults.total()
        raise UserError(f"{count:,} sample(s) of {data_path} would stop the training: mend or remove them{skip}")
    return found


def as_trained(encoder: ConversationEncoder, encoded: Encoded) -> str:
    """Return the tokens of a sample as text, with ⟦trained⟧ ones in brackets and image tokens counted."""
    pieces = []
    pairs = zip(encoded.input_ids, encoded.labels, strict=True)
    for (is_image, is_trained), run in itertools.groupby(
        pairs, lambda pair: (pair[0] in encoder.placeholder_ids, pair[1] != IGNORE)
    ):
        ids = [token for token, _ in run]
        words = f"[{len(ids)} × {IMAGE_TOKEN}]" if is_image else printable(str(encoder.tokenizer.decode(ids)), None)
        pieces.append(f"⟦{words}⟧" if is_trained else words)
    return "".join(pieces)
