#!/usr/bin/env python
"""Train one stage of a LLaVA-style model (scripts/train_llava.sh runs both and the evaluation)."""

import sys

from clips.common.errors import run_command


def main() -> None:
    from mllm.training.arguments import parse_train_arguments

    arguments = parse_train_arguments(sys.argv[1:])
    from mllm.training.run import run_stage

    run_stage(arguments)


if __name__ == "__main__":
    sys.exit(run_command(main))
