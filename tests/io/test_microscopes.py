"""Files of microscopes: pixels, axes and lengths, several images, and what is damaged."""

import importlib.util
import json
import logging

import numpy as np
import pytest
from microscope_files import write_czi, write_lif, write_nd2, write_zarr

import gplws
from gplws.cli import main
from gplws.io import StackReadError, microscopes, read_stack
from gplws.io.calibration import Calibration

pytestmark = pytest.mark.no_cpu_kernels

VOXEL_UM = (0.5, 0.5, 2.0)  # X, Y, Z


@pytest.fixture(autouse=True)
def readers():
    for package in microscopes._PACKAGES.values():
        pytest.importorskip(package)


@pytest.fixture
def gray():
    """(Z, C, H, W)"""
    return np.random.default_rng(0).integers(1, 60000, (6, 2, 24, 40)).astype(np.uint16)


@pytest.fixture
def rgb():
    """(Z, H, W, 3)"""
    return np.random.default_rng(1).integers(1, 255, (5, 24, 40, 3)).astype(np.uint8)


def write(path, stack):
    """(Z, C, H, W) in the format of the suffix, with the voxels above."""
    if path.suffix == ".czi":
        write_czi(path, [stack], voxel_um=VOXEL_UM)
    elif path.suffix == ".lif":
        write_lif(path, {"stack": stack}, voxel_um=VOXEL_UM)
    elif path.suffix == ".nd2":
        write_nd2(path, stack)
    else:
        write_zarr(path, {"stack": stack}, "zcyx", scale_um={"z": 2.0, "y": 0.5, "x": 0.5})
    return path


@pytest.mark.parametrize("suffix", sorted(microscopes.MICROSCOPE_SUFFIXES))
class TestAllFormats:
    def test_gray_frames_and_lengths(self, suffix, gray, tmp_path):
        read = []
        stack = read_stack(
            write(tmp_path / f"a{suffix}", gray[:, :1]),
            progress=lambda done, total: read.append((done, total)),
        )
        np.testing.assert_array_equal(stack.frames, gray[:, 0])
        assert stack.frames.dtype == np.uint16
        np.testing.assert_allclose(stack.focus_positions_um, 2.0 * np.arange(6))
        assert stack.pixel_size_um == pytest.approx(0.5)
        assert read[-1][0] == read[-1][1] > 0

    def test_one_of_two_channels(self, suffix, gray, tmp_path):
        path = write(tmp_path / f"a{suffix}", gray)
        np.testing.assert_array_equal(read_stack(path, channel=1).frames, gray[:, 1])
        with pytest.raises(StackReadError, match="channel=0"):
            read_stack(path)

    def test_lengths_that_are_given_win(self, suffix, gray, tmp_path):
        path = write(tmp_path / f"a{suffix}", gray[:, :1])
        stack = read_stack(path, z_step_um=3.0, pixel_size_um=0.25)
        np.testing.assert_allclose(np.diff(stack.focus_positions_um), 3.0)
        assert stack.pixel_size_um == 0.25

    def test_reconstruct_in_um(self, suffix, gray, tmp_path):
        result = gplws.reconstruct(write(tmp_path / f"a{suffix}", gray), channel=0)
        assert result.height.shape == (24, 40)
        assert result.units == "um"
        assert result.pixel_size_um == pytest.approx(0.5)

    def test_a_truncated_file_is_named(self, suffix, gray, tmp_path):
        path = write(tmp_path / f"a{suffix}", gray)
        damaged = path / "0" / "zarr.json" if suffix == ".zarr" else path
        damaged.write_bytes(damaged.read_bytes()[:60])
        with pytest.raises(StackReadError, match=f"a{suffix}"):
            read_stack(path)

    def test_without_its_package(self, suffix, gray, tmp_path, monkeypatch, capsys):
        path = write(tmp_path / f"a{suffix}", gray)
        find, packages = importlib.util.find_spec, {*microscopes._PACKAGES.values()}
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name in packages else find(name)
        )
        with pytest.raises(ModuleNotFoundError, match=r"gplws\[io\]"):
            read_stack(path)
        assert main(["reconstruct", str(path), "-o", str(tmp_path / "out")]) == 1
        assert "gplws[io]" in capsys.readouterr().err

    def test_no_such_image(self, suffix, gray, tmp_path):
        path = write(tmp_path / f"a{suffix}", gray)
        with pytest.raises(ValueError, match=r"image=1: .* holds only 0"):
            read_stack(path, image=1)
        with pytest.raises(ValueError, match="no images of this name"):
            read_stack(path, image="other")
        with pytest.raises(TypeError, match="image must be a number or a name"):
            read_stack(path, image=0.5)


