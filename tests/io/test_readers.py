"""Tests of reading: formats, order, calibration, and every kind of bad input."""

from __future__ import annotations

import logging
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from gplws.data import FocalStack
from gplws.io import StackReadError, list_frames, read_stack
from gplws.io.calibration import ome_plane_position

HEIGHT, WIDTH, N = 24, 31, 4


def textured(dtype: str = "u1", channels: int | None = None, n: int = N) -> np.ndarray:
    shape = (n, HEIGHT, WIDTH) if channels is None else (n, HEIGHT, WIDTH, channels)
    values = np.random.default_rng(0).random(shape)
    if np.dtype(dtype).kind == "f":
        return values.astype(dtype)
    return (values * (np.iinfo(dtype).max + 0.99)).astype(dtype)


def write_pictures(folder: Path, frames: np.ndarray, suffix: str, **options) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"f{index}{suffix}" for index in range(len(frames))]
    for path, frame in zip(paths, frames, strict=True):
        if frame.dtype == np.uint16 and frame.ndim == 3:
            cv2.imwrite(str(path), frame[..., ::-1] if frame.shape[2] == 3 else frame)
        else:
            Image.fromarray(frame).save(path, **options)
    return paths


def separate_pages(path: Path, frames: np.ndarray, **options) -> Path:
    """TIFF whose directories follow their pixels, as most programs write it."""
    with tifffile.TiffWriter(path) as writer:
        for frame in frames:
            writer.write(frame, contiguous=False, metadata=None, **options)
    return path


def write_tiff(path: Path, frames: np.ndarray, **options) -> Path:
    """Multi-page TIFF; without `photometric`, tifffile takes 3 or 4 frames for one RGB image."""
    tifffile.imwrite(path, frames, photometric="minisblack", **options)
    return path


def write_packed_tiff(path: Path, frame: np.ndarray, bits: int, photometric: int) -> None:
    """Rows of values of so many bits without gaps between them; tifffile cannot write that."""
    places = np.arange(bits - 1, -1, -1)
    rows = (frame[..., None] >> places & 1).astype(np.uint8).reshape(len(frame), -1)
    pixels = np.packbits(rows, axis=1).tobytes()
    tags = {256: frame.shape[1], 257: len(frame), 258: bits, 259: 1, 262: photometric}
    tags |= {273: 8, 277: 1, 278: len(frame), 279: len(pixels)}
    pixels += b"\0" * (len(pixels) % 2)
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    header = struct.pack("<2sHI", b"II", 42, 8 + len(pixels))
    path.write_bytes(header + pixels + struct.pack("<H", len(tags)) + directory + bytes(4))


