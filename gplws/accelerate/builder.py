"""Turns a network into its fast form, from the inside outwards."""

from __future__ import annotations

import dis
from collections.abc import Set
from types import FunctionType
from typing import Any, cast

import torch
from torch import fx, nn

from gplws.accelerate.framewise import is_framewise
from gplws.accelerate.layers import (
    BLOCKS,
    FORWARD_REPLACED,
    fast_layer,
    is_of,
    is_stock_layer,
    why_not_block,
)
from gplws.accelerate.passes import Passes
from gplws.accelerate.tracing import Untraced, trace
from gplws.accelerate.wrapped import Accelerated, class_of, with_method
from gplws.nn.blocks import ConvBN3d, GroupParallel3d, RepConv3d, copied
from gplws.nn.inference import Framewise
from gplws.nn.layer_report import ModelReport
from gplws.nn.stock import has_hooks, is_stock

_TAKES_PARTS = ("call_module", "get_attr")


class Builder:
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
        self._probe = copied(self._model)
        self._given = given or None
        self._closed: set[int] = set()  # never looked into
        self._leaves: dict[int, str] = {}  # why not traced as part of something larger
        self._graphs: dict[int, fx.Graph] = {}
        self._framewise: set[int] = set()
        self._surveyed: set[int] = set()
        self._built: dict[int, nn.Module] = {}

    def build(self) -> nn.Module:
        """The fast form of the model."""
        self._survey(self._probe)
        built = self._fast(self._model, self._probe, "")
        if isinstance(built, Accelerated):
            return built
        if built is self._model:
            built.__class__ = class_of(type(built), None)
            return built
        return with_method(self._model, "forward", built, {})

    def _with_merged_branches(self, model: nn.Module) -> nn.Module:
        """``model`` with one conv for the branches of each re-parameterisable conv."""
        merged: dict[nn.Module, nn.Module] = {}
        whole = {part for m in model.modules() if _why_closed(m) for part in m.modules()}
        for name, module in list(model.named_modules()):
            # The fuse() of a group parallel module does all.
            stays = module in whole or is_stock(module, (GroupParallel3d,))
            for child_name, child in [] if stays else _children(module):
                if not isinstance(child, RepConv3d | ConvBN3d) or why_not_block(child):
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
        if why := _why_closed(module):
            self._closed.add(key)
            self._leaves[key] = why
            return
        if is_stock(module, BLOCKS):
            self._leaves[key] = why_not_block(module)
            return
        for child in module.children():
            self._survey(child)
        if _replaced_methods(module):
            self._leaves[key] = FORWARD_REPLACED
        elif not is_of(module, "torch.nn") or isinstance(module, nn.Sequential):
            self._record(module)
        elif isinstance(module, nn.ModuleList | nn.ModuleDict):
            self._leaves[key] = ""

    def _record(self, module: nn.Module) -> None:
        """Keep the graph of a module, or the reason why it is to be no part of another one's."""
        key, method = id(module), _method_of(module)
        if has_hooks(module) and module is not self._probe:
            self._leaves[key] = "a hook is attached"
            return
        found = self._traced(module, self._leaves.keys())
        if isinstance(found, Untraced):
            if why := self._why_leaf(module, found):
                self._leaves[key] = why
            return
        if method != "forward":
            self._leaves[key] = f"only {method} is traced"
        elif self._on_cpu and is_framewise(found, module, self._framewise):
            self._framewise.add(key)
        if self._framewise and key not in self._framewise:  # its parts may be
            apart = self._traced(module, self._leaves.keys() | self._framewise)
            found = found if isinstance(apart, Untraced) else apart
        self._graphs[key] = found

    def _traced(self, module: nn.Module, leaves: Set[int]) -> fx.Graph | Untraced:
        given = self._given if module is self._probe else None
        found = trace(module, leaves, _method_of(module), given=given)
        if isinstance(found, fx.Graph) and _calls_into(found, module, leaves):
            return Untraced("it calls a part of a module that is not traced")
        return found

    def _why_leaf(self, module: nn.Module, found: Untraced) -> str:
        """Why a module that has no graph of its own is to be no part of another one's.

        Empty: it may be, as the module that calls it knows which arguments it gives.
        """
        if not found.optional:
            return found.why
        by_default = trace(module, self._leaves.keys(), _method_of(module), given=0)
        if isinstance(by_default, Untraced):
            return by_default.why
        return f"{found.why}; give an example" if module is self._probe else ""

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
        if is_stock(module, BLOCKS):
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
                if is_stock_layer(inner):
                    continue
                full = f"{path}.{node.target}" if path else node.target
                fast = self._fast(module.get_submodule(node.target), inner, full)
                _replace(network, node.target, fast)
        Passes(cast(fx.GraphModule, network), path, self._report, on_cpu=self._on_cpu).run()
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
        return with_method(module, method, network, rest)

    def _by_parts(self, module: nn.Module, probe: nn.Module, path: str, note: str) -> nn.Module:
        """The module itself, its children replaced."""
        if is_stock_layer(module):
            return fast_layer(module, path, self._report)
        if note:
            self._report.add(path, module, f"{note}; its parts were replaced", swapped=False)
        for name, child in _children(module):
            full = f"{path}.{name}" if path else name
            fast = self._fast(child, probe.get_submodule(name), full, seen=True)
            if fast is not child:
                module._modules[name] = fast
        return module


def _why_closed(module: nn.Module) -> str:
    """Why a module is not even looked into; empty: it is."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted"
    if isinstance(module, Accelerated):
        return "is accelerated already"
    if module.training:
        return "it is in training mode"
    if not all(_asks_only(module, method) for method in _replaced_methods(module)):
        return f"{FORWARD_REPLACED}, and may use the original"
    return ""


def _replaced_methods(module: nn.Module) -> list[Any]:
    """What somebody put in the place of the methods that are traced, on this instance alone."""
    return [vars(module)[name] for name in {"forward", _method_of(module)} & vars(module).keys()]


def _asks_only(module: nn.Module, method: Any) -> bool:
    """Whether a method finds the modules that it uses in ``module``, so that a copy has its own."""
    function = getattr(method, "__func__", None)
    if getattr(method, "__self__", None) is not module or not isinstance(function, FunctionType):
        return False
    names = [i.argval for i in dis.get_instructions(function) if i.opname == "LOAD_GLOBAL"]
    known = [function.__globals__.get(name) for name in names]
    known += (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    try:
        known += [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError:  # not known yet
        return False
    return not any(isinstance(getattr(value, "__self__", value), nn.Module) for value in known)


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """What a module holds, under every name: ``named_children`` gives each part one name only."""
    return [(name, child) for name, child in module._modules.items() if child is not None]


def _method_of(module: nn.Module) -> str:
    """The method that becomes fast: ``forward``, or what the class names as ``core``."""
    core = getattr(type(module), "core", None)
    return core if isinstance(core, str) else "forward"


def _calls_into(graph: fx.Graph, module: nn.Module, leaves: Set[int]) -> bool:
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


def _replace(module: nn.Module, target: str, new: nn.Module) -> None:
    parent, _, name = target.rpartition(".")
    module.get_submodule(parent)._modules[name] = new
