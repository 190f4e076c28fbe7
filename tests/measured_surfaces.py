"""A machined surface that is known everywhere, and height maps that instruments measure of it."""

import math

import numpy as np
import pytest

from gplws.datasets import Registration


def surface(x, y):
    """A machined face, um: a groove, a dome, a blind hole and waves; defined everywhere."""
    groove = -9 / (1 + np.exp((np.abs(y - 20 - 0.3 * x) - 12) / 1.5))
    dome = 14 * np.exp(-((x + 45) ** 2 + (y + 40) ** 2) / 900)
    hole = -16 / (1 + np.exp((np.hypot(x - 50, y + 30) - 22) / 2))
    bump = 6 * np.exp(-((x + 60) ** 2 + (y - 55) ** 2) / 300)
    waves = 0.8 * np.cos(0.09 * x + 0.05 * y) + 0.6 * np.cos(0.04 * x - 0.11 * y + 1)
    return groove + dome + hole + bump + waves


def grid(shape, pixel_um):
    """x and y of the pixels, um from the middle."""
    y = (np.arange(shape[0]) - (shape[0] - 1) / 2) * pixel_um
    x = (np.arange(shape[1]) - (shape[1] - 1) / 2) * pixel_um
    return np.meshgrid(x, y)


def measured_map(truth, shape, pixel_um, noise_um=0.05, seed=0):
    """What an instrument placed as ``truth`` says would measure of the surface."""
    u, v = grid(shape, pixel_um)
    angle = math.radians(truth.rotation_deg)
    du, dv = (u - truth.shift_um[0]) / truth.scale, (v - truth.shift_um[1]) / truth.scale
    x = math.cos(angle) * du + math.sin(angle) * dv
    y = -math.sin(angle) * du + math.cos(angle) * dv
    height = surface(x, y) - truth.offset_um - truth.slope[0] * x - truth.slope[1] * y
    return height + noise_um * np.random.default_rng(seed).normal(size=shape)


def placed(rotation=0.0, scale=1.0, shift=(0.0, 0.0), offset=0.0, slope=(0.0, 0.0)):
    """A placement, with nothing said about its quality."""
    return Registration(rotation, scale, shift, offset, slope, 0.0, 1.0, 1.0)


def assert_close(found, truth, *, rotation=0.1, scale=0.002, shift=0.5, offset=0.1, slope=0.002):
    assert found.rotation_deg == pytest.approx(truth.rotation_deg, abs=rotation)
    assert found.scale == pytest.approx(truth.scale, abs=scale)
    assert found.shift_um == pytest.approx(truth.shift_um, abs=shift)
    assert found.offset_um == pytest.approx(truth.offset_um, abs=offset)
    assert found.slope == pytest.approx(truth.slope, abs=slope)
