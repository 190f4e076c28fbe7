"""Changes to samples that keep stack, focus positions and depth together; random ones for training.

The functions take one sample or a batch and return a new one. :class:`Augmentation` draws their
parameters for each sample of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from gplws.data.samples import DepthSample, collate


def rotate(sample: DepthSample, quarter_turns: int) -> DepthSample:
    """The sample turned by multiples of 90 degrees, counter-clockwise (from y towards x)."""
    return _spatial(sample, lambda image: image.rot90(quarter_turns, (-2, -1)))


def flip(sample: DepthSample, *, across: bool, down: bool) -> DepthSample:
    """The sample mirrored left to right (``across``), top to bottom (``down``), or both."""
    axes = [-1] * across + [-2] * down
    return _spatial(sample, lambda image: image.flip(axes)) if axes else sample


def crop(sample: DepthSample, top: int, left: int, height: int, width: int) -> DepthSample:
    """The rows ``top .. top + height - 1`` and columns ``left .. left + width - 1``.

    Raises:
        ValueError: the part reaches beyond the image.
    """
    rows, columns = sample.depth.shape[-2:]
    inside = 0 <= top <= rows - height and 0 <= left <= columns - width
    if not inside or height < 1 or width < 1:
        raise ValueError(
            f"crop: rows {top}..{top + height} and columns {left}..{left + width} "
            f"reach beyond an image of {rows} x {columns}"
        )
    return _spatial(sample, lambda image: image[..., top : top + height, left : left + width])


def reverse_frames(sample: DepthSample) -> DepthSample:
    """The scene seen from the other end: frames in reverse order, depth and positions mirrored.

    A position p becomes ``first + last - p``: positions that rise still rise, over the same range.
    The depth index d becomes ``N - 1 - d``.
    """
    positions = sample.focus_positions
    ends = positions[..., 0] + positions[..., -1]
    return replace(
        sample,
        stack=sample.stack.flip(-3),
        focus_positions=(ends[..., None] - positions).flip(-1),
        depth=ends[..., None, None] - sample.depth,
    )


def select_frames(sample: DepthSample, index: Tensor) -> DepthSample:
    """Some of the frames; what is in focus outside of them is no longer valid.

    Args:
        sample: one sample or a batch.
        index: (n,) or, for a batch, (B, n) int64, strictly rising frame numbers.

    Raises:
        ValueError: ``index`` is empty, out of range, or does not rise.
    """
    frames = sample.stack.shape[-3]
    ends_fit = index.numel() > 0 and int(index.min()) >= 0 and int(index.max()) < frames
    if not ends_fit or bool((index.diff(dim=-1) <= 0).any()):
        raise ValueError(
            f"index: expected rising frame numbers in 0..{frames - 1}, got {index.tolist()}"
        )
    if index.dim() == 1:
        stack, positions = sample.stack[..., index, :, :], sample.focus_positions[..., index]
    else:
        shape = (*sample.stack.shape[:2], index.shape[1], *sample.stack.shape[3:])
        stack = sample.stack.gather(2, index[:, None, :, None, None].expand(shape))
        positions = sample.focus_positions.gather(1, index)
    low = torch.minimum(positions[..., 0], positions[..., -1])[..., None, None]
    high = torch.maximum(positions[..., 0], positions[..., -1])[..., None, None]
    inside = (sample.depth >= low) & (sample.depth <= high)
    return replace(sample, stack=stack, focus_positions=positions, valid=sample.valid & inside)


def gamma(sample: DepthSample, exponent: float) -> DepthSample:
    """Each intensity to the power of ``exponent`` > 0."""
    return _intensity(sample, lambda image: image.clamp(0, 1) ** exponent)


def invert(sample: DepthSample) -> DepthSample:
    """Bright for dark: ``1 - intensity``."""
    return _intensity(sample, lambda image: 1 - image)


def adjust(sample: DepthSample, *, contrast: float = 1.0, brightness: float = 0.0) -> DepthSample:
    """``contrast * (intensity - 1/2) + 1/2 + brightness``, cut off at 0 and 1."""
    return _intensity(
        sample, lambda image: (contrast * (image - 0.5) + 0.5 + brightness).clamp(0, 1)
    )


def add_noise(sample: DepthSample, sigma: float, generator: torch.Generator) -> DepthSample:
    """Gaussian noise of standard deviation ``sigma`` on the frames, cut off at 0 and 1."""
    stack = sample.stack
    noise = torch.randn(stack.shape, generator=generator, dtype=torch.float32, device=stack.device)
    return replace(sample, stack=(stack + sigma * noise).clamp(0, 1))


@dataclass(frozen=True)
class Augmentation:
    """Random changes, drawn for each sample of a batch; the number of frames for the whole batch.

    Attributes:
        rotate: turn by multiples of 90 degrees; images that are not square by 180.
        flip: mirror either way, with probability 1/2 each.
        reverse: probability of reversing the frames.
        invert: probability of inverting the contrast.
        gamma: (low, high) exponent, its logarithm uniform; (1, 1) leaves intensities alone.
        contrast: (low, high) factor, uniform.
        brightness: (low, high) offset, uniform, of full scale.
        noise: (low, high) standard deviation of extra noise, uniform, of full scale.
        crop: side of a square part, pixels, at a random place; None keeps the image. Smaller
            images stay as they are.
        frames: (least, most) frames to keep, uniform; None keeps all. Stacks that have fewer keep
            what they have.
        irregular: probability that the frames kept are any, not evenly spaced ones.

    Raises:
        ValueError: a range is not (low, high), or a value is out of range.
    """

    rotate: bool = True
    flip: bool = True
    reverse: float = 0.5
    invert: float = 0.5
    gamma: tuple[float, float] = (0.7, 1.4)
    contrast: tuple[float, float] = (0.7, 1.2)
    brightness: tuple[float, float] = (-0.1, 0.1)
    noise: tuple[float, float] = (0.0, 0.02)
    crop: int | None = None
    frames: tuple[int, int] | None = None
    irregular: float = 0.0

    def __post_init__(self) -> None:
        for name in ("reverse", "invert", "irregular"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augmentation.{name} must be in 0..1, got {getattr(self, name)}")
        least = {"gamma": 1e-3, "contrast": 0.0, "brightness": -1.0, "noise": 0.0, "frames": 2}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and not (len(value) == 2 and lowest <= value[0] <= value[1]):
                raise ValueError(
                    f"augmentation.{name} must be (low, high), low at least {lowest}, got {value}"
                )
        if self.crop is not None and self.crop < 1:
            raise ValueError(f"augmentation.crop must be at least 1, got {self.crop}")

    @staticmethod
    def none() -> Augmentation:
        """The one that changes nothing."""
        still = (1.0, 1.0)
        return Augmentation(False, False, 0.0, 0.0, still, still, (0.0, 0.0), (0.0, 0.0))

    def __call__(self, batch: DepthSample, generator: torch.Generator) -> DepthSample:
        """Change a batch.

        Args:
            batch: (B, C, N, H, W); it stays as it is.
            generator: where the numbers come from, on the CPU; equal states give equal results.

        Returns:
            A new batch, with another size where ``crop`` or ``frames`` say so.

        Raises:
            ValueError: ``batch`` is a single sample.
        """
        if batch.stack.dim() != 5:
            raise ValueError(f"batch: expected (B, C, N, H, W), got {tuple(batch.stack.shape)}")
        if self == Augmentation.none():
            return batch
        available = batch.stack.shape[2]
        keep = available
        if self.frames is not None:
            least, most = (min(n, available) for n in self.frames)
            keep = int(torch.randint(least, most + 1, (), generator=generator))
        changed = [self._one(sample, keep, generator) for sample in split(batch)]
        return replace(collate(changed), name=batch.name)

    def _one(self, sample: DepthSample, keep: int, generator: torch.Generator) -> DepthSample:
        def uniform(low: float, high: float) -> float:
            return low + (high - low) * float(
                torch.rand((), generator=generator, dtype=torch.float32)
            )

        def integer(end: int) -> int:
            return int(torch.randint(end, (), generator=generator))

        rows, columns = sample.depth.shape
        if self.crop is not None:
            height, width = min(self.crop, rows), min(self.crop, columns)
            top, left = integer(rows - height + 1), integer(columns - width + 1)
            sample = crop(sample, top, left, height, width)
            rows, columns = height, width
        frames = sample.stack.shape[-3]
        if keep < frames:
            if uniform(0, 1) < self.irregular:
                index = torch.randperm(frames, generator=generator)[:keep].sort().values
            else:
                step = 1 + integer((frames - 1) // (keep - 1)) if keep > 1 else 1
                first = integer(frames - step * (keep - 1))
                index = first + step * torch.arange(keep)
            sample = select_frames(sample, index)
        if self.rotate:
            turns = integer(4)
            sample = rotate(sample, turns if rows == columns else 2 * (turns // 2))
        if self.flip:
            both = integer(4)
            sample = flip(sample, across=bool(both & 1), down=bool(both & 2))
        if uniform(0, 1) < self.reverse:
            sample = reverse_frames(sample)
        if uniform(0, 1) < self.invert:
            sample = invert(sample)
        if self.gamma != (1, 1):
            low, high = self.gamma
            sample = gamma(sample, low * (high / low) ** uniform(0, 1))
        contrast, brightness = uniform(*self.contrast), uniform(*self.brightness)
        if (contrast, brightness) != (1, 0):
            sample = adjust(sample, contrast=contrast, brightness=brightness)
        sigma = uniform(*self.noise)
        return add_noise(sample, sigma, generator) if sigma > 0 else sample


def split(batch: DepthSample) -> list[DepthSample]:
    """The samples of a batch; the inverse of :func:`gplws.data.collate`.

    A sample without a batch axis is the only one.
    """
    if batch.stack.dim() != 5:
        return [batch]
    tensors = {
        field.name: getattr(batch, field.name)
        for field in fields(batch)
        if isinstance(getattr(batch, field.name), Tensor)
    }
    return [
        replace(batch, **{name: tensor[i] for name, tensor in tensors.items()})
        for i in range(batch.stack.shape[0])
    ]


def _spatial(sample: DepthSample, change: Callable[[Tensor], Tensor]) -> DepthSample:
    """Apply a change of the last two axes to all that has them."""
    image = sample.all_in_focus
    return replace(
        sample,
        stack=change(sample.stack),
        depth=change(sample.depth),
        valid=change(sample.valid),
        all_in_focus=None if image is None else change(image),
    )


def _intensity(sample: DepthSample, change: Callable[[Tensor], Tensor]) -> DepthSample:
    image = sample.all_in_focus
    return replace(
        sample,
        stack=change(sample.stack),
        all_in_focus=None if image is None else change(image),
    )
