"""How a lens blurs what is out of focus: transfer functions of incoherent imaging.

Three models of the same lens, from cheap to exact:

* ``"gaussian"``: a Gaussian with the variance of the geometric blur disk, times the transfer
  function of the diffraction-limited lens;
* ``"disk"``: the geometric blur disk itself, times the same;
* ``"wave"``: the autocorrelation of the defocused pupil, in which diffraction and defocus are one.

Geometric radius: ``|defocus| tan(asin(NA / n))``. All transfer functions are 1 at frequency 0 and
real, since a pupil that is only defocused is symmetric.

Source: H. H. Hopkins, "The frequency response of a defocused optical system", Proc. R. Soc. A 231
(1955), 91-103, doi:10.1098/rspa.1955.0158; J. W. Goodman, "Introduction to Fourier Optics", 6.4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

PointSpread = Literal["disk", "gaussian", "wave"]
POINT_SPREADS: tuple[str, ...] = get_args(PointSpread)

# Up to this NA / n the phase of defocus is quadratic over the pupil to within what its edge and its
# middle could tell apart, and one integral of the two is done in closed form.
_PARAXIAL_SINE = 0.4
_ELEMENTS_AT_ONCE = 2**22


@dataclass(frozen=True)
class Lens:
    """An objective and the grid of pixels that it is seen with.

    Attributes:
        pixel_size_um: width of a pixel on the object, um.
        numerical_aperture: NA, below ``refractive_index``.
        wavelength_um: of the light.
        refractive_index: n of the medium above the surface.
        psf: "disk", "gaussian" or "wave".
        residual_blur_px: standard deviation of a Gaussian that blurs every frame alike
            (aberrations, sensor), pixels.

    Raises:
        ValueError: a constant that no lens has; the message names it.
    """

    pixel_size_um: float
    numerical_aperture: float
    wavelength_um: float = 0.55
    refractive_index: float = 1.0
    psf: PointSpread = "disk"
    residual_blur_px: float = 0.0

    def __post_init__(self) -> None:
        for name in ("pixel_size_um", "wavelength_um"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected a positive number, got {value}")
        index, aperture = self.refractive_index, self.numerical_aperture
        if not 1.0 <= index < math.inf:
            raise ValueError(f"refractive_index: expected at least 1, got {index}")
        if not 0 < aperture < index:
            raise ValueError(
                f"numerical_aperture: expected between 0 and refractive_index = {index}, "
                f"got {aperture}"
            )
        if self.psf not in POINT_SPREADS:
            names = ", ".join(repr(name) for name in POINT_SPREADS[:-1])
            raise ValueError(f"psf: expected {names} or {POINT_SPREADS[-1]!r}, got {self.psf!r}")
        if not 0 <= self.residual_blur_px < math.inf:
            raise ValueError(f"residual_blur_px: expected >= 0, got {self.residual_blur_px}")

    @property
    def tangent(self) -> float:
        """Growth of the geometric blur radius per unit of defocus."""
        return math.tan(math.asin(self.numerical_aperture / self.refractive_index))

    @property
    def radius_px_per_um(self) -> float:
        """Growth of the geometric blur radius, pixels per um of defocus."""
        return self.tangent / self.pixel_size_um

    @property
    def cutoff(self) -> float:
        """Highest frequency that the lens passes, cycles per pixel."""
        return 2 * self.numerical_aperture / self.wavelength_um * self.pixel_size_um

    def transfer(self, defocus_um: Tensor, frequency: Tensor) -> Tensor:
        """Transfer function for each defocus at each radial frequency.

        Args:
            defocus_um: (R,) distances between surface and focal plane, um; the sign is irrelevant.
            frequency: (S,) cycles per pixel, >= 0.

        Returns:
            (R, S) float32.
        """
        reduced = (frequency / self.cutoff).clamp(max=1.0)  # 1 at the cutoff
        if self.psf == "wave":
            transfer = wave_transfer(
                defocus_um.abs() / self.wavelength_um,
                reduced,
                numerical_aperture=self.numerical_aperture,
                refractive_index=self.refractive_index,
            )
        else:
            # cycles per blur radius
            scaled = (self.radius_px_per_um * defocus_um.abs())[:, None] * frequency
            geometric = disk_transfer if self.psf == "disk" else gaussian_transfer
            transfer = diffraction_transfer(reduced) * geometric(scaled)
        if self.residual_blur_px > 0:
            width = math.pi * self.residual_blur_px
            transfer = transfer * torch.exp(-2 * (width * frequency) ** 2)
        return transfer

    def transfer_on_grid(
        self,
        defocus_um: Tensor,
        frequency: Tensor,
        *,
        widest_um: float | None = None,
        samples_per_turn: int = 24,
    ) -> Tensor:
        """Transfer functions on the frequencies of an image, through a table over the radius.

        Args:
            defocus_um: (R,) distances between surface and focal plane, um.
            frequency: (P, Q) radial frequencies, cycles per pixel.
            widest_um: largest defocus that the table is made for; with the same one, results do not
                depend on what else is in ``defocus_um``. None: the largest there.
            samples_per_turn: entries per oscillation of the widest blur; 24 are right to 0.002.

        Returns:
            (R, P, Q) float32.
        """
        if widest_um is None:
            widest_um = float(defocus_um.abs().max())
        widest_px = widest_um * self.radius_px_per_um
        highest = float(frequency.max())
        # The disk's transfer function oscillates once per 1 / radius.
        count = 256 + math.ceil(samples_per_turn * widest_px * highest)
        samples = torch.linspace(0, highest, count, dtype=torch.float32, device=frequency.device)
        table = self.transfer(defocus_um, samples).T.contiguous()  # (S, R): rows are copied whole
        place = frequency.flatten() * ((count - 1) / highest)
        lower = place.long().clamp(max=count - 2)
        share = (place - lower)[:, None]
        found = torch.lerp(table[lower], table[lower + 1], share)  # (P * Q, R)
        return found.T.reshape(-1, *frequency.shape)


def diffraction_transfer(reduced_frequency: Tensor) -> Tensor:
    """Transfer function of a lens in focus; the frequency is 1 at the cutoff 2 NA / wavelength."""
    s = reduced_frequency.clamp(max=1.0)
    return 2 / math.pi * (torch.acos(s) - s * torch.sqrt(1 - s * s))


def disk_transfer(radius_times_frequency: Tensor) -> Tensor:
    """Transfer function of a uniform disk; the argument is its radius times the frequency."""
    argument = 2 * math.pi * radius_times_frequency
    return torch.where(
        argument > 1e-3,
        2 * torch.special.bessel_j1(argument) / argument.clamp(min=1e-3),
        1 - argument**2 / 8,
    )


def gaussian_transfer(radius_times_frequency: Tensor) -> Tensor:
    """Transfer function of a Gaussian with the variance of the disk of this radius."""
    # Half the disk's radius gives a Gaussian the same variance along each axis.
    return torch.exp(-2 * (math.pi * 0.5 * radius_times_frequency) ** 2)


def wave_transfer(
    defocus_waves: Tensor,
    reduced_frequency: Tensor,
    *,
    numerical_aperture: float,
    refractive_index: float = 1.0,
) -> Tensor:
    """Transfer function of a defocused circular pupil: its autocorrelation, by Gauss quadrature.

    The phase of defocus over the pupil is ``2 pi n z / wavelength sqrt(1 - (NA rho / n)^2)``; up to
    NA / n = 0.4 its quadratic approximation, scaled to the same slope at the pupil's edge.

    Args:
        defocus_waves: (R,) defocus over the vacuum wavelength, >= 0.
        reduced_frequency: (S,) frequency over the cutoff 2 NA / wavelength, 0..1.
        numerical_aperture: NA.
        refractive_index: n of the medium above the surface.

    Returns:
        (R, S) float32.
    """
    sine = numerical_aperture / refractive_index
    shift = 2 * reduced_frequency.to(torch.float64).clamp(0, 1)  # of the pupils, in their radii
    waves = 2 * math.pi * refractive_index * defocus_waves.to(torch.float64)  # phase, radians
    paraxial = sine <= _PARAXIAL_SINE
    # Slope of the phase at the edge of the pupil, and so the number of fringes in the overlap.
    edge_slope = sine * sine / math.sqrt(1 - sine * sine)
    fringes = float(waves.max()) * edge_slope / (2 * math.pi) if waves.numel() else 0.0
    nodes_x, weights_x = _gauss(24 + math.ceil(2 * fringes), shift.device)
    nodes_y, weights_y = _gauss(1 if paraxial else 12 + math.ceil(fringes), shift.device)
    # One quarter of the overlap: x from 0 to 1 - shift / 2, y from 0 to the pupil's edge. The
    # square in u takes the infinite slope out of the edge.
    half = shift[:, None] / 2  # (S, 1)
    u = 1 - (1 - half) * (1 - nodes_x) ** 2  # (S, X), x + shift / 2, from shift / 2 to 1
    edge = torch.sqrt((1 - u * u).clamp(min=0))  # (S, X)
    measure = 2 * (1 - half) * (1 - nodes_x) * weights_x * edge  # (S, X)
    x = u - half
    if paraxial:
        difference = -0.5 * edge_slope * 4 * x * half  # (S, X), per radian of ``waves``
    else:
        y = edge[..., None] * nodes_y  # (S, X, Y)
        far = (u[..., None] ** 2 + y * y) * sine**2
        near = ((x - half)[..., None] ** 2 + y * y) * sine**2
        difference = torch.sqrt((1 - far).clamp(min=0)) - torch.sqrt((1 - near).clamp(min=0))
        measure = measure[..., None] * weights_y
    difference, measure = difference.flatten(1).float(), measure.flatten(1).float()  # (S, X * Y)
    step = max(1, _ELEMENTS_AT_ONCE // difference.numel())
    parts = [
        (torch.cos(part[:, None, None].float() * difference) * measure).sum(-1)
        for part in waves.split(step)
    ]
    return 4 / math.pi * torch.cat(parts) if parts else waves.new_zeros((0, len(shift))).float()


def _gauss(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes and weights of Gauss-Legendre quadrature over 0..1, float64."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return (
        torch.from_numpy((nodes + 1) / 2).to(device),
        torch.from_numpy(weights / 2).to(device),
    )


def fast_length(minimum: int) -> int:
    """Smallest length >= ``minimum`` whose only prime factors are 2, 3 and 5, and even."""
    import cv2

    return 2 * cv2.getOptimalDFTSize((minimum + 1) // 2)
