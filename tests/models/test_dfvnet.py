from __future__ import annotations

import numpy as np
import pytest
import torch
from peers import modules_without_gradient, weights_by_rule

from gplws.models import DFVNet, FVNet
from gplws.models.dfvnet import pool_sizes
from gplws.nn import expected_depth

BOTH = pytest.mark.parametrize("network", [FVNet, DFVNet])


@pytest.fixture(scope="module")
def dfvnet():
    return weights_by_rule(DFVNet())


@BOTH
def test_the_classifier_that_published_weights_hold_is_there_but_unused(network):
    classifier = network().feature_extraction.encoder.fc
    assert sum(p.numel() for p in classifier.parameters()) == 513_000


@torch.no_grad()
def test_stacks_of_a_batch_do_not_mix(dfvnet):
    stack, positions = torch.rand(2, 3, 4, 64, 64), torch.rand(2, 4)
    together = dfvnet(stack, positions)
    for one in range(2):
        alone = dfvnet(stack[one : one + 1], positions[one])
        torch.testing.assert_close(together.depth[one], alone.depth[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_dfvnet_differs_from_fvnet_by_the_differences_of_neighbouring_frames():
    volume = torch.rand(2, 3, 5, 4, 4)
    differences = DFVNet()._compare_frames(volume)
    assert torch.equal(FVNet()._compare_frames(volume), volume)
    assert torch.equal(differences[:, :, -1], volume[:, :, -1])
    torch.testing.assert_close(differences.flip(2).cumsum(2).flip(2), volume)


@BOTH
def test_training_supervises_every_scale_and_reaches_every_parameter_in_use(network):
    model = network().train()
    positions = torch.linspace(0.1, 1.0, 3)
    found = model(torch.rand(2, 3, 3, 40, 64), positions)
    assert len(found.coarser) == 3
    volumes = [found.volume, *found.coarser]
    assert all(v.shape == (2, 3, 40, 64) for v in volumes)
    torch.testing.assert_close(found.depth, expected_depth(found.volume, positions))
    loss = sum(expected_depth(v, positions).square().mean() for v in volumes) + found.std.mean()
    assert modules_without_gradient(model, loss) == {"feature_extraction.encoder.fc"}


def test_a_batch_of_one_cannot_be_trained_on():
    with pytest.raises(ValueError, match="needs B >= 2 in training mode"):
        FVNet()(torch.rand(1, 3, 3, 64, 64))


def test_pool_sizes_are_the_truncated_even_steps_to_half_the_side():
    for side in range(2, 200):
        assert pool_sizes(side) == np.linspace(1, side // 2, 4).astype(int).tolist()
    assert pool_sizes(1) == [1, 1, 1, 1]