class TestFolders:
    @pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".TIFF", ".PNG"])
    @pytest.mark.parametrize("channels", [None, 3])
    def test_8_bit_pictures_come_back_exactly(self, tmp_path, suffix, channels):
        frames = textured(channels=channels)
        write_pictures(tmp_path, frames, suffix)
        stack = read_stack(tmp_path)
        assert stack.frames.dtype == np.uint8
        np.testing.assert_array_equal(stack.frames, frames)
        assert stack.focus_positions_um is None
        assert stack.pixel_size_um is None

    @pytest.mark.parametrize("suffix", [".png", ".tif"])
    @pytest.mark.parametrize("channels", [None, 3])
    def test_16_bit_pictures_stay_16_bit(self, tmp_path, suffix, channels):
        frames = textured("u2", channels)
        if suffix == ".tif":
            for index, frame in enumerate(frames):
                tifffile.imwrite(tmp_path / f"f{index}.tif", frame)
        else:
            write_pictures(tmp_path, frames, suffix)
        stack = read_stack(tmp_path)
        assert stack.frames.dtype == np.uint16
        np.testing.assert_array_equal(stack.frames, frames)

    def test_float_tiff_files_keep_their_values(self, tmp_path):
        frames = textured("f4") * 1e3 - 5
        for index, frame in enumerate(frames):
            tifffile.imwrite(tmp_path / f"f{index}.tif", frame)
        np.testing.assert_array_equal(read_stack(tmp_path).frames, frames)

    @pytest.mark.parametrize(("mode", "channels"), [("gray", None), ("rgb", 3)])
    def test_jpeg_is_read_as_stored(self, tmp_path, mode, channels):
        frames = np.stack(
            [
                cv2.resize(frame, None, fx=8, fy=8, interpolation=cv2.INTER_CUBIC)
                for frame in textured(channels=channels)
            ]
        )
        write_pictures(tmp_path, frames, ".jpg", quality=95)
        read = read_stack(tmp_path).frames
        assert read.shape == frames.shape
        assert np.abs(read.astype(int) - frames.astype(int)).mean() < 4

    def test_one_colour_is_read(self, tmp_path):
        frames = textured(channels=3)
        write_pictures(tmp_path / "in", frames, ".png")
        np.testing.assert_array_equal(read_stack(tmp_path / "in", channel=1).frames, frames[..., 1])
        again = read_stack(read_stack(tmp_path / "in"), channel=2)
        np.testing.assert_array_equal(again.frames, frames[..., 2])
        assert again.metadata["channel"] == 2

    def test_frames_come_in_natural_order(self, tmp_path):
        for index in (1, 2, 10, 100, 9):
            Image.fromarray(np.full((4, 5), index, np.uint8)).save(tmp_path / f"z{index}_ch0.png")
        stack = read_stack(tmp_path)
        np.testing.assert_array_equal(stack.frames[:, 0, 0], [1, 2, 9, 10, 100])
        assert stack.names == (
            "z1_ch0.png",
            "z2_ch0.png",
            "z9_ch0.png",
            "z10_ch0.png",
            "z100_ch0.png",
        )

    def test_folders_of_results_say_where_the_frames_are(self, tmp_path):
        write_pictures(tmp_path, textured(), ".png")
        (tmp_path / "info.json").touch()
        read_stack(tmp_path)
        (tmp_path / "height.tif").touch()
        with pytest.raises(StackReadError, match="results of a reconstruction"):
            read_stack(tmp_path)
        (tmp_path / "stack.tif").touch()
        with pytest.raises(StackReadError, match=r"its frames are .*stack\.tif"):
            read_stack(tmp_path)

    def test_other_files_are_skipped(self, tmp_path):
        frames = textured()
        write_pictures(tmp_path, frames, ".png")
        for name in ("stack.json", "SOURCE.txt", "gt.npz", "Thumbs.db", ".hidden.png", "._f0.png"):
            (tmp_path / name).write_bytes(b"no image")
        (tmp_path / "f9.png").mkdir()
        np.testing.assert_array_equal(read_stack(tmp_path).frames, frames)

    def test_mixed_formats_are_logged(self, tmp_path, caplog):
        write_pictures(tmp_path, textured()[:2], ".png")
        write_pictures(tmp_path, textured()[:2], ".bmp")
        read_stack(tmp_path)
        assert "mixes .bmp, .png" in caplog.text

    def test_a_name_unlike_the_others_is_logged(self, tmp_path, caplog):
        paths = write_pictures(tmp_path, textured(), ".png")
        read_stack(tmp_path)
        assert not caplog.text
        paths[0].with_name("mask.png").write_bytes(paths[0].read_bytes())
        assert read_stack(tmp_path).n_frames == N + 1
        assert "also mask.png, named unlike the others" in caplog.text

    def test_names_without_a_common_pattern_are_not_logged(self, tmp_path, caplog):
        for name in ("near", "middle", "far", "farther"):
            Image.fromarray(textured()[0]).save(tmp_path / f"{name}.png")
        assert read_stack(tmp_path).n_frames == 4
        assert not caplog.text

    def test_exif_orientation_is_ignored(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        write_pictures(tmp_path, textured(), ".jpg", exif=exif)
        assert read_stack(tmp_path).frames.shape == (N, HEIGHT, WIDTH)

    def test_lists_of_paths_keep_their_order(self, tmp_path):
        frames = textured()
        paths = write_pictures(tmp_path, frames, ".png")
        stack = read_stack([str(path) for path in reversed(paths)])
        np.testing.assert_array_equal(stack.frames, frames[::-1])

    @pytest.mark.parametrize("dtype", ["u1", "u2"])
    def test_opaque_alpha_is_dropped(self, tmp_path, dtype, caplog):
        frames = textured(dtype, 4)
        frames[..., 3] = np.iinfo(dtype).max
        paths = write_pictures(tmp_path, frames, ".png")
        expected = frames[..., :3] if dtype == "u1" else frames[..., [2, 1, 0]]
        with caplog.at_level(logging.INFO, logger="gplws"):
            np.testing.assert_array_equal(read_stack(tmp_path).frames, expected)
        assert f"{paths[0]}: dropped an opaque alpha" in caplog.text

    def test_transparent_pictures_are_named(self, tmp_path):
        frames = textured(channels=4)
        frames[..., 3] = 255
        frames[2, 0, 0, 3] = 0
        write_pictures(tmp_path, frames, ".png")
        with pytest.raises(StackReadError, match=r"f2\.png.*alpha"):
            read_stack(tmp_path)

    def test_palette_pictures_become_gray_or_rgb(self, tmp_path):
        indices = textured() // 64
        gray, color = tmp_path / "gray", tmp_path / "color"
        for folder, palette in (
            (gray, [v for level in (0, 50, 90, 255) for v in (level,) * 3]),
            (color, [255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 8, 7]),
        ):
            folder.mkdir()
            for index, frame in enumerate(indices):
                image = Image.fromarray(frame)
                image = image.convert("P") if image.mode != "P" else image
                image = Image.frombytes("P", image.size, frame.tobytes())
                image.putpalette(palette)
                image.save(folder / f"{index}.png")
        levels = np.array([0, 50, 90, 255], np.uint8)
        np.testing.assert_array_equal(read_stack(gray).frames, levels[indices])
        colors = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 8, 7]], np.uint8)
        np.testing.assert_array_equal(read_stack(color).frames, colors[indices])

    @pytest.mark.parametrize(
        ("mode", "suffix", "message"), [("1", ".png", "1-bit"), ("CMYK", ".jpg", "CMYK")]
    )
    def test_modes_that_are_no_measurement_are_named(self, tmp_path, mode, suffix, message):
        for index, frame in enumerate(textured()):
            Image.fromarray(frame).convert(mode).save(tmp_path / f"f{index}{suffix}")
        with pytest.raises(StackReadError, match=rf"f0\{suffix}.*{message}"):
            read_stack(tmp_path)

    def test_axes_may_confirm_but_not_contradict(self, tmp_path):
        write_pictures(tmp_path, textured(channels=3), ".png")
        assert read_stack(tmp_path, axes="ZYXS").is_color
        with pytest.raises(ValueError, match="axes='ZYX' names 3"):
            read_stack(tmp_path, axes="ZYX")


