"""Any network, for inference, with layers replaced by faster ones that compute the same.

A network is traced symbolically where that is possible, layer after layer from the inside: what
depends on values or shapes in Python stays the Python that it is, and the parts in it are replaced.
"""

from __future__ import annotations

import copy
import dis
import inspect
import io
import math
import operator
import pickle
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree

from gplws.models.gplws_net import GPLWSNet
from gplws.nn.blocks import (
    ConvBN3d,
    GroupParallel3d,
    RepConv3d,
    UpConv3d,
    fold_bn,
    why_not_fused,
)
from gplws.nn.inference import (
    DTYPES,
    FoldedConv,
    FoldedMaxPool3d,
    Framewise,
    JoinedUpConv3d,
    UpsampledConv2d,
    in_place,
    stock_layout,
)
from gplws.nn.layer_report import LayerReport, ModelReport
from gplws.nn.stock import has_hooks, is_stock

TOLERANCE = 1e-4
"""Largest difference that :func:`accelerate` accepts on an example, of the largest value; for
float32. bfloat16 has ``BFLOAT16_TOLERANCE``."""
BFLOAT16_TOLERANCE = 0.1
_TAKES_PARTS = ("call_module", "get_attr")
_CONVS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm2d, nn.BatchNorm3d)
_BLOCKS = (GroupParallel3d, UpConv3d, RepConv3d, ConvBN3d)
_MOST_MIDDLE = 96  # channels between two convs of one kernel call: more leave its cache


def accelerate(
    model: nn.Module, example: Tensor | Sequence[Any] | None = None
) -> tuple[nn.Module, ModelReport]:
    """A copy of a network for inference, faster, with the same results to rounding.

    Batch norm is folded into convs; 3-D convs go to the kernels of this package or to oneDNN,
    together with activations, sums with residuals and pointwise convs behind; a conv to few
    channels joins the transposed conv before it; 3-D max-pools are computed one axis after the
    other; 2-D convs behind a doubling of pixels see the small map; 2-D parts run in channels_last,
    few frames at a time. The network works as before otherwise, also under ``torch.compile`` and
    ``torch.export``, and gradients flow to its inputs. ``train()`` turns it back into the network
    that it was made from.

    A layer stays as it is where a hook is attached to it, where it is scripted, of another dtype
    than float32 and bfloat16, or where nothing is faster; a module whose Python depends on values
    or shapes stays, with its parts replaced. Batch norm is not folded into a conv then if the two
    meet only in that Python.

    Args:
        model: any module in eval mode on the CPU; it is not changed. On other devices only batch
            norms are folded.
        example: input, or sequence of inputs. With it, the fastest way for its shapes is measured
            for each layer, arguments that it leaves out are fixed at their defaults, and the result
            is compared with that of ``model``: if it differs by more than ``TOLERANCE`` or is
            not faster, the copy is of the network as it was, and the report says so.

    Returns:
        The new network, of a class derived from that of ``model``, and the report.

    Raises:
        TypeError: ``model`` is no module, or one that was scripted or compiled.
        ValueError: ``model`` is in training mode.

    Example:
        >>> model = gplws.models.FVNet().eval()
        >>> fast, report = gplws.accelerate(model)
        >>> fast(torch.rand(1, 3, 5, 64, 64)).depth.shape
        torch.Size([1, 64, 64])
        >>> print(report)  # doctest: +SKIP
    """
    _check(model)
    inputs = _inputs(example)
    report = ModelReport()
    if isinstance(model, _Accelerated):
        report.add("", model, "is accelerated already", swapped=False)
        fast: nn.Module = copy.deepcopy(model)
    elif isinstance(model, GPLWSNet):
        fast = _fused_gplws(model, report)
    else:
        fast = _Builder(copy.deepcopy(model), report, given=len(inputs)).build()
    if isinstance(fast, _Accelerated) and not isinstance(model, _Accelerated):
        fast.__dict__["_stock"] = (copy.deepcopy(model),)  # in a tuple: its weights are not listed
        fast.__dict__.pop("_layers", None)  # they are in there
    places = {name: index for index, (name, _) in enumerate(model.named_modules())}
    report.layers.sort(key=lambda layer: places.get(layer.name, len(places)))
    if not inputs:
        return fast, report
    return _tried(model, fast, inputs, report), report


def _check(model: object) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model: expected the module before it was scripted or traced")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        raise TypeError("model: expected the module before torch.compile; compile what comes out")
    if model.training:
        raise ValueError("model: expected a module in eval mode, got training mode; call eval()")


def _inputs(example: Tensor | Sequence[Any] | None) -> tuple[Any, ...]:
    if example is None:
        return ()
    return (example,) if isinstance(example, Tensor) else tuple(example)


