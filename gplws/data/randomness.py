"""Random numbers that depend on a seed and nothing else."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from gplws.devices import usable_device

Item = TypeVar("Item")


class Draw:
    """One stream of random numbers and random fields.

    Numbers are drawn on the CPU and are the same whatever the device; fields are drawn on the
    device, where they are needed, and differ between kinds of devices.

    Args:
        entropy: one or more integers >= 0, e.g. a seed and a step; other integers give another,
            unrelated stream.
        device: where fields are drawn.

    Raises:
        ValueError: a negative integer, or a device that cannot be used.
    """

    def __init__(self, *entropy: int, device: torch.device | str = "cpu") -> None:
        if any(value < 0 for value in entropy):
            raise ValueError(f"entropy: expected integers >= 0, got {entropy}")
        state = np.random.SeedSequence(entropy).generate_state(2, np.uint64)
        self.device = usable_device(device)
        self._numbers = random.Random(int(state[0]))
        self.generator = torch.Generator(self.device).manual_seed(int(state[1] >> np.uint64(1)))

    def uniform(self, low: float, high: float) -> float:
        """Number between ``low`` and ``high``."""
        return self._numbers.uniform(low, high)

    def log_uniform(self, low: float, high: float) -> float:
        """Number between ``low`` and ``high``, both > 0, whose logarithm is uniform."""
        return math.exp(self._numbers.uniform(math.log(low), math.log(high)))

    def normal(self) -> float:
        """Number from the standard normal distribution."""
        return self._numbers.gauss(0.0, 1.0)

    def integer(self, low: int, high: int) -> int:
        """Integer from ``low`` to ``high``, both included."""
        return self._numbers.randint(low, high)

    def angle(self) -> float:
        """Direction in the plane, radians."""
        return self._numbers.uniform(0.0, 2 * math.pi)

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self._numbers.random() < probability

    def choice(self, items: Sequence[Item]) -> Item:
        """One of ``items``."""
        return self._numbers.choice(items)

    def normal_field(self, *shape: int) -> Tensor:
        """Independent standard normal numbers, float32."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float32, device=self.device)

    def uniform_field(self, *shape: int) -> Tensor:
        """Independent numbers in [0, 1), float32."""
        return torch.rand(shape, generator=self.generator, dtype=torch.float32, device=self.device)


def spectral_noise(
    shape: tuple[int, int],
    draw: Draw,
    *,
    exponent: float = 0.0,
    shortest_px: float = 2.0,
    longest_px: float = math.inf,
) -> Tensor:
    """Noise with a power-law spectrum, periodic at the borders.

    The spectrum's power falls as ``frequency ** -exponent`` between the two wavelengths: 0 is
    white, 2 + 2 H is a self-affine surface of Hurst exponent H.

    Args:
        shape: rows and columns.
        draw: where the numbers come from.
        exponent: of the power spectrum.
        shortest_px: details are no finer than this wavelength, pixels.
        longest_px: nor coarser than this one.

    Returns:
        ``shape`` float32 of mean 0 and deviation 1 (all 0 where no wavelength is left).
    """
    frequency = radial_frequency(shape, draw.device)
    amplitude = frequency.clamp(min=1 / max(shape)) ** (-exponent / 2)
    amplitude = amplitude * torch.exp(-((frequency * shortest_px / 2) ** 4))
    amplitude[0, 0] = 0
    if math.isfinite(longest_px):
        amplitude = amplitude * (1 - torch.exp(-((frequency * longest_px) ** 4)))
    noise = filtered_noise(amplitude, shape, draw)
    return noise / noise.std(correction=0).clamp(min=1e-12)


def filtered_noise(amplitude: Tensor, shape: tuple[int, int], draw: Draw) -> Tensor:
    """White noise of ``shape`` times an amplitude (rows, columns // 2 + 1) in Fourier space."""
    spectrum = torch.fft.rfft2(draw.normal_field(*shape)) * amplitude
    return torch.fft.irfft2(spectrum, s=shape)


def radial_frequency(shape: tuple[int, int], device: torch.device) -> Tensor:
    """Frequency of each element of a real Fourier transform, cycles per pixel."""
    rows = torch.fft.fftfreq(shape[0], dtype=torch.float32, device=device)
    columns = torch.fft.rfftfreq(shape[1], dtype=torch.float32, device=device)
    return torch.hypot(rows[:, None], columns[None])
