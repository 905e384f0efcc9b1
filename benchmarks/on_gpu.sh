#!/usr/bin/env bash
# Builds in place, tests and measures on a machine with a GPU.
#
#     benchmarks/on_gpu.sh [OUT]        # results and logs into OUT (default: gpu_results)
#
# Needs a C++17 compiler, CMake, and a Python ($PYTHON, default python3) with NumPy, pybind11 and pytest; with PyTorch
# it measures that too. Every step runs under a time limit and leaves a log; a failed step does not stop the others,
# but shows in the exit status.
set -u
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-gpu_results}" && cd "${1:-gpu_results}" && pwd)
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
failed=0

step() { # step NAME SECONDS COMMAND...
  local name=$1 limit=$2 began=$SECONDS status=0
  shift 2
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
  echo "$name: status $status, $((SECONDS - began)) s" | tee -a "$out/steps.txt"
  if [ "$status" -ne 0 ]; then
    failed=1
    tail -n 15 "$out/$name.log"
  fi
}

: >"$out/steps.txt"
step machine 30 bash -c 'nvidia-smi; lscpu; "$0" --version' "$python"
step configure 60 cmake -S . -B build/in_place -DPython_EXECUTABLE="$(command -v "$python")" \
  -DCMAKE_BUILD_TYPE=Release -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/tinyres"
step build 300 cmake --build build/in_place --parallel
step tests 480 "$python" -m pytest -q tests
if "$python" -c 'import torch' 2>/dev/null; then
  step torch_gpu 540 "$python" benchmarks/peers/torch_gpu.py --json "$out/torch_gpu.json"
  step train_step 240 "$python" benchmarks/train_step.py --threads 8 --json "$out/train_step.json"
else
  echo "no PyTorch here: its figures are left out" | tee -a "$out/steps.txt"
  step train_step 120 "$python" benchmarks/train_step.py --threads 8 --against none --json "$out/train_step.json"
fi
exit "$failed"
