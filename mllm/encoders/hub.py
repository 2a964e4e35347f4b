"""A model directory, on disk or on the Hugging Face hub: found, and read without noise and with clear errors."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from transformers.utils import logging

from clips.common.errors import UserError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
CONFIG_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "non_lora_trainables.bin")
"""What a model directory holds beside its weights: configurations, tokenizer files, what LLaVA puts beside adapters."""
WEIGHT_FILES = ("*.safetensors", "*.bin")
"""The first kind that is there is what is loaded."""
BAR_FROM = 2 * 2**30
"""Bytes of weights that take long enough to read or write for a progress bar."""
NO_CODE = {"trust_remote_code": False}
"""For every loader of transformers that may read `auto_map`: where it knows the kind of model itself it uses its own
class, else it refuses. Left unsaid, it would ask at the terminal and run the model's code on a "y"."""


def resolve(name: str, what: str) -> Path:
    """The local directory of `name` (a directory, or a hub id that is downloaded or already in the hub's cache).

    `what` says what is looked for, in error messages. Safetensors are preferred; torch files are fetched only where
    there are none, and are read without running pickled code. Raises UserError when nothing is found and when the hub
    cannot be reached.
    """
    directory = Path(name).expanduser()
    if not directory.is_dir():
        if not HUB_ID.fullmatch(name):
            raise UserError(f"{what}: there is no directory {name}, and it is not a hub id (owner/name)")
        directory = _download(name, what)
    return directory


def _download(name: str, what: str) -> Path:
    try:
        for weights in WEIGHT_FILES:
            patterns = [*CONFIG_FILES, weights]
            directory = Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))
            if any(directory.glob(weights)):
                break
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"{what}: {name} is neither a directory nor could it be fetched from the Hugging Face hub "
            f"({_first_line(error)}). Without a network give a local directory."
        ) from None
    return directory


@contextmanager
def loading(what: str, directory: Path | str) -> Iterator[None]:
    """Turns what a stock loader raises for a damaged or unfit model into a UserError that names the place.

    Its own reports are off meanwhile, and its progress bars where `directory` is one whose weights are soon read.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report on missing weights; `check_complete` decides what matters
    try:
        with progress_bars(_weight_bytes(Path(directory))):
            yield
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{what}: a weight file of {directory} may hold pickled code and was refused; nothing in it was run "
            f"({_first_line(error)})"
        ) from None
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{what}: {directory} needs Python code that comes with it (auto_map), which this project never runs: "
                "choose a model of a kind that transformers knows itself"
            ) from None
        raise UserError(f"{what}: {directory} cannot be loaded: {_first_line(error)}") from None
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def progress_bars(size: int | None) -> Iterator[None]:
    """No progress bars of transformers while it reads or writes `size` bytes of weights, if those are below BAR_FROM.

    With None, a size that is not known (a download, for example), bars are left as they are.
    """
    hidden = size is not None and size < BAR_FROM and logging.is_progress_bar_enabled()
    if hidden:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hidden:
            logging.enable_progress_bar()


def _weight_bytes(place: Path) -> int | None:
    if place.is_file():
        return place.stat().st_size
    if not place.is_dir():
        return None
    sizes = (sum(path.stat().st_size for path in place.glob(pattern)) for pattern in WEIGHT_FILES)
    return next(filter(None, sizes), 0)


def check_complete(info: dict[str, Any], what: str, directory: Path | str, allowed: tuple[str, ...] = ()) -> None:
    """Raise UserError when `from_pretrained(…, output_loading_info=True)` left weights at random values.

    `allowed` are prefixes of parameters that nothing here uses.
    """
    missing = sorted(name for name in info["missing_keys"] if not name.startswith(allowed))
    if missing or info["mismatched_keys"]:
        shapes = [
            f"{name}: {tuple(found)} in the file, {tuple(own)} in the model"
            for name, found, own in sorted(info["mismatched_keys"])
        ]
        raise UserError(
            f"{what}: the weights in {directory} do not fit their config.json: "
            + "; ".join(shapes[:5] + [f"missing {name}" for name in missing[:5]])
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
