"""Tests of meshes: exact vertices, orientation, holes, colours."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from gplws.io import write_mesh
from gplws.io.meshes import triangulate

trimesh = pytest.importorskip("trimesh")

PIXEL_UM = 0.5


def relief(height: int = 6, width: int = 9) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 3, (height, width)).astype(np.float32)


def load(path):
    mesh = trimesh.load(path, process=False)
    return mesh.to_geometry() if isinstance(mesh, trimesh.Scene) else mesh


@pytest.mark.parametrize("suffix", [".ply", ".stl", ".glb", ".PLY"])
def test_heights_come_back_exactly(tmp_path, suffix):
    height = relief()
    path = tmp_path / f"m{suffix}"
    write_mesh(path, height, PIXEL_UM)
    mesh = load(path)
    rows = height.shape[0] - 1 - np.round(mesh.vertices[:, 1] / PIXEL_UM).astype(int)
    columns = np.round(mesh.vertices[:, 0] / PIXEL_UM).astype(int)
    np.testing.assert_array_equal(mesh.vertices[:, 2].astype("f4"), height[rows, columns])
    np.testing.assert_array_equal(mesh.vertices[:, 0], columns * PIXEL_UM)
    assert len(mesh.faces) == 2 * 5 * 8
    assert set(zip(rows.tolist(), columns.tolist(), strict=True)) == set(np.ndindex(6, 9))


def test_tensors_are_taken_as_well(tmp_path):
    height, color = relief(), (255 * np.random.default_rng(1).random((6, 9))).astype(np.uint8)
    valid = height > -2
    write_mesh(tmp_path / "a.ply", height, PIXEL_UM, valid, texture=color)
    tensors = [torch.from_numpy(array) for array in (height, valid, color)]
    write_mesh(tmp_path / "b.ply", tensors[0], PIXEL_UM, tensors[1], texture=tensors[2])
    assert (tmp_path / "a.ply").read_bytes() == (tmp_path / "b.ply").read_bytes()


def test_the_top_of_the_picture_is_at_positive_y():
    height = np.zeros((3, 4))
    height[0] = 7.0
    vertices, *_ = triangulate(height, PIXEL_UM)
    assert (vertices[vertices[:, 2] == 7.0, 1] == 1.0).all()
    assert vertices[:, :2].min() == 0


@pytest.mark.parametrize("suffix", [".ply", ".stl", ".glb"])
def test_normals_point_up(tmp_path, suffix):
    write_mesh(tmp_path / f"m{suffix}", relief(), PIXEL_UM)
    assert (load(tmp_path / f"m{suffix}").face_normals[:, 2] > 0).all()


def test_unknown_pixels_leave_holes():
    height = relief()
    height[2, 3] = np.nan
    valid = np.ones(height.shape, bool)
    valid[0, 0] = False
    vertices, faces, rows, columns = triangulate(height, PIXEL_UM, valid)
    # An inner pixel belongs to six triangles, the upper left corner to one.
    assert len(faces) == 2 * 5 * 8 - 6 - 1
    assert np.isfinite(vertices).all()
    pixels = set(zip(rows.tolist(), columns.tolist(), strict=True))
    assert pixels == set(np.ndindex(6, 9)) - {(2, 3), (0, 0)}
    assert set(np.unique(faces)) == set(range(len(vertices)))


@pytest.mark.parametrize("channels", [None, 3])
def test_vertices_have_the_colors_of_their_pixels(tmp_path, channels):
    height = relief()
    height[1, 1] = np.nan
    shape = height.shape if channels is None else (*height.shape, channels)
    texture = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)
    write_mesh(tmp_path / "m.ply", height, PIXEL_UM, texture=texture)
    mesh = load(tmp_path / "m.ply")
    rows = height.shape[0] - 1 - np.round(mesh.vertices[:, 1] / PIXEL_UM).astype(int)
    columns = np.round(mesh.vertices[:, 0] / PIXEL_UM).astype(int)
    expected = texture[rows, columns].reshape(len(rows), -1)
    colors = np.asarray(mesh.visual.vertex_colors)[:, :3]
    np.testing.assert_array_equal(colors, np.broadcast_to(expected, colors.shape))


def test_glb_colors_are_linear_light(tmp_path):
    texture = np.full((6, 9), 128, np.uint8)
    texture[0, 0] = 255
    write_mesh(tmp_path / "m.glb", relief(), PIXEL_UM, texture=texture)
    colors = np.asarray(load(tmp_path / "m.glb").visual.vertex_colors)[:, :3]
    assert set(np.unique(colors)) == {55, 255}


def test_large_maps_are_thinned_with_a_log(caplog):
    height = relief(101, 201)
    with caplog.at_level(logging.WARNING, logger="gplws"):
        vertices, faces, rows, columns = triangulate(height, PIXEL_UM, max_faces=5000)
    assert 2500 < len(faces) <= 5000
    assert "below 5000 faces" in caplog.text
    np.testing.assert_array_equal(vertices[:, 2], height[rows, columns])
    assert vertices[:, 1].max() == 100 * PIXEL_UM


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"units": "frames"}, "z_step_um"),
        ({"pixel_size_um": None}, "pixel_size_um"),
        ({"pixel_size_um": -1.0}, "pixel_size_um must be positive"),
        ({"path": "m.obj"}, r"\.ply, \.stl or \.glb"),
        ({"height_um": np.zeros((1, 5))}, "H, W >= 2"),
        ({"height_um": np.full((4, 5), np.nan)}, "no triangle"),
        ({"valid": np.zeros((6, 9), bool)}, "no triangle"),
        ({"valid": np.ones((5, 5), bool)}, "valid must have shape"),
        ({"texture": np.ones((5, 5), np.uint8)}, "texture must be"),
        ({"max_faces": 1}, "max_faces"),
    ],
)
def test_bad_arguments_are_named_and_write_nothing(tmp_path, arguments, message):
    given = {"path": "m.ply", "height_um": relief(), "pixel_size_um": PIXEL_UM} | arguments
    given["path"] = tmp_path / given["path"]
    with pytest.raises(ValueError, match=message):
        write_mesh(**given)
    assert not list(tmp_path.iterdir())


def test_existing_meshes_are_not_overwritten_by_accident(tmp_path):
    path = tmp_path / "m.stl"
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write_mesh(path, relief(), PIXEL_UM)
    assert path.read_bytes() == b"mine"
    write_mesh(path, relief(), PIXEL_UM, overwrite=True)
    assert len(load(path).faces) == 80
