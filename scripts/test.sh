#!/usr/bin/env bash
# Install what is missing, then lint, check the types and run every test. Arguments go to pytest:
#
#   bash scripts/test.sh                    # everything
#   bash scripts/test.sh -m "not slow"      # only what takes seconds
#
# With CI=true a test that is skipped for want of a package counts as failed (tests/conftest.py).
set -euo pipefail
# shellcheck source=scripts/install.sh
. "$(dirname "${BASH_SOURCE[0]}")/install.sh"

install demo chat dev
install_bench
install_programs
ruff check .
ruff format --check .
mypy
exec python -m pytest "$@"
