"""A recorded graph, with the questions that the passes ask of it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx, nn

from gplws.accelerate.layers import CONVS, is_of
from gplws.accelerate.tracing import IN_PLACE_OPERATORS
from gplws.nn.inference import (
    FoldedConv,
    FoldedMaxPool3d,
    JoinedUpConv3d,
    UpsampledConv2d,
    in_place,
)
from gplws.nn.stock import has_hooks, is_stock

RELU_FUNCTIONS = (F.relu, torch.relu, torch.relu_, F.relu_)
ADDITIONS = (operator.add, operator.iadd, torch.add)
ADDITIONS_IN_PLACE: tuple[object, ...] = (in_place, operator.iadd, "add_")


class Graph:
    """A graph and its modules, with the questions that the passes ask."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self.graph = module, module.graph
        self.number()

    def number(self) -> None:
        """Number the nodes anew."""
        self.position = {node: index for index, node in enumerate(self.graph.nodes)}

    def layer(self, node: object) -> Any:
        """The module that a node calls."""
        if not isinstance(node, fx.Node) or node.op != "call_module":
            return None
        return self.module.get_submodule(cast(str, node.target))

    def user(self, node: fx.Node) -> Any:
        """The only user of a node."""
        users = list(node.users)
        return users[0] if len(users) == 1 and users[0].op != "output" else None

    def slope(self, node: fx.Node | None, value: fx.Node) -> float | None:
        """Slope below zero of an activation of ``value``; None: the node is something else."""
        if node is None or not node.args or node.args[0] is not value:
            return None
        layer = self.layer(node)
        if layer is not None and not has_hooks(layer):
            if is_stock(layer, (nn.ReLU,)):
                return 0.0
            if is_stock(layer, (nn.LeakyReLU,)):
                return float(cast(nn.LeakyReLU, layer).negative_slope)
        if node.op == "call_function" and node.target in RELU_FUNCTIONS:
            return 0.0
        if node.op == "call_method" and node.target in ("relu", "relu_"):
            return 0.0
        if node.op == "call_function" and node.target is F.leaky_relu:
            slope = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", 0.01)
            return float(slope) if isinstance(slope, int | float) else None
        return None

    def addend(self, node: fx.Node | None, value: fx.Node) -> fx.Node | None:
        """What is added to ``value``, a tensor or a number; None: the node is something else."""
        if node is None:
            return None
        added = node.args[1:] if node.target is in_place else node.args
        by_function = node.op == "call_function" and node.target in ADDITIONS
        by_method = node.op == "call_method" and node.target in ("add", "add_")
        if node.args[:1] != ("iadd",) and not by_function and not by_method:
            return None
        if len(added) != 2 or node.kwargs:
            return None
        left, right = added
        if left is value and right is not value:
            other = right
        elif right is value and left is not value and not self.changes(node):
            other = left
        else:
            return None
        return other if isinstance(other, fx.Node) and _may_be_tensor(other) else None

    def changes(self, node: fx.Node) -> bool:
        """Whether a node may change a tensor in place."""
        if node.kwargs.get("inplace") or node.kwargs.get("out") is not None:
            return True
        if node.op == "call_module":
            return _may_change(self.layer(node))
        if node.op == "call_method":
            return str(node.target).endswith("_") or node.target == "__setitem__"
        if node.op == "call_function":
            name = getattr(node.target, "__name__", "")
            changes = name.endswith("_") and not name.endswith("__")
            changes |= node.target in (in_place, operator.setitem)
            return changes or name in IN_PLACE_OPERATORS or any(a is True for a in node.args)
        return False

    def origin(self, node: fx.Node) -> fx.Node:
        """What a value may share its memory with: the result of a layer, or something given."""
        while node.all_input_nodes and not _asks_sizes(node):
            if isinstance(self.layer(node), _NEW_MEMORY):
                break
            node = node.all_input_nodes[0]
        return node

    def may_copy(self, view: fx.Node) -> bool:
        """Whether a view may be a copy: no change in place is seen from the one to the other."""
        origin = self.origin(view)
        alike = [node for node in self.graph.nodes if self.origin(node) is origin]
        ours = {view}
        ours.update(n for n in alike if n.all_input_nodes and n.all_input_nodes[0] in ours)
        others = set(alike) - ours
        for node in self.graph.nodes:
            if self.position[node] <= self.position[view] or not self.changes(node):
                continue
            changed = node.all_input_nodes
            if node.op != "call_module" and node.kwargs.get("out") is None:
                changed = changed[:1]
            for side, other in ((ours, others), (others, ours)):
                readers = (u for n in other for u in n.users if not _asks_sizes(u))
                if not side.isdisjoint(changed) and any(
                    self.position[reader] > self.position[node] for reader in readers
                ):
                    return False
        return True

    def may_join(self, nodes: Sequence[fx.Node]) -> bool:
        """Whether the first of some nodes may be computed where the last one is."""
        first, last = self.position[nodes[0]], self.position[nodes[-1]]
        between = [n for n in self.graph.nodes if first < self.position[n] < last]
        return not any(self.changes(node) for node in between if node not in nodes)


_NEW_MEMORY = (*CONVS, FoldedConv, JoinedUpConv3d, UpsampledConv2d, FoldedMaxPool3d)


def _may_change(module: nn.Module) -> bool:
    """Whether a layer, or one inside of it, may change a tensor in place."""
    if isinstance(module, fx.GraphModule):
        found = Graph(module)
        return any(found.changes(node) for node in module.graph.nodes)
    if not is_of(module, ("torch.nn", "gplws.nn")) or has_hooks(module):
        return True
    return bool(getattr(module, "inplace", False)) or any(map(_may_change, module.children()))


def _may_be_tensor(node: fx.Node) -> bool:
    """Whether a value is a tensor, or one that is not known to be a size."""
    if node.op == "call_function":
        return node.target not in (getattr, operator.getitem)
    return not (node.op == "call_method" and node.target in ("size", "dim", "item", "numel"))


def _asks_sizes(node: fx.Node) -> bool:
    """Whether a node reads of a tensor what its values say nothing about."""
    if node.op == "call_function":
        return node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device")
    return node.op == "call_method" and node.target in ("size", "dim", "numel")
