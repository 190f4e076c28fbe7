"""Networks trained with one budget are measured with the figures that the paper prints."""

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from benchmarks import accuracy
from benchmarks.accuracy import against_classical, measured
from benchmarks.trained import in_focus_range, method_of_network
from gplws.data import DepthSample
from gplws.evaluation import Evaluation, Result, evaluate
from gplws.metrics import DepthMetrics, FrameMetrics

DEPTH = torch.linspace(0, 4, 30).reshape(1, 5, 6)
SAMPLE = DepthSample(
    torch.rand(1, 1, 5, 5, 6),
    torch.tensor([[10.0, 12.0, 14.0, 16.0, 18.0]]),
    10 + 2 * DEPTH,
    torch.ones(1, 5, 6, dtype=torch.bool),
    "um",
)


class Known(nn.Module):
    """Peaks of deviation 1/2 at the depth."""

    def forward(self, stack: Tensor) -> Tensor:
        frames = torch.arange(5.0)[:, None, None]
        return -((frames - DEPTH) ** 2)[None, :] / (2 * 0.5**2)


METHODS = {reading: method_of_network(Known(), reading) for reading in ("expectation", "search")}


def test_depth_of_a_focus_volume_is_read_as_share_of_the_focus_range() -> None:
    (single,) = in_focus_range([SAMPLE])
    assert single.depth.aminmax() == pytest.approx((0.1, 1.0))
    expectation, search = evaluate(METHODS, [("known", [single])]).results
    # A peak of deviation 1/2 is cut off at the ends only, which moves its expectation inwards.
    assert expectation.frames.mae_frames < 0.1 and search.frames.mae_frames < 0.1
    assert search.frames.median_frames < 1e-4  # a parabola, exact but at the ends
    for found in (expectation, search):
        assert found.depth.mae == pytest.approx(0.225 * found.frames.mae_frames, abs=1e-6)
        assert found.depth.mean_uncertainty == pytest.approx(0.225 * 0.48, abs=0.02)


def test_a_method_of_one_number_of_frames_is_left_out_elsewhere_and_said() -> None:
    results, (left_out,) = measured(METHODS, [("known", [SAMPLE])], only_frames={"search": 7})
    assert [mean.method for mean in results.means()] == ["expectation"]
    assert left_out["method"] == "search" and left_out["data"] == "known"
    assert left_out["reason"] == "made for 7 frames, the stacks have 5"


def result(method: str, data: str, mae: float, rmse: float) -> Result:
    """Errors in frames, and no other figure."""
    nan = float("nan")
    empty = FrameMetrics(**dict.fromkeys(FrameMetrics.__dataclass_fields__, nan))
    depth = DepthMetrics(**dict.fromkeys(DepthMetrics.__dataclass_fields__, nan))
    frames = replace(empty, mae_frames=mae, rmse_frames=rmse)
    return Result(method, data, "", "frames", frames, frames, depth, nan, nan, nan)


def test_a_network_is_set_against_the_classical_method_that_is_best_by_each_figure() -> None:
    nan = float("nan")
    errors = {"net": (0.1, 0.5), "rdf": (0.3, 0.6), "rr": (0.2, 0.8)}
    results = [result(method, "one", *of) for method, of in errors.items()]
    for stack in range(10):  # shares of 0.5 and 1.5 of the mean error, and one share of the RMSE
        results += [result("net", "many", 0.5 + stack % 2, stack + 1)]
        results += [result("sml", "many", 1.0, 3 * stack + 3)]
    results += [result("net", "many", nan, nan), result("sml", "many", nan, nan)]  # of no pixel
    results += [result("net", "alone", 1.0, 1.0)]
    # Nothing where there is no classical method.
    one, many = against_classical(Evaluation(tuple(results)))
    assert (one["data"], one["method"]) == ("one", "net")
    assert one["mae_frames"] == {"best": "rr", "share": pytest.approx(0.5), "interval": None}
    assert one["rmse_frames"] == {
        "best": "rdf",
        "share": pytest.approx(0.5 / 0.6),
        "interval": None,
    }
    assert many["mae_frames"]["share"] == pytest.approx(1.0)
    # The mean of ten values of 0.5 or 1.5 has a standard error of 0.16.
    assert many["mae_frames"]["interval"] == pytest.approx([0.69, 1.31], abs=0.1)
    assert many["rmse_frames"]["interval"] == pytest.approx([1 / 3, 1 / 3])


def test_networks_of_one_budget_go_on_and_stand_beside_the_printed_figures(
    call, tmp_path, capsys
) -> None:
    small = (
        f"--frames 3 --crop 16 --batch-size 2 --levels simulated few --count 1 --side 32 "
        f"--out {tmp_path} --checkpoints {tmp_path}/runs --networks gplws"
    )
    assert call(accuracy, f"{small} --train-steps 1 --methods") == ""
    assert "gplws train" in capsys.readouterr().err
    assert call(accuracy, f"{small} --train-steps 1 --methods rdf") == ""
    said = capsys.readouterr()
    assert "gplws train" not in said.err and "gplws evaluate" in said.err
    assert "another recipe" in call(accuracy, f"{small} --train-steps 2")

    content = json.loads((tmp_path / "accuracy_trained.json").read_text())
    assert [run["steps"] for run in content["runs"]] == [1]
    means = {(row["data"], row["method"]): row["depth"] for row in content["means"]}
    assert set(means) == {(d, m) for d in ("simulated", "few") for m in ("gplws", "rdf")}
    ours = means["simulated", "gplws"]
    assert 0 < ours["mse"] < 1 and 0 <= ours["a1"] <= ours["a2"] <= ours["a3"] <= 1
    assert ours["mean_uncertainty"] > 0 and ours["bumpiness"] > 0 and ours["seconds"] > 0
    assert means["simulated", "rdf"]["mean_uncertainty"] is None
    lines = [line.replace("|", " ").split() for line in said.out.splitlines()]
    printed = [line for line in lines if line[:3] == ["GPLWS-Net", "printed:", "4D"]]
    assert printed[0][5:] == ["0.0275", "0.1442", "2.49"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--networks gplws --train-steps 1 --methods rdf gplws",
            "methods: several have the name 'gplws'",
        ),
        (
            "--methods a/net.safetensors b/net.safetensors",
            "methods: several have the name 'net'",
        ),
        ("--stacks a/few", "sets of stacks: several have the name 'few'"),
    ],
)
def test_results_that_would_have_one_name_are_refused_before_any_work(
    call, tmp_path, capsys, options, message
) -> None:
    small = f"--levels few --count 1 --side 32 --out {tmp_path}/out --checkpoints {tmp_path}/runs"
    assert call(accuracy, f"{small} {options}") == "2"
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
