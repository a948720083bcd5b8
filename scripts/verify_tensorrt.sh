#!/usr/bin/env bash
# Builds TensorRT engines of two real models for the GPU of this machine, runs them, compares them with eager PyTorch
# and prints a table. Does all its own set-up; safe to run twice. On a machine without a supported GPU it builds
# TensorRT-RTX engines for sm86 and says that nothing was executed (exit code 2).
#   scripts/verify_tensorrt.sh            TensorRT-RTX (GeForce and RTX GPUs, from Turing on)
#   scripts/verify_tensorrt.sh tensorrt   full TensorRT (also datacentre GPUs); its packages come from NVIDIA's index
# Settings: see scripts/install.sh
set -euo pipefail
cd "$(dirname "$0")/.."
target=${1:-rtx}
case $target in
  rtx) packages="tensorrt-rtx-cu13>=1.7 cuda-python>=12.8" ;;
  tensorrt) packages="tensorrt>=10.15.1 cuda-python>=12.8" ;;
  *) echo "usage: $0 [rtx|tensorrt]" >&2; exit 64 ;;
esac
# shellcheck disable=SC2086  (two requirements)
bash scripts/install.sh export gguf accelerate $packages
exec .venv/bin/python scripts/verify_tensorrt.py --target "$target"
