"""Find a model directory by name, on disk or on the Hugging Face hub (fetched or cached), and files of packages."""

import hashlib
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from clips.common.errors import UserError, first_line
from clips.common.files import sha256

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
CONFIG_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "non_lora_trainables.bin")
"""Files next to the weights: configurations, tokenizer files, and LLaVA's file next to adapters."""
NATIVE_TOKENIZER = "tokenizer/*.json"
"""Tokenizer files of native exports; nothing else is fetched from a model's subdirectories."""
WEIGHT_FILES = ("*.safetensors", "*.bin")
OPEN_CLIP_WEIGHTS = ("open_clip*.safetensors", "open_clip*.bin")
"""The same directory may also hold the model in transformers' format."""
ANY_WEIGHTS = (*OPEN_CLIP_WEIGHTS, *WEIGHT_FILES)


def packaged_file(package: str, name: str) -> Path | None:
    """Return the path of the file `name` in an installed package without importing it, or None if it is missing."""
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / name if spec is not None and spec.origin is not None else None
    return path if path is not None and path.is_file() else None


def is_hub_id(name: str) -> bool:
    """Return True if `resolve` looks for `name` on the hub: it has the form of an id, and is not a directory."""
    return not Path(name).expanduser().is_dir() and HUB_ID.fullmatch(name) is not None


def resolve(name: str, what: str, weights: Sequence[str] = WEIGHT_FILES) -> Path:
    """Return the local directory of `name`, a directory or a hub id. Download the latter unless the hub's cache has it.

    `what` describes the model in error messages. The first of the patterns `weights` that matches a file on the hub is
    fetched. Raises UserError if nothing is found or the hub cannot be reached.
    """
    directory = Path(name).expanduser()
    if directory.is_dir():
        return directory
    if not HUB_ID.fullmatch(name):
        raise UserError(f"{what}: there is no directory {name}, and it is not a hub id (owner/name)")
    try:
        snapshot_download(name, allow_patterns=["*config.json", NATIVE_TOKENIZER])
        for pattern in weights:
            directory = Path(snapshot_download(name, allow_patterns=[*CONFIG_FILES, pattern], ignore_patterns=["*/*"]))
            if any(directory.glob(pattern)):
                break
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f"{what}: {name} is no directory here, and the hub says: {first_line(error)}") from None
    return directory


def model_digest(directory: Path, *, whole: bool = False) -> str:
    """Return the SHA-256 over names and contents of a model directory's weight files.

    With `whole` it covers every file that decides what the model computes: also configuration, tokenizer and templates.
    """
    weights = [*directory.glob("*.safetensors")] or [*directory.glob("pytorch_model*.bin")]
    everything = [path for pattern in (*CONFIG_FILES, *WEIGHT_FILES) for path in directory.glob(pattern)]
    files = sorted(set(everything if whole else weights))
    lines = "".join(f"{path.name} {sha256(path)}\n" for path in files)
    return hashlib.sha256(lines.encode()).hexdigest()
