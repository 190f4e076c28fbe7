from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from networks import randomise_bn
from stacks import flat_stack

import gplws
from gplws.data import FocalStack, render_focal_stack
from gplws.io import read_stack
from gplws.models import (
    AiFDepthNet,
    DDFFNet,
    DefocusNet,
    DFVNet,
    FVNet,
    GPLWSNet,
    save_weights,
)


@pytest.fixture(scope="module")
def wedge():
    """A textured wedge, its stack of 14 frames 3 um apart, and its true height."""
    generator = torch.Generator().manual_seed(0)
    size = (72, 88)
    height = torch.linspace(6, 33, size[1]).expand(size).contiguous()
    texture = 0.2 + 0.6 * torch.rand(size, generator=generator)
    stack = render_focal_stack(
        height,
        texture,
        torch.arange(14.0) * 3,
        pixel_size_um=1.0,
        numerical_aperture=0.4,
        full_well_electrons=10_000,
    )
    return stack.frames.numpy(), height.numpy()


def error_um(result, height):
    assert result.valid.mean() > 0.97
    return np.abs(result.height - height)[result.valid].mean()


def test_a_wedge_is_measured_in_micrometres(wedge):
    frames, height = wedge
    result = gplws.reconstruct(frames, z_step_um=3.0, pixel_size_um=1.0)
    assert result.units == "um" and result.height.dtype == np.float32
    assert error_um(result, height) < 0.5
    assert np.allclose(result.depth_index[result.valid] * 3, result.height[result.valid], atol=1e-3)
    assert result.all_in_focus.dtype == np.uint8 and result.all_in_focus.shape == height.shape
    assert result.confidence.min() >= 0 and result.confidence.max() <= 1
    assert np.array_equal(np.isnan(result.height), ~result.valid)


def test_without_a_step_heights_are_frames(wedge):
    frames, height = wedge
    result = gplws.reconstruct(frames)
    assert result.units == "frames" and result.pixel_size_um is None
    assert np.array_equal(result.height, result.depth_index, equal_nan=True)
    assert error_um(result, height / 3) < 0.17


def test_a_sinking_plane_turns_the_surface_over(wedge):
    frames, _ = wedge
    up = gplws.reconstruct(frames, z_step_um=3.0)
    down = gplws.reconstruct(frames, z_step_um=3.0, z_direction="down")
    assert np.array_equal(down.height, -up.height, equal_nan=True)
    assert np.array_equal(down.depth_index, up.depth_index, equal_nan=True)


def test_irregular_and_falling_positions_give_the_same_surface(wedge):
    frames, height = wedge
    keep = [0, 1, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13]
    positions = np.arange(14.0)[keep] * 3
    rising = gplws.reconstruct(frames[keep], focus_positions_um=positions)
    falling = gplws.reconstruct(frames[keep][::-1], focus_positions_um=positions[::-1])
    assert error_um(rising, height) < 0.7 and error_um(falling, height) < 0.7
    known = rising.valid & falling.valid
    assert np.allclose(rising.height[known], falling.height[known], atol=0.05)
    assert np.allclose(11 - falling.depth_index[known], rising.depth_index[known], atol=0.05)


def test_falling_positions_are_heights_and_are_not_turned_over(wedge):
    frames, height = wedge
    positions = np.arange(14.0) * 3
    down = gplws.reconstruct(frames[::-1], z_step_um=3.0, z_direction="down")
    assert error_um(down, height - positions[-1]) < 0.5
    # Readings of a stage that grow downwards.
    readings = gplws.reconstruct(
        frames[::-1], focus_positions_um=-positions[::-1], z_direction="down"
    )
    assert error_um(readings, height) < 0.5
    falling = FocalStack(frames[::-1], focus_positions_um=positions[::-1])
    for stack, options in (
        (frames[::-1], {"focus_positions_um": positions[::-1]}),
        (falling, {}),
    ):
        with pytest.raises(ValueError, match="z_direction must be 'up' where focus_positions_um"):
            gplws.reconstruct(stack, z_direction="down", **options)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32, np.int32, np.float64])
