"""The ops use the threads that torch was told to use, no more, and say what went wrong in them."""

import json
import os
import re
import subprocess
import sys

import pytest

# In a fresh process, as the threads of earlier calls stay.
SCRIPT = """
import json
import os
import torch
from gplws.ops import (
    conv3d_input_gradient,
    conv3d_weight_gradient,
    fit_peak,
    focus_search,
    group_pointwise_conv3d,
    regularise_surface,
    sample_surface,
    second_differences,
    smooth_surface,
    spline_smooth,
    symmetric_filter,
    up_conv3d,
)

def started(call):
    before = len(os.listdir("/proc/self/task"))
    call()
    return len(os.listdir("/proc/self/task")) - before

x = torch.rand(1, 12, 10, 128, 128)
weight, up_weight = torch.rand(12, 3, 3, 3, 3), torch.rand(12, 1, 3, 3, 3)
calls = [
    lambda: group_pointwise_conv3d(x, weight, groups=4),
    lambda: up_conv3d(x, up_weight, groups=6),
    lambda: conv3d_input_gradient(x, weight, size=(256, 256), groups=4, stride=2),
    lambda: conv3d_weight_gradient(x, x, groups=4),
    lambda: focus_search(x[0]),
    lambda: spline_smooth(x[0].flatten(0, 1)),
    lambda: symmetric_filter(x[0, 0], [[1.0] * 4] * 4),
    lambda: second_differences(x[0, 0], [(1, 2)]),
    lambda: smooth_surface(x[0, 0, 0], limit=1),
    lambda: sample_surface(x[0, 0], x[0, 1, 0]),
    lambda: fit_peak(x[0, 0, :7]),
    lambda: regularise_surface(
        x[0, 0], x[0, 1], x[0, 2], strength=1, data_scale=1, smoothness_scale=1, guide_scale=1,
        iterations=1,
    ),
]
torch.set_num_threads(1)
alone = [started(call) for call in calls]
torch.set_num_threads(3)
print(json.dumps([alone, started(calls[0])]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_no_more_threads_are_started_than_torch_was_told_to_use():
    ended = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == [[0] * 12, 2]


# Rows for two threads, of one pixel, and a filter so large that scratch memory is much of it.
OUT_OF_MEMORY = """
import resource
import torch
from gplws.ops import second_differences

torch.set_num_threads({threads})
images = torch.rand(1, 2**18, 1)
expected = second_differences(images, [(1, 0)])  # the threads have their stacks
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, resource.RLIM_INFINITY))
try:
    second_differences(images, [(4096, 0)])
except RuntimeError as error:
    print(error)
assert torch.equal(second_differences(images, [(1, 0)]), expected)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="address space is bounded on Linux")
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_without_memory_say_so(threads):
    if "asan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("AddressSanitizer ends the process where memory ends")
    command = [sys.executable, "-c", OUT_OF_MEMORY.format(threads=threads)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert re.match(r"out of memory: no room for \d{9} bytes of scratch\b", ended.stdout)
