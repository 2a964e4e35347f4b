"""Turn attributes into questions: from tables or tar shards with attribute columns to LLaVA's training and test files.

instruct.json   for each image one open or yes/no question about each column, in conversations of independent columns
question.jsonl  held-out questions with `kind` and `answer`; a kind is a column, or yes_no
align.json      with --caption: images and captions, for stage 1
train.tar …     with --pack: images, attributes and the captions `web` and `long`, for pretraining
summary.txt     what was skipped, and the score of always giving the most frequent answer of each kind
"""

import argparse
import difflib
import hashlib
import io
import itertools
import json
import os
import random
import re
import shlex
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from clips import (
    ENDINGS,
    MAX_CAPTION,
    NAMES,
    BrokenSample,
    Dataset,
    Fields,
    decode_image,
    expand,
    flat,
    open_data,
    read_members,
)
from clips.common.errors import UserError
from clips.common.escape import printable
from clips.common.files import STAMP, ensure_built, from_json, read_json
from clips.common.live import say_next
from clips.common.paths import can_encode, unused
from clips.common.rundir import newest_vision
from mllm.data.captions import QUESTION
from mllm.data.demo import ALIGN, IMAGES, INSTRUCT, QUESTIONS, QuestionAnswer, turns_of
from mllm.data.images import ImageStore

SUMMARY = "summary.txt"
SHORT = "Answer the question using a single word or phrase."
"""LLaVA-1.5's prompt for short answers. It follows the first question of a conversation, and each test question."""
WHAT_VALUE, IS_VALUE = "What is the {words}?", "Is the {words} {value}?"
TRUTH = {"true": "Yes", "yes": "Yes", "false": "No", "no": "No"}
"""Answer for each value of a column that holds only these. With a name such as "has pockets", 1 and 0 count, too."""
IS_TRUE = {"is": "Is it", "was": "Was it", "has": "Does it have", "can": "Can it", "contains": "Does it contain"}
"""How the question about such a column begins, by the first word of its name."""
YES_NO_SHARE = 0.25
"""Share of the training questions that are yes/no questions."""


@dataclass(frozen=True)
class Row:
    """The name of an image in `store`, or in the packed tar, and its attributes."""

    image: str
    cells: dict[str, Any]
    store: ImageStore
    in_table: Callable[[], bytes] | None = None
    """Reads the image, if it is inside the table."""

    def is_missing(self) -> bool:
        """Return True if the image is in no table and its file is missing."""
        return not self.in_table and self.store.problem(self.image) is not None

    def read(self) -> bytes:
        """Return the bytes of the image."""
        return self.in_table() if self.in_table else self.store.read(self.image)


@dataclass(frozen=True)
class Column:
    """An attribute that is asked about."""

    words: str
    question: str
    answers: dict[str, dict[int, str]]
    """The answer for each row that has one, by the row's index, in each split."""
    asks_value: bool = True
    """False if the question itself is answered by yes or no."""


def build_from_flags(flags: argparse.Namespace) -> None:
    """Run scripts/build_questions.py: write the files above to `--output`, unless equal ones exist.

    Raises UserError for wrong flags, for columns that the data lacks, and if there is nothing to ask about.
    """
    if not 0 < flags.held_out < 1:
        raise UserError(f"--held-out {flags.held_out} must be above 0 and below 1")
    for word in flags.ask:
        if not value_of(word.partition("=")[2], MAX_CAPTION):
            raise UserError(f"--ask {word!r}: give COLUMN=TEXT, without <image>")
    splits = {"train": expand(flags.data)}
    if flags.test_data:
        splits["test"] = expand(flags.test_data)
    states = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for files in splits.values() for file in files]
    # A higher version rebuilds older folders.
    settings = json.loads(json.dumps(vars(flags) | {"version": 5, "states": states}))
    ensure_built(Path(flags.output), settings, partial(_write, flags=flags, splits=splits), what="questions")
    output = Path(flags.output)
    print(printable((output / SUMMARY).read_text(encoding="utf-8"), None))
    print(printable(f"written to {output}: {', '.join(sorted(path.name for path in output.iterdir()))}"))
    target = unused(Path("runs", f"llava-{output.name}"))
    words = ["--vision", newest_vision(Path("runs")), "--output_dir", str(target)]
    words += [] if torch.cuda.is_available() else ["--small"]
    words += ["--image_folder", read_json(output / STAMP)[IMAGES]["train"]]
    words += ["--align.data_path", str(output / ALIGN) if (output / ALIGN).is_file() else "CAPTIONS"]
    words += ["--instruct.data_path", str(output / INSTRUCT)]
    say_next(f"bash scripts/train_llava.sh {shlex.join(words)}")


