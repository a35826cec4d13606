#!/usr/bin/env bash
# Everything that needs a GPU, in less than ten minutes: builds, tests, measures, sanitises and tunes.
# Usage: bench/gpu.sh FOLDER [STEP ...]
#   Runs the steps named, in the order of this file; without names all but `compile-cifar` and `compile-imagenet`, the
#   compiled rival, which takes minutes for each network and batch size. PYTHON=python names another interpreter,
#   LIMIT=300 other seconds in all, CELLS="resnet50 and B64" fewer cells of what is measured.
#   `spnet bench --merge FOLDER/compile-cifar.json --merge ... --name h100-DATE` makes one file of bench/results of them.
# Each step writes FOLDER/STEP.log, has its own time limit, and does not stop the others; summary.txt has the exit codes
# (124: out of time).
set -uo pipefail
all="build report kernels tests native probe bench memcheck racecheck-walk racecheck tune"
compiled="compile-cifar compile-imagenet"
[ $# -ge 1 ] || { echo "usage: $0 FOLDER [STEP ...], steps: $all $compiled" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.." || exit 2
chosen=" ${*:-$all} "
for name in $chosen; do
  [[ " $all $compiled " == *" $name "* ]] || { echo "$0: no step $name, there are: $all $compiled" >&2; exit 2; }
done
python=${PYTHON:-python3}
limit=${LIMIT:-570}
# No interrupt reaches Python while it waits for a kernel that never ends: the stacks say before who does.
export PYTHONUNBUFFERED=1 PYTEST_ADDOPTS="-vv --durations=10 -o faulthandler_timeout=45"
: >"$out/summary.txt"
failed=0

step() { # NAME SECONDS COMMAND...
  local name=$1 most=$2 begin=$SECONDS left=$((limit - 20 - SECONDS)) code=0
  shift 2
  [[ $chosen == *" $name "* ]] || return 0
  most=$((left < 1 ? 1 : left < most ? left : most))
  # An interrupt first: pytest then still reports and writes what it has.
  timeout --signal=INT --kill-after=10 "$most" "$@" >"$out/$name.log" 2>&1 </dev/null || code=$?
  [ "$code" = 0 ] || failed=1
  printf '%-16s exit %3d, %3d of %3d s\n' "$name" "$code" $((SECONDS - begin)) "$most" | tee -a "$out/summary.txt"
}

# What is measured of each network: of one image, half of the block executions.
cifar="resnet110 and (executed50 or executed100)"
imagenet="(resnet50 or resnet101) and not executed0 and (executed50 or not B1-)"

measure() { # NAME SECONDS RIVALS CELLS: in float16; NAME.json and NAME.md have the table
  local name=$1 raw="$out/$1.raw.json"
  [[ $chosen == *" $name "* ]] || return 0
  rm -f "$raw"
  step "$name" "$2" "$python" -m pytest bench/bench_forward.py --full --benchmark-only --benchmark-json="$raw" \
    --rivals="$3" -k "test_forward and float16 and not bfloat16 and (${CELLS:-float16}) and ($4)"
  [ -s "$raw" ] || return 0
  "$python" -c "from spnet.analysis import benchmarks as b
b.write(b.collect('$raw', 'bench/gpu.sh $name'), '$out', '$name')" >>"$out/$name.log" 2>&1 || failed=1
}

# Hundreds of kernels are compiled, each on one core; and of a process in which one fails, or never ends, the tests that
# are left go to another.
read -ra parallel < <("$python" -c 'import os, xdist
print("-n", min(8, os.cpu_count()), "--dist=worksteal -o faulthandler_exit_on_timeout=true")' 2>/dev/null)

step build 120 "$python" -m pip install -v -e . --no-build-isolation --no-deps
step report 30 bash -c 'nvidia-smi; "$0" -m pip list; "$0" -c "import torch, spnet
print(spnet.build_info(), torch.backends.cudnn.version(), torch.cuda.get_device_properties(0))"' "$python"
step kernels 90 "$python" -m pytest "${parallel[@]}" tests/kernels
step tests 120 "$python" -m pytest -m gpu "${parallel[@]}" tests \
  --ignore=tests/test_cuda_walk.py --ignore=tests/test_native.py
step native 60 "$python" -m pytest -m gpu "${parallel[@]}" tests/test_cuda_walk.py tests/test_native.py
step probe 90 "$python" bench/gpu_probe.py
measure bench 300 "eager,channels_last,CUDA graph,CUDA graph dense,routed,batch,naive" "($cifar) or ($imagenet)"
# Of their own kernels alone: those of PyTorch would take all the time. What PyTorch asks of CUDA in vain is no error.
ours=()
for name in walk_ compact_ _rows_ _conv_ _pool_ _route_; do ours+=(--kernel-name "kns=${name}kernel"); done
walk='tests/execution/test_walk.py::test_walk_on_a_gpu'
# Without PyTorch's pool each tensor is an allocation, whose end memcheck knows.
step memcheck 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
  compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 "${ours[@]}" "$python" -m pytest "$walk" \
  tests/kernels/test_conv.py::test_kernel tests/kernels/test_conv.py::test_programs_that_share_a_tile \
  tests/kernels/test_max_pool.py::test_max_pool tests/kernels/test_stem.py::test_stem \
  tests/kernels/test_pool_route.py::test_pool
# Alone, and on small networks: on an H100 this tool, of CUDA 13.0, gave up inside the walk of a resnet20 with an error of
# its own, and all after it failed.
step racecheck-walk 60 compute-sanitizer --tool racecheck --error-exitcode 1 "${ours[@]}" "$python" -m pytest \
  tests/test_cuda_walk.py -m gpu -k "test_forced_paths and float16 and not bfloat16 and 5 and (one-pixel or odd-widths)"
step racecheck 60 compute-sanitizer --tool racecheck --error-exitcode 1 "${ours[@]}" "$python" -m pytest \
  'tests/execution/test_graph.py::test_forced_paths[cuda-bottleneck]' \
  tests/kernels/test_conv.py::test_programs_that_share_a_tile
step tune 550 "$python" -m spnet.kernels.tune --network resnet50 --dtype float16 --batch 1 --batch 64 --batch 256
cp kernels/tiles/*.json "$out" 2>/dev/null
# The one to beat. A masked rival stands beside it, for the comparison with the masked network.
measure compile-cifar 540 "compile dense,CUDA graph,CUDA graph dense,naive" "$cifar"
measure compile-imagenet 540 "compile dense,CUDA graph,CUDA graph dense,naive" "$imagenet"
exit $failed
