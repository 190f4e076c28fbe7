import json

import numpy as np
import pytest
import tifffile
from PIL import Image

from gplws.datasets import DatasetError, Micro3D


def write_scene(folder, frames=12, *, height=None, description=None, suffix="bmp", first=1):
    folder.mkdir(parents=True)
    for number in range(first, first + frames):
        image = np.full((4, 5), 10 * number, np.uint8)
        Image.fromarray(image).save(folder / f"{number}.{suffix}")
    if height is not None:
        tifffile.imwrite(folder / "height.tif", height.astype(np.float32))
    if description is not None:
        (folder / "scene.json").write_text(json.dumps(description))


def heights(value=3.5):
    height = np.full((4, 5), value)
    height[0, 0] = np.nan
    return height


def test_frames_are_1_2_10_and_heights_are_frame_numbers(tmp_path):
    write_scene(tmp_path / "scene2", height=heights())
    write_scene(tmp_path / "scene10", height=heights(4.5))
    scenes = Micro3D(tmp_path)
    assert scenes.names == ("scene2", "scene10")
    sample = scenes[0]
    assert sample.stack.shape == (1, 12, 4, 5)
    assert (sample.stack[0, :, 0, 0] * 255).round().tolist() == [10 * n for n in range(1, 13)]
    assert sample.unit == "frames" and sample.depth[1, 1] == 3.5
    assert not sample.valid[0, 0] and bool(sample.valid[1, 1])
    assert Micro3D(tmp_path, first_frame=1)[0].depth[1, 1] == 2.5


def test_scene_json_calibrates_and_the_mask_hides(tmp_path):
    positions = [2.0 * n for n in range(12)]
    write_scene(
        tmp_path / "a", height=heights(5.0), description=dict(unit="um", focus_positions=positions)
    )
    mask = np.full((4, 5), 255, np.uint8)
    mask[1, 1] = 0
    Image.fromarray(mask).save(tmp_path / "a" / "valid.png")
    Image.fromarray(mask).save(tmp_path / "a" / "review.png")
    sample = Micro3D(tmp_path)[0]
    assert sample.stack.shape[1] == 12
    assert sample.unit == "um" and sample.focus_positions[-1] == 22.0
    assert not sample.valid[1, 1] and np.isnan(float(sample.depth[1, 1]))
    assert sample.depth_index()[2, 2] == 2.5


def test_height_maps_come_in_other_formats(tmp_path):
    write_scene(tmp_path / "a")
    np.save(tmp_path / "a" / "height.npy", heights())
    assert Micro3D(tmp_path)[0].depth[1, 1] == 3.5
    tifffile.imwrite(tmp_path / "a" / "height.tif", heights())
    with pytest.raises(DatasetError, match="several"):
        Micro3D(tmp_path)


def test_a_folder_of_frames_is_one_scene_like_the_published_sample(tmp_path):
    write_scene(tmp_path / "sample")
    with pytest.raises(DatasetError, match=r"height\.tif.*missing"):
        Micro3D(tmp_path / "sample")
    scenes = Micro3D(tmp_path / "sample", require_heights=False)
    assert scenes.names == ("sample",)
    assert not scenes[0].valid.any()


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "tif", "tiff"])
def test_one_scene_may_have_frames_of_any_format(tmp_path, suffix):
    write_scene(tmp_path / "a", height=heights(), suffix=suffix)
    scenes = Micro3D(tmp_path / "a")
    assert scenes.names == ("a",) and scenes[0].stack.shape[1] == 12


def test_scenes_of_one_part_of_a_split_are_chosen(tmp_path):
    for name in "abc":
        write_scene(tmp_path / "set" / name, height=heights())
    split = tmp_path / "test.txt"
    split.write_text("c\n\nb \n")
    assert Micro3D(tmp_path / "set", split).names == ("c", "b")
    assert Micro3D(tmp_path / "set", ["a"]).names == ("a",)
    with pytest.raises(DatasetError, match="scenes: d is not there"):
        Micro3D(tmp_path / "set", ["a", "d"])
    with pytest.raises(DatasetError, match=r"none\.txt: missing \(the list of scenes\)"):
        Micro3D(tmp_path / "set", tmp_path / "none.txt")
    with pytest.raises(DatasetError, match="scenes: none"):
        Micro3D(tmp_path / "set", [])


def test_what_is_damaged_or_missing_is_named(tmp_path):
    write_scene(tmp_path / "a", height=heights(), description=dict(unit="mm"))
    with pytest.raises(DatasetError, match=r"scene\.json.*unit"):
        Micro3D(tmp_path)[0]
    (tmp_path / "a" / "scene.json").write_text('{"unit": "um", "focus_positions": [1, 2]}')
    with pytest.raises(DatasetError, match="expected 12 numbers, got 2"):
        Micro3D(tmp_path)[0]
    positions = ", ".join(['"x"', *map(str, range(11))])
    (tmp_path / "a" / "scene.json").write_text(
        f'{{"unit": "um", "focus_positions": [{positions}]}}'
    )
    with pytest.raises(DatasetError, match=r"scene\.json: focus_positions: expected a list of num"):
        Micro3D(tmp_path)[0]
    (tmp_path / "a" / "scene.json").unlink()
    (tmp_path / "a" / "7.bmp").write_bytes((tmp_path / "a" / "7.bmp").read_bytes()[:60])
    with pytest.raises(DatasetError, match=r"7\.bmp"):
        Micro3D(tmp_path)[0]
    (tmp_path / "a" / "7.bmp").unlink()
    tifffile.imwrite(tmp_path / "a" / "height.tif", np.zeros((3, 3), np.float32))
    with pytest.raises(DatasetError, match=r"height\.tif"):
        Micro3D(tmp_path)[0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="neither"):
        Micro3D(tmp_path / "empty")


@pytest.mark.shared
def test_the_published_sample_is_read(shared_dir):
    scenes = Micro3D(shared_dir / "data" / "stacks", require_heights=False)
    assert scenes[scenes.names.index("drillhole")].stack.shape == (1, 100, 256, 256)
