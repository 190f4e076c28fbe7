"""Endless focal stacks with known depth, drawn and rendered while a network trains.

``StackGenerator(seed=0).batch(step, batch_size=8, frames=10, crop=96)`` is a batch of scenes that
nobody has seen before and that the same seed and step draw again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gplws.data.camera import add_noise, jpeg_like, quantise, vignetting
from gplws.data.layers import render_layers
from gplws.data.lighting import LIGHTS, light_directions, shade, slopes
from gplws.data.optics import POINT_SPREADS, Lens, fast_length
from gplws.data.randomness import Draw, spectral_noise
from gplws.data.samples import DepthSample
from gplws.data.surfaces import SURFACES, Surface, along, draw_surface, unit_range
from gplws.data.textures import TEXTURES, contrast, draw_texture
from gplws.data.topographies import Topography, draw_part, draw_topography
from gplws.positions import frame_index

Range = tuple[float, float]


@dataclass(frozen=True)
class StackSettings:
    """What is drawn, as ranges (low, high) and probabilities; defaults suit microscopes and macro.

    Geometry is told in pixels, as networks see it; NA and wavelength turn it into micrometres. One
    batch shares lens and focus positions, its scenes differ.

    Attributes:
        unit: of depth and focus positions, "frames" or "um".
        channels: 1 (gray) or 3 (RGB).
        total_blur_px: radius of the blur disk at one end of the stack for what is in focus at the
            other, log-uniform.
        blur_per_frame_px: bounds of its growth per frame; they take precedence over
            ``total_blur_px``.
        numerical_aperture: log-uniform.
        wavelength_um: uniform.
        cutoff: highest frequency of the lens, cycles per pixel, log-uniform; above 0.5 the pixels
            limit the detail, below it the lens does.
        residual_blur_px: deviation of the blur that all frames share, uniform.
        psfs: models of the point spread, drawn with equal probability; see `gplws.data.optics`.
        irregular: probability of uneven focus steps.
        irregular_spread: largest relative deviation of a step then.
        falling: probability that focus moves away from the objective (first frame on top).
        relief: share of the focus range that the surface covers, log-uniform.
        out_of_range: probability that the surface reaches beyond the focus range.
        surfaces: names of procedural surfaces; None: all.
        measured_share: share of measured topographies among the surfaces, where there are some.
        second_surface: probability that a second, shallower surface is added to the first.
        roughness: deviation of the roughness added, as a share of the relief, log-uniform.
        textures: names of procedural textures; None: all.
        picture_share: share of pictures among the textures, where there are some.
        texture_contrast: range of albedo that a texture spans, log-uniform.
        grain: probability of fine grain, uncorrelated from pixel to pixel, on top of a texture.
        grain_contrast: its relative deviation, log-uniform.
        two_materials: probability that features have a texture and albedo of their own.
        strong_materials: probability that one of the two is then much brighter (up to 30 times).
        lights: kinds of light, drawn with equal probability.
        gloss: probability of specular highlights.
        exposure: mean brightness aimed at, uniform.
        vignetting: probability of a fall-off towards a corner.
        gain_drift: probability that brightness changes from frame to frame.
        fixed_pattern: probability that pixels differ in sensitivity, or that dust lies on the
            sensor: sharp texture that stays the same in all frames and tells nothing of the depth.
        fixed_pattern_deviation: its relative deviation, log-uniform.
        jitter: probability of lateral displacement of the frames.
        jitter_px: its deviation, log-uniform.
        magnification: probability that magnification changes with focus.
        magnification_total: largest change from the first frame to the last.
        still: probability that focus stands still, so that all frames of a batch are taken at one
            focus position and nothing in them tells depth.
        full_well_electrons: log-uniform; few electrons make noisy frames.
        read_noise_electrons: log-uniform.
        bit_depths: bits, drawn with equal probability.
        gamma: probability that values are stored with a power law of 1 / 1.8 to 1 / 2.4.
        jpeg: probability of compression losses.
        jpeg_quality: uniform.
        least_visibility: points of which less of the light cone comes through are not valid.
        layer_spacing_px: see `gplws.data.layers.render_layers`.
        occlusion_groups: likewise.

    Raises:
        ValueError: a range that is not one, an unknown name, a probability outside 0..1.
    """

    unit: str = "frames"
    channels: int = 1
    total_blur_px: Range = (4.0, 60.0)
    blur_per_frame_px: Range = (0.3, 6.0)
    numerical_aperture: Range = (0.05, 0.9)
    wavelength_um: Range = (0.45, 0.65)
    cutoff: Range = (0.4, 2.5)
    residual_blur_px: Range = (0.15, 0.9)
    psfs: tuple[str, ...] = ("disk", "gaussian", "wave", "wave")
    irregular: float = 0.25
    irregular_spread: float = 0.6
    falling: float = 0.5
    relief: Range = (0.15, 1.0)
    out_of_range: float = 0.15
    surfaces: tuple[str, ...] | None = None
    measured_share: float = 0.4
    second_surface: float = 0.35
    roughness: Range = (0.0005, 0.04)
    textures: tuple[str, ...] | None = None
    picture_share: float = 0.35
    texture_contrast: Range = (0.015, 1.0)
    grain: float = 0.7
    grain_contrast: Range = (0.002, 0.1)
    two_materials: float = 0.5
    strong_materials: float = 0.5
    lights: tuple[str, ...] = ("coaxial", "ring", "oblique")
    gloss: float = 0.35
    exposure: Range = (0.12, 0.6)
    vignetting: float = 0.4
    gain_drift: float = 0.4
    fixed_pattern: float = 0.0
    fixed_pattern_deviation: Range = (0.002, 0.05)
    jitter: float = 0.4
    jitter_px: Range = (0.02, 0.5)
    magnification: float = 0.15
    magnification_total: float = 0.01
    still: float = 0.0
    full_well_electrons: Range = (400.0, 60000.0)
    read_noise_electrons: Range = (1.0, 25.0)
    bit_depths: tuple[int, ...] = (8, 8, 10, 12, 16)
    gamma: float = 0.3
    jpeg: float = 0.12
    jpeg_quality: tuple[int, int] = (40, 95)
    least_visibility: float = 0.1
    layer_spacing_px: float = 1.0
    occlusion_groups: int | None = 6

    def __post_init__(self) -> None:
        if self.unit not in ("frames", "um"):
            raise ValueError(f"unit: expected 'frames' or 'um', got {self.unit!r}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels: expected 1 or 3, got {self.channels}")
        for name, known in (
            ("psfs", POINT_SPREADS),
            ("surfaces", tuple(SURFACES)),
            ("textures", tuple(TEXTURES)),
            ("lights", LIGHTS),
            ("bit_depths", tuple(range(1, 17))),
        ):
            chosen = getattr(self, name)
            if chosen is None:
                continue
            object.__setattr__(self, name, tuple(chosen))  # YAML knows lists only
            wrong = [value for value in chosen if value not in known]
            if wrong or not chosen:
                raise ValueError(
                    f"{name}: expected some of {', '.join(map(str, known))}, got {chosen}"
                )
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in ("Range", "tuple[int, int]"):
                object.__setattr__(self, field.name, tuple(value))
                low, high = value
                if not 0 <= low <= high < math.inf:
                    raise ValueError(f"{field.name}: expected 0 <= low <= high, got {value}")
                if low == 0 and field.name not in _UNIFORM:
                    raise ValueError(f"{field.name}: expected low > 0, got {value}")
            elif field.type == "float" and field.name != "layer_spacing_px" and not 0 <= value <= 1:
                raise ValueError(f"{field.name}: expected 0..1, got {value}")


# Growth of the blur radius over an occlusion group, pixels, below which more groups do not pay.
_GROUP_PX = 2.5
_UNIFORM = ("wavelength_um", "residual_blur_px", "exposure", "jpeg_quality")


class Geometry(NamedTuple):
    """Lens and focus positions of a batch.

    Attributes:
        lens: optics and pixel size.
        focus_um: (N,) float32 strictly monotonic.
    """

    lens: Lens
    focus_um: Tensor

    @property
    def widest_px(self) -> float:
        """Blur radius at one end of the focus range of what is in focus at the other, pixels."""
        return float(self.focus_um.max() - self.focus_um.min()) * self.lens.radius_px_per_um


class StackGenerator:
    """Draws batches of focal stacks; the same for the same seed, step and arguments.

    Args:
        settings: what is drawn.
        topographies: measured surfaces to draw parts of, besides procedural ones.
        textures: pictures (C, H, W) in 0..1, C = 1 or 3, to draw parts of, besides procedural ones.
        seed: >= 0; another seed gives unrelated scenes.
        device: where scenes are drawn and rendered. Numbers are the same on every device, noise is
            not.

    Raises:
        ValueError: a negative seed, or a picture of the wrong shape.

    Example:
        >>> generator = StackGenerator(seed=1)
        >>> sample = generator.batch(0, batch_size=2, frames=5, crop=32)
        >>> sample.stack.shape, sample.depth.shape, sample.unit
        (torch.Size([2, 1, 5, 32, 32]), torch.Size([2, 32, 32]), 'frames')
    """

    def __init__(
        self,
        settings: StackSettings | None = None,
        *,
        topographies: Sequence[Topography] = (),
        textures: Sequence[Tensor] = (),
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if seed < 0:
            raise ValueError(f"seed: expected >= 0, got {seed}")
        for picture in textures:
            if picture.ndim != 3 or picture.shape[0] not in (1, 3):
                raise ValueError(f"textures: expected (1 or 3, H, W), got {tuple(picture.shape)}")
        self.settings = settings or StackSettings()
        self.seed = seed
        self.device = torch.device(device)
        self._topographies = list(topographies)
        self._textures = list(textures)

    @torch.no_grad()
    def batch(
        self, step: int, batch_size: int = 8, frames: int = 10, crop: int | tuple[int, int] = 96
    ) -> DepthSample:
        """Batch number ``step``.

        Args:
            step: >= 0; each number is another batch.
            batch_size: scenes.
            frames: focus positions, at least 2.
            crop: height and width in pixels, at least 8.

        Returns:
            ``stack`` (B, C, N, H, W); ``depth`` (B, H, W) in the settings' unit, NaN beyond the
            focus range; ``valid`` where depth is known and the light reaches the objective;
            ``all_in_focus`` (B, C, H, W).

        Raises:
            ValueError: an argument out of range.
        """
        height, width = (crop, crop) if isinstance(crop, int) else crop
        for name, value, least in (
            ("step", step, 0),
            ("batch_size", batch_size, 1),
            ("frames", frames, 2),
            ("crop", min(height, width), 8),
        ):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        draw = Draw(self.seed, step, device=self.device)
        geometry = draw_geometry(self.settings, frames, draw)
        # Scenes are periodic; half the blur beside the window keeps their seam at a distance.
        margin = math.ceil(0.5 * geometry.widest_px) + 4
        shape = (fast_length(height + margin), fast_length(width + margin))
        top, left = (shape[0] - height) // 2, (shape[1] - width) // 2
        window = (slice(top, top + height), slice(left, left + width))
        scenes = [self._scene(shape, geometry, draw) for _ in range(batch_size)]
        surface = torch.stack([scene[0] for scene in scenes])  # (B, P, Q), um
        radiance = torch.stack([scene[1] for scene in scenes])  # (B, C, P, Q)
        radiance = self._exposed(radiance, window, draw)
        shift, magnification = self._motion(batch_size, frames, draw)
        rendered = render_layers(
            surface,
            radiance,
            geometry.focus_um,
            geometry.lens,
            window=window,
            layer_spacing_px=self.settings.layer_spacing_px,
            occlusion_groups=self._groups(geometry.widest_px),
            shift_px=shift,
            magnification=magnification,
        )
        irradiance = rendered.irradiance
        if self.settings.still and draw.chance(self.settings.still):
            there = draw.integer(0, frames - 1)
            irradiance = irradiance[:, :, there : there + 1].expand_as(irradiance)
        stack = self._photographed(irradiance, draw)
        seen = surface[:, window[0], window[1]]
        focus = geometry.focus_um.to(self.device)
        index = frame_index(seen, focus)  # NaN beyond the focus range
        valid = index.isfinite() & (rendered.visibility >= self.settings.least_visibility)
        if self.settings.unit == "frames":
            depth = index
            positions = torch.arange(frames, dtype=torch.float32, device=self.device)
        else:
            depth = torch.where(index.isfinite(), seen, torch.nan)
            positions = focus
        return DepthSample(
            stack=stack,
            focus_positions=positions.expand(batch_size, frames).contiguous(),
            depth=depth,
            valid=valid,
            unit=self.settings.unit,
            name=f"simulated, seed {self.seed}, step {step}",
            all_in_focus=radiance[..., window[0], window[1]].clamp(0, 1),
        )

    def batches(
        self,
        batch_size: int = 8,
        frames: int = 10,
        crop: int | tuple[int, int] = 96,
        *,
        first_step: int = 0,
    ) -> Iterator[DepthSample]:
        """Batches ``first_step``, ``first_step + 1`` and so on, without end; see `batch`."""
        step = first_step
        while True:
            yield self.batch(step, batch_size, frames, crop)
            step += 1

    def _groups(self, widest_px: float) -> int | None:
        """Occlusion groups: fewer where what shines through is blurred by a few pixels at most."""
        most = self.settings.occlusion_groups
        return None if most is None else min(most, max(2, math.ceil(widest_px / _GROUP_PX)))

    def _scene(
        self, shape: tuple[int, int], geometry: Geometry, draw: Draw
    ) -> tuple[Tensor, Tensor]:
        """Heights (P, Q) in um and radiance (C, P, Q) in any scale of one scene."""
        surface = self._surface(shape, draw)
        low, high = self._extent(geometry.focus_um, draw)
        height_um = low + (high - low) * surface.height
        albedo = self._albedo(surface, shape, draw)
        return height_um, self._lit(height_um, albedo, geometry.lens, draw)

    def _surface(self, shape: tuple[int, int], draw: Draw) -> Surface:
        settings = self.settings
        names = settings.surfaces or tuple(SURFACES)

        def one() -> Surface:
            if self._topographies and draw.chance(settings.measured_share):
                return draw_topography(draw.choice(self._topographies), shape, draw)
            return draw_surface(draw.choice(names), shape, draw)

        height, region = one()
        if draw.chance(settings.second_surface):
            height = height + draw.log_uniform(0.03, 0.5) * one().height
        if draw.chance(0.5):
            height = height + draw.log_uniform(0.02, 0.8) * unit_range(along(shape, draw))
        rough = draw.log_uniform(*settings.roughness)
        exponent = 2 + 2 * draw.uniform(0.2, 1)
        height = unit_range(height) + rough * spectral_noise(
            shape, draw, exponent=exponent, longest_px=0.5 * max(shape)
        )
        return Surface(unit_range(height), region)

    def _extent(self, focus_um: Tensor, draw: Draw) -> tuple[float, float]:
        """Lowest and highest point of a surface, um."""
        settings = self.settings
        first, last = float(focus_um.min()), float(focus_um.max())
        relief = draw.log_uniform(*settings.relief) * (last - first)
        low = draw.uniform(first, last - relief)
        if draw.chance(settings.out_of_range):
            # One end, or all of a shallow surface, lies up to a quarter of the range outside.
            low += draw.uniform(-0.25, 0.25) * (last - first)
        return low, low + relief

    def _albedo(self, surface: Surface, shape: tuple[int, int], draw: Draw) -> Tensor:
        """Albedo (C, P, Q)."""
        settings = self.settings
        albedo = self._texture(shape, draw)
        if draw.chance(settings.two_materials):
            other = self._texture(shape, draw)
            if draw.chance(settings.strong_materials):
                factor = draw.log_uniform(2, 30)
                if draw.chance(0.5):
                    albedo, other = albedo / factor, other
                else:
                    albedo, other = albedo, other / factor
            albedo = torch.lerp(albedo, other, surface.region)
        if draw.chance(0.25):  # dirt and shadow gather at the bottom
            albedo = albedo * (1 - draw.uniform(0.2, 0.95) * (1 - surface.height))
        return albedo

    def _texture(self, shape: tuple[int, int], draw: Draw) -> Tensor:
        """One material's albedo (C, P, Q), 0..1."""
        settings = self.settings
        channels = settings.channels
        if self._textures and draw.chance(settings.picture_share):
            part = draw_part(draw.choice(self._textures), shape, draw)
            if part.shape[0] != channels:
                part = part.mean(0, keepdim=True).expand(channels, *shape)
            texture = part
        else:
            name = draw.choice(settings.textures or tuple(TEXTURES))
            texture = draw_texture(name, shape, draw)[None]
            if draw.chance(0.4):
                name = draw.choice(settings.textures or tuple(TEXTURES))
                texture = texture + draw.uniform(0, 1) * draw_texture(name, shape, draw)
        span = draw.log_uniform(*settings.texture_contrast)
        low = draw.uniform(0, 1 - span)
        texture = contrast(texture, low, low + span).expand(channels, *shape)
        if draw.chance(settings.grain):
            deviation = draw.log_uniform(*settings.grain_contrast)
            texture = texture * (1 + deviation * draw.normal_field(*shape))
        if channels == 3:
            tint = torch.tensor(
                [draw.uniform(0.5, 1) for _ in range(3)], dtype=torch.float32, device=draw.device
            )
            texture = texture * tint.view(3, 1, 1)
        return texture.clamp(min=0)

    def _lit(self, height_um: Tensor, albedo: Tensor, lens: Lens, draw: Draw) -> Tensor:
        """Radiance (C, P, Q) of a surface under some light."""
        settings = self.settings
        down, right = slopes(height_um, lens.pixel_size_um)
        # Slopes beyond those of the pixels: the finish of the surface.
        finish = draw.log_uniform(0.003, 0.15)
        size = draw.log_uniform(1, 5)
        for slope in (down, right):
            slope += finish * spectral_noise(
                (slope.shape[0], slope.shape[1]), draw, shortest_px=size
            )
        lights = light_directions(
            draw.choice(settings.lights),
            elevation=draw.uniform(0.25, 1.3),
            azimuth=draw.angle(),
        )
        glossy = draw.chance(settings.gloss)
        shading = shade(
            down,
            right,
            lights,
            ambient=draw.uniform(0.1, 0.9),
            gloss=draw.log_uniform(0.1, 10) if glossy else 0.0,
            lobe=draw.log_uniform(0.03, 0.5),
        )
        light = albedo * shading.diffuse + shading.specular
        if draw.chance(0.3):  # uneven illumination
            shape = (height_um.shape[0], height_um.shape[1])
            light = light * (1 + draw.uniform(-0.6, 0.6) * unit_range(along(shape, draw)))
        return light

    def _exposed(self, radiance: Tensor, window: tuple[slice, slice], draw: Draw) -> Tensor:
        """Radiance scaled to the exposure aimed at, with few clipped pixels in most scenes."""
        settings = self.settings
        seen = radiance[..., window[0], window[1]].flatten(1)
        mean = seen.mean(1).clamp(min=1e-6)
        bright = torch.quantile(seen, 0.97, dim=1).clamp(min=1e-6)
        gains = []
        for _ in range(len(radiance)):
            target = draw.uniform(*settings.exposure)
            limit = draw.uniform(0.6, 1.0) if draw.chance(0.85) else draw.uniform(1.0, 3.0)
            gains.append((target, limit))
        means, limits = torch.tensor(gains, dtype=torch.float32, device=radiance.device).unbind(1)
        return radiance * torch.minimum(means / mean, limits / bright).view(-1, 1, 1, 1)

    def _motion(
        self, batch_size: int, frames: int, draw: Draw
    ) -> tuple[Tensor | None, Tensor | None]:
        """Displacement (B, N, 2) and magnification (B, N) of the frames; None for none."""
        settings = self.settings
        shift = magnification = None
        if draw.chance(settings.jitter):
            shift = draw.normal_field(batch_size, frames, 2) * draw.log_uniform(*settings.jitter_px)
        if draw.chance(settings.magnification):
            ramp = torch.linspace(-0.5, 0.5, frames, dtype=torch.float32, device=self.device)
            total = [settings.magnification_total * draw.uniform(-1, 1) for _ in range(batch_size)]
            magnification = (
                1 + torch.tensor(total, dtype=torch.float32, device=self.device)[:, None] * ramp
            )
        return shift, magnification

    def _photographed(self, irradiance: Tensor, draw: Draw) -> Tensor:
        """Values (B, C, N, H, W) in 0..1 that the camera stores."""
        settings = self.settings
        batch, channels, frames, height, width = irradiance.shape
        signal = irradiance

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=irradiance.device)

        if draw.chance(settings.vignetting):
            strength = column([draw.log_uniform(0.005, 0.2) for _ in range(batch)])
            center = 2 * draw.uniform_field(batch, 2) - 1
            signal = signal * vignetting((height, width), strength, center)[:, None, None]
        if settings.fixed_pattern and draw.chance(settings.fixed_pattern):
            signal = signal * self._sensitivity(batch, (height, width), draw)[:, None, None]
        if draw.chance(settings.gain_drift):
            flicker = draw.log_uniform(0.001, 0.03) * draw.normal_field(batch, frames)
            wander = draw.log_uniform(0.001, 0.03) * draw.normal_field(batch, frames).cumsum(1)
            signal = signal * (flicker + wander).exp()[:, None, :, None, None]
        full_well = [draw.log_uniform(*settings.full_well_electrons) for _ in range(batch)]
        read_noise = [draw.log_uniform(*settings.read_noise_electrons) for _ in range(batch)]
        signal = add_noise(
            signal, column(full_well), column(read_noise), draw.generator, exact=False
        ).clamp_(0, 1)
        if draw.chance(settings.gamma):
            power = column([1 / draw.uniform(1.8, 2.4) for _ in range(batch)])
            signal = signal.pow(power.view(-1, 1, 1, 1, 1))
        depths = [float(draw.choice(settings.bit_depths)) for _ in range(batch)]
        signal = quantise(signal, column(depths))
        if draw.chance(settings.jpeg):
            offset = (draw.integer(0, 7), draw.integer(0, 7))
            signal = jpeg_like(signal, draw.integer(*settings.jpeg_quality), offset)
        return signal

    def _sensitivity(self, batch: int, shape: tuple[int, int], draw: Draw) -> Tensor:
        """Gain (B, H, W) of the pixels: each its own, or with soft specks of dust."""
        size = draw.choice((0.0, draw.log_uniform(1, 4)))
        patterns = [
            draw.log_uniform(*self.settings.fixed_pattern_deviation)
            * spectral_noise(shape, draw, shortest_px=size)
            for _ in range(batch)
        ]
        return (1 + torch.stack(patterns)).clamp(min=0)


