"""The weights that ship: accurate on stacks of others, and the same whatever the exposure."""

from __future__ import annotations

import functools
import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

import gplws
from gplws.data.generator import StackGenerator, StackSettings
from gplws.data.simulator import demo_scene, render_focal_stack
from gplws.data.transforms import split
from gplws.datasets import FolderStacks
from gplws.evaluation import evaluate

SIZE = 128


@functools.cache
def rendered(n_frames=12, electrons=20_000.0, contrast=1.0):
    """Frames (N, H, W) uint16 and the true height (H, W) in frames of the milled test piece."""
    scene = demo_scene(SIZE, frames=n_frames)
    albedo = 0.5 + contrast * (scene.albedo - 0.5)
    stack = render_focal_stack(
        scene.height_um,
        albedo,
        scene.focus_positions_um,
        # As if enlarged further: the blur of a frame step stays that of the full-size scene.
        pixel_size_um=scene.pixel_size_um / 2,
        numerical_aperture=scene.numerical_aperture,
        full_well_electrons=electrons,
        read_noise_electrons=4.0,
        bit_depth=12,
        seed=1,
    )
    return stack.frames.numpy(), stack.depth_index.numpy()


def height_in_frames(frames, method="gplws"):
    return gplws.reconstruct(frames, method=method).height


def mean_difference(first, second):
    difference = np.abs(first - second)
    assert np.isnan(difference).mean() < 0.04  # what the network does not know
    return float(np.nanmean(difference))


@pytest.mark.shared
@pytest.mark.parametrize("number", [1, 2, 3])
def test_generated_stacks_of_others_are_measured_to_six_hundredths_of_a_frame(shared_dir, number):
    sample = FolderStacks(shared_dir / "data" / "stacks" / f"cou2023_{number}_gt")[0]
    (result,) = evaluate({"gplws": "gplws"}, [("known", [sample])]).results
    assert result.frames.mae_frames < 0.06


def test_scenes_with_wide_blur_and_bright_neighbours_are_measured_better_than_by_rdf():
    settings = StackSettings(
        total_blur_px=(30.0, 60.0), two_materials=1.0, strong_materials=1.0, out_of_range=0.0
    )
    generator = StackGenerator(settings, seed=9_000_000)
    samples = [(f"{step}", split(generator.batch(step, 1, 12, 128))) for step in range(4)]
    means = evaluate({"gplws": "gplws", "rdf": "rdf"}, samples).means()
    errors = {
        name: sum(m.frames.mae_frames for m in means if m.method == name)
        for name in ("gplws", "rdf")
    }
    assert errors["gplws"] < errors["rdf"]


@pytest.mark.parametrize("scene", [0, 2])
def test_five_to_a_hundred_frames_of_a_scene_give_the_same_height(scene):
    settings = StackSettings(
        total_blur_px=(12.0, 18.0),
        blur_per_frame_px=(0.05, 3.0),
        texture_contrast=(0.5, 1.0),
        full_well_electrons=(40_000.0, 40_000.0),
        read_noise_electrons=(1.0, 5.0),
        bit_depths=(12,),
        strong_materials=0.0,
        out_of_range=0.0,
        gloss=0.0,
        jpeg=0.0,
    )
    (sample,) = split(StackGenerator(settings, seed=7_000_000).batch(scene, 1, 97, 96))
    frames = sample.stack[0].numpy()
    heights = {step: height_in_frames(frames[::step].copy()) for step in (1, 2, 4, 8, 24)}
    for fine, coarse in itertools.combinations(heights, 2):
        difference = mean_difference(heights[fine] * fine / coarse, heights[coarse])
        assert difference < 0.1, f"every {fine} and every {coarse} frames"


@pytest.mark.parametrize("n_frames", [10, 40])
@pytest.mark.parametrize("seen", ["blank", "noise", "texture that stays"])
def test_what_never_comes_into_focus_is_not_valid(n_frames, seen):
    generator = torch.Generator().manual_seed(1)
    texture = 0.2 + 0.4 * torch.rand(96, 128, generator=generator)
    noise = 0.01 * torch.randn(n_frames, 96, 128, generator=generator)
    frames = {"blank": 0 * noise + 0.5, "noise": 0.5 + noise, "texture that stays": texture + noise}
    result = gplws.reconstruct(frames[seen].numpy(), method="gplws")
    assert result.valid.mean() < 0.3
    assert np.isnan(result.height[~result.valid]).all()


def test_brightness_and_contrast_do_not_change_the_height():
    frames, _ = rendered()
    height = height_in_frames(frames)
    for gain, offset in ((0.4, 0), (1.3, 0), (0.7, 6_000)):
        changed = (frames * gain + offset).clip(0, 65_535).astype(np.uint16)
        assert mean_difference(height_in_frames(changed), height) < 0.1


def test_frames_in_reversed_order_give_the_same_height():
    frames, _ = rendered()
    last = len(frames) - 1
    reversed_height = height_in_frames(frames[::-1].copy())
    assert mean_difference(last - reversed_height, height_in_frames(frames)) < 0.01


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_turned_stack_gives_the_turned_height(turns):
    frames, _ = rendered()
    turned = height_in_frames(np.rot90(frames, turns, (1, 2)).copy())
    assert mean_difference(np.rot90(turned, -turns), height_in_frames(frames)) < 0.1


def test_colour_and_gray_give_the_same_height():
    frames, _ = rendered()
    colour = np.repeat(frames[..., None], 3, -1)
    assert mean_difference(height_in_frames(colour), height_in_frames(frames)) < 1e-3


def test_confidence_orders_the_errors():
    frames, truth = rendered(16, 400.0)
    stack = torch.from_numpy(frames.astype(np.float32) / 65_535)[None, None]
    found = gplws.load_model("gplws").predict(stack)  # depth of every pixel, valid or not
    error = np.abs(found.depth[0].numpy() - truth).ravel()
    kept = error[np.argsort(-found.confidence.numpy().ravel())[: int(0.8 * error.size)]]
    assert np.sqrt((kept**2).mean()) < 0.5 * np.sqrt((error**2).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_network_says_what_the_training_form_says(dtype):
    frames, _ = rendered()
    stack = torch.from_numpy(frames.astype(np.float32) / 65_535)[None, None]
    plain = gplws.load_model("gplws", fused=False).eval()
    fused = gplws.load_model("gplws").to(dtype)
    difference = (plain.predict(stack).depth - fused.predict(stack).depth).abs().mean()
    assert difference < (1e-4 if dtype == torch.float32 else 0.05)


def test_the_weights_say_what_they_were_trained_on():
    from safetensors import safe_open

    path = Path(gplws.__file__).parent / "models" / "weights" / "gplws.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["model"] == "gplws" and path.stat().st_size < 4_000_000
    card = path.with_suffix(".md").read_text(encoding="utf-8")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest in card and "licence" in card
