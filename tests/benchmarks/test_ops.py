"""Single ops are timed beside stock torch that does the same work."""

import json
import re

import pytest
import torch

from benchmarks import ops

FRESH = "gplws, fresh results"
GRADIENTS = ("conv3d_input_gradient", "conv3d_weight_gradient")
CLASSICAL = (
    *("symmetric_filter", "second_differences"),
    *("smooth_surface", "sample_surface", "fit_peak", "regularise_surface"),
)


def test_all_ops_are_also_timed_with_results_that_are_allocated_as_stock_torch_does(
    call, tmp_path, monkeypatch
) -> None:
    # The limits of the machine take long, and say nothing here.
    figures = ("matrix_product_flops", "dense_conv_flops", "copy_bytes", "read_bytes")
    monkeypatch.setattr(ops, "limits", lambda dtype: dict.fromkeys(figures, 1e9))
    monkeypatch.setattr(ops, "_large", lambda: torch.ones(8))
    small = f"--frames 2 --side 32 --seconds 0 --out {tmp_path}"
    assert call(ops, f"{small}/all") == ""
    assert call(ops, f"{small}/some --ops up_conv3d group_pointwise_conv3d") == ""
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


KINDS = {
    ops.conv_cases: {"group_pointwise_conv3d"},
    ops.other_cases: {"up_conv3d", "focus_search", "spline_smooth"},
    ops.classical_cases: {*CLASSICAL},
    ops.gradient_cases: {*GRADIENTS},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_gives_another_result_is_not_timed(kind) -> None:
    found = set()
    for case in kind(torch.float32, 2, 16):
        found.add(case.op)
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
        with pytest.raises(
            RuntimeError, match=f"^{re.escape(other)}: the result differs by up to "
        ):
            ops.compare({**results, other: wrong})
    assert found == KINDS[kind]
