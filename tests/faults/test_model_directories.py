"""Model directories whose numbers, types or tokenizers are hostile: a UserError in bounded memory, on every loader."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_original import write_whole
from tiny_serve import write_models
from tokenizers import Tokenizer

from clips.common.errors import UserError
from clips.common.opening import opening
from clips.data.tokenizer import CaptionTokenizer
from clips.weights.export import export_all
from clips.weights.initial import read_initial
from clips.weights.load import load_model
from mllm.chat.model import ChatModel
from mllm.encoders.registry import load_vision
from mllm.model.convert import convert_llava
from mllm.model.llm import load_llm, read_tokenizer

MOST_MB = 400
"""Memory that all attacks on one directory may take."""
VALUES = (0, -1, 10**6, 10**9, 10**30, 1.5, float("nan"), "12", None, [], {}, True)
"""Every number of a configuration is replaced by each of these."""
LOADERS: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "native": ("export/native", "config.json", load_model),
    "open_clip": ("export/open_clip", "open_clip_config.json", load_model),
    "init from": ("export/hf_vit", "config.json", lambda place: read_initial(str(place))),
    "hf": ("export/hf_vit", "config.json", lambda place: load_vision(f"hf:{place}")),
    "open_clip tower": ("export/open_clip", "open_clip_config.json", lambda place: load_vision(f"clips:{place}")),
    "llava": ("runs/llava/model", "config.json", lambda place: ChatModel.load(str(place), device="cpu")),
    "llm": ("llm", "config.json", lambda place: load_llm(str(place))),
}
"""Loader → a good directory, its configuration, how it is opened."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_models(root, context=256)
    loaded = load_model(root / "runs/clips-demo")
    size = loaded.model.visual.image_size
    (root / "original").mkdir()
    write_whole(root / "original", "llava-tiny")
    export_all(loaded.model, loaded.run, loaded.tokenizer, root / "export", torch.randn(2, 3, size, size), ["a", "b"])
    return root


def numbers(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The places of a configuration's numbers; of a run's those of its model."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if isinstance(inner, (int, float)) and not isinstance(inner, bool):
            yield (*path, key)
        if key not in ("data", "optim", "phases", "train", "eval", "task", "captions"):
            yield from numbers(inner, (*path, key))


def attacked(config: dict, path: tuple, value: object) -> str:
    changed = json.loads(json.dumps(config))
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return json.dumps(changed)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


BROKEN = ("[" * 100_000, "[]", "null", "", "{}", '{"a":' * 500 + "1" + "}" * 500)


@pytest.mark.parametrize("loader", LOADERS)
def test_row_29_numbers_and_types_are_looked_at_before_memory_is_taken(
    loader: str, place: Path, tmp_path: Path
) -> None:
    """Each attack ends in a UserError, or is a number that decides nothing; none in a traceback."""
    source, name, load = LOADERS[loader]
    path = shutil.copytree(place / source, tmp_path / "model") / name
    config, before, refused = json.loads(path.read_text()), peak_mb(), 0
    layers = [place for place in numbers(config) if "layers" in str(place[-1])]
    attacks = [(place, VALUES[i % len(VALUES)]) for i, place in enumerate(numbers(config))]
    texts = [attacked(config, *attack) for attack in (*attacks, *((place, 10**6) for place in layers))]
    for text in (*texts, *BROKEN):
        path.write_text(text)
        with contextlib.suppress(UserError):
            load(path.parent)
            refused -= 1
        refused += 1
    assert refused > (len(texts) + len(BROKEN)) / 2
    assert peak_mb() - before < MOST_MB


def test_row_29_many_layers_are_refused_by_their_number(place: Path, tmp_path: Path) -> None:
    path = shutil.copytree(place / "export/native", tmp_path / "model") / "config.json"
    config = json.loads(path.read_text())
    path.write_text(attacked(config, ("model", "vision", "layers"), 10**6))
    with pytest.raises(UserError, match=r"model\.vision\.layers is 1,000,000, and the weights are \d+ tensors"):
        load_model(path.parent)


FOUND = [
    ("llm", "tokenizer_config.json", ("model_max_length",), {"a": 1}),
    ("llm", "generation_config.json", ("eos_token_id",), "12"),
    ("llava", "generation_config.json", ("eos_token_id",), float("inf")),
    ("llava", "generation_config.json", ("eos_token_id",), 10**30),
    ("llm", "tokenizer.json", ("model", "vocab", "a"), 10**9),
    ("llava", "config.json", ("image_token_index",), 3),
    ("llava", "processor_config.json", ("image_processor", "size"), {"height": 2, "width": 2}),
    ("llava", "config.json", ("image_seq_length",), 3),
    ("original", "config.json", ("rope_scaling",), 3),
    ("original", "generation_config.json", ("eos_token_id",), [[]]),
    ("original", "tokenizer_config.json", ("model_max_length",), [0]),
]
"""Telling cases of attacks on all JSON files of model directories: each ended in a traceback, or took 4 GB."""


def load_original(place: Path) -> None:
    tower = str(place.parent / "tower")
    convert_llava(str(place), place.parent / "converted", "transformers", vision_tower=tower, check_only=True)


@pytest.mark.parametrize(("loader", "file", "path", "value"), FOUND)
def test_row_29_every_json_file_is_a_stranger_s(
    loader: str, file: str, path: tuple, value: object, place: Path, tmp_path: Path
) -> None:
    """Not the configuration alone: lengths of a tokenizer, ends of a generation, sizes of a picture."""
    source, load = ("original/llava-tiny", load_original) if loader == "original" else LOADERS[loader][::2]
    target = shutil.copytree(place / source, tmp_path / "model") / file
    if loader == "original":
        shutil.copytree(place / "original" / "tower", tmp_path / "tower")
    target.write_text(attacked(json.loads(target.read_text()), path, value))
    with pytest.raises(UserError):
        load(target.parent)


def charsmap(data: bytes) -> dict:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


LONGER = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 16}
NORMALIZERS = {
    "a map of 2 GB": charsmap(b"\xff\xff\xff\x7fabc"),
    "no map": charsmap(b""),
    "half a map": charsmap(b"\1"),
    "a replacement bomb": {"type": "Sequence", "normalizers": [LONGER] * 12},
}
"""Each ends the process: `tokenizers` panics, or aborts as it cannot have the memory."""


@pytest.mark.parametrize("name", NORMALIZERS)
def test_row_30_a_tokenizer_that_would_end_the_process_is_refused(name: str, place: Path, tmp_path: Path) -> None:
    for source, read in (("llm", read_tokenizer), ("export/native/tokenizer", CaptionTokenizer.load)):
        directory = shutil.copytree(place / source, tmp_path / source)
        content = json.loads((directory / "tokenizer.json").read_text()) | {"normalizer": NORMALIZERS[name]}
        (directory / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"precompiled_charsmap is damaged|times longer"):
            read(directory)


def test_row_30_a_panic_and_a_pipe_are_said(tmp_path: Path) -> None:
    content = {"model": {"type": "BPE", "vocab": {}, "merges": []}, "normalizer": charsmap(b"")}
    with pytest.raises(UserError, match="model: x cannot be loaded"), opening("model", "x"):
        Tokenizer.from_str(json.dumps(content))
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="not a regular file"):
        read_tokenizer(tmp_path)