def _write(work: Path, flags: argparse.Namespace, splits: dict[str, list[str]]) -> dict[str, Any]:
    """Write all files listed above into `work`."""
    lines: list[str] = []
    rows = {name: _placed(name, read, work, flags, lines) for name, read in read_splits(splits, flags, lines).items()}
    if flags.limit and flags.limit < len(rows["train"]):
        rows["train"] = random.Random(f"{flags.seed}/limit").sample(rows["train"], flags.limit)
        lines.append(f"train: there are questions about {flags.limit:,} of these images (--limit)")
    columns = choose_columns(rows, flags, lines)
    records = conversations(rows["train"], columns, flags.seed)
    (work / INSTRUCT).write_text(json.dumps(records, indent=1))
    questions = held_out_questions(rows["test"], columns, flags.seed, flags.per_kind)
    if not questions:
        raise UserError(f"no question for the test, lower --min-count: {'; '.join(lines)}")
    (work / QUESTIONS).write_text("".join(json.dumps(question) + "\n" for question in questions))
    if flags.caption:
        captions = [(row, value_of(row.cells.get(flags.caption), MAX_CAPTION)) for row in rows["train"]]
        records = [_record(row, [(QUESTION, caption)]) for row, caption in captions if caption]
        (work / ALIGN).write_text(json.dumps(records, indent=1))
        lines.append(f"captions: {len(records):,}; skipped {len(captions) - len(records):,} rows without one")

    for kind, group in itertools.groupby(questions, lambda question: question["kind"]):
        answers = Counter(question["answer"] for question in group)
        ((answer, count),) = answers.most_common(1)
        share = count / answers.total()
        lines.append(f"test, {kind}: {answers.total():,} questions; always answering {answer!r} gets {share:.1%}")
    (work / SUMMARY).write_text("\n".join(lines), encoding="utf-8")
    return {
        IMAGES: {
            split: f"{flags.output}/{split}.tar" if flags.pack else str(of_split[0].store.location)
            for split, of_split in rows.items()
        }
    }


def read_splits(splits: dict[str, list[str]], flags: argparse.Namespace, lines: list[str]) -> dict[str, list[Row]]:
    """Read the rows of `splits` ({"train" or "test": files}) whose image exists; appends the counts to `lines`.

    Without "test" a share of the rows, --held-out, is split off. Two images are the same if their bytes are equal or,
    with --key, if their rows have the same value there. Raises UserError if an image is in both splits, or if no row
    has a column that a flag names.
    """
    rows: dict[str, list[Row]] = {"train": [], "test": []}
    names: dict[str, dict[str, str]] = {"train": {}, "test": {}}  # identity → image
    for split, files in splits.items():
        of_table = partial(_of_table, image=flags.image, image_root=flags.image_root, lines=lines)
        every = [row for file in files for row in (_of_tar(file) if file.endswith(".tar") else of_table(file))]
        _check_columns(split, every, flags)
        missing = [row.image for row in every if row.is_missing()]
        lines.append(": ".join([f"{split}: skipped {len(missing):,} missing images", *missing[:1]]))
        for row in itertools.filterfalse(Row.is_missing, every):
            key = value_of(row.cells.get(flags.key), MAX_CAPTION) or row.image
            identity = hashlib.sha256(key.encode("utf-8", "surrogatepass") if flags.key else row.read()).hexdigest()
            part = "test" if "test" not in splits and int(identity[:8], 16) < flags.held_out * 2**32 else split
            rows[part].append(row)
            names[part][identity] = row.image
    both = [identity for identity in names["test"] if identity in names["train"]]
    if both:
        what = f"{len(both):,} of {len(names['test']):,} are in --data too, by their {flags.key or 'bytes'}"
        pair = f"{names['test'][both[0]]} is {names['train'][both[0]]}"
        raise UserError(f"--test-data: {what}: {pair}. Remove them, use --held-out, or tell them apart with --key")
    return rows


