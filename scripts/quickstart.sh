#!/usr/bin/env bash
# Pretrain an encoder, plug it into a LLaVA-style model, and evaluate both. The same command continues where it stopped.
#
#
#   bash scripts/quickstart.sh           # on the demo's drawn scenes
#   bash scripts/quickstart.sh photos    # on photographs of 44,072 products, 270 MB from the Hugging Face hub
#
# It needs Python ≥ 3.10 and a network for pip. VENV, PYTHON and TORCH_INDEX are those of scripts/install.sh.
# OMP_NUM_THREADS: threads of all training processes together (default: the physical cores). SEED: of both trainings
# (default: 0). PHOTOS: a folder with the hub's tables, or with fashion-train.tar and fashion-test.tar, whose JSON has
# the same columns, but `name` for productDisplayName (default: the tables are downloaded to data/fashion).
set -euo pipefail
# shellcheck source=scripts/install.sh
. "$(dirname "${BASH_SOURCE[0]}")/install.sh"

what="${1:-demo}"
case "$what" in demo | photos) ;; *) fail "$what is not known: bash scripts/quickstart.sh [photos]" ;; esac

# Make captions for pretraining and questions for the language model from photographs of products and their attributes.
photos() {
  local folder="${PHOTOS:-data/fashion}" rows name said
  if [ -z "${PHOTOS:-}" ] && [ ! -e data/fashion/whole ]; then
    echo "downloading 270 MB to data/fashion"
    said="$(python "$venv/bin/hf" download --quiet --repo-type dataset --local-dir data/fashion \
      ashraq/fashion-product-images-small --revision bd09c69e56fc0b1f279743fef89d735f3bdf8a42 2>&1)" ||
      fail "no photographs from the Hugging Face hub. $(grep -Em 1 '^[A-Za-z.]*Error: ' <<<"$said" || tail -n 1 <<<"$said")
Mend it, set PHOTOS=DIR, or run the demo on drawings: bash scripts/quickstart.sh"
    touch data/fashion/whole
  fi
  rows=(--data "$folder" --held-out 0.03)
  name=productDisplayName
  if [ -e "$folder/fashion-train.tar" ]; then
    # By name, because 23 photographs show products of both splits.
    rows=(--data "$folder/fashion-train.tar" --test-data "$folder/fashion-test.tar" --key image)
    name=name
  fi
  python scripts/build_questions.py "${rows[@]}" --output data/photos --limit 8000 --pack --caption "$name" \
    --long "A photo of {baseColour} {articleType} for {gender}, {usage}, {season} {year}." \
    --columns articleType baseColour gender usage \
    --ask articleType="What kind of product is this?" baseColour="What colour is this product?" \
    gender="Who is this product for?" usage="What is this product for?"
}

# run COMMAND…: run a step in a process group of its own, pass signals on to it, wait for it, and return its exit code.
run() {
  local code name step
  set -m
  "$@" &
  step=$!
  set +m
  # shellcheck disable=SC2064
  for name in HUP INT TERM; do trap "kill -s $name -- -$step" "$name"; done
  while :; do
    code=0
    wait "$step" || code=$? # a signal ends it early
    kill -0 "$step" 2>/dev/null || break
  done
  trap - HUP INT TERM
  return "$code"
}

echo "== 1. install"
install demo chat
if [ -z "${OMP_NUM_THREADS:-}" ]; then # more threads than physical cores make the small matrices here slower
  OMP_NUM_THREADS="$(python -c 'from joblib import cpu_count; print(cpu_count(only_physical_cores=True))')"
fi
export OMP_NUM_THREADS
SEED="${SEED:-0}"
echo "using OMP_NUM_THREADS=$OMP_NUM_THREADS (set a lower number if the machine is busy with other work)"

export CLIPS_MLLM_GOES_ON=1 # its steps print no next step, because the quickstart prints one
echo "== 2. data"
pretrain=(scripts/pretrain_clips.py --set "train.seed=$SEED")
llava=(--vision clips --seed "$SEED")
chat=(python scripts/chat.py --web)
if [ "$what" = demo ]; then
  run python scripts/build_demo_data.py
else
  photos
  # Less than half of the samples of `small`, and more steps than `--small`, because a step asks fewer questions than
  # the demo's. It takes about as long as the demo.
  pretrain+=(--name photos --samples 72000 --data data/photos/train.tar --test-data data/photos/test.tar)
  llava=(--vision clips:runs/photos --seed "$SEED" --output_dir runs/llava-photos --small)
  llava+=(--image_folder data/photos/train.tar)
  llava+=(--align.data_path data/photos/align.json --instruct.data_path data/photos/instruct.json)
  llava+=(--instruct.max_steps 720)
  chat+=(--model runs/llava-photos/model)
fi

echo "== 3. pretrain, evaluate, export and report"
if [ "$OMP_NUM_THREADS" -gt 1 ] && [ "$(python -c 'import torch; print(torch.cuda.device_count())')" = 0 ]; then
  # Two ranks with half of the cores each, because the demo's matrices are too small for threads (docs/hardware.md).
  OMP_NUM_THREADS=$((OMP_NUM_THREADS / 2)) \
    run python -m clips.common.launch --standalone --nproc-per-node 2 "${pretrain[@]}"
else # one core, or GPUs, of which the demo's small model needs only one
  run python "${pretrain[@]}"
fi

echo "== 4. plug it into a language model: align, instruct, ask the held-out questions"
NUM_GPUS=1 PYTHON="$venv/bin/python" run bash scripts/train_llava.sh "${llava[@]}"

if [ "$what" = photos ]; then
  run python scripts/evaluate_llava.py --model runs/llava-photos/model --questions data/photos/question.jsonl \
    --image-folder data/photos/test.tar
fi
python -c "from mllm.evaluation.summary import print_summary; print_summary('$what')"
cat <<NEXT

Next: talk to the model: cd $(printf %q "$PWD") && source $(printf %q "$venv/bin/activate") && ${chat[*]}
NEXT