def test_the_depth_of_the_source_does_not_matter(wedge, dtype):
    frames, _ = wedge
    expected = gplws.reconstruct(frames)
    full = {"u": 257, "i": (2**31 - 1) / 255, "f": 1 / 255}[np.dtype(dtype).kind]
    result = gplws.reconstruct((frames * np.float64(full)).astype(dtype))
    known = expected.valid & result.valid
    assert known.mean() > 0.97
    assert np.allclose(result.height[known], expected.height[known], atol=0.01)
    assert result.all_in_focus.dtype == dtype


@pytest.mark.parametrize("method", ["rdf", "rr", "gplws"])
def test_absolute_positions_of_a_stage_give_the_same_frames(wedge, method):
    expected = gplws.reconstruct(wedge[0], method=method)
    for start, step in ((250_000, 0.02), (1e6, 0.01), (1e6, -0.01)):
        positions = start + step * np.arange(14)
        result = gplws.reconstruct(wedge[0], focus_positions_um=positions, method=method)
        assert np.array_equal(result.valid, expected.valid)
        valid = result.valid
        assert np.abs(result.depth_index - expected.depth_index)[valid].max() < 1e-3
        height = start + step * expected.depth_index[valid].astype(np.float64)
        assert np.abs(result.height[valid] - height).max() < 1e-7 * start


@pytest.mark.parametrize("method", ["rdf", "gplws"])
@pytest.mark.parametrize("kind", ["int64", "float32", "tensor", "black is negative", "high-pass"])
def test_counts_of_any_type_and_negative_brightness_give_the_same_surface(wedge, method, kind):
    frames = wedge[0]
    counts = {
        "int64": frames.astype(np.int64),
        "float32": frames * np.float32(16),
        "tensor": torch.from_numpy(frames.astype(np.uint32)),
        "black is negative": frames / np.float32(255) - np.float32(1),
        "high-pass": frames - frames.mean((1, 2), keepdims=True),
    }[kind]
    expected = gplws.reconstruct(frames, method=method)
    result = gplws.reconstruct(counts, method=method)
    valid, found = np.asarray(result.valid), np.asarray(result.depth_index)
    assert (valid == expected.valid).mean() > 0.99
    both = valid & expected.valid
    assert np.abs(found - expected.depth_index)[both].mean() < 0.02
    assert result.all_in_focus.dtype == counts.dtype


def test_noise_in_counts_is_as_invalid_as_in_shares():
    noise = np.random.default_rng(0).normal(0.5, 0.01, (9, 64, 80)).astype(np.float32)
    for method in ("rdf", "tft"):
        assert gplws.reconstruct(noise, method=method).valid.mean() < 0.01
        assert gplws.reconstruct(noise * 4095, method=method).valid.mean() < 0.01


