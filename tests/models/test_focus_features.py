from __future__ import annotations

import pytest
import torch
from networks import randomise_bn, relative_error

import gplws
from gplws.models import GPLWSNet, load_model, save_weights
from gplws.models.focus_features import features_reach, focus_features

NETWORK = {"stem": "features", "symmetric": True}


def textured_stack(frames=9, side=48, at=4.3, seed=0):
    """(1, N, H, W) whose contrast peaks at frame ``at``."""
    texture = torch.rand(side, side, generator=torch.Generator().manual_seed(seed)) - 0.5
    sharpness = torch.exp(-((torch.arange(float(frames)) - at) ** 2) / 8)
    return 0.5 + 0.4 * sharpness.view(1, frames, 1, 1) * texture


def test_responses_peak_where_the_stack_is_sharp_and_have_mean_zero():
    features = focus_features(textured_stack())
    assert features.channels.shape == (1, 3, 9, 48, 48)
    assert (features.responses.argmax(2) == 4).float().mean() > 0.99
    assert features.responses.mean(2).abs().max() < 1e-5


@pytest.mark.parametrize("change", ["exposure", "light", "gain"])
def test_exposure_and_light_hardly_change_the_features(change):
    stack = textured_stack()
    factor = {
        "exposure": torch.tensor(0.6),
        "light": torch.linspace(0.7, 1.0, 48).view(1, 1, 1, 48),
        "gain": torch.linspace(0.8, 1.0, 9).view(1, 9, 1, 1),
    }[change]
    features, changed = focus_features(stack), focus_features(stack * factor)
    difference = (changed.channels - features.channels).abs()
    assert difference.mean() < 0.1
    assert (changed.responses.argmax(2) == features.responses.argmax(2)).float().mean() > 0.98


def test_features_depend_on_pixels_within_their_reach_only():
    stack = textured_stack(frames=3, side=2 * features_reach() + 11)
    middle = features_reach() + 5
    other = stack.clone()
    other[..., 0] += 0.3  # a border column, features_reach() + 5 from the middle
    got, expected = focus_features(other).channels, focus_features(stack).channels
    assert torch.equal(got[..., middle:], expected[..., middle:])
    assert not torch.equal(got[..., :middle], expected[..., :middle])


def test_a_flat_stack_has_finite_features_and_gradients_reach_all_weights():
    model = GPLWSNet(**NETWORK, widths=(4, 8), depths=(1, 1), middle=1, decoder_depths=(1,))
    volume = model(torch.zeros(2, 1, 4, 16, 16))
    assert volume.isfinite().all()
    model(torch.rand(2, 1, 4, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_what_is_no_stack_is_refused():
    with pytest.raises(ValueError, match="stack: expected"):
        focus_features(torch.zeros(3, 4, 5))
    with pytest.raises(TypeError, match="float32"):
        focus_features(torch.zeros(1, 3, 4, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match="in_channels"):
        GPLWSNet(stem="features", in_channels=1)
    with pytest.raises(ValueError, match="stem"):
        GPLWSNet(stem="pixels")


@torch.no_grad()
def test_a_reversed_stack_gives_the_reversed_focus_volume():
    model = randomise_bn(GPLWSNet(**NETWORK))
    stack = torch.rand(1, 1, 7, 24, 32)
    for network in (model, model.reparameterise(), model.fuse()):
        volume = network(stack)
        assert relative_error(network(stack.flip(2)).flip(1), volume) < 1e-5
    plain = randomise_bn(GPLWSNet(stem="features"))
    assert relative_error(plain(stack.flip(2)).flip(1), plain(stack)) > 1e-3


@torch.no_grad()
def test_the_fused_network_on_features_agrees_with_its_training_form():
    model = randomise_bn(GPLWSNet(**NETWORK))
    stack = torch.rand(2, 3, 6, 24, 40)
    expected = model(stack)
    assert relative_error(model.fuse()(stack), expected) < 1e-5
    low = model.fuse().bfloat16()
    assert low.input_dtype == torch.float32 and low(stack).dtype == torch.float32
    assert relative_error(low(stack), expected) < 0.05


@torch.no_grad()
def test_without_training_the_prior_already_finds_the_focus():
    model = GPLWSNet(**NETWORK).eval()
    torch.nn.init.zeros_(model.head.bn.weight)
    found = model.predict(textured_stack()[None, 0][:, None])
    assert (found.depth - 4.3).abs().median() < 0.1


def test_tiles_do_not_change_the_result_and_weights_round_trip(tmp_path):
    torch.manual_seed(0)
    small = {"widths": (4, 8), "depths": (1, 1), "middle": 1, "decoder_depths": (1,)}
    model = randomise_bn(GPLWSNet(**NETWORK, **small))
    save_weights(model, tmp_path / "w.safetensors")
    loaded = load_model("gplws", weights=tmp_path / "w.safetensors")
    frames = (255 * textured_stack(frames=5, side=160)[0]).to(torch.uint8)
    frames = torch.cat([frames, frames.flip(1), frames], 1)  # (5, 480, 160)
    whole = gplws.reconstruct(frames, method=loaded)
    tiles = gplws.reconstruct(frames, method=loaded, memory_mb=1)
    torch.testing.assert_close(tiles.depth_index, whole.depth_index, rtol=0, atol=1e-4)
