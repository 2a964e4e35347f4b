"""Every "only" that a docstring promises, by the imports and calls of the whole code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache

import pytest
from conftest import ROOT

FILES = [path for room in ("clips", "mllm", "scripts") for path in sorted((ROOT / room).rglob("*.py"))]
ONLY: list[tuple[set[str], set[str]]] = [  # (these names, or names below them) → the files that use them
    (
        {"deepspeed"},
        {f"clips/{name}.py" for name in ("common/runtime", "training/engine", "training/muon", "training/zero_state")},
    ),
    ({"PIL.Image.open"}, {"clips/data/images.py"}),
    ({"torch.load", "safetensors.torch.load_file", "safetensors.torch.load_model"}, {"clips/common/tensors.py"}),
    ({"safetensors.safe_open"}, {"clips/common/tensors.py", "clips/data/tar.py"}),  # the latter: an index
    ({"pickle.load", "pickle.loads", "pickle.Unpickler", "torch.hub"}, set()),
    ({"text optimizer.safetensors"}, {"clips/weights/checkpoint.py"}),
    ({"safetensors.torch.save_file"}, {"clips/common/tensors.py", "clips/weights/checkpoint.py"}),
    ({"fcntl"}, {"clips/common/files.py"}),
    ({"torch.autocast"}, {"clips/common/runtime.py"}),  # a rehearsal enters there
    ({"text CLIPS_MLLM_CACHE", "text XDG_CACHE_HOME"}, {"clips/common/paths.py"}),
    ({"text metrics.jsonl"}, {"clips/common/rundir.py"}),
]


@cache
def names_used(path: str) -> frozenset[str]:
    """Dotted names of what a file imports and of what it calls or reads, aliases of `import a as b` resolved."""
    return frozenset(_names(ast.parse((ROOT / path).read_text())))


def _names(tree: ast.AST) -> Iterator[str]:
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname: alias.name for alias in node.names if alias.asname}
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, dot, rest = ast.unparse(node).partition(".")
            yield aliases.get(first, first) + dot + rest
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield f"text {node.value}"


@pytest.mark.parametrize(("wanted", "files"), ONLY)
def test_only_these_files_use_these_names(wanted: set[str], files: set[str]) -> None:
    paths = [str(path.relative_to(ROOT)) for path in FILES]
    assert files == {
        path
        for path in paths
        if any(name == w or name.startswith(f"{w}.") for name in names_used(path) for w in wanted)
    }


def test_no_word_of_a_text_becomes_an_emoji() -> None:
    """A rich console turns ":dog:" into one by default."""
    bare = {
        (str(path.relative_to(ROOT)), node.lineno)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")).endswith("Console")
        if "emoji=False" not in map(ast.unparse, node.keywords)
    }
    assert not bare