def _fused_gplws(model: GPLWSNet, report: ModelReport) -> nn.Module:
    modules = dict(model.named_modules())
    blocks = {name: module for name, module in modules.items() if isinstance(module, _BLOCKS)}
    if not blocks:
        report.add("", model, "is on the kernels already", swapped=False)
        return copy.deepcopy(model)
    for name, module in modules.items():
        if has_hooks(module) or module.training:
            why = "hooks on" if has_hooks(module) else "training mode of"
            report.add("", model, f"{why} {name or 'itself'}", swapped=False)
            return copy.deepcopy(model)
    for name, module in blocks.items():
        why = _why_not_block(module)
        report.add(name, module, why or "kernel", swapped=not why)
    if not report.swapped:
        return copy.deepcopy(model)
    fast = model.fuse()
    fast.__class__ = _class_of(type(fast), None)
    return fast


@torch.no_grad()
def _tried(
    model: nn.Module, fast: nn.Module, inputs: tuple[Any, ...], report: ModelReport
) -> nn.Module:
    """``fast`` tuned for the inputs; a copy of ``model`` where it is not better."""

    def given_back(why: str) -> nn.Module:
        report.layers = [
            LayerReport(layer.name, layer.kind, False, why if layer.swapped else layer.note)
            for layer in report.layers
        ]
        return copy.deepcopy(model)

    def given() -> tuple[Any, ...]:  # networks may change what they are given
        return cast(tuple[Any, ...], _pytree.tree_map_only(Tensor, torch.clone, inputs))

    expected = model(*given())
    convs = [module for module in fast.modules() if isinstance(module, FoldedConv)]
    for conv in convs:
        conv.tuning = True
    try:
        got = fast(*given())
    except Exception as error:  # such as of Python that asks for strides
        return given_back(f"fails on the example: {_first_line(error)}")
    finally:
        for conv in convs:
            conv.tuning = False
    report.error = _difference(got, expected)
    seconds = [math.inf, math.inf]
    for _ in range(3):
        for index, candidate in enumerate((model, fast)):
            arguments = given()
            _wait_for(arguments)
            start = time.perf_counter()
            _wait_for(candidate(*arguments))
            seconds[index] = min(seconds[index], time.perf_counter() - start)
    report.seconds = (seconds[0], seconds[1])
    narrow = any(t.dtype == torch.bfloat16 for t in _tensors((inputs, expected)))
    wrong = not report.error <= (BFLOAT16_TOLERANCE if narrow else TOLERANCE)
    if not wrong and seconds[1] <= seconds[0]:
        return fast
    return given_back(
        f"results differ by {report.error:.1e}" if wrong else "no faster on the example"
    )


def _wait_for(tree: Any) -> None:
    """Until GPUs have computed the tensors of a tree."""
    for device in {tensor.device for tensor in _tensors(tree) if tensor.is_cuda}:
        torch.cuda.synchronize(device)


def _first_line(error: Exception) -> str:
    """What an error says, in short."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:80]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _difference(got: Any, expected: Any) -> float:
    """Largest difference of two trees of tensors, each as a share of its largest value."""
    first, second = _tensors(got), _tensors(expected)
    if [t.shape for t in first] != [t.shape for t in second]:
        return math.inf
    worst = 0.0
    for a, b in zip(first, second, strict=True):
        if a.numel() == 0 or torch.equal(a, b):
            continue
        a, b = a.double(), b.double()
        same = a.isfinite() == b.isfinite()
        if not bool(same.all()):
            return math.inf
        a, b = a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)
        worst = max(worst, ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item())
    return worst


def _is_of(module: nn.Module, packages: str | tuple[str, ...]) -> bool:
    """Whether the ``forward`` of a module is written in one of the packages."""
    where = type(module).forward.__module__  # None: code that torch.fx has written
    return where is not None and where.startswith(packages)


# ---- tracing


class _UntraceableError(Exception):
    """What a module does cannot be recorded."""


class _Value(fx.Proxy):
    """A recorded value. Python that asks for its type is refused: it is no tensor yet."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # what isinstance() looks at
        caller = sys._getframe(1)
        code = caller.f_code
        own = caller.f_globals.get("__name__", "").partition(".")[0] == "torch"
        # Compiled code of torch asks too, when it is called.
        asks = not _TYPE_QUESTIONS.isdisjoint(code.co_names)
        asks |= dis.opname[code.co_code[caller.f_lasti]] == "MATCH_CLASS"
        if asks and (not own or code is torch.is_tensor.__code__):
            raise cast(_Tracer, self.tracer).refusal(_ASKS_TYPES)
        return _Value


_IN_PLACE_OPERATORS = tuple(
    f"i{name}"
    for name in (
        *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"),
        *("and", "or", "xor", "matmul"),
    )
)


def _recorded_in_place(name: str) -> Any:
    def change(self: fx.Proxy, other: Any) -> fx.Proxy:
        changed = self.tracer.create_proxy("call_function", in_place, (name, self, other), {})
        changed.node.meta.update(_WHOLE)
        return changed

    return change


_WHOLE = {"is_wrapped": True}  # torch.fx looks into functions without it when a file is read
for _operator in _IN_PLACE_OPERATORS:  # torch.fx would record x += y as x + y
    setattr(_Value, f"__{_operator}__", _recorded_in_place(_operator))

