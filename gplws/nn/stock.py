"""Whether modules do what their class says: only those may be replaced by something equal."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def is_stock(module: nn.Module, kinds: Iterable[type[nn.Module]]) -> bool:
    """Whether a module is one of the kinds, with their own ``forward``."""
    return any(
        isinstance(module, kind)
        and type(module).forward is kind.forward
        and getattr(type(module), "_conv_forward", None) is getattr(kind, "_conv_forward", None)
        for kind in kinds
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody listens to a module, or changes what it does, beside its ``forward``."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind, None) for kind in kinds) or "forward" in vars(module)


def any_hooks(module: nn.Module) -> bool:
    """Whether :func:`has_hooks` holds for a module or one inside of it."""
    return any(map(has_hooks, module.modules()))
