"""Convs whose kernels are symmetric along the frames."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Network = TypeVar("Network", bound=nn.Module)


class FrameSymmetric(nn.Module):
    """Parametrisation of a weight (M, C, kN, kH, kW): its mean with itself, frames reversed."""

    def forward(self, weight: Tensor) -> Tensor:
        """The symmetric weight, same shape; differentiable."""
        return 0.5 * (weight + weight.flip(2))


def make_symmetric(model: Network) -> Network:
    """Make all 3-D convs of a network symmetric along the frames, in place.

    A network of such convs, pointwise operations and padding that is equal at both ends gives the
    reversed result for a reversed stack, to rounding. The number of parameters stays. Unlike other
    parametrised modules, these can be pickled.

    Args:
        model: with ``nn.Conv3d`` and ``nn.ConvTranspose3d``; kernels of one frame stay as they are.

    Returns:
        ``model``.
    """
    for module in list(model.modules()):
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d) and module.kernel_size[0] > 1:
            parametrize.register_parametrization(module, "weight", FrameSymmetric())
            type(module).__reduce_ex__ = _reduced  # type: ignore[method-assign, assignment]
    return model


# register_parametrization gives a module a class of its own, which files cannot name, and which
# refuses to be pickled.


def _reduced(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    kind = parametrize.type_before_parametrizations(module)
    names = tuple(cast(nn.ModuleDict, module.parametrizations))
    return _empty, (kind, names), vars(module).copy()


def _empty(kind: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """A module with some parametrised tensors, its contents to be set."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    for name in names:
        module.register_parameter(name, nn.Parameter(torch.empty(0)))
        parametrize.register_parametrization(module, name, nn.Identity())
    type(module).__reduce_ex__ = _reduced  # type: ignore[method-assign, assignment]
    return module
