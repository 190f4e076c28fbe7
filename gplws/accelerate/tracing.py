"""Recording of what a module does as a graph of torch.fx."""

from __future__ import annotations

import dis
import inspect
import operator
import sys
import threading
from collections import deque
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn

from gplws.accelerate.layers import is_of
from gplws.nn.inference import in_place

IN_PLACE_OPERATORS = tuple(
    f"i{name}"
    for name in (
        *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"),
        *("and", "or", "xor", "matmul"),
    )
)
WHOLE = {"is_wrapped": True}  # torch.fx looks into functions without it when a file is read
_TYPE_QUESTIONS = {"isinstance", "__class__"}
_ASKS_TYPES = "its Python asks for the type of a value"
_ASKS_MODES = "its Python asks for the gradient or autocast mode"
_MODE_QUESTIONS = {"is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled"}
_ASKS_RECORDING = "its Python asks whether it is recorded"
_RECORDING_QUESTIONS = {"Proxy", "is_fx_tracing", "is_fx_symbolic_tracing"}


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


def _recorded_in_place(name: str) -> Any:
    def change(self: fx.Proxy, other: Any) -> fx.Proxy:
        changed = self.tracer.create_proxy("call_function", in_place, (name, self, other), {})
        changed.node.meta.update(WHOLE)
        return changed

    return change


for _operator in IN_PLACE_OPERATORS:  # torch.fx would record x += y as x + y
    setattr(_Value, f"__{_operator}__", _recorded_in_place(_operator))


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

    def __init__(self, leaves: Set[int]) -> None:
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
        return is_of(m, "torch.nn") and not isinstance(m, nn.Sequential)

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


@dataclass(frozen=True)
class Untraced:
    """A method of which there is no graph."""

    why: str
    optional: bool = False
    """Whether it is for arguments that may be left out: with a known number of them it may work."""


def trace(
    module: nn.Module, leaves: Set[int], method: str, *, given: int | None
) -> fx.Graph | Untraced:
    """The graph of a method, or why there is none.

    Args:
        leaves: ids of modules that become one node each, as the layers of torch.nn do.
        given: how many arguments will be given; the others get their defaults. None: a method with
            defaults is not traced, as branches may hang on what is given.
    """
    function = getattr(module, method)
    signature = list(inspect.signature(function).parameters.values())
    if any(p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in signature):
        return Untraced("its arguments are of any number")
    if why := _why_not_recorded(function):
        return Untraced(why)
    optional = {p.name: p.default for p in signature if p.default is not p.empty}
    if optional and given is None:
        return Untraced(f"its argument {next(iter(optional))} is optional", optional=True)
    fixed = {p.name: p.default for p in signature[given or 0 :] if p.name in optional}
    for name, default in fixed.items():
        if isinstance(default, tuple | list | dict):  # torch.fx takes them apart
            return Untraced(f"its argument {name} is optional, of several values")
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
        return Untraced(f"its Python depends on values: {first_line(error)}")
    if not torch.equal(before, torch.get_rng_state()):
        torch.set_rng_state(before)
        return Untraced("it draws random numbers")
    if any(key.startswith("_tensor_constant") for key in vars(module)):  # torch.fx keeps them there
        return Untraced("it makes tensors of its own")
    for m, before_it in zip(module.modules(), state, strict=True):
        after_it = list(_contents(vars(m)))
        if len(after_it) != len(before_it) or any(map(operator.is_not, after_it, before_it)):
            return Untraced("it keeps results in attributes")
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


def first_line(error: Exception) -> str:
    """What an error says, in short."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:80]
