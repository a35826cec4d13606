#!/usr/bin/env bash
# Everything that needs a GPU, in less than ten minutes: builds, tests, sanitises, tunes and measures.
# Usage: bench/gpu.sh FOLDER      (PYTHON=python3 names another interpreter)
# Each step writes FOLDER/STEP.log, has its own time limit, and does not stop the others; summary.txt has the exit codes
# (124: out of time).
set -uo pipefail
[ $# = 1 ] || { echo "usage: $0 FOLDER" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python}
export SPNET_EXPERIMENTAL_CUDA=1 SPNET_EXPERIMENTAL_CUDA_BATCH=1 SPNET_EXPERIMENTAL_CUDA_WALK=1
: >"$out/summary.txt"
failed=0

step() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 begin=$SECONDS code=0
  shift 2
  # An interrupt first: pytest then still reports and writes what it has.
  timeout --signal=INT --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 </dev/null || code=$?
  [ "$code" = 0 ] || failed=1
  printf '%-12s exit %3d, %3d of %3d s\n' "$name" "$code" $((SECONDS - begin)) "$limit" | tee -a "$out/summary.txt"
}

step build 80 "$python" -m pip install -v -e . --no-build-isolation --no-deps
step report 20 bash -c 'nvidia-smi; "$0" -m torch.utils.collect_env; "$0" -c "import spnet; print(spnet.build_info())"' \
  "$python"
step tests 120 "$python" -m pytest -m gpu tests
step native 60 "$python" -m pytest tests/test_cuda_walk.py tests/test_native.py -k cuda
step kernels 60 "$python" -m pytest tests/kernels
# Eager rivals only: to compile the others takes longer than all of this. `spnet bench --full` has them.
step bench 120 "$python" -m pytest bench/bench_forward.py --full --benchmark-only \
  --benchmark-json="$out/benchmark.json" --rivals=eager,channels_last,routed,naive \
  -k "test_forward and float16 and executed50 and (resnet50 or resnet110)"
step table 10 "$python" -c "from spnet.analysis import benchmarks as b
b.write(b.collect('$out/benchmark.json', 'bench/gpu.sh'), '$out', 'gpu')"
small='tests/execution/test_graph.py::test_forced_paths[cuda-bottleneck]'
walk='tests/execution/test_walk.py::test_walk_on_a_gpu'
step memcheck 45 compute-sanitizer --tool memcheck --error-exitcode 1 "$python" -m pytest "$small" "$walk"
step racecheck 45 compute-sanitizer --tool racecheck --error-exitcode 1 "$python" -m pytest "$small" "$walk"
step tune 60 "$python" -m spnet.kernels.tune --network resnet50 --dtype float16 --batch 32
cp kernels/tiles/*.json "$out" 2>/dev/null
exit $failed