_TYPE_QUESTIONS = {"isinstance", "__class__"}
_ASKS_TYPES = "its Python asks for the type of a value"


_ASKS_MODES = "its Python asks for the gradient or autocast mode"
_MODE_QUESTIONS = {"is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled"}
_ASKS_RECORDING = "its Python asks whether it is recorded"
_RECORDING_QUESTIONS = {"Proxy", "is_fx_tracing", "is_fx_symbolic_tracing"}


def _why_not_recorded(function: Any) -> str:
    """Why the code of a method has to see values or modes themselves; empty: it need not.

    ``type`` and ``hasattr`` see what is recorded instead.
    """
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return ""
    if not _MODE_QUESTIONS.isdisjoint(code.co_names):
        return _ASKS_MODES
    if not _RECORDING_QUESTIONS.isdisjoint(code.co_names):
        return _ASKS_RECORDING
    names_types = any(
        step.opname == "LOAD_GLOBAL" and step.argval in ("type", "hasattr")
        for step in dis.get_instructions(code)
    )
    return _ASKS_TYPES if names_types else ""


class _Tracer(fx.Tracer):
    """Records a module, inner modules included, down to ``leaves`` and the layers of torch.nn."""

    proxy_buffer_attributes = True

    def __init__(self, leaves: Mapping[int, str]) -> None:
        super().__init__()
        self._leaves = leaves
        self._modes = self._current_modes()
        self._thread = threading.get_ident()
        self.refused: _UntraceableError | None = None

    def refusal(self, why: str) -> _UntraceableError:
        """The error to raise; it is kept, for Python that catches errors."""
        self.refused = _UntraceableError(why)
        return self.refused

    @staticmethod
    def _current_modes() -> tuple[bool, ...]:
        return (
            torch.is_autocast_enabled("cpu"),
            torch.is_autocast_enabled("cuda"),
            torch.is_grad_enabled(),
        )

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if id(m) in self._leaves:
            return True
        return _is_of(m, "torch.nn") and not isinstance(m, nn.Sequential)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if self._current_modes() != self._modes:
            raise self.refusal("it changes autocast or gradient mode")
        return super().create_node(*args, **kwargs)

    # While it records, torch.fx looks at each call and attribute of any module, also at those of
    # other threads, which are none of ours.

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        why = "" if self.is_leaf_module(m, "") else _why_not_recorded(type(m).forward)
        if why:
            raise self.refusal(why)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)


_RECORDING = threading.RLock()  # two recordings at once would leave torch.nn as torch.fx has it


def _trace(
    module: nn.Module, leaves: Mapping[int, str], method: str, *, given: int | None
) -> fx.Graph | str:
    """The graph of a method, or why there is none.

    Args:
        given: how many arguments will be given; the others get their defaults. None: a method with
            defaults is not traced, as branches may hang on what is given.
    """
    function = getattr(module, method)
    signature = list(inspect.signature(function).parameters.values())
    if any(p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in signature):
        return "its arguments are of any number"
    if why := _why_not_recorded(function):
        return why
    optional = {p.name: p.default for p in signature if p.default is not p.empty}
    if optional and given is None:
        return f"its argument {next(iter(optional))} is optional"
    fixed = {p.name: p.default for p in signature[given or 0 :] if p.name in optional}
    for name, default in fixed.items():
        if isinstance(default, tuple | list | dict):  # torch.fx takes them apart
            return f"its argument {name} is optional, of several values"
    before = torch.get_rng_state()
    state = [list(_contents(vars(m))) for m in module.modules()]
    tracer = _Tracer(leaves)
    tracer.traced_func_name = method
    try:
        with _RECORDING:
            graph = tracer.trace(module, concrete_args=fixed or None)
        if tracer.refused is not None:
            raise tracer.refused
    except Exception as error:  # tracing runs foreign code on values that are none
        return f"its Python depends on values: {_first_line(error)}"
    if not torch.equal(before, torch.get_rng_state()):
        torch.set_rng_state(before)
        return "it draws random numbers"
    if any(key.startswith("_tensor_constant") for key in vars(module)):  # torch.fx keeps them there
        return "it makes tensors of its own"
    for m, before_it in zip(module.modules(), state, strict=True):
        after_it = list(_contents(vars(m)))
        if len(after_it) != len(before_it) or any(map(operator.is_not, after_it, before_it)):
            return "it keeps results in attributes"
    for node in graph.nodes:
        node.type = None  # annotations that are strings could not be written to a file
    graph._tracer_cls = None  # reading one back asks for no tracer of ours
    return graph


def _contents(value: object, outer: tuple[int, ...] = ()) -> Iterator[object]:
    """What a value holds, through dicts, lists, tuples, sets and deques."""
    kind = type(value)  # not isinstance(): recorded values refuse that
    if id(value) in outer or not issubclass(kind, dict | list | tuple | set | deque):
        yield value
        return
    entries = cast(Any, value)
    for entry in (*entries.keys(), *entries.values()) if issubclass(kind, dict) else entries:
        yield from _contents(entry, (*outer, id(value)))


