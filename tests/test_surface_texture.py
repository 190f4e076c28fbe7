from __future__ import annotations

import json
import math

import numpy as np
import pytest
from stacks import textured_stack

from gplws import reconstruct
from gplws.data import FocalStack
from gplws.surface_texture import PARAMETERS, surface_texture


def grid(height, width):
    return np.mgrid[:height, :width].astype(float)


def test_a_sine_has_its_known_parameters():
    amplitude, period, pixel = 2.0, 50.0, 0.5
    _, x = grid(40, 500)
    found = surface_texture(
        amplitude * np.sin(2 * math.pi * (x + 0.5) / period), pixel, form="none"
    )
    slope = 2 * math.pi * amplitude / (period * pixel)
    assert found["Sa"] == pytest.approx(2 * amplitude / math.pi, rel=0.01)
    assert found["Sq"] == pytest.approx(amplitude / math.sqrt(2), rel=0.01)
    assert found["Ssk"] == pytest.approx(0, abs=0.02)
    assert found["Sku"] == pytest.approx(1.5, rel=0.02)
    assert found["Sp"] == pytest.approx(amplitude, rel=0.05)
    assert found["Sv"] == pytest.approx(amplitude, rel=0.05)
    assert found["Sz"] == pytest.approx(found["Sp"] + found["Sv"])
    assert found["Sdq"] == pytest.approx(slope / math.sqrt(2), rel=0.01)
    phase = np.linspace(0, 2 * math.pi, 10_001)
    length = np.sqrt(1 + (slope * np.cos(phase)) ** 2).mean() - 1
    assert found["Sdr"] == pytest.approx(length, rel=0.01)


def test_one_pit_skews_downwards():
    height = np.zeros((20, 30))
    height[5, 7] = -6.0
    found = surface_texture(height, form="none")
    mean = -6 / 600
    assert found["Sv"] == pytest.approx(6 + mean) and found["Sp"] == pytest.approx(-mean)
    assert found["Sa"] == pytest.approx((599 * -mean + 6 + mean) / 600)
    assert found["Ssk"] < -20 and found["Sku"] > 500
    assert found["Sdq"] is None and found["Sdr"] is None


@pytest.mark.parametrize(
    ("form", "removed"),
    [
        ("none", lambda x, y: 0 * x + 700.0),
        ("plane", lambda x, y: 1e6 + 0.3 * x - 0.2 * y),
        ("quadratic", lambda x, y: 5e3 + 0.3 * x - 0.2 * y + 0.01 * x * x - 0.02 * x * y + y * y),
    ],
)
def test_the_form_is_taken_out_whatever_is_unknown(form, removed):
    y, x = grid(70, 90)
    rough = np.random.default_rng(0).normal(0, 1, x.shape)
    rough[10:30, :40] = np.nan
    alone = surface_texture(rough, form=form)
    together = surface_texture(rough + removed(x, y), 1.0, form=form)
    for name in ("Sa", "Sq", "Ssk", "Sku", "Sp", "Sv", "Sz"):
        assert together[name] == pytest.approx(alone[name], rel=1e-6, abs=1e-6)
    smooth = surface_texture(removed(x, y), form=form)
    assert smooth["Sz"] < 1e-6
    if form == "quadratic":
        assert surface_texture(removed(x, y), form="plane")["Sz"] > 100


def test_what_cannot_be_said_is_none():
    nothing = dict.fromkeys(PARAMETERS)
    assert surface_texture(np.full((5, 5), np.nan), 1.0) == nothing
    few = np.full((5, 5), np.nan)
    few[2, 2] = few[3, 1] = 4.0
    assert surface_texture(few, 1.0) == nothing
    flat = surface_texture(np.full((5, 5), 3.0), 1.0)
    assert flat["Sa"] == flat["Sz"] == flat["Sdr"] == 0 and flat["Ssk"] is None
    line = surface_texture(np.arange(9.0)[None], 1.0)
    assert line["Sz"] < 1e-9 and line["Sdq"] is None


def test_wrong_arguments_are_errors():
    with pytest.raises(ValueError, match="form must be one of none, plane, quadratic, got 'cyl'"):
        surface_texture(np.zeros((3, 3)), form="cyl")
    with pytest.raises(ValueError, match="pixel_size must be positive"):
        surface_texture(np.zeros((3, 3)), 0)
    with pytest.raises(ValueError, match=r"height must be \(H, W\), got shape \(3,\)"):
        surface_texture(np.zeros(3))


def test_results_say_their_surface_texture(tmp_path):
    frames = textured_stack(n_frames=7, noise=0.01, size=(40, 50)).numpy()
    result = reconstruct(FocalStack.from_frames(frames, z_step_um=2.0, pixel_size_um=0.5))
    texture = result.surface_texture()
    assert texture == surface_texture(result.height, 0.5)
    assert texture["Sdq"] is not None
    assert result.surface_texture(form="none")["Sq"] == pytest.approx(np.nanstd(result.height))
    info = json.loads((result.save(tmp_path / "a") / "info.json").read_text())
    assert info["surface_texture"] == {"form_removed": "plane", **texture}
    assert reconstruct(frames).surface_texture()["Sdq"] is None  # heights in frames


@pytest.mark.parametrize("size", [10, 40])
def test_the_form_of_a_small_patch_of_a_large_map_is_removed(size):
    y, x = np.mgrid[:size, :size]
    height = np.full((1500, 1500), np.nan)
    height[:size, -size:] = 0.01 * x**2 - 0.02 * y**2 + 0.3 * x + 5
    assert surface_texture(height, form="quadratic")["Sq"] < 1e-12


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_flat_tilted_surface_has_no_shape_but_that_of_rounding(dtype):
    y, x = np.mgrid[:50, :60]
    found = surface_texture((0.1 * x + 0.03 * y + 7).astype(dtype))
    assert found["Sq"] < 1e-6 and found["Ssk"] is None and found["Sku"] is None
    rough = 0.1 * x + 0.03 * y + 7 + 1e-5 * np.sin(7 * x * y)
    assert surface_texture(rough.astype(dtype))["Sku"] > 1
