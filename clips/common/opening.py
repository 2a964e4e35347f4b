"""Check the size of a model directory before a library reads it, and report every failure in one form.

Numbers in a configuration decide how much memory a library asks for. So the number of layers has a limit, and the
number of parameters, counted on torch's meta device, is compared with the size of the weight files. transformers'
loaders run without noise and without the model's own code.
"""

import logging
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clips.common.errors import CommandError, UserError, in_one_line
from clips.common.files import read_json
from clips.common.tensors import MOST_IN_TABLES, listed, unpickling_reason, weight_files

LAYERS = re.compile(r"(?!max_)(?:.*_)?(?:layers?|depth|blocks|experts)")
"""Names of fields of a configuration that count modules."""
MOST_LAYERS = 1024
"""Maximum number of layers, because each layer that is built takes memory even without weights."""
NO_CODE: dict[str, Any] = {"trust_remote_code": False}
"""Option for every loader that may read `auto_map`: transformers uses its own class, or refuses. Without this option it
asks at the terminal and runs the model's code on a "y"."""


@contextmanager
def opening(what: str, place: Path | str) -> Iterator[None]:
    """Context manager for loading a model directory: like `naming`, after checking the number of layers in its configs.

    Raises UserError if a configuration asks for more than MOST_LAYERS layers.
    """
    for path in (Path(place, name) for name in ("config.json", "open_clip_config.json")):
        check_layers(read_json(path), path)
    with naming(what, place):
        yield


@contextmanager
def naming(what: str, place: Path | str) -> Iterator[None]:
    """Context manager that turns any exception but a CommandError into a UserError: "`what`: `place` cannot be loaded".

    Libraries raise all kinds of exceptions for a wrong value in a file.
    """
    try:
        yield
    except CommandError:
        raise
    except pickle.UnpicklingError as error:
        why = f"it may hold pickled code ({unpickling_reason(error)})"
        raise UserError(
            f"{what}: a weight file of {place} was refused: {why}. Nothing in it was run; use a .safetensors copy"
        ) from None
    except Exception as error:
        problem = in_one_line(error)
        if "trust_remote_code" in problem:
            problem = "it needs Python code of its own (auto_map), which is never run: choose a transformers model type"
        raise UserError(f"{what}: {place} cannot be loaded: {problem}") from None


def check_layers(config: Any, place: Path) -> None:
    """Raise UserError if a configuration asks for more than MOST_LAYERS layers."""
    for name, value in config.items() if isinstance(config, dict) else ():
        for number in (value if isinstance(value, list) else [value]) if LAYERS.fullmatch(name) else ():
            if isinstance(number, int) and number > MOST_LAYERS:
                raise UserError(f"{place}: {name} is {number:,}, more than {MOST_LAYERS:,}")
        check_layers(value, place)


def check_size(what: str, directory: Path, build: Callable[[], nn.Module]) -> None:
    """Raise UserError if the model that `build` returns has far more parameters than the weight files hold.

    It is built on the meta device, so it takes no memory. Files of 4 bits hold two parameters in a byte.
    """
    stored = sum(path.stat().st_size for path in weight_files(directory))
    logging.disable(logging.WARNING)  # the warning that such a model has no weights
    try:
        with torch.device("meta"):
            model = build()
    finally:
        logging.disable(logging.NOTSET)
    parameters = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if parameters > 2 * stored + MOST_IN_TABLES:
        raise UserError(f"{what}: {directory} has {stored:,} bytes of weights for {parameters:,} parameters")


@contextmanager
def loading(what: str, directory: Path | str) -> Iterator[None]:
    """Context manager like `opening` that also silences transformers' reports, and from then on its progress bars."""
    from transformers.utils import logging as reports

    reports.disable_progress_bar()
    verbosity = reports.get_verbosity()
    reports.set_verbosity_error()  # `load_weights` decides what matters
    try:
        with opening(what, directory):
            yield
    finally:
        reports.set_verbosity(verbosity)


def load_weights(
    cls: Any, what: str, directory: Path | str, allowed: tuple[str, ...] = (), **options: Any
) -> tuple[Any, dict[str, Any]]:
    """Return the model of `cls.from_pretrained(directory, **options)` and the report of its loading.

    Raises UserError if a weight has another shape or is missing, unless its name begins with one of `allowed`. With the
    option `state_dict` its tensors are the weights, and `directory` only appears in messages.
    """
    source = None if "state_dict" in options else directory
    # By default it would raise an error without the wrong shapes.
    reported = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = cls.from_pretrained(source, **reported, **options)
    problems = [
        f"{name}: {tuple(shape)} in the file, {tuple(expected)} in the model"
        for name, shape, expected in sorted(info["mismatched_keys"])
    ]
    problems += [f"missing {name}" for name in sorted(info["missing_keys"]) if not name.startswith(allowed)]
    if problems:
        mend = "take config.json and weights from one download or export"
        raise UserError(f"{what}: the weights in {directory} do not fit their config.json: {listed(problems)}; {mend}")
    return model, info