class TestCzi:
    def test_rgb(self, rgb, tmp_path):
        write_czi(tmp_path / "a.czi", [rgb[:, None]], compression="zstd1:")
        stack = read_stack(tmp_path / "a.czi")
        np.testing.assert_array_equal(stack.frames, rgb)
        assert stack.focus_positions_um is None
        assert stack.pixel_size_um is None

    def test_scenes(self, gray, tmp_path):
        write_czi(tmp_path / "a.czi", [gray[:, :1], gray[:, 1:, :16]])
        with pytest.raises(StackReadError, match=r"holds several images: 0 'scene 0': .* image=0"):
            read_stack(tmp_path / "a.czi")
        for image in (1, "scene 1"):
            stack = read_stack(tmp_path / "a.czi", image=image)
            np.testing.assert_array_equal(stack.frames, gray[:, 1, :16])
            assert stack.metadata["image"] == image

    def test_a_frame_that_was_not_recorded_is_warned_of(self, gray, tmp_path, caplog):
        write_czi(tmp_path / "a.czi", [gray[:, :1]], left_out=[2])
        assert not read_stack(tmp_path / "a.czi").frames[2].any()
        assert "nothing but zeros in frame 2" in caplog.text

    def test_channels_of_different_types(self, gray, tmp_path):
        from pylibCZIrw import czi

        with czi.create_czi(str(tmp_path / "a.czi")) as file:
            for z in range(6):
                file.write(gray[z, 0], plane={"Z": z, "C": 0, "T": 0})
                file.write(gray[z, 1].astype(np.uint8), plane={"Z": z, "C": 1, "T": 0})
        with pytest.raises(StackReadError, match="channels differ in size or type"):
            read_stack(tmp_path / "a.czi")

    @pytest.mark.parametrize(
        ("metadata", "pixel_size", "z_step"),
        [
            ({}, None, None),
            ({"Metadata": None}, None, None),
            ({"Metadata": {"Scaling": {"Items": None}}}, None, None),
            ({"Metadata": {"Scaling": {"Items": {"Distance": []}}}}, None, None),
            (
                {"Metadata": {"Scaling": {"Items": {"Distance": {"@Id": "Z", "Value": "1e-6"}}}}},
                None,
                1.0,
            ),
        ],
    )
    def test_scaling(self, metadata, pixel_size, z_step):
        found = microscopes._czi_calibration({"ImageDocument": metadata}, "a.czi")
        assert found == Calibration(pixel_size, z_step, source="CZI")


