"""Pre-flight of a LLaVA data set: what would stop a training is found before it, and a look at what is learned.

Reads every record, looks for every picture, decodes them, and tokenises every conversation as the training would.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from clips import BrokenSample
from clips.common.errors import UserError
from clips.common.escape import clip, for_rich, one_line, visible
from clips.common.files import write_json
from mllm import DEFAULT_LLM
from mllm.data.conversation import IGNORE, ROLES, ConversationEncoder, Encoded
from mllm.data.dataset import BadSample, Problem, Record, RecordReader, sample_id_of
from mllm.data.formats import IMAGE_TOKEN
from mllm.data.images import ImageStore
from mllm.data.records import read_json_records
from mllm.model.llm import find_llm, read_tokenizer, version_for

BINS = 8
"""Bars of the length histogram up to the context; a last one counts what is longer."""
SHOWN_PROBLEMS = 20
SHEET = (6, 4)
"""Columns and rows of the contact sheet."""
CELL, CAPTION = 160, 34
"""Side of a picture on the sheet, and height of the text under it, in pixels."""


@dataclass
class DataReport:
    """What `inspect_data` found. `histogram`: [from, to, samples] with from < tokens ≤ to (null: no end)."""

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
    histogram: list[tuple[int, int | None, int]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def count(self, kind: str) -> int:
        return sum(problem.kind == kind for problem in self.problems)


def load_tokenizer(name: str = DEFAULT_LLM) -> PreTrainedTokenizerBase:
    """The tokenizer of language model `name` with `<image>` added, without loading the model's weights."""
    tokenizer = read_tokenizer(find_llm(name)[0])
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    return tokenizer


def inspect_data(
    data_path: Path | str, encoder: ConversationEncoder, store: ImageStore | None, *, decode_limit: int | None = None
) -> tuple[DataReport, list[Record]]:
    """Check a whole data set against the encoder's format and context; returns the report and the good records.

    `decode_limit` bounds how many pictures are decoded, evenly spread (None: all); missing ones are always found.
    Raises UserError only where the file itself cannot be read.
    """
    context = encoder.max_length
    if context is None:
        raise ValueError("the encoder needs a max_length to check lengths against")
    whole = ConversationEncoder(encoder.tokenizer, encoder.format.name, encoder.num_image_tokens)
    raw_records = read_json_records(Path(data_path))
    report = DataReport(str(data_path), encoder.format.name, context, encoder.num_image_tokens, len(raw_records))
    reader = RecordReader(encoder, store)
    lengths: list[int] = []
    good: list[Record] = []
    for index, raw in enumerate(track(raw_records, "conversations", transient=True)):
        try:
            record = reader.read(raw, index)
            encoded = whole.encode(record.turns, len(record.images), record.name)
            lengths.append(len(encoded.input_ids))
            if lengths[-1] > context:
                report.truncated += 1
                encoded = encoder.encode(record.turns, len(record.images), record.name)
        except BadSample as bad:
            report.problems.append(bad.problem)
            continue
        except UserError as error:  # seen only by tokenising it
            report.problems.append(Problem(index, sample_id_of(raw, index), "conversation", str(error)))
            continue
        good.append(record)
        _count(report, record, encoded, encoder.image_id)
    _check_images(report, good, store, decode_limit)
    if lengths:
        report.length_mean, report.length_max = float(np.mean(lengths)), max(lengths)
        edges = np.linspace(0, max(min(context, max(lengths)), BINS), BINS + 1).astype(int).tolist()
        report.histogram = [
            (low, high, sum(low < length <= high for length in lengths)) for low, high in pairwise(edges)
        ]
        report.histogram.append((context, None, sum(length > context for length in lengths)))
    return report, good


def _count(report: DataReport, record: Record, encoded: Encoded, image_id: int) -> None:
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
            store.load(name)
        except (BrokenSample, OSError) as error:
            return str(error)
        return None

    # Threads, since the decoders release the interpreter; a tar's file position is shared, so there one at a time.
    workers = 1 if store.location.is_file() else 4
    with ThreadPoolExecutor(workers) as pool:
        reasons = track(pool.map(decode, present), "pictures", total=len(present), transient=True)
        for name, reason in zip(present, reasons, strict=True):
            if reason:
                record = users[name]
                report.problems.append(Problem(record.index, record.id, "broken image", f"{record.name}: {reason}"))


def render_example(encoder: ConversationEncoder, record: Record) -> Text:
    """The sample's tokens as the model sees them; what is trained is bold green, images are counted."""
    encoded = encoder.encode(record.turns, len(record.images), record.name)
    text = Text()
    runs: list[tuple[str, list[int]]] = []
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        style = "magenta" if token == encoder.image_id else "bold green" if label != IGNORE else "dim"
        if not runs or runs[-1][0] != style:
            runs.append((style, []))
        runs[-1][1].append(token)
    for style, ids in runs:
        shown = f"[{len(ids)} × {IMAGE_TOKEN}]" if style == "magenta" else visible(str(encoder.tokenizer.decode(ids)))
        text.append(shown, style=style)
    return text


