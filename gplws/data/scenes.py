"""One focal stack of a chosen surface, texture, lens and camera, with its truth in micrometres."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gplws.data.camera import add_noise, quantise, vignetting
from gplws.data.layers import render_layers
from gplws.data.lighting import LIGHTS, light_directions, shade, slopes
from gplws.data.optics import Lens, PointSpread, fast_length
from gplws.data.randomness import Draw, spectral_noise
from gplws.data.simulator import SimulatedStack, mirrored_indices
from gplws.data.surfaces import SURFACES, draw_surface
from gplws.data.textures import TEXTURES, contrast, draw_texture
from gplws.data.topographies import draw_part, read_textures, read_topography
from gplws.positions import frame_index

# Blur radius at the lowest point, pixels, when the highest is in focus, where no relief is given.
_USUAL_BLUR_PX = 15.0
_ELEMENTS_AT_ONCE = 2**23


@dataclass(frozen=True)
class SceneSettings:
    """What `simulate_stack` renders.

    Attributes:
        surface: a procedural surface (see `gplws.data.surfaces.SURFACES`), or a file that
            `read_topography` reads, as it is, tilt included; a file with a pixel size keeps its
            scale.
        texture: a procedural texture (see `gplws.data.textures.TEXTURES`), or a picture.
        height, width: pixels, at least 8.
        frames: focus positions, at least 2.
        pixel_size_um: width of a pixel on the object.
        numerical_aperture, wavelength_um, refractive_index: of the objective.
        psf: "disk", "gaussian" or "wave".
        relief_um: from the lowest to the highest point; None: as the file says, else as much as
            blurs by 15 pixels.
        z_step_um: from frame to frame; None: the frames span the relief and a tenth on either side.
        falling: whether the plane in focus sinks from frame to frame.
        light: "coaxial", "ring" or "oblique".
        gloss: strength of specular highlights, 0 for none.
        contrast: range of albedo that the texture spans, 0..1.
        exposure: mean brightness aimed at, 1 = full scale; at most 1% of the scene is clipped.
        vignetting: fall-off towards the corners, squared tangent of the angle there.
        gain_drift: relative deviation of the brightness from frame to frame.
        jitter_px: deviation of each frame's lateral displacement, pixels.
        magnification_change: relative growth of the image from the first frame to the last.
        full_well_electrons: at full scale; None: no noise.
        read_noise_electrons: standard deviation.
        bit_depth: 8 gives uint8; 9..16 give uint16, spread over its full range.
        seed: of everything that is drawn.

    Raises:
        ValueError: a value out of range; the message names it.
    """

    surface: str = "holes"
    texture: str = "grain"
    height: int = 256
    width: int = 256
    frames: int = 20
    pixel_size_um: float = 0.5
    numerical_aperture: float = 0.3
    wavelength_um: float = 0.55
    refractive_index: float = 1.0
    psf: PointSpread = "disk"
    relief_um: float | None = None
    z_step_um: float | None = None
    falling: bool = False
    light: str = "coaxial"
    gloss: float = 0.0
    contrast: float = 0.6
    exposure: float = 0.45
    vignetting: float = 0.0
    gain_drift: float = 0.0
    jitter_px: float = 0.0
    magnification_change: float = 0.0
    full_well_electrons: float | None = 20000.0
    read_noise_electrons: float = 5.0
    bit_depth: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        self.lens()
        for name, least in (("height", 8), ("width", 8), ("frames", 2), ("seed", 0)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        for name in ("relief_um", "z_step_um", "full_well_electrons"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a positive number or none, got {value}")
        for name in ("gloss", "vignetting", "gain_drift", "jitter_px", "read_noise_electrons"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected >= 0, got {value}")
        for name in ("contrast", "exposure"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected 0..1, not 0, got {getattr(self, name)}")
        if not abs(self.magnification_change) < 0.5:
            raise ValueError(
                f"magnification_change: expected -0.5..0.5, got {self.magnification_change}"
            )
        if self.light not in LIGHTS:
            raise ValueError(f"light: expected one of {', '.join(LIGHTS)}, got {self.light!r}")
        if not 8 <= self.bit_depth <= 16:
            raise ValueError(f"bit_depth: expected 8..16, got {self.bit_depth}")

    def lens(self) -> Lens:
        """The objective and its pixels."""
        return Lens(
            self.pixel_size_um,
            self.numerical_aperture,
            self.wavelength_um,
            self.refractive_index,
            self.psf,
        )


@torch.no_grad()
def simulate_stack(
    settings: SceneSettings,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> SimulatedStack:
    """Draws a scene and renders it with every layer hiding those below it.

    Borders are mirrored. Truth is in the coordinates of a frame that is neither displaced nor
    magnified.

    Args:
        settings: what to render.
        device: where.
        progress: called with frames done and frames in all.

    Returns:
        Frames (N, H, W), uint8 or uint16, with their truth, on ``device``.

    Raises:
        ValueError: an unknown surface or texture, or a file that cannot be used.
        FileNotFoundError: a surface or texture that is a path to no file.
    """
    draw = Draw(settings.seed, device=device)
    lens = settings.lens()
    shape = (settings.height, settings.width)
    height_um = _heights(settings, lens, shape, draw)
    albedo = _texture(settings, shape, draw)
    radiance = _exposed(settings, _lit(settings, height_um, albedo, draw))

    relief_um = float(height_um.max() - height_um.min())
    middle = float(height_um.max() + height_um.min()) / 2
    step = settings.z_step_um
    if step is None:
        span_um = relief_um or _USUAL_BLUR_PX / lens.radius_px_per_um  # a flat surface has none
        step = 1.2 * span_um / (settings.frames - 1)
    index = torch.arange(settings.frames, dtype=torch.float32) - (settings.frames - 1) / 2
    focus = middle + step * (index.flip(0) if settings.falling else index)

    farthest_um = max(float(focus.max() - height_um.min()), float(height_um.max() - focus.min()))
    margin = math.ceil(1.1 * farthest_um * lens.radius_px_per_um + 4 / lens.cutoff) + 4
    padded = (fast_length(shape[0] + 2 * margin), fast_length(shape[1] + 2 * margin))
    rows, columns = (
        mirrored_indices(size, margin, total, draw.device)
        for size, total in zip(shape, padded, strict=True)
    )
    scene_um = height_um[rows][:, columns][None]  # (1, P, Q)
    light = radiance[rows][:, columns][None, None]  # (1, 1, P, Q)
    window = (slice(margin, margin + shape[0]), slice(margin, margin + shape[1]))
    shift = settings.jitter_px * draw.normal_field(1, settings.frames, 2)
    growth = torch.linspace(-0.5, 0.5, settings.frames, dtype=torch.float32, device=draw.device)
    magnification = 1 + settings.magnification_change * growth[None]  # (1, N)
    gains = (settings.gain_drift * draw.normal_field(settings.frames)).exp()
    corners = torch.tensor([settings.vignetting / 2], dtype=torch.float32, device=draw.device)
    shade_off = vignetting(
        shape, corners, torch.zeros(1, 2, dtype=torch.float32, device=draw.device)
    )

    frames: list[Tensor] = []
    chunk = max(1, _ELEMENTS_AT_ONCE // (padded[0] * padded[1]))
    for some in torch.arange(settings.frames).split(chunk):
        part = slice(int(some[0]), int(some[-1]) + 1)
        irradiance = render_layers(
            scene_um,
            light,
            focus[part].to(draw.device),
            lens,
            window=window,
            occlusion_groups=None,
            layer_spacing_px=0.5,
            shift_px=shift[:, part] if settings.jitter_px else None,
            magnification=magnification[:, part] if settings.magnification_change else None,
        ).irradiance[0, 0]  # (n, H, W)
        irradiance = irradiance * gains[part, None, None] * shade_off
        frames.append(_stored(settings, irradiance, draw))
        if progress is not None:
            progress(part.stop, settings.frames)
    return SimulatedStack(
        frames=torch.cat(frames),
        focus_positions_um=focus.to(draw.device),
        height_um=height_um,
        depth_index=frame_index(height_um, focus.to(draw.device)),
        all_in_focus=radiance.clamp(0, 1),
    )


def _heights(settings: SceneSettings, lens: Lens, shape: tuple[int, int], draw: Draw) -> Tensor:
    """The surface (H, W) in um, its lowest point at 0."""
    usual_um = _USUAL_BLUR_PX / lens.radius_px_per_um
    if settings.surface in SURFACES:
        height = draw_surface(settings.surface, shape, draw).height
        return height * (settings.relief_um or usual_um)
    if not Path(settings.surface).suffix:
        raise ValueError(
            f"surface: expected a file or one of {', '.join(sorted(SURFACES))}, "
            f"got {settings.surface!r}"
        )
    measured = read_topography(settings.surface, level=0)
    if measured.pixel_size_um is None:
        height = draw_part(measured.height_um[None], shape, draw)[0]
    else:
        height = measured.resampled(settings.pixel_size_um)
        top, left = (
            draw.integer(0, max(0, size - n)) for size, n in zip(height.shape, shape, strict=True)
        )
        rows, columns = (
            mirrored_indices(size, -start, n, torch.device("cpu"))
            for size, start, n in zip(height.shape, (top, left), shape, strict=True)
        )
        height = height[rows][:, columns].to(draw.device)
    height = height - height.min()
    relief_um = settings.relief_um
    if relief_um is not None and not height.max() > 0:
        raise ValueError(f"relief_um: {settings.surface} is flat, it cannot have {relief_um} um")
    if relief_um is None and measured.pixel_size_um is None:
        relief_um = usual_um
    return height if relief_um is None else height * (relief_um / height.max().clamp(min=1e-9))


def _texture(settings: SceneSettings, shape: tuple[int, int], draw: Draw) -> Tensor:
    """Albedo (H, W) around 0.5."""
    if settings.texture in TEXTURES:
        texture = draw_texture(settings.texture, shape, draw)
    elif Path(settings.texture).suffix:
        texture = draw_part(read_textures([settings.texture])[0], shape, draw).mean(0)
    else:
        raise ValueError(
            f"texture: expected a picture or one of {', '.join(sorted(TEXTURES))}, "
            f"got {settings.texture!r}"
        )
    half = 0.5 * settings.contrast
    if settings.texture == "bare":
        return texture
    return contrast(texture, 0.5 - half, 0.5 + half)


def _lit(settings: SceneSettings, height_um: Tensor, albedo: Tensor, draw: Draw) -> Tensor:
    """Radiance (H, W) in any scale."""
    down, right = slopes(height_um, settings.pixel_size_um)
    shape = (height_um.shape[0], height_um.shape[1])
    if settings.gloss > 0:  # highlights come from the finish, which the heights do not resolve
        down = down + 0.05 * spectral_noise(shape, draw)
        right = right + 0.05 * spectral_noise(shape, draw)
    lights = light_directions(settings.light, azimuth=-0.75 * math.pi)
    shading = shade(down, right, lights, ambient=0.4, gloss=settings.gloss, lobe=0.15)
    return albedo * shading.diffuse + shading.specular


def _exposed(settings: SceneSettings, radiance: Tensor) -> Tensor:
    # quantile() takes 16 million values at most.
    seen = radiance.flatten()
    bright = float(seen.kthvalue(max(1, round(0.99 * seen.numel()))).values)
    scale = min(settings.exposure / max(float(seen.mean()), 1e-6), 1 / max(bright, 1e-6))
    return radiance * scale


def _stored(settings: SceneSettings, irradiance: Tensor, draw: Draw) -> Tensor:
    """Frames (n, H, W) as integers."""
    signal = irradiance
    if settings.full_well_electrons is not None:

        def each(value: float) -> Tensor:
            return torch.full((len(signal),), value, dtype=torch.float32, device=signal.device)

        signal = add_noise(
            signal,
            each(settings.full_well_electrons),
            each(settings.read_noise_electrons),
            draw.generator,
        )
    bits = torch.full((len(signal),), settings.bit_depth, device=signal.device)
    signal = quantise(signal, bits)
    if settings.bit_depth == 8:
        return (signal * 255).round().to(torch.uint8)
    return (signal * 65535).round().to(torch.uint16)
