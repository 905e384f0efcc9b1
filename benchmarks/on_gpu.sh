#!/usr/bin/env bash
# Builds in place, tests and measures on a machine with an NVIDIA GPU, and ends with a short table.
#
#     benchmarks/on_gpu.sh [OUT [STEP ...]]     # results and logs into OUT (default: build/gpu_results); default: every step
#
# Needs a C++17 compiler, CMake, nvcc, and a Python ($PYTHON, default python3) with CuPy, NumPy, pybind11, safetensors,
# tqdm, pytest and hypothesis; nothing is installed or fetched. Where there is PyTorch, it is measured beside. Training
# takes CIFAR-10 from $TINYRES_DATA, else the built-in shapes10. Every step has a time limit, 28 minutes in all, and
# leaves a log in OUT; a step that fails does not stop the others, but shows in the table and in the exit status.
set -u
cd "$(dirname "$0")/.."
mkdir -p "${1:-build/gpu_results}" || exit 2
out=$(cd "${1:-build/gpu_results}" && pwd)
shift $(($# > 0))
only=" $* "
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
programs=build/gpu_programs
failed=0

step() { # step NAME SECONDS COMMAND...
  local name=$1 limit=$2 began=$SECONDS status=0 word=ok
  shift 2
  [[ $only == "  " || $only == *" $name "* ]] || return 0
  echo "$name ..."
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
  if [ "$status" -ne 0 ]; then
    failed=1
    word="failed ($status)"
    [ "$status" -eq 124 ] && word="over ${limit} s"
    tail -n 15 "$out/$name.log"
  fi
  printf '%-16s %-14s %4d s\n' "$name" "$word" "$((SECONDS - began))" >>"$out/steps.txt"
}

build_and_run_programs() { # every tests/cuda/*_test.cu, each a program that ends with 0 when its kernels are right
  local source program failed=0
  rm -rf "$1"
  mkdir -p "$1"
  for source in tests/cuda/*_test.cu; do
    echo "$source" "$1/$(basename "$source" .cu)"
  done | xargs -P "$(nproc)" -L 1 sh -c \
    'nvcc -std=c++17 -arch=native -lineinfo -Icsrc -Itests/cuda "$0" -o "$1" || exit 1' # 255 would stop xargs
  for source in tests/cuda/*_test.cu; do
    program=$1/$(basename "$source" .cu)
    echo "$program"
    timeout 60 "$program" || { echo "FAILED: $program" && failed=1; }
  done
  return "$failed"
}

sanitize_programs() { # tool, programs' folder, names: those that were built
  local name status=0
  for name in "${@:3}"; do
    [ -x "$2/$name" ] || continue
    compute-sanitizer --tool "$1" --error-exitcode 1 "$2/$name" || status=1
  done
  return "$status"
}
export -f build_and_run_programs sanitize_programs

[ $# -gt 0 ] || : >"$out/steps.txt"
against=torch
"$python" -c 'import torch' 2>/dev/null || against=none
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d .)

step machine 20 bash -c 'nvidia-smi && nvcc --version && lscpu && "$0" --version && "$0" -m pip list' "$python"
step build 200 bash -c 'cmake -S . -B build/in_place -DTINYRES_CUDA=ON -DPython_EXECUTABLE="$(command -v "$0")" \
  ${1:+-DCMAKE_CUDA_ARCHITECTURES=$1} -DCMAKE_BUILD_TYPE=Release -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/tinyres" &&
  cmake --build build/in_place --parallel "$(nproc)"' "$python" "$capability"
step programs 130 bash -c 'build_and_run_programs "$0"' "$programs"
step tests_on_gpu 180 "$python" -m pytest -q -p no:cacheprovider -k cuda --ignore=tests/test_cuda.py tests
step limits 50 "$python" benchmarks/limits.py --device cuda --json "$out/limits.json"
step train_step 120 "$python" benchmarks/train_step.py --device cuda --steps 20 --against "$against" \
  --json "$out/train_step.json"
step kernels 150 "$python" benchmarks/kernels.py --device cuda --rounds 5 --against "$against" \
  --json "$out/kernels.json"
step whole_step 90 "$python" benchmarks/whole_step.py --json "$out/whole_step.json"
step whole_step_1024 30 "$python" benchmarks/whole_step.py --depths 20 --batch-sizes 1024 --precisions bfloat16 \
  --json "$out/whole_step_1024.json"
step whole_step_50 45 "$python" benchmarks/whole_step.py --depths 50 --batch-sizes 256 --precisions bfloat16 \
  --json "$out/whole_step_50.json"
for conv in naive tiled mma direct; do # the ladder of convolutions
  step "conv_$conv" 35 "$python" benchmarks/kernels.py conv2d --device cuda --rounds 3 --conv "$conv" \
    --against "$against" --json "$out/conv_$conv.json"
done
step training 100 "$python" examples/cifar_resnet.py --device cuda --recipe quick --precision bfloat16 \
  --out "$out/training"
if [ "$against" = torch ]; then
  step torch_gpu 120 "$python" benchmarks/peers/torch_gpu.py --depths 20 56 110 --json "$out/torch_gpu.json"
  step torch_gpu_1024 30 "$python" benchmarks/peers/torch_gpu.py --depths 20 --batch-size 1024 \
    --json "$out/torch_gpu_1024.json"
  step torch_gpu_50 60 "$python" benchmarks/peers/torch_gpu.py --depths 50 --batch-size 256 \
    --json "$out/torch_gpu_50.json"
fi
if command -v compute-sanitizer >/dev/null; then
  step memcheck 50 bash -c 'sanitize_programs memcheck "$@"' bash "$programs" elementwise_test conv2d_test \
    batch_norm_test reduce_test
  step racecheck 50 bash -c 'sanitize_programs racecheck "$@"' bash "$programs" matmul_test conv2d_test \
    batch_norm_test reduce_test
else
  echo "no compute-sanitizer here" | tee -a "$out/steps.txt"
fi
step other_tests 60 "$python" -m pytest -q -p no:cacheprovider -k "not cuda and not emulated" \
  --ignore=tests/test_nvcc.py tests

echo
cat "$out/steps.txt"
results=("$out"/*.json)
[ -e "${results[0]}" ] && echo && "$python" benchmarks/report.py --headlines "${results[@]}"
[ -e "$out/training/metrics.jsonl" ] && echo "training         $(tail -n 1 "$out/training/metrics.jsonl")"
exit "$failed"
