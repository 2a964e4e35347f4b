"""Find the files of a set, and guess what users do not say about it: fields, and the root of image paths.

Every guess is printed, with the flag that overrules it.
"""

import csv
import glob
import logging
import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import PurePosixPath, PureWindowsPath

from braceexpand import braceexpand

from clips.common.errors import UserError, first_line
from clips.common.paths import is_remote, without_secrets
from clips.config import OTHERS, Fields
from clips.data.images import ENDINGS
from clips.data.remote import patiently, store_of

log = logging.getLogger("clips.data")
NAMES = {
    "image": (
        *("image", "file_name", "filepath", "path", "filename", "file", "image_path", "img", "picture", "photo"),
        *("image_name", "image_file", "url", "image_url"),
    ),
    "web": (
        *("text", "txt", "caption", "alt", "title", "alt_text", "org_caption", "web", "captions"),
        *("comment", "productdisplayname"),
    ),
    "long": ("long", "long_caption", "re_caption", "recaption", "dense_caption"),
}
"""Usual names of each part's column, JSON key or member; the first one that is present counts."""
TABLES = (".csv", ".tsv", ".jsonl", ".parquet", "captions.txt")
"""Endings of tables that are found in a folder."""
NAMED = (*TABLES, ".json", ".token", ".token.txt")
"""Endings of all tables. Those that a folder may have for another purpose are read only if they are named."""
OF_HUB = "hf:"
"""Begins the id of a data set of the hub, as in hf:jxie/flickr8k."""
MANIFEST = "manifest.json"
"""Name of the file that an import writes; as --data it is opened as it is."""


def is_held_out(name: str) -> bool:
    """Return True for a file or folder of a test or validation split: "test", "val-00000.parquet", not "valentines"."""
    return re.match(r"(test|val|valid|validation|dev)([^a-z]|$)", name) is not None


def usual(name: str) -> str:
    """Return the name of a column as NAMES spells it: "Image File" is `image_file`."""
    return re.sub(r"[\s-]+", "_", name.strip().lower())


Note = Callable[[str], None]
"""Takes a line about what was guessed or skipped; the import keeps it in the manifest."""


def guess_fields(fields: Fields, names: Sequence[str], lists: Collection[str] = ()) -> Fields:
    """Return `fields` for data with the fields `names`. Parts that the user left open are guessed by NAMES.

    A part is open if it has its default value and the data has no such field. `lists` are the fields that hold lists.
    Without a long caption, the captions of a list serve for both parts. A long caption is guessed only by its own
    names. If the web caption is guessed, `txt` is not taken for the long caption, because outside of Recap-DataComp-1B
    it is the web caption.
    """
    named = {usual(name.removeprefix("json:")): name for name in reversed(names)}
    default = Fields()

    def is_open(part: str) -> bool:
        spec = getattr(fields, part)
        return spec == getattr(default, part) and not set(spec.split(";")) & set(names)

    guessed = {part: "" for part in ("image", "web") if is_open(part)}
    if fields.long == default.long and ("web" in guessed or is_open("long")):
        guessed["long"] = ""
    for part in guessed:
        taken = {fields.image, fields.web, *guessed.values()}
        guessed[part] = next((named[n] for n in NAMES[part] if n in named and named[n] not in taken), "")
    if guessed.get("long") == "" and set((guessed.get("web") or fields.web).split(";")) & set(lists):
        guessed["long"] = OTHERS
    if not any(guessed.values()):
        return fields
    return replace(fields, **{part: name for part, name in guessed.items() if name or part == "long"})


def describe_fields(fields: Fields) -> str:
    """Say where images and captions are found."""
    long = f"long captions from {fields.long!r}" if fields.long else "no long captions"
    if fields.long == OTHERS:
        long = "one drawn in each step of pretraining, two of the others joined as the long caption"
    return f"images from {fields.image!r}, captions from {fields.web!r}, {long}"


def guess_delimiter(header: str, url: str, note: Note) -> str:
    """Return the delimiter that gives the header most columns: comma, tab, semicolon or pipe. Note an unusual one."""
    usual = "\t" if url.endswith(".tsv") else ","
    delimiter = max(usual, *"\t;|,", key=lambda character: len(next(csv.reader([header], delimiter=character), ())))
    if delimiter != usual:
        note(f"{url}: columns are separated by {delimiter!r}")
    return delimiter


def guess_root(where: str, root: str, paths: Sequence[str], note: Note, *, is_given: bool) -> str:
    """Return the folder to which a table's image paths are relative.

    It is `root` (the table's folder, or --image-root if `is_given`) if one of the first images, `paths`, is there. Else
    it is the folder in it, or next to it, with which the table's name ends (COCO: annotations/captions_train2017.json
    and train2017), or the current folder; the last two are tried only without --image-root. A guess is noted.
    Raises UserError if no image is found, or if `root` or the images are URLs.
    """
    if not paths:
        return root
    if is_remote(root) or is_remote(paths[0]):
        raise UserError(f"{where} names images by URL: train on the tar shards of img2dataset (docs/data.md)")
    of_split = PurePosixPath(where).stem.rpartition("_")[2]
    beside = [] if is_given else [os.path.join(os.path.dirname(os.path.abspath(root)), of_split), "."]
    for folder in (root, os.path.join(root, of_split), *beside):
        if any(os.path.exists(os.path.join(folder, path)) for path in paths):
            if folder != root:
                place = "the current folder" if folder == "." else folder
                note(f"{where}: images are looked for in {place} (guessed; --image-root overrules)")
            return folder
    place = f"{paths[0]!r} was looked for in {os.path.abspath(root)}"
    advice = "give --image-root"
    if os.path.isabs(paths[0]) or PureWindowsPath(paths[0]).is_absolute():
        advice = "these are whole paths of another machine; write them from a folder on, which --image-root then names"
    raise UserError(f"{where}: none of the first {len(paths)} images is there ({place}): {advice}")


