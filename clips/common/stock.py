"""Models through transformers' own loaders: without noise, without code that comes with them, with clear errors."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils import logging

from clips.common.errors import UserError, first_line
from clips.common.hub import WEIGHT_FILES
from clips.common.tensors import unpickling_reason

BAR_FROM = 2 * 2**30
"""Bytes of weights that take long enough to read or write for a progress bar."""
NO_CODE = {"trust_remote_code": False}
"""For every loader of transformers that may read `auto_map`: where it knows the kind of model itself it uses its own
class, else it refuses. Left unsaid, it would ask at the terminal and run the model's code on a "y"."""

REPORTED: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""For loaders whose report `check_complete` reads: of weights that do not fit, they would raise without the shapes."""


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
            f"({unpickling_reason(error)})"
        ) from None
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{what}: {directory} needs Python code that comes with it (auto_map), which this project never runs: "
                "choose a model of a kind that transformers knows itself"
            ) from None
        raise UserError(f"{what}: {directory} cannot be loaded: {first_line(error)}") from None
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
    """Raise UserError when `from_pretrained(…, **REPORTED)` left weights at random values.

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
