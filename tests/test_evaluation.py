from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from networks import mean_error
from torch import nn
from toy_data import ConvNet, ToySource, small_config

from gplws.data.transforms import split
from gplws.evaluation import Estimate, evaluate, method_of
from gplws.metrics import focus_uncertainty
from gplws.models import WeightsError, save_weights
from gplws.models.registry import build_model
from gplws.training import train


def shifted(by):
    """A method that knows the truth and adds ``by`` um; the frames of the toy are 2 um apart."""

    def method(sample):
        trusted = torch.zeros_like(sample.valid)
        trusted[:, ::2] = True
        return Estimate(sample.depth + by, trusted, torch.rand(sample.depth.shape))

    return method


@pytest.fixture
def samples():
    return [ToySource(frames=9, side=24)(step) for step in range(2)]


def test_figures_are_those_of_the_error(samples):
    # Depth 0.5 frame too high; at the last frame the estimate is taken at the end of the stack.
    inner = [replace(s, valid=s.valid & (s.depth_index() < 7.4)) for s in samples]
    found = evaluate({"off": shifted(1.0), "exact": shifted(0.0)}, [("toy", inner)])
    assert len(found.results) == 8  # 2 batches of 2 samples, 2 methods
    off, exact = found.means()
    assert (off.method, off.dataset, off.sample) == ("off", "toy", "mean of 4")
    assert off.frames.mae_frames == pytest.approx(0.5, abs=1e-5)
    assert off.frames.bias_frames == pytest.approx(0.5, abs=1e-5)
    assert off.depth.mae == pytest.approx(1.0, abs=1e-5) and off.unit == "um"
    assert off.frames.mae_um == pytest.approx(1.0, abs=1e-5)
    assert exact.frames.mae_frames == pytest.approx(0, abs=1e-6)
    share = off.trusted.pixels / off.frames.pixels
    assert share == pytest.approx(0.5, abs=0.05) and off.depth.seconds >= 0


def test_the_uncertainty_of_a_method_is_among_its_figures(samples):
    def method(sample):
        spread = torch.where(sample.valid, 0.25, 100.0)  # where nothing is known it does not count
        return Estimate(sample.depth, sample.valid, None, spread)

    found = evaluate({"known": method, "none": shifted(0.0)}, [("toy", samples)])
    known, none = found.means()
    assert known.depth.mean_uncertainty == pytest.approx(0.25)
    assert math.isnan(none.depth.mean_uncertainty)
    assert f"0.250 {known.unit}" in found.table()


def test_the_uncertainty_of_a_network_is_the_spread_of_its_softmax(samples):
    networks = {"gplws": build_model("gplws", small_config(1).model.arguments).eval()}
    networks["volume"] = ConvNet().eval()
    networks["fvnet"] = build_model("fvnet", {}).eval()
    sample = next(iter(split(samples[0])))
    found = evaluate(networks, [("toy", [sample])])
    for result in found.means():
        network = networks[result.method]
        volume_of = getattr(network, "focus_volume", network)
        with torch.no_grad():
            p = volume_of(sample.stack[None]).softmax(1)
        spread = focus_uncertainty(p, sample.focus_positions)[0]
        assert spread.std() > 0
        known = sample.valid & sample.depth_index().isfinite()
        assert result.depth.mean_uncertainty == pytest.approx(float(spread[known].mean()), rel=1e-3)
    assert " unc " in found.table()


def test_an_empty_data_set_is_known_before_any_work(samples):
    def method(sample):
        raise AssertionError("called")

    with pytest.raises(ValueError, match="datasets: none has no samples"):
        evaluate({"m": method}, [("toy", samples), ("none", [])])


def test_a_network_is_read_as_at_training(samples, tmp_path):
    result = train(small_config(3), tmp_path / "run", source=ToySource())
    model = build_model("gplws", small_config(1).model.arguments).eval()
    weights = tmp_path / "net.safetensors"
    save_weights(model, weights)
    found = evaluate(
        {"module": model, "file": weights, "checkpoint": str(result.checkpoint), "rdf": "rdf"},
        [("toy", samples)],
    )
    module, file, checkpoint, rdf = found.means()
    expected = [mean_error(model, [one]) for one in samples]
    assert module.frames.mae_frames == pytest.approx(sum(expected) / 2, rel=1e-3)
    assert file.frames.mae_frames == pytest.approx(module.frames.mae_frames, rel=1e-2)
    assert checkpoint.frames.mae_frames != pytest.approx(module.frames.mae_frames, rel=1e-2)
    assert 0 <= rdf.frames.mae_frames < 8 and rdf.ause == rdf.ause
    assert 0 < rdf.least_rmse_left < rdf.rmse_left < 2


def test_pooled_figures_are_of_all_pixels_together(samples):
    """Of two stacks one is exact: only between them does the confidence know anything."""
    sample = split(samples[0])[0]
    known = sample.valid & (sample.depth_index() < 7)
    sample = replace(sample, valid=known)

    def method(sample):
        wrong = sample.name == "wrong"
        confidence = torch.full(sample.depth.shape, 0.2 if wrong else 0.9)
        return Estimate(sample.depth + (2.0 if wrong else 0.0), sample.valid, confidence)

    both = [replace(sample, name="right"), replace(sample, name="wrong")]
    found = evaluate({"off": method, "none": Constant()}, [("toy", both)])
    off, none = found.pooled
    assert (off.method, off.dataset) == ("off", "toy")
    # Half of the pixels err by one frame; without two fifths of these, 3 of 8 do.
    expected = math.sqrt((0.3 / 0.8) / 0.5)
    assert off.rmse_left == pytest.approx(expected, rel=1e-3)
    assert off.least_rmse_left == pytest.approx(expected, rel=1e-3)
    assert off.ause == pytest.approx(0, abs=1e-3)
    assert found.means()[0].rmse_left == pytest.approx(1.0)  # within a stack it says nothing
    assert math.isnan(none.rmse_left) and math.isnan(none.ause)
    assert json.loads(found.as_json())["pooled"][1]["rmse_left"] is None
    assert f"{100 * expected:.1f}%" in found.table()


