"""Pre-flight of a LLaVA data set: finds before a training what would stop it, and shows what is learned.

Every record is read, every picture is looked for and decoded, and every conversation is tokenised as in training.
"""

from __future__ import annotations

import argparse
import shlex
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from clips import BrokenSample
from clips.common.errors import UserError
from clips.common.escape import clip, one_line, visible
from clips.common.live import say_next
from clips.common.page import thumbnail
from clips.common.preflight import THUMBNAIL, Preflight, Shown
from mllm import DEFAULT_LLM
from mllm.data.captions import CaptionStore, open_store, raw_records
from mllm.data.conversation import IGNORE, ROLES, ConversationEncoder, Encoded
from mllm.data.dataset import BadSample, ImageTokens, Problem, Record, RecordReader, sample_id_of
from mllm.data.formats import IMAGE_TOKEN, VIDEO_TOKEN
from mllm.data.images import ImageStore
from mllm.model.llm import find_llm, read_tokenizer, version_for

BINS = 8
"""Bars of the length histogram up to the context; a last bar counts longer samples."""
FRAMES = 8
"""Frames of each video that are decoded."""
SHOWN = 24
"""Samples on the page."""


@dataclass
class DataReport:
    """What `inspect_data` found; the content of summary.json."""

    data_path: str
    format: str
    context: int
    num_image_tokens: int
    samples: int = 0
    text_only: int = 0
    several_images: int = 0
    images: int = 0
    images_decoded: int = 0
    questions: int = 0
    answers: int = 0
    truncated: int = 0
    typed_image_words: int = 0
    """Samples whose text spells `<image>` where it is no placeholder; it stays text."""
    tokens: int = 0
    trained_tokens: int = 0
    length_mean: float = 0.0
    length_max: int = 0
    histogram: dict[str, int] = field(default_factory=dict)
    """"from – to" in tokens → samples; the last bin is beyond the context."""
    problems: list[Problem] = field(default_factory=list)

    def count(self, kind: str) -> int:
        return sum(problem.kind == kind for problem in self.problems)


def load_tokenizer(name: str = DEFAULT_LLM) -> PreTrainedTokenizerBase:
    """The tokenizer of language model `name` with `<image>` added, without loading the model's weights."""
    tokenizer = read_tokenizer(find_llm(name)[0])
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN, VIDEO_TOKEN]})
    return tokenizer


def inspect_data(
    data_path: Path | str, encoder: ConversationEncoder, store: ImageStore | None, *, decode_limit: int | None = None
) -> tuple[DataReport, list[Record]]:
    """Check a whole data set against the encoder's format and context; returns the report and the good records.

    `decode_limit` bounds how many pictures are decoded, evenly spread (None: all); missing pictures are always found.
    Raises UserError only if the file itself cannot be read.
    """
    context, tokens = encoder.max_length, encoder.num_image_tokens
    if context is None or tokens is None:
        raise ValueError("the encoder needs a max_length to check lengths against, and the tokens of an image")
    whole = ConversationEncoder(encoder.tokenizer, encoder.format.name, tokens)
    raws = raw_records(data_path, store)
    report = DataReport(str(data_path), encoder.format.name, context, tokens, len(raws))
    reader = RecordReader(encoder, store, ImageTokens(tokens, frames=FRAMES))
    lengths: list[int] = []
    good: list[Record] = []
    for index, raw in enumerate(tqdm(raws, "conversations", unit="", leave=False, disable=None)):
        try:
            record = reader.read(raw, index)
            shown = reader.tokens.at_most(record.images)
            encoded = whole.encode(record.turns, shown, record.name)
            lengths.append(len(encoded.input_ids))
            if lengths[-1] > context:
                report.truncated += 1
                encoded = encoder.encode(record.turns, shown, record.name)
        except BadSample as bad:
            report.problems.append(bad.problem)
            continue
        except UserError as error:  # seen only by tokenising it
            report.problems.append(Problem(index, sample_id_of(raw, index), "conversation", str(error)))
            continue
        good.append(record)
        _count(report, record, encoded)
    _check_images(report, good, store, decode_limit)
    if lengths:
        report.length_mean, report.length_max = float(np.mean(lengths)), max(lengths)
        edges = np.linspace(0, max(min(context, max(lengths)), BINS), BINS + 1).astype(int).tolist()
        report.histogram = {
            f"{low + 1:,} – {high:,}": sum(low < length <= high for length in lengths) for low, high in pairwise(edges)
        }
        report.histogram[f"over {context:,}"] = sum(length > context for length in lengths)
    return report, good


def _count(report: DataReport, record: Record, encoded: Encoded) -> None:
    roles = [ROLES[turn["from"]] for turn in record.turns]
    report.questions += roles.count("human")
    report.answers += roles.count("gpt")
    report.text_only += not record.images
    report.several_images += len(record.images) > 1
    spelled = sum(turn["value"].count(IMAGE_TOKEN) for turn in record.turns if isinstance(turn["value"], str))
    report.typed_image_words += spelled > len(record.images)
    report.tokens += len(encoded.input_ids)
    report.trained_tokens += sum(label != IGNORE for label in encoded.labels)