# ---- nodes

_RELU_FUNCTIONS = (F.relu, torch.relu, torch.relu_, F.relu_)
_ADDITIONS = (operator.add, operator.iadd, torch.add)
_ADDITIONS_IN_PLACE: tuple[object, ...] = (in_place, operator.iadd, "add_")


class _Graph:
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
        if node.op == "call_function" and node.target in _RELU_FUNCTIONS:
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
        by_function = node.op == "call_function" and node.target in _ADDITIONS
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
            return changes or name in _IN_PLACE_OPERATORS or any(a is True for a in node.args)
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


_NEW_MEMORY = (*_CONVS, FoldedConv, JoinedUpConv3d, UpsampledConv2d, FoldedMaxPool3d)


def _may_change(module: nn.Module) -> bool:
    """Whether a layer, or one inside of it, may change a tensor in place."""
    if isinstance(module, fx.GraphModule):
        found = _Graph(module)
        return any(found.changes(node) for node in module.graph.nodes)
    if not _is_of(module, ("torch.nn", "gplws.nn")) or has_hooks(module):
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


# ---- parts of a 2-D network that see one frame at a time

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
    *_RELU_FUNCTIONS,
    *_ADDITIONS,
    *(operator.sub, operator.mul, operator.truediv, operator.neg),
    *(torch.sub, torch.mul, torch.div, torch.sigmoid, torch.tanh, torch.zeros_like),
    *(F.leaky_relu, F.sigmoid, F.tanh, F.gelu, F.silu, F.dropout, F.interpolate),
    *(F.avg_pool2d, F.max_pool2d, F.adaptive_avg_pool2d),
    in_place,
}
_FRAME_METHODS = {"relu", "relu_", "add", "add_", "sub", "mul", "div", "sigmoid", "tanh"}


def _is_framewise(graph: fx.Graph, module: nn.Module, leaves: set[int]) -> bool:
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


# ---- building