def _check_columns(split: str, rows: list[Row], flags: argparse.Namespace) -> None:
    """Raise UserError if no row has a column that a flag asks for."""
    names = dict.fromkeys(name for row in rows for name in row.cells)
    named = [] if flags.key in (None, "image", flags.image) else [("--key", flags.key)]
    if split == "train":
        named += [("--caption", flags.caption)] if flags.caption else []
        named += [("--long", column) for column in re.findall(r"\{(.*?)\}", flags.long or "")]
        named += [("--columns", column) for column in flags.columns or ()]
        named += [("--ask", word.partition("=")[0]) for word in flags.ask]
    for flag, column in named:
        if column not in names:
            nearest = "".join(f", did you mean {name}?" for name in difflib.get_close_matches(column, names, n=1))
            raise UserError(f"{flag}: {split} has no column {column!r}{nearest} (found: {', '.join(names)})")


def _placed(name: str, rows: list[Row], work: Path, flags: argparse.Namespace, lines: list[str]) -> list[Row]:
    """Return a split's rows, packed with --pack. Raises UserError without rows, or without one place for all images."""
    placed = _pack(rows, work / f"{name}.tar", flags.caption, flags.long) if flags.pack else rows
    folders = {f"{flags.output}/{name}.tar" if flags.pack else str(row.store.location) for row in placed}
    broken = f"; skipped {len(rows) - len(placed):,} broken ones" if flags.pack else ""
    lines.append(f"{name}: {len(placed):,} images in {''.join(folders)}{broken}")
    if not placed:
        raise UserError(f"no row for {name} (--image-root, --held-out): {'; '.join(lines)}")
    if len(folders) > 1 or (not flags.pack and any(row.in_table for row in rows)):
        raise UserError(f"the images of {name} are in a table or in several files: --pack copies them to one tar")
    return placed


def _of_tar(file: str) -> Iterator[Row]:
    store = ImageStore(file)
    names, _ = read_members(file)
    images = {os.path.splitext(name)[0]: name for name in names if name.lower().endswith(ENDINGS)}
    for stem, ending in map(os.path.splitext, names):
        if ending == ".json":
            cells = None
            with suppress(ValueError):
                cells = from_json(store.read(stem + ending))
            yield Row(images.get(stem, stem), cells if isinstance(cells, dict) else {}, store)


def _of_table(file: str, image: str | None, image_root: str | None, lines: list[str]) -> Iterator[Row]:
    """Yield the rows of a table with their images, which are in the column `image`; rows without one are skipped."""
    fields = Fields(image=image or Fields().image, web="", long="")
    try:
        table = open_data(file, fields, image_root=image_root, need_long=False)
    except UserError as error:
        raise UserError(str(error).replace("--fields image=FIELD", "--image COLUMN")) from None
    (part,) = table.parts
    store = ImageStore(part.facts["root"])
    skipped = sum(part.facts["skipped"].values())
    lines += [f"{file}: skipped {skipped:,} rows without an image: {part.facts['examples'][0][1]}"] if skipped else []
    for number in range(len(table)):
        path, cells = table.image_path(number), dict(flat(table.extra(number)))
        in_table = partial(_read_image, table, number) if path is None else None
        yield Row(path or str(cells.get("id", number)), cells, store, in_table)


def _read_image(table: Dataset, number: int) -> bytes:
    return table.read(number).image


def _pack(rows: list[Row], target: Path, caption: str | None, long: str | None) -> list[Row]:
    """Write the rows whose images can be decoded, with attributes and captions, to a tar, and return these rows.

    `caption` is the column of the captions, and `long` the text with columns in braces of the long ones.
    """
    packed: list[Row] = []
    taken = {*NAMES["web"], *NAMES["long"]} if caption else set()  # pretraining would prefer these to `web`
    with tarfile.open(target, "w") as archive:
        for row in rows:
            number, data = len(packed), row.read()
            try:
                decode_image(data)
            except BrokenSample:
                continue
            image = f"{number:08}.png" if data.startswith(b"\x89PNG") else f"{number:08}.jpg"
            texts = {"web": value_of(row.cells.get(caption), MAX_CAPTION)} if caption else {}
            if long:
                texts["long"] = describe(long, row.cells)
            attributes = {name: cell for name, cell in row.cells.items() if name.lower() not in taken}
            member = json.dumps(attributes | texts, default=str).encode()
            for name, content in ((image, data), (f"{number:08}.json", member)):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            packed.append(replace(row, image=image))
    return packed


