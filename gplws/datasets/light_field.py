"""4D Light Field benchmark (HCI): focal stacks refocused from views of a camera array."""

from __future__ import annotations

import configparser
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gplws.data import DepthSample
from gplws.datasets.files import (
    DatasetError,
    DepthDataset,
    PathLike,
    depth_sample,
    existing_folder,
    load_image,
    read_depth_map,
    require_file,
)
from gplws.io.names import natural_key

# Pixels beyond the largest shift, for the ringing of the interpolation at the mirrored border.
_MARGIN_PX = 8


class LightField4D(DepthDataset):
    """Focal stacks of the HCI 4D Light Field benchmark; depth is disparity in pixels per view.

    ::

        root/CATEGORY/SCENE/parameters.cfg
        root/CATEGORY/SCENE/input_Cam000.png .. input_Cam080.png   views, row by row from top left
        root/CATEGORY/SCENE/gt_disp_lowres.pfm                     disparity of the central view

    A frame is focused where disparity equals its focus position: all views are shifted by that
    disparity times their distance from the central one, and averaged. Greater disparity is nearer.
    Near the borders views see what the central one does not; there they are mirrored.

    Args:
        root: a folder with scenes at any depth below, or one scene.
        categories: folders of scenes to take, e.g. ("stratified", "training"); None: all. Scenes of
            "test" have no public disparity and are left out.
        frames: number of focus positions.
        disparity_range: first and last focus position, pixels.

    Raises:
        FileNotFoundError: ``root`` does not exist.
        DatasetError: no scene with disparity in it.
        ValueError: fewer than two frames, or an empty range.

    Source: Honauer et al., "A dataset and evaluation methodology for depth estimation on 4D light
    fields", ACCV 2016; files: the repository lightfield-analysis/python-tools. Ten frames from -2.5
    to 2.5: Wang et al., "Bridging unsupervised and supervised depth from focus via all-in-focus
    supervision", ICCV 2021, arXiv:2108.10843.
    """

    def __init__(
        self,
        root: PathLike,
        *,
        categories: Sequence[str] | None = None,
        frames: int = 10,
        disparity_range: tuple[float, float] = (-2.5, 2.5),
    ) -> None:
        if frames < 2:
            raise ValueError(f"frames: expected at least 2, got {frames}")
        if not math.isfinite(disparity_range[1] - disparity_range[0]) or (
            disparity_range[0] == disparity_range[1]
        ):
            raise ValueError(f"disparity_range: expected two numbers, got {disparity_range}")
        folder = existing_folder(root)
        scenes = [
            path.parent
            for path in folder.rglob("parameters.cfg")
            if (path.parent / "gt_disp_lowres.pfm").is_file()
            and (categories is None or path.parent.parent.name in categories)
        ]
        if not scenes:
            raise DatasetError(
                f"{folder}: no scene with parameters.cfg and gt_disp_lowres.pfm"
                + ("" if categories is None else f" in {', '.join(categories)}")
            )
        self._scenes = sorted(scenes, key=lambda path: natural_key(str(path)))
        self._positions = torch.linspace(*disparity_range, frames)
        super().__init__([str(scene.relative_to(folder)) for scene in self._scenes])

    def _load(self, index: int) -> DepthSample:
        scene = self._scenes[index]
        rows, columns = _camera_grid(scene / "parameters.cfg")
        paths = [scene / f"input_Cam{k:03d}.png" for k in range(rows * columns)]
        for path in paths:
            require_file(path, f"a view of {rows} x {columns}")
        central = load_image(paths[(rows // 2) * columns + columns // 2])

        def view(row: int, column: int) -> Tensor:
            path = paths[row * columns + column]
            image = load_image(path)
            if image.shape != central.shape:
                raise DatasetError(
                    f"{path}: expected {tuple(central.shape)} as the other views, got "
                    f"{tuple(image.shape)}"
                )
            return image

        disparity = scene / "gt_disp_lowres.pfm"
        return depth_sample(
            refocus(view, (rows, columns), self._positions),
            read_depth_map(disparity),
            self._positions,
            unit="px",
            name=self.names[index],
            source=disparity,
            all_in_focus=central,
        )


def refocus(
    view: Callable[[int, int], Tensor], grid: tuple[int, int], disparities: Tensor
) -> Tensor:
    """Focal stack of a light field by shift and sum, with shifts below one pixel.

    A point of disparity d at (y, x) in the central view is at (y - d r, x - d c) in the view r rows
    below and c columns right of it. Shifts are exact for band-limited views (done in Fourier
    space); beyond the borders views are mirrored.

    Args:
        view: gives the view (row, column), (C, H, W) float32 in 0..1; called once for each.
        grid: rows and columns of views; the central view is (rows // 2, columns // 2).
        disparities: (N,) pixels per view.

    Returns:
        (C, N, H, W) float32 in 0..1.

    Source: Ng et al., "Light field photography with a hand-held plenoptic camera", Stanford CTSR
    2005-02, section 4 (refocusing as shift and add).
    """
    rows, columns = grid
    farthest = max(rows // 2, columns // 2) * float(disparities.abs().max())
    total: Tensor | None = None
    for row in range(rows):
        for column in range(columns):
            image = view(row, column)
            height, width = image.shape[1:]
            margin_y, margin_x = (
                min(math.ceil(farthest) + _MARGIN_PX, size - 1) for size in (height, width)
            )
            padded = F.pad(image[None], (margin_x, margin_x, margin_y, margin_y), mode="reflect")[0]
            spectrum = torch.fft.rfft2(padded)  # (C, P, Q)
            frequency_y = torch.fft.fftfreq(padded.shape[1])
            frequency_x = torch.fft.rfftfreq(padded.shape[2])
            shift_y, shift_x = (
                disparities * (row - rows // 2),
                disparities * (column - columns // 2),
            )
            phase_y = _phase(shift_y, frequency_y)[:, None, :, None]  # (N, 1, P, 1)
            phase_x = _phase(shift_x, frequency_x)[:, None, None, :]  # (N, 1, 1, Q)
            if total is None:
                total = spectrum.new_zeros(len(disparities), *spectrum.shape)
            for frame in range(len(disparities)):
                total[frame].addcmul_(spectrum * phase_y[frame], phase_x[frame])
    assert total is not None
    total /= rows * columns
    size = padded.shape[1:]
    images = torch.stack([torch.fft.irfft2(part, s=size) for part in total], 1)  # (C, N, P, Q)
    inner = images[..., margin_y : margin_y + height, margin_x : margin_x + width]
    return inner.clamp(0, 1).contiguous()


def _phase(shift: Tensor, frequency: Tensor) -> Tensor:
    """Factors (N, K) that shift a signal by ``shift`` (N,) pixels at each frequency (K,)."""
    angle = -2 * math.pi * shift[:, None].double() * frequency.double()
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def _camera_grid(path: Path) -> tuple[int, int]:
    """Rows and columns of views, as parameters.cfg says."""
    parser = configparser.ConfigParser()
    try:
        parser.read_string(path.read_text(encoding="utf-8"))
        columns = parser.getint("extrinsics", "num_cams_x")
        rows = parser.getint("extrinsics", "num_cams_y")
    except (configparser.Error, ValueError, OSError) as error:
        raise DatasetError(f"{path}: num_cams_x and num_cams_y cannot be read: {error}") from error
    if rows < 1 or columns < 1:
        raise DatasetError(f"{path}: expected at least one view, got {rows} x {columns}")
    return rows, columns
