#!/usr/bin/env bash
# Installs what the tests need and runs them all. Half an hour on two cores. Safe to run twice.
# Arguments go to pytest. Settings: see scripts/install.sh, and
#   ACCEL_TEST_WORKERS  processes that share the tests (default 2; 0: none but pytest itself)
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh dev
export HF_HUB_OFFLINE=1
exec .venv/bin/python -m pytest --numprocesses "${ACCEL_TEST_WORKERS:-2}" "$@"
