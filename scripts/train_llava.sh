#!/usr/bin/env bash
# Train a LLaVA-style model on an encoder: stage 1, stage 2, and with no data flags, on the demo data, the evaluation.
#
#   bash scripts/train_llava.sh --vision clips                  # the newest CLIPS export; also clip, random, blind, hf:…
#   bash scripts/train_llava.sh --vision clips --stage 2 --lora_enable --data_path my.json --image_folder pictures
#   bash scripts/train_llava.sh --vision clips --dry-run        # the two commands and the plan, nothing is trained
#   bash scripts/train_llava.sh --help                          # every flag with its default
#
# The same command again goes on where it stopped. Flags carry LLaVA's names; --align.FLAG and --instruct.FLAG count in
# one stage only. Several GPUs are used through the deepspeed launcher; NUM_GPUS=N chooses how many (on a machine
# without GPUs: how many processes).
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-python}"
if [ -z "${PYTHON:-}" ] && [ -x "$here/../.venv/bin/python" ]; then python="$here/../.venv/bin/python"; fi

stages="1 2" dry_run=false own_data=false both_on_one=false output_dir="" vision=clips device=auto
flags=("$@")
for ((i = 0; i < ${#flags[@]}; i++)); do
  value="${flags[i + 1]:-}"
  case "${flags[i]}" in
    -h | --help) exec "$python" "$here/train_llava.py" --help ;;
    --stage) stages="$value" ;;
    --stage=*) stages="${flags[i]#*=}" ;;
    --dry_run | --dry-run) dry_run=true ;;
    --data_path | --data-path) both_on_one=true own_data=true ;;
    --*.data_path | --*.data-path) own_data=true ;;
    --output_dir | --output-dir) output_dir="$value" ;;
    --vision | --vision_tower | --vision-tower) vision="$value" ;;
    --device) device="$value" ;;
  esac
done
if [ "$stages" = "1 2" ] && [ "$both_on_one" = true ]; then
  echo "error: both stages on one --data_path would be wrong (captions, then conversations): name the stage with" \
    "--stage 1 or 2, or give --align.data_path and --instruct.data_path (and their image_folder)" >&2
  exit 2
fi

gpus="${NUM_GPUS:-}"
if [ -z "$gpus" ] && [ "$device" != cpu ] && command -v nvidia-smi >/dev/null; then
  gpus="$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)"
fi
launch=("$python")
if [ "${gpus:-1}" -gt 1 ]; then
  launch=("$python" -m deepspeed.launcher.runner --num_gpus "$gpus")
fi

both=()
if [ "$stages" = "1 2" ]; then both=(--both_stages); fi # one command line for two stages: each passes over the other's
for stage in $stages; do
  "${launch[@]}" "$here/train_llava.py" "$@" --stage "$stage" ${both[@]+"${both[@]}"}
done
# The demo's questions say nothing about a model that was trained on other data.
if [ "$dry_run" = false ] && [ "$stages" != 1 ] && [ "$own_data" = false ]; then
  kind="${vision%%:*}"
  case "$kind" in */*) kind=hf ;; esac # openai/clip-… is hf:openai/clip-…
  "$python" "$here/evaluate_llava.py" --model "${output_dir:-runs/llava-$kind}/model" --device "$device"
fi
