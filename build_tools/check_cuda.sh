#!/usr/bin/env bash
# Everything that needs a GPU, on a machine with one GPU and no network: builds in place, runs the
# tests, looks for bad memory accesses and races, measures, trains. Each call ends within ten
# minutes; several calls share the work by naming steps.
#
#   build_tools/check_cuda.sh FOLDER [STEP...]
#
#   machine     what there is
#   install     the package, compiled for the GPU of this machine
#   tests       what is marked cuda
#   memcheck    the kernels under compute-sanitizer: memory
#   racecheck   the same: races
#   rest        all other tests
#   bench       python -m benchmarks.gpu, with what is left of the time
#   profile     python -m build_tools.profile_cuda: what the kernels of the network wait for
#   tune        python -m build_tools.tune_cuda: other sizes of blocks, half a minute of compiling
#   train       python -m build_tools.train_on_gpu, with what is left of the time
#
# Without names: all of them to bench, in this order. FOLDER gets summary.txt, logs.txt, gpu.json
# and its pictures, and training/ with checkpoint, weights and validation figures; a run there is
# gone on with.
#
#   PYTHON=python3.12       an interpreter with torch (CUDA), setuptools, ninja, pybind11, pytest
#   TORCH_CUDA_ARCH_LIST    default: the GPU of this machine
#   CHECK_SECONDS=585       for all steps of the call together
#   BENCH_OPTIONS='...'     for benchmarks.gpu, such as '--parts network --shapes 10x1024x1024'
#   TRAIN_OPTIONS='...'     for train_on_gpu.py, such as '--total 24'
#
# A step that fails or runs out of its time does not stop the ones after it; the exit status is 1 if
# any did.
set -uo pipefail

all=(machine install tests memcheck racecheck rest bench profile tune train)
usage() {
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2
  exit 2
}
[ $# -ge 1 ] || usage
folder=$1
shift
steps=("$@")
[ $# -gt 0 ] || steps=("${all[@]:0:7}")
for name in "${steps[@]}"; do
  [[ " ${all[*]} " == *" $name "* ]] || { printf 'no such step: %s\n\n' "$name" >&2 && usage; }
done

mkdir -p "$folder" && out=$(cd "$folder" && pwd) || exit 1
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PIP_BREAK_SYSTEM_PACKAGES=1 GPLWS_CUDA=1
if [ -z "${TORCH_CUDA_ARCH_LIST:-}" ] && command -v nvidia-smi >/dev/null; then
  TORCH_CUDA_ARCH_LIST=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)
  export TORCH_CUDA_ARCH_LIST
fi
total=${CHECK_SECONDS:-585}
status=0
: >"$out/summary.txt"
: >"$out/logs.txt"

left() { echo $((total - SECONDS)); }

# step NAME SECONDS COMMAND...: at most so long, output to logs.txt, the verdict to summary.txt
step() {
  local name=$1 limit=$2 begin=$SECONDS code said
  shift 2
  [ "$limit" -lt "$(left)" ] || limit=$(left)
  if [ "$limit" -lt 5 ]; then
    status=1
    printf '%-10s NO TIME LEFT\n' "$name" >>"$out/summary.txt"
    return
  fi
  printf '\n==== %s (after %d s, at most %d s)\n' "$name" "$SECONDS" "$limit" | tee -a "$out/logs.txt"
  timeout -k 5 "$limit" "$@" 2>&1 | tee -a "$out/logs.txt" "$out/.last"
  code=${PIPESTATUS[0]}
  [ "$code" -eq 0 ] || status=1
  said=$(tail -n 1 "$out/.last")
  rm -f "$out/.last"
  printf '%-10s %s after %d s: %s\n' "$name" "$(verdict "$code")" $((SECONDS - begin)) "$said" \
    >>"$out/summary.txt"
}

verdict() {
  case $1 in
    0) echo passed ;;
    124 | 137) echo "OUT OF TIME" ;;
    *) echo "FAILED ($1)" ;;
  esac
}

