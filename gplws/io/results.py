"""Reads back what :func:`gplws.io.save_reconstruction` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from gplws.io.readers import read_frame

# What save_reconstruction computes anew from the arrays.
_COMPUTED = ("units", "pixel_size_um", "shape", "statistics", "surface_texture", "files")


def read_reconstruction(folder: str | Path) -> dict[str, Any]:
    """The arrays and facts of a folder of results, by the names of `gplws.Reconstruction`.

    Args:
        folder: as `save_reconstruction` wrote it.

    Returns:
        ``height``, ``units``, ``depth_index``, ``confidence``, ``valid``, ``all_in_focus``,
        ``pixel_size_um`` and ``metadata``; arrays are numpy, equal to those that were saved, but
        for an ``all_in_focus`` in floats, which is float32.

    Raises:
        FileNotFoundError: there is no such folder, or a file in it is missing.
        ValueError: a file cannot be read, or its size is not that of the others.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    path = folder / "info.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: holds no results, as info.json is missing")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON ({error})") from error
    if not isinstance(info, dict) or not {"units", "pixel_size_um"} <= info.keys():
        raise ValueError(
            f"{path}: is not that of a reconstruction, which has units and pixel_size_um; "
            "the folder must be one that gplws reconstruct wrote"
        )
    image = folder / "all_in_focus.png"
    if not image.exists():
        image = folder / "all_in_focus.tif"
    names = {name: folder / f"{name}.tif" for name in ("height", "depth_index", "confidence")}
    names["all_in_focus"] = image
    arrays = {name: _read(folder, path) for name, path in names.items()}
    height = arrays["height"]
    for name, array in arrays.items():
        if array.shape[:2] != height.shape:
            raise ValueError(
                f"{names[name]}: is {array.shape[:2]}, not {height.shape} as height.tif"
            )
    return {
        **arrays,
        "valid": np.isfinite(height),
        "units": info["units"],
        "pixel_size_um": info["pixel_size_um"],
        "metadata": {key: value for key, value in info.items() if key not in _COMPUTED},
    }


def _read(folder: Path, path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: holds no results, as {path.name} is missing")
    return read_frame(path)
