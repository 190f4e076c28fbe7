"""One process of distributed runs: ``torchrun distributed_training.py OUT STEPS``.

The first goes to the end and lies in OUT, the second is stopped and lies in OUT_stopped, the third
has epochs and lies in OUT_epochs. Those of networks with parameters that the loss does not reach
lie in OUT_ and the name of the network.

Its own folder is on the path, as for any script; PYTHONPATH has that of the package.
"""

import hashlib
import os
import signal
import sys
from dataclasses import replace
from functools import partial

import torch
from toy_data import ConvNet, ToySource, TwoOutputs, distributed_config, seeded

from gplws.data import DepthSample
from gplws.models import DefocusNet
from gplws.training import train
from gplws.training_config import ScheduleConfig


class StopsOneProcess(ToySource):
    """Sends the second process, and only that one, a signal."""

    def __call__(self, step: int) -> DepthSample:
        if step == 3:  # the second step of the second process
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__call__(step)


class FiveBatches(ToySource):
    """Knows its epochs."""

    def __len__(self) -> int:
        return 5


if __name__ == "__main__":
    out, steps = sys.argv[1:]
    torch.distributed.init_process_group("gloo")
    train(
        distributed_config(int(steps)),
        out,
        device="cpu",
        model=seeded(ConvNet),
        source=ToySource(),
        validation=[("toy", [ToySource(seed=1)(step) for step in range(3)])],
    )
    stopped = train(
        distributed_config(50), f"{out}_stopped", source=StopsOneProcess(), device="cpu"
    )
    sys.stdout.write(f"{stopped.reason} at step {stopped.step}\n")
    epochs = train(
        replace(distributed_config(0), schedule=ScheduleConfig(steps=None, epochs=3)),
        f"{out}_epochs",
        source=FiveBatches(),
        device="cpu",
    )
    sys.stdout.write(f"epochs {epochs.reason} at step {epochs.step}\n")
    for network in (partial(DefocusNet, filters=2), TwoOutputs):
        model = seeded(network)
        name = type(model).__name__
        train(
            distributed_config(int(steps)),
            f"{out}_{name}",
            device="cpu",
            model=model,
            source=ToySource(frames=3, side=32),
        )
        weights = b"".join(weight.detach().numpy().tobytes() for weight in model.parameters())
        sys.stdout.write(f"{name} has weights {hashlib.sha256(weights).hexdigest()}\n")
    torch.distributed.destroy_process_group()
