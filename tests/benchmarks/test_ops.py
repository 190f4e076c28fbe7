"""Single ops are timed beside stock torch that does the same work."""

import json

from repository_runs import run, run_main

FRESH = "gplws, fresh results"
GRADIENTS = ("conv3d_input_gradient", "conv3d_weight_gradient")
CLASSICAL = (
    *("symmetric_filter", "second_differences"),
    *("smooth_surface", "sample_surface", "fit_peak", "regularise_surface"),
)

# The limits of the machine take long, and say nothing here.
QUICK = """
given = ("matrix_product_flops", "dense_conv_flops", "copy_bytes", "read_bytes")
module.limits = lambda dtype: dict.fromkeys(given, 1e9)
module._large = lambda: module.torch.ones(8)
"""

# Each case as it is, then with a wrong result of the first candidate that is not of gplws.
REFUSED = """
import json
import torch
from benchmarks import ops

refused = []
size = (torch.float32, 2, 16)
kinds = (ops.conv_cases, ops.other_cases, ops.classical_cases, ops.gradient_cases)
for case in (case for kind in kinds for case in kind(*size)):
    names = [name for name in case.candidates if name not in (ops.COPY, ops.READ)]
    results = {name: case.candidates[name]() for name in names}
    ops.compare(results)
    other = next(name for name in names if not name.startswith("gplws"))
    if other == "torch.max alone":
        wrong = torch.max(torch.full((1, 3, 16, 16), torch.nan), 1)
    elif isinstance(results[other], tuple):
        first, *others = results[other]
        wrong = (first + 0.1 * first.abs().max(), *others)
    else:
        wrong = results[other] + 0.1 * results[other].abs().max()
    try:
        ops.compare({**results, other: wrong})
    except RuntimeError as error:
        refused.append((case.op, other, str(error)))
    else:
        raise AssertionError(f"{case.op}: {other}")
print(json.dumps(refused))
"""


def test_all_ops_are_also_timed_with_results_that_are_allocated_as_stock_torch_does(
    repository, tmp_path
) -> None:
    small = f"--frames 2 --side 32 --seconds 0 --out {tmp_path}"
    run_main(
        repository,
        "benchmarks.ops",
        f"{small}/all",
        f"{small}/some --ops up_conv3d group_pointwise_conv3d",
        before=QUICK,
    )
    every, some = (
        json.loads((tmp_path / name / "ops.json").read_text())["rows"] for name in ("all", "some")
    )
    for row in every:
        ours = {"gplws"} if row["op"] in (*GRADIENTS, *CLASSICAL) else {"gplws", FRESH}
        assert ours < row["seconds"].keys()
    layers = ("group_pointwise_conv3d", "up_conv3d")
    found = [(row["op"], row["case"], row["dtype"]) for row in every if row["op"] in layers]
    others = ("focus_search", "spline_smooth", *CLASSICAL, *GRADIENTS)
    assert {row["op"] for row in every} == {*layers, *others}
    assert [(row["op"], row["case"], row["dtype"]) for row in some] == found
    assert {dtype for _, _, dtype in found} == {"float32", "bfloat16"}


def test_what_gives_another_result_is_not_timed(repository) -> None:
    ended = run(repository, "-c", REFUSED)
    assert ended.returncode == 0, ended.stderr
    refused = json.loads(ended.stdout)
    assert {op for op, _, _ in refused} == {
        *("group_pointwise_conv3d", "up_conv3d", "focus_search", "spline_smooth"),
        *CLASSICAL,
        *GRADIENTS,
    }
    for _, name, message in refused:
        assert message.startswith(f"{name}: the result differs by up to ")
