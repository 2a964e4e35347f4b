"""Models through transformers' loaders: without noise, without the model's own code, with clear errors."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging

from clips.common.errors import UserError
from clips.common.hub import WEIGHT_FILES
from clips.common.opening import opening
from clips.common.tensors import unpickling_reason

BAR_FROM = 2 * 2**30
"""Bytes of weights from which a progress bar is shown."""
NO_CODE = {"trust_remote_code": False}
"""For every loader that may read `auto_map`: transformers uses its own class, or refuses. Without this option it asks
at the terminal and runs the model's code on a "y"."""

REPORTED: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""For loaders whose report `check_complete` reads; otherwise they raise an error without shapes for unfit weights."""


@contextmanager
def loading(what: str, directory: Path | str) -> Iterator[None]:
    """Turn a stock loader's error for a damaged or unfit model into a UserError that names the place.

    The loader's own reports are off, and its progress bars if the weights in `directory` are small.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report on missing weights; `check_complete` decides what matters
    try:
        with progress_bars(_weight_bytes(Path(directory))), opening(what, directory):
            yield
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{what}: a weight file of {directory} may hold pickled code and was refused; nothing in it was run "
            f"({unpickling_reason(error)})"
        ) from None
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def progress_bars(size: int | None) -> Iterator[None]:
    """Hide transformers' progress bars if `size` bytes of weights are below BAR_FROM; None changes nothing."""
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
    """Raise UserError if `from_pretrained(…, **REPORTED)` left weights random, except prefixes in `allowed`."""
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
