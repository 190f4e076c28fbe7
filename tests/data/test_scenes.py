from dataclasses import replace

import numpy as np
import pytest
import torch

from gplws.data import SceneSettings, render_focal_stack, simulate_stack

SMALL = {"height": 48, "width": 56, "frames": 5, "pixel_size_um": 1.0}


def test_a_scene_spans_its_relief_and_the_frames_span_the_scene():
    found = simulate_stack(SceneSettings(surface="dome", relief_um=30.0, **SMALL))
    assert found.frames.shape == (5, 48, 56) and found.frames.dtype == torch.uint8
    assert float(found.height_um.max() - found.height_um.min()) == pytest.approx(30)
    assert found.focus_positions_um[[0, -1]].tolist() == pytest.approx([-3, 33], abs=1e-3)
    assert found.depth_index.isfinite().all()
    falling = simulate_stack(
        SceneSettings(surface="dome", relief_um=30.0, falling=True, z_step_um=2.0, **SMALL)
    )
    assert falling.focus_positions_um.diff().tolist() == pytest.approx([-2] * 4)


def test_it_is_what_the_reference_renderer_makes_of_the_same_scene():
    settings = SceneSettings(surface="pads", full_well_electrons=None, bit_depth=16, **SMALL)
    found = simulate_stack(settings)
    expected = render_focal_stack(
        found.height_um,
        found.all_in_focus,
        found.focus_positions_um,
        pixel_size_um=1.0,
        numerical_aperture=0.3,
        bit_depth=None,
    ).frames
    difference = (found.frames.float() / 65535 - expected).abs()
    # Light that is clipped in the image in focus is not in the reference.
    assert difference.mean() < 0.005


def test_brightness_is_what_was_asked_for():
    scene = {**SMALL, "surface": "plane", "texture": "cloudy", "full_well_electrons": None}
    found = simulate_stack(SceneSettings(exposure=0.3, **scene))
    assert float(found.frames.float().mean()) / 255 == pytest.approx(0.3, abs=0.02)
    drifting = simulate_stack(SceneSettings(exposure=0.3, gain_drift=0.2, **scene))
    ratio = drifting.frames.float().mean((1, 2)) / found.frames.float().mean((1, 2))
    assert 0.05 < float(ratio.log().std()) < 0.5
    shaded = simulate_stack(SceneSettings(exposure=0.3, vignetting=0.4, **scene))
    ratio = shaded.frames[2].float() / found.frames[2].float()
    assert float(ratio[24, 28]) == pytest.approx(1, abs=0.05)
    assert float(ratio[:3, :3].mean()) == pytest.approx(1.4**-2, abs=0.08)


def test_bits_and_noise_are_the_cameras():
    scene = {**SMALL, "surface": "plane", "texture": "bare", "light": "coaxial"}
    clean = simulate_stack(SceneSettings(full_well_electrons=None, bit_depth=16, **scene))
    noisy = simulate_stack(
        SceneSettings(full_well_electrons=500, read_noise_electrons=3, bit_depth=16, **scene)
    )
    signal = clean.frames.float() / 65535
    electrons = (noisy.frames.float() / 65535 - signal) * 500
    assert float(electrons.var()) == pytest.approx(float(signal.mean()) * 500 + 9, rel=0.1)
    coarse = simulate_stack(SceneSettings(bit_depth=9, **scene)).frames.int().unique()
    steps = (coarse.double() / 65535 * 511).numpy()
    np.testing.assert_allclose(steps, steps.round(), atol=0.01)


def test_progress_counts_frames_and_chunks_do_not_change_the_scene(monkeypatch):
    settings = SceneSettings(full_well_electrons=None, jitter_px=0.4, gain_drift=0.01, **SMALL)
    whole = simulate_stack(settings)
    monkeypatch.setattr("gplws.data.scenes._ELEMENTS_AT_ONCE", 1)
    seen = []
    parts = simulate_stack(settings, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(k + 1, 5) for k in range(5)]
    assert (whole.frames.int() - parts.frames.int()).abs().max() <= 2
    assert torch.equal(whole.height_um, parts.height_um)


def test_a_measured_surface_keeps_its_tilt(tmp_path):
    tilted = np.broadcast_to(0.25 * np.arange(64.0), (48, 64))
    np.savez(tmp_path / "tilt.npz", h_um=tilted, dx_um=0.5)
    settings = SceneSettings(surface=str(tmp_path / "tilt.npz"), height=48, width=64, frames=4)
    found = simulate_stack(settings).height_um.numpy()
    np.testing.assert_allclose(found, tilted, atol=1e-4)


def test_a_flat_surface_has_steps_to_see_but_no_relief(tmp_path):
    np.save(tmp_path / "flat.npy", np.zeros((32, 32)))
    settings = SceneSettings(surface=str(tmp_path / "flat.npy"), height=16, width=16, frames=4)
    stack = simulate_stack(settings)
    usual = simulate_stack(replace(settings, surface="holes"))
    steps, usual_steps = stack.focus_positions_um.diff(), usual.focus_positions_um.diff()
    torch.testing.assert_close(steps, usual_steps, rtol=0.05, atol=0)
    with pytest.raises(ValueError, match=r"relief_um: .*flat\.npy is flat"):
        simulate_stack(replace(settings, relief_um=10.0))


def test_gloss_makes_highlights():
    matt, glossy = (
        simulate_stack(SceneSettings(surface="waves", gloss=gloss, light="coaxial", **SMALL))
        for gloss in (0.0, 3.0)
    )
    # A wavy mirror is bright where it is level, far brighter than the rest.
    ratios = [
        float(s.all_in_focus.quantile(0.97) / s.all_in_focus.median()) for s in (matt, glossy)
    ]
    assert ratios[1] > 2 * ratios[0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"relief_um": 0.0}, "relief_um"),
        ({"contrast": 0.0}, "contrast: expected 0..1"),
        ({"magnification_change": 0.7}, "magnification_change"),
        ({"jitter_px": -1.0}, "jitter_px: expected >= 0"),
        ({"light": "lamp"}, "light: expected one of"),
        ({"width": 4}, "width: expected at least 8"),
        ({"seed": -1}, "seed"),
    ],
)
def test_wrong_settings_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        SceneSettings(**values)
