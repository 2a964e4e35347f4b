#!/usr/bin/env bash
# From nothing to a chatting model on the demo data: pretrained encoder, LLaVA-style model, both measured. Run again, it
# goes on where it stopped.
#
#   bash scripts/quickstart.sh
#
# Needs Python ≥ 3.10 and a network that pip can use. VENV, PYTHON, TORCH_INDEX: see scripts/install.sh. OMP_NUM_THREADS:
# threads of all training processes together (default: the physical cores). SEED: of both trainings (default: 0).
set -euo pipefail
# shellcheck source=scripts/install.sh
. "$(dirname "${BASH_SOURCE[0]}")/install.sh"

for place in . data runs; do
  [ ! -e "$place" ] || [ -w "$place" ] ||
    fail "you cannot write to $PWD/$place, which another user owns perhaps: clone the repository into a folder of yours"
done
echo "== 1. install"
install demo chat
if [ -z "${OMP_NUM_THREADS:-}" ]; then OMP_NUM_THREADS="$(physical_cores)"; fi
export OMP_NUM_THREADS
SEED="${SEED:-0}"
echo "using OMP_NUM_THREADS=$OMP_NUM_THREADS (set it lower on a machine that is busy with something else)"

export CLIPS_MLLM_GOES_ON=1 # its steps name no next step: the next one is the quickstart's
echo "== 2. demo data"
python scripts/build_demo_data.py

echo "== 3. pretrain, evaluate, export and report"
pretrain=(scripts/pretrain_clips.py --set "train.seed=$SEED")
if [ "$OMP_NUM_THREADS" -gt 1 ] && ! nvidia-smi -L >/dev/null 2>&1; then
  # Two ranks of half of the cores each: the demo's matrices are too small for threads (docs/speed.md).
  # A free port, for another training on this machine may have deepspeed's own.
  port="$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')"
  OMP_NUM_THREADS=$((OMP_NUM_THREADS / 2)) \
    python -m deepspeed.launcher.runner --hostfile none --num_gpus 2 --master_port "$port" "${pretrain[@]}"
else # one core, or GPUs, of which the demo's model is worth one only
  python "${pretrain[@]}"
fi

echo "== 4. plug it into a language model: align, instruct, ask the held-out questions"
NUM_GPUS=1 PYTHON="$venv/bin/python" bash scripts/train_llava.sh --vision clips --seed "$SEED"

python -c "from mllm.evaluation.summary import print_summary; print_summary()"
cat <<NEXT

Next: talk to the model: cd $(printf %q "$PWD") && source $(printf %q "$venv/bin/activate") && python scripts/chat.py --web
NEXT
