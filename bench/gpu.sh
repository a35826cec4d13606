#!/usr/bin/env bash
# Everything that needs a GPU, in less than ten minutes: builds, tests, sanitises, tunes and measures.
# Usage: bench/gpu.sh FOLDER      (PYTHON=python names another interpreter)
# Each step writes FOLDER/STEP.log, has its own time limit, and does not stop the others; summary.txt has the exit codes
# (124: out of time). Together they end after 570 seconds at the latest.
set -uo pipefail
[ $# = 1 ] || { echo "usage: $0 FOLDER" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export SPNET_EXPERIMENTAL_CUDA=1 SPNET_EXPERIMENTAL_CUDA_BATCH=1 SPNET_EXPERIMENTAL_CUDA_WALK=1
# No interrupt reaches Python while it waits for a kernel that never ends: the stacks say before who does.
export PYTHONUNBUFFERED=1 PYTEST_ADDOPTS="-vv --durations=10 -o faulthandler_timeout=45"
: >"$out/summary.txt"
failed=0

step() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 begin=$SECONDS left=$((550 - SECONDS)) code=0
  shift 2
  limit=$((left < 1 ? 1 : left < limit ? left : limit))
  # An interrupt first: pytest then still reports and writes what it has.
  timeout --signal=INT --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 </dev/null || code=$?
  [ "$code" = 0 ] || failed=1
  printf '%-12s exit %3d, %3d of %3d s\n' "$name" "$code" $((SECONDS - begin)) "$limit" | tee -a "$out/summary.txt"
}

# Hundreds of kernels are compiled, each on one core; and one that fails ends CUDA in its process, for all tests there.
read -ra parallel < <("$python" -c 'import os, xdist; print("-n", min(8, os.cpu_count()))' 2>/dev/null)

step build 120 "$python" -m pip install -v -e . --no-build-isolation --no-deps
step report 30 bash -c 'nvidia-smi; "$0" -m torch.utils.collect_env; "$0" -c "import spnet; print(spnet.build_info())"' \
  "$python"
step native 60 "$python" -m pytest -m gpu "${parallel[@]}" tests/test_cuda_walk.py tests/test_native.py
step kernels 90 "$python" -m pytest "${parallel[@]}" tests/kernels
step tests 120 "$python" -m pytest -m gpu "${parallel[@]}" tests \
  --ignore=tests/test_cuda_walk.py --ignore=tests/test_native.py
# Without the compiled rivals, which take longer than all of this: `spnet bench --full` has them.
step bench 150 "$python" -m pytest bench/bench_forward.py --full --benchmark-only \
  --benchmark-json="$out/benchmark.json" --rivals="eager,channels_last,CUDA graph,routed,naive" \
  -k "test_forward and float16 and not bfloat16 and executed50 and (resnet50 or resnet110)"
step table 30 "$python" -c "from spnet.analysis import benchmarks as b
b.write(b.collect('$out/benchmark.json', 'bench/gpu.sh'), '$out', 'gpu')"
# Of their own kernels alone: those of PyTorch would take all the time. What PyTorch asks of CUDA in vain is no error.
ours=()
for name in walk_ compact_ _rows_ _conv_ _pool_ _route_; do ours+=(--kernel-name "kns=${name}kernel"); done
walk='tests/execution/test_walk.py::test_walk_on_a_gpu'
# Without PyTorch's pool each tensor is an allocation, whose end memcheck knows.
step memcheck 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
  compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 "${ours[@]}" "$python" -m pytest "$walk" \
  tests/kernels/test_conv.py::test_kernel tests/kernels/test_stem.py::test_stem tests/kernels/test_pool_route.py::test_pool
step racecheck 60 compute-sanitizer --tool racecheck --error-exitcode 1 "${ours[@]}" "$python" -m pytest "$walk" \
  'tests/execution/test_graph.py::test_forced_paths[cuda-bottleneck]'
step tune 550 "$python" -m spnet.kernels.tune --network resnet50 --dtype float16 --batch 32
cp kernels/tiles/*.json "$out" 2>/dev/null
exit $failed
