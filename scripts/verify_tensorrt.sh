#!/usr/bin/env bash
# Builds TensorRT engines of two real models for the GPU of this machine, runs them, compares them with eager PyTorch
# and prints a table. Does all its own set-up; safe to run twice. On a machine without a supported GPU it builds
# TensorRT-RTX engines for sm86 and says that nothing was executed (exit code 2).
#   scripts/verify_tensorrt.sh            TensorRT-RTX (GeForce and RTX GPUs, from Turing on)
#   scripts/verify_tensorrt.sh tensorrt   full TensorRT (also datacentre GPUs); its packages come from NVIDIA's index
# The packages are those for CUDA 13, with a driver older than 580 those for CUDA 12.
# Exit codes: 0 all ran and agrees with eager PyTorch; 1 something is wrong; 2 there is no GPU to run on.
# Settings: see scripts/install.sh
set -euo pipefail
cd "$(dirname "$0")/.."
target=${1:-rtx}
driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 | cut -d. -f1) || driver=
cuda=13
if [[ $driver =~ ^[0-9]+$ ]] && [ "$driver" -lt 580 ]; then cuda=12; fi # CUDA 13 needs driver 580
full=tensorrt bindings="cuda-python>=12.8"
if [ "$cuda" = 12 ]; then full=tensorrt-cu12 bindings="cuda-python>=12.8,<13"; fi
case $target in
  rtx) packages="tensorrt-rtx-cu$cuda>=1.7 $bindings" ;;
  tensorrt)
    if ! [[ $driver =~ ^[0-9]+$ ]]; then # before gigabytes are installed for nothing
      echo "TensorRT builds engines with the GPU that they are for, and nvidia-smi finds none here." >&2
      echo "Run this on the machine with the GPU. TensorRT-RTX builds without one: $0 rtx" >&2
      exit 2
    fi
    packages="$full>=10.15.1 $bindings" ;;
  *) echo "usage: $0 [rtx|tensorrt]" >&2; exit 64 ;;
esac
# shellcheck disable=SC2086  (two requirements)
bash scripts/install.sh export gguf accelerate $packages
exec .venv/bin/python scripts/verify_tensorrt.py --target "$target"
