"""A stranger's model directory is looked at before a library reads it, and every failure has one form.

Numbers in a configuration decide how much memory a library asks for. They are compared with the weights, whose amount
the files bound: first the counts of layers, then the parameters, which a build on torch's meta device tells.
"""

from __future__ import annotations

import base64
import logging
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from clips.common.errors import CommandError, UserError, first_line, in_one_line
from clips.common.files import from_json, read_bytes, read_json
from clips.common.tensors import MOST_IN_TABLES, count_tensors, weight_files

CONFIGS = ("config.json", "open_clip_config.json")
LAYERS = re.compile(r"(?!max_)(?:.*_)?(?:layers?|depth|blocks|experts)")
"""Names of fields of a configuration that count modules."""
MOST_GROWTH = 1000
"""How many times longer a tokenizer's replacements may make a text."""
MOST_UNUSED = 2**20
"""Ids that a tokenizer may leave unused: each takes memory."""


@contextmanager
def opening(what: str, place: Path | str) -> Iterator[None]:
    """Check the files of a model directory, then do as `naming`."""
    check_files(Path(place))
    with naming(what, place):
        yield


@contextmanager
def naming(what: str, place: Path | str) -> Iterator[None]:
    """Turn any failure inside into a UserError that names the place: a library met a file's wrong value."""
    try:
        yield
    except (CommandError, pickle.UnpicklingError):  # `loading` names what a pickle would run
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{what}: {place} needs Python code that comes with it (auto_map), which this project never runs: "
                "choose a model of a kind that transformers knows itself"
            ) from None
        told = isinstance(error, (OSError, ValueError, RuntimeError, ImportError, SafetensorError))
        raise UserError(
            f"{what}: {place} cannot be loaded: {first_line(error) if told else in_one_line(error)}"
        ) from None


def is_failure(error: BaseException) -> bool:
    """Whether a library failed, as opposed to an interrupt or an exit; a panic in Rust is no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def check_files(directory: Path) -> None:
    """Raise UserError for JSON that is none, too deep or too long, for tokenizers and for counts that cost memory."""
    for path in sorted((*directory.glob("*.json"), *directory.glob("tokenizer/*.json"))):
        try:
            content = from_json(read_bytes(path))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as JSON ({error}): restore it, or remove it") from None
        if path.name == "tokenizer.json":
            check_tokenizer(content, path)
            continue
        for field, value in _fields(content):
            ids = value if isinstance(value, list) else [value]
            # Some models write -1 for none.
            are_ids = all(one is None or (type(one) is int and -1 <= one < 2**31) for one in ids)
            if field.endswith("_token_id") and not are_ids:
                raise UserError(
                    f"{path}: {field} is {value!r:.100}, and must be the number of a token, or a list of such"
                )
    if (tensors := count_tensors(directory)) is not None:
        for name in CONFIGS:
            check_counts(read_json(directory / name), tensors, directory / name)


def check_counts(config: dict[str, Any], tensors: int, place: Path) -> None:
    """Raise UserError if `config` counts more layers than there are tensors: each layer built takes memory."""
    for field, count in _fields(config):
        if isinstance(count, int) and count > tensors and LAYERS.fullmatch(field.rpartition(".")[2]):
            raise UserError(f"{place}: {field} is {count:,}, and the weights are {tensors:,} tensors")


def _fields(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All fields, also inside of fields, and their values."""
    for name, inner in value.items() if isinstance(value, dict) else ():
        yield path + name, inner
        yield from _fields(inner, f"{path}{name}.")


def check_size(what: str, directory: Path, build: Callable[[], nn.Module]) -> None:
    """Raise UserError if the model of `build` has far more parameters than the weight files hold.

    It is built on the meta device, which takes no memory. Files of 4 bits hold two parameters in a byte.
    """
    stored = sum(path.stat().st_size for path in weight_files(directory))
    logging.disable(logging.WARNING)  # that a model without weights has none
    try:
        with torch.device("meta"):
            model = build()
    finally:
        logging.disable(logging.NOTSET)
    wanted = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if wanted > 2 * stored + MOST_IN_TABLES:
        raise UserError(
            f"{what}: {directory}/config.json asks for {wanted:,} parameters, and the weights have {stored:,} bytes: "
            "they are not of one model"
        )


def check_tokenizer(content: Any, path: Path) -> None:
    """Raise UserError for a tokenizer.json that would end the process: a wrong map, growing texts, or endless ids.

    `tokenizers` allocates what these say, and a failed allocation in Rust aborts.
    """
    _check_ids(content, path)
    growth, parts = 1.0, [content.get(part) for part in ("normalizer", "decoder")] if isinstance(content, dict) else []
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        elif isinstance(part, dict):
            parts += [inner for inner in part.values() if isinstance(inner, (dict, list))]
            pattern = part.get("pattern")
            found = pattern.get("String", ".") if isinstance(pattern, dict) else "."
            growth *= max(1.0, len(str(part.get("content", ""))) / max(1, len(str(found))))
            if part.get("type") == "Precompiled" and not _is_map(part.get("precompiled_charsmap")):
                raise UserError(f"{path}: its precompiled_charsmap is damaged; take the model's own file")
    if growth > MOST_GROWTH:
        raise UserError(
            f"{path}: its replacements make a text up to {growth:,.0f} times longer; no tokenizer does that"
        )


def _check_ids(content: Any, path: Path) -> None:
    model, added = ((content.get(part) if isinstance(content, dict) else None) for part in ("model", "added_tokens"))
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    tokens = len(vocabulary) if isinstance(vocabulary, (dict, list)) else 0
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    largest = max((number for number in ids if isinstance(number, int)), default=0)
    if largest > tokens + len(ids) + MOST_UNUSED:
        raise UserError(f"{path}: an id is {largest:,}, and there are {tokens:,} tokens; take the model's own file")


def _is_map(text: Any) -> bool:
    """Whether the trie of a precompiled map is as long as it says."""
    try:
        data = base64.b64decode(text, validate=True)
    except (TypeError, ValueError):
        return False
    size = int.from_bytes(data[:4], "little")
    return len(data) >= 4 and 0 < size <= len(data) - 4 and size % 4 == 0
