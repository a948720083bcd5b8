#!/usr/bin/env bash
# The main job on real weights, with all its own set-up: exports all-MiniLM-L6-v2 and SmolLM2-135M-Instruct,
# embeds, generates, and compares both with eager PyTorch. At most 10 minutes on two cores. Safe to run twice.
# Settings: see scripts/install.sh
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh export gguf accelerate  # transformers reads GGUF files with both
exec .venv/bin/python scripts/quickstart.py "$@"
