"""What the names of frames say: their order, their focus positions, and what is odd about them."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
from PIL import Image

from gplws.io import list_frames, read_stack

FRAMES = np.random.default_rng(0).integers(0, 256, (4, 24, 31)).astype(np.uint8)


@pytest.mark.parametrize(
    "names",
    [
        ["z-10", "z-5", "z0", "z5", "z10"],
        ["z0", "z0.25", "z0.5", "z1", "z1.75", "z2"],
        ["scan_-1.5um_ch0", "scan_-1.0um_ch0", "scan_+0.0um_ch0", "scan_+0.5um_ch0"],
        ["z_-3", "z_-2", "z_-1"],
        ["z=-0.5", "z=0", "z=12.5"],
        ["-20", "-3"],
        ["a-1", "a-2", "a-10"],
        ["2024-01-05_1", "2024-01-05_2", "2024-01-05_10"],
        ["s1.1", "s1.2", "s1.9", "s1.10", "s1.11"],
        ["v2.0.9", "v2.0.10"],
        ["run2-001", "run2-002", "run2-003"],
        ["2024-05-12-9", "2024-05-12-10"],
        ["50-9", "50-10"],
        ["z\u22122", "z\u22121", "z0", "z1"],
        ["depth_1e-07", "depth_5e-06", "depth_1e-05", "depth_0.0001", "depth_0.001"],
        ["z-1e-03", "z0e+00", "z5e-03", "z1e+00"],
        ["site1e-1", "site1e-2", "site1e-10"],
        ["z-10_img_002", "z-5_img_001", "z0_img_000"],
        ["z0.125_000", "z0.25_001", "z0.5_002", "z0.75_003", "z1.0_004"],
        ["img_1_z0.5", "img_2_z0.25", "img_10_z0.125"],
        ["z-1_t1", "z-1_t2", "z-2_t3", "z-2_t4"],
    ],
)
def test_signs_and_decimals_of_names_count_where_they_are_plain(tmp_path, names, caplog):
    for name in sorted(names):
        (tmp_path / f"{name}.png").touch()
    assert [path.stem for path in list_frames(tmp_path)] == names
    assert not caplog.text


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["f1", "f2", "f4", "f5", "f6"], "no frame between f2.png and f4.png"),
        (["a1_z3", "a2_z1", "a3_z2"], "give different orders; read by the first"),
        (["z_-2um", "z_0um", "z_2um", "z_6um", "z_8um"], "others follow each other by 2"),
        (["f1", "f2", "f4"], ""),  # too few to tell
        (["z1", "z2", "z4", "z8", "z16"], ""),  # uneven by intention
        (["z0_c0", "z0_c1", "z1_c0", "z1_c1"], "z0 to z1 and _c0 to _c1"),
        (["z0_c0", "z0_c1", "z1_c0"], ""),
        (["s1_z0", "s1_z1", "s1_z2"], ""),
    ],
    ids=str,
)
def test_names_that_count_oddly_are_logged(tmp_path, names, message, caplog):
    for name in names:
        (tmp_path / f"{name}.png").touch()
    assert [path.stem for path in list_frames(tmp_path)] == names
    assert message in caplog.text and bool(message) == bool(caplog.records)


@pytest.mark.parametrize(
    "names", [["z-1", "z-0,75", "z0", "z0,25", "z1"], ["z-1,00", "z-0,75", "z0,00", "z1,00"]]
)
def test_a_comma_between_digits_is_that_of_a_fraction(tmp_path, names, caplog):
    for name in reversed(names):
        Image.fromarray(FRAMES[0]).save(tmp_path / f"{name}mm.png")
    assert [path.stem.removesuffix("mm") for path in list_frames(tmp_path)] == names
    assert not caplog.records


def test_a_name_unlike_signed_ones_is_logged(tmp_path, caplog):
    for name in ("z-2", "z-1", "z0", "z0.5", "mask"):
        (tmp_path / f"{name}.png").touch()
    list_frames(tmp_path)
    assert "also mask.png, named unlike the others" in caplog.text


class TestPositionsOfNames:
    @pytest.fixture
    def named(self, tmp_path):
        def write(*stems):
            for stem in stems:
                tifffile.imwrite(tmp_path / f"{stem}.tif", FRAMES[0])
            return tmp_path

        return write

    @pytest.mark.parametrize("listed", [False, True])
    def test_they_are_the_numbers_in_which_names_differ(self, named, listed, caplog):
        folder = named("scan3_z-1.5um", "scan3_z0um", "scan3_z0.5um", "scan3_z4um")
        source = list_frames(folder) if listed else folder
        caplog.clear()
        stack = read_stack(source, focus_positions_um="names")
        np.testing.assert_array_equal(stack.focus_positions_um, [-1.5, 0, 0.5, 4])
        again = read_stack(read_stack(folder), focus_positions_um="names")
        np.testing.assert_array_equal(again.focus_positions_um, stack.focus_positions_um)

    def test_gaps_between_them_are_none(self, named, caplog):
        folder = named("f1", "f2", "f4", "f5", "f6")
        read_stack(folder, focus_positions_um="names")
        assert not caplog.text
        read_stack(folder)
        assert "'names' if these numbers are um" in caplog.text

    @pytest.mark.parametrize(
        ("stems", "positions"),
        [
            (["z-500nm", "z0nm", "z2000nm"], [-0.5, 0, 2]),
            (["0.001mm", "0.003mm"], [1, 3]),
            (["z\u22121\u00b5m", "z2\u00b5m"], [-1, 2]),
            (["z1e-01", "z5e-01", "z1e+00"], [0.1, 0.5, 1]),
            (["5move", "6move"], [5, 6]),
            (["i001_z2.5", "i002_z2.0", "i003_z1.5"], [2.5, 2, 1.5]),
        ],
    )
    def test_units_signs_and_counters(self, named, stems, positions):
        stack = read_stack(named(*stems), focus_positions_um="names")
        np.testing.assert_allclose(stack.focus_positions_um, positions)

    def test_dashes_that_may_be_signs_are_warned_of(self, named, caplog):
        stack = read_stack(named("a-1", "a-2", "a-3"), focus_positions_um="names")
        np.testing.assert_array_equal(stack.focus_positions_um, [1, 2, 3])
        assert "count as separators" in caplog.text

    def test_names_that_say_none(self, named, tmp_path):
        folder = named("a1_z3", "a2_z5", "b")
        with pytest.raises(ValueError, match=r"a1_z3\.tif, a2_z5\.tif.*in one number alone"):
            read_stack(folder, focus_positions_um="names")
        np.save(tmp_path / "a.npy", FRAMES)
        for source in (tmp_path / "a.npy", FRAMES):
            with pytest.raises(ValueError, match="is not one file for each frame"):
                read_stack(source, focus_positions_um="names")
        with pytest.raises(TypeError, match="expected numbers or 'names', got 'name'"):
            read_stack(folder, focus_positions_um="name")
