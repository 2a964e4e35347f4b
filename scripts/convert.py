#!/usr/bin/env python
"""Convert a model to another format: read FROM, check that its features stay the same, and write TO."""

import sys
from pathlib import Path

from clips.common.errors import run_command
from clips.common.files import check_target
from clips.common.flags import Parser


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument(
        "source",
        metavar="FROM",
        help="a run, an export, a CLIP of open_clip or transformers: a directory or a hub id; --to transformers: also "
        "an image tower, timm:NAME_OR_DIR, or an original LLaVA; --to llava: a saved LLaVA-style model",
    )
    p.add_argument("target", metavar="TO", help="the directory to write, which must not exist")
    p.add_argument(
        "--to",
        choices=("native", "open_clip", "official", "transformers", "llava"),
        default="native",
        help="format; official is that of the CLIPS checkpoints, and LLaVA models can be transformers or llava",
    )
    p.add_argument("--check", action="store_true", help="only check that the conversion works, and write nothing")
    llava = p.add_argument_group("LLaVA models")
    llava.add_argument("--base", metavar="DIR_OR_HUB_ID", help="base model of LoRA adapters or an mm_projector.bin")
    llava.add_argument("--vision-tower", metavar="DIR_OR_HUB_ID", help="vision tower (default: the one of FROM)")
    llava.add_argument("--conv-mode", default="auto", help="conversation format; auto is the tokenizer's, or v1")
    return p


def main() -> None:
    flags = parser().parse_args()
    if not flags.check:
        check_target(Path(flags.target))
    from mllm.model.convert import convert_llava_from_flags, is_llava_source

    if is_llava_source(flags.source, flags.to):
        convert_llava_from_flags(flags)
    else:
        from clips.weights.convert import convert_from_flags

        convert_from_flags(flags)


if __name__ == "__main__":
    sys.exit(run_command(main))
