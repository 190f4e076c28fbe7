"""Methods on real stacks beside each other: the pictures, and what is counted without truth."""

import json

import numpy as np
import pytest
from PIL import Image
from stacks import textured_stack

from benchmarks import side_by_side
from benchmarks.side_by_side import counted


def folder_of_frames(folder, frames):
    folder.mkdir(parents=True)
    names = [f"f{number}.png" for number in range(len(frames))]
    for name, frame in zip(names, frames, strict=True):
        Image.fromarray(frame).save(folder / name)
    return names


def test_methods_lie_side_by_side(call, tmp_path, capsys) -> None:
    folder = tmp_path / "piece"
    frames = (255 * textured_stack(4.5, n_frames=9, noise=0.002)).byte().numpy()
    names = folder_of_frames(folder, frames)
    (folder / "mask.png").write_bytes((folder / "f0.png").read_bytes())
    (folder / "stack.json").write_text(json.dumps({"frames": names}))
    options = f"--methods rdf mdml --crop 0 8 40 50 --out {tmp_path}/out"
    assert call(side_by_side, f"{folder} {options}") == ""
    said = capsys.readouterr()
    assert "speckle" in said.out and "mask.png" not in said.err
    with Image.open(tmp_path / "out" / "piece.png") as picture:
        assert picture.width > 600
    rows = json.loads((tmp_path / "out" / "side_by_side.json").read_text())["results"]
    assert [row["method"] for row in rows] == ["rdf", "mdml"]
    for row in rows:
        assert row["valid"] == 1 and row["speckle"] == row["apart"] == 0
        assert 0 < row["roughness"] < 0.1


def test_stacks_of_one_name_are_told_apart_by_their_folders(call, tmp_path, capsys) -> None:
    frames = (255 * textured_stack(2.0, n_frames=5)).byte().numpy()[:, :24, :24]
    for parent in ("a", "b", "a/b"):
        folder_of_frames(tmp_path / parent / "piece", frames)
    out = f"--methods sml --out {tmp_path}/out"
    assert call(side_by_side, f"{tmp_path}/a/piece {tmp_path}/b/piece {out}") == ""
    assert call(side_by_side, f"{tmp_path}/b/piece {tmp_path}/a/b/piece {out}") == "2"
    assert "the same name and folder" in capsys.readouterr().err
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {"a_piece.png", "b_piece.png"}
    rows = json.loads((tmp_path / "out" / "side_by_side.json").read_text())["results"]
    assert [row["stack"] for row in rows] == ["a_piece", "b_piece"]


def test_speckle_is_what_sticks_out_of_its_surroundings() -> None:
    reference = np.tile(np.linspace(2, 4, 40, dtype=np.float32), (30, 1))
    index = reference.copy()
    index[5, 7] += 3
    index[20, 20:30] = np.nan
    index[:, 33:] += 4  # a step is no speckle
    nowhere = np.full((8, 8), np.nan, np.float32)
    found, nothing = counted(index, reference), counted(nowhere, nowhere)
    valid = 30 * 40 - 10
    assert found["valid"] == pytest.approx(valid / 1200)
    assert found["speckle"] == pytest.approx(1 / valid)
    assert found["roughness"] < 0.1
    assert found["apart"] == pytest.approx((1 + 30 * 7) / valid)
    assert nothing["valid"] == 0 and np.isnan([nothing["speckle"], nothing["apart"]]).all()
