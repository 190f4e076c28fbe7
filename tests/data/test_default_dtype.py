"""Data are the same, to the bit, whatever the default dtype of torch is."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from gplws.data.generator import StackGenerator, StackSettings
from gplws.data.randomness import Draw
from gplws.data.scenes import SceneSettings, simulate_stack
from gplws.data.simulator import demo_scene, render_focal_stack
from gplws.data.surfaces import SURFACES, draw_surface
from gplws.data.textures import TEXTURES, draw_texture
from gplws.data.topographies import draw_part
from gplws.data.transforms import Augmentation, add_noise

SHAPE = (40, 48)


def _surfaces() -> list[Tensor]:
    drawn = [draw_surface(name, SHAPE, Draw(seed)) for name in SURFACES for seed in range(6)]
    return [part for surface in drawn for part in surface]


def _textures() -> list[Tensor]:
    return [draw_texture(name, SHAPE, Draw(seed)) for name in TEXTURES for seed in range(4)]


def _parts() -> list[Tensor]:
    image = Draw(0).uniform_field(3, 60, 70)
    return [draw_part(image, SHAPE, Draw(seed)) for seed in range(6)]


def _batches() -> list[Tensor]:
    always = dict.fromkeys(
        ("jitter", "magnification", "vignetting", "fixed_pattern", "gain_drift", "gamma"), 1.0
    )
    batches = []
    for settings in (StackSettings(), StackSettings(**always, jpeg=1.0, irregular=1.0)):
        generator = StackGenerator(settings, seed=1)
        batches += [generator.batch(step, 2, 4, 32) for step in range(4)]
    noise = torch.Generator().manual_seed(0)
    batches.append(add_noise(batches[0], 0.1, noise))
    batches.append(Augmentation(frames=(2, 3))(batches[1], noise))
    return [
        part
        for batch in batches
        for part in (batch.stack, batch.focus_positions, batch.depth, batch.valid)
    ]


def _scenes() -> list[Tensor]:
    stacks = [
        simulate_stack(SceneSettings(height=32, width=40, frames=4, seed=seed, **changed))
        for seed, changed in enumerate(
            (
                {},
                {"jitter_px": 0.5, "magnification_change": 0.01, "gain_drift": 0.01},
                {"psf": "gaussian"},
                {"vignetting": 0.1, "gloss": 0.5, "falling": True},
            )
        )
    ]
    return [part for s in stacks for part in (s.frames, s.focus_positions_um, s.depth_index)]


def _demo() -> list[Tensor]:
    scene = demo_scene(48, frames=4)
    stack = render_focal_stack(
        **scene._asdict(),
        full_well_electrons=5000.0,
        read_noise_electrons=5.0,
    )
    return [scene.height_um, scene.albedo, stack.frames, stack.depth_index]


@pytest.fixture
def default_dtype() -> Iterator[Callable[[torch.dtype], None]]:
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.mark.parametrize("make", [_surfaces, _textures, _parts, _batches, _scenes, _demo])
def test_data_do_not_depend_on_it(
    make: Callable[[], list[Tensor]], default_dtype: Callable[[torch.dtype], None]
) -> None:
    expected = make()
    for dtype in (torch.float64, torch.float16):
        default_dtype(dtype)
        for found, known in zip(make(), expected, strict=True):
            assert found.dtype == known.dtype
            assert torch.equal(found.nan_to_num(-1.0), known.nan_to_num(-1.0))
