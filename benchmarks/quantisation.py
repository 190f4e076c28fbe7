"""What 8-bit convs would do to the depth map: the shipped network with its convs rounded to int8.

    python -m benchmarks.quantisation --stacks stacks/mine

Weights of each output channel and the input of each conv are rounded to 255 values, symmetric
about zero; the scale of an input is the largest magnitude in that very input, which is kinder than
one fixed beforehand. All else stays float32. bfloat16 stands beside it. Depth is the network's own
median, before classical responses refine it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gplws
from benchmarks.accuracy import LEVELS, level_samples
from benchmarks.timing import introduce, save, show
from gplws.data import DepthSample
from gplws.data.transforms import split
from gplws.datasets import FolderStacks
from gplws.models import GPLWSNet

LEVELS_OF_INT8 = 127


def rounded(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Values rounded to int8, with one scale for all that differ in ``dims`` only."""
    scale = values.abs().amax(dims, keepdim=True) / LEVELS_OF_INT8
    return torch.where(scale > 0, (values / scale).round() * scale, values)


@contextmanager
def inputs_rounded(model: nn.Module, kept: tuple[str, ...] = ()) -> Iterator[None]:
    """Rounds what goes into the convs of ``model`` but those that are called ``kept``."""

    def round_input(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return rounded(arguments[0], tuple(range(1, arguments[0].dim()))), *arguments[1:]

    hooks = [
        conv.register_forward_pre_hook(round_input)
        for name, conv in convs(model)
        if name not in kept
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def convs(model: nn.Module) -> list[tuple[str, nn.Conv3d | nn.ConvTranspose3d]]:
    """The convs of a network in plain form, in the order of their names."""
    kinds = (nn.Conv3d, nn.ConvTranspose3d)
    return [(name, part) for name, part in model.named_modules() if isinstance(part, kinds)]


@torch.no_grad()
def with_rounded_weights(model: nn.Module, kept: tuple[str, ...] = ()) -> nn.Module:
    """Rounds the weights of the convs in place but of those that are called ``kept``."""
    for name, conv in convs(model):
        if name not in kept:
            # The up convs are depthwise: their first dimension counts channels as well.
            conv.weight.copy_(rounded(conv.weight, (1, 2, 3, 4)))
    return model


def depth_of(model: nn.Module, sample: DepthSample) -> Tensor:
    """(H, W) float32, frames."""
    assert isinstance(model, GPLWSNet)
    return model.predict(sample.stack.float()[None], refine=False).depth[0].float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--levels", nargs="*", choices=LEVELS, default=["easy", "noisy"])
    parser.add_argument("--count", type=int, default=6, help="stacks of each level")
    parser.add_argument("--side", type=int, default=192, help="of simulated images, pixels")
    parser.add_argument("--frames", type=int, default=10)
    parser.add_argument("--stacks", nargs="*", type=Path, default=[], help="folders with gt.npz")
    parser.add_argument("--weights", type=Path, help="default: those that ship")
    parser.add_argument("--out", type=Path, help="folder of the result; benchmarks/results")
    options = parser.parse_args()
    introduce()

    def plain() -> nn.Module:
        model = gplws.load_model("gplws", weights=options.weights, fused=False)
        assert isinstance(model, GPLWSNet)
        return model.eval().reparameterise()

    exact = plain()
    names = [name for name, _ in convs(exact)]
    ends = (names[0], *(name for name in names if name.startswith("head")))
    all_rounded, inner_rounded = with_rounded_weights(plain()), with_rounded_weights(plain(), ends)
    low = gplws.load_model("gplws", weights=options.weights).bfloat16()

    size = (options.count, options.side, options.frames)
    data: list[tuple[str, Iterable[DepthSample]]] = [
        (name, level_samples(LEVELS[name], *size)) for name in options.levels
    ]
    data += [(folder.name, [FolderStacks(folder)[0]]) for folder in options.stacks]
    rows: list[dict[str, Any]] = []
    for name, samples in data:
        differences: dict[str, list[Tensor]] = {}
        with torch.inference_mode():
            for sample in chain.from_iterable(map(split, samples)):
                depth = depth_of(exact, sample)
                with inputs_rounded(all_rounded):
                    whole = depth_of(all_rounded, sample)
                with inputs_rounded(inner_rounded, ends):
                    inner = depth_of(inner_rounded, sample)
                found = {
                    "int8": whole,
                    "int8 but first conv and head": inner,
                    "bfloat16": depth_of(low, sample),
                }
                for candidate, other in found.items():
                    differences.setdefault(candidate, []).append((other - depth).abs().flatten())
        for candidate, parts in differences.items():
            every = torch.cat(parts)
            rows.append(
                {
                    "data": name,
                    "candidate": candidate,
                    "mean_frames": float(every.mean()),
                    "share_above_tenth": float((every > 0.1).float().mean()),
                }
            )
    show(
        ["data", "candidate", "mean difference, frames", "above 0.1 frames"],
        [
            [
                row["data"],
                row["candidate"],
                f"{row['mean_frames']:.4f}",
                f"{100 * row['share_above_tenth']:.1f}%",
            ]
            for row in rows
        ],
    )
    print(f"\n{save('quantisation', {'rows': rows}, options.out)}")


if __name__ == "__main__":
    main()