class TestLif:
    def test_rgb_samples_are_stored_blue_first(self, rgb, tmp_path):
        write_lif(tmp_path / "a.lif", {"stack": rgb})
        np.testing.assert_array_equal(read_stack(tmp_path / "a.lif").frames, rgb)

    def test_the_only_stack_among_snapshots(self, gray, tmp_path, caplog):
        write_lif(tmp_path / "a.lif", {"overview": gray[:1, :1], "stack": gray[:, :1]})
        with caplog.at_level(logging.INFO):
            stack = read_stack(tmp_path / "a.lif")
        np.testing.assert_array_equal(stack.frames, gray[:, 0])
        assert "its only stack: 0 'overview'" in caplog.text

    def test_a_name_of_digits_is_a_name_first(self, gray, tmp_path):
        write_lif(tmp_path / "a.lif", {"one": gray[:, :1], "002": gray[:, 1:], "0": gray[:, 1:]})
        path = tmp_path / "a.lif"
        for image, frames in {"002": gray[:, 1], "0": gray[:, 1], 0: gray[:, 0]}.items():
            np.testing.assert_array_equal(read_stack(path, image=image).frames, frames)
        np.testing.assert_array_equal(read_stack(path, image="1").frames, gray[:, 1])
        with pytest.raises(ValueError, match="no images of this name"):
            read_stack(path, image="00")

    def test_damage_within_is_an_error_that_names_the_file(self, gray, tmp_path):
        write_lif(tmp_path / "a.lif", {"stack": gray[:, :1]})
        damaged = (tmp_path / "a.lif").read_bytes().replace("<Data>".encode("utf-16-le"), b"<" * 12)
        (tmp_path / "a.lif").write_bytes(damaged)
        with pytest.raises(StackReadError, match=r"a\.lif: unreadable"):
            read_stack(tmp_path / "a.lif")

    def test_two_stacks(self, gray, tmp_path):
        write_lif(tmp_path / "a.lif", {"one": gray[:, :1], "two": gray[:, 1:]})
        with pytest.raises(StackReadError, match="several images: 0 'one': Z=6"):
            read_stack(tmp_path / "a.lif")
        np.testing.assert_array_equal(
            read_stack(tmp_path / "a.lif", image="two").frames, gray[:, 1]
        )

    def test_falling_positions_are_warned_of(self, gray, tmp_path, caplog):
        write_lif(tmp_path / "a.lif", {"stack": gray[:, :1]}, voxel_um=(0.5, 0.5, -2.0))
        stack = read_stack(tmp_path / "a.lif")
        np.testing.assert_allclose(stack.focus_positions_um, 2.0 * np.arange(6))
        assert "z_direction='down'" in caplog.text

    def test_without_a_unit_lengths_are_unknown(self, gray, tmp_path):
        write_lif(tmp_path / "a.lif", {"stack": gray[:, :1]}, unit="")
        stack = read_stack(tmp_path / "a.lif")
        assert stack.focus_positions_um is None
        assert stack.pixel_size_um is None

    def test_pixels_that_are_not_square(self, gray, tmp_path, caplog):
        write_lif(tmp_path / "a.lif", {"stack": gray[:, :1]}, voxel_um=(0.5, 0.6, 2.0))
        assert read_stack(tmp_path / "a.lif").pixel_size_um is None
        assert "not square" in caplog.text


class TestNd2:
    def test_compressed(self, gray, tmp_path):
        write_nd2(tmp_path / "a.nd2", gray, compressed=True)
        np.testing.assert_array_equal(read_stack(tmp_path / "a.nd2", channel=1).frames, gray[:, 1])

    def test_from_the_top_down(self, gray, tmp_path):
        write_nd2(tmp_path / "a.nd2", gray[:, :1], top_first=True)
        stack = read_stack(tmp_path / "a.nd2")
        np.testing.assert_allclose(stack.focus_positions_um, -2.0 * np.arange(6))

    def test_positions(self, gray, tmp_path):
        write_nd2(tmp_path / "a.nd2", np.stack([gray, gray + 1]), positions=["left", "right"])
        stack = read_stack(tmp_path / "a.nd2", image="right", channel=0)
        np.testing.assert_array_equal(stack.frames, gray[:, 0] + 1)
        with pytest.raises(StackReadError, match="several images: 0 'left'"):
            read_stack(tmp_path / "a.nd2")

    def test_a_frame_that_was_not_recorded_is_warned_of(self, gray, tmp_path, caplog):
        write_nd2(tmp_path / "a.nd2", gray[:, :1], left_out=[4])
        read_stack(tmp_path / "a.nd2")
        assert "nothing but zeros in frame 4" in caplog.text

    def test_uncalibrated(self, gray, tmp_path):
        write_nd2(tmp_path / "a.nd2", gray[:, :1], pixel_size_um=None, z_step_um=0.0)
        stack = read_stack(tmp_path / "a.nd2")
        assert stack.pixel_size_um is None
        assert stack.focus_positions_um is None

    def test_lengths_that_cannot_be_read_do_not_stop_it(self, gray, tmp_path, monkeypatch, caplog):
        write_nd2(tmp_path / "a.nd2", gray[:, :1])
        monkeypatch.setattr("nd2.ND2File.metadata", property(lambda file: 1 / 0))
        stack = read_stack(tmp_path / "a.nd2")
        assert stack.pixel_size_um is None
        np.testing.assert_allclose(stack.focus_positions_um, 2.0 * np.arange(6))
        assert "pixel size unknown" in caplog.text
        monkeypatch.setattr(microscopes, "_nd2_calibration", lambda *_: 1 / 0)
        assert read_stack(tmp_path / "a.nd2").focus_positions_um is None
        assert "calibration unknown" in caplog.text


