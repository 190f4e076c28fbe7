"""Parts of a 2-D network that see one frame at a time."""

from __future__ import annotations

import operator
from typing import cast

import torch
import torch.nn.functional as F
from torch import fx, nn

from gplws.accelerate.graph import ADDITIONS, RELU_FUNCTIONS
from gplws.nn.inference import in_place
from gplws.nn.stock import has_hooks, is_stock

_FRAME_LAYERS = (
    nn.Conv2d,
    nn.ConvTranspose2d,
    nn.BatchNorm2d,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.GELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Tanh,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Upsample,
    nn.Dropout,
    nn.Dropout2d,
    nn.Identity,
)
_FRAME_FUNCTIONS = {
    *RELU_FUNCTIONS,
    *ADDITIONS,
    *(operator.sub, operator.mul, operator.truediv, operator.neg),
    *(torch.sub, torch.mul, torch.div, torch.sigmoid, torch.tanh, torch.zeros_like),
    *(F.leaky_relu, F.sigmoid, F.tanh, F.gelu, F.silu, F.dropout, F.interpolate),
    *(F.avg_pool2d, F.max_pool2d, F.adaptive_avg_pool2d),
    in_place,
}
_FRAME_METHODS = {"relu", "relu_", "add", "add_", "sub", "mul", "div", "sigmoid", "tanh"}


def is_framewise(graph: fx.Graph, module: nn.Module, leaves: set[int]) -> bool:
    """Whether a graph maps 4-D tensors to 4-D tensors, image by image, with a conv in it."""
    sizes: set[fx.Node] = set()
    convs = 0
    for node in graph.nodes:
        if node.op == "call_module":
            layer = module.get_submodule(cast(str, node.target))
            convs += isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
            if id(layer) in leaves:
                continue
            if not is_stock(layer, _FRAME_LAYERS) or has_hooks(layer) or layer.training:
                return False
            if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is None:
                return False  # it takes the statistics of all images
        elif node.op == "call_function":
            if node.target is getattr and node.args[1] == "shape":
                sizes.add(node)
            elif node.target is operator.getitem and node.args[0] in sizes:
                axes = (1, 2, 3, -1, -2, -3, slice(-2, None, None))
                if node.args[0].target is getattr and node.args[1] not in axes:
                    return False
                sizes.add(node)
            elif sizes.issuperset(node.all_input_nodes):
                sizes.add(node)  # of sizes alone
            elif node.target is torch.cat:
                axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
                if axis not in (1, -3):
                    return False
            elif node.target not in _FRAME_FUNCTIONS:
                return False
        elif node.op == "call_method":
            if node.target == "size" and node.args[1:] in ((1,), (2,), (3,), (-1,), (-2,), (-3,)):
                sizes.add(node)
            elif node.target not in _FRAME_METHODS:
                return False
        elif node.op == "get_attr":
            return False
    given = [node for node in graph.nodes if node.op == "placeholder"]
    output = next(node for node in graph.nodes if node.op == "output")
    return convs > 0 and len(given) == 1 and not sizes.intersection(output.all_input_nodes)