class TestBadFolders:
    def test_missing_paths_are_named(self, tmp_path):
        for source in (tmp_path / "no", str(tmp_path / "no.tif"), [tmp_path / "no.png"] * 2):
            with pytest.raises(FileNotFoundError, match="no"):
                read_stack(source)

    def test_empty_folder_is_named(self, tmp_path):
        (tmp_path / "notes.txt").write_text("x")
        with pytest.raises(StackReadError, match=f"{tmp_path.name}.*holds no frames"):
            read_stack(tmp_path)

    def test_one_frame_is_named(self, tmp_path):
        (path,) = write_pictures(tmp_path, textured()[:1], ".png")
        for source in (tmp_path, path, [path]):
            with pytest.raises(StackReadError, match=r"f0\.png.*at least 2"):
                read_stack(source)

    def test_frames_of_other_size_name_both_files(self, tmp_path):
        write_pictures(tmp_path, textured(), ".png")
        Image.fromarray(textured()[0, :-3]).save(tmp_path / "preview.png")
        with pytest.raises(StackReadError) as caught:
            read_stack(tmp_path)
        for text in ("f0.png", "preview.png", "31 x 24", "31 x 21"):
            assert text in str(caught.value)

    @pytest.mark.parametrize(("dtype", "channels"), [("u2", None), ("u1", 3)])
    def test_frames_of_other_mode_name_both_files(self, tmp_path, dtype, channels):
        write_pictures(tmp_path, textured(), ".png")
        Image.fromarray(textured(dtype, channels)[0]).save(tmp_path / "f3.png")
        with pytest.raises(StackReadError) as caught:
            read_stack(tmp_path)
        for text in (
            "f0.png",
            "f3.png",
            "gray, uint8",
            "RGB, uint8" if channels else "gray, uint16",
        ):
            assert text in str(caught.value)

    @pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif"])
    @pytest.mark.parametrize("content", [b"", b"x", b"not an image at all" * 20])
    def test_files_that_are_no_images_are_named(self, tmp_path, suffix, content):
        write_pictures(tmp_path, textured(), suffix)
        (tmp_path / f"f2{suffix}").write_bytes(content)
        with pytest.raises(StackReadError, match=rf"f2\{suffix}"):
            read_stack(tmp_path)

    @pytest.mark.parametrize(
        ("suffix", "dtype", "channels", "options"),
        [
            (".png", "u1", None, {}),
            (".png", "u1", 3, {}),
            (".png", "u2", None, {}),
            (".png", "u2", 3, {}),
            (".jpg", "u1", None, {}),
            (".jpg", "u1", 3, {"progressive": True}),
            (".bmp", "u1", None, {}),
            (".bmp", "u1", 3, {}),
            (".tif", "u1", None, {}),
            (".tif", "u1", None, {"compression": "tiff_lzw"}),
            (".tif", "u1", 3, {"compression": "tiff_adobe_deflate"}),
        ],
    )
    def test_truncated_files_are_named_at_every_length(
        self, tmp_path, suffix, dtype, channels, options, caplog
    ):
        caplog.set_level(logging.CRITICAL, logger="tifffile")
        paths = write_pictures(tmp_path, textured(dtype, channels), suffix, **options)
        intact = read_stack(paths[:2]).frames
        data = paths[1].read_bytes()
        for length in [*range(1, len(data) - 4, max(1, len(data) // 60)), len(data) - 4]:
            paths[1].write_bytes(data[:length])
            with pytest.raises(StackReadError, match=rf"f1\{suffix}"):
                read_stack(paths[:2])
        paths[1].write_bytes(data)
        np.testing.assert_array_equal(read_stack(paths[:2]).frames, intact)

    def test_damaged_png_is_named(self, tmp_path):
        paths = write_pictures(tmp_path, textured("u2", 3), ".png")
        data = bytearray(paths[2].read_bytes())
        data[len(data) // 2] ^= 0xFF
        paths[2].write_bytes(data)
        with pytest.raises(StackReadError, match=r"f2\.png.*checksum"):
            read_stack(tmp_path)

    def test_nan_pixels_are_named(self, tmp_path):
        frames = textured("f4")
        frames[3, 2, 1] = np.nan
        for index, frame in enumerate(frames):
            tifffile.imwrite(tmp_path / f"f{index}.tif", frame)
        with pytest.raises(ValueError, match=r"f3\.tif.*NaN"):
            read_stack(tmp_path)

    def test_multi_page_files_among_frames_are_named(self, tmp_path):
        for name in "ab":
            write_tiff(tmp_path / f"{name}.tif", textured())
        with pytest.raises(StackReadError, match=r"a\.tif: holds 4 pages"):
            read_stack(tmp_path)

    def test_lists_must_name_image_files(self, tmp_path):
        with pytest.raises(StackReadError, match="is a folder"):
            read_stack([tmp_path, tmp_path])
        (tmp_path / "a.txt").write_text("x")
        with pytest.raises(StackReadError, match=r"a\.txt"):
            read_stack([tmp_path / "a.txt"] * 2)
        with pytest.raises(StackReadError, match="unknown file type"):
            read_stack(tmp_path / "a.txt")

    def test_the_first_bad_file_is_named_whatever_the_threads_do(self, tmp_path):
        frames = np.repeat(textured(), 4, axis=0)
        paths = write_pictures(tmp_path, frames, ".png")
        for index in (5, 9, 14):
            paths[index].write_bytes(b"x")
        for _ in range(5):
            with pytest.raises(StackReadError, match=r"f5\.png"):
                read_stack(paths)


class TestTiff:
    @pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "f4", "f8", ">u2", ">f4"])
    @pytest.mark.parametrize("channels", [None, 3])
    @pytest.mark.parametrize("options", [{}, {"compression": "zlib"}], ids=["plain", "zlib"])
    def test_multi_page_files_come_back_exactly(self, tmp_path, dtype, channels, options):
        frames = textured(dtype, channels)
        path = tmp_path / "s.tif"
        photometric = "rgb" if channels else "minisblack"
        order = ">" if dtype.startswith(">") else "<"
        tifffile.imwrite(path, frames, photometric=photometric, byteorder=order, **options)
        stack = read_stack(path)
        assert stack.frames.dtype == frames.dtype.newbyteorder("=")
        np.testing.assert_array_equal(stack.frames, frames)
        pages = separate_pages(tmp_path / "p.tif", frames, photometric=photometric, **options)
        np.testing.assert_array_equal(read_stack(pages).frames, frames)

    def test_uncompressed_files_are_mapped_and_never_changed(self, tmp_path):
        path = tmp_path / "s.tif"
        write_tiff(path, textured("u2"))
        before = path.read_bytes()
        stack = read_stack(path)
        base = stack.frames
        while base.base is not None and not isinstance(base, np.memmap):
            base = base.base
        assert isinstance(base, np.memmap)
        stack.frames[:] = 0
        assert path.read_bytes() == before

    @pytest.mark.parametrize("mode", ["gray", "rgb"])
    def test_lzw_needs_no_extra_package(self, tmp_path, mode):
        frames = textured(channels=3 if mode == "rgb" else None)
        images = [Image.fromarray(frame) for frame in frames]
        path = tmp_path / "s.tif"
        images[0].save(path, save_all=True, append_images=images[1:], compression="tiff_lzw")
        np.testing.assert_array_equal(read_stack(path).frames, frames)

    @pytest.mark.parametrize("compression", ["tiff_lzw", "jpeg"])
    def test_many_compressed_pages_are_read(self, tmp_path, compression):
        """From eight on, tifffile describes pages by the first."""
        frames = [np.full((16, 16), 20 * n, np.uint8) for n in range(1, 11)]
        images = [Image.fromarray(frame) for frame in frames]
        path = tmp_path / "many.tif"
        images[0].save(path, save_all=True, append_images=images[1:], compression=compression)
        found = np.asarray(read_stack(path).frames).astype(int)
        assert found.shape == (10, 16, 16) and np.abs(found - np.stack(frames)).max() <= 1

    def test_series_of_newer_versions_of_tifffile_are_read(self, tmp_path, monkeypatch):
        """From 2026.5.2 on they are called for the axes of length 1, which have no methods."""
        old = tifffile.TiffPageSeries
        if not hasattr(old, "get_axes"):
            pytest.skip("this is a newer version: all other tests are of it")
        path = tmp_path / "s.ome.tif"
        metadata = {"axes": "TZCYX", "PhysicalSizeZ": 2.0, "PhysicalSizeZUnit": "\u00b5m"}
        write_tiff(path, textured()[None, :, None], ome=True, metadata=metadata)
        expected = read_stack(path)

        class Series(list[tifffile.TiffPageSeries]):
            def __call__(self, *, squeeze: bool) -> list[SimpleNamespace]:
                assert not squeeze
                return [
                    SimpleNamespace(axes=axes(one, False), shape=shape(one, False)) for one in self
                ]

        axes, shape, of_file = old.get_axes, old.get_shape, tifffile.TiffFile.series
        monkeypatch.setattr(
            tifffile.TiffFile, "series", property(lambda file: Series(of_file.__get__(file)))
        )
        monkeypatch.delattr(old, "get_axes")
        monkeypatch.setattr(old, "axes", property(lambda one: axes(one, True)))
        monkeypatch.setattr(old, "shape", property(lambda one: shape(one, True)))
        found = read_stack(path)
        np.testing.assert_array_equal(found.frames, textured())
        for stack in (expected, found):
            np.testing.assert_allclose(stack.focus_positions_um, 2.0 * np.arange(N))

    @pytest.mark.parametrize("kind", ["imagej", "ome"])
    def test_one_of_several_channels_is_read(self, tmp_path, kind):
        frames = np.stack([textured("u2"), textured("u2")[::-1]], axis=1)
        path = tmp_path / f"s.{kind}.tif"
        write_tiff(path, frames, metadata={"axes": "ZCYX"}, **{kind: True})
        with pytest.raises(StackReadError, match=r"2 channels.*pass channel=0"):
            read_stack(path)
        stack = read_stack(path, channel=1)
        np.testing.assert_array_equal(stack.frames, frames[:, 1])
        assert stack.metadata["channel"] == 1
        with pytest.raises(StackReadError, match="channel must be 0 to 1, got 2"):
            read_stack(path, channel=2)

    def test_bigtiff_is_read(self, tmp_path):
        path = tmp_path / "s.tif"
        write_tiff(path, textured(), bigtiff=True)
        np.testing.assert_array_equal(read_stack(path).frames, textured())

    def test_planar_color_is_read(self, tmp_path):
        frames = textured(channels=3)
        path = separate_pages(
            tmp_path / "s.tif",
            frames.transpose(0, 3, 1, 2),
            photometric="rgb",
            planarconfig="separate",
        )
        np.testing.assert_array_equal(read_stack(path).frames, frames)

    @pytest.mark.parametrize("contiguous", [True, False])
    def test_min_is_white_is_inverted(self, tmp_path, contiguous):
        path = tmp_path / "s.tif"
        if contiguous:
            tifffile.imwrite(path, 255 - textured(), photometric="miniswhite")
        else:
            separate_pages(path, 255 - textured(), photometric="miniswhite")
        np.testing.assert_array_equal(read_stack(path).frames, textured())

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate"])
    def test_pixels_keep_the_orientation_of_the_sensor(self, tmp_path, compression, orientation):
        for name, frames in (("gray", textured("u2")), ("color", textured(channels=3))):
            images = [Image.fromarray(frame) for frame in frames]
            tags = Image.Exif()
            tags[0x0112] = orientation
            images[0].save(
                tmp_path / f"{name}.tif",
                save_all=True,
                append_images=images[1:],
                compression=compression,
                tiffinfo=tags,
            )
            np.testing.assert_array_equal(read_stack(tmp_path / f"{name}.tif").frames, frames)

    @pytest.mark.parametrize("dtype", ["u1", "u2"])
    def test_white_that_is_0_in_lzw_files_is_inverted_once(self, tmp_path, dtype):
        frames = textured(dtype)
        paths = write_pictures(tmp_path, frames, ".tif", compression="tiff_lzw")
        for path in paths:
            with tifffile.TiffFile(path, mode="r+") as file:
                file.pages[0].tags["PhotometricInterpretation"].overwrite(0)
        np.testing.assert_array_equal(read_stack(tmp_path).frames, np.invert(frames))

    @pytest.mark.parametrize("bits", [10, 12, 14])
    @pytest.mark.parametrize("photometric", [0, 1])
    def test_packed_bits_keep_their_values(self, tmp_path, bits, photometric):
        frames = textured("u2") >> (16 - bits)
        for index, frame in enumerate(frames):
            write_packed_tiff(tmp_path / f"f{index}.tif", frame, bits, photometric)
        expected = frames if photometric == 1 else 2**bits - 1 - frames
        np.testing.assert_array_equal(read_stack(tmp_path).frames, expected)

    def test_a_folder_with_one_multi_page_file_is_that_stack(self, tmp_path):
        write_tiff(tmp_path / "s.tif", textured())
        np.testing.assert_array_equal(read_stack(tmp_path).frames, textured())

    def test_a_bare_rgb_array_is_recognised(self, tmp_path):
        path = tmp_path / "s.tif"
        tifffile.imwrite(path, textured(channels=3), photometric="minisblack")
        np.testing.assert_array_equal(read_stack(path).frames, textured(channels=3))

    def test_one_page_is_the_one_frame_error(self, tmp_path):
        tifffile.imwrite(tmp_path / "s.tif", textured()[0])
        with pytest.raises(StackReadError, match=r"s\.tif.*at least 2"):
            read_stack(tmp_path / "s.tif")

    def test_pages_of_different_sizes_are_refused(self, tmp_path):
        with tifffile.TiffWriter(tmp_path / "s.tif") as writer:
            for size in (20, 20, 21):
                writer.write(np.zeros((size, 30), np.uint8), contiguous=False, metadata=None)
        with pytest.raises(StackReadError, match=r"s\.tif.*\(2, 20, 30\).*\(21, 30\)"):
            read_stack(tmp_path / "s.tif")

    def test_explicit_axes_win(self, tmp_path):
        frames = textured()
        path = tmp_path / "s.tif"
        tifffile.imwrite(path, frames.transpose(1, 2, 0), metadata={"axes": "ZYX"})
        np.testing.assert_array_equal(read_stack(path, axes="YXZ").frames, frames)
        with pytest.raises(ValueError, match=r"s\.tif.*names 4 axes.*\(24, 31, 4\)"):
            read_stack(path, axes="ZYXS")

    @pytest.mark.parametrize("kind", ["plain", "pages", "zlib pages", "imagej", "ome", "lzw"])
    def test_truncated_stacks_raise_at_every_length(self, tmp_path, kind, caplog):
        caplog.set_level(logging.CRITICAL, logger="tifffile")
        frames = textured()
        path = tmp_path / "s.tif"
        if kind == "plain":
            write_tiff(path, frames)
        elif kind == "pages":
            separate_pages(path, frames)
        elif kind == "zlib pages":
            separate_pages(path, frames, compression="zlib")
        elif kind == "imagej":
            tifffile.imwrite(path, frames, imagej=True, metadata={"axes": "ZYX"})
        elif kind == "ome":
            tifffile.imwrite(path, frames, ome=True, metadata={"axes": "ZYX"})
        else:
            images = [Image.fromarray(frame) for frame in frames]
            images[0].save(path, save_all=True, append_images=images[1:], compression="tiff_lzw")
        data = path.read_bytes()
        # Some writers pad the end with up to 16 bytes.
        for length in [*range(0, len(data) - 17, len(data) // 50), len(data) - 17]:
            path.write_bytes(data[:length])
            with pytest.raises(StackReadError, match=r"s\.tif"):
                read_stack(path)

    def test_a_circle_of_directories_ends(self, tmp_path):
        path = separate_pages(tmp_path / "s.tif", textured())
        data = bytearray(path.read_bytes())
        offset = struct.unpack("<I", data[4:8])[0]
        count = struct.unpack("<H", data[offset : offset + 2])[0]
        struct.pack_into("<I", data, offset + 2 + 12 * count, offset)
        path.write_bytes(data)
        with pytest.raises(StackReadError, match="circle"):
            read_stack(path)

    def test_palette_and_1_bit_files_are_refused(self, tmp_path):
        tifffile.imwrite(
            tmp_path / "p.tif",
            textured(),
            photometric="palette",
            colormap=np.zeros((3, 256), np.uint16),
        )
        with pytest.raises(StackReadError, match="PALETTE"):
            read_stack(tmp_path / "p.tif")
        images = [Image.fromarray(frame).convert("1") for frame in textured()]
        images[0].save(tmp_path / "b.tif", save_all=True, append_images=images[1:])
        with pytest.raises(StackReadError, match=r"b\.tif"):
            read_stack(tmp_path / "b.tif")


class TestImageJ:
    @pytest.mark.parametrize(
        ("unit", "micrometres"),
        [
            ("micron", 1),
            ("um", 1),
            ("\\u00B5m", 1),
            ("microns", 1),
            ("mm", 1e3),
            ("nm", 1e-3),
            ("cm", 1e4),
        ],
    )
    def test_spacing_and_resolution_become_micrometres(self, tmp_path, unit, micrometres):
        path = tmp_path / "s.tif"
        tifffile.imwrite(
            path,
            textured("u2"),
            imagej=True,
            resolution=(4.0, 4.0),
            metadata={"axes": "ZYX", "spacing": 2.0, "unit": unit},
        )
        stack = read_stack(path)
        np.testing.assert_array_equal(stack.frames, textured("u2"))
        assert stack.pixel_size_um == pytest.approx(0.25 * micrometres, rel=1e-6)
        np.testing.assert_allclose(stack.focus_positions_um, 2.0 * micrometres * np.arange(N))

    @pytest.mark.parametrize("unit", ["inch", "in"])
    def test_lengths_of_a_print_are_no_calibration(self, tmp_path, unit, caplog):
        """ImageJ keeps 300 dpi of a file that it opened as unit=inch."""
        metadata = {"axes": "ZYX", "spacing": 1.0, "unit": unit}
        path = tmp_path / "s.tif"
        tifffile.imwrite(
            path, textured(), imagej=True, resolution=(300.0, 300.0), metadata=metadata
        )
        stack = read_stack(path)
        assert stack.pixel_size_um is None and stack.focus_positions_um is None
        assert "those of a print" in caplog.text

    def test_the_files_of_a_folder_are_calibrated_once(self, tmp_path, caplog):
        for number, frame in enumerate(textured()):
            path = tmp_path / f"f{number}.tif"
            tifffile.imwrite(path, frame, imagej=True, metadata={"axes": "YX", "unit": "um"})
        assert read_stack(tmp_path).pixel_size_um is None
        assert len(caplog.records) == 1 and "pixel size unknown" in caplog.text

    def test_a_z_step_that_turns_the_surface_over_is_logged(self, tmp_path, caplog):
        falling = FocalStack(textured(), focus_positions_um=-2.0 * np.arange(N))
        assert read_stack(falling, z_step_um=2.0).focus_positions_um[1] == 2.0
        assert "its focus positions fall" in caplog.text
        caplog.clear()
        rising = FocalStack(textured(), focus_positions_um=2.0 * np.arange(N))
        read_stack(rising, z_step_um=3.0)
        read_stack(falling, focus_positions_um=-np.arange(N))
        assert not caplog.records

    @pytest.mark.parametrize(
        "metadata",
        [
            {},
            {"spacing": 2.0},
            {"unit": "um"},
            {"spacing": 2.0, "unit": "pixel"},
            {"spacing": -1.0, "unit": "um"},
            {"spacing": 0.0, "unit": "um"},
        ],
    )
    def test_what_is_not_said_stays_unknown(self, tmp_path, metadata):
        path = tmp_path / "s.tif"
        tifffile.imwrite(path, textured(), imagej=True, metadata={"axes": "ZYX", **metadata})
        stack = read_stack(path)
        assert stack.pixel_size_um is None
        assert stack.focus_positions_um is None

    def test_print_resolution_is_no_calibration(self, tmp_path):
        path = tmp_path / "s.tif"
        write_tiff(path, textured(), resolution=(300, 300), resolutionunit="INCH")
        assert read_stack(path).pixel_size_um is None

    def test_arguments_win_over_metadata_with_a_log(self, tmp_path, caplog):
        path = tmp_path / "s.tif"
        tifffile.imwrite(
            path,
            textured(),
            imagej=True,
            resolution=(2.0, 2.0),
            metadata={"axes": "ZYX", "spacing": 2.0, "unit": "um"},
        )
        with caplog.at_level(logging.INFO, logger="gplws"):
            stack = read_stack(path, focus_positions_um=[0, 1, 3, 4], pixel_size_um=0.3)
        np.testing.assert_array_equal(stack.focus_positions_um, [0, 1, 3, 4])
        assert stack.pixel_size_um == 0.3
        assert "focus_positions_um wins" in caplog.text
        assert "pixel_size_um=0.3 wins over 0.5 um" in caplog.text

    def test_pixels_that_are_not_square_are_unknown_with_a_warning(self, tmp_path, caplog):
        path = tmp_path / "s.tif"
        tifffile.imwrite(
            path,
            textured(),
            imagej=True,
            resolution=(2.0, 4.0),
            metadata={"axes": "ZYX", "unit": "um"},
        )
        assert read_stack(path).pixel_size_um is None
        assert "not square" in caplog.text

    def test_hyperstacks_with_time_or_channels_are_refused(self, tmp_path):
        path = tmp_path / "s.tif"
        frames = np.stack([textured(), textured()])
        for axes, letter in (("TZYX", "T=2"), ("CZYX", "2 channels")):
            data = frames if axes[0] == "T" else frames.transpose(1, 0, 2, 3)
            tifffile.imwrite(
                path, data, imagej=True, metadata={"axes": axes if axes[0] == "T" else "ZCYX"}
            )
            with pytest.raises(StackReadError, match=rf"s\.tif.*{letter}"):
                read_stack(path)

    def test_time_points_need_a_word(self, tmp_path):
        path = tmp_path / "s.tif"
        tifffile.imwrite(path, textured(), imagej=True, metadata={"axes": "TYX"})
        with pytest.raises(StackReadError, match="axes='ZYX'"):
            read_stack(path)
        np.testing.assert_array_equal(read_stack(path, axes="ZYX").frames, textured())

    def test_three_channels_are_rgb(self, tmp_path):
        frames = textured(channels=3)
        path = tmp_path / "s.tif"
        tifffile.imwrite(path, frames.transpose(0, 3, 1, 2), imagej=True, metadata={"axes": "ZCYX"})
        np.testing.assert_array_equal(read_stack(path).frames, frames)

    def test_missing_frames_are_noticed(self, tmp_path):
        path = tmp_path / "s.tif"
        tifffile.imwrite(path, textured(), imagej=True, metadata={"axes": "ZYX"})
        data = path.read_bytes()
        path.write_bytes(data.replace(b"images=4", b"images=6").replace(b"slices=4", b"slices=6"))
        with pytest.raises(StackReadError, match=r"s\.tif"):
            read_stack(path)


class TestOme:
    def write(self, path: Path, frames: np.ndarray, axes: str = "ZYX", **metadata) -> Path:
        tifffile.imwrite(
            path, frames, ome=True, photometric="minisblack", metadata={"axes": axes, **metadata}
        )
        return path

    @pytest.mark.parametrize(
        ("unit", "micrometres"), [("µm", 1), ("nm", 1e-3), ("mm", 1e3), ("m", 1e6), (None, 1)]
    )
    def test_physical_sizes_become_micrometres(self, tmp_path, unit, micrometres):
        metadata = {
            f"PhysicalSize{axis}": size for axis, size in zip("XYZ", (0.5, 0.5, 3.0), strict=True)
        }
        if unit is not None:
            metadata |= {f"PhysicalSize{axis}Unit": unit for axis in "XYZ"}
        stack = read_stack(self.write(tmp_path / "s.ome.tif", textured("u2"), **metadata))
        np.testing.assert_array_equal(stack.frames, textured("u2"))
        assert stack.pixel_size_um == pytest.approx(0.5 * micrometres)
        np.testing.assert_allclose(stack.focus_positions_um, 3.0 * micrometres * np.arange(N))

    def test_pixel_units_stay_unknown(self, tmp_path):
        metadata = {"PhysicalSizeX": 1, "PhysicalSizeY": 1, "PhysicalSizeZ": 1}
        metadata |= {f"PhysicalSize{axis}Unit": "pixel" for axis in "XYZ"}
        stack = read_stack(self.write(tmp_path / "s.ome.tif", textured(), **metadata))
        assert stack.pixel_size_um is None
        assert stack.focus_positions_um is None

    @pytest.mark.parametrize(
        ("positions", "unit", "expected"),
        [
            ([10.0, 11.0, 13.0, 16.0], "µm", [0, 1, 3, 6]),
            ([4.0, 3.0, 2.0, 0.0], "mm", [0, -1000, -2000, -4000]),
            ([10.0, 12.0, 14.1, 16.0], None, [0, 2, 4.1, 6]),
            ([10.0, 110.0, 200.0, 300.0], None, [0, 2, 4, 6]),
            ([5.0, 5.0, 5.0, 5.0], "µm", [0, 2, 4, 6]),
            ([0.0, 3.0, 2.0, 5.0], "µm", [0, 2, 4, 6]),
        ],
        ids=["irregular", "falling", "no unit", "other unit", "constant", "not monotonic"],
    )
    def test_plane_positions_are_used_where_they_can_be(self, tmp_path, positions, unit, expected):
        plane = {"PositionZ": positions}
        if unit is not None:
            plane["PositionZUnit"] = [unit] * N
        path = self.write(tmp_path / "s.ome.tif", textured(), PhysicalSizeZ=2.0, Plane=plane)
        np.testing.assert_allclose(read_stack(path).focus_positions_um, expected)

    def write_planes(self, folder: Path, positions: list[float], unit: str | None) -> Path:
        """One file for each frame, with its PositionZ."""
        folder.mkdir()
        units = {} if unit is None else {"PositionZUnit": [unit]}
        for index, (frame, position) in enumerate(zip(textured(), positions, strict=True)):
            plane = {"PositionZ": [position], **units}
            path = folder / f"z{index}.ome.tif"
            self.write(path, frame, "YX", PhysicalSizeX=0.5, PhysicalSizeY=0.5, Plane=plane)
        return folder

    @pytest.mark.parametrize(
        ("positions", "unit", "expected"),
        [
            ([10.0, 11.0, 13.0, 16.0], "µm", [0, 1, 3, 6]),
            ([4.0, 3.0, 2.0, 0.0], "mm", [0, -1000, -2000, -4000]),
            ([10.0, 12.0, 14.0, 16.0], None, None),
            ([0.0, 3.0, 2.0, 5.0], "µm", None),
            ([1.0, 2.0, 3.0, float("nan")], "µm", None),
        ],
        ids=["irregular", "falling", "no unit", "not monotonic", "one unknown"],
    )
    def test_files_of_one_plane_say_their_positions(
        self, tmp_path, caplog, positions, unit, expected
    ):
        folder = self.write_planes(tmp_path / "in", positions, unit)
        stack = read_stack(folder)
        np.testing.assert_array_equal(stack.frames, textured())
        assert stack.pixel_size_um == 0.5
        if expected is None:
            assert stack.focus_positions_um is None
        else:
            np.testing.assert_allclose(stack.focus_positions_um, expected)
        assert ("does not rise or fall" in caplog.text) == (positions[:2] == [0.0, 3.0])
        given = read_stack(folder, z_step_um=7.0).focus_positions_um
        np.testing.assert_allclose(given, 7.0 * np.arange(N))

    def test_files_of_a_set_say_which_plane_they_hold(self):
        planes = "".join(
            f'<Plane TheZ="{z}" TheC="0" TheT="0" PositionZ="{3 * z}" PositionZUnit="nm"/>'
            for z in range(3)
        )
        data = "".join(
            f'<TiffData FirstZ="{z}" IFD="0"><UUID FileName="z{z}.ome.tif">u</UUID></TiffData>'
            for z in range(3)
        )
        xml = f'<OME xmlns="http://x/OME"><Image><Pixels>{planes}{data}</Pixels></Image></OME>'
        assert ome_plane_position(xml, "z2.ome.tif") == pytest.approx(0.006)
        assert ome_plane_position(xml, "z9.ome.tif") is None
        assert ome_plane_position(xml.replace("nm", "frame"), "z2.ome.tif") is None
        assert ome_plane_position("<OME>", "z2.ome.tif") is None
        assert ome_plane_position("<OME/>", "z2.ome.tif") is None

    @pytest.mark.parametrize("axes", ["CZYX", "ZCYX", "TCZYX"])
    def test_three_channels_are_rgb(self, tmp_path, axes):
        frames = textured(channels=3)
        given = frames.transpose(["ZYXC".index(letter) for letter in axes if letter != "T"])
        given = given[None] if "T" in axes else given
        path = self.write(tmp_path / "s.ome.tif", given, axes)
        np.testing.assert_array_equal(read_stack(path).frames, frames)
        np.testing.assert_array_equal(read_stack(path, axes=axes).frames, frames)

    @pytest.mark.parametrize(("axes", "message"), [("CZYX", "2 channels"), ("TZYX", "T=2")])
    def test_channels_and_times_must_be_chosen(self, tmp_path, axes, message):
        path = self.write(tmp_path / "s.ome.tif", np.stack([textured(), textured()]), axes)
        with pytest.raises(StackReadError, match=message):
            read_stack(path)

    def test_several_images_are_refused(self, tmp_path):
        path = tmp_path / "s.ome.tif"
        with tifffile.TiffWriter(path, ome=True) as writer:
            writer.write(textured(), metadata={"axes": "ZYX"})
            writer.write(textured()[:, :10], metadata={"axes": "ZYX"})
        with pytest.raises(StackReadError, match="several images"):
            read_stack(path)

    def test_one_of_several_images_is_chosen(self, tmp_path):
        path = tmp_path / "s.ome.tif"
        frames = {"whole": textured(), "part": textured()[:, :10]}
        with tifffile.TiffWriter(path, ome=True) as writer:
            for step, (name, pixels) in enumerate(frames.items(), start=1):
                lengths = {"PhysicalSizeZ": float(step), "PhysicalSizeZUnit": "µm"}
                writer.write(pixels, metadata={"axes": "ZYX", "Name": name, **lengths})
        for image in (1, "part"):
            stack = read_stack(path, image=image)
            np.testing.assert_array_equal(stack.frames, frames["part"])
            np.testing.assert_allclose(np.diff(stack.focus_positions_um), 2.0)
        with pytest.raises(ValueError, match=r"image=2: .* holds only"):
            read_stack(path, image=2)

    def test_the_only_stack_beside_a_snapshot_is_read(self, tmp_path):
        path = tmp_path / "s.ome.tif"
        with tifffile.TiffWriter(path, ome=True) as writer:
            writer.write(textured()[0, :10], metadata={"axes": "YX"})
            writer.write(textured(), metadata={"axes": "ZYX", "PhysicalSizeZ": 3.0})
        stack = read_stack(path)
        np.testing.assert_array_equal(stack.frames, textured())
        np.testing.assert_allclose(np.diff(stack.focus_positions_um), 3.0)

    @pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"metadata": {"a": 1}}])
    def test_a_page_written_at_a_time(self, tmp_path, options):
        path = tmp_path / "s.tif"
        with tifffile.TiffWriter(path) as writer:
            for frame in textured():
                writer.write(frame, **options)
        np.testing.assert_array_equal(read_stack(path).frames, textured())
        np.testing.assert_array_equal(read_stack(path, image=0).frames, textured())

    def test_one_file_of_a_set_is_the_whole_stack(self, tmp_path, recwarn):
        planes = "".join(
            f'<TiffData FirstZ="{z}" IFD="0"><UUID FileName="z{z}.ome.tif">u{z}</UUID></TiffData>'
            for z in range(N)
        )
        frames = textured()
        for z, frame in enumerate(frames):
            xml = (
                f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="u{z}">'
                '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" '
                f'Type="{frame.dtype}" SizeX="{frame.shape[1]}" SizeY="{frame.shape[0]}" '
                f'SizeZ="{N}" SizeC="1" SizeT="1"><Channel ID="Channel:0:0"/>{planes}'
                "</Pixels></Image></OME>"
            )
            tifffile.imwrite(tmp_path / f"z{z}.ome.tif", frame, description=xml, metadata=None)
        np.testing.assert_array_equal(read_stack(tmp_path / "z0.ome.tif").frames, frames)
        assert not [warning for warning in recwarn if "closed file" in str(warning.message)]

    def test_pages_unlike_the_others_are_never_left_out_unasked(self, tmp_path):
        path = tmp_path / "s.tif"
        with tifffile.TiffWriter(path) as writer:
            for frame in (*textured(), textured()[0, :10]):
                writer.write(frame, contiguous=False, metadata=None)
        with pytest.raises(StackReadError, match="pages differ in size"):
            read_stack(path)
        np.testing.assert_array_equal(read_stack(path, image=0).frames, textured())


class TestArrays:
    @pytest.mark.parametrize("suffix", [".npy", ".npz"])
    @pytest.mark.parametrize("dtype", ["u1", ">u2", "f4"])
    def test_numpy_files_come_back_exactly(self, tmp_path, suffix, dtype):
        frames = textured(dtype)
        path = tmp_path / f"s{suffix}"
        if suffix == ".npy":
            np.save(path, frames)
        else:
            np.savez_compressed(path, frames)
        stack = read_stack(path, z_step_um=2.0)
        np.testing.assert_array_equal(stack.frames, frames)
        assert stack.frames.dtype.isnative
        assert stack.focus_positions_um[1] == 2.0

    def test_npz_with_several_arrays_needs_the_name_frames(self, tmp_path):
        path = tmp_path / "s.npz"
        np.savez(path, frames=textured(), other=np.zeros(3))
        np.testing.assert_array_equal(read_stack(path).frames, textured())
        np.savez(path, a=textured(), b=np.zeros(3))
        with pytest.raises(StackReadError, match=r"s\.npz.*a, b"):
            read_stack(path)

    @pytest.mark.parametrize("suffix", [".npy", ".npz"])
    def test_truncated_numpy_files_are_named(self, tmp_path, suffix):
        path = tmp_path / f"s{suffix}"
        (np.save if suffix == ".npy" else np.savez)(path, textured())
        data = path.read_bytes()
        for length in (0, 5, 50, len(data) // 2, len(data) - 5):
            path.write_bytes(data[:length])
            with pytest.raises(StackReadError, match=rf"s\{suffix}"):
                read_stack(path)

    def test_pickled_objects_are_refused(self, tmp_path):
        np.save(tmp_path / "s.npy", np.array([{}, {}], object), allow_pickle=True)
        with pytest.raises(StackReadError, match=r"s\.npy"):
            read_stack(tmp_path / "s.npy")

    def test_tensors_stay_tensors(self):
        frames = torch.from_numpy(textured())
        stack = read_stack(frames)
        assert isinstance(stack.frames, torch.Tensor)
        assert stack.frames.data_ptr() == frames.data_ptr()

    def test_sequences_of_frames_are_stacked(self):
        frames = textured(channels=3)
        np.testing.assert_array_equal(read_stack(list(frames)).frames, frames)
        tensors = read_stack(tuple(torch.from_numpy(frames)))
        assert torch.equal(tensors.frames, torch.from_numpy(frames))

    @pytest.mark.parametrize(
        ("source", "error", "message"),
        [
            ([], ValueError, "empty sequence"),
            ([np.zeros((4, 5))], ValueError, "at least 2"),
            ([np.zeros((4, 5)), np.zeros((4, 6))], ValueError, r"frame 1 is \(4, 6\)"),
            ([np.zeros((4, 5)), np.zeros((4, 5), "f4")], ValueError, "float32"),
            ([np.zeros((4, 5)), "a.png"], TypeError, "ndarray, str"),
            ([1, 2], TypeError, "int"),
            (7, TypeError, "got int"),
            (None, TypeError, "got NoneType"),
            (b"folder", TypeError, "got bytes"),
        ],
    )
    def test_other_sources_are_refused(self, source, error, message):
        with pytest.raises(error, match=message):
            read_stack(source)

    def test_stacks_pass_through_with_overrides(self):
        stack = FocalStack.from_frames(textured(), z_step_um=2.0, pixel_size_um=0.5)
        assert read_stack(stack) is stack
        changed = read_stack(stack, z_step_um=3.0)
        assert changed.focus_positions_um[1] == 3.0
        assert changed.pixel_size_um == 0.5
        assert read_stack(stack, pixel_size_um=0.1).focus_positions_um[1] == 2.0

    @pytest.mark.parametrize("source", [textured(), FocalStack(textured())])
    def test_bad_arguments_are_named(self, source):
        with pytest.raises(ValueError, match="z_step_um must be positive"):
            read_stack(source, z_step_um=0)
        with pytest.raises(ValueError, match="focus_positions_um must have shape"):
            read_stack(source, focus_positions_um=[0, 1])
        with pytest.raises(ValueError, match="exclude"):
            read_stack(source, z_step_um=1, focus_positions_um=[0, 1, 2, 3])
        with pytest.raises(ValueError, match="pixel_size_um must be positive"):
            read_stack(source, pixel_size_um=-2)


class TestProgress:
    def test_callbacks_see_every_frame(self, tmp_path):
        seen: list[tuple[int, int]] = []
        write_pictures(tmp_path, textured(), ".png")
        read_stack(tmp_path, progress=lambda done, total: seen.append((done, total)))
        assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]

    def test_the_bar_goes_to_stderr(self, tmp_path, capsys):
        write_pictures(tmp_path, textured(), ".png")
        read_stack(tmp_path, progress=True)
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "frame" in captured.err


def test_list_frames_sorts_naturally(tmp_path):
    for name in ("b1.png", "a10.PNG", "a9.jpg", "a9.txt", ".a1.png"):
        (tmp_path / name).touch()
    assert [path.name for path in list_frames(tmp_path)] == ["a9.jpg", "a10.PNG", "b1.png"]
    with pytest.raises(FileNotFoundError):
        list_frames(tmp_path / "no")


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("drillhole", (100, 256, 256)),
        ("cou2023_1_gt", (41, 400, 400)),
        ("leaf", (6, 480, 637, 3)),
    ],
)
def test_real_folders_are_read(shared_dir, name, shape):
    stack = read_stack(shared_dir / "data" / "stacks" / name)
    assert stack.frames.shape == shape
    assert stack.frames.dtype == np.uint8
    assert stack.names[0].startswith("f000")
    assert stack.focus_positions_um is None


def test_reading_arrays_imports_no_heavy_library():
    heavy = "tifffile cv2 PIL matplotlib trimesh tqdm".split()
    code = (
        "import sys; import torch; before = set(sys.modules); import numpy as np\n"
        "from gplws.io import read_stack; read_stack(np.zeros((3, 4, 5)))\n"
        f"print(sorted((set(sys.modules) - before) & set({heavy!r})))"
    )
    import subprocess

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"


def test_arrays_of_other_libraries_are_read(tmp_path):
    frames = textured("u2")
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "stack.h5", "w") as file:
        stack = read_stack(file.create_dataset("frames", data=frames), z_step_um=2)
    assert stack.frames.dtype == np.uint16 and np.array_equal(stack.frames, frames)
    assert stack.focus_positions_um.tolist() == [0, 2, 4, 6]
    zarr = pytest.importorskip("zarr")
    last = zarr.array(frames.transpose(1, 2, 0))
    assert np.array_equal(read_stack(last, axes="YXZ").frames, frames)