class TestZarr:
    @pytest.mark.parametrize("version", ["0.4", "0.5"])
    def test_versions(self, version, gray, tmp_path):
        scale = {"z": 2.0, "y": 0.5, "x": 0.5}
        path = tmp_path / "any_name"
        write_zarr(path, {"stack": gray[None]}, "tzcyx", scale_um=scale, version=version)
        stack = read_stack(path, channel=1)
        np.testing.assert_array_equal(stack.frames, gray[:, 1])
        np.testing.assert_allclose(stack.focus_positions_um, 2.0 * np.arange(6))
        assert stack.pixel_size_um == 0.5

    @pytest.mark.parametrize("version", ["0.4", "0.5"])
    def test_a_collection(self, version, gray, tmp_path):
        images = {"one": gray[:, 0], "two": gray[:, 1]}
        write_zarr(tmp_path / "a.zarr", images, "zyx", version=version)
        stack = read_stack(tmp_path / "a.zarr", image="two")
        np.testing.assert_array_equal(stack.frames, gray[:, 1])
        assert stack.pixel_size_um is None

    def test_a_scale_of_the_whole_image_multiplies(self, gray, tmp_path):
        import zarr

        write_zarr(tmp_path / "a.zarr", {"a": gray[:, 0]}, "zyx", scale_um=dict.fromkeys("zyx", 2))
        attributes = zarr.open_group(tmp_path / "a.zarr", mode="r+").attrs
        ome = attributes["ome"]
        ome["multiscales"][0]["coordinateTransformations"] = [
            {"type": "translation", "translation": [7, 7, 7]},
            {"type": "scale", "scale": [0.5, 0.25, 0.25]},
        ]
        attributes["ome"] = ome
        stack = read_stack(tmp_path / "a.zarr")
        np.testing.assert_allclose(stack.focus_positions_um, np.arange(6))
        assert stack.pixel_size_um == 0.5

    def test_a_bare_array(self, gray, tmp_path):
        import zarr

        array = zarr.create_array(
            tmp_path / "a.zarr", shape=(6, 24, 40), chunks=(4, 24, 40), dtype=">u2"
        )
        array[...] = gray[:, 0]
        stack = read_stack(tmp_path / "a.zarr", z_step_um=1.0)
        np.testing.assert_array_equal(stack.frames, gray[:, 0])
        assert stack.frames.dtype.isnative

    @pytest.mark.parametrize(
        ("attributes", "message"),
        [({"plate": {}}, "pass the folder of one, such as a.zarr/A/1/0"), ({}, "without an OME")],
    )
    def test_groups_without_an_image(self, attributes, message, tmp_path):
        import zarr

        zarr.create_group(tmp_path / "a.zarr", attributes=attributes)
        with pytest.raises(StackReadError, match=message):
            read_stack(tmp_path / "a.zarr")


def test_the_command_line_takes_an_image_by_number_or_name(gray, tmp_path):
    write_lif(tmp_path / "a.lif", {"one": gray[:, :1], "two": gray[:, 1:, :16]})
    for image in ("1", "two"):
        out = tmp_path / f"out_{image}"
        main(["reconstruct", str(tmp_path / "a.lif"), "--image", image, "-o", str(out)])
        info = json.loads((out / "info.json").read_text())
        assert gplws.Reconstruction.load(out).height.shape == (16, 40)
        assert info["units"] == "um"


def test_only_files_of_several_images_have_one(gray, tmp_path):
    np.save(tmp_path / "a.npy", gray[:, 0])
    for source in (tmp_path / "a.npy", gray[:, 0]):
        with pytest.raises(ValueError, match=r"image=0: .* no file that may hold several"):
            read_stack(source, image=0)
