"""One process of a distributed run, for tests: ``torchrun distributed_training.py OUT STEPS``.

Its own folder is on the path, as for any script; PYTHONPATH has that of the package.
"""

import sys

from toy_data import ConvNet, ToySource, distributed_config, seeded

from gplws.training import train

if __name__ == "__main__":
    out, steps = sys.argv[1:]
    train(
        distributed_config(int(steps)),
        out,
        device="cpu",
        model=seeded(ConvNet),
        source=ToySource(),
        validation=[("toy", [ToySource(seed=1)(step) for step in range(3)])],
    )