def value_of(cell: Any, longest: int = 60) -> str:
    """Return a cell as an answer, or "" if it has no value or is not a text of at most `longest` characters."""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    text = "" if cell is None or isinstance(cell, (bytes, dict, list)) else " ".join(str(cell).split())
    is_mark = "<image>" in text or "<video>" in text or "\0" in text or not can_encode(text)
    is_empty = text.lower() in ("nan", "null", "na", "n/a")
    return "" if is_mark or is_empty or len(text) > longest else text


def describe(template: str, cells: Mapping[str, Any]) -> str:
    """Fill a caption template such as "A {colour} {kind} for {whom}, {use}.", without missing values."""
    text = re.sub(r"\{(.+?)\}", lambda column: value_of(cells.get(column[1])), template)
    return re.sub(r"[ ,]+(?=[,.])", "", " ".join(text.split()))


def choose_columns(rows: dict[str, list[Row]], flags: argparse.Namespace, lines: list[str]) -> list[Column]:
    """Return the columns to ask about: --columns, or those whose frequent values cover half of the training rows.

    A value is frequent if at least --min-count training rows have it; a column needs two of them, and its other values
    are skipped. Appends to `lines` what was kept and skipped. Raises UserError if no column is left, or if one is named
    like another kind of question.
    """
    ask = dict(word.partition("=")[::2] for word in flags.ask)
    names = dict.fromkeys(name for row in rows["train"] for name in row.cells if name not in (flags.caption, flags.key))
    kinds = {"yes no": "the yes/no questions", "overall": "the mean of all"}
    lines.append(f"a value is rare if fewer than {flags.min_count} training rows have it")
    columns = []
    for name in dict.fromkeys(flags.columns or names):
        values = {split: [value_of(row.cells.get(name)) for row in rows[split]] for split in ("train", "test")}
        counts = Counter(filter(None, values["train"]))
        frequent = {value for value, count in counts.items() if count >= flags.min_count}
        answers = {}
        for split, by_row in values.items():
            answers[split] = {number: value for number, value in enumerate(by_row) if value in frequent}
        used = [len(by_row) for by_row in answers.values()]
        empty = sum(by_row.count("") for by_row in values.values())
        rare = sum(map(len, values.values())) - sum(used) - empty
        kept = f"{len(frequent)} of {len(counts):,} values in {used[0]:,} train and {used[1]:,} test rows"
        lines.append(f"column {name}: {kept}; skipped {rare:,} rare ones, {empty:,} without a short text")
        if len(frequent) < 2 or not (flags.columns or 2 * used[0] >= len(rows["train"])):
            lines[-1] += "; nothing is asked about it"
            continue
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[\W_]+", " ", name).lower().strip()
        if words in kinds:
            raise UserError(f"column {name} would share its kind with {kinds[words]}: rename it, or set --columns")
        kinds[words] = f"column {name}"
        columns.append(_column(words, ask.get(name), answers, frequent))
    if not columns:
        raise UserError(f"no column to ask about, lower --min-count: {'; '.join(lines)}")
    return columns


def _column(words: str, question: str | None, answers: dict[str, dict[int, str]], values: set[str]) -> Column:
    """Return the column; if all its values are true and false, its answers are Yes and No."""
    verb, _, rest = words.partition(" ")
    truth = TRUTH | ({"1": "Yes", "0": "No"} if verb in IS_TRUE else {})
    if not {value.lower() for value in values} <= truth.keys():
        return Column(words, question or WHAT_VALUE.format(words=words), answers)
    is_true = f"{IS_TRUE[verb]} {rest}?" if verb in IS_TRUE and rest else f"Is it {words}?"
    answers = {split: {row: truth[value.lower()] for row, value in rows.items()} for split, rows in answers.items()}
    return Column(words, question or is_true, answers, asks_value=False)


