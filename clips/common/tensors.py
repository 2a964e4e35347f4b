"""Read, write and hash weight files: safetensors, or torch files without pickled code.

Only this file reads weight files (apart from transformers' loaders). So two rules hold everywhere: nothing in a weight
file is executed (`weights_only=True`), and unfit weights are refused by name, with both shapes.
"""

import hashlib
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from clips.common.errors import UserError, first_line
from clips.common.files import read_json, usual_mode
from clips.common.hub import WEIGHT_FILES
from clips.common.paths import is_plain

M = TypeVar("M", bound=nn.Module)
WRAPPERS = ("state_dict", "model", "module")
"""Keys under which training programs put the weights if a file also has optimizer state."""
MODEL_WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"
)  # fmt: skip
"""Files in which a model directory has its weights; the first that exists counts."""
MOST_IN_TABLES = 2**26
"""Numbers that a model may hold in addition to those in its files: positions, masks."""
SHOWN = 5
"""Names listed in an error message before "and N more"."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors or torch file by name, on the CPU.

    A `state_dict`, `model` or `module` around them is unwrapped, and the prefix `module.` is removed from names. Raises
    UserError if the file is missing, may hold pickled code, or holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no weight file {path}: check the path")
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    try:
        content = read_torch(path)
    except UserError as error:
        raise UserError(f"{error}. If you trust it, convert it to .safetensors in an isolated environment") from None
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = dict(content) if isinstance(content, Mapping) else {}
    if not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{path} holds no weights: expected a dictionary of tensors, such as a state_dict")
    return {str(name).removeprefix("module."): value for name, value in tensors.items()}


def read_model(directory: Path) -> dict[str, Tensor]:
    """Read all tensors of a model directory: one file, or several with an index; safetensors first.

    Raises UserError if the directory has none, for a file that `read_weights` refuses, and for an index that names a
    file outside the directory.
    """
    path = next((directory / name for name in MODEL_WEIGHTS if (directory / name).is_file()), None)
    if path is None:
        raise UserError(f"{directory} holds no weights: expected one of {', '.join(MODEL_WEIGHTS)}")
    if path.suffix != ".json":
        return read_weights(path)

    tensors = {}
    for name in dict.fromkeys(read_json(path)["weight_map"].values()):
        if not is_plain(str(name)):
            raise UserError(f"{path} names {name}, which is outside its directory: download the model again")
        tensors.update(read_weights(directory / name))
    return tensors


def weight_files(directory: Path) -> list[Path]:
    """Return the files in a model directory that hold weights, in any known format."""
    return [path for pattern in WEIGHT_FILES for path in directory.glob(pattern) if path.is_file()]


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file of any name. Raises UserError if it is not one."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or is not a weight file: {first_line(error)}") from None


def read_shapes(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return type ("F32") and shape of each tensor from the header of a safetensors file, without reading tensors.

    Raises UserError if the file is missing or damaged.
    """
    if not path.is_file():
        raise UserError(f"no weight file at {path}")
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or is not a weight file: {first_line(error)}") from None


def read_torch(path: Path) -> Any:
    """Return the tensors and plain values of a torch file. Raises UserError if it is damaged or holds anything else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        why = f"it may hold pickled code ({unpickling_reason(error)})"
        raise UserError(f"{path} was refused: {why}. Nothing in it was run") from None
    except Exception as error:  # torch's reader raises nearly every built-in exception on damaged bytes
        raise UserError(f"{path} is damaged or is not a torch file: {first_line(error)}") from None


def unpickling_reason(error: pickle.UnpicklingError) -> str:
    """Return torch's finding, without the part of its message that says how to run the code."""
    match = re.search(r"[Uu]nsupported (?:global: )?(?:GLOBAL|operand) \S+", str(error))
    return match[0] if match else first_line(error)


def write_weights(tensors: Mapping[str, Tensor], path: Path, **metadata: str) -> None:
    """Write named tensors as safetensors (in the "pt" format that open_clip and transformers expect).

    Raises OSError if the file cannot be written.
    """
    plain = {name: value.detach().to("cpu").contiguous().clone() for name, value in tensors.items()}
    try:
        save_file(plain, path, metadata={"format": "pt", **metadata})
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(f"{path}: {error}") from error
    usual_mode(path)


def hash_weights(tensors: Mapping[str, Tensor]) -> Any:
    """Return hashlib's SHA-256 object over names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest


def assign_weights(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy `tensors` into `module`. Raises UserError like `check_fits`."""
    check_fits(module, tensors, source)
    module.load_state_dict(dict(tensors))


def build_for(build: Callable[[], M], tensors: Mapping[str, Tensor], source: str | Path) -> M:
    """Return the module that `build` makes, with `tensors` as its weights.

    Raises UserError, before the module takes memory, if they do not fit (`check_fits`) or its buffers are too large.
    """
    with torch.device("meta"):
        module = build()
        check_fits(module, tensors, source)
    size = sum(table.numel() for table in module.buffers())
    if size > MOST_IN_TABLES:
        raise UserError(f"the configuration of {source} asks for tables of {size:,} numbers, which no model has")
    module = build()
    module.load_state_dict(dict(tensors))
    return module


def check_fits(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise UserError naming `source` if the names or shapes of `tensors` do not fit `module`."""
    expected = module.state_dict()
    problems = [
        f"{name}: the file has shape {tuple(tensors[name].shape)}, the model {tuple(expected[name].shape)}"
        for name in expected
        if name in tensors and tensors[name].shape != expected[name].shape
    ]
    missing = [name for name in expected if name not in tensors]
    if missing:
        problems.append(f"missing in the file: {listed(missing)}")
    unknown = [name for name in tensors if name not in expected]
    if unknown:
        problems.append(f"unknown to the model: {listed(unknown)}")
    if problems:
        lines = "\n  ".join(problems[:SHOWN])
        raise UserError(f"the weights of {source} do not fit the model in {len(problems)} places:\n  {lines}")


def listed(names: Sequence[str]) -> str:
    """Return the first `SHOWN` names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
