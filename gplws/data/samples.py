"""One sample type for every source of stacks with known depth: loaders, simulator, training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gplws.positions import frame_index


@dataclass(frozen=True, eq=False)
class DepthSample:
    """A focal stack with its true depth; one, or a batch of equal shape.

    Attributes:
        stack: (C, N, H, W) or (B, C, N, H, W) float32 in 0..1, C = 1 (gray) or 3 (RGB).
        focus_positions: (N,) or (B, N) float32, strictly monotonic, in ``unit``.
        depth: (H, W) or (B, H, W) float32 in ``unit``; NaN where unknown.
        valid: shape of ``depth``, bool; False where depth is unknown or cannot be seen.
        unit: of depth and focus positions: "um", "m", "1/m", "px" (disparity) or "frames".
        name: where the sample comes from, for messages and tables.
        all_in_focus: (C, H, W) or (B, C, H, W) float32 in 0..1, where the source has it.

    Raises:
        ValueError: shapes that do not belong together.
        TypeError: a dtype other than those above.
    """

    stack: Tensor
    focus_positions: Tensor
    depth: Tensor
    valid: Tensor
    unit: str
    name: str = ""
    all_in_focus: Tensor | None = None

    def __post_init__(self) -> None:
        if self.stack.dim() not in (4, 5):
            raise ValueError(
                f"stack: expected (C, N, H, W) or (B, C, N, H, W), got {tuple(self.stack.shape)}"
            )
        *batch, _, frames, height, width = self.stack.shape
        for name, shape, dtype in (
            ("focus_positions", (*batch, frames), torch.float32),
            ("depth", (*batch, height, width), torch.float32),
            ("valid", (*batch, height, width), torch.bool),
            ("stack", tuple(self.stack.shape), torch.float32),
        ):
            tensor: Tensor = getattr(self, name)
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name}: expected {shape} here, got {tuple(tensor.shape)}")
            if tensor.dtype != dtype:
                raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")

    def depth_index(self) -> Tensor:
        """True depth in frames, by linear interpolation between the focus positions.

        Returns:
            Shape of ``depth``; NaN where depth is NaN or outside the focus positions.
        """
        if self.stack.dim() == 5:
            pairs = zip(self.depth, self.focus_positions, strict=True)
            return torch.stack([frame_index(depth, positions) for depth, positions in pairs])
        return frame_index(self.depth, self.focus_positions)

    def to(self, device: torch.device | str) -> DepthSample:
        """The sample on another device."""
        image = self.all_in_focus
        return replace(
            self,
            stack=self.stack.to(device),
            focus_positions=self.focus_positions.to(device),
            depth=self.depth.to(device),
            valid=self.valid.to(device),
            all_in_focus=None if image is None else image.to(device),
        )


def collate(samples: Sequence[DepthSample]) -> DepthSample:
    """A batch of samples of equal shape and unit, for ``torch.utils.data.DataLoader``.

    Raises:
        ValueError: no samples, or shapes or units that differ.
    """
    if not samples:
        raise ValueError("samples: expected at least one")
    for field in ("stack", "depth"):
        shapes = {tuple(getattr(sample, field).shape) for sample in samples}
        if len(shapes) > 1:
            raise ValueError(f"samples: expected equal shapes of {field}, got {sorted(shapes)}")
    units = {sample.unit for sample in samples}
    if len(units) > 1:
        raise ValueError(f"samples: expected one unit, got {sorted(units)}")
    images = [sample.all_in_focus for sample in samples]
    known = [image for image in images if image is not None]
    return DepthSample(
        stack=torch.stack([sample.stack for sample in samples]),
        focus_positions=torch.stack([sample.focus_positions for sample in samples]),
        depth=torch.stack([sample.depth for sample in samples]),
        valid=torch.stack([sample.valid for sample in samples]),
        unit=samples[0].unit,
        name=", ".join(sample.name for sample in samples),
        all_in_focus=torch.stack(known) if len(known) == len(images) else None,
    )