def test_colour_stacks_go_to_gray_networks_as_luminance(samples):
    model = build_model("gplws", small_config(1).model.arguments).eval()
    gray = split(samples[0])[0]
    colour = replace(gray, stack=gray.stack.expand(3, -1, -1, -1))
    for which in (model, "rdf"):
        one, three = (method_of(which)(sample) for sample in (gray, colour))
        torch.testing.assert_close(one.depth, three.depth, rtol=1e-3, atol=1e-3)


class Said(NamedTuple):
    depth: torch.Tensor


class Constant(nn.Module):
    def forward(self, stack, focus_positions):
        middle = focus_positions.mean(1)[:, None, None]
        return Said(middle.expand(stack.shape[0], *stack.shape[-2:]))


def test_networks_that_say_the_depth_themselves_are_evaluated(samples):
    (result,) = evaluate({"constant": Constant()}, [("toy", samples)]).means()
    truth = torch.cat([s.depth_index()[s.valid] for s in samples])
    assert result.frames.bias_frames == pytest.approx(4 - truth.mean().item(), abs=0.1)
    assert math.isnan(result.ause) and math.isnan(result.rmse_left)  # no confidence


def test_the_table_and_the_json_hold_the_means(samples):
    found = evaluate(
        {"off": shifted(1.0), "none": Constant()}, [("toy", samples), ("more", samples)]
    )
    lines = found.table().splitlines()
    assert len(lines) == 2 + 4 and len({len(line) for line in lines}) == 1
    assert lines[0].split()[:3] == ["data", "method", "mean"]
    assert lines[2].split()[:2] == ["toy", "off"]
    content = json.loads(found.as_json())
    assert [m["method"] for m in content["means"]] == ["off", "none", "off", "none"]
    assert len(content["results"]) == 16
    assert content["means"][1]["ause"] is None
    mean = content["means"][0]["frames"]["mae_frames"]
    assert f"{mean:.3f}" in lines[2].split()


def test_pixels_without_a_depth_are_neither_found_nor_trusted(samples):
    def half(sample):
        depth = sample.depth.clone()
        depth[:, ::2] = torch.nan  # columns: as many known pixels in the odd as in the even ones
        trusted = depth.isfinite()
        trusted[:, ::4] = trusted[:, 1::4] = False
        return Estimate(depth, trusted, None)

    def nothing(sample):
        return Estimate(torch.full_like(sample.depth, torch.nan), sample.valid, None)

    methods = {"half": half, "nothing": nothing, "exact": shifted(0.0)}
    head, _, *rows = evaluate(methods, [("toy", samples)]).table().splitlines()
    places = [head.index(title) + len(title) for title in ("found", "trusted")]
    shares = [[row[:place].split()[-1] for place in places] for row in rows]
    assert shares == [["50.0%", "25.0%"], ["0.0%", "0.0%"], ["100.0%", "50.0%"]]


def test_pictures_are_written_for_each_sample_and_method(samples, tmp_path):
    import cv2

    one = replace(samples[0], name="a/b: c")
    evaluate({"off": shifted(0.3)}, [("toy", [one])], pictures=tmp_path / "p")
    files = sorted(f.name for f in (tmp_path / "p").iterdir())
    assert files == ["toy_000_a_b__c_off.png", "toy_001_a_b__c_off.png"]
    picture = cv2.imread(str(tmp_path / "p" / files[0]))
    assert picture.shape[1] > 2 * picture.shape[0] and picture.std() > 10


@pytest.mark.parametrize(
    ("methods", "datasets", "message"),
    [
        ({}, [("toy", [])], "methods: expected at least one"),
        ({"rdf": "rdf"}, [], "datasets: expected at least one"),
        ({"rdf": "rdf"}, [("toy", [])], "toy has no samples"),
        ({"rdf": "rdf"}, [("a", []), ("toy", []), ("toy", [])], "several have the name 'toy'"),
        ({"magic": "magic"}, [("toy", [])], "method must be one of rdf, .*'magic'"),
        ({"w": "nowhere.safetensors"}, [("toy", [])], "no such file: nowhere.safetensors"),
        ({"w": "nowhere.pt"}, [("toy", [])], "no such file: nowhere.pt"),
    ],
)
def test_what_cannot_be_evaluated_is_named(methods, datasets, message):
    with pytest.raises(ValueError, match=message):
        evaluate(methods, datasets)


def test_foreign_weights_are_named(tmp_path):
    from safetensors.torch import save_file

    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(2)}, foreign)
    with pytest.raises(WeightsError, match=r"foreign\.safetensors belongs to 'an unknown network'"):
        method_of(foreign)
    foreign.write_bytes(b"nothing")
    with pytest.raises(WeightsError, match=r"foreign\.safetensors cannot be read"):
        method_of(foreign)


@pytest.mark.shared
def test_rdf_is_within_a_tenth_of_a_frame_on_a_generated_stack(shared_dir):
    from gplws.datasets import FolderStacks

    stacks = FolderStacks(shared_dir / "data" / "stacks" / "cou2023_1_gt")
    (result,) = evaluate({"rdf": "rdf"}, [("cou2023_1", stacks)]).means()
    assert result.frames.mae_frames < 0.1