def _check_images(
    report: DataReport, records: list[Record], store: ImageStore | None, decode_limit: int | None
) -> None:
    users: dict[str, Record] = {}
    for record in records:
        for name in record.images:
            users.setdefault(name, record)
    report.images = len(users)
    present = list(users)
    if decode_limit is not None and decode_limit < len(present):
        present = [present[i] for i in np.linspace(0, len(present) - 1, decode_limit).astype(int)]
    report.images_decoded = len(present)
    if store is None:
        return

    def decode(name: str) -> str | None:
        try:
            store.shown(name, FRAMES)
        except (BrokenSample, OSError) as error:
            return str(error)
        return None

    # Threads, since the decoders release the interpreter; a tar's file position is shared, so it has one thread.
    has_tars = isinstance(store, CaptionStore) or store.location.is_file()
    with ThreadPoolExecutor(1 if has_tars else 4) as pool:
        reasons = tqdm(pool.map(decode, present), "pictures", len(present), unit="", leave=False, disable=None)
        for name, reason in zip(present, reasons, strict=True):
            if reason:
                record = users[name]
                report.problems.append(Problem(record.index, record.id, "broken image", f"{record.name}: {reason}"))


def render_example(encoder: ConversationEncoder, record: Record) -> Text:
    """The sample's tokens as the model sees them: trained ones bold green, the others dim, images counted."""
    tokens = ImageTokens(encoder.num_image_tokens or 0, frames=FRAMES).at_most(record.images)
    encoded = encoder.encode(record.turns, tokens, record.name)
    text = Text()
    runs: list[tuple[str, list[int]]] = []
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        style = "magenta" if token in encoder.placeholder_ids else "bold green" if label != IGNORE else "dim"
        if not runs or runs[-1][0] != style:
            runs.append((style, []))
        runs[-1][1].append(token)
    for style, ids in runs:
        shown = f"[{len(ids)} × {IMAGE_TOKEN}]" if style == "magenta" else visible(str(encoder.tokenizer.decode(ids)))
        text.append(shown, style=style)
    return text


def _rows(report: DataReport) -> list[tuple[str, str]]:
    share = report.trained_tokens / report.tokens if report.tokens else 0.0
    kinds = f"{report.text_only:,} text-only, {report.several_images:,} with several images"
    return [
        ("format", f"format {report.format}"),
        ("samples", f"{report.samples:,} ({kinds})"),
        ("images", f"{report.images:,} different, {report.images_decoded:,} decoded"),
        ("turns", f"{report.questions:,} questions, {report.answers:,} answers"),
        ("tokens", f"{report.tokens:,}, of which {share:.1%} are trained"),
        ("length", f"mean {report.length_mean:.0f}, longest {report.length_max:,}, context {report.context:,}"),
        ("truncated samples", f"{report.truncated:,}"),
        (f"{IMAGE_TOKEN} typed as text", f"{report.typed_image_words:,} samples"),
    ]


def _shown(store: ImageStore | None, records: list[Record]) -> list[Shown]:
    """Good samples spread over the set, each with its first picture and its last question and answer."""
    found = []
    for place in np.linspace(0, len(records) - 1, min(SHOWN, len(records))).astype(int):
        record = records[place]
        texts = {turn["from"]: one_line(str(turn["value"])) for turn in record.turns}
        shown = Shown(record.name, texts)
        if record.images and store is not None:
            try:
                shown.picture = thumbnail(store.load(record.images[0]), THUMBNAIL)
            except BrokenSample as broken:
                shown.reason = broken.reason
        found.append(shown)
    return found


def check_from_flags(flags: argparse.Namespace) -> None:
    """scripts/check_data.py with --conversations. Raises as `check_data`."""
    store = open_store(flags.conversations, flags.image_folder)
    tokenizer = load_tokenizer(flags.language_model)
    version = version_for(tokenizer, flags.conv_mode)
    encoder = ConversationEncoder(tokenizer, version, flags.image_tokens, flags.max_length)
    check_data(flags.conversations, encoder, store, flags.output, decode_limit=flags.limit)
    stage = "1" if version == "plain" or isinstance(store, CaptionStore) else "2"
    words = ["--stage", stage, "--data_path", flags.conversations]
    words += ["--image_folder", flags.image_folder] if flags.image_folder else []
    print("nothing found that would stop a training")
    say_next(f"bash scripts/train_llava.sh --vision clips {shlex.join(words)}")


def check_data(
    data_path: Path | str,
    encoder: ConversationEncoder,
    store: ImageStore | None,
    output: Path | str,
    *,
    decode_limit: int | None = None,
) -> DataReport:
    """Inspect a data set, publish the report in `output`, and return it.

    Raises UserError (exit 2) at the end if something was found that would stop the training.
    """
    report, records = inspect_data(data_path, encoder, store, decode_limit=decode_limit)
    Preflight(
        title=str(data_path),
        summary=asdict(report),
        rows=_rows(report),
        broken_note="A training stops at them, or leaves them out with --on_bad_sample skip.",
        reasons=Counter(problem.kind for problem in report.problems),
        problems=[one_line(clip(f"{problem.kind}: {problem.message}")) for problem in report.problems],
        bars={"tokens of a sample": report.histogram},
        good=_shown(store, records),
    ).publish(output)
    if records:
        console = Console(emoji=False)
        console.print("\nAn example as the model sees it ([bold green]trained[/], [dim]masked[/], [magenta]image[/]):")
        console.print(render_example(encoder, max(records[:50], key=lambda record: min(len(record.turns), 6))))
    if report.problems:
        skippable = "" if report.count("broken image") else ", or train with --on_bad_sample skip"
        raise UserError(
            f"{len(report.problems):,} problem(s) in {data_path} would stop the training; all are listed in "
            f"{Path(output) / 'summary.json'}: mend or remove these samples{skippable}"
        )
    return report