class _Builder:
    """Turns a module into its fast form, from the inside outwards.

    Args:
        model: taken apart for the new one.
        report: what was done goes there.
        given: how many arguments are known to be given.
    """

    def __init__(self, model: nn.Module, report: ModelReport, *, given: int) -> None:
        self._report = report
        # Without weights nothing is known: layers look at what they are given then.
        self._on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
        self._model = self._with_merged_branches(model)
        # Tracing may leave something behind in the modules: it sees a copy.
        self._probe = copy.deepcopy(self._model)
        self._given = given or None
        self._closed: dict[int, str] = {}  # never looked into
        self._leaves: dict[int, str] = {}  # not traced as part of something larger
        self._graphs: dict[int, fx.Graph] = {}
        self._framewise: dict[int, str] = {}
        self._surveyed: set[int] = set()
        self._built: dict[int, nn.Module] = {}

    def build(self) -> nn.Module:
        """The fast form of the model."""
        self._survey(self._probe)
        built = self._fast(self._model, self._probe, "")
        if isinstance(built, _Accelerated):
            return built
        if built is self._model:
            built.__class__ = _class_of(type(built), None)
            return built
        return _with_method(self._model, "forward", built, {})

    def _with_merged_branches(self, model: nn.Module) -> nn.Module:
        """``model`` with one conv for the branches of each re-parameterisable conv."""
        merged: dict[nn.Module, nn.Module] = {}
        for name, module in list(model.named_modules()):
            inner = is_stock(module, (GroupParallel3d,))  # its own fuse() does all
            for child_name, child in [] if inner else _children(module):
                if not isinstance(child, RepConv3d | ConvBN3d) or _why_not_block(child):
                    continue
                if child not in merged:
                    merged[child] = child.fuse().eval()
                    path = f"{name}.{child_name}" if name else child_name
                    self._report.add(path, child, "one conv", swapped=True)
                setattr(module, child_name, merged[child])
        return model

    def _survey(self, module: nn.Module) -> None:
        """Find out which modules can be traced, inner ones first."""
        key = id(module)
        if key in self._surveyed:
            return
        self._surveyed.add(key)
        if isinstance(module, torch.jit.ScriptModule):
            self._closed[key] = self._leaves[key] = "it is scripted"
            return
        if isinstance(module, _Accelerated):
            self._closed[key] = self._leaves[key] = "is accelerated already"
            return
        if module.training:
            self._closed[key] = self._leaves[key] = "it is in training mode"
            return
        if is_stock(module, _BLOCKS):
            self._leaves[key] = _why_not_block(module)
            return
        for child in module.children():
            self._survey(child)
        method = _method_of(module)
        if _is_of(module, "torch.nn") and not isinstance(module, nn.Sequential):
            if isinstance(module, nn.ModuleList | nn.ModuleDict):
                self._leaves[key] = ""
            return
        if has_hooks(module) and module is not self._probe:
            self._leaves[key] = "a hook is attached"
            return
        root = module is self._probe
        found = _trace(module, self._leaves, method, given=self._given if root else None)
        if isinstance(found, str) and found.endswith("is optional"):
            defaults = _trace(module, self._leaves, method, given=0)
            if isinstance(defaults, str):
                self._leaves[key] = defaults
            elif root:
                self._leaves[key] = f"{found}; give an example"
            return
        if isinstance(found, str):
            self._leaves[key] = found
            return
        if _calls_into(found, module, self._leaves):
            self._leaves[key] = "it calls a part of a module that is not traced"
            return
        if method != "forward":
            self._leaves[key] = f"only {method} is traced"
        elif self._on_cpu and _is_framewise(found, module, set(self._framewise)):
            self._framewise[key] = ""
        if key not in self._framewise and self._framewise:
            leaves = {**self._leaves, **self._framewise}
            apart = _trace(module, leaves, method, given=self._given if root else None)
            if isinstance(apart, fx.Graph) and not _calls_into(apart, module, leaves):
                found = apart
        self._graphs[key] = found

    def _fast(
        self, module: nn.Module, probe: nn.Module, path: str, *, seen: bool = False
    ) -> nn.Module:
        """The fast form of a part; where Python has ``seen`` it, with its class and attributes."""
        key = id(probe)
        if key not in self._built:
            self._built[key] = self._made(module, probe, path, seen=seen)
        return self._built[key]

    def _made(self, module: nn.Module, probe: nn.Module, path: str, *, seen: bool) -> nn.Module:
        key, note = id(probe), self._leaves.get(id(probe), "")
        if key in self._closed:
            self._report.add(path, module, note, swapped=False)
            return module
        if is_stock(module, _BLOCKS):
            if note:
                self._report.add(path, module, note, swapped=False)
                return module
            self._report.add(path, module, "kernel", swapped=True)
            return cast(Any, module).fuse().eval()
        graph = self._graphs.get(key)
        if graph is None:
            return self._by_parts(module, probe, path, note)
        called = {str(n.target).partition(".")[0] for n in graph.nodes if n.op in _TAKES_PARTS}
        # Not eval(): a part that is in training mode on purpose stays so.
        network: nn.Module = fx.GraphModule(module, graph, type(module).__name__)
        for node in graph.nodes:
            if node.op == "call_module":
                inner = probe.get_submodule(node.target)
                if _is_stock_layer(inner):
                    continue
                full = f"{path}.{node.target}" if path else node.target
                fast = self._fast(module.get_submodule(node.target), inner, full)
                _replace(network, node.target, fast)
        _Passes(cast(fx.GraphModule, network), path, self._report, on_cpu=self._on_cpu).run()
        if key in self._framewise:
            self._report.add(path, module, "few frames at a time, channels_last", swapped=True)
            network = Framewise(network)
        method = _method_of(module)
        if method == "forward" and path and not seen:
            return network
        if method != "forward":
            note = f"all but {method}() stays; no kernel computes an expectation by softmax"
            self._report.add(path, module, note, swapped=False)
        rest = {
            name: self._fast(child, probe.get_submodule(name), f"{path}.{name}" if path else name)
            for name, child in _children(module)
            if name not in called
        }
        return _with_method(module, method, network, rest)

    def _by_parts(self, module: nn.Module, probe: nn.Module, path: str, note: str) -> nn.Module:
        """The module itself, its children replaced."""
        if _is_stock_layer(module):
            return _fast_layer(module, path, self._report)
        if note:
            self._report.add(path, module, f"{note}; its parts were replaced", swapped=False)
        for name, child in _children(module):
            full = f"{path}.{name}" if path else name
            fast = self._fast(child, probe.get_submodule(name), full, seen=True)
            if fast is not child:
                module._modules[name] = fast
        return module


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """What a module holds, under every name: ``named_children`` gives each part one name only."""
    return [(name, child) for name, child in module._modules.items() if child is not None]


def _method_of(module: nn.Module) -> str:
    """The method that becomes fast: ``forward``, or what the class names as ``core``."""
    core = getattr(type(module), "core", None)
    return core if isinstance(core, str) else "forward"


def _calls_into(graph: fx.Graph, module: nn.Module, leaves: Mapping[int, str]) -> bool:
    """Whether a graph names parts of leaves, which are no more once the leaves are replaced."""
    for node in graph.nodes:
        if node.op in _TAKES_PARTS:
            whole = str(node.target).rpartition(".")[0]
            while whole:
                part = module.get_submodule(whole)
                if id(part) in leaves and not isinstance(part, nn.ModuleList | nn.ModuleDict):
                    return True
                whole = whole.rpartition(".")[0]
    return False


def _is_stock_layer(module: nn.Module) -> bool:
    return _is_of(module, "torch.nn") and not isinstance(
        module, nn.Sequential | nn.ModuleList | nn.ModuleDict | torch.jit.ScriptModule
    )


