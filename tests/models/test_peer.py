from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from peers import (
    PEERS,
    error_to_recorded,
    padded,
    recorded_state,
    stack_by_rule,
    state_shapes,
    weights_by_rule,
)
from torch import Tensor, nn

from gplws.models import AiFDepthNet, DFVNet, FVNet
from gplws.models.peer import FocusVolumeNetwork, RegressionNetwork, initialise
from gplws.ops.focus_search import focus_search


@pytest.fixture(scope="module", params=PEERS, ids=[peer.name for peer in PEERS])
def peer(request):
    return request.param


@pytest.fixture(scope="module")
def model(peer):
    return weights_by_rule(peer.build())


@pytest.mark.shared
@torch.no_grad()
def test_the_outputs_are_those_of_the_original(shared_dir, peer, model):
    stack, positions = stack_by_rule(peer.side)
    found = model(stack, positions)
    for name in peer.outputs:
        assert error_to_recorded(shared_dir, f"{peer.name}/{name}", getattr(found, name)) < 1e-4


@pytest.mark.shared
def test_the_state_has_the_published_names_and_shapes(shared_dir, peer, model):
    assert state_shapes(model) == recorded_state(shared_dir, peer.name)


def test_the_number_of_parameters_is_that_of_the_original(peer, model):
    assert sum(p.numel() for p in model.parameters()) == peer.parameters


@torch.no_grad()
@pytest.mark.parametrize("size", [(50, 70), (32, 33), (1, 1)])
def test_other_sizes_are_continued_by_their_border(peer, model, size):
    height, width = size
    frames = peer.frames(3)
    stack, positions = torch.rand(2, 3, frames, *size), torch.linspace(0.2, 0.7, frames) ** 2
    whole = padded(stack, -width % model.coarsest, -height % model.coarsest)
    found, expected = model(stack, positions), model(whole, positions)
    for name in peer.outputs:
        inside = getattr(expected, name)[..., :height, :width]
        torch.testing.assert_close(getattr(found, name), inside)
    if isinstance(model, FocusVolumeNetwork):
        assert torch.equal(found.volume, expected.volume[..., :height, :width])


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 64, 64), (2, 32, 33), (7, 1, 40), (1, 1, 1)])
def test_any_number_of_frames_and_any_size_goes_through(peer, model, shape):
    frames, *size = shape
    frames = peer.frames(frames)
    found = model(torch.rand(1, 3, frames, *size), torch.linspace(2, 3, frames))
    assert found.depth.shape == (1, *size)
    for name in peer.outputs:
        assert getattr(found, name).isfinite().all()
    if isinstance(model, FocusVolumeNetwork):
        assert found.volume.shape == (1, frames, *size)
        assert ((found.depth >= 2 - 1e-5) & (found.depth <= 3 + 1e-5)).all()


@torch.no_grad()
def test_a_gray_stack_equals_its_three_equal_channels(model):
    gray = torch.rand(1, 1, 5, 40, 33)
    before = gray.clone()
    positions = torch.linspace(0.1, 1, 5)
    assert torch.equal(
        model(gray, positions).depth, model(gray.repeat(1, 3, 1, 1, 1), positions).depth
    )
    assert torch.equal(gray, before)


def test_wrong_stacks_are_named(model):
    for shape in ((1, 2, 4, 32, 32), (3, 4, 32, 32), (1, 3, 0, 32, 32), (1, 3, 4, 0, 32)):
        with pytest.raises(ValueError, match="stack must be"):
            model(torch.rand(*shape))
    with pytest.raises(TypeError, match=r"floats in 0..1, got torch.uint8"):
        model(torch.zeros(1, 3, 4, 32, 32, dtype=torch.uint8))


def test_predict_gives_depth_within_the_focus_positions(model):
    positions = torch.tensor([5.0, 1.0, 0.0, -2.0, -3.0])
    found = model.predict(torch.rand(2, 1, 5, 40, 33), positions)
    for name in ("depth", "index", "confidence"):
        assert getattr(found, name).shape == (2, 40, 33)
    assert ((found.depth >= -3) & (found.depth <= 5)).all()
    assert ((found.index >= 0) & (found.index <= 4)).all()


