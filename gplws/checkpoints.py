"""Training checkpoints: the whole state of a run, in one file that is complete or not there."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gplws.models.registry import build_model

_FORMAT = "gplws training checkpoint, version 1"


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or belongs to another network; the message names it."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; the file there before is replaced once the new one is on the disk.

    Args:
        path: the file; its folder exists.
        state: tensors and plain values, nested; :func:`load_checkpoint` returns the same.

    Raises:
        OSError: it cannot be written; the file there before is unchanged.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            torch.save({"format": _FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, all tensors to the CPU; no code in the file is run.

    Raises:
        CheckpointError: the file is missing, damaged, or no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint: no such file: {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, KeyError) as error:
        reason = str(error).split("\n", 1)[0]
        raise CheckpointError(f"checkpoint: {path} cannot be read: {reason}") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise CheckpointError(f"checkpoint: {path} is not a {_FORMAT}")
    return state


def model_of_checkpoint(path: str | Path, *, averaged: bool = True) -> nn.Module:
    """The network of a checkpoint, in training form and eval mode.

    Args:
        path: a file that training wrote.
        averaged: the moving average of the weights where there is one, else the weights themselves.

    Raises:
        CheckpointError: as for :func:`load_checkpoint`, or the weights do not fit their network.
    """
    state = load_checkpoint(path)
    weights = state["average"] if averaged and state["average"] is not None else state["weights"]
    try:
        model = build_model(state["model"]["name"], state["model"]["arguments"])
        model.load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint: {path} does not fit its network: {error}") from error
    return model.eval()


def random_state() -> dict[str, Any]:
    """State of the global random number generators of torch, CUDA and Python."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Undo what was drawn since :func:`random_state`; CUDA only with the same number of GPUs."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