def _replace(module: nn.Module, target: str, new: nn.Module) -> None:
    parent, _, name = target.rpartition(".")
    module.get_submodule(parent)._modules[name] = new


def _why_not_block(block: nn.Module) -> str:
    """Why a block of this package has to stay; empty: it need not."""
    if any(module.training for module in block.modules()):
        return "it is in training mode"
    weight = next(block.parameters())
    # Elsewhere than on the CPU there are kernels for float16 as well.
    known = (*DTYPES, torch.float16) if weight.device.type != "cpu" else DTYPES
    return why_not_fused(block) or _why_not_dtype(weight, known)


def _why_not_dtype(weight: Tensor, known: Sequence[torch.dtype] = DTYPES) -> str:
    if weight.dtype in known:
        return ""
    return f"weights of {str(weight.dtype).removeprefix('torch.')}"


def _why_not(conv: nn.Module) -> str:
    """Why a conv has to stay; empty: it need not."""
    if not is_stock(conv, _CONVS):
        return "a class of its own"
    if has_hooks(conv):
        return "a hook is attached"
    if conv.training:
        return "it is in training mode"
    weight, mode = cast(Tensor, conv.weight), cast(str, conv.padding_mode)
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "its shape is not known yet"
    if mode != "zeros":
        return f"padding_mode {mode}"
    return _why_not_dtype(weight)


def _describe(conv: FoldedConv, folded: Sequence[str]) -> str:
    device = conv.weight.device.type
    if device != "cpu":
        engine = "stock conv"
    elif conv.fits_kernel:
        engine = "kernel or oneDNN" if not conv.transposed else "kernel"
    elif conv.axes == 3 and not conv.transposed:
        engine = "oneDNN"
    else:
        engine = "stock conv in channels_last"
    return " + ".join((engine, *folded))


def _fast_layer(module: nn.Module, path: str, report: ModelReport) -> nn.Module:
    """A single layer of torch.nn in its fast form."""
    if isinstance(module, _CONVS):
        why = _why_not(module)
        if not why and isinstance(module, nn.ConvTranspose3d):
            why = "it may be called with an output size"
        if not why and (module.weight.device.type != "cpu" or not isinstance(module, nn.Conv3d)):
            why = "nothing to fuse it with"
        if why:
            report.add(path, module, why, swapped=False)
            return module
        conv = FoldedConv(module, module.weight, module.bias).eval()
        report.add(path, module, _describe(conv, ()), swapped=True)
        return conv
    if isinstance(module, _NORMS):
        report.add(path, module, "no conv known before it", swapped=False)
    return module


