"""What tests of networks share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from gplws.data import DepthSample
from gplws.models import GPLWSNet
from gplws.models.prediction import predicted_index


def randomise_bn(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random statistics and weights for each BN, so that a fold that forgets one shows."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            for tensor, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.2, 0.2),
            ):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return model.eval()


@torch.no_grad()
def mean_error(model: nn.Module, samples: Sequence[DepthSample]) -> float:
    """Mean absolute error of a network over all pixels of known depth of batches, in frames."""
    errors = []
    for sample in samples:
        found = predicted_index(model, sample.stack, sample.focus_positions)
        errors.append((found - sample.depth_index())[sample.valid].abs())
    return float(torch.cat(errors).nanmean())


def small_gplws() -> GPLWSNet:
    """Few layers of every kind that the network has, in eval mode; the same weights each time."""
    torch.manual_seed(0)
    model = GPLWSNet(widths=(4, 8), depths=(1, 1), middle=1, decoder_depths=(1,))
    randomise_bn(model)
    return model


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference as a share of the largest expected value."""
    assert got.shape == expected.shape
    return ((got - expected).abs().max() / expected.abs().max()).item()