# shellcheck disable=SC2329  # the step calls it, in a shell of its own
machine() {
  nvidia-smi
  nvcc --version
  "$python" - <<'PYTHON'
import importlib.util
import re

import torch

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

print("torch", torch.__version__, "CUDA", torch.version.cuda)
with open("pyproject.toml", "rb") as file:
    wanted = tomllib.load(file)["project"]["dependencies"]
imports = {"opencv-python-headless": "cv2", "PyYAML": "yaml", "pillow": "PIL"}
names = [re.match(r"[\w.-]+", requirement).group() for requirement in wanted]
missing = [n for n in names if importlib.util.find_spec(imports.get(n, n)) is None]
print("dependencies that are missing:", ", ".join(missing) or "none")
if not torch.cuda.is_available():
    raise SystemExit("torch finds no GPU")
PYTHON
}

# Minutes for a command that ends by itself: what is left, less the seconds that it needs at its end.
minutes_but() { awk -v s="$(($(left) - $1))" 'BEGIN { printf "%.2f", (s > 0 ? s : 0) / 60 }'; }

# sanitize TOOL SELECTION...: tests/test_cuda.py, a process for each selection, all at the same time
# shellcheck disable=SC2329
sanitize() {
  local tool=$1 selection pid pids=() code=0 failed=0
  shift
  # Each tensor gets an allocation of its own: inside torch's large blocks an overrun goes unseen.
  # Kernels of others are not looked into.
  for selection; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --report-api-errors no --error-exitcode 9 \
      --kernel-name kns=gplws --tool "$tool" \
      "$python" -m pytest -q -p no:cacheprovider tests/test_cuda.py -k "$selection" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do
    wait "$pid" || { code=$? && failed=$((failed + 1)); }
  done
  printf '%d of %d selections failed\n' "$failed" "${#pids[@]}"
  return "$code"
}

# in_two PYTEST...: tests in which C++ throws errors have a process of their own; where one ends it,
# the verdict on all others is known.
# shellcheck disable=SC2329
in_two() {
  local throwing='different_devices or out_of_memory or named or refused' code=0
  "$@" -k "not ($throwing)" || code=$?
  "$@" -k "$throwing" || code=$?
  return "$code"
}

export python
export -f machine sanitize in_two

parallel=()
"$python" -c 'import xdist' 2>/dev/null && parallel=(-n 8)
pytest=("$python" -m pytest -q -p no:cacheprovider)
# Small shapes that reach every kernel, every border and every kind of input. Graphs cannot be
# recorded without torch's allocator.
others='around_a_warp or activation or strided or search or no_channels'
in_16='half and not current_stream'
read -r -a bench_options <<<"${BENCH_OPTIONS:-}"
read -r -a train_options <<<"${TRAIN_OPTIONS:-}"

for name in "${steps[@]}"; do
  case $name in
    machine) step machine 40 bash -c machine ;;
    install) step install 200 "$python" -m pip install --no-build-isolation --no-deps -e . ;;
    tests)
      step tests 120 bash -c 'in_two "$@"' in_two "${pytest[@]}" "${parallel[@]}" -m cuda
      ;;
    memcheck)
      step memcheck 90 bash -c 'sanitize "$@"' sanitize memcheck \
        "not half and (conv_agrees or way_up)" "not half and not elements and ($others)" \
        "$in_16 and torch.bfloat16" "$in_16 and torch.float16"
      ;;
    racecheck)
      # float16 goes through the same templates as bfloat16.
      step racecheck 80 bash -c 'sanitize "$@"' sanitize racecheck \
        "not half and (way_up or (conv_agrees and contiguous_format))" \
        "half and torch.bfloat16 and (way_up or conv_agrees)"
      ;;
    rest) # on the CPU: its results are compared with those of fixed devices
      step rest 120 env CUDA_VISIBLE_DEVICES= "${pytest[@]}" "${parallel[@]}" -m "not cuda"
      ;;
    bench)
      step bench "$(left)" "$python" -m benchmarks.gpu --out "$out" --minutes "$(minutes_but 6)" \
        "${bench_options[@]}"
      ;;
    profile) step profile 90 "$python" -m build_tools.profile_cuda "$out" ;;
    tune) step tune 150 "$python" -m build_tools.tune_cuda "$out" ;;
    train)
      step train "$(left)" "$python" -m build_tools.train_on_gpu "$out/training" \
        --minutes "$(minutes_but 45)" "${train_options[@]}"
      ;;
  esac
done

printf '\n==== done in %d s\n' "$SECONDS" | tee -a "$out/summary.txt"
cat "$out/summary.txt"
exit "$status"