def test_colour_gives_a_colour_image(wedge):
    frames, height = wedge
    colour = np.stack([frames, frames // 2, 255 - frames], -1)
    result = gplws.reconstruct(colour, z_step_um=3.0)
    assert result.all_in_focus.shape == (*height.shape, 3)
    index = np.clip(np.round(result.depth_index), 0, 13)
    rows, columns = np.nonzero(result.valid)
    candidates = [
        (
            colour[np.clip(index[rows, columns].astype(int) + d, 0, 13), rows, columns]
            == result.all_in_focus[rows, columns]
        ).all(-1)
        for d in (-1, 0, 1)
    ]
    assert np.mean(candidates[0] | candidates[1] | candidates[2]) > 0.99


def test_a_tensor_comes_back_as_tensors(wedge):
    frames, _ = wedge
    expected = gplws.reconstruct(frames, device="cpu")
    result = gplws.reconstruct(torch.from_numpy(frames))
    assert isinstance(result.height, torch.Tensor)
    assert np.array_equal(result.height.numpy(), expected.height, equal_nan=True)
    assert np.array_equal(result.all_in_focus.numpy(), expected.all_in_focus)


def test_bfloat16_frames_come_back_and_are_saved_as_float32(wedge, tmp_path):
    frames = torch.from_numpy(wedge[0] / np.float32(255)).bfloat16()
    for number, source in enumerate((frames, FocalStack(frames), list(frames))):
        result = gplws.reconstruct(source)
        result.save(tmp_path / str(number))
        image = torch.as_tensor(result.all_in_focus)
        assert image.dtype == torch.float32 and torch.equal(image, image.bfloat16().float())
        assert np.mean(np.asarray(result.valid)) > 0.97


def test_tiles_do_not_change_the_result(wedge):
    frames, _ = wedge
    tall = np.concatenate([frames, frames[:, ::-1], frames], 1)
    whole = gplws.reconstruct(tall)
    tiles = gplws.reconstruct(tall, memory_mb=0.5)
    assert np.array_equal(whole.valid, tiles.valid)
    assert np.allclose(whole.height, tiles.height, atol=1e-4, equal_nan=True)
    assert np.array_equal(whole.all_in_focus, tiles.all_in_focus)


@pytest.mark.parametrize("method", ["rdf", "rr", "tft", "shearlet", "gplws"])
@pytest.mark.parametrize("default", [torch.float64, torch.float16], ids=str)
def test_the_default_dtype_of_torch_changes_nothing(wedge, method, default):
    frames = wedge[0][:7, :40, :48]
    positions = 300.0 * np.arange(7)
    expected = gplws.reconstruct(frames, method=method, focus_positions_um=positions)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        network = gplws.load_model("gplws") if method == "gplws" else method
        result = gplws.reconstruct(frames, method=network, focus_positions_um=positions)
    finally:
        torch.set_default_dtype(before)
    assert result.height.dtype == np.float32
    np.testing.assert_array_equal(result.height, expected.height)
    np.testing.assert_array_equal(result.valid, expected.valid)


def test_the_input_is_not_changed(wedge):
    frames, _ = wedge
    before = frames.copy()
    gplws.reconstruct(frames)
    assert np.array_equal(frames, before)


def test_a_network_is_a_method(wedge):
    frames, height = wedge
    model = randomise_bn(GPLWSNet(widths=(4, 8, 16, 32)))
    result = gplws.reconstruct(frames[:5], method=model.fuse(), z_step_um=3.0)
    assert result.height.shape == height.shape and result.valid.all()
    assert result.metadata["method"] == "GPLWSNet"


def test_a_compiled_network_runs_compiled(wedge):
    calls = []

    def count(graph, inputs):
        calls.append(len(inputs))
        return graph.forward

    model = randomise_bn(GPLWSNet(widths=(4, 8, 16, 32))).fuse()
    expected = gplws.reconstruct(wedge[0][:5], method=model)
    result = gplws.reconstruct(wedge[0][:5], method=torch.compile(model, backend=count))
    assert calls
    assert np.allclose(result.height, expected.height, atol=1e-4)


@pytest.mark.parametrize("network", [FVNet, DFVNet, AiFDepthNet, DDFFNet, DefocusNet])
def test_a_peer_network_is_a_method(wedge, network, tmp_path):
    frames, _ = wedge
    frames = frames[:10, :40, :50]
    model = network().eval()
    positions = np.cumsum(np.arange(1.0, 11.0))
    options = {"focus_positions_um": positions, "device": "cpu"}
    result = gplws.reconstruct(frames, method=model, **options)
    assert result.metadata["method"] == network.__name__ and result.valid.all()
    assert result.height.min() >= 1 and result.height.max() <= 55
    stack = torch.from_numpy(frames / np.float32(255))[None, None]
    found = model.predict(stack, torch.tensor(positions, dtype=torch.float32))
    assert np.allclose(result.height, found.depth[0], atol=1e-4)
    assert np.allclose(np.interp(result.depth_index, np.arange(10), positions), result.height)
    assert np.array_equal(
        result.all_in_focus, np.take_along_axis(frames, found.index.numpy(), 0)[0]
    )
    regresses = network in (DDFFNet, DefocusNet)
    assert np.isnan(result.confidence).all() == regresses
    info = json.loads((result.save(tmp_path / "out") / "info.json").read_text())
    assert info["method"] == network.__name__


def test_a_network_with_a_fixed_number_of_frames_says_so(wedge):
    with pytest.raises(ValueError, match=r"N = 5 frames.* got N = 14"):
        gplws.reconstruct(wedge[0], method=DDFFNet(n_frames=5))


def test_a_peer_by_name_needs_weights(wedge):
    with pytest.raises(ValueError, match="no trained weights ship for 'dfvnet'"):
        gplws.reconstruct(wedge[0], method="dfvnet")


@pytest.mark.parametrize("method", ["mdml", "shearlet", "rr", "tft"])
def test_methods_other_than_the_default_measure_a_wedge_in_tiles_as_a_whole(wedge, method):
    frames, height = wedge
    tall = np.concatenate([frames, frames[:, ::-1], frames], 1)
    whole = gplws.reconstruct(tall, z_step_um=3.0, method=method)
    tiles = gplws.reconstruct(tall, z_step_um=3.0, method=method, memory_mb=0.5)
    assert whole.metadata["method"] == method
    assert error_um(whole, np.concatenate([height, height[::-1], height])) < 0.6
    assert (whole.valid == tiles.valid).mean() > 0.999
    both = whole.valid & tiles.valid
    assert np.abs(whole.height - tiles.height)[both].max() < 0.02
    assert (whole.all_in_focus == tiles.all_in_focus).mean() > 0.999


def test_regularised_heights_take_their_pixels_from_the_frames_they_say():
    generator = torch.Generator().manual_seed(1)
    frames = torch.rand(5, 24, 30, generator=generator)
    result = gplws.reconstruct(frames, method="rr")
    index = result.depth_index.round().long()
    chosen = frames.gather(0, index.clamp(0)[None])[0]
    assert torch.equal(result.all_in_focus[result.valid], chosen[result.valid])


@pytest.mark.parametrize("shape", [(420, 24), (24, 420), (200, 210)])
def test_a_network_sees_enough_of_the_neighbouring_tiles(shape):
    small = {"widths": (4, 8), "depths": (1, 1), "middle": 1, "decoder_depths": (1,)}
    model = randomise_bn(GPLWSNet(**small)).fuse()
    assert 4 * model.reach < 100
    frames = torch.rand(3, *shape)
    whole = gplws.reconstruct(frames, method=model)
    tiles = gplws.reconstruct(frames, method=model, memory_mb=0.5)
    assert torch.allclose(whole.height, tiles.height, atol=1e-3)
    assert torch.equal(whole.all_in_focus, tiles.all_in_focus)


def test_a_network_in_bfloat16_is_given_bfloat16(wedge):
    frames, height = wedge
    model = randomise_bn(GPLWSNet(widths=(4, 8, 16, 32))).fuse()
    exact = gplws.reconstruct(frames[:5], method=model)
    result = gplws.reconstruct(frames[:5], method=model.bfloat16())
    assert result.valid.all()
    assert np.mean(np.abs(result.height - exact.height) < 0.5) > 0.9


@pytest.mark.parametrize(
    ("dtype", "bytes_per_voxel"), [(torch.float32, 40), (torch.bfloat16, 28), (torch.float64, 80)]
)
def test_all_tiles_take_the_same_memory_and_the_budget_is_kept(dtype, bytes_per_voxel):
    seen = []

    class Rows(torch.nn.Module):
        reach, coarsest, floats_per_voxel, input_dtype = 20, 8, 10.0, dtype

        def forward(self, stack):
            assert stack.dtype == dtype
            seen.append(stack.shape[-2])
            return stack[:, 0]

    gplws.reconstruct(np.zeros((3, 1000, 64), np.uint8), method=Rows(), memory_mb=2)
    assert len(seen) > 2
    budget = 2 * 2**20
    assert max(seen) * 3 * 64 * bytes_per_voxel <= budget
    assert (max(seen) + 8 + 8) * 3 * 64 * bytes_per_voxel > 0.8 * budget
    assert max(seen) - min(seen) <= 8 * len(seen)


@pytest.mark.parametrize("method", ["rdf", "gplws"])
def test_the_look_at_the_whole_stack_keeps_the_budget_however_wide_it_is(method, monkeypatch):
    module = sys.modules["gplws.classical.statistics"]
    seen, measure = [], module.ring_difference_filter

    def recorded(frames):
        seen.append(frames.numel())
        return measure(frames)

    stack = FocalStack(np.random.default_rng(0).integers(0, 255, (20, 40, 900), np.uint8))
    engine = sys.modules["gplws.reconstruct"].engine_of(method, torch.device("cpu"))

    def prepared(memory_mb):
        seen.clear()
        search = sys.modules["gplws.reconstruct"].StackSearch(
            stack, engine, torch.device("cpu"), memory_mb
        )
        search.prepare()
        assert len(seen) == search.n_parts

    monkeypatch.setattr(module, "ring_difference_filter", recorded)
    prepared(4)
    assert len(seen) > 4
    # Frames, their responses, and these averaged are there at a time.
    assert 3 * 4 * max(seen) < 4 * 2**20
    prepared(640)
    assert seen == [20 * 40 * 900]


def test_the_last_steps_do_not_find_the_memory_of_the_search(monkeypatch):
    """Each may take the budget."""
    module = sys.modules["gplws.reconstruct"]
    held, after = [], module.StackSearch._after
    model = gplws.load_model("gplws")

    def watched(self, *given):
        held.append(len(model._workspaces._idle))
        return after(self, *given)

    monkeypatch.setattr(module.StackSearch, "_after", watched)
    gplws.reconstruct(np.random.default_rng(0).random((6, 40, 48)), method=model)
    assert len(held) == 2 and not any(held)


def test_the_reach_of_the_network_is_exact():
    model = randomise_bn(GPLWSNet(widths=(4, 8, 16, 32))).double()
    side = 2 * model.reach + 40
    stack = torch.rand(1, 3, 1, side, 8, dtype=torch.float64, requires_grad=True)
    middle = side // 2
    farthest = 0
    for row in range(middle, middle + 8):
        grad = torch.autograd.grad(model(stack)[0, 0, row].sum(), stack)[0]
        rows = grad.abs().sum((0, 1, 2, 4)).nonzero().flatten() - row
        farthest = max(farthest, int(rows.abs().max()))
    assert model.reach - 8 <= farthest <= model.reach


def test_the_weights_are_read_once_and_no_working_memory_stays(wedge, monkeypatch):
    module = sys.modules["gplws.reconstruct"]
    module._shared_model.cache_clear()
    read, load = [], module.load_model

    def counted(name, **options):
        read.append(name)
        return load(name, **options)

    monkeypatch.setattr(module, "load_model", counted)
    frames = wedge[0]
    with torch.inference_mode():
        first = gplws.reconstruct(frames, method="gplws")
    again = gplws.reconstruct(frames, method="gplws")
    assert read == ["gplws"]
    np.testing.assert_array_equal(first.depth_index, again.depth_index)
    model = module._shared_model("gplws", torch.device("cpu"), torch.float32)
    assert not model._workspaces._idle
    assert not any(parameter.is_inference() for parameter in model.parameters())


def test_precision_is_that_of_the_network_alone(wedge, tmp_path):
    frames = wedge[0]
    full = gplws.reconstruct(frames, method="gplws")
    half = gplws.reconstruct(frames, method="gplws", precision="bfloat16")
    assert full.metadata["parameters"]["precision"] == "float32"
    assert half.metadata["parameters"]["precision"] == "bfloat16"
    assert half.height.dtype == np.float32
    difference = np.abs(half.depth_index - full.depth_index)
    assert 0 < np.nanmean(difference) < 0.03
    module = gplws.load_model("gplws").bfloat16()
    same = gplws.reconstruct(frames, method=module)
    np.testing.assert_array_equal(same.depth_index, half.depth_index)
    streamed = next(gplws.reconstruct_stream([frames], method="gplws", precision="bfloat16"))
    np.testing.assert_array_equal(streamed.depth_index, half.depth_index)
    save_weights(gplws.load_model("gplws", fused=False), tmp_path / "own.safetensors")
    file = str(tmp_path / "own.safetensors")
    of_file = gplws.reconstruct(frames, method=file, precision="bfloat16")
    np.testing.assert_array_equal(of_file.depth_index, half.depth_index)


def test_a_saved_reconstruction_says_how_it_was_made(wedge, tmp_path):
    frames, _ = wedge
    result = gplws.reconstruct(frames, z_step_um=3.0, pixel_size_um=0.5)
    out = result.save(tmp_path / "out", mesh="ply")
    info = json.loads((out / "info.json").read_text())
    assert info["method"] == "rdf" and info["units"] == "um"
    assert info["parameters"]["focus_positions_um"][:2] == [0, 3]
    assert info["versions"]["gplws"] == gplws.__version__
    assert {f.name for f in out.iterdir()} == set(info["files"])
    with pytest.raises(FileExistsError):
        result.save(out)
    result.save(out, overwrite=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"z_step_um": 0.0}, ValueError, "z_step_um must be positive"),
        ({"z_step_um": -1.0}, ValueError, "z_step_um must be positive"),
        ({"z_step_um": 1.0, "focus_positions_um": [0, 1, 2]}, ValueError, "exclude each other"),
        ({"focus_positions_um": [0, 1]}, ValueError, "focus_positions_um must have shape"),
        ({"focus_positions_um": [0, 2, 1]}, ValueError, "focus_positions_um must rise or fall"),
        ({"pixel_size_um": -2.0}, ValueError, "pixel_size_um must be positive"),
        ({"axes": "ZYXC"}, ValueError, "axes"),
        ({"method": "magic"}, ValueError, "method must be one of auto, rdf, .*got 'magic'"),
        ({"method": 3}, TypeError, "method must be a name or a module"),
        ({"precision": "int8"}, ValueError, "precision must be one of float32, bfloat16, float16"),
        ({"precision": "bfloat16"}, ValueError, "precision of method 'rdf' is float32"),
        ({"precision": "float16", "method": "gplws", "device": "cpu"}, ValueError, "needs a GPU"),
        (
            {"precision": "bfloat16", "method": torch.nn.Flatten(1, 2)},
            ValueError,
            "precision goes with a name or a file",
        ),
        ({"device": "warp"}, ValueError, "device 'warp' cannot be used"),
        ({"z_direction": "left"}, ValueError, "z_direction must be"),
        ({"memory_mb": 0}, ValueError, "memory_mb must be positive"),
        ({"memory_mb": float("inf")}, ValueError, "memory_mb must be positive and finite"),
    ],
)
def test_a_wrong_argument_is_named(options, error, message):
    with pytest.raises(error, match=message):
        gplws.reconstruct(np.zeros((3, 8, 9), np.uint8), **options)


