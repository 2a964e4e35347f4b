"""Every "only" that a docstring promises, by the imports and calls of the whole code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache

from conftest import ROOT

FILES = [path for room in ("clips", "mllm", "scripts") for path in sorted((ROOT / room).rglob("*.py"))]


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


def users(*wanted: str) -> set[str]:
    """Files that use one of these names, or something below it."""
    found = {str(path.relative_to(ROOT)) for path in FILES}
    return {
        path
        for path in found
        if any(name == w or name.startswith(f"{w}.") for name in names_used(path) for w in wanted)
    }


def test_deepspeed_is_imported_by_four_files_only() -> None:
    assert users("deepspeed") == {
        "clips/common/runtime.py",
        "clips/training/engine.py",
        "clips/training/muon.py",
        "clips/training/zero_state.py",
    }


def test_only_one_file_opens_an_image() -> None:
    assert users("PIL.Image.open") == {"clips/data/images.py"}


def test_only_one_file_opens_a_weight_file() -> None:
    loaders = ("torch.load", "safetensors.torch.load_file", "safetensors.torch.load_model")
    assert users(*loaders) == {"clips/common/tensors.py"}
    assert users("safetensors.safe_open") == {"clips/common/tensors.py", "clips/data/tar.py"}, "the latter: an index"
    assert not users("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.hub")


def test_only_one_file_writes_a_checkpoint() -> None:
    assert users("text optimizer.safetensors") == {"clips/weights/checkpoint.py"}
    assert users("safetensors.torch.save_file") == {"clips/common/tensors.py", "clips/weights/checkpoint.py"}


def test_only_one_file_takes_locks_and_one_knows_the_cache() -> None:
    assert users("fcntl") == {"clips/common/files.py"}
    assert users("text CLIPS_MLLM_CACHE", "text XDG_CACHE_HOME") == {"clips/common/paths.py"}
    assert users("text metrics.jsonl") == {"clips/common/rundir.py"}


def test_no_word_of_a_text_becomes_an_emoji() -> None:
    """A rich console turns ":dog:" into one by default."""
    bare = {
        (str(path.relative_to(ROOT)), node.lineno)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Console")
        if "emoji=False" not in map(ast.unparse, node.keywords)
    }
    assert not bare