class _Passes:
    """What is replaced in one graph."""

    def __init__(
        self, module: fx.GraphModule, path: str, report: ModelReport, *, on_cpu: bool
    ) -> None:
        self._of = _Graph(module)
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
            if isinstance(layer, _NORMS):
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
        dropouts = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity)
        for node in list(self._of.graph.nodes):
            layer = self._of.layer(node)
            nothing = layer is not None and is_stock(layer, dropouts) and not layer.training
            nothing = nothing and layer is not None and not has_hooks(layer)
            if node.op == "call_function" and node.target is F.dropout:
                training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
                nothing = training is False
            if nothing and node.args and isinstance(node.args[0], fx.Node):
                node.replace_all_uses_with(node.args[0])
                self._of.graph.erase_node(node)
        self._of.number()

    def _fold_convs(self) -> None:
        nodes = [n for n in self._of.graph.nodes if isinstance(self._of.layer(n), _CONVS)]
        # Those that the kernels take come first: they add residuals at no cost.
        nodes.sort(
            key=lambda n: (not _fits(cast(nn.Module, self._of.layer(n))), -self._of.position[n])
        )
        for node in nodes:
            self._fold_conv(node)

    def _fold_conv(self, node: fx.Node) -> None:
        of, conv = self._of, cast(Any, self._of.layer(node))
        why = _why_not(conv)
        if not why and (len(node.args) != 1 or node.kwargs):
            why = "called with more than its input"
        if why:
            self._note(node.target, conv, why, swapped=False)
            return
        weight, bias = conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
        chain, folded = [node], []

        follower = of.user(node)
        norm = of.layer(follower)
        if follower is not None and _folds(norm, conv) and tuple(follower.args) == (node,):
            weight, bias = _folded(conv, weight, bias, cast(nn.BatchNorm3d, norm))
            chain.append(follower)
            folded.append("batch norm")
        slopes = [1.0, 1.0]
        residual: fx.Node | None = None
        keeps_dtype = False
        follower = of.user(chain[-1])
        slope = of.slope(follower, chain[-1])
        if follower is not None and slope is not None and of.may_join([*chain, follower]):
            chain.append(follower)
            slopes[0] = slope
            folded.append(_name(slope))
        follower = of.user(chain[-1])
        addend = of.addend(follower, chain[-1])
        if follower is not None and addend is not None and of.may_join([*chain, follower]):
            chain.append(follower)
            residual = addend
            keeps_dtype = follower.target in _ADDITIONS_IN_PLACE
            folded.append("residual")
            follower = of.user(chain[-1])
            slope = of.slope(follower, chain[-1])
            if follower is not None and slope is not None and of.may_join([*chain, follower]):
                chain.append(follower)
                slopes[1] = slope
                folded.append(_name(slope))
        if not of.may_join(chain):
            self._note(
                node.target, conv, "something changes in place before its norm", swapped=False
            )
            return
        if conv.weight.device.type != "cpu" and "batch norm" not in folded:
            self._note(node.target, conv, f"on {conv.weight.device.type}", swapped=False)
            return
        layer = FoldedConv(
            conv,
            weight,
            bias,
            slope=slopes[0],
            residual_slope=slopes[1],
            keeps_dtype=keeps_dtype,
        )
        args = (node.args[0],) if residual is None else (node.args[0], residual)
        self._note(node.target, conv, _describe(layer, folded), swapped=True)
        target = node.target
        new = self._insert(chain, layer, args)
        new.meta["source"] = target

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
        of = self._of
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        for node in list(of.graph.nodes):
            layer = of.layer(node)
            if isinstance(layer, nn.MaxPool3d) and is_stock(layer, (nn.MaxPool3d,)):
                if has_hooks(layer):
                    continue
                found = {name: getattr(layer, name) for name in names}
            elif node.op == "call_function" and node.target in _MAX_POOLS:
                found = dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
                found.pop("input", None)
            else:
                continue
            name = node.target if node.op == "call_module" else node.name
            if not self._on_cpu:
                self._note(name, "MaxPool3d", "not on the CPU", swapped=False)
                continue
            if found.pop("dilation", 1) not in (1, (1, 1, 1)) or found.pop("ceil_mode", False):
                self._note(name, "MaxPool3d", "dilation or ceil_mode", swapped=False)
                continue
            if found.pop("return_indices", False) or not isinstance(
                node.args[0] if node.args else None, fx.Node
            ):
                self._note(name, "MaxPool3d", "its indices are used", swapped=False)
                continue
            if not all(_is_constant(value) for value in found.values()):
                self._note(name, "MaxPool3d", "its window depends on shapes", swapped=False)
                continue
            source = node.args[0]
            self._insert([node], FoldedMaxPool3d(**found), (source,))
            self._note(name, "MaxPool3d", "one axis after the other", swapped=True)

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
            if node.op == "call_module" and not _is_of(
                self._of.layer(node), ("torch.nn", "gplws.nn")
            ):
                for value in node.all_input_nodes:
                    if value not in given:
                        with graph.inserting_before(node):
                            laid = graph.call_function(stock_layout, (value, given))
                        laid.meta.update(_WHOLE)
                        node.replace_input_with(value, laid)


def _is_dtype(value: object) -> bool:
    """Whether an argument of a view is no size."""
    if isinstance(value, fx.Node):
        return value.target is getattr and value.args[1] == "dtype"
    return isinstance(value, torch.dtype)


_NO_EXPECTATION = "there is no kernel for it; it takes little time beside the convs"


def _names(node: fx.Node) -> set[str]:
    """What a node calls."""
    called = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return {called} if node.op in ("call_function", "call_method") else set()


def _is_constant(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_constant(entry) for entry in value)
    return value is None or isinstance(value, int)


_MAX_POOLS = {F.max_pool3d, cast(Any, F)._max_pool3d, torch.max_pool3d}


def _name(slope: float) -> str:
    return "relu" if slope == 0 else "leaky relu"


def _fits(conv: nn.Module) -> bool:
    geometry = cast(Any, conv)
    return tuple(geometry.kernel_size) == (3, 3, 3) and not geometry.transposed


def _folds(norm: nn.Module | None, conv: Any) -> bool:
    """Whether a layer is a batch norm over what a conv gives, with fixed statistics."""
    if norm is None or not is_stock(norm, _NORMS) or has_hooks(norm) or norm.training:
        return False
    found = cast(nn.BatchNorm3d, norm)
    return (
        found.running_mean is not None
        and found.running_var is not None
        and found.num_features == conv.out_channels
        and len(conv.kernel_size) == (2 if isinstance(norm, nn.BatchNorm2d) else 3)
    )


def _folded(
    conv: Any, weight: Tensor, bias: Tensor | None, norm: nn.BatchNorm3d
) -> tuple[Tensor, Tensor]:
    """Weight and bias with a batch norm folded in, also of a transposed conv."""
    with torch.no_grad():
        if not conv.transposed:
            return fold_bn(weight, bias, norm)
        # (C, K / groups, ...) -> (K, C / groups, ...), as of a conv, and back.
        turned = weight.unflatten(0, (conv.groups, -1)).transpose(1, 2).flatten(0, 1)
        turned, bias = fold_bn(turned, bias, norm)
        back = turned.unflatten(0, (conv.groups, -1)).transpose(1, 2).flatten(0, 1)
        return back.contiguous(), bias