@pytest.mark.parametrize("network", [FVNet, DFVNet, AiFDepthNet])
def test_predict_reads_the_focus_volume_by_focus_search(network):
    model = network().eval()
    stack, positions = torch.rand(1, 3, 5, 32, 40), torch.tensor([0.0, 1.0, 4.0, 5.0, 9.0])
    with torch.no_grad():
        volume = model.focus_volume(stack)
        assert torch.equal(model(stack, positions).volume, volume)
    found = model.predict(stack, positions)
    assert torch.equal(found.index, volume.argmax(1))
    expected = focus_search(volume, positions, log_scale=True)
    assert torch.equal(found.depth, expected.depth)
    assert torch.equal(found.confidence, expected.confidence)


class Depth(NamedTuple):
    depth: Tensor


class KnowsTheAnswer(RegressionNetwork):
    """Gives the position that it is told for one frame, moved by ``shift``."""

    def __init__(self, frame: int, focus_range: tuple[float, float], shift: float = 0.0) -> None:
        super().__init__(focus_range)
        self.frame, self.shift = frame, shift
        self.seen = torch.empty(0)

    def forward(self, stack: Tensor, focus_positions: Tensor) -> Depth:
        self.seen = focus_positions
        height, width = stack.shape[-2:]
        depth = focus_positions[:, self.frame, None, None] + self.shift
        return Depth(depth.expand(-1, height, width))


@pytest.mark.parametrize("focus_range", [(0.0, 1.0), (0.28, 0.02), (-5.0, 40.0)])
def test_a_regressed_depth_comes_back_in_the_unit_of_the_positions(focus_range):
    model = KnowsTheAnswer(2, focus_range)
    positions = torch.tensor([[0.0, 10.0, 40.0, 50.0], [-1.0, -2.0, -6.0, -9.0]])
    found = model.predict(torch.rand(2, 1, 4, 3, 5), positions)
    first, last = model.seen[:, 0], model.seen[:, -1]
    torch.testing.assert_close(first, torch.full((2,), focus_range[0]))
    torch.testing.assert_close(last, torch.full((2,), focus_range[1]))
    torch.testing.assert_close(found.depth[0], torch.full((3, 5), 40.0))
    torch.testing.assert_close(found.depth[1], torch.full((3, 5), -6.0))
    assert (found.index == 2).all()
    assert found.confidence.isnan().all()


def test_a_regressed_depth_stays_within_the_stack():
    found = KnowsTheAnswer(3, (0.0, 1.0), shift=0.5).predict(torch.rand(1, 1, 4, 3, 5))
    assert (found.depth == 3).all() and (found.index == 3).all()
    found = KnowsTheAnswer(0, (0.0, 1.0), shift=-0.5).predict(torch.rand(1, 1, 4, 3, 5))
    assert (found.depth == 0).all() and (found.index == 0).all()


def test_a_stack_of_one_frame_has_the_depth_of_this_frame():
    found = KnowsTheAnswer(0, (0.0, 1.0)).predict(torch.rand(1, 1, 1, 3, 5), torch.tensor([7.0]))
    assert (found.depth == 7).all()


@pytest.mark.parametrize("slope", [0.0, 0.2])
def test_first_weights_keep_the_size_of_the_signal(slope):
    layers = [nn.Conv2d(3, 32, 3, padding=1)]
    for _ in range(8):
        layers += [nn.LeakyReLU(slope), nn.Conv2d(32, 32, 3, padding=1, padding_mode="circular")]
    layers += [nn.LeakyReLU(slope), nn.ConvTranspose2d(32, 32, 4, stride=2, padding=1)]
    network = nn.Sequential(*layers)
    with torch.no_grad():
        assert network(torch.randn(2, 3, 24, 24)).std() < 0.2  # as torch draws them
        initialise(network, slope)
        assert 0.5 < network(torch.randn(2, 3, 24, 24)).square().mean().sqrt() < 3
    assert all((layer.bias == 0).all() for layer in network if hasattr(layer, "bias"))
