"""Networks trained with one budget are measured with the figures that the paper prints."""

import json

import pytest
from repository_runs import run, run_main

READ = """
import json
import torch
from torch import nn
from benchmarks.accuracy import measured
from benchmarks.trained import in_focus_range, method_of_network
from gplws.data import DepthSample
from gplws.evaluation import evaluate

depth = torch.linspace(0, 4, 30).reshape(1, 5, 6)
positions = torch.tensor([[10.0, 12.0, 14.0, 16.0, 18.0]])
valid = torch.ones(1, 5, 6, dtype=torch.bool)
sample = DepthSample(torch.rand(1, 1, 5, 5, 6), positions, 10 + 2 * depth, valid, "um")


class Known(nn.Module):
    def forward(self, stack):
        frames = torch.arange(5.0)[:, None, None]
        return -((frames - depth) ** 2)[None, :] / (2 * 0.5**2)


methods = {r: method_of_network(Known(), r) for r in ("expectation", "search")}
found = evaluate(methods, [("known", in_focus_range([sample]))])
(single,) = in_focus_range([sample])
few = [("known", [sample])]
results, left_out = measured(methods, few, only_frames={"search": 7})
print(json.dumps({
    "measured": [r.method for r in results.means()],
    "left_out": left_out,
    "ends": [float(single.depth.min()), float(single.depth.max())],
    "median": [r.frames.median_frames for r in found.results],
    "frames": [r.frames.mae_frames for r in found.results],
    "mae": [r.depth.mae for r in found.results],
    "uncertainty": [r.depth.mean_uncertainty for r in found.results],
}))
"""


SHARES = """
import json
from dataclasses import replace
from benchmarks.accuracy import against_classical
from gplws.evaluation import Evaluation, Result
from gplws.metrics import DepthMetrics, FrameMetrics

nan = float("nan")
none = [{name: nan for name in of.__dataclass_fields__} for of in (FrameMetrics, DepthMetrics)]
empty, depth = FrameMetrics(**none[0]), DepthMetrics(**none[1])


def result(method, data, mae, rmse):
    frames = replace(empty, mae_frames=mae, rmse_frames=rmse)
    return Result(method, data, "", "frames", frames, frames, depth, nan, nan, nan)


errors = {"net": (0.1, 0.5), "rdf": (0.3, 0.6), "rr": (0.2, 0.8)}
results = [result(m, "one", *e) for m, e in errors.items()]
for stack in range(10):  # shares of 0.5 and 1.5 of the mean error, and one share of the RMSE
    results += [result("net", "many", 0.5 + stack % 2, stack + 1)]
    results += [result("sml", "many", 1.0, 3 * stack + 3)]
results += [result("net", "many", nan, nan), result("sml", "many", nan, nan)]  # of no pixel
results += [result("net", "alone", 1.0, 1.0)]
print(json.dumps(against_classical(Evaluation(tuple(results)))))
"""


@pytest.fixture(scope="module")
def found(repository):
    ended = run(repository, "-c", READ)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_depth_of_a_focus_volume_is_read_as_share_of_the_focus_range(found) -> None:
    assert found["ends"] == pytest.approx([0.1, 1.0])
    # A peak of deviation 1/2 is cut off at the ends only, which moves its expectation inwards.
    expectation, search = found["frames"]
    assert expectation < 0.1 and search < 0.1
    assert found["median"][1] < 1e-4  # a parabola, exact but at the ends
    assert found["mae"] == pytest.approx([0.225 * expectation, 0.225 * search], abs=1e-6)
    for uncertainty in found["uncertainty"]:
        assert uncertainty == pytest.approx(0.225 * 0.48, abs=0.02)


def test_a_method_of_one_number_of_frames_is_left_out_elsewhere_and_said(found) -> None:
    assert found["measured"] == ["expectation"]
    (left_out,) = found["left_out"]
    assert left_out["method"] == "search" and left_out["data"] == "known"
    assert left_out["reason"] == "made for 7 frames, the stacks have 5"


def test_a_network_is_set_against_the_classical_method_that_is_best_by_each_figure(
    repository,
) -> None:
    ended = run(repository, "-c", SHARES)
    assert ended.returncode == 0, ended.stderr
    one, many = json.loads(ended.stdout)  # nothing where there is no classical method
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
    repository, tmp_path
) -> None:
    small = (
        f"--frames 3 --crop 16 --batch-size 2 --levels simulated few --count 1 --side 32 "
        f"--out {tmp_path} --checkpoints {tmp_path}/runs --networks gplws"
    )
    ended, ends = run_main(
        repository,
        "benchmarks.accuracy",
        f"{small} --train-steps 1 --methods",
        f"{small} --train-steps 1 --methods rdf",
        f"{small} --train-steps 2",
    )
    assert ends[:2] == ["", ""] and "another recipe" in ends[2]
    first, again, *_ = ended.stderr.split("--- end of call")
    assert "gplws train" in first and "gplws train" not in again and "gplws evaluate" in again

    content = json.loads((tmp_path / "accuracy_trained.json").read_text())
    assert [run["steps"] for run in content["runs"]] == [1]
    means = {(row["data"], row["method"]): row["depth"] for row in content["means"]}
    assert set(means) == {(d, m) for d in ("simulated", "few") for m in ("gplws", "rdf")}
    ours = means["simulated", "gplws"]
    assert 0 < ours["mse"] < 1 and 0 <= ours["a1"] <= ours["a2"] <= ours["a3"] <= 1
    assert ours["mean_uncertainty"] > 0 and ours["bumpiness"] > 0 and ours["seconds"] > 0
    assert means["simulated", "rdf"]["mean_uncertainty"] is None
    lines = [line.replace("|", " ").split() for line in ended.stdout.splitlines()]
    printed = [line for line in lines if line[:3] == ["GPLWS-Net", "printed:", "4D"]]
    assert printed[0][5:] == ["0.0275", "0.1442", "2.49"]


def test_results_that_would_have_one_name_are_refused_before_any_work(repository, tmp_path) -> None:
    small = f"--levels few --count 1 --side 32 --out {tmp_path}/out --checkpoints {tmp_path}/runs"
    ended, ends = run_main(
        repository,
        "benchmarks.accuracy",
        f"{small} --networks gplws --train-steps 1 --methods rdf gplws",
        f"{small} --methods a/net.safetensors b/net.safetensors",
        f"{small} --stacks a/few",
    )
    assert ends == ["2"] * 3
    trained, files, data, _ = ended.stderr.split("--- end of call")
    assert "methods: several have the name 'gplws'" in trained
    assert "methods: several have the name 'net'" in files
    assert "sets of stacks: several have the name 'few'" in data
    assert not list(tmp_path.iterdir())
