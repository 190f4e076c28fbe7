"""What tests of the published networks share: the networks, and what is known of the originals.

Weights and inputs follow a rule, so that outputs can be compared with recorded ones.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gplws.models.registry import build_model


@dataclass(frozen=True)
class Peer:
    """A published network.

    Attributes:
        name: in the registry, and in the records.
        outputs: fields of its result that were recorded.
        parameters: how many the original has.
        side: of the recorded stack, pixels.
        arguments: of its constructor.
    """

    name: str
    outputs: tuple[str, ...]
    parameters: int
    side: int = 64
    arguments: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The network with random weights."""
        return build_model(self.name, self.arguments)

    def frames(self, wanted: int) -> int:
        """Frames of a stack that it takes, as close to ``wanted`` as it can."""
        return self.arguments.get("n_frames", wanted)


PEERS = (
    Peer("fvnet", ("depth", "std"), 19_501_484, side=128),
    Peer("dfvnet", ("depth", "std"), 19_501_484, side=128),
    Peer("aifdepthnet", ("depth", "all_in_focus"), 16_533_873),
    Peer("ddffnet", ("disparity",), 39_790_343, arguments={"n_frames": 5}),
    Peer("defocusnet", ("depth", "defocus"), 3_729_042),
)


def weights_by_rule(model: nn.Module) -> nn.Module:
    """The model in eval mode, each tensor of its state drawn from a seed made of its name."""
    state = {}
    for key, tensor in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            state[key] = tensor
            continue
        seed = zlib.crc32(f"gplws:{key}".encode())
        values = np.random.RandomState(seed).standard_normal(tuple(tensor.shape))
        if key.endswith("running_var"):
            values = 1 + 0.25 * np.abs(values)
        elif key.endswith(("running_mean", ".bias")):
            values = 0.05 * values
        elif tensor.dim() == 1:
            values = 1 + 0.1 * values
        else:
            values = values * np.sqrt(2 / np.prod(tensor.shape[1:]))
        state[key] = torch.from_numpy(values.astype(np.float32))
    model.load_state_dict(state, strict=True)
    return model.eval()


def stack_by_rule(side: int) -> tuple[Tensor, Tensor]:
    """Stack (1, 3, 5, side, side) and focus distances (5,)."""
    frames = np.random.RandomState(7).rand(1, 5, 3, side, side)
    stack = torch.from_numpy(frames.astype(np.float32)).transpose(1, 2)
    return stack, torch.linspace(0.1, 1.0, 5)


def recorded_state(shared_dir: Path, name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published network's state, in order."""
    text = (shared_dir / "peers" / "state_dicts.json").read_text()
    return {key: tuple(shape) for key, shape in json.loads(text)[name]["state_dict"].items()}


def error_to_recorded(shared_dir: Path, entry: str, got: Tensor) -> float:
    """Largest difference from an output of the original network."""
    with np.load(shared_dir / "peers" / "golden.npz") as outputs:
        expected = torch.from_numpy(outputs[entry])
    assert got.numel() == expected.numel()  # they differ in axes of size one
    return (got.reshape(expected.shape) - expected).abs().max().item()


def state_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def padded(stack: Tensor, right: int, bottom: int) -> Tensor:
    """A stack (B, C, N, H, W) continued by its border pixels."""
    return F.pad(stack, (0, right, 0, bottom, 0, 0), "replicate")


def modules_without_gradient(model: nn.Module, loss: Tensor) -> set[str]:
    """Modules that no gradient of the loss reaches; the others' gradients must be finite."""
    loss.backward()
    missing = set()
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            missing.add(name.rpartition(".")[0])
        else:
            assert parameter.grad.isfinite().all(), name
    return missing
