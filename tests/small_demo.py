"""The demo made small, by several artists or by one; as a program, a command of scripts/ that finds it so.

python tests/small_demo.py several|one SCRIPT FLAG ...
"""

import runpy
import sys
from pathlib import Path

import pytest

from clips.common.rundir import UNSEEN
from clips.data import artists
from clips.data.demo import ensure_demo
from mllm.data.demo import ensure_llava_demo

SIZES = {"train": 200, "val": 20, "test": 40, UNSEEN: 40}
LLAVA_SIZES = {"align": 8, "instruct": 8, "text_only": 2, "per_kind": 4}


def shrink(patch: pytest.MonkeyPatch, *, several: bool) -> None:
    """Sizes for this process; without `several` there is no npm in it."""
    patch.setattr(ensure_demo, "__kwdefaults__", ensure_demo.__kwdefaults__ | {"sizes": SIZES})
    patch.setattr(ensure_llava_demo, "__kwdefaults__", ensure_llava_demo.__kwdefaults__ | LLAVA_SIZES)
    if not several:
        patch.setattr(artists, "_npm", list)


if __name__ == "__main__":
    several, *sys.argv = (word for word in sys.argv[1:] if not word.startswith("--local_rank"))  # deepspeed's
    shrink(pytest.MonkeyPatch(), several=several == "several")
    runpy.run_path(str(Path(__file__).parent.parent / "scripts" / sys.argv[0]), run_name="__main__")
