"""Training checkpoints: the whole state of a run, in one file that is complete or not there."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from gplws._extension import __version__
from gplws.files import new_file
from gplws.models.registry import TRAINING_CHECKPOINT, build_model, save_weights

CHECKPOINT = "checkpoint.pt"  # in the folder of a run
_FORMAT = f"{TRAINING_CHECKPOINT}, version 1"
_FUSED_TOLERANCE = 1e-3  # float32 sums in another order


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
    with new_file(path, overwrite=True) as file:
        torch.save({"format": _FORMAT, **state}, file)


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
    except Exception as error:  # damaged pickles raise errors of many kinds
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
    return _model_of(load_checkpoint(path), path, averaged)


def _model_of(state: dict[str, Any], path: str | Path, averaged: bool) -> nn.Module:
    """The network of a checkpoint that was read from ``path``."""
    weights = state["average"] if averaged and state["average"] is not None else state["weights"]
    try:
        model = build_model(state["model"]["name"], state["model"]["arguments"])
        model.load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint: {path} does not fit its network: {error}") from error
    return model.eval()


class Exported(NamedTuple):
    """What :func:`export` wrote."""

    weights: Path
    card: Path
    error: float  # of the fused network against the training form, relative to the largest value


def export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    licence: str = "Apache-2.0",
    data: str = "",
    averaged: bool = True,
    overwrite: bool = False,
) -> Exported:
    """Write the weights of a checkpoint for :func:`gplws.models.load_model`, and their model card.

    Args:
        checkpoint: file, or the folder of the run.
        out: safetensors file to write; the card lies beside it, with the suffix ``.md``.
        licence: of the weights; for the card.
        data: what they were trained on and under which licences; for the card, which names the
            configured sources in any case.
        averaged: the moving average of the weights where there is one.
        overwrite: replace existing files.

    Returns:
        The files, and how closely the fused network computes what the training form does.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or of no known network.
        FileExistsError: a file is there and ``overwrite`` is False.
        ValueError: ``out`` has another suffix, or the fused network differs from the training form.
    """
    path, out = Path(checkpoint), Path(out)
    if path.is_dir():
        path = path / CHECKPOINT
    if out.suffix != ".safetensors":
        raise ValueError(f"out: expected a name that ends in .safetensors, got {out}")
    card = out.with_suffix(".md")
    for target in (out, card):
        if target.exists() and not overwrite:
            raise FileExistsError(
                f"{target} exists; pass overwrite=True (--overwrite) to replace it"
            )
    state = load_checkpoint(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    model = _model_of(state, path, averaged)
    error = fused_error(model)
    if not error < _FUSED_TOLERANCE:
        raise ValueError(
            f"checkpoint: {path}: the fused network differs from the training form by {error:.1e} "
            f"of the largest value; expected less than {_FUSED_TOLERANCE:.0e}"
        )
    averaged = averaged and state["average"] is not None
    save_weights(model, out, name=state["model"]["name"])
    with new_file(card, overwrite=overwrite) as file:
        file.write(_card(out, state, model, licence, data, averaged, error).encode())
    return Exported(out, card, error)


def fused_error(model: nn.Module) -> float:
    """Largest difference between a network and its fused form, relative to the largest value.

    Args:
        model: in training form, with ``fuse``; without it the result is 0.

    Returns:
        On random stacks of a size that divides evenly and one that does not; NaN where a network
        gives one.
    """
    fuse: Callable[[], nn.Module] | None = getattr(model, "fuse", None)
    if fuse is None:
        return 0.0
    model.eval()
    fused = fuse()
    generator = torch.Generator().manual_seed(0)
    differences = []
    with torch.no_grad():
        for shape in ((1, 1, 8, 64, 64), (2, 1, 5, 37, 45)):
            stack = torch.rand(shape, generator=generator)
            expected = model(stack)
            differences.append((fused(stack) - expected).abs().max() / expected.abs().max())
    return float(torch.stack(differences).max())  # NaN where one is


def _card(
    out: Path,
    state: dict[str, Any],
    model: nn.Module,
    licence: str,
    data: str,
    averaged: bool,
    error: float,
) -> str:
    import yaml

    config = state["config"]
    sources = [f"* {_described(source)}" for source in config["data"]["sources"]]
    figures = [f"| {name} | {value:.4f} |" for name, value in state["validation"].items()]
    kind = "weights themselves" if state["average"] is None else "moving average of the weights"
    step = state.get("validated")
    when = "at the last validation" if step is None else f"at step {step:,}"
    table = [f"Of the {kind}, {when}:", ""]
    table += ["| validation set | mean absolute error, frames |", "|---|---|", *figures]
    missing = "Not validated yet." if config["data"]["validation"] else "No validation sets."
    arguments = json.dumps(state["model"]["arguments"])
    parameters = sum(p.numel() for p in model.parameters())
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    return "\n".join(
        [
            f"# {out.stem}",
            "",
            f"Weights of `{state['model']['name']}` ({state['model']['class']}) for gplws "
            f"{__version__}: `gplws.load_model({state['model']['name']!r}, weights={out.name!r})`.",
            "",
            "| | |",
            "|---|---|",
            f"| file | `{out.name}`, sha256 `{digest}` |",
            f"| licence | {licence} |",
            f"| parameters | {parameters:,} in training form |",
            f"| arguments | `{arguments}` |",
            f"| training | {state['step']:,} steps, {state['seconds'] / 60:.1f} min, "
            f"torch {state['torch']} |",
            f"| weights | {'moving average' if averaged else 'of the last step'} |",
            f"| fused form | differs by at most {error:.1e} of the largest value |",
            "",
            "## Data",
            "",
            *([data, ""] if data else []),
            *(sources or ["* given by the program that trained it, not by the configuration"]),
            "",
            "## Accuracy",
            "",
            *(table if figures else [missing]),
            "",
            "## Configuration",
            "",
            "```yaml",
            yaml.safe_dump(config, sort_keys=False).rstrip(),
            "```",
            "",
        ]
    )


def _described(source: dict[str, Any]) -> str:
    arguments = f" with `{json.dumps(source['arguments'])}`" if source["arguments"] else ""
    return f"`{source['factory']}`{arguments}, weight {source['weight']:g}"


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
