"""What chat and server load: nothing that only training needs."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow
TRAINING_ONLY = ("deepspeed", "peft", "transformers.trainer", "matplotlib", "mllm.training")


def test_chat_and_server_load_nothing_that_only_training_needs() -> None:
    code = (
        "import sys\n"
        "import mllm.chat.session, mllm.chat.terminal, mllm.chat.web, mllm.serve.app\n"
        f"print([name for name in {TRAINING_ONLY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
