"""Focal stacks rendered from a height map and an albedo: incoherent imaging with occlusion.

The model, from the light to the sensor:

1. The height map is spread over layers of constant height (linear weights between the two nearest
   layers, so heights between layers keep their place).
2. For each focus position every layer is blurred by its own point spread function (see
   `gplws.data.optics`): geometric blur whose radius grows by tan(asin(NA / n)) per unit of defocus,
   times the transfer function of a diffraction-limited lens, or the two as one wave-optical
   function. It is applied in Fourier space, where it is exact for any radius.
3. Layers are composited front to back. The share of the light cone that has met the surface at or
   above a layer is the blurred set of all points that are at least as high; what a layer adds is
   the growth of that share. On gentle slopes this equals the plain sum of blurred layers (no
   occlusion, energy conserved); at steps and holes it lets walls and rims occlude what is below.
   The shares add up to one, so there are no dark seams.
4. Photon noise, read noise and quantisation.

Lateral coordinates, heights and focus positions are object-side micrometres; heights and focus
positions share one axis that points from the surface towards the objective. Magnification therefore
enters only through ``pixel_size_um`` (camera pixel over magnification).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gplws.data.lighting import shade, slopes
from gplws.data.optics import Lens, PointSpread, fast_length
from gplws.data.randomness import radial_frequency
from gplws.positions import frame_index, rise_or_fall

__all__ = [
    "DemoScene",
    "SimulatedStack",
    "blur_radius_um",
    "demo_scene",
    "render_focal_stack",
    "surface_shading",
]

ArrayLike = Tensor | NDArray[np.generic]

# Layers are merged while their blur radii differ by less than this, in pixels or relative to the
# radius, whichever is larger: beyond that the eye of a focus measure could tell them apart.
_RADIUS_STEP_PX = 0.5
_RADIUS_STEP_RELATIVE = 0.2
# A layer without a point of its own under the blur disk has no colour there (the wall of a hole);
# below this coverage the colour is taken from its surroundings.
_COVERAGE_FLOOR = 1e-3
_CHUNK_ELEMENTS = 2**23  # pixels of all layers that are blurred at a time


class SimulatedStack(NamedTuple):
    """A rendered focal stack and its truth.

    Attributes:
        frames: (N, H, W) or (N, H, W, 3); uint8 for ``bit_depth`` 8, uint16 for 9..16, float32 in
            0..1 for None.
        focus_positions_um: (N,) float32, height of the focal plane of each frame.
        height_um: (H, W) float32, the true surface.
        depth_index: (H, W) float32, the true surface in frames: where ``height_um`` lies between
            the focus positions; NaN outside their range.
        all_in_focus: (H, W) or (H, W, 3) float32 in 0..1, the scene without blur and noise.
    """

    frames: Tensor
    focus_positions_um: Tensor
    height_um: Tensor
    depth_index: Tensor
    all_in_focus: Tensor


def blur_radius_um(
    defocus_um: Tensor, *, numerical_aperture: float, refractive_index: float = 1.0
) -> Tensor:
    """Radius of the geometric blur disk: ``|defocus| * tan(asin(NA / n))``.

    Args:
        defocus_um: any shape, distance between surface and focal plane, um.
        numerical_aperture: NA of the objective, below ``refractive_index``.
        refractive_index: n of the medium between objective and surface.

    Returns:
        Object-side radius, um, shape of ``defocus_um``.
    """
    return defocus_um.abs() * math.tan(math.asin(numerical_aperture / refractive_index))


def _as_tensor(value: ArrayLike, name: str) -> Tensor:
    """Float32 tensor of ``value`` (its own device), with a clear error for anything else."""
    tensor = torch.as_tensor(value)
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name}: expected real numbers, got {tensor.dtype}")
    return tensor.to(torch.float32)


def _check_scene(height_um: Tensor, albedo: Tensor, focus_positions_um: Tensor) -> None:
    if height_um.ndim != 2 or height_um.numel() == 0:
        raise ValueError(f"height_um: expected (H, W), not empty, got {tuple(height_um.shape)}")
    if albedo.shape not in (height_um.shape, (*height_um.shape, 3)):
        raise ValueError(
            f"albedo: expected {tuple(height_um.shape)} or {(*height_um.shape, 3)} to match "
            f"height_um, got {tuple(albedo.shape)}"
        )
    if focus_positions_um.ndim != 1 or focus_positions_um.numel() == 0:
        raise ValueError(
            f"focus_positions_um: expected (N,), N >= 1, got {tuple(focus_positions_um.shape)}"
        )
    for name, tensor in (
        ("height_um", height_um),
        ("albedo", albedo),
        ("focus_positions_um", focus_positions_um),
    ):
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name}: expected finite values, got NaN or inf")
    if bool((albedo < 0).any()):
        raise ValueError(f"albedo: expected values >= 0, got a minimum of {float(albedo.min())}")
    if not rise_or_fall(focus_positions_um):
        raise ValueError("focus_positions_um: expected strictly rising or falling positions")


def mirrored_indices(size: int, before: int, total: int, device: torch.device) -> Tensor:
    """Source indices that extend an axis to ``total`` by mirroring, ``before`` ahead of index 0."""
    index = torch.arange(total, device=device) - before
    period = 2 * size
    index = index.remainder(period)
    return torch.where(index < size, index, period - 1 - index)


def _layer_radii(largest_px: float) -> list[float]:
    """Blur radii in pixels, from 0 to at least ``largest_px``, at which layers are placed."""
    radii = [0.0]
    while radii[-1] < largest_px:
        radii.append(radii[-1] + max(_RADIUS_STEP_PX, _RADIUS_STEP_RELATIVE * radii[-1]))
    return radii


def _layers(
    lowest_um: float, highest_um: float, focus_um: float, radii_um: list[float]
) -> tuple[list[float], list[int]]:
    """Layer heights that bracket the surface, highest first, and the place of each in ``radii_um``.

    ``radii_um`` are the distances from the focal plane at which layers are placed, above and below.
    """
    above = [(focus_um + distance, k) for k, distance in enumerate(radii_um)]
    below = [(focus_um - distance, k) for k, distance in enumerate(radii_um) if k]
    layers = above[::-1] + below
    # One layer at or above the highest point, and one at or below the lowest, are enough.
    first = max((i for i, (height, _) in enumerate(layers) if height >= highest_um), default=0)
    last = min(
        (i for i, (height, _) in enumerate(layers) if height <= lowest_um),
        default=len(layers) - 1,
    )
    kept = layers[min(first, last) : max(first, last) + 1]
    return [height for height, _ in kept], [k for _, k in kept]


def _render_frame(
    height_um: Tensor,
    color: Tensor,
    crop: tuple[slice, slice],
    nodes: Sequence[float],
    blur: Sequence[Tensor],
) -> Tensor:
    """One frame, (C, H, W), of the padded scene ``height_um`` (P, Q) and ``color`` (C, P, Q).

    ``nodes`` are K layer heights, highest first; ``blur`` their transfer functions (P, Q // 2 + 1).
    """
    channels = color.shape[0]
    size = (height_um.shape[0], height_um.shape[1])
    rows, columns = crop
    target = (rows.stop - rows.start, columns.stop - columns.start)
    image = height_um.new_zeros((channels, *target))
    plain = torch.zeros_like(image)  # all layers, as if none hid another
    resolved = height_um.new_zeros(target)
    plain_weight = torch.zeros_like(resolved)
    reached = torch.zeros_like(resolved)  # share of the light cone that has met the surface
    above = torch.zeros_like(height_um)[None]  # soft set of points at or above the node before
    # Few large operations instead of many small ones, as far as memory allows.
    step = max(1, _CHUNK_ELEMENTS // ((channels + 2) * height_um.numel()))
    for first in range(0, len(nodes), step):
        part = range(first, min(first + step, len(nodes)))
        at_or_above = torch.stack([_at_or_above(height_um, nodes, k) for k in part])  # (k, P, Q)
        members = at_or_above - torch.cat([above, at_or_above[:-1]])
        above = at_or_above[-1:]
        sources = torch.cat(
            [color * members[:, None], members[:, None], at_or_above[:, None]], 1
        )  # (k, C + 2, P, Q)
        spectra = torch.fft.rfft2(sources)
        spectra *= torch.stack([blur[k] for k in part])[:, None]
        blurred = torch.fft.irfft2(spectra, s=size)[:, :, rows, columns]
        light, weight, solid = blurred[:, :-2], blurred[:, -2], blurred[:, -1].clamp(0, 1)
        # Sharp edges of masks ring a little below zero; light may, as it is not divided by.
        light, weight = torch.where(weight[:, None] > 0, light, 0.0), weight.clamp(min=0)
        solid[0] = torch.maximum(solid[0], reached)
        met = torch.cummax(solid, 0).values  # what has been met stays met
        if part.stop == len(nodes):
            met[-1] = 1.0
        share = met.diff(dim=0, prepend=reached[None]) / (weight + _COVERAGE_FLOOR)  # (k, H, W)
        reached = met[-1]
        image += (share[:, None] * light).sum(0)
        resolved += (share * weight).sum(0)
        plain += light.sum(0)
        plain_weight += weight.sum(0)
    return image + (1 - resolved) * plain / plain_weight.clamp(min=1e-6)


def _at_or_above(height_um: Tensor, nodes: Sequence[float], k: int) -> Tensor:
    """Points that lie at or above node ``k``; between it and the next lower one by their share."""
    if k + 1 == len(nodes):
        return torch.ones_like(height_um)
    return ((height_um - nodes[k + 1]) / (nodes[k] - nodes[k + 1])).clamp_(0, 1)


def render_focal_stack(
    height_um: ArrayLike,
    albedo: ArrayLike,
    focus_positions_um: ArrayLike,
    *,
    pixel_size_um: float,
    numerical_aperture: float,
    wavelength_um: float = 0.55,
    refractive_index: float = 1.0,
    psf: PointSpread = "disk",
    full_well_electrons: float | None = None,
    read_noise_electrons: float = 0.0,
    bit_depth: int | None = 8,
    seed: int = 0,
) -> SimulatedStack:
    """Renders the focal stack that a microscope would take of a surface.

    Borders are mirrored. Light beyond the sensor's range is clipped, as a camera does. The result
    is the same for the same arguments and seed; noise is drawn on the CPU, so it does not depend on
    the device either.

    Args:
        height_um: (H, W) surface, um, up (towards the objective) is positive; array or tensor.
        albedo: (H, W) or (H, W, 3) brightness of the surface in 0..1, shading included; 1 is the
            sensor's full scale.
        focus_positions_um: (N,) heights of the focal planes, um, strictly rising or falling.
        pixel_size_um: width of a pixel on the object (camera pixel / magnification), um.
        numerical_aperture: NA of the objective; blur grows by ``tan(asin(NA / n))`` per um.
        wavelength_um: of the light; with NA it sets the diffraction limit.
        refractive_index: n of the medium above the surface.
        psf: "disk" (geometric blur of a uniform aperture), "gaussian" of equal variance, or "wave"
            (autocorrelation of the defocused pupil; exact, and slow for wide blur at high NA).
        full_well_electrons: electrons at full scale, for photon noise; None: no noise at all.
        read_noise_electrons: standard deviation of the read noise, electrons.
        bit_depth: 8 gives uint8; 9..16 give uint16, 2**bit_depth levels spread over its full
            range; None gives float32 in 0..1 without quantisation.
        seed: of the noise.

    Returns:
        The frames with their truth, on the device of ``height_um``. Not differentiable.

    Raises:
        ValueError: a shape, range or optical constant is impossible; the message names it.
        TypeError: complex or boolean input.

    Example:
        >>> import torch
        >>> height = torch.linspace(0, 40, 64).repeat(64, 1)
        >>> texture = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
        >>> stack = render_focal_stack(height, texture, torch.arange(0.0, 41.0, 4.0),
        ...                            pixel_size_um=1.0, numerical_aperture=0.3)
        >>> stack.frames.shape, stack.frames.dtype
        (torch.Size([11, 64, 64]), torch.uint8)
    """
    height = _as_tensor(height_um, "height_um")
    color = _as_tensor(albedo, "albedo").to(height.device)
    focus = _as_tensor(focus_positions_um, "focus_positions_um").cpu()
    _check_scene(height, color, focus)
    lens = Lens(pixel_size_um, numerical_aperture, wavelength_um, refractive_index, psf)
    if full_well_electrons is not None and not full_well_electrons > 0:
        raise ValueError(f"full_well_electrons: expected > 0 or None, got {full_well_electrons}")
    if not read_noise_electrons >= 0:
        raise ValueError(f"read_noise_electrons: expected >= 0, got {read_noise_electrons}")
    if bit_depth is not None and not 8 <= bit_depth <= 16:
        raise ValueError(f"bit_depth: expected 8..16 or None, got {bit_depth}")

    channels_first = color[None] if color.ndim == 2 else color.permute(2, 0, 1)  # (C, H, W)
    size = (height.shape[0], height.shape[1])
    lowest, highest = float(height.min()), float(height.max())
    um_per_px_of_radius = 1 / lens.radius_px_per_um
    farthest_um = max(highest - float(focus.min()), float(focus.max()) - lowest, 0.0)
    airy_px = 0.61 * wavelength_um / numerical_aperture / pixel_size_um
    margin = math.ceil(1.1 * farthest_um / um_per_px_of_radius + 2 * airy_px) + 2
    padded = (fast_length(size[0] + 2 * margin), fast_length(size[1] + 2 * margin))
    row_source = mirrored_indices(size[0], margin, padded[0], height.device)
    column_source = mirrored_indices(size[1], margin, padded[1], height.device)
    padded_height = height[row_source][:, column_source]
    padded_color = channels_first[:, row_source][:, :, column_source]
    crop = (slice(margin, margin + size[0]), slice(margin, margin + size[1]))
    radii_px = _layer_radii(farthest_um / um_per_px_of_radius)
    radii_um = [radius * um_per_px_of_radius for radius in radii_px]
    transfer = lens.transfer_on_grid(
        torch.tensor(radii_um, dtype=torch.float32, device=height.device),
        radial_frequency(padded, height.device),
        samples_per_turn=96,
    )

    generator = torch.Generator().manual_seed(seed)
    frames = []
    for position in focus.tolist():
        nodes, which = _layers(lowest, highest, position, radii_um)
        blur = [transfer[k] for k in which]
        irradiance = _render_frame(padded_height, padded_color, crop, nodes, blur)
        if color.ndim == 3:
            irradiance = irradiance.permute(1, 2, 0)  # (H, W, 3)
        else:
            irradiance = irradiance[0]  # (H, W)
        frames.append(
            _expose(irradiance, full_well_electrons, read_noise_electrons, bit_depth, generator)
        )
    return SimulatedStack(
        frames=torch.stack(frames),
        focus_positions_um=focus.to(height.device),
        height_um=height,
        depth_index=frame_index(height, focus.to(height.device)),
        all_in_focus=color.clamp(max=1.0),
    )


def _expose(
    irradiance: Tensor,
    full_well_electrons: float | None,
    read_noise_electrons: float,
    bit_depth: int | None,
    generator: torch.Generator,
) -> Tensor:
    """Sensor values of ``irradiance`` (1 = full scale): noise, clipping and quantisation."""
    signal = irradiance
    if full_well_electrons is not None:
        electrons = torch.poisson(signal.cpu().clamp(min=0) * full_well_electrons, generator)
        if read_noise_electrons > 0:
            electrons += read_noise_electrons * torch.randn(
                electrons.shape, generator=generator, dtype=torch.float32
            )
        signal = (electrons / full_well_electrons).to(irradiance.device)
    signal = signal.clamp(0, 1)
    if bit_depth is None:
        return signal
    levels = 2**bit_depth - 1
    quantised = (signal * levels).round()
    if bit_depth == 8:
        return quantised.to(torch.uint8)
    return (quantised * (65535 / levels)).round().to(torch.uint16)


def surface_shading(
    height_um: Tensor,
    pixel_size_um: float,
    *,
    light: tuple[float, float, float] = (0.0, 0.0, 1.0),
    ambient: float = 0.35,
) -> Tensor:
    """Brightness of a matt surface under one distant light, to multiply an albedo with.

    Args:
        height_um: (H, W) surface, um.
        pixel_size_um: width of a pixel on the object, um.
        light: direction towards the light as (right, down, up) in image axes; (0, 0, 1) is coaxial.
        ambient: share of the light that comes from everywhere, 0..1.

    Returns:
        (H, W) float32; 1 where the surface faces the light.

    Raises:
        ValueError: ``light`` is the null vector, or ``height_um`` is smaller than 2 x 2.
    """
    norm = math.sqrt(sum(component * component for component in light))
    if norm == 0:
        raise ValueError(f"light: expected a direction, got {light}")
    if height_um.ndim != 2:
        raise ValueError(f"height_um: expected (H, W), got {tuple(height_um.shape)}")
    down, right = slopes(height_um.to(torch.float32), pixel_size_um)
    towards = (light[1] / norm, light[0] / norm, light[2] / norm)  # (down, right, up)
    return shade(down, right, [towards], ambient=ambient).diffuse


class DemoScene(NamedTuple):
    """A surface that is ready to be rendered, with optics to match.

    ``render_focal_stack(scene.height_um, scene.albedo, scene.focus_positions_um,
    pixel_size_um=scene.pixel_size_um, numerical_aperture=scene.numerical_aperture)`` renders it.

    Attributes:
        height_um: (H, W) float32 surface, um.
        albedo: (H, W) float32 brightness in 0..1, shading included.
        focus_positions_um: (N,) float32 focal planes from below the surface to above it.
        pixel_size_um: width of a pixel on the object.
        numerical_aperture: of the objective.
    """

    height_um: Tensor
    albedo: Tensor
    focus_positions_um: Tensor
    pixel_size_um: float
    numerical_aperture: float


def _smooth_noise(size: int, wavelength: float, generator: torch.Generator) -> Tensor:
    """(size, size) noise of unit deviation whose details are ``wavelength`` pixels and larger."""
    spectrum = torch.fft.rfft2(torch.randn(size, size, generator=generator, dtype=torch.float32))
    frequency = radial_frequency((size, size), torch.device("cpu"))
    spectrum *= torch.exp(-((frequency * wavelength) ** 2))
    noise = torch.fft.irfft2(spectrum, s=(size, size))
    return (noise - noise.mean()) / noise.std().clamp(min=1e-6)


def _streaks(feed: Tensor, generator: torch.Generator) -> Tensor:
    """Random brightness of unit deviation, constant along lines of equal ``feed`` (H, W)."""
    fine = (feed * 8).floor().long()
    fine = fine - fine.min()
    values = torch.randn(int(fine.max()) + 1, generator=generator, dtype=torch.float32)
    return values[fine]


def demo_scene(size: int = 384, *, frames: int = 30, seed: int = 0) -> DemoScene:
    """A milled test piece: stairs, a groove, a dome and a blind hole, all of known height.

    The stairs rise by 15 um each, the groove is 30 um deep with slanted flanks, the dome is 44 um
    high, and the blind hole is 60 um deep. Sizes scale with the image; heights do not.

    Args:
        size: height and width in pixels, at least 32; 384 um on the object whatever the size.
        frames: number of focus positions, at least 2.
        seed: of the grain and the roughness.

    Returns:
        Surface, brightness, focus positions and optics (a 10x objective of NA 0.3, about 1 um per
        pixel at the default size).

    Raises:
        ValueError: ``size`` or ``frames`` is too small.
    """
    if size < 32:
        raise ValueError(f"size: expected at least 32, got {size}")
    if frames < 2:
        raise ValueError(f"frames: expected at least 2, got {frames}")
    generator = torch.Generator().manual_seed(seed)
    axis = (torch.arange(size, dtype=torch.float32) + 0.5) / size
    y, x = torch.meshgrid(axis, axis, indexing="ij")  # (size, size), 0..1
    pixel_size_um = 384.0 / size

    height = torch.full((size, size), 70.0, dtype=torch.float32)
    # Stairs along the left side.
    stairs = x < 0.27
    step = (y * 6).floor().clamp(max=5)
    height = torch.where(stairs, 25 + 15 * step, height)
    # A groove across the lower right, flat at the bottom, with slanted flanks.
    across = (y - 0.72 - 0.12 * (x - 0.3)).abs()
    groove = 30 * ((0.085 - across) / 0.045).clamp(0, 1)
    height = torch.where(stairs, height, height - groove)
    # A dome: a spherical cap.
    dome_radius = 0.155
    dome = 1 - ((x - 0.48) ** 2 + (y - 0.30) ** 2) / dome_radius**2
    height = height + 44 * dome.clamp(min=0)
    # A blind hole with a chamfered rim and a slightly conical bottom, as a drill leaves it.
    radius = torch.hypot(x - 0.81, y - 0.30)
    hole_radius = 0.125
    hole = 60 - 10 * (1 - radius / hole_radius)
    hole = hole + 8 * ((hole_radius - radius) / 0.02 - 1).clamp(-1, 0)
    height = torch.where(radius < hole_radius, 70 - hole, height)

    # The face mill's feed leaves arcs, the surface's grain is what a casting skin or sand-blasting
    # leaves; both are a relief and darken the surface.
    wobble = _smooth_noise(size, size / 16, generator)
    feed = torch.hypot(x + 0.55, y - 0.45) / 0.026 + 0.03 * wobble
    marks = 2 * (feed - feed.floor() - 0.5).abs() - 0.5  # triangular, -0.5..0.5
    streaks = _streaks(feed, generator)
    fine = _smooth_noise(size, 1.6, generator)
    coarse = _smooth_noise(size, 6.0, generator)
    milled = ~stairs & (dome <= 0) & (radius >= hole_radius)
    height = height + torch.where(milled, 0.5 * marks, 0.3 * coarse)

    grain = 0.05 * fine + 0.035 * coarse
    albedo = torch.where(milled, 0.60 + 0.10 * marks + 0.06 * streaks, 0.55) + grain
    shape = torch.where(milled, height, height - 0.3 * coarse)
    shading = surface_shading(shape, pixel_size_um, light=(-0.4, -0.4, 1.0), ambient=0.5)
    albedo = (albedo * shading / shading.median()).clamp(0.03, 0.97)
    focus = torch.linspace(
        float(height.min()) - 6.0, float(height.max()) + 6.0, frames, dtype=torch.float32
    )
    return DemoScene(height, albedo, focus, pixel_size_um, 0.3)
