#!/usr/bin/env bash
# From nothing to a chatting model on the demo data: pretrained encoder, LLaVA-style model, both measured. Run again, it
# goes on where it stopped.
#
#   bash scripts/quickstart.sh
#
# Needs Python ≥ 3.10 and a network that pip can use. VENV, PYTHON: see scripts/install.sh. OMP_NUM_THREADS: threads of
# all training processes together (default: the physical cores).
set -euo pipefail
# shellcheck source=scripts/install.sh
. "$(dirname "${BASH_SOURCE[0]}")/install.sh"

echo "== 1. install"
install demo chat
if [ -z "${OMP_NUM_THREADS:-}" ]; then OMP_NUM_THREADS="$(physical_cores)"; fi
export OMP_NUM_THREADS
echo "using OMP_NUM_THREADS=$OMP_NUM_THREADS (set it lower on a machine that is busy with something else)"

echo "== 2. demo data"
python scripts/build_demo_data.py

echo "== 3. pretrain, evaluate, export and report"
if [ "$OMP_NUM_THREADS" -gt 1 ] && ! nvidia-smi -L >/dev/null 2>&1; then
  # Two ranks of half of the cores each: the demo's matrices are too small for threads (docs/speed.md).
  OMP_NUM_THREADS=$((OMP_NUM_THREADS / 2)) python -m deepspeed.launcher.runner --num_gpus 2 scripts/pretrain_clips.py
else # one core, or GPUs, of which the demo's model is worth one only
  python scripts/pretrain_clips.py
fi

echo "== 4. plug it into a language model: align, instruct, ask the held-out questions"
NUM_GPUS=1 bash scripts/train_llava.sh --vision clips

figures="$(python - <<'PYTHON'
import json
from pathlib import Path

from clips.common.rundir import UNSEEN, by_test_set

encoder = by_test_set(json.loads(Path("runs/demo/evaluation.json").read_text())["figures"], "seen")
answers = json.loads(Path("runs/llava-clips/evaluation/figures.json").read_text())
model = {"seen": answers, UNSEEN: answers.get(UNSEEN)}
for artists in (UNSEEN, "seen"):
    if artists in encoder:
        found = {name: figure["value"] for name, figure in encoder[artists].items()}
        right = model[artists]["exact_match"]["overall"]
        print(
            f"  drawn by {artists} artists: encoder: sentence R@1 {found['sentence_i2t_r1']:.1f} / "
            f"{found['sentence_t2i_r1']:.1f} %, zero-shot {found['zero_shot_top1']:.1f} %; "
            f"model: {right['accuracy']:.1%} of {right['n']:,} held-out questions"
        )
if UNSEEN not in encoder:
    print("  the test of unseen artists is missing: no npm could fetch their drawings (data/demo/README.md)")
PYTHON
)"
cat <<NEXT

Everything is done: runs/demo holds an encoder, runs/llava-clips a model that talks about pictures.
$figures

Next:
  cd $PWD && source $venv/bin/activate
  look at                    runs/demo/report/index.html, runs/llava-clips/curves.png
  talk to the model          python scripts/chat.py --image data/llava_demo/images/unseen-000000.jpg
  the same as a web page     python scripts/chat.py --web
  compare with plain CLIP    deepspeed scripts/pretrain_clips.py --recipe clip_baseline
  train on your own data     README.md, 'Your own data'
  run the tests              bash scripts/test.sh
NEXT
