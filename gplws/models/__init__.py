"""Depth-from-focus networks and the registry that loads them by name."""

from gplws.models.aifdepthnet import AiFDepthNet
from gplws.models.ddffnet import DDFFNet
from gplws.models.defocusnet import DefocusNet
from gplws.models.dfvnet import DFVNet, FVNet
from gplws.models.gplws_net import GPLWSNet
from gplws.models.registry import WeightsError, build_model, load_model, model_names, save_weights

__all__ = [
    "AiFDepthNet",
    "DDFFNet",
    "DFVNet",
    "DefocusNet",
    "FVNet",
    "GPLWSNet",
    "WeightsError",
    "build_model",
    "load_model",
    "model_names",
    "save_weights",
]
