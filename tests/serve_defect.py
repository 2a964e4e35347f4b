"""scripts/serve.py with a defect in it: a question that says "defect" makes the model's thread fail."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from mllm.chat.session import ChatSession

SECRET = "the secret of /home/someone"


def main() -> None:
    generate = ChatSession._generate

    def broken(self: ChatSession, ids: list[int], *rest: object) -> int:
        if "defect" in self.model.processor.tokenizer.decode(ids):
            raise RuntimeError(SECRET)
        return generate(self, ids, *rest)

    ChatSession._generate = broken
    script = Path(__file__).parents[1] / "scripts" / "serve.py"
    sys.argv[0] = str(script)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
