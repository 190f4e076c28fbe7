"""Procedural textures: albedo in 0..1 from a seed, from nearly bare to hard-edged prints."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gplws.data.randomness import Draw, filtered_noise, spectral_noise
from gplws.data.surfaces import Shape, along, check_drawing, pixel_grid, turned, unit_range, voronoi


def cloudy(shape: Shape, draw: Draw) -> Tensor:
    """Fractal brightness: stone, corrosion, biological matter."""
    noise = spectral_noise(
        shape,
        draw,
        exponent=draw.uniform(0.8, 2.5),
        shortest_px=draw.log_uniform(1, 3),
    )
    return (0.5 + 0.2 * noise).clamp(0, 1)


def grain(shape: Shape, draw: Draw) -> Tensor:
    """Grain of one size: sand-blasted, sintered or cast skin."""
    size = draw.log_uniform(1.2, 10)
    noise = spectral_noise(shape, draw, shortest_px=1.2 * size, longest_px=4 * size)
    return (0.5 + 0.2 * noise).clamp(0, 1)


def speckle(shape: Shape, draw: Draw) -> Tensor:
    """Sparkling facets: exponentially distributed brightness."""
    size = draw.log_uniform(1.5, 6)
    first, second = (spectral_noise(shape, draw, shortest_px=size) for _ in range(2))
    return (0.15 * (first**2 + second**2)).clamp(0, 1)


def brushed(shape: Shape, draw: Draw) -> Tensor:
    """Fine streaks in one direction: brushed or ground metal."""
    rows = torch.fft.fftfreq(shape[0], dtype=torch.float32, device=draw.device)[:, None]
    columns = torch.fft.rfftfreq(shape[1], dtype=torch.float32, device=draw.device)[None]
    forward, sideways = turned(rows, columns, draw.angle())
    length, width = draw.log_uniform(10, 80), draw.log_uniform(1, 3)
    amplitude = torch.exp(-((length * forward) ** 2) - (width * sideways) ** 2)
    noise = filtered_noise(amplitude, shape, draw)
    noise = noise - noise.mean()
    return (0.5 + 0.18 * noise / noise.std().clamp(min=1e-9)).clamp(0, 1)


def stains(shape: Shape, draw: Draw) -> Tensor:
    """Two brightnesses with hard, irregular edges: stains, alloys, camouflage."""
    noise = spectral_noise(
        shape, draw, exponent=draw.uniform(1.5, 4), shortest_px=draw.log_uniform(2, 12)
    )
    return _two_levels(noise - draw.uniform(-1, 1), 0.15, draw)


def print_dots(shape: Shape, draw: Draw) -> Tensor:
    """Halftone print: dots on a lattice whose size follows a picture."""
    period = draw.log_uniform(4, 16)
    angle = draw.angle()
    phase = 2 * math.pi / period
    u, v = along(shape, draw, angle), along(shape, draw, angle + math.pi / 2)
    screen = torch.cos(phase * u) + torch.cos(phase * v)
    tone = draw.uniform(0, 1) * spectral_noise(shape, draw, exponent=2, shortest_px=2 * period)
    return _two_levels(screen - tone, 2 * phase, draw)


def stripes(shape: Shape, draw: Draw) -> Tensor:
    """Ruled lines or a checkerboard: scales, targets, etched gratings."""
    period = draw.log_uniform(4, 60)
    phase = 2 * math.pi / period
    angle = draw.angle()
    wave = torch.sin(phase * along(shape, draw, angle) + draw.angle())
    slope = phase
    if draw.chance(0.4):
        wave = wave * torch.sin(phase * along(shape, draw, angle + math.pi / 2) + draw.angle())
    return _two_levels(wave - draw.uniform(-0.4, 0.4), slope, draw)


def print_marks(shape: Shape, draw: Draw) -> Tensor:
    """Bars and rings like print on parts: strokes of one width on a plain ground."""
    size = min(shape)
    y, x = pixel_grid(shape, draw)
    stroke = draw.log_uniform(1, 0.05 * size + 1.5)
    inside = torch.full(shape, -1e3, dtype=torch.float32, device=draw.device)
    for _ in range(draw.integer(3, 24)):
        row, column = (draw.uniform(-0.5, 0.5) * n for n in shape)
        extent = size * draw.log_uniform(0.04, 0.25)
        if draw.chance(0.3):
            distance = (torch.hypot(y - row, x - column) - extent).abs()
            mark = stroke - distance
        else:
            down = draw.chance(0.5)
            across = (x - column if down else y - row).abs()
            length = (y - row if down else x - column).abs()
            mark = torch.minimum(stroke - across, extent - length)
        inside = torch.maximum(inside, mark)
    return _two_levels(inside, 1.0, draw)


def patches(shape: Shape, draw: Draw) -> Tensor:
    """Cells of even brightness with hard edges: grains of an etched alloy, mosaics."""
    count = draw.integer(4, 150)
    owner, _ = voronoi(shape, count, draw)
    return draw.uniform_field(count)[owner]


def specks(shape: Shape, draw: Draw) -> Tensor:
    """Few small dark or bright specks on an even ground: dust, pores, inclusions."""
    size = draw.log_uniform(1.5, 6)
    noise = spectral_noise(shape, draw, shortest_px=2 * size)
    spots = ((noise - draw.uniform(1.2, 2.6)) * 2).clamp(0, 1)
    return 0.5 + 0.5 * spots if draw.chance(0.4) else 0.6 - 0.6 * spots


def bare(shape: Shape, draw: Draw) -> Tensor:
    """Nothing to focus on."""
    return torch.full(shape, 0.5, dtype=torch.float32, device=draw.device)


def _two_levels(signed: Tensor, slope: float, draw: Draw) -> Tensor:
    """1 where ``signed`` > 0, 0 elsewhere, with an edge about a pixel wide; either way round."""
    level = (signed / slope + 0.5).clamp(0, 1)
    return 1 - level if draw.chance(0.5) else level


TEXTURES: dict[str, Callable[[Shape, Draw], Tensor]] = {
    kind.__name__: kind
    for kind in (
        cloudy,
        grain,
        speckle,
        brushed,
        stains,
        print_dots,
        stripes,
        print_marks,
        patches,
        specks,
        bare,
    )
}


def draw_texture(name: str, shape: Shape, draw: Draw) -> Tensor:
    """A procedural texture of a named kind, (H, W) in 0..1.

    Args:
        name: a key of `TEXTURES`.
        shape: rows and columns, at least 8 each.
        draw: where the numbers come from.

    Raises:
        ValueError: an unknown name or a shape that is too small.
    """
    check_drawing("texture", name, TEXTURES, shape)
    return TEXTURES[name](shape, draw)


def contrast(texture: Tensor, low: float, high: float) -> Tensor:
    """Texture spread over the albedos ``low`` to ``high``."""
    return low + (high - low) * unit_range(texture)
