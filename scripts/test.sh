#!/usr/bin/env bash
# Install what is missing, then lint, check the types and run every test. Arguments go to pytest:
#
#   bash scripts/test.sh                    # everything
#   bash scripts/test.sh -m "not slow"      # only what takes seconds
#   bash scripts/test.sh -n 0 -k captioner  # in one process: for a debugger, or a few tests
#
# With CI=true a test that is skipped for want of a package counts as failed (tests/conftest.py).
set -euo pipefail
# shellcheck source=scripts/install.sh
. "$(dirname "${BASH_SOURCE[0]}")/install.sh"

export PIP_NO_COMPILE=1 # of the packages' files, those that are imported are compiled then
install demo chat video dev
trap wait EXIT
{ install_bench; install_programs; } & # beside the linters, which take one core
ruff check .
ruff format --check .
rm -f mllm/chat/*.pyi # gradio writes them; a stale one misleads mypy
mypy
wait $!
# Two processes, a file to each: the machine of the checks has two cores. In the order of the folders, so that the long
# files (dist, e2e) come first and both processes end together.
exec python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 25 "$@"
