#!/usr/bin/env bash
# `make gpu`: on a machine with a CUDA device and without a network, build the extension for that device, run the GPU
# tests, compute-sanitizer and the benchmarks, in under nine minutes. Nothing is installed into the environment: the
# package goes to build/gpu/site. A part that fails does not stop the next; the exit status is 1 if any failed.
#
# PYTHON: the interpreter (default python3) with torch, triton, scikit-build-core and nanobind. OUT: a folder that
# receives the logs and the results, if set.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
root=$PWD
python=${PYTHON:-python3}
folder=$root/build/gpu
site=$folder/site
mkdir -p "$folder/logs" "$folder/results"
rm -f "$folder"/logs/* "$folder"/results/*
export PATH=$PATH:/usr/local/cuda/bin
# The installed package in front of the sources, which hold no extension; the working directory on the path only here.
export PYTHONSAFEPATH=1 PYTHONPATH=$site:$root:$root/tests PYTHONUNBUFFERED=1
if [ -z "${FASTDENSITY_COMMIT:-}" ] && commit=$(git describe --always --dirty 2>/dev/null); then
  export FASTDENSITY_COMMIT=$commit
fi
summary=()
failed=0

# part NAME SECONDS COMMAND...: runs, logs, and remembers how it went
part() {
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  echo "== $name"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$folder/logs/$name.log"
  status=${PIPESTATUS[0]}
  [ "$status" -eq 0 ] || failed=1
  summary+=("$(printf '%-10s status %3d %4d s' "$name" "$status" $((SECONDS - start)))")
}

skip() {
  echo "== $1: skipped, $2"
  summary+=("$(printf '%-10s skipped: %s' "$1" "$2")")
}

describe() {
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv || true
  nvcc --version | tail -2
  "$python" -c 'import sys, torch; print(sys.version); print("torch", torch.__version__, torch.version.cuda)'
  "$python" -c 'import torch; print(torch.cuda.get_device_name(), torch.cuda.get_device_capability())'
}

build() {
  local architecture
  architecture=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || return
  echo "building for sm_$architecture"
  "$python" -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --no-index --upgrade \
    --target "$site" . -C "build-dir=build/gpu/$architecture" -C wheel.py-api= \
    -C cmake.define.FASTDENSITY_CUDA=ON -C cmake.define.FASTDENSITY_SPLIT=OFF \
    -C "cmake.define.CMAKE_CUDA_ARCHITECTURES=$architecture-real" || return
  "$python" -c 'import sys, fastdensity._native as n; print(n.__file__, n.build)
if not (n.has_cuda and n.__file__.startswith(sys.argv[1])): sys.exit("an editable install hides this build: uninstall it")' "$site"
}

gpu_tests() {
  local files
  mapfile -t files < <(grep -l 'mark\.gpu' tests/*.py)
  [ "${#files[@]}" -gt 0 ] || { echo "no test is marked gpu"; return 1; }
  "$python" -m pytest -m gpu --durations=5 "${files[@]}"
}

sanitize() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 1 --print-limit 20 \
    "$python" tests/run_sanitized_gpu.py
}

# benchmarks/results holds the last run on each device in which nothing was wrong
benchmark() {
  "$python" -m benchmarks.gpu --budget "$1" --out "$folder/results" && cp "$folder"/results/*.json benchmarks/results/
}

benchmark_jvp() {
  "$python" -m benchmarks.gpu_jvp --budget "$1" --out "$folder/results" && cp "$folder"/results/*-jvp.json benchmarks/results/
}

export -f describe build gpu_tests sanitize benchmark benchmark_jvp
export python folder site
part device 40 bash -c describe
part build 130 bash -c build
part tests 150 bash -c gpu_tests
if command -v compute-sanitizer >/dev/null; then
  part memcheck 60 bash -c 'sanitize memcheck'
  part racecheck 60 bash -c 'sanitize racecheck'
else
  skip sanitizer "compute-sanitizer is not installed"
fi
# what is left of 530 seconds, at least a minute for the rows and half a minute for jvp
budget=$((390 - SECONDS > 60 ? 390 - SECONDS : 60))
part benchmark $((budget + 30)) bash -c "benchmark $((budget < 150 ? budget : 150))"
budget=$((480 - SECONDS > 30 ? 480 - SECONDS : 30))
part jvp $((budget + 50)) bash -c "benchmark_jvp $((budget < 90 ? budget : 90))"

printf '\n'
printf '%s\n' "${summary[@]}" | tee "$folder/logs/summary.log"
if [ -n "${OUT:-}" ]; then
  mkdir -p "$OUT"
  cat "$folder"/logs/*.log >"$OUT/gpu.log"
  cp "$folder"/results/*.json "$OUT/" 2>/dev/null || true
fi
exit "$failed"
