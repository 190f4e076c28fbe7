import json

import numpy as np
import pytest
import tifffile
import torch
from measured_surfaces import assert_close, grid, measured_map, placed, surface
from PIL import Image

from gplws.data import render_focal_stack
from gplws.datasets import (
    DatasetError,
    Micro3D,
    RegistrationError,
    build_micro3d_scene,
    fuse_heights,
)

PIXEL_UM, MEASURED_PIXEL_UM = 1.25, 0.8
SIZE = (128, 144)
# The measured map begins inside the stack on one side, and has the tilt of another stage.
PLACE = placed(rotation=-6.0, scale=1.01, shift=(24.0, -9.0), offset=40.0, slope=(0.03, -0.02))


@pytest.fixture(scope="module")
def scene_data():
    """Rendered frames of a known surface with noise, and what an instrument would measure of it."""
    height = surface(*grid(SIZE, PIXEL_UM))
    generator = torch.Generator().manual_seed(0)
    texture = torch.rand(*SIZE, generator=generator) * 0.5 + 0.3
    positions = np.linspace(height.min() - 2, height.max() + 2, 16)
    stack = render_focal_stack(
        torch.from_numpy(height),
        texture,
        torch.from_numpy(positions),
        pixel_size_um=PIXEL_UM,
        numerical_aperture=0.4,
        full_well_electrons=15_000,
    )
    measured = measured_map(PLACE, (220, 200), MEASURED_PIXEL_UM)
    steep = np.hypot(*np.gradient(measured, MEASURED_PIXEL_UM)) > 2.0
    measured[steep] = np.nan
    measured[40:70, 90:130] = np.nan
    return stack.frames.numpy(), positions, measured, height


def build(scene_data, folder, **changes):
    frames, positions, measured, _ = scene_data
    arguments = dict(
        measured_pixel_um=MEASURED_PIXEL_UM,
        pixel_size_um=PIXEL_UM,
        focus_positions_um=positions,
    )
    return build_micro3d_scene(frames, measured, folder, **{**arguments, **changes})


@pytest.fixture(scope="module")
def scene(scene_data, tmp_path_factory):
    return build(scene_data, tmp_path_factory.mktemp("set") / "scene1")


def test_a_scene_of_known_placement_is_built_and_read_back(scene_data, scene):
    frames, positions, _, truth = scene_data
    # A quarter of a pixel of the stack in place, 0.2 um at its rim in height.
    step = positions[1] - positions[0]
    assert_close(
        scene.registration, PLACE, rotation=0.15, scale=0.003, shift=0.3, offset=0.1, slope=0.001
    )
    source = scene.fused.source
    measured, from_stack = source == 2, source == 1
    assert 0.4 < measured.mean() < 0.95 and from_stack.mean() > 0.03
    error = np.abs(scene.fused.height_um - truth)
    assert np.median(error[measured]) < 0.05 * step
    assert np.median(error[measured]) < np.median(np.abs(scene.stack_um - truth)[measured])
    assert np.median(error[from_stack]) < 0.2 * step

    sample = Micro3D(scene.folder.parent)[0]
    assert sample.name == "scene1" and sample.unit == "um"
    np.testing.assert_array_equal((sample.stack[0] * 255).round().byte().numpy(), frames)
    np.testing.assert_allclose(sample.focus_positions.numpy(), positions, rtol=1e-6)
    np.testing.assert_array_equal(sample.valid.numpy(), scene.fused.valid)
    np.testing.assert_array_equal(sample.depth.numpy(), scene.fused.height_um)
    inside = sample.depth_index()[sample.valid]
    assert float(inside.isfinite().float().mean()) > 0.95

    information = json.loads((scene.folder / "scene.json").read_text())
    assert information["registration"]["scale"] == scene.registration.scale
    assert information["share_measured"] == pytest.approx(measured.mean())
    review = np.asarray(Image.open(scene.folder / "review.png"))
    assert review.shape[1] > 1000 and review[..., :3].std() > 20
    assert set(np.unique(np.asarray(Image.open(scene.folder / "source.png")))) <= {0, 127, 255}


