#!/usr/bin/env bash
# Train a LLaVA-style model on an encoder: stage 1, stage 2, and on the demo data or captions the evaluation.
#
#   bash scripts/train_llava.sh --vision clips                  # the newest CLIPS export; also clip, random, blind, hf:…
#   bash scripts/train_llava.sh --vision clips:runs/mine --data_path my.csv   # captions: a model that describes
#   bash scripts/train_llava.sh --vision clips --stage 2 --lora_enable --data_path my.json --image_folder pictures
#   bash scripts/train_llava.sh --vision clips --dry-run        # the two commands and the plan, nothing is trained
#   bash scripts/train_llava.sh --help                          # every flag with its default
#
# The same command again resumes a stopped run. Flags carry LLaVA's names. --align.FLAG and --instruct.FLAG count in one
# stage only. NUM_GPUS=N sets the number of GPUs (default: all); without GPUs it sets the number of processes.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-python}"
if [ -z "${PYTHON:-}" ] && [ -x "$here/../.venv/bin/python" ]; then python="$here/../.venv/bin/python"; fi

stages="1 2" dry_run=false own_data=false output_dir="" vision=clips device=auto
flags=("$@")
for ((i = 0; i < ${#flags[@]}; i++)); do
  flag="${flags[i]}" value="${flags[i + 1]:-}"
  case "$flag" in --*=*) value="${flag#*=}" flag="${flag%%=*}" ;; esac
  case "${flag//-/_}" in # --data-path is --data_path
    _h | __help) exec "$python" "$here/train_llava.py" --help ;;
    __stage) stages="$value" ;;
    __dry_run) dry_run=true ;;
    __data_path | __*.data_path | __karpathy | __*.karpathy) own_data=true ;;
    __output_dir) output_dir="$value" ;;
    __vision | __vision_tower) vision="$value" ;;
    __device) device="$value" ;;
  esac
done

gpus="${NUM_GPUS:-}"
if [ -z "$gpus" ] && [ "$device" != cpu ] && command -v nvidia-smi >/dev/null; then
  gpus="$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)"
fi
launch=("$python")
if [ "${gpus:-1}" -gt 1 ]; then # on a free port, for another training on this machine may have deepspeed's own
  port="$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')"
  launch+=(-m deepspeed.launcher.runner --hostfile none --num_gpus "$gpus" --master_port "$port")
fi

# The demo's questions say nothing about a model that was trained on other data.
evaluates=false
if [ "$dry_run" = false ] && [ "$stages" != 1 ] && [ "$own_data" = false ]; then evaluates=true; fi

both=()
if [ "$stages" = "1 2" ]; then both=(--both_stages); fi # each stage ignores the other stage's flags
for stage in $stages; do
  goes_on="${CLIPS_MLLM_GOES_ON:-}"
  if [ "$evaluates" = true ] || [ "$stage" != "${stages##* }" ]; then goes_on=1; fi # then no next step is named
  CLIPS_MLLM_GOES_ON="$goes_on" "${launch[@]}" "$here/train_llava.py" "$@" --stage "$stage" ${both[@]+"${both[@]}"}
done
kind="${vision%%:*}"
case "$kind" in */*) kind=hf ;; esac # openai/clip-… is hf:openai/clip-…
run="${output_dir:-runs/llava-$kind}"
# Of a model that learned captions the run holds images that it has not seen.
if [ "$dry_run" = false ] && [ "$stages" != 1 ] && [ -f "$run/held_out/description.jsonl" ]; then evaluates=true; fi
if [ "$evaluates" = true ]; then
  "$python" "$here/evaluate_llava.py" --model "$run/model" --device "$device"
fi
