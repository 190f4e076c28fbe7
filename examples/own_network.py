"""The kernels in a depth-from-focus network of one's own: trained on stock ops, fast afterwards.

python examples/own_network.py --steps 200
"""

import argparse
import time

import torch
from torch import Tensor, nn

import gplws
from gplws.data import StackGenerator
from gplws.losses import FocusLoss
from gplws.nn import GroupParallel3d
from gplws.ops import focus_search


class SmallNet(nn.Module):
    """Two convs of stock torch, two group parallel modules, a head: a stack to a focus volume."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv3d(1, 12, 3, padding=1), nn.BatchNorm3d(12), nn.ReLU(),
            nn.Conv3d(12, 12, 3, padding=1, groups=4), nn.ReLU(), nn.Conv3d(12, 12, 1),
        )  # fmt: skip
        self.blocks = nn.Sequential(GroupParallel3d(12, 12), GroupParallel3d(12, 12))
        self.head = nn.Conv3d(12, 1, 1)

    def forward(self, stack: Tensor) -> Tensor:
        """(B, 1, N, H, W) -> (B, N, H, W) logits."""
        return self.head(self.blocks(self.features(stack)))[:, 0]


def seconds(network: nn.Module, stack: Tensor) -> float:
    network(stack)
    started = time.perf_counter()
    network(stack)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--side", type=int, default=256, help="of the stack at the end")
    options = parser.parse_args()
    torch.manual_seed(0)

    network = SmallNet()
    optimiser = torch.optim.AdamW(network.parameters(), 1e-2)
    generator, loss_of = StackGenerator(seed=0), FocusLoss()
    for step in range(options.steps):
        batch = generator.batch(step, 2, 8, 48)
        loss = loss_of(network(batch.stack), batch.depth, batch.valid).total
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    # What training has in three branches, or as conv, batch norm and ReLU, is one kernel call now.
    fast, report = gplws.accelerate(network.eval())
    print(report)
    sample = generator.batch(10_000, 1, 10, options.side)
    with torch.inference_mode():
        volume, expected = fast(sample.stack), network(sample.stack)
        print(f"difference {(volume - expected).abs().max():.1e} of {expected.abs().max():.1f}")
        print(f"{seconds(network, sample.stack):.3f} s -> {seconds(fast, sample.stack):.3f} s")
        depth, index, peak, confidence = focus_search(volume, log_scale=True)
    error = (depth - sample.depth).abs()[sample.valid]
    print(f"mean error {error.mean():.2f} frames after {options.steps} steps")

    # Any such network is a method of the package, and reads files, cuts tiles and writes results.
    result = gplws.reconstruct(sample.stack[0, 0], method=fast)
    print(f"height map of {tuple(result.height.shape)} in {result.units}")


if __name__ == "__main__":
    main()
