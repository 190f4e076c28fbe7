"""Trains a preset for some minutes, and exports what came of it; goes on where it was stopped.

    python -m build_tools.train_on_gpu FOLDER --minutes 8 --total 24

A folder holds one run: its configuration, log.jsonl and checkpoint.pt, and after each call the
weights (gplws.safetensors) with their card (gplws.md), which has the errors on the validation set.
The learning rate follows the share of --total that has passed, so that three calls of 8 minutes
make one run of 24. Needs torch, numpy, PyYAML, tqdm and safetensors, and not the command line.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import torch

from gplws.checkpoints import CHECKPOINT, export
from gplws.training import TrainingResult, train
from gplws.training_config import TrainingConfig, preset_names, preset_path, read_config


def configured(
    preset: str, total_minutes: float, workers: int, batch_size: int | None
) -> TrainingConfig:
    """A preset whose length is a time, with as many workers as there are cores."""
    path = preset_path(preset) if preset in preset_names() else Path(preset)
    config = read_config(path)
    schedule = replace(
        config.schedule, steps=None, epochs=None, max_minutes=total_minutes, follow_time=True
    )
    data = replace(config.data, workers=workers, ahead=max(2 * workers, config.data.ahead))
    if batch_size is not None:
        data = replace(data, batch_size=batch_size)
    # A run that is broken off loses a minute at most.
    checkpoints = replace(config.checkpoints, every_minutes=1.0)
    return replace(config, schedule=schedule, data=data, checkpoints=checkpoints)


def run(
    config: TrainingConfig, folder: Path, minutes: float, device: str = "auto"
) -> TrainingResult:
    """Train for so many minutes or to the end, then export the weights."""
    timers: list[threading.Timer] = []

    def stop_after(seconds: float) -> None:
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
        timer.daemon = True
        timers.append(timer)
        timer.start()

    # The training ends by itself after this signal, with a checkpoint; so it does on Ctrl-C. One
    # that comes before the training listens, comes again.
    before = signal.signal(signal.SIGTERM, lambda *_: stop_after(0.2))
    stop_after(60 * minutes)
    try:
        resume = (folder / CHECKPOINT).exists()
        result = train(config, folder, resume=resume, device=device)
    finally:
        for timer in timers:
            timer.cancel()
        signal.signal(signal.SIGTERM, before)
    export(folder, folder / "gplws.safetensors", overwrite=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="default", help="its name, or a YAML file")
    parser.add_argument("--minutes", type=float, default=8.0, help="of this call")
    parser.add_argument("--total", type=float, help="of the run; default: of this call")
    parser.add_argument("--workers", type=int, default=max((os.cpu_count() or 2) - 2, 1))
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    total = options.minutes if options.total is None else options.total
    config = configured(options.preset, total, options.workers, options.batch_size)
    place = torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"
    print(f"trains {options.preset} on {place}, {options.workers} workers make batches", flush=True)
    result = run(config, options.folder, options.minutes, options.device)
    errors = json.dumps({name: round(error, 4) for name, error in result.validation.items()})
    print(f"{result.step} steps, {result.reason}; mean absolute errors in frames: {errors}")


if __name__ == "__main__":
    main()