def half_frozen_network():
    """A network in training but for its last part; its output tells the mode."""
    network = torch.nn.Sequential(
        torch.nn.Dropout3d(0.5), torch.nn.Flatten(1, 2), torch.nn.Identity()
    )
    network[2].eval()
    return network


def test_a_network_is_computed_in_eval_mode_and_left_in_its_own(wedge):
    network = half_frozen_network()
    result = gplws.reconstruct(wedge[0], method=network)
    assert [part.training for part in network.modules()] == [True, True, True, False]
    again = gplws.reconstruct(wedge[0], method=network.eval())
    assert np.array_equal(result.height, again.height)
    failing = torch.nn.Sequential(torch.nn.Identity())
    with pytest.raises(ValueError, match="must return a focus volume"):
        gplws.reconstruct(wedge[0], method=failing)
    assert failing.training and failing[0].training


def test_a_network_that_asks_for_the_focus_positions_is_given_them(wedge):
    class Nearest(torch.nn.Module):
        def forward(self, stack, focus_positions):
            assert focus_positions.tolist() == [[0, 1, 2, 4, 8]]
            return -(focus_positions - 4).abs().view(1, -1, 1, 1).expand(1, 5, *stack.shape[3:])

    positions = [3.0, 4, 5, 7, 11]
    result = gplws.reconstruct(wedge[0][:5], focus_positions_um=positions, method=Nearest())
    assert np.abs(result.height - 7).max() < 1


