"""Networks by name, and their weights on disk.

Weights are safetensors files in training form. Their metadata names the network and its
configuration, so that a file rebuilds its network, and a foreign file is told apart. Checkpoints
that others publish (torch files with a state dict) say neither: they fit or they do not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gplws.files import new_file
from gplws.models.aifdepthnet import AiFDepthNet
from gplws.models.ddffnet import DDFFNet
from gplws.models.defocusnet import DefocusNet
from gplws.models.dfvnet import DFVNet, FVNet
from gplws.models.gplws_net import GPLWSNet
from gplws.models.peer import PeerNetwork

_NETWORKS: dict[str, type[GPLWSNet] | type[PeerNetwork]] = {
    "gplws": GPLWSNet,
    "fvnet": FVNet,
    "dfvnet": DFVNet,
    "aifdepthnet": AiFDepthNet,
    "ddffnet": DDFFNet,
    "defocusnet": DefocusNet,
}
_SHIPPED = Path(__file__).with_name("weights")
_STATE_KEYS = ("state_dict", "model_state_dict", "model")  # where checkpoints keep the weights
# What the "format" of the checkpoints of training begins with; see gplws.checkpoints.
TRAINING_CHECKPOINT = "gplws training checkpoint"
_PARALLEL = "module."  # what torch.nn.DataParallel puts before each name


class WeightsError(ValueError):
    """A weights file is missing, damaged, or belongs to another network."""


def model_names() -> tuple[str, ...]:
    """Names that :func:`load_model` knows."""
    return tuple(_NETWORKS)


def build_model(name: str, arguments: dict[str, Any] | None = None) -> nn.Module:
    """A network with fresh random weights, in training form.

    Args:
        name: one of :func:`model_names`.
        arguments: of its constructor.

    Raises:
        ValueError: ``name`` is unknown, or an argument does not fit.
        TypeError: the network has no such argument.
    """
    return _network(name)(**(arguments or {}))


def save_weights(model: nn.Module, path: str | Path, *, name: str = "gplws") -> None:
    """Write the weights of a model in training form to a safetensors file.

    Args:
        model: a network with a ``config`` dict of its constructor arguments.
        path: the file; replaced only once the new one is complete.
        name: the network's name in the registry.

    Raises:
        ValueError: ``name`` is unknown, or ``model`` is not that network in training form.
    """
    from safetensors.torch import save

    expected = _network(name)
    if type(model) is not expected:
        raise ValueError(f"model must be a {expected.__name__}, got {type(model).__name__}")
    config: dict[str, Any] = model.config
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    with torch.device("meta"):  # the names alone
        names = expected(**config).state_dict().keys()
    if state.keys() != names:
        raise ValueError(
            "model must be in training form: save it before fuse() or reparameterise()"
        )
    with new_file(Path(path), overwrite=True) as file:
        # Not save_file, whose files only their owner may read.
        file.write(save(state, {"model": name, "config": json.dumps(config)}))


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
        weights: safetensors file written by :func:`save_weights`, or a published checkpoint: a
            torch file (.pth, .tar, ...) that is a state dict or has one under "state_dict", with or
            without "module." before the names. It is read without running code from it. Default:
            the file that ships with the package. Nothing is ever downloaded.
        device: where the model goes.
        fused: return the inference form on the kernels, where the network has one; False: the
            training form in eval mode.

    Returns:
        The model in eval mode.

    Raises:
        ValueError: ``name`` is unknown.
        WeightsError: no weights ship for ``name``, or the file is missing, damaged, or belongs to
            another network; the message names the file.

    Example:
        >>> load_model("dfvnet", weights="DFF-DFV.tar")  # doctest: +SKIP
    """
    network = _network(name)  # an unknown name is an error before any file is read
    path = Path(weights) if weights is not None else _SHIPPED / f"{name}.safetensors"
    if weights is None and not path.is_file():
        raise WeightsError(
            f"no trained weights ship for {name!r} in this version: "
            f"pass weights=PATH of a file written by gplws.models.save_weights"
            + (", or of a published checkpoint" if issubclass(network, PeerNetwork) else "")
        )
    _require_file(path)
    if _is_safetensors(path):
        state, config = _read_safetensors(path, name)
    else:
        state = _read_checkpoint(path)
        config = network.config_of_weights(state) if issubclass(network, PeerNetwork) else {}
    try:
        model = network(**config).float()  # whatever torch's default is
        model.load_state_dict(state)
    except (TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"weights: {path} does not fit {name!r}: {error}") from error
    model.eval()
    if fused and isinstance(model, GPLWSNet):
        return model.fuse().to(device)
    return model.to(device)


def name_of_weights(path: str | Path) -> str:
    """Name of the network that a file of :func:`save_weights` belongs to.

    Raises:
        WeightsError: the file is missing or damaged, or belongs to no known network.
    """
    path = Path(path)
    _require_file(path)
    with _opened(path) as file:
        name = (file.metadata() or {}).get("model")
    if name not in _NETWORKS:
        raise WeightsError(f"weights: {path} belongs to {name or 'an unknown network'!r}")
    return name


def load_weights(path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """The network that a file of :func:`save_weights` belongs to, as of :func:`load_model`.

    Raises:
        WeightsError: the file is missing, damaged, or belongs to no known network.
    """
    return load_model(name_of_weights(path), weights=path, device=device)


def _network(name: str) -> type[GPLWSNet] | type[PeerNetwork]:
    if name not in _NETWORKS:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(_NETWORKS)}")
    return _NETWORKS[name]


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise WeightsError(f"weights: no such file: {path}")


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(9)  # the length of the JSON header, then its first character
    return path.suffix == ".safetensors" or head[8:] == b"{"


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, in which what cannot be read is a :class:`WeightsError`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"weights: {path} cannot be read: {error}") from error


def _read_safetensors(path: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and configuration of a file of :func:`save_weights`."""
    with _opened(path) as file:
        metadata = file.metadata() or {}
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if metadata.get("model") != name:
        raise WeightsError(
            f"weights: {path} belongs to {metadata.get('model', 'an unknown network')!r}, "
            f"not to {name!r}"
        )
    try:
        config = json.loads(metadata["config"])
    except (KeyError, ValueError) as error:
        raise WeightsError(f"weights: {path} has no readable configuration: {error}") from error
    return state, config


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    """State dict of a torch file."""
    # Beside the weights there are often numpy numbers, such as the best score.
    scalar = np.float64(0).__reduce__()[0]
    numbers = [np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType, np.dtypes.Int64DType]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    try:
        with torch.serialization.safe_globals([*numbers, *((scalar, name) for name in names)]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what is no checkpoint can fail in any way
        foreign = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        reason: object = error
        if foreign:
            reason = f"it holds {foreign[1]}, and only tensors and numbers are read"
        raise WeightsError(f"weights: {path} cannot be read: {reason}") from error
    if isinstance(found, Mapping) and str(found.get("format")).startswith(TRAINING_CHECKPOINT):
        raise WeightsError(
            f"weights: {path} is a {TRAINING_CHECKPOINT}; "
            f"'gplws export {path} out.safetensors' makes a file of weights of it"
        )
    for key in _STATE_KEYS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items()
    ):
        raise WeightsError(
            f"weights: {path} holds no state dict, itself or under {' or '.join(_STATE_KEYS)}"
        )
    return {key.removeprefix(_PARALLEL): value for key, value in found.items()}
