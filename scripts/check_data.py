#!/usr/bin/env python
"""Check data before a run: pairs for pretraining (--data, --mix) or a LLaVA data set (--data-path).

Exit 2 if something would stop a training, 4 if more samples are broken than a training tolerates.
"""

import sys

from clips.common.errors import UserError, run_command
from clips.common.flags import Parser


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("--output", default="runs/check_data", help="folder for summary.json and contact_sheet.html")
    p.add_argument("--json", action="store_true", help="print the summary as JSON, and nothing else")
    pairs = p.add_argument_group("pairs, as pretrain_clips.py takes them")
    pairs.add_argument("--data", help="a folder, pattern or URL of tar shards, or a table")
    pairs.add_argument("--mix", nargs="+", action="extend", metavar="NAME=SHARE:DATA", help="several sets")
    pairs.add_argument("--fields", nargs="+", action="extend", metavar="PART=FIELD", help="as in pretraining")
    pairs.add_argument("--image-root", help="tables: the folder that image paths are relative to")
    pairs.add_argument("--recipe", default="b16", help="its tokenizer and lengths are held against the captions")
    pairs.add_argument("--samples", type=int, help="check only so many, drawn at random (default: all)")
    pairs.add_argument("--seed", type=int, default=0, help="seed of that draw")
    pairs.add_argument("--workers", type=int, default=1, help="processes that read and decode")
    llava = p.add_argument_group("LLaVA data")
    llava.add_argument("--data-path", help="LLaVA JSON or JSONL file")
    llava.add_argument("--image-folder", help="folder or uncompressed tar of the pictures")
    llava.add_argument("--version", default="auto", help="conversation format, as train_llava.sh takes it")
    llava.add_argument(
        "--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="the model whose tokenizer is used"
    )
    llava.add_argument("--num-image-tokens", type=int, default=576, help="tokens of one image")
    llava.add_argument("--model-max-length", type=int, default=2048, help="context in tokens")
    llava.add_argument("--decode-limit", type=int, help="decode only this many pictures, evenly spread (default: all)")
    return p


def main() -> None:
    flags = parser().parse_args()
    pairs = flags.data is not None or bool(flags.mix)
    if pairs == (flags.data_path is not None):
        raise UserError("give pairs (--data or --mix) or a LLaVA data set (--data-path)")
    if pairs:
        from clips.data.check import check_from_flags
    else:
        from mllm.training.check_data import check_from_flags
    check_from_flags(flags)


if __name__ == "__main__":
    sys.exit(run_command(main))
