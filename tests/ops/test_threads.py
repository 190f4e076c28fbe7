"""The ops use the threads that torch was told to use, and no more."""

import json
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
