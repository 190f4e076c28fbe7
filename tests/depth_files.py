"""Depth maps in the formats of published sets, as tests write them."""

from pathlib import Path

import numpy as np
import pytest


def write_pfm(
    path: Path, values: np.ndarray, *, big_endian: bool = False, scale: float = 1.0
) -> None:
    """Writes (H, W) as gray PFM, rows from the bottom up."""
    kind = ">f4" if big_endian else "<f4"
    sign = 1 if big_endian else -1
    header = f"Pf\n{values.shape[1]} {values.shape[0]}\n{sign * scale}\n".encode()
    path.write_bytes(header + values[::-1].astype(kind).tobytes())


def write_exr(path: Path, channels: dict[str, np.ndarray]) -> None:
    """Writes channels (H, W) of float16 or float32 as OpenEXR; skips without the package."""
    openexr = pytest.importorskip("OpenEXR")
    header = {"compression": openexr.ZIP_COMPRESSION, "type": openexr.scanlineimage}
    with openexr.File(header, channels) as file:
        file.write(str(path))