def test_a_module_that_returns_something_else_is_named():
    with pytest.raises(ValueError, match="Identity must return a focus volume"):
        gplws.reconstruct(np.zeros((3, 8, 9), np.uint8), method=torch.nn.Identity())


def test_a_constant_stack_is_invalid_everywhere():
    result = gplws.reconstruct(np.full((5, 30, 31), 90, np.uint8))
    assert not result.valid.any() and np.isnan(result.height).all()


def test_tiny_and_two_frame_stacks_go_through():
    generator = np.random.default_rng(0)
    for shape in ((2, 1, 1), (2, 3, 50), (7, 2, 2), (3, 9, 1)):
        result = gplws.reconstruct(generator.integers(0, 255, shape, np.uint8), axes="ZYX")
        assert result.height.shape == shape[1:]


def test_a_focal_stack_keeps_its_calibration(wedge):
    frames, _ = wedge
    stack = FocalStack.from_frames(frames, z_step_um=3.0, pixel_size_um=0.7)
    result = gplws.reconstruct(stack)
    assert result.units == "um" and result.pixel_size_um == 0.7
    assert gplws.reconstruct(stack, z_step_um=1.0).metadata["parameters"]["focus_positions_um"][
        1
    ] == pytest.approx(1.0)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["cou2023_1_gt", "cou2023_2_gt", "cou2023_3_gt"])
