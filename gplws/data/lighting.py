"""Brightness of a surface under the lights of a microscope: coaxial, ring, oblique.

A matt part (Lambert) and a glossy part (a lobe of micro-facets about the direction that mirrors the
light into the objective). The viewer is above; slopes are physical, height over lateral distance.
Source: B. T. Phong, CACM 18 (1975), doi:10.1145/360825.360839; J. F. Blinn, SIGGRAPH 1977,
doi:10.1145/563858.563893 (half-way vector and its lobe).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

LightKind = Literal["coaxial", "ring", "oblique"]
LIGHTS: tuple[str, ...] = get_args(LightKind)

_RING_LIGHTS = 8  # that a ring stands for


class Shading(NamedTuple):
    """Light that a surface sends to the objective.

    Attributes:
        diffuse: (..., H, W) factor for the albedo; 1 for a surface that faces a matt light.
        specular: (..., H, W) what the gloss adds, whatever the albedo.
    """

    diffuse: Tensor
    specular: Tensor


def slopes(height_um: Tensor, pixel_size_um: float) -> tuple[Tensor, Tensor]:
    """Central differences of (..., H, W) heights: slope down the rows and along the columns."""
    if height_um.ndim < 2 or min(height_um.shape[-2:]) < 2:
        raise ValueError(f"height_um: expected at least 2 x 2, got {tuple(height_um.shape)}")
    down, right = torch.gradient(height_um, spacing=pixel_size_um, dim=(-2, -1))
    return down, right


def light_directions(
    kind: str, *, elevation: float = math.pi / 4, azimuth: float = 0.0
) -> list[tuple[float, float, float]]:
    """Unit vectors towards the lights as (down, right, up).

    Args:
        kind: "coaxial" (through the objective), "ring" (all round) or "oblique" (one side).
        elevation: of ring and oblique light above the surface, radians.
        azimuth: of oblique light, radians; 0 is the right.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in LIGHTS:
        raise ValueError(f"light: expected one of {', '.join(LIGHTS)}, got {kind!r}")
    if kind == "coaxial":
        return [(0.0, 0.0, 1.0)]
    flat, up = math.cos(elevation), math.sin(elevation)
    count = _RING_LIGHTS if kind == "ring" else 1
    turns = [azimuth + 2 * math.pi * k / count for k in range(count)]
    return [(flat * math.sin(turn), flat * math.cos(turn), up) for turn in turns]


def shade(
    down: Tensor,
    right: Tensor,
    lights: list[tuple[float, float, float]],
    *,
    ambient: float = 0.2,
    gloss: float = 0.0,
    lobe: float = 0.2,
) -> Shading:
    """Diffuse and specular light of a surface with these slopes.

    Args:
        down, right: (..., H, W) slopes along the rows and columns.
        lights: unit vectors as of `light_directions`, of equal strength.
        ambient: share of the matt light that comes from everywhere, 0..1.
        gloss: strength of the specular part where a facet mirrors the light exactly.
        lobe: spread of the micro-facets' slopes: the lobe's width, > 0.

    Returns:
        Both parts; the diffuse one is ``ambient + (1 - ambient) cos(angle to the light)``, the mean
        over the lights.
    """
    up = torch.rsqrt(1 + down**2 + right**2)  # third component of the normal
    diffuse = torch.zeros_like(up)
    specular = torch.zeros_like(up)
    for light_down, light_right, light_up in lights:
        facing = (light_up - light_down * down - light_right * right) * up
        diffuse += facing.clamp(min=0)
        if gloss > 0:
            # Slopes of the facet that mirrors this light straight up: the half-way vector.
            half_up = 1 + light_up
            miss_down = down + light_down / half_up
            miss_right = right + light_right / half_up
            specular += torch.exp(-(miss_down**2 + miss_right**2) / (2 * lobe**2))
    share = 1 / len(lights)
    return Shading(ambient + (1 - ambient) * share * diffuse, gloss * share * specular)
