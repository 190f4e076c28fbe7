"""Parts of a 2-D network that see one frame at a time."""

from __future__ import annotations

import operator
from collections.abc import Set
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
_SIZE_ARGUMENTS = ((1,), (2,), (3,), (-1,), (-2,), (-3,))  # all axes but that of the frames
_SHAPE_INDICES = (1, 2, 3, -1, -2, -3, slice(-2, None, None))
_FRAME_METHODS = {"relu", "relu_", "add", "add_", "sub", "mul", "div", "sigmoid", "tanh"}


def is_framewise(graph: fx.Graph, module: nn.Module, framewise: Set[int]) -> bool:
    """Whether a graph maps 4-D tensors to 4-D tensors, image by image, with a conv in it.

    Args:
        graph: of the ``forward`` of ``module``.
        framewise: ids of modules that are known to be so.
    """
    sizes: set[fx.Node] = set()
    convs = given = 0
    for node in graph.nodes:
        if _is_size(node, sizes):
            sizes.add(node)
        elif node.op == "call_module":
            layer = module.get_submodule(cast(str, node.target))
            convs += isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
            if id(layer) not in framewise and not _is_frame_layer(layer):
                return False
        elif not _is_frame_operation(node):
            return False
        given += node.op == "placeholder"
    output = next(node for node in graph.nodes if node.op == "output")
    return convs > 0 and given == 1 and not sizes.intersection(output.all_input_nodes)


def _is_size(node: fx.Node, sizes: set[fx.Node]) -> bool:
    """Whether a node gives sizes other than the number of frames, or computes with ``sizes``."""
    if node.op == "call_method":
        return node.target == "size" and node.args[1:] in _SIZE_ARGUMENTS
    if node.op != "call_function":
        return False
    if node.target is getattr and node.args[1] == "shape":
        return True
    if node.target is operator.getitem and node.args[0] in sizes:
        whole_shape = cast(fx.Node, node.args[0]).target is getattr
        return not whole_shape or node.args[1] in _SHAPE_INDICES
    return sizes.issuperset(node.all_input_nodes)


def _is_frame_layer(layer: nn.Module) -> bool:
    if not is_stock(layer, _FRAME_LAYERS) or has_hooks(layer) or layer.training:
        return False
    # Batch norm without fixed statistics takes those of all images.
    return not isinstance(layer, nn.BatchNorm2d) or layer.running_mean is not None


def _is_frame_operation(node: fx.Node) -> bool:
    if node.op == "call_function" and node.target is torch.cat:
        axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        return axis in (1, -3)
    if node.op == "call_function":
        return node.target in _FRAME_FUNCTIONS
    if node.op == "call_method":
        return node.target in _FRAME_METHODS
    return node.op != "get_attr"  # a buffer may have values of its own for each image
