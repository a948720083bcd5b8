#!/usr/bin/env bash
# Creates the virtual environments of the benchmark's peers under .cache/peers/ (safe to run twice).
# Usage: scripts/peers.sh [current] [optimum] [openvino]      (default: all three)
#
# The peers need versions of transformers that exclude one another, hence one environment each:
#   current   transformers 5.23: sentence-transformers (torch), plain ONNX Runtime, transformers' own exporter,
#             onnxruntime-genai, CTranslate2
#   optimum   transformers 4.57.6: ONNX Runtime O2 (optimum-onnx), sentence-transformers' ONNX backend
#   openvino  transformers 5.5.4: OpenVINO (optimum-intel)
# torch goes in first, alone and pinned, so that the packages after it cannot pull another (GPU) build.
# An environment that fails to install leaves its reason in .cache/peers/NAME.failed; the benchmark reports it.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
ROOT=.cache/peers
TORCH=torch==2.13.0
mkdir -p "$ROOT"

packages() {
  case $1 in
    current) echo "transformers==5.23.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 \
      onnxruntime-genai==0.18.0 ctranslate2==4.8.5 sentence-transformers==6.2.0" ;;
    optimum) echo "transformers==4.57.6 optimum==2.1.0 optimum-onnx==0.1.0 onnx==1.23.2 onnxruntime==1.32.0 \
      sentence-transformers==5.7.0" ;;
    openvino) echo "transformers==5.5.4 optimum-intel==2.2.0 openvino==2026.4.1 nncf==3.4.0" ;;
    *) echo "unknown environment '$1': choose among current, optimum, openvino" >&2; return 2 ;;
  esac
}

create() {
  local name=$1 wanted venv=$ROOT/$1 log=$ROOT/$1.log
  wanted=$(packages "$name") || return 2
  wanted="$TORCH $(echo $wanted)"
  if [ -f "$venv/installed" ] && [ "$(cat "$venv/installed")" = "$wanted" ]; then
    echo "$name: up to date"; return 0
  fi
  echo "$name: installing (log in $log)"
  rm -rf "$venv" "$ROOT/$name.failed"
  # The last step: a torchvision built for another torch breaks transformers' import; no peer needs it.
  if { "$PYTHON" -m venv "$venv" \
       && "$venv/bin/python" -m pip install --no-input "$TORCH" \
       && "$venv/bin/python" -m pip install --no-input $wanted \
       && "$venv/bin/python" -m pip uninstall --yes torchvision; } >"$log" 2>&1; then
    echo "$wanted" > "$venv/installed"
    echo "$name: ready"
  else
    grep -E '^ERROR' "$log" | tail -n 3 > "$ROOT/$name.failed"
    [ -s "$ROOT/$name.failed" ] || tail -n 3 "$log" > "$ROOT/$name.failed"
    echo "$name: FAILED"; cat "$ROOT/$name.failed"; return 1
  fi
}

status=0
for name in ${@:-current optimum openvino}; do create "$name" || status=1; done
exit $status
