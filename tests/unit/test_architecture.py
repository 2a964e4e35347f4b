"""How the modules may know each other: no circle, one direction, one narrow seam, no script run by a library."""

import ast
import importlib
import re
from collections.abc import Iterator

import pytest
from conftest import ROOT

import clips

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("clips", "mllm")
    for path in sorted((ROOT / package).rglob("*.py"))
}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in FILES.items()}


def imported(module: str) -> Iterator[tuple[str, str]]:
    """(module, name) of every import in a file, those inside functions and for type checkers too."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide where a name comes from"
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)


def ours(module: str) -> set[str]:
    """The modules of this project that a file imports; the public face counts as what it hands out."""
    imports = set()
    for source, name in imported(module):
        if source == "clips" and name in clips.FACE:
            imports.add(clips.FACE[name])
        elif f"{source}.{name}" in FILES:
            imports.add(f"{source}.{name}")
        elif source in FILES:
            imports.add(source)
    return imports - {"clips", "mllm"}


def test_there_is_no_circle_of_imports() -> None:
    """Nor one of rooms: what two rooms need of each other belongs below both."""
    graph = {module: ours(module) for module in FILES if module != "clips"}
    rooms: dict[str, set[str]] = {}
    for module, targets in graph.items():
        rooms.setdefault(room(module), set()).update(map(room, targets))
    for edges in (graph, {name: targets - {name} for name, targets in rooms.items()}):
        while edges:  # take away what imports nothing that is left, until nothing is left
            leaves = {name for name, targets in edges.items() if not targets & edges.keys()}
            assert leaves, f"a circle among: {sorted(edges)}"
            edges = {name: targets for name, targets in edges.items() if name not in leaves}


def room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def test_imports_go_one_way() -> None:
    for module in FILES:
        for target in ours(module):
            if module.startswith("clips"):
                assert target.startswith("clips"), f"{module} imports {target}"
            if room(module) in ("mllm.chat", "mllm.serve"):
                assert room(target) not in ("mllm.training", "mllm.compare"), f"{module} imports {target}"
            if room(module) == "clips.common":
                assert room(target) == "clips.common", f"{module} is the ground floor, but imports {target}"


def test_no_library_runs_a_script() -> None:
    """Scripts are started as processes; what they share with a library lives in the library."""
    for module in FILES:
        assert not {"runpy", "scripts"} & {source.split(".")[0] for source, _ in imported(module)}, module


def test_the_seam_is_the_public_face_the_ground_floor_and_the_lab() -> None:
    for module in FILES:
        if module.startswith("mllm"):
            for source, name in imported(module):
                if source == "clips":
                    assert name in clips.FACE, f"{module}: `from clips import {name}` is not on the face"
                elif source.startswith("clips."):
                    is_seam = source.startswith(("clips.common", "clips.engine", "clips.lab"))
                    assert is_seam, f"{module} reaches past clips' face: {source}.{name}"


def test_the_face_is_complete_and_used() -> None:
    """Every name is there, and the language side needs it (users need CLIPS)."""
    assert len(clips.FACE) > 30
    for name, module in clips.FACE.items():
        assert getattr(clips, name) is getattr(importlib.import_module(module), name)
    used = {
        name for module in FILES if module.startswith("mllm") for source, name in imported(module) if source == "clips"
    }
    assert used == clips.FACE.keys()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        clips.nothing  # noqa: B018


def test_no_name_with_an_underscore_crosses_modules() -> None:
    for module in FILES:
        for source, name in imported(module):
            if source.split(".")[0] in ("clips", "mllm"):
                assert not name.startswith("_"), f"{module} imports {source}.{name}"


SCRIPTED = [path for room in ("clips", "mllm", "scripts") for path in sorted((ROOT / room).rglob("*.py"))]
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
    for path in SCRIPTED:
        used = names_used(ast.parse(path.read_text()))
        if any(name == wanted or name.startswith(f"{wanted}.") for name in used for wanted in names):
            users.add(str(path.relative_to(ROOT)))
    assert users == files


FOREIGN = {"ast", "bos", "dir", "eos", "ext", "generate", "legacy", "linear", "mllm", "nohup", "partial", "plain"}
FOREIGN |= {"block_type", "build_vision_projector", "labels_for_regress", "proj_type", "sample_distorted_bounding_box"}
FOREIGN |= {"unpad", "unseen"}
"""What docstrings name of other libraries and programs, and values."""


def is_text(node: ast.AST) -> bool:
    """A docstring, or one behind an assignment."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def words(tree: ast.AST) -> set[str]:
    """All words of the code: names, and those in strings that are no docstrings."""
    texts = {node.value for node in ast.walk(tree) if is_text(node)}
    fields = ("id", "attr", "arg", "name", "asname", "module", "value")
    found = (getattr(node, field, "") for node in ast.walk(tree) if node not in texts for field in fields)
    return {word for text in found if isinstance(text, str) for word in re.findall(r"\w+", text)}


def test_names_in_docstrings_exist() -> None:
    """A name in back-quotes is a word of its file's code; one with an underscore, of the project's."""
    code = {module: words(tree) for module, tree in TREES.items()}
    known = FOREIGN | {word for of_file in code.values() for word in of_file if "_" in word}
    stale = []
    for module, tree in TREES.items():
        text = "\n".join(node.value.value for node in ast.walk(tree) if is_text(node))
        for name in re.findall(r"`([a-z_]+)(?:\[.*?\])?`", text):
            stale += [f"{module}: {name}"] * (name not in known | code[module])
        for name in re.findall(r"`((?:clips|mllm)[.\w]+)`", text):
            place, _, last = name.rpartition(".")
            stale += [f"{module}: {name}"] * (name not in FILES and last not in code.get(place, ()))
    assert stale == []
