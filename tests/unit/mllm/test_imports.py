"""What the language side may import: chat and server nothing of training, no module another one's private names."""

from __future__ import annotations

import ast
import subprocess
import sys

from conftest import ROOT

TRAINING_ONLY = ("deepspeed", "peft", "transformers.trainer", "matplotlib", "mllm.training")


def test_chat_and_server_load_nothing_that_only_training_needs() -> None:
    code = (
        "import sys\n"
        "import mllm.chat.session, mllm.chat.terminal, mllm.chat.web, mllm.chat.benchmark, mllm.serve.app\n"
        f"print([name for name in {TRAINING_ONLY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_module_imports_a_name_that_another_one_keeps_to_itself() -> None:
    private = [
        f"{path.relative_to(ROOT)}: {node.module}.{alias.name}"
        for path in sorted((ROOT / "mllm").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name.startswith("_")
    ]
    assert not private
