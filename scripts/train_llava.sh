#!/usr/bin/env bash
# Train a LLaVA-style model on an encoder: stage 1, stage 2 and, on the demo or on captions, the evaluation.
#
#   bash scripts/train_llava.sh --vision clips                  # the newest CLIPS export; also clip, random, blind, hf:…
#   bash scripts/train_llava.sh --vision clips:runs/mine --data_path my.csv   # captions: a model that describes
#   bash scripts/train_llava.sh --vision clips --stage 2 --lora_enable --data_path my.json --image_folder images
#   bash scripts/train_llava.sh --vision clips --dry-run        # print the two commands and the plan, train nothing
#   bash scripts/train_llava.sh --help                          # every flag with its default
#
# The same command resumes a stopped run. Flags have LLaVA's names, and --align.FLAG and --instruct.FLAG apply to one
# stage only. NUM_GPUS=N sets the number of GPUs (default: all
# that CUDA_VISIBLE_DEVICES shows), or the number of processes if there are no GPUs.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
if [ -z "${PYTHON:-}" ] && [ -x "$here/../.venv/bin/python" ]; then PYTHON="$here/../.venv/bin/python"; fi
export PYTHON="${PYTHON:-python}"
exec "$PYTHON" "$here/train_llava.py" --launch "$@"