def test_a_file_a_falling_stack_and_16_bits_give_the_same_scene(scene_data, scene, tmp_path):
    frames, positions, measured, _ = scene_data
    tifffile.imwrite(tmp_path / "confocal.tif", measured.astype(np.float32))
    deep = frames.astype(np.uint16) * 257
    # The first frame shows the top; readings along an axis that points down are negative heights.
    second = build_micro3d_scene(
        deep[::-1],
        tmp_path / "confocal.tif",
        tmp_path / "b",
        measured_pixel_um=MEASURED_PIXEL_UM,
        pixel_size_um=PIXEL_UM,
        focus_positions_um=-positions[::-1],
        z_direction="down",
    )
    assert (tmp_path / "b" / "16.tif").is_file() and not (tmp_path / "b" / "16.bmp").exists()
    np.testing.assert_allclose(second.stack_um, scene.stack_um, atol=1e-3)
    assert second.registration.shift_um == pytest.approx(scene.registration.shift_um, abs=0.01)
    sample = Micro3D(tmp_path / "b")[0]
    np.testing.assert_allclose(sample.focus_positions.numpy(), positions[::-1], rtol=1e-6)


@pytest.mark.parametrize("scale", [1 / 255, 1.0])
def test_float_frames_are_read_back_in_their_range(scene_data, tmp_path, scale):
    frames = scene_data[0].astype(np.float32) * np.float32(scale)
    folder = build((frames, *scene_data[1:]), tmp_path / "scene").folder
    sample = Micro3D(folder)[0]
    np.testing.assert_allclose(sample.stack[0].numpy() * 255, scene_data[0], atol=1e-3)


def test_an_occupied_folder_is_refused_before_the_work(scene_data, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite"):
        build(scene_data, tmp_path, method="no such method")


def test_a_scene_is_read_without_warnings(scene, caplog):
    Micro3D(scene.folder)[0]
    assert not caplog.records


def test_an_old_scene_is_replaced_with_all_its_frames_only_on_request(scene_data, tmp_path):
    folder = tmp_path / "scene"
    folder.mkdir()
    (folder / "99.bmp").write_bytes(b"old")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite"):
        build(scene_data, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["99.bmp", "notes.txt"]
    build(scene_data, folder, overwrite=True)
    assert not (folder / "99.bmp").exists() and (folder / "notes.txt").exists()
    assert Micro3D(folder)[0].stack.shape[1] == 16


def test_fusion_prefers_measured_heights_and_leaves_doubtful_ones_out():
    nan = np.nan
    stack = np.array([[1.0, 2.0, nan, 4.0]])
    aligned = np.array([[1.5, nan, 3.5, nan]])
    confidence = np.array([[0.9, 0.9, 0.0, 0.1]])
    fused = fuse_heights(stack, aligned, confidence=confidence, least_confidence=0.5)
    np.testing.assert_array_equal(fused.height_um, np.float32([[1.5, 2.0, 3.5, nan]]))
    assert fused.source.tolist() == [[2, 1, 2, 0]]
    assert fused.valid.tolist() == [[True, True, True, False]]
    for name, changes in (
        ("aligned_um", dict(aligned_um=np.zeros((2, 4)))),
        ("confidence", dict(confidence=np.zeros((2, 4)))),
        ("least_confidence", dict(least_confidence=0.5)),
        ("least_confidence", dict(least_confidence=2.0)),
    ):
        with pytest.raises(ValueError, match=name):
            fuse_heights(**{"stack_um": stack, "aligned_um": aligned, **changes})


def test_what_is_missing_or_does_not_match_is_named_and_nothing_is_written(scene_data, tmp_path):
    folder = tmp_path / "scene"
    with pytest.raises(ValueError, match="pixel_size_um"):
        build(scene_data, folder, pixel_size_um=None)
    with pytest.raises(ValueError, match="z_step_um"):
        build(scene_data, folder, focus_positions_um=None)
    with pytest.raises(ValueError, match="measured_pixel_um"):
        build(scene_data, folder, measured_pixel_um=-1.0)
    frames, positions, measured, _ = scene_data
    other = (frames, positions, np.random.default_rng(0).normal(size=(200, 200)), None)
    with pytest.raises(RegistrationError, match="measured_um"):
        build(other, folder)
    with pytest.raises(DatasetError, match=r"absent\.tif"):
        build((frames, positions, tmp_path / "absent.tif", None), folder)
    assert not folder.exists()
