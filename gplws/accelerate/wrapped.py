"""The classes of accelerated networks: copies, files, and the way back to training."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Iterator, Mapping
from types import MethodType
from typing import Any, cast

from torch import Tensor, fx, nn

from gplws.nn.blocks import copied
from gplws.nn.inference import stock_layout

_NOT_WRITTEN = (
    "the network that this accelerated one was made from could not be pickled, and is not in its "
    "file: call accelerate() anew"
)


class _MergedError(AttributeError):
    """Somebody asks for a part that is no more."""


class Accelerated(nn.Module):
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
        if not self.__dict__["_stock"]:
            raise RuntimeError(_NOT_WRITTEN)
        (stock,) = self.__dict__["_stock"]
        self.__class__ = type(stock)
        self.__dict__.clear()
        self.__dict__.update(stock.__dict__)
        for name, value in vars(stock).items():
            if getattr(value, "__self__", None) is stock:  # a forward that replaced that of a class
                self.__dict__[name] = MethodType(value.__func__, self)
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


class _AcceleratedSequential(Accelerated):
    """A sequence computed as a whole; one by one, its layers are those that it was made from."""

    def _one_by_one(self) -> nn.Sequential:
        kept = self.__dict__.get("_stock") or self.__dict__.get("_layers")
        if not kept:
            raise RuntimeError(_NOT_WRITTEN)
        (layers,) = kept
        return layers

    def __getitem__(self, index: slice | int) -> nn.Module:
        return self._one_by_one()[index]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._one_by_one())

    def __len__(self) -> int:
        return len(self._one_by_one())


def keep_stock(fast: Accelerated, stock: nn.Module) -> None:
    """Keep a copy of the network that an accelerated one was made from, for its ``train()``."""
    fast.__dict__["_stock"] = (copied(stock),)  # in a tuple: its weights are not listed
    fast.__dict__.pop("_layers", None)  # they are in there


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
    """An instance without contents, for copying and unpickling: files name this function."""
    found = class_of(original, method)
    return object.__new__(found)


_CLASSES: dict[tuple[type[nn.Module], str | None], type[nn.Module]] = {}


def class_of(original: type[nn.Module], method: str | None) -> type[nn.Module]:
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
        bases = (_AcceleratedSequential if of_layers else Accelerated, original)
        _CLASSES[key] = type(f"Accelerated{original.__name__}", bases, contents)
    return _CLASSES[key]


def with_method(
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
    module.__class__ = class_of(type(module), method)
    module.__dict__["_merged"] = merged
    module.add_module("accelerated", network)
    return module
