#!/usr/bin/env python
"""Check a LLaVA data set before a run: records, pictures, lengths, labels. Exit 2 when something would stop it."""

import argparse
import sys

from clips.common.errors import run_command


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data_path", required=True, help="LLaVA JSON or JSONL file")
    p.add_argument("--image_folder", help="folder or uncompressed tar of the pictures")
    p.add_argument("--version", default="auto", help="conversation format, as train_llava.sh takes it")
    p.add_argument("--model_name_or_path", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="for its tokenizer")
    p.add_argument("--num_image_tokens", type=int, default=576, help="tokens that one image takes")
    p.add_argument("--model_max_length", type=int, default=2048, help="context in tokens")
    p.add_argument("--decode_limit", type=int, help="decode only this many pictures, evenly spread (default: all)")
    p.add_argument("--output", default="runs/check_data", help="folder for summary.json and contact_sheet.png")
    return p


def main() -> None:
    flags = parser().parse_args()
    from mllm.data.conversation import ConversationEncoder
    from mllm.data.images import ImageStore
    from mllm.model.llm import version_for
    from mllm.training.check_data import check_data, load_tokenizer

    store = ImageStore(flags.image_folder) if flags.image_folder else None
    tokenizer = load_tokenizer(flags.model_name_or_path)
    version = version_for(tokenizer, flags.version)
    encoder = ConversationEncoder(tokenizer, version, flags.num_image_tokens, flags.model_max_length)
    check_data(flags.data_path, encoder, store, flags.output, decode_limit=flags.decode_limit)
    print("nothing found that would stop a training. Next: bash scripts/train_llava.sh --vision clips")


if __name__ == "__main__":
    sys.exit(run_command(main))
