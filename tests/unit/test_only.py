"""What only these files may use, by the imports and calls of the whole code."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from conftest import ROOT

FILES = [path for room in ("clips", "mllm", "scripts") for path in sorted((ROOT / room).rglob("*.py"))]
ONLY: list[tuple[set[str], set[str]]] = [  # (these names, or names below them) → the files that use them
    ({"PIL.Image.open"}, {"clips/data/images.py"}),
    ({"torch.load", "safetensors.torch.load_file", "safetensors.torch.load_model"}, {"clips/common/tensors.py"}),
    ({"pickle.load", "pickle.loads", "pickle.Unpickler", "torch.hub"}, set()),
]


def names_used(tree: ast.AST) -> Iterator[str]:
    """Dotted names of what a file imports and of what it calls or reads, aliases of `import a as b` resolved."""
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


@pytest.mark.parametrize(("names", "files"), ONLY)
def test_only_these_files_use_these_names(names: set[str], files: set[str]) -> None:
    users = set()
    for path in FILES:
        used = names_used(ast.parse(path.read_text()))
        if any(name == wanted or name.startswith(f"{wanted}.") for name in used for wanted in names):
            users.add(str(path.relative_to(ROOT)))
    assert users == files