# ---- the new model


class _MergedError(AttributeError):
    """Somebody asks for a part that is no more."""


class _Accelerated(nn.Module):
    """What accelerated networks have beside their own class."""

    def train(self, mode: bool = True) -> Any:
        """For ``True``: become the network that this one was made from, on stock ops.

        All that was folded is undone: weights, names and gradients are those of that network, as it
        was then. After training, ``accelerate`` makes a fast copy of it again.
        """
        if not mode:
            try:
                return super().train(False)
            except _MergedError:  # a train() of its class looks for parts
                return nn.Module.train(self, False)
        if "_stock" not in self.__dict__:
            raise RuntimeError(
                "a part of an accelerated network is for inference: call train() of the whole"
            )
        (stock,) = self.__dict__["_stock"] or _refuse(_NOT_WRITTEN)
        self.__class__ = type(stock)
        self.__dict__.clear()
        self.__dict__.update(stock.__dict__)
        return self.train(True)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for key in ("_stock", "_layers"):
            for kept in self.__dict__.get(key, ()):
                kept._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in self.__dict__.get("_merged", ()):
                raise _MergedError(
                    f"{name!r} was merged into the accelerated network; the one that it was made "
                    "from has it"
                ) from None
            raise

    def __copy__(self) -> Any:
        new = _empty(type(self).__bases__[1], cast(Any, type(self))._method)
        new.__dict__.update(self.__dict__)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # As for any module; that of torch.fx.GraphModule would build its graph anew.
        new = _empty(type(self).__bases__[1], cast(Any, type(self))._method)
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        original = type(self).__bases__[1]
        if issubclass(original, fx.GraphModule):
            original = fx.GraphModule  # each of them has a class that files cannot name
        state = self.__dict__.copy()
        if not _is_picklable(state.get("_stock"), protocol):
            state["_stock"] = ()
        return (_empty, (original, cast(Any, type(self))._method), state)


class _AcceleratedSequential(_Accelerated):
    """A sequence computed as a whole; one by one, its layers are those that it was made from."""

    def _one_by_one(self) -> nn.Sequential:
        kept = self.__dict__.get("_stock") or self.__dict__.get("_layers")
        (layers,) = kept or _refuse(_NOT_WRITTEN)
        return layers

    def __getitem__(self, index: slice | int) -> nn.Module:
        return self._one_by_one()[index]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._one_by_one())

    def __len__(self) -> int:
        return len(self._one_by_one())


_NOT_WRITTEN = (
    "the network that this accelerated one was made from could not be pickled, and is not in its "
    "file: call accelerate() anew"
)


def _refuse(why: str) -> NoReturn:
    raise RuntimeError(why)


class _WithoutTensors(pickle.Pickler):
    def persistent_id(self, obj: Any) -> str | None:
        return "tensor" if isinstance(obj, Tensor) else None


def _is_picklable(value: object, protocol: Any) -> bool:
    try:
        _WithoutTensors(io.BytesIO(), protocol).dump(value)
    except Exception:  # classes raise what they like
        return False
    return True


def _empty(original: type[nn.Module], method: str | None) -> nn.Module:
    """An instance without contents, for copying and unpickling."""
    found = _class_of(original, method)
    return object.__new__(found)


_CLASSES: dict[tuple[type[nn.Module], str | None], type[nn.Module]] = {}


def _class_of(original: type[nn.Module], method: str | None) -> type[nn.Module]:
    """The class of accelerated instances of a class; ``method`` is computed by a graph."""
    key = (original, method)
    if key not in _CLASSES:
        contents: dict[str, Any] = {"_method": method, "__module__": original.__module__}
        if method is not None:

            def computed(self: Any, *args: Any, **kwargs: Any) -> Any:
                return stock_layout(self.accelerated(*args, **kwargs), (args, kwargs))

            computed.__doc__ = getattr(original, method).__doc__
            signature = inspect.signature(getattr(original, method))
            cast(Any, computed).__signature__ = signature
            contents[method] = computed
        of_layers = method is not None and issubclass(original, nn.Sequential)
        bases = (_AcceleratedSequential if of_layers else _Accelerated, original)
        _CLASSES[key] = type(f"Accelerated{original.__name__}", bases, contents)
    return _CLASSES[key]


def _with_method(
    module: nn.Module, method: str, network: nn.Module, rest: Mapping[str, nn.Module]
) -> nn.Module:
    """The module with one method computed by ``network``; of its parts only ``rest`` stay."""
    merged = tuple(name for name in module._modules if name not in rest)
    if isinstance(module, nn.Sequential):
        layers = copy.copy(module)
        layers._modules = module._modules.copy()
        module.__dict__["_layers"] = (layers,)
    module._modules.clear()
    module._modules.update(rest)
    module.__dict__.pop("_graph", None)  # of a torch.fx.GraphModule, whose parts are no more
    module.__class__ = _class_of(type(module), method)
    module.__dict__["_merged"] = merged
    module.add_module("accelerated", network)
    return module