def contact_sheet(store: ImageStore, records: Iterable[Record], path: Path) -> int:
    """Write a PNG of pictures spread over the set, each with its last answer; returns how many are on it."""
    records = [record for record in records if record.images and store.problem(record.images[0]) is None]
    columns, rows = SHEET
    count = min(columns * rows, len(records))
    if count == 0:
        return 0
    sheet = Image.new("RGB", (columns * CELL, -(-count // columns) * (CELL + CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for cell, position in enumerate(np.linspace(0, len(records) - 1, count).astype(int)):
        record = records[position]
        left, top = cell % columns * CELL, cell // columns * (CELL + CAPTION)
        try:
            picture = store.load(record.images[0])
        except BrokenSample:
            picture = Image.new("RGB", (CELL, CELL), "red")  # listed among the problems
        picture = ImageOps.contain(picture, (CELL - 4, CELL - 4))
        sheet.paste(picture, (left + (CELL - picture.width) // 2, top + (CELL - picture.height) // 2))
        answer = next((turn["value"] for turn in reversed(record.turns) if ROLES[turn["from"]] == "gpt"), "")
        words = " ".join(clip(str(answer)).split())
        draw.text((left + 4, top + CELL), f"{one_line(record.id[:24])}\n{one_line(words[:26])}", fill="black")
    sheet.save(path)
    return count


def print_report(report: DataReport, example: Text | None, console: Console) -> None:
    table = Table(title=for_rich(f"{report.data_path} · format {report.format}"), show_header=False)
    share = report.trained_tokens / report.tokens if report.tokens else 0.0
    rows: list[tuple[str, Any]] = [
        (
            "samples",
            f"{report.samples:,} ({report.text_only:,} text-only, {report.several_images:,} with several images)",
        ),
        ("images", f"{report.images:,} different, {report.images_decoded:,} decoded"),
        ("missing / broken images", f"{report.count('missing image'):,} / {report.count('broken image'):,}"),
        ("turns", f"{report.questions:,} questions, {report.answers:,} answers"),
        ("tokens", f"{report.tokens:,}, of which {share:.1%} are trained"),
        ("length", f"mean {report.length_mean:.0f}, longest {report.length_max:,}, context {report.context:,}"),
        ("truncated samples", f"{report.truncated:,}"),
        ("bad records / conversations", f"{report.count('record'):,} / {report.count('conversation'):,}"),
        (f"{IMAGE_TOKEN} typed as text", f"{report.typed_image_words:,} samples"),
    ]
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)
    most = max((count for *_, count in report.histogram), default=0)
    for low, high, count in report.histogram:
        label = f"{low + 1:>6,} – {high:,}" if high is not None else f"over {low:,}"
        console.print(f"{label:>17} tokens {count:>9,} {'█' * round(40 * count / max(most, 1))}", highlight=False)
    if example is not None:
        console.print("\nAn example as the model sees it ([bold green]trained[/], [dim]masked[/], [magenta]image[/]):")
        console.print(example)
    for problem in report.problems[:SHOWN_PROBLEMS]:
        console.print(Text(one_line(clip(f"{problem.kind}: {problem.message}")), style="red"))
    if len(report.problems) > SHOWN_PROBLEMS:
        console.print(f"… and {len(report.problems) - SHOWN_PROBLEMS:,} more, all in the summary", style="red")


def check_from_flags(flags: argparse.Namespace) -> None:
    """What scripts/check_data.py does with --data_path. Raises as `check_data`."""
    store = ImageStore(flags.image_folder) if flags.image_folder else None
    tokenizer = load_tokenizer(flags.model_name_or_path)
    version = version_for(tokenizer, flags.version)
    encoder = ConversationEncoder(tokenizer, version, flags.num_image_tokens, flags.model_max_length)
    check_data(flags.data_path, encoder, store, flags.output, decode_limit=flags.decode_limit)
    print("nothing found that would stop a training. Next: bash scripts/train_llava.sh --vision clips")


def check_data(
    data_path: Path | str,
    encoder: ConversationEncoder,
    store: ImageStore | None,
    output: Path | str,
    *,
    decode_limit: int | None = None,
    console: Console | None = None,
) -> DataReport:
    """Inspect, print, and write `summary.json` and `contact_sheet.png` into `output`.

    Raises UserError (exit 2) at the end when something was found that would stop the training.
    """
    console = console or Console(emoji=False)
    output = Path(output)
    report, records = inspect_data(data_path, encoder, store, decode_limit=decode_limit)
    example = max(records[:50], key=lambda record: min(len(record.turns), 6), default=None)
    print_report(report, render_example(encoder, example) if example else None, console)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "summary.json", asdict(report))
    console.print(f"\nwrote {for_rich(str(output / 'summary.json'))}", highlight=False)
    if store is not None and contact_sheet(store, records, output / "contact_sheet.png"):
        console.print(f"wrote {for_rich(str(output / 'contact_sheet.png'))}", highlight=False)
    if report.problems:
        skippable = "" if report.count("broken image") else ", or train with --on_bad_sample skip"
        raise UserError(
            f"{len(report.problems):,} problem(s) in {data_path} would stop the training; all are listed in "
            f"{output / 'summary.json'}: mend or remove these samples{skippable}"
        )
    return report
