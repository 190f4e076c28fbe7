"""Procedural surfaces: what microscopes and macro lenses look at, drawn from a seed.

Every kind is a function of a shape and a `Draw` and returns a `Surface`: a relief of heights 0..1
and the *region* that its features cover, so that texture and brightness can go with the relief, as
they do where a hole is dark or a pad is shiny. Lengths are pixels; where slopes must be right
(spheres, cones, flanks) heights come in pixels first and are then scaled to 0..1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor

from gplws.data.randomness import Draw, spectral_noise

_DISTANCES_AT_ONCE = 2**25  # of pixels to centres; what bounds memory


class Surface(NamedTuple):
    """A relief and where its features are.

    Attributes:
        height: (H, W) float32, 0 (lowest) to 1 (highest).
        region: (H, W) float32 in 0..1: 1 on the features that give the surface its name (the bottom
            of holes and grooves, the top of pads and spheres), 0 beside them.
    """

    height: Tensor
    region: Tensor


Shape = tuple[int, int]


def unit_range(height: Tensor) -> Tensor:
    """Heights scaled to 0..1; a flat one becomes 0."""
    low, high = height.min(), height.max()
    return (height - low) / (high - low).clamp(min=1e-9)


def pixel_grid(shape: Shape, draw: Draw) -> tuple[Tensor, Tensor]:
    """Rows and columns of each pixel from the middle, pixels: two (H, W)."""
    y = torch.arange(shape[0], dtype=torch.float32, device=draw.device) - (shape[0] - 1) / 2
    x = torch.arange(shape[1], dtype=torch.float32, device=draw.device) - (shape[1] - 1) / 2
    return y[:, None].expand(shape), x[None].expand(shape)


def along(shape: Shape, draw: Draw, angle: float | None = None) -> Tensor:
    """Distance along a direction (drawn if not given) from the middle, pixels: (H, W)."""
    y, x = pixel_grid(shape, draw)
    return turned(y, x, draw.angle() if angle is None else angle)[0]


def turned(y: Tensor, x: Tensor, angle: float) -> tuple[Tensor, Tensor]:
    """Coordinates along a direction, given from x towards y, and across it."""
    cosine, sine = math.cos(angle), math.sin(angle)
    return cosine * x + sine * y, cosine * y - sine * x


def voronoi(shape: Shape, count: int, draw: Draw) -> tuple[Tensor, Tensor]:
    """Cells about ``count`` random centres, in coordinates where the image has sides of 1.

    Returns:
        owner: (H, W) int64, the cell of each pixel.
        offset: (H, W, 2) from the centre of the cell, along rows and columns.
    """
    y, x = pixel_grid(shape, draw)
    centers = draw.uniform_field(count, 2) - 0.5  # (n, 2)
    pixels = torch.stack([y / shape[0], x / shape[1]], -1)  # (H, W, 2)
    some = pixels.view(-1, 2).split(max(1, _DISTANCES_AT_ONCE // count))
    owner = torch.cat([torch.cdist(part, centers).argmin(1) for part in some]).view(shape)
    return owner, pixels - centers[owner]


def fractal(shape: Shape, draw: Draw) -> Surface:
    """Self-affine roughness: fracture, sand-blasting, casting skin, bark."""
    noise = spectral_noise(
        shape,
        draw,
        exponent=2 + 2 * draw.uniform(0.3, 1.2),
        shortest_px=draw.log_uniform(2, 12),
        longest_px=max(shape) * draw.log_uniform(0.3, 4),
    )
    return Surface(unit_range(noise), (noise > draw.uniform(-1, 1)).float())


def plane(shape: Shape, draw: Draw) -> Surface:
    """A tilted plane."""
    height = unit_range(along(shape, draw))
    return Surface(height, torch.zeros_like(height))


def waves(shape: Shape, draw: Draw) -> Surface:
    """One to three sine waves."""
    height = torch.zeros(shape, dtype=torch.float32, device=draw.device)
    for _ in range(draw.integer(1, 3)):
        period = max(shape) * draw.log_uniform(0.15, 2)
        phase = draw.angle()
        wave = torch.sin(2 * math.pi * along(shape, draw) / period + phase)
        height = height + draw.uniform(0.3, 1) * period * wave
    height = unit_range(height)
    return Surface(height, (height > 0.5).float())


def dome(shape: Shape, draw: Draw) -> Surface:
    """A sphere, cylinder, cone or saddle that fills the image."""
    size = min(shape)
    y, x = pixel_grid(shape, draw)
    y, x = y - size * draw.uniform(-0.3, 0.3), x - size * draw.uniform(-0.3, 0.3)
    kind = draw.choice(("sphere", "cylinder", "cone", "saddle"))
    radius = size * draw.log_uniform(0.6, 3)
    if kind == "sphere":
        height = (radius**2 - y**2 - x**2).clamp(min=0).sqrt()
    elif kind == "cylinder":
        height = (radius**2 - along(shape, draw) ** 2).clamp(min=0).sqrt()
    elif kind == "cone":
        height = -torch.hypot(y, x)
    else:
        height = x * y
    height = unit_range(height)
    if draw.chance(0.4):
        height = 1 - height
    return Surface(height, (height > draw.uniform(0.3, 0.8)).float())


def spheres(shape: Shape, draw: Draw) -> Surface:
    """Balls on a plate: powder, solder balls, beads; or the cups that they leave."""
    size = min(shape)
    y, x = pixel_grid(shape, draw)
    height = torch.zeros(shape, dtype=torch.float32, device=draw.device)
    largest = size * draw.log_uniform(0.06, 0.35)
    spread = draw.uniform(1, 4)
    # Drops and worn balls are caps: their rim is not vertical.
    cap = draw.choice((0.0, draw.uniform(0.2, 0.9)))
    for _ in range(draw.integer(1, max(2, int(0.6 * (size / largest) ** 2)))):
        radius = largest / draw.uniform(1, spread)
        row, column = (draw.uniform(-0.6, 0.6) * n for n in shape)
        ball = (radius**2 - (y - row) ** 2 - (x - column) ** 2).clamp(min=0).sqrt()
        height = torch.maximum(height, ball - cap * radius)
    region = (height > 0).float()
    height = unit_range(height)
    return Surface(1 - height if draw.chance(0.2) else height, region)


def steps(shape: Shape, draw: Draw) -> Surface:
    """Terraces with parallel edges, vertical or with flanks: step standards, stairs, coins."""
    distance = along(shape, draw)
    if draw.chance(0.2):  # round terraces
        y, x = pixel_grid(shape, draw)
        distance = torch.hypot(y, x) - 0.25 * min(shape)
    flank = draw.choice((0.5, draw.log_uniform(0.5, 20)))
    height = torch.zeros(shape, dtype=torch.float32, device=draw.device)
    extent = 0.5 * min(shape)
    count = draw.integer(1, 6)
    stairs = draw.chance(0.4)
    region = torch.zeros_like(height)
    for k in range(count):
        edge = extent * (2 * (k + 1) / (count + 1) - 1 if stairs else draw.uniform(-1, 1))
        rise = 1.0 if stairs else draw.uniform(-1, 1)
        ramp = ((distance - edge) / flank + 0.5).clamp(0, 1)
        height = height + rise * ramp
        region = (region - ramp.round()).abs()
    return Surface(unit_range(height), region)


def grooves(shape: Shape, draw: Draw) -> Surface:
    """Parallel grooves of rectangular, V, trapezoid or round section, even or crossed."""
    period = min(shape) * draw.log_uniform(0.12, 0.9)
    duty = draw.uniform(0.2, 0.7)
    section = draw.choice(("box", "v", "trapezoid", "round"))

    def profile(distance: Tensor) -> Tensor:
        place = ((distance / period).remainder(1) - 0.5).abs() * 2  # 0 in the middle of a groove
        if section == "box":
            return ((place - duty) * period / 2).clamp(0, 1)
        if section == "v":
            return (place / duty).clamp(max=1)
        if section == "trapezoid":
            return ((place - 0.5 * duty) / (0.5 * duty)).clamp(0, 1)
        return 1 - (1 - (place / duty) ** 2).clamp(min=0).sqrt()

    angle = draw.angle()
    distance = along(shape, draw, angle) + period * draw.uniform(0, 1)
    if draw.chance(0.3):
        distance = distance + 0.08 * period * spectral_noise(shape, draw, shortest_px=period)
    height = profile(distance)
    if draw.chance(0.25):
        crossing = along(shape, draw, angle + math.pi / 2)
        height = torch.minimum(height, profile(crossing))
    return Surface(unit_range(height), (height < 0.5).float())


def machined(shape: Shape, draw: Draw) -> Surface:
    """Turned, milled or ground: cusps along straight or arched tool paths."""
    feed = draw.log_uniform(3, 0.25 * min(shape))
    if draw.chance(0.5):
        y, x = pixel_grid(shape, draw)
        radius = max(shape) * draw.uniform(0.6, 4)
        angle = draw.angle()
        distance = torch.hypot(y - radius * math.sin(angle), x - radius * math.cos(angle))
    else:
        distance = along(shape, draw)
    distance = distance + feed * draw.uniform(0, 0.1) * spectral_noise(
        shape, draw, shortest_px=max(4.0, feed)
    )
    path = distance / feed
    place = path - path.floor() - 0.5
    passes = path.floor().long()
    passes = passes - passes.min()
    # Each pass cuts a little deeper or less deep than the one before it.
    depth = draw.normal_field(int(passes.max()) + 1)[passes]
    height = 4 * place**2 + draw.uniform(0, 0.5) * depth
    if draw.chance(0.3):  # grinding: many irregular scratches instead of cusps
        lines = (distance * 0.7).floor().long()
        lines = lines - lines.min()
        height = height + draw.normal_field(int(lines.max()) + 1)[lines]
    return Surface(unit_range(height), (depth > 0).float())


def holes(shape: Shape, draw: Draw) -> Surface:
    """Blind holes: flat or conical bottom, sharp or chamfered rim; or the pegs that fit them."""
    size = min(shape)
    y, x = pixel_grid(shape, draw)
    depth = torch.zeros(shape, dtype=torch.float32, device=draw.device)
    largest = size * draw.log_uniform(0.08, 0.45)
    edge = draw.choice((0.7, draw.log_uniform(1, 8)))
    cone = draw.choice((0.0, draw.uniform(0, 0.5)))
    for _ in range(draw.integer(1, max(1, int((0.5 * size / largest) ** 2)))):
        radius = largest * draw.uniform(0.5, 1)
        row, column = (draw.uniform(-0.45, 0.45) * n for n in shape)
        distance = torch.hypot(y - row, x - column)
        wall = ((radius - distance) / edge + 0.5).clamp(0, 1)
        bottom = 1 - cone * (distance / radius).clamp(max=1)
        depth = torch.maximum(depth, wall * bottom * draw.uniform(0.6, 1))
    region = (depth > 0.3).float()
    return Surface(unit_range(depth if draw.chance(0.25) else -depth), region)


def pads(shape: Shape, draw: Draw) -> Surface:
    """Rectangular blocks at a few levels: circuit boards, keys, etched structures."""
    size = min(shape)
    y, x = pixel_grid(shape, draw)
    u, v = turned(y, x, draw.choice((0.0, draw.angle())))
    height = torch.zeros(shape, dtype=torch.float32, device=draw.device)
    flank = draw.choice((0.7, draw.log_uniform(0.7, 6)))
    levels = [draw.uniform(0.3, 1) for _ in range(draw.integer(1, 4))]
    largest = size * draw.log_uniform(0.08, 0.5)
    for _ in range(draw.integer(2, max(3, int(0.8 * (size / largest) ** 2)))):
        half_u, half_v = (0.5 * largest * draw.log_uniform(0.25, 1.5) for _ in range(2))
        row, column = (0.6 * size * draw.uniform(-1, 1) for _ in range(2))
        inside = torch.minimum(half_u - (u - column).abs(), half_v - (v - row).abs())
        height = torch.maximum(height, draw.choice(levels) * (inside / flank + 0.5).clamp(0, 1))
    return Surface(unit_range(height), (height > 0.15).float())


def scratches(shape: Shape, draw: Draw) -> Surface:
    """V-shaped scratches with pile-up along their sides."""
    height = torch.zeros(shape, dtype=torch.float32, device=draw.device)
    region = torch.zeros_like(height)
    for _ in range(draw.integer(1, 14)):
        half = draw.log_uniform(1, 0.06 * min(shape) + 1.5)
        distance = along(shape, draw) - min(shape) * draw.uniform(-0.5, 0.5)
        if draw.chance(0.3):
            distance = distance + 6 * spectral_noise(shape, draw, shortest_px=0.7 * min(shape))
        cut = (distance.abs() / half - 1).clamp(-1, 0) * half
        pile = 0.3 * half * torch.exp(-(((distance.abs() - 1.3 * half) / (0.4 * half)) ** 2))
        height = torch.minimum(height, cut) + pile
        region = torch.maximum(region, (cut < -0.2 * half).float())
    return Surface(unit_range(height), region)


def cells(shape: Shape, draw: Draw) -> Surface:
    """Voronoi cells at heights and tilts of their own: crystals, fracture facets, tiles."""
    count = draw.integer(3, 60)
    owner, offset = voronoi(shape, count, draw)
    tilt = draw.choice((0.0, draw.log_uniform(0.1, 3)))
    slope = tilt * draw.normal_field(count, 2)
    level = draw.normal_field(count)
    height = level[owner] + (offset * slope[owner]).sum(-1)
    region = draw.uniform_field(count) > 0.5
    return Surface(unit_range(height), region[owner].float())


def fibres(shape: Shape, draw: Draw) -> Surface:
    """Round fibres, hairs or wires that cross in front of a background."""
    size = min(shape)
    y, x = pixel_grid(shape, draw)
    height = torch.zeros(shape, dtype=torch.float32, device=draw.device)
    gap = size * draw.uniform(0.1, 0.6)
    base = size * draw.uniform(0, 0.3) * unit_range(spectral_noise(shape, draw, exponent=3))
    region = torch.zeros_like(height)
    height = height + base
    for _ in range(draw.integer(1, 10)):
        radius = size * draw.log_uniform(0.01, 0.08) + 0.6
        forward, sideways = turned(y, x, draw.angle())
        sideways = sideways - size * draw.uniform(-0.5, 0.5)
        bend = draw.uniform(-1, 1) * 0.15 * size
        sideways = sideways + bend * torch.sin(2 * forward / size + draw.angle())
        axis = gap * draw.uniform(0.3, 1) + forward * draw.uniform(-0.4, 0.4) * gap / size * 2
        inside = sideways.abs() < radius
        fibre = axis + (radius**2 - sideways**2).clamp(min=0).sqrt()
        visible = inside & (fibre > height)
        height = torch.where(visible, fibre, height)
        region = torch.where(visible, 1.0, region)
    return Surface(unit_range(height), region)


def silhouette(shape: Shape, draw: Draw) -> Surface:
    """An object far in front of a background: insects, needles, rims, edges."""
    kind = draw.choice((fractal, spheres, pads, fibres, cells, steps, holes))
    front = kind(shape, draw)
    mask = front.region
    if not 0.02 < float(mask.mean()) < 0.98:
        mask = (along(shape, draw) > min(shape) * draw.uniform(-0.3, 0.3)).float()
    relief = draw.uniform(0.05, 0.5)
    near = 1 - relief + relief * draw.choice((front.height, fractal(shape, draw).height))
    far = draw.uniform(0, 0.2) * draw.choice((plane, fractal))(shape, draw).height
    height = torch.where(mask > 0.5, near, far)
    return Surface(unit_range(height), mask)


SURFACES: dict[str, Callable[[Shape, Draw], Surface]] = {
    kind.__name__: kind
    for kind in (
        fractal,
        plane,
        waves,
        dome,
        spheres,
        steps,
        grooves,
        machined,
        holes,
        pads,
        scratches,
        cells,
        fibres,
        silhouette,
    )
}


def draw_surface(name: str, shape: Shape, draw: Draw) -> Surface:
    """A procedural surface of a named kind.

    Args:
        name: a key of `SURFACES`.
        shape: rows and columns, at least 8 each.
        draw: where the numbers come from.

    Raises:
        ValueError: an unknown name or a shape that is too small.
    """
    check_drawing("surface", name, SURFACES, shape)
    return SURFACES[name](shape, draw)


def check_drawing(what: str, name: str, known: Collection[str], shape: Shape) -> None:
    """Raises ValueError if ``name`` is not among those ``known``, or ``shape`` is too small."""
    if name not in known:
        raise ValueError(f"{what}: expected one of {', '.join(sorted(known))}, got {name!r}")
    if min(shape) < 8:
        raise ValueError(f"shape: expected at least 8 x 8, got {shape}")
