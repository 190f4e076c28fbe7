"""Networks by name, and their weights on disk.

Weights are safetensors files in training form. Their metadata names the network and its
configuration, so that a file rebuilds its network, and a foreign file is told apart.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gplws.models.gplws_net import GPLWSNet

_BUILDERS: dict[str, Callable[..., nn.Module]] = {"gplws": GPLWSNet}
_SHIPPED = Path(__file__).with_name("weights")


class WeightsError(ValueError):
    """A weights file is missing, damaged, or belongs to another network."""


def model_names() -> tuple[str, ...]:
    """Names that :func:`load_model` knows."""
    return tuple(_BUILDERS)


def build_model(name: str, arguments: dict[str, Any] | None = None) -> nn.Module:
    """A network with fresh random weights, in training form.

    Args:
        name: one of :func:`model_names`.
        arguments: of its constructor.

    Raises:
        ValueError: ``name`` is unknown, or an argument does not fit.
        TypeError: the network has no such argument.
    """
    return _build(name, arguments or {})


def save_weights(model: nn.Module, path: str | Path, *, name: str = "gplws") -> None:
    """Write the weights of a model in training form to a safetensors file.

    Args:
        model: a network with a ``config`` dict of its constructor arguments.
        path: the file; replaced only once the new one is complete.
        name: the network's name in the registry.

    Raises:
        ValueError: ``name`` is unknown, or ``model`` is not that network in training form.
    """
    from safetensors.torch import save_file

    expected = type(_build(name, {}))
    if type(model) is not expected:
        raise ValueError(f"model must be a {expected.__name__}, got {type(model).__name__}")
    config: dict[str, Any] = model.config  # type: ignore[assignment]
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    if state.keys() != _build(name, config).state_dict().keys():
        raise ValueError(
            "model must be in training form: save it before fuse() or reparameterise()"
        )
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(state, partial, metadata={"model": name, "config": json.dumps(config)})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_model(
    name: str = "gplws",
    *,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    fused: bool = True,
) -> nn.Module:
    """A network with its weights, ready for inference.

    Args:
        name: one of :func:`model_names`.
        weights: safetensors file written by :func:`save_weights`; default: the one that ships with
            the package. Nothing is ever downloaded.
        device: where the model goes.
        fused: return the inference form on the kernels; False: the training form in eval mode.

    Returns:
        The model in eval mode.

    Raises:
        ValueError: ``name`` is unknown.
        WeightsError: no weights ship for ``name``, or the file is missing, damaged, or belongs to
            another network; the message names the file.
    """
    from safetensors import SafetensorError, safe_open

    _build(name, {})  # an unknown name is an error before any file is read
    path = Path(weights) if weights is not None else _SHIPPED / f"{name}.safetensors"
    if not path.is_file():
        if weights is None:
            raise WeightsError(
                f"no trained weights ship for {name!r} in this version: "
                f"pass weights=PATH of a file written by gplws.models.save_weights"
            )
        raise WeightsError(f"weights: no such file: {path}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"weights: {path} cannot be read: {error}") from error
    if metadata.get("model") != name:
        raise WeightsError(
            f"weights: {path} belongs to {metadata.get('model', 'an unknown network')!r}, "
            f"not to {name!r}"
        )
    try:
        model = _build(name, json.loads(metadata["config"]))
        model.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"weights: {path} does not fit {name!r}: {error}") from error
    model.eval()
    if fused and isinstance(model, GPLWSNet):
        model = model.fuse()
    return model.to(device)


def _build(name: str, config: dict[str, Any]) -> nn.Module:
    if name not in _BUILDERS:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(_BUILDERS)}")
    return _BUILDERS[name](**config)