def draw_geometry(settings: StackSettings, frames: int, draw: Draw) -> Geometry:
    """A lens and focus positions within the settings' ranges, on the CPU."""
    steps = frames - 1
    least, most = (steps * blur for blur in settings.blur_per_frame_px)
    low, high = (min(max(total, least), most) for total in settings.total_blur_px)
    total_px = draw.log_uniform(low, high)
    aperture = draw.log_uniform(*settings.numerical_aperture)
    wavelength = draw.uniform(*settings.wavelength_um)
    cutoff = draw.log_uniform(*settings.cutoff)
    lens = Lens(
        pixel_size_um=cutoff * wavelength / (2 * aperture),
        numerical_aperture=aperture,
        wavelength_um=wavelength,
        psf=_psf(settings, aperture, draw),
        residual_blur_px=draw.uniform(*settings.residual_blur_px),
    )
    spacing = [1.0] * steps
    if draw.chance(settings.irregular):
        spread = draw.uniform(0, settings.irregular_spread)
        spacing = [1 + draw.uniform(-spread, spread) for _ in range(steps)]
    positions = torch.tensor([0.0, *spacing], dtype=torch.float64).cumsum(0)
    positions = positions * (total_px / lens.radius_px_per_um / float(positions[-1]))
    if draw.chance(settings.falling):
        positions = positions.flip(0)
    return Geometry(lens, positions.float())


def _psf(settings: StackSettings, aperture: float, draw: Draw) -> Any:
    """Model of the point spread; the wave model of a high aperture takes seconds, so not there."""
    psf = draw.choice(settings.psfs)
    return "disk" if psf == "wave" and aperture > 0.4 else psf
