"""Depth-from-focus networks and the registry that loads them by name."""

from gplws.models.gplws_net import GPLWSNet
from gplws.models.registry import WeightsError, build_model, load_model, model_names, save_weights

__all__ = ["GPLWSNet", "WeightsError", "build_model", "load_model", "model_names", "save_weights"]
