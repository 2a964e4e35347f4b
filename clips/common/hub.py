"""A model directory by name: one on disk, or one of the Hugging Face hub, fetched or already in its cache."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from clips.common.errors import UserError, first_line
from clips.common.files import digest_of

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
CONFIG_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "non_lora_trainables.bin")
"""What a model directory holds beside its weights: configurations, tokenizer files, what LLaVA puts beside adapters."""
NATIVE_TOKENIZER = "tokenizer/*.json"
"""Where native exports keep theirs; nothing else that is large is fetched from below a model's top directory."""
WEIGHT_FILES = ("*.safetensors", "*.bin")
OPEN_CLIP_WEIGHTS = ("open_clip*.safetensors", "open_clip*.bin")
"""Beside which the same directory may hold the model in transformers' format."""
ANY_WEIGHTS = (*OPEN_CLIP_WEIGHTS, *WEIGHT_FILES)


def packaged_file(package: str, name: str) -> Path | None:
    """The file `name` inside an installed package, which is not imported; None if it is not there."""
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / name if spec is not None and spec.origin is not None else None
    return path if path is not None and path.is_file() else None


def is_hub_id(name: str) -> bool:
    """Whether `resolve` would look for `name` on the hub: it has the form of an id and no directory is called so."""
    return not Path(name).expanduser().is_dir() and HUB_ID.fullmatch(name) is not None


def resolve(name: str, what: str, weights: Sequence[str] = WEIGHT_FILES) -> Path:
    """The local directory of `name` (a directory, or a hub id that is downloaded or already in the hub's cache).

    `what` says what is looked for, in error messages. Of the patterns `weights` the first that matches a file on the
    hub is fetched, so safetensors stand before torch files, which are read without running pickled code. Raises
    UserError when nothing is found and when the hub cannot be reached.
    """
    directory = Path(name).expanduser()
    if not directory.is_dir():
        if not HUB_ID.fullmatch(name):
            raise UserError(f"{what}: there is no directory {name}, and it is not a hub id (owner/name)")
        directory = _download(name, what, weights)
    return directory


def _download(name: str, what: str, weights: Sequence[str]) -> Path:
    try:
        snapshot_download(name, allow_patterns=["*config.json", NATIVE_TOKENIZER])
        for pattern in weights:
            directory = Path(snapshot_download(name, allow_patterns=[*CONFIG_FILES, pattern], ignore_patterns=["*/*"]))
            if any(directory.glob(pattern)):
                break
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"{what}: {name} is neither a directory nor could it be fetched from the Hugging Face hub "
            f"({first_line(error)}). Without a network give a local directory."
        ) from None
    return directory


def model_digest(directory: Path, *, whole: bool = False) -> str:
    """SHA-256 over names and contents of a model directory's weight files.

    `whole`: over every file that decides what the model computes, so configuration, tokenizer and templates too.
    """
    if whole:
        return digest_of(path for pattern in (*CONFIG_FILES, *WEIGHT_FILES) for path in directory.glob(pattern))
    return digest_of([*directory.glob("*.safetensors")] or directory.glob("pytorch_model*.bin"))
