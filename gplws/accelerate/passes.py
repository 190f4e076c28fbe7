"""What is replaced in one graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import fx, nn

from gplws.accelerate.graph import ADDITIONS_IN_PLACE, Graph
from gplws.accelerate.layers import (
    CONVS,
    NORMS,
    describe,
    folds_norm,
    is_of,
    why_not_conv,
    with_norm,
)
from gplws.accelerate.tracing import WHOLE
from gplws.nn.inference import (
    FoldedConv,
    FoldedMaxPool3d,
    JoinedUpConv3d,
    UpsampledConv2d,
    stock_layout,
)
from gplws.nn.layer_report import ModelReport
from gplws.nn.stock import has_hooks, is_stock

_IDENTITIES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity)
_MAX_POOLS = {F.max_pool3d, cast(Any, F)._max_pool3d, torch.max_pool3d}
_POOL_WINDOW = ("kernel_size", "stride", "padding")
_POOL_OPTIONS = (*_POOL_WINDOW, "dilation", "ceil_mode", "return_indices")
_NO_EXPECTATION = "there is no kernel for it; it takes little time beside the convs"
_MOST_MIDDLE = 96  # channels between two convs of one kernel call: more leave its cache

_Answer = TypeVar("_Answer")


class Passes:
    """What is replaced in one graph."""

    def __init__(
        self, module: fx.GraphModule, path: str, report: ModelReport, *, on_cpu: bool
    ) -> None:
        self._of = Graph(module)
        self._path, self._report, self._on_cpu = path, report, on_cpu
        self._counter = 0

    def run(self) -> None:
        """All passes."""
        self._drop_identities()
        self._fold_convs()
        self._append_pointwise()
        self._join_up()
        self._upsampled()
        self._pools()
        self._choose_layout()
        self._free_views()
        self._restore_layouts()
        for node in self._of.graph.nodes:
            layer = self._of.layer(node)
            if isinstance(layer, NORMS):
                note = "it is in training mode" if layer.training else "no conv known before it"
                self._note(node.target, layer, note, swapped=False)
        self._note_expectations()
        self._of.module.delete_all_unused_submodules()
        self._of.graph.lint()
        self._of.module.recompile()

    def _note(self, target: object, kind: object, note: str, *, swapped: bool) -> None:
        name = f"{self._path}.{target}" if self._path else str(target)
        self._report.add(name, kind, note, swapped=swapped)

    def _insert(self, nodes: Sequence[fx.Node], layer: nn.Module, args: tuple[Any, ...]) -> fx.Node:
        """Let ``layer`` compute what the last of ``nodes`` did; all of them disappear."""
        base = str(nodes[0].target).rpartition(".")[2] if nodes[0].op == "call_module" else "layer"
        name = f"fast_{self._counter}_{base}"
        self._counter += 1
        self._of.module.add_module(name, layer.eval())
        with self._of.graph.inserting_before(nodes[-1]):
            new = self._of.graph.call_module(name, args)
        nodes[-1].replace_all_uses_with(new)
        for node in reversed(nodes):
            self._of.graph.erase_node(node)
        self._of.number()
        return new

    def _drop_identities(self) -> None:
        for node in list(self._of.graph.nodes):
            if self._is_identity(node) and node.args and isinstance(node.args[0], fx.Node):
                node.replace_all_uses_with(node.args[0])
                self._of.graph.erase_node(node)
        self._of.number()

    def _is_identity(self, node: fx.Node) -> bool:
        """Whether a node gives back what it is given, as dropout does for inference."""
        layer = self._of.layer(node)
        if layer is not None:
            return is_stock(layer, _IDENTITIES) and not layer.training and not has_hooks(layer)
        if node.op != "call_function" or node.target is not F.dropout:
            return False
        training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
        return training is False

    def _fold_convs(self) -> None:
        nodes = [n for n in self._of.graph.nodes if isinstance(self._of.layer(n), CONVS)]
        # Those that the kernels take come first: they add residuals at no cost.
        nodes.sort(
            key=lambda n: (not _fits(cast(nn.Module, self._of.layer(n))), -self._of.position[n])
        )
        for node in nodes:
            self._fold_conv(node)

    def _fold_conv(self, node: fx.Node) -> None:
        """One layer for a conv, its norm, an activation, a residual and one more activation."""
        of, conv = self._of, cast(Any, self._of.layer(node))
        why = why_not_conv(conv)
        if not why and (len(node.args) != 1 or node.kwargs):
            why = "called with more than its input"
        if why:
            self._note(node.target, conv, why, swapped=False)
            return
        weight, bias = conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
        chain, folded = [node], []
        norm_node = of.user(node)
        norm = of.layer(norm_node)
        if folds_norm(norm, conv) and tuple(norm_node.args) == (node,):
            if not of.may_join([node, norm_node]):
                why = "something changes in place before its norm"
                self._note(node.target, conv, why, swapped=False)
                return
            weight, bias = with_norm(conv, weight, bias, norm)
            chain.append(norm_node)
            folded.append("batch norm")
        elif conv.weight.device.type != "cpu":
            self._note(node.target, conv, f"on {conv.weight.device.type}", swapped=False)
            return

        def take(question: Callable[[fx.Node | None, fx.Node], _Answer | None]) -> _Answer | None:
            """What is found about the node behind the chain, which then joins it; None: nothing."""
            follower = of.user(chain[-1])
            answer = question(follower, chain[-1])
            if answer is None or not of.may_join([*chain, follower]):
                return None
            chain.append(follower)
            return answer

        def take_activation() -> float:
            """Slope below zero of the activation behind the chain; 1: there is none."""
            slope = take(of.slope)
            if slope is None:
                return 1.0
            folded.append("relu" if slope == 0 else "leaky relu")
            return slope

        slope, residual_slope, keeps_dtype = take_activation(), 1.0, False
        residual = take(of.addend)
        if residual is not None:
            folded.append("residual")
            keeps_dtype = chain[-1].target in ADDITIONS_IN_PLACE
            residual_slope = take_activation()
        layer = FoldedConv(
            conv,
            weight,
            bias,
            slope=slope,
            residual_slope=residual_slope,
            keeps_dtype=keeps_dtype,
        )
        args = (node.args[0],) if residual is None else (node.args[0], residual)
        self._note(node.target, conv, describe(layer, folded), swapped=True)
        self._insert(chain, layer, args).meta["source"] = node.target

    def _pairs_of_convs(self) -> Iterator[tuple[fx.Node, FoldedConv, fx.Node, FoldedConv]]:
        """Convs on the CPU whose result goes to one other conv only, both with their nodes.

        Later pairs are looked for once the caller has replaced the one before.
        """
        of = self._of
        for node in list(of.graph.nodes):
            first = of.layer(node)
            second_node = of.user(node)
            second = of.layer(second_node)
            if (
                isinstance(first, FoldedConv)
                and isinstance(second, FoldedConv)
                and second_node is not None
                and second_node.args[0] is node
                and len(node.args) == 1
                and first.weight.device.type == "cpu"
                and of.may_join([node, second_node])
            ):
                yield node, first, second_node, second

    def _append_pointwise(self) -> None:
        for node, first, second_node, second in self._pairs_of_convs():
            if (
                first.fits_kernel
                and not first.transposed
                and first.weight.shape[0] <= _MOST_MIDDLE
                and first.slope in (0.0, 1.0)
                and second.axes == 3
                and second.is_pointwise
            ):
                first.append_pointwise(second)
                source = node.meta.get("source")
                args = (node.args[0], *second_node.args[1:])
                note = "in the kernel call of the conv before it"
                self._note(second_node.meta.get("source"), "Conv3d", note, swapped=True)
                self._insert([node, second_node], first, args).meta["source"] = source

    def _join_up(self) -> None:
        for node, first, second_node, second in self._pairs_of_convs():
            if JoinedUpConv3d.suits(first, second):
                note = "one 2-D conv at the small size, with the transposed conv before it"
                self._note(second_node.meta.get("source"), "Conv3d", note, swapped=True)
                args = (node.args[0], *second_node.args[1:])
                self._insert([node, second_node], JoinedUpConv3d(first, second), args)

    def _upsampled(self) -> None:
        of = self._of
        for node in list(of.graph.nodes):
            follower = of.user(node)
            conv = of.layer(follower)
            if (
                follower is not None
                and isinstance(conv, FoldedConv)
                and conv.axes == 2
                and not conv.transposed
                and conv.weight.device.type == "cpu"
                and conv.groups == 1
                and len(follower.args) == 1
                and (conv.kernel_size, conv.stride, conv.dilation) == ((3, 3), (1, 1), (1, 1))
                and conv.padding in ((1, 1), "same")
                and self._doubles(node)
                and of.may_join([node, follower])
            ):
                source = follower.meta.get("source")
                note = "2x2 convs of the map before its pixels were doubled"
                self._note(source, "Upsample and Conv2d", note, swapped=True)
                self._insert([node, follower], UpsampledConv2d(conv), (node.args[0],))

    def _doubles(self, node: Any) -> bool:
        """Whether a node doubles the pixels of a map in H and W."""
        layer = self._of.layer(node)
        if isinstance(layer, nn.Upsample) and is_stock(layer, (nn.Upsample,)):
            scale, mode, size = layer.scale_factor, layer.mode, layer.size
            if has_hooks(layer):
                return False
        elif node.op == "call_function" and node.target is F.interpolate and len(node.args) == 1:
            scale, mode = node.kwargs.get("scale_factor"), node.kwargs.get("mode", "nearest")
            size = node.kwargs.get("size")
        else:
            return False
        return mode in ("nearest", "nearest-exact") and size is None and scale in (2, 2.0, (2, 2))

    def _pools(self) -> None:
        for node in list(self._of.graph.nodes):
            options = self._pool_options(node)
            if options is None:
                continue
            name = node.target if node.op == "call_module" else node.name
            why = _why_not_pool(node, options) if self._on_cpu else "not on the CPU"
            if why:
                self._note(name, "MaxPool3d", why, swapped=False)
                continue
            window = {key: options[key] for key in _POOL_WINDOW if key in options}
            self._insert([node], FoldedMaxPool3d(**window), (node.args[0],))
            self._note(name, "MaxPool3d", "one axis after the other", swapped=True)

    def _pool_options(self, node: fx.Node) -> dict[str, Any] | None:
        """What a 3-D max-pool is told beside its input; None: the node is something else."""
        layer = self._of.layer(node)
        if isinstance(layer, nn.MaxPool3d) and is_stock(layer, (nn.MaxPool3d,)):
            if has_hooks(layer):
                return None
            return {name: getattr(layer, name) for name in _POOL_OPTIONS}
        if node.op == "call_function" and node.target in _MAX_POOLS:
            return dict(zip(_POOL_OPTIONS, node.args[1:], strict=False)) | dict(node.kwargs)
        return None

    def _note_expectations(self) -> None:
        """Say of softmax, product and sum that they stay."""
        for node in self._of.graph.nodes:
            layer = self._of.layer(node)
            is_softmax = isinstance(layer, nn.Softmax) or (
                node.target in (F.softmax, torch.softmax)
                if node.op == "call_function"
                else node.op == "call_method" and node.target == "softmax"
            )
            products = [user for user in node.users if _names(user) & {"mul", "__mul__"}]
            if is_softmax and any("sum" in _names(u) for p in products for u in p.users):
                name = node.target if layer is not None else node.name
                self._note(name, "softmax expectation", _NO_EXPECTATION, swapped=False)

    def _choose_layout(self) -> None:
        """Planar, as the kernels have it, or channels_last_3d, which suits oneDNN."""
        convs = [
            layer
            for n in self._of.graph.nodes
            if isinstance(layer := self._of.layer(n), FoldedConv)
        ]
        convs = [conv for conv in convs if conv.axes == 3]
        for_kernels = sum(
            conv.fits_kernel and (conv.transposed or conv.weight.shape[1] <= 128) for conv in convs
        )
        for conv in convs:
            conv.planar = 2 * for_kernels >= len(convs)

    def _free_views(self) -> None:
        """Views of results that fast layers may lay out in other ways become reshapes."""
        for node in self._of.graph.nodes:
            if node.op == "call_method" and node.target == "view" and not node.kwargs:
                sizes = node.args[1:]
                if not any(_is_dtype(size) for size in sizes) and self._of.may_copy(node):
                    node.target = "reshape"

    def _restore_layouts(self) -> None:
        """Python that is not traced is given tensors as stock layers lay them out."""
        graph = self._of.graph
        given = tuple(node for node in graph.nodes if node.op == "placeholder")
        for node in list(graph.nodes):
            if node.op == "call_module" and not is_of(
                self._of.layer(node), ("torch.nn", "gplws.nn")
            ):
                for value in node.all_input_nodes:
                    if value not in given:
                        with graph.inserting_before(node):
                            laid = graph.call_function(stock_layout, (value, given))
                        laid.meta.update(WHOLE)
                        node.replace_input_with(value, laid)


def _is_dtype(value: object) -> bool:
    """Whether an argument of a view is no size."""
    if isinstance(value, fx.Node):
        return value.target is getattr and value.args[1] == "dtype"
    return isinstance(value, torch.dtype)


def _names(node: fx.Node) -> set[str]:
    """What a node calls."""
    called = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return {called} if node.op in ("call_function", "call_method") else set()


def _is_constant(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_constant(entry) for entry in value)
    return value is None or isinstance(value, int)


def _why_not_pool(node: fx.Node, options: Mapping[str, Any]) -> str:
    """Why a 3-D max-pool has to stay; empty: it need not."""
    if options.get("dilation", 1) not in (1, (1, 1, 1)) or options.get("ceil_mode", False):
        return "dilation or ceil_mode"
    by_position = bool(node.args) and isinstance(node.args[0], fx.Node)
    if options.get("return_indices", False) or not by_position:
        return "its indices are used"
    if not all(_is_constant(options.get(key)) for key in _POOL_WINDOW):
        return "its window depends on shapes"
    return ""


def _fits(conv: nn.Module) -> bool:
    geometry = cast(Any, conv)
    return tuple(geometry.kernel_size) == (3, 3, 3) and not geometry.transposed
