#!/usr/bin/env bash
# Everything that needs a GPU, on a machine with one GPU and no network, in less than ten minutes:
# builds in place, runs the tests, looks for bad memory accesses and races, takes a few times.
#
#   build_tools/check_cuda.sh FOLDER     logs, timing.json and summary.txt go there
#
#   PYTHON=python3.12       an interpreter with torch (CUDA), setuptools, ninja, pybind11, pytest
#   TORCH_CUDA_ARCH_LIST    default: the GPU of this machine
#
# A step that fails or runs out of its time does not stop the ones after it; the exit status is 1 if
# any did.
set -uo pipefail

if [ $# -ne 1 ]; then
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2
  exit 2
fi
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 1
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PIP_BREAK_SYSTEM_PACKAGES=1 GPLWS_CUDA=1
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability}
status=0
: >"$out/summary.txt"

# step NAME SECONDS COMMAND...: at most so long, output to NAME.log, the verdict to summary.txt
step() {
  local name=$1 limit=$2 begin=$SECONDS code
  shift 2
  printf '\n==== %s (after %d s)\n' "$name" "$SECONDS"
  timeout -k 5 "$limit" "$@" 2>&1 | tee "$out/$name.log"
  code=${PIPESTATUS[0]}
  [ "$code" -eq 0 ] || status=1
  printf '%-12s %s after %d s: %s\n' "$name" "$(verdict "$code")" $((SECONDS - begin)) \
    "$(tail -n 1 "$out/$name.log")" >>"$out/summary.txt"
}

verdict() {
  case $1 in
    0) echo passed ;;
    124 | 137) echo "OUT OF TIME" ;;
    *) echo "FAILED ($1)" ;;
  esac
}

machine() {
  nvidia-smi
  nvcc --version
  "$python" - <<'PYTHON'
import importlib.util
import re
import tomllib

import torch

print("torch", torch.__version__, "CUDA", torch.version.cuda)
with open("pyproject.toml", "rb") as file:
    wanted = tomllib.load(file)["project"]["dependencies"]
imports = {"opencv-python-headless": "cv2", "PyYAML": "yaml"}
names = [re.match(r"[\w.-]+", requirement).group() for requirement in wanted]
missing = [n for n in names if importlib.util.find_spec(imports.get(n, n)) is None]
print("dependencies that are missing:", ", ".join(missing) or "none")
PYTHON
}

timing() {
  "$python" - "$out/timing.json" <<'PYTHON'
import json
import statistics
import sys

import torch

import gplws
from gplws.models.gplws_net import GPLWSNet
from gplws.ops import focus_search, group_pointwise_conv3d, reference

FRAMES, SIZE = 10, 512
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def milliseconds(function, make_input, repeats=20):
    """Median time; the inputs take turns, so that the L2 cache does not hold the next one."""
    first = make_input()
    count = max(2, min(32, -(-(512 << 20) // (first.numel() * first.element_size()))))
    inputs = [first, *(make_input() for _ in range(count - 1))]
    for i in range(3):
        function(inputs[i % count])
    times = []
    for i in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function(inputs[i % count])
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def rand(*shape):
    return torch.rand(shape, device="cuda")


results = {
    "device": torch.cuda.get_device_name(),
    "torch": torch.__version__,
    "build": {name: str(value) for name, value in gplws.build_info().items()},
    "milliseconds": {},
}
report = results["milliseconds"]
with torch.inference_mode():
    big = milliseconds(lambda x: x.clone(), lambda: rand(1 << 28))
    results["copy_bytes_per_second"] = 2 * 4 * (1 << 28) / big * 1e3
    for level, channels in enumerate((12, 24, 48, 96)):
        side = SIZE >> level
        weight, pointwise = rand(channels, channels // 4, 3, 3, 3), rand(channels, channels, 1, 1, 1)
        multiply_adds = channels * side * side * FRAMES * (27 * channels // 4 + channels)
        for name, op in (
            ("kernel", group_pointwise_conv3d),
            ("stock", reference.group_pointwise_conv3d),
        ):
            for layout in (torch.contiguous_format, torch.channels_last_3d):
                time = milliseconds(
                    lambda x: op(x, weight, None, pointwise, groups=4),
                    lambda: rand(1, channels, FRAMES, side, side).contiguous(memory_format=layout),
                )
                key = f"pair {channels} channels, {name}, {str(layout).split('.')[-1]}"
                report[key] = round(time, 4)
                print(f"{key}: {time:.3f} ms, {2 * multiply_adds / time / 1e9:.1f} TFLOP/s")
    volume_bytes = 4 * FRAMES * (4 * SIZE) ** 2
    time = milliseconds(focus_search, lambda: rand(1, FRAMES, 4 * SIZE, 4 * SIZE))
    share = (volume_bytes + 20 * (4 * SIZE) ** 2) / time * 1e3 / results["copy_bytes_per_second"]
    report["focus_search 10x2048x2048"] = round(time, 4)
    print(f"focus_search 10x2048x2048: {time:.3f} ms, {100 * share:.0f}% of the copy bandwidth")
    model = GPLWSNet().eval().cuda()
    for name, network in (("stock", model), ("fused", model.fuse())):
        time = milliseconds(network, lambda: rand(1, 3, FRAMES, SIZE, SIZE), repeats=10)
        report[f"network 10x512x512, {name}"] = round(time, 4)
        print(f"network 10x512x512, {name}: {time:.3f} ms")
with open(sys.argv[1], "w") as file:
    json.dump(results, file, indent=1)
print(len(report), "times taken")
PYTHON
}

export python out
export -f machine timing

parallel=()
"$python" -c 'import xdist' 2>/dev/null && parallel=(-n 8)
pytest=("$python" -m pytest -q -p no:cacheprovider)
# Small shapes that reach every kernel, every border and every kind of input.
small='conv_agrees or around_a_warp or activation or strided or search or no_channels'
sanitizer=(compute-sanitizer --report-api-errors no --error-exitcode 9)

step machine 40 bash -c machine
step install 140 "$python" -m pip install --no-build-isolation --no-deps -e .
step tests_cuda 110 "${pytest[@]}" -m cuda
step timing 50 bash -c timing
# Each tensor gets an allocation of its own: inside torch's large blocks an overrun goes unseen.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
step memcheck 90 "${sanitizer[@]}" --tool memcheck "${pytest[@]}" tests/test_cuda.py \
  -k "($small) and not elements"
step racecheck 70 "${sanitizer[@]}" --tool racecheck "${pytest[@]}" tests/test_cuda.py \
  -k "conv_agrees and contiguous_format"
unset PYTORCH_NO_CUDA_MEMORY_CACHING
step tests_rest 90 "${pytest[@]}" "${parallel[@]}" -m "not cuda"

printf '\n==== done in %d s\n' "$SECONDS" | tee -a "$out/summary.txt"
cat "$out/summary.txt"
exit "$status"