def balanced_pairs(answers: Mapping[int, str], rng: random.Random) -> list[tuple[int, int]]:
    """Return pairs of rows with different answers. No row is in two pairs.

    Both rows of a pair are asked about the first row's answer, so each value occurs as often with "yes" as with "no".
    If most rows have the same answer, some of them are in no pair.
    """
    pairs = []
    left = sorted(answers)
    while len({answers[row] for row in left}) > 1:
        rng.shuffle(left)
        rest = left[2 * (len(left) // 2) :]
        for first, second in zip(left[::2], left[1::2], strict=False):
            if answers[first] == answers[second]:
                rest += [first, second]
            else:
                pairs.append((first, second))
        left = rest
    return pairs


def independent_groups(columns: Sequence[Column], most: float = 0.05) -> list[list[Column]]:
    """Group columns so that none predicts another one of its group, and a group can be asked in one conversation.

    A column predicts another if knowing its value raises the share of rows for which the most frequent value of the
    other column is right by more than `most`. Each row is predicted from the other rows.
    """
    groups: list[list[Column]] = []
    for column in columns:
        others = (group for group in groups if not any(_predicts(a, column, most) for a in group))
        group = next(others, None)
        if group is None:
            groups.append(group := [])
        group.append(column)
    return groups


def _predicts(a: Column, b: Column, most: float) -> bool:
    """Return True if one of two columns predicts the other one in the training rows."""
    first, second = (column.answers["train"] for column in (a, b))
    pairs = [(first[row], second[row]) for row in first.keys() & second.keys()]
    for known, asked in ((0, 1), (1, 0)):
        alone = Counter(pair[asked] for pair in pairs)
        given = {value: Counter(pair[asked] for pair in group) for value, group in _by(pairs, known).items()}
        gain = sum(_is_most(given[pair[known]], pair[asked]) - _is_most(alone, pair[asked]) for pair in pairs)
        if gain > most * len(pairs):
            return True
    return False


def _by(pairs: Sequence[tuple[str, str]], place: int) -> dict[str, list[tuple[str, str]]]:
    groups: dict[str, list[tuple[str, str]]] = {}
    for pair in pairs:
        groups.setdefault(pair[place], []).append(pair)
    return groups


def _is_most(counts: Counter[str], value: str) -> bool:
    """Return True if `value` is the most frequent one among the other rows."""
    return all(count < counts[value] - 1 for other, count in counts.items() if other != value)


def conversations(rows: list[Row], columns: list[Column], seed: int) -> list[dict[str, Any]]:
    """Return a record for each row and group of columns with an answer, with its questions in random order.

    Columns that predict each other are in different groups, because an earlier turn would give away the answer.
    """
    turns: dict[str, dict[int, QuestionAnswer]] = {}
    for column in columns:
        rng = random.Random(f"{seed}/train/{column.words}")
        answers = column.answers["train"]
        by_row = {number: (column.question, answer) for number, answer in answers.items()}
        share = YES_NO_SHARE if column.asks_value else 0.0
        drawn = {number: answer for number, answer in answers.items() if rng.random() < share}
        for first, second in balanced_pairs(drawn, rng):
            question = IS_VALUE.format(words=column.words, value=answers[first])
            by_row[first] = (question, "Yes")
            by_row[second] = (question, "No")
        turns[column.words] = by_row

    records = []
    groups = independent_groups(columns)
    for number, row in enumerate(rows):
        rng = random.Random(f"{seed}/order/{number}")
        for group in groups:
            talk = [turns[column.words][number] for column in group if number in turns[column.words]]
            if talk:
                (question, answer), *others = rng.sample(talk, len(talk))
                records.append(_record(row, [(f"<image>\n{question}\n{SHORT}", answer), *others]))
    return records


def _record(row: Row, turns: list[QuestionAnswer]) -> dict[str, Any]:
    return {"id": row.image, "image": row.image, "conversations": turns_of(turns)}


def held_out_questions(rows: list[Row], columns: list[Column], seed: int, per_kind: int) -> list[dict[str, Any]]:
    """Draw up to `per_kind` questions about each column at random from `rows`, and up to `per_kind` yes_no questions.

    As many yes_no questions are answered "Yes" as "No".
    """
    questions: list[tuple[str, int, str, str]] = []  # kind, row, question, answer
    yes_no = []
    for column in columns:
        rng = random.Random(f"{seed}/test/{column.words}")
        answers = column.answers["test"]
        drawn = rng.sample(sorted(answers), min(per_kind, len(answers)))
        questions += [(column.words.replace(" ", "_"), row, column.question, answers[row]) for row in drawn]
        pairs = balanced_pairs(answers, rng) if column.asks_value else []
        yes_no.append([(pair, IS_VALUE.format(words=column.words, value=answers[pair[0]])) for pair in pairs])
    in_turn = filter(None, itertools.chain.from_iterable(itertools.zip_longest(*yes_no)))
    for (first, second), question in itertools.islice(in_turn, per_kind // 2):
        questions += [("yes_no", first, question, "Yes"), ("yes_no", second, question, "No")]
    return [
        {"question_id": i, "image": rows[row].image, "text": f"{text}\n{SHORT}", "kind": kind, "answer": answer}
        for i, (kind, row, text, answer) in enumerate(questions)
    ]
