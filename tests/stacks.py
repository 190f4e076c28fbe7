"""Focal stacks of known depth that tests build without optics."""

import torch
from torch import Tensor

from gplws.data.simulator import render_focal_stack


def texture(size: tuple[int, int], seed: int = 0) -> Tensor:
    """White noise of zero mean and unit deviation."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def textured_stack(
    depth: Tensor | float | None = None,
    *,
    n_frames: int = 12,
    size: tuple[int, int] = (64, 64),
    width: float = 1.5,
    contrast: float = 0.08,
    noise: float = 0.0,
    positions: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """(N, H, W) float32: a texture whose contrast falls off with the distance from ``depth``.

    The focus measure of each pixel is then exactly a Gaussian of deviation ``width`` over
    ``positions`` (default: frame numbers). ``depth`` is (H, W) or a number; default: mid-stack.
    """
    positions = torch.arange(float(n_frames)) if positions is None else positions
    depth = (n_frames - 1) / 2 if depth is None else depth
    height, columns = depth.shape if isinstance(depth, Tensor) else size
    distance = positions.view(-1, 1, 1) - torch.as_tensor(depth)
    sharpness = torch.exp(-0.5 * (distance / width) ** 2)
    frames = 0.5 + contrast * sharpness * texture((height, columns), seed)
    return frames + noise_stack(len(positions), (height, columns), noise, seed + 1) - 0.5


def noise_stack(n_frames: int, size: tuple[int, int], sigma: float, seed: int = 1) -> Tensor:
    """(N, H, W) float32 of mean 0.5 with independent normal noise."""
    generator = torch.Generator().manual_seed(seed)
    return 0.5 + sigma * torch.randn(n_frames, *size, generator=generator)


def flat_stack(at: float, *, n_frames: int = 10, size: tuple[int, int] = (96, 128)) -> Tensor:
    """(N, H, W) float32: a flat textured surface, rendered in focus at frame ``at``.

    It may lie beyond the stack. Blur is that of a lens, so that focus peaks are no Gaussians.
    """
    rendered = render_focal_stack(
        torch.full(size, 2.0 * at),
        (0.5 + 0.15 * texture(size)).clamp(0.05, 0.95),
        2.0 * torch.arange(float(n_frames)),
        pixel_size_um=0.5,
        numerical_aperture=0.3,
        full_well_electrons=20_000,
        read_noise_electrons=8,
    )
    return rendered.frames.float() / 255
