#!/usr/bin/env python
"""Check data before a run: triples for pretraining (--data, --mix) or a LLaVA data set (--data_path).

Exit 2 when something would stop a training, 4 when more samples are broken than it tolerates.
"""

import argparse
import sys

from clips.common.errors import UserError, run_command


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--output", default="runs/check_data", help="folder for summary.json and the contact sheet")
    triples = p.add_argument_group("triples, as pretrain_clips.py takes them")
    triples.add_argument("--data", help="a folder, pattern or URL of tar shards, or a table")
    triples.add_argument("--mix", nargs="+", action="extend", metavar="NAME=SHARE:DATA", help="several sets")
    triples.add_argument("--fields", nargs="+", action="extend", metavar="PART=FIELD", help="as in pretraining")
    triples.add_argument("--image-root", help="tables: the folder that image paths are relative to")
    triples.add_argument("--recipe", default="b16", help="whose tokenizer and lengths the captions are held against")
    triples.add_argument("--samples", type=int, help="check only so many, drawn at random (default: all)")
    triples.add_argument("--seed", type=int, default=0, help="of that draw")
    triples.add_argument("--workers", type=int, default=1, help="processes that read and decode")
    triples.add_argument("--json", action="store_true", help="print the summary as JSON, and nothing else")
    llava = p.add_argument_group("LLaVA data")
    llava.add_argument("--data_path", help="LLaVA JSON or JSONL file")
    llava.add_argument("--image_folder", help="folder or uncompressed tar of the pictures")
    llava.add_argument("--version", default="auto", help="conversation format, as train_llava.sh takes it")
    llava.add_argument("--model_name_or_path", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="for its tokenizer")
    llava.add_argument("--num_image_tokens", type=int, default=576, help="tokens that one image takes")
    llava.add_argument("--model_max_length", type=int, default=2048, help="context in tokens")
    llava.add_argument("--decode_limit", type=int, help="decode only this many pictures, evenly spread (default: all)")
    return p


def main() -> None:
    flags = parser().parse_args()
    triples = flags.data is not None or bool(flags.mix)
    if triples == (flags.data_path is not None):
        raise UserError("give triples (--data or --mix) or a LLaVA data set (--data_path)")
    if triples:
        from clips.data.check import check_from_flags
    else:
        from mllm.training.check_data import check_from_flags
    check_from_flags(flags)


if __name__ == "__main__":
    sys.exit(run_command(main))
