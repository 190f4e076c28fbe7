"""One process of three distributed runs: ``torchrun distributed_training.py OUT STEPS``.

The first goes to the end and lies in OUT, the second is stopped and lies in OUT_stopped, the third
has epochs and lies in OUT_epochs.

Its own folder is on the path, as for any script; PYTHONPATH has that of the package.
"""

import os
import signal
import sys
from dataclasses import replace

import torch
from toy_data import ConvNet, ToySource, distributed_config, seeded

from gplws.data import DepthSample
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
    torch.distributed.destroy_process_group()
