"""scripts/recaption.py with the tests' own captioner, which takes its time; its processes import this file too."""

from __future__ import annotations

import sys
from typing import Any

from pairs import Known

import mllm.recaption.process as process
from clips.common.errors import run_command


def make_captioner(spec: str, *_: Any, **__: Any) -> Known:
    """`known:SECONDS` of each call."""
    return Known(seconds=float(spec.partition(":")[2]))


process.make_captioner = make_captioner

if __name__ == "__main__":
    from conftest import script_parser

    from mllm.recaption import run

    sys.exit(run_command(lambda: run.recaption_from_flags(script_parser("recaption").parse_args())))