def expand(spec: str) -> list[str]:
    """Return the data files that `spec` names, in a fixed order. Raises UserError if a part names no file, or is wrong.

    A `;` or `{…}` in the name of an existing file or folder is part of the name.
    """
    files: list[str] = []
    parts = [spec] if os.path.exists(spec) else [part.strip() for part in spec.split(";")]
    for part in filter(None, parts):
        try:
            patterns = [part] if os.path.exists(part) else list(braceexpand(part))
        except ValueError as error:
            raise UserError(f"data {part!r}: {error}; write a range as in {{00000..00009}}.tar") from None
        for pattern in patterns:
            files += _match(pattern)
    if not files:
        raise UserError(f"data {spec!r} names no files; give a folder, *.tar, {{00000..00009}}.tar or a table")
    for file in files:
        if not (file.endswith((".tar", *NAMED)) or os.path.isdir(file) or is_karpathy(file)):
            raise UserError(
                f"{file} is of no known kind; known are .tar (not compressed), {', '.join(NAMED)}. Of any other list "
                "make a .csv whose first line is image,caption"
            )
    return files


def _match(pattern: str) -> list[str]:
    if is_karpathy(pattern):
        return [pattern]
    if pattern.startswith(OF_HUB) and not is_remote(pattern):
        return _of_hub(pattern.removeprefix(OF_HUB))
    if is_remote(pattern):
        if not glob.has_magic(pattern):
            return [pattern]
        filesystem, path = store_of(pattern)
        files = sorted(filesystem.unstrip_protocol(name) for name in filesystem.glob(path))
    elif os.path.isdir(pattern):
        files = in_folder(pattern, (".tar", *TABLES))
    else:
        files = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern))
    if not files:
        raise UserError(f"no data at {pattern!r}: no file, no folder of .tar, {', '.join(TABLES)} or a.jpg, a.txt")
    return files


def _of_hub(name: str) -> list[str]:
    """Return the URLs of the shards or tables of a data set of the hub, without those of held-out splits."""
    root = f"hf://datasets/{name}"

    def ask() -> list[str]:
        filesystem, path = store_of(root)
        return sorted(file.removeprefix(f"{path}/") for file in filesystem.find(path))

    try:
        names = patiently(root, ask)
    except (OSError, ImportError, ValueError) as error:
        raise UserError(f"{OF_HUB}{name} is no data set of the hub that can be read: {first_line(error)}") from None
    for suffix in (".tar", *TABLES):
        files = [file for file in names if file.endswith(suffix)]
        train = [file for file in files if not any(map(is_held_out, file.split("/")))]
        if train:
            warn_once(f"{OF_HUB}{name}: {len(train):,} of {len(files):,} {suffix} files taken, the first is {train[0]}")
            return [f"{root}/{file}" for file in train]
    raise UserError(f"{OF_HUB}{name} has no {', '.join(('.tar', *TABLES))} files for training; found: {names[:10]}")


def in_folder(folder: str, suffixes: Sequence[str]) -> list[str]:
    """Return the data files of a folder: the first kind of `suffixes` in it, or else in its data/ or train/.

    Beside `train…` files those of held-out splits are skipped. A folder of images with texts is its own data file.
    """
    names = sorted(name for name in os.listdir(folder) if name[0] != ".")
    for suffix in suffixes:
        tables = [name for name in names if name.endswith(suffix)]
        train = [name for name in tables if name.startswith("train")]
        others = [name for name in tables if name not in train]
        if train and others and all(map(is_held_out, others)):
            _say_held_out(folder, train, others)
            tables = train
        if tables:
            return [os.path.join(folder, name) for name in tables]

    for inner in ("data", "train"):
        path = os.path.join(folder, inner)
        files = in_folder(path, suffixes) if inner in names and os.path.isdir(path) else []
        if files:
            others = [n for n in names if is_held_out(n) and os.path.isdir(os.path.join(folder, n))]
            if inner == "train" and others:
                _say_held_out(folder, [inner], others)
            return files
    return [folder] if image_text_pairs(folder)[0] else []


@lru_cache
def warn_once(message: str) -> None:
    """Log `message` as a warning without credentials, once per process, because a run opens its data several times."""
    log.warning("%s", without_secrets(message))


def _say_held_out(folder: str, train: Sequence[str], others: Sequence[str]) -> None:
    warn_once(f"{folder}: {', '.join(train[:2])} taken, {os.path.join(folder, others[0])} left for tests")


def image_text_pairs(folder: str) -> tuple[list[str], list[str]]:
    """Return the images with a text (a.jpg, a.txt) and those without, as sorted paths below `folder`."""
    paths: tuple[list[str], list[str]] = ([], [])
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        texts = {name[:-4] for name in names if name.endswith(".txt")}
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in ENDINGS and name[0] != ".":
                path = os.path.relpath(os.path.join(place, name), folder)
                paths[stem not in texts].append(path)
    return paths


def is_karpathy(spec: str) -> bool:
    """Return True if `spec` names splits of a JSON file."""
    return ".json#" in spec