def test_the_error_on_generated_stacks_stays_below_an_eighth_of_a_frame(shared_dir, name):
    folder = shared_dir / "data" / "stacks" / name
    result = gplws.reconstruct(folder)
    truth = np.load(folder / "gt.npz")["gt_index"]
    known = np.isfinite(truth)
    assert result.valid[known].mean() > 0.99
    both = known & result.valid
    assert np.abs(result.depth_index - truth)[both].mean() < 0.12


@pytest.mark.shared
def test_the_blind_hole_is_recovered(shared_dir):
    stack = read_stack(shared_dir / "data" / "stacks" / "drillhole")
    result = gplws.reconstruct(stack)
    depth = result.depth_index
    top, bottom = depth[:60, :60], depth[200:240, 200:240]  # the hole's axis is at (220, 216)
    assert result.valid.mean() > 0.9
    assert abs(np.nanmedian(top) - 6) < 2
    assert abs(np.nanmedian(bottom) - 80) < 2
    for flat in (top, bottom):
        assert np.nanpercentile(np.abs(flat - np.nanmedian(flat)), 90) < 3


def test_a_working_memory_that_is_no_number_is_named() -> None:
    with pytest.raises(TypeError, match="memory_mb must be a number of MiB, got '1G'"):
        gplws.reconstruct(np.zeros((3, 8, 8), np.uint8), memory_mb="1G")  # type: ignore[arg-type]


