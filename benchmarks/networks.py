"""The networks that are compared, with random but lively weights."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from gplws import models
from gplws.ops import focus_search

NETWORKS = models.model_names()


def frames_of(name: str) -> str | None:
    """Name of the argument for the number of frames, of a network made for one number of them.

    The others take any number.
    """
    return "n_frames" if "n_frames" in inspect.signature(_class_of(name)).parameters else None


def random_gplws() -> models.GPLWSNet:
    """The paper's configuration in training form; the same weights each time."""
    torch.manual_seed(0)
    return with_statistics(models.GPLWSNet())  # type: ignore[return-value]


def random_peer(name: str, n_frames: int) -> nn.Module:
    """A peer as a module that maps a stack (B, 3, N, H, W) to depth (B, H, W)."""
    torch.manual_seed(0)
    takes_frames = frames_of(name)
    arguments = {takes_frames: n_frames} if takes_frames else {}
    return _Depth(with_statistics(models.build_model(name, arguments))).eval()


def _class_of(name: str) -> type[nn.Module]:
    with torch.device("meta"):  # no weights are made
        return type(models.build_model(name))


def in_channels_last(model: nn.Module) -> nn.Module:
    """The model itself, with the weights of its 2-D and 3-D convs in channels_last."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in model.parameters():
        if parameter.dim() in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.dim()])
    return model


class _Depth(nn.Module):
    """What of the results of a network is depth."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, stack: Tensor) -> Tensor:
        frames = stack.shape[2]
        positions = torch.linspace(0.1, 1.0, frames, dtype=stack.dtype, device=stack.device)
        return self.network(stack, positions).depth


class ToDepth(nn.Module):
    """GPLWS-Net to the depth map, where published networks end."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._network = network

    def forward(self, stack: Tensor) -> Tensor:
        volume = self._network(stack)
        return focus_search(volume if volume.is_cuda else volume.float(), log_scale=True).depth


def with_statistics(model: nn.Module) -> nn.Module:
    """The model itself in eval mode, with running statistics that matter."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return model.eval()