def test_an_empty_path_is_not_the_current_folder() -> None:
    with pytest.raises(ValueError, match="the path is empty"):
        gplws.reconstruct("")


def test_frames_on_the_last_axis_are_not_taken_for_pixels() -> None:
    with pytest.raises(ValueError, match="pass axes='YXZ' for the former, axes='ZYX' for the"):
        gplws.reconstruct(np.zeros((50, 60, 10), np.uint8))
    for axes, shape in (("ZYX", (60, 10)), ("YXZ", (50, 60))):
        assert gplws.reconstruct(np.zeros((50, 60, 10), np.uint8), axes=axes).height.shape == shape
    assert gplws.reconstruct(np.zeros((10, 50, 60), np.uint8)).height.shape == (50, 60)


def test_results_and_stacks_are_shown_in_a_line() -> None:
    stack = gplws.FocalStack(np.zeros((3, 8, 9), np.uint8), [0.0, 1.0, 2.5])
    assert repr(stack) == (
        "FocalStack(3 frames of 8 x 9 pixels, gray uint8, focus_positions_um=0 .. 2.5, "
        "pixel_size_um=None)"
    )
    assert repr(gplws.reconstruct(stack)) == (
        "Reconstruction(8 x 9 pixels, 0.0% valid, heights in um, pixel_size_um=None)"
    )


@pytest.mark.parametrize("method", ["rdf", "gplws"])
@pytest.mark.parametrize(("at", "valid"), [(-1.5, False), (0.3, True), (4.4, True), (10.5, False)])
def test_a_surface_beyond_the_stack_is_not_valid(method: str, at: float, valid: bool) -> None:
    frames = flat_stack(at).numpy()
    for memory_mb in (1024, 2):  # whole, and in tiles
        found = gplws.reconstruct(frames, method=method, memory_mb=memory_mb)
        assert (found.valid.mean() > 0.99) if valid else (found.valid.mean() < 0.05)
        assert np.array_equal(np.isfinite(found.height), found.valid)
        assert not found.confidence[~found.valid].any()
