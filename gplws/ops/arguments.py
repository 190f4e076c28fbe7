"""What the op wrappers share: checks of arguments, memory formats, vmap."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

MOST_FRAMES = 2**24
"""Frames whose numbers the kernels can tell apart in float32; csrc/ops/tensors.h has it too."""

MOST_REACH = 2**12
"""Largest reach of a filter and spacing of its taps, px; csrc/ops/image_filter.h has it too."""

_HALF = (torch.bfloat16, torch.float16)
# Asked once: Dynamo of torch 2.10 does not trace the question.
_AUTOCAST_DEVICES = frozenset(
    device
    for device in ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "xla", "maia", "privateuseone")
    if torch.amp.is_autocast_available(device)
)


def require_tensors(op: str, **tensors: Tensor | None) -> None:
    """Raise TypeError for the first that is no tensor, such as an array of numpy."""
    for name, tensor in tensors.items():
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")


def require_positive(op: str, **numbers: int) -> None:
    """Raise TypeError for the first that is no integer, ValueError for one below 1."""
    for name, number in numbers.items():
        if not isinstance(number, int | torch.SymInt):
            raise TypeError(f"{op}: {name} must be an integer, got {type(number).__name__}")
        if number < 1:
            raise ValueError(f"{op}: {name} must be at least 1, got {number}")


def require_frames(op: str, name: str, frames: int) -> None:
    """Raise ValueError unless the number of frames of ``name`` is 1 to ``MOST_FRAMES``."""
    if not 1 <= frames <= MOST_FRAMES:
        raise ValueError(f"{op}: {name} must have 1 to {MOST_FRAMES} frames, got {frames}")


def require_float32(
    op: str, *, half_on_cuda: bool = False, has_autocast: bool = False, **tensors: Tensor | None
) -> None:
    """Raise TypeError for the first tensor that is not float32.

    With ``half_on_cuda``, CUDA tensors may also be bfloat16 or float16; with ``has_autocast`` other
    tensors as well under autocast, which casts them.
    """
    require_tensors(op, **tensors)
    for name, tensor in tensors.items():
        if tensor is None or tensor.dtype == torch.float32:
            continue
        if has_autocast and _is_cast(tensor):
            continue
        if half_on_cuda and tensor.device.type == "cuda":
            if tensor.dtype in _HALF:
                continue
            raise TypeError(
                f"{op}: {name} must be float32, bfloat16 or float16 on CUDA, got {tensor.dtype}"
            )
        raise TypeError(f"{op}: {name} must be float32, got {tensor.dtype}")


def require_float(op: str, *, has_autocast: bool, x: Tensor, **others: Tensor | None) -> None:
    """Raise TypeError unless ``x`` has a dtype of the kernels and the others have the same.

    These are float32 and bfloat16, on CUDA also float16. With ``has_autocast`` dtypes may differ
    under autocast, which casts them.
    """
    require_tensors(op, x=x, **others)
    on_cuda = x.device.type == "cuda"
    dtypes = (torch.float32, *(_HALF if on_cuda else (torch.bfloat16,)))
    if x.dtype not in dtypes and not (has_autocast and _is_cast(x)):
        expected = "float32, bfloat16 or float16" if on_cuda else "float32 or bfloat16"
        raise TypeError(f"{op}: x must be {expected}, got {x.dtype}")
    for name, tensor in others.items():
        if tensor is None or tensor.dtype == x.dtype or (has_autocast and _is_cast(tensor)):
            continue
        raise TypeError(f"{op}: {name} must be {x.dtype} as x, got {tensor.dtype}")


def _is_cast(tensor: Tensor) -> bool:
    """Whether autocast is on and casts this tensor: it leaves float64 as it is."""
    is_float = tensor.is_floating_point() and tensor.dtype != torch.float64
    return is_float and is_autocast_enabled(tensor.device.type)


def is_autocast_enabled(device: str) -> bool:
    """The same for kinds of devices that have no autocast, such as "meta"."""
    return device in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device)


def autocast_off(device: str) -> AbstractContextManager[Any]:
    """A context without autocast, also for kinds of devices that have none."""
    return torch.autocast(device, enabled=False) if is_autocast_enabled(device) else nullcontext()


def require_one_device(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError for the first tensor that lies on another device than the first of all."""
    (first_name, first), *others = tensors.items()
    assert first is not None
    for name, tensor in others:
        if tensor is not None and tensor.device != first.device:
            raise ValueError(
                f"{op}: {name} must be on the device of {first_name}, {first.device}, "
                f"got {tensor.device}"
            )


def require_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """Raise ValueError unless ``tensor`` has this shape; ``meaning`` spells its axes."""
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{op}: {name} must be {meaning} = {shape}, got shape {tuple(tensor.shape)}"
        )


def require_out(
    op: str,
    out: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    name: str = "out",
    channels_last: bool = False,
    inputs: Mapping[str, Tensor | None] | None = None,
    same: Tensor | None = None,
) -> None:
    """Raise unless ``out`` can take a result of this shape and dtype.

    It must be contiguous, or may be channels_last_3d with ``channels_last``. Autograd must not take
    it for a function of what it was before, and it must lie apart from the inputs, as other threads
    would read what is written; ``same`` among them, which is read element by element, may begin
    where it begins.
    """
    require_shape(op, name, out, shape, "the shape of the result")
    if out.dtype != dtype:
        raise TypeError(f"{op}: {name} must be {dtype} as the result, got {out.dtype}")
    in_last = channels_last and out.is_contiguous(memory_format=torch.channels_last_3d)
    if not in_last and not out.is_contiguous():
        formats = "contiguous or channels_last_3d" if channels_last else "contiguous"
        raise ValueError(f"{op}: {name} must be {formats}")
    if inputs:
        _require_apart(op, out, inputs, name, same)
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: {name} must not require gradients; writing into it has none")


def _require_apart(
    op: str, out: Tensor, inputs: Mapping[str, Tensor | None], name: str, same: Tensor | None
) -> None:
    if torch.compiler.is_compiling() or out.numel() == 0:
        return
    first, last = _memory(out)
    for input_name, tensor in inputs.items():
        if tensor is None or tensor.numel() == 0 or tensor.device != out.device:
            continue
        begin, end = _memory(tensor)
        if tensor is same and begin == first:
            continue
        if begin < last and first < end:
            raise ValueError(f"{op}: {name} must be apart from {input_name}")


def _memory(tensor: Tensor) -> tuple[int, int]:
    """First byte of a tensor that is not empty, and the one behind its last."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    length = 1 + sum((size - 1) * stride for size, stride in steps)
    begin = tensor.data_ptr()
    return begin, begin + length * tensor.element_size()


def note_change(out: Tensor) -> None:
    """Let autograd know that ``out`` was written into, as it does of stock ops."""
    if not torch.compiler.is_compiling() and not out.is_inference():
        torch.autograd.graph.increment_version(out)


def goes_to_reference(op: str, *tensors: Tensor | None, into: object = None) -> bool:
    """Whether an op leaves its work to stock ops; ValueError where ``into`` is given then."""
    if not needs_stock(*tensors):
        return False
    if into is not None:
        raise ValueError(f"{op}: what is written into, or packed, has no derivatives")
    return True


def needs_stock(*tensors: Tensor | None) -> bool:
    """Whether derivatives of tensors are taken that registered backward passes do not give.

    These are forward-mode ones, which would silently be zero, and the gradients of ``torch.func``.
    """
    if torch.compiler.is_compiling():
        # Compiled code without a level is guarded by the level only where that is read.
        return _derivatives_are_taken() or forward_ad._current_level >= 0
    if forward_ad._current_level >= 0 and any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None
        for tensor in tensors
    ):
        return True
    if torch._C._functorch.peek_interpreter_stack() is None:
        return False
    return any(tensor is not None and _is_tracked(tensor) for tensor in tensors)


def _derivatives_are_taken() -> bool:
    """Whether a derivative of ``torch.func`` is on, of whatever tensors.

    Dynamo cannot ask tensors for theirs, but has these modes on while it traces.
    """
    transforms = torch._C._functorch.TransformType
    return any(
        interpreter.key() in (transforms.Grad, transforms.Jvp)
        for interpreter in torch._C._functorch.get_interpreter_stack() or ()
    )


# What torch.compiler.assume_constant_result does, without the import of Dynamo.
_derivatives_are_taken._dynamo_marked_constant = True  # type: ignore[attr-defined]


def has_plain_kernel(*tensors: Tensor) -> bool:
    """Whether a CPU kernel in float32 without derivatives and vmap takes the place of stock ops."""
    first = tensors[0]
    if first.device.type != "cpu" or first.dtype != torch.float32 or needs_stock(*tensors):
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    return torch.compiler.is_compiling() or not any(
        torch._C._functorch.is_batchedtensor(tensor) for tensor in tensors
    )


def require_floats(op: str, **tensors: Tensor | None) -> None:
    """Raise TypeError unless all tensors have the floating dtype of the first one."""
    require_tensors(op, **tensors)
    (first_name, first), *others = tensors.items()
    assert first is not None
    if not first.is_floating_point():
        raise TypeError(f"{op}: {first_name} must be of a floating dtype, got {first.dtype}")
    for name, tensor in others:
        if tensor is not None and tensor.dtype != first.dtype:
            raise TypeError(
                f"{op}: {name} must be {first.dtype} as {first_name}, got {tensor.dtype}"
            )


def _is_tracked(tensor: Tensor) -> bool:
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_gradtrackingtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def register_conv_autocast(name: str) -> None:
    """Autocast for a conv: all tensors become bfloat16 on the CPU, float32 on CUDA."""
    torch.library.register_autocast(name, "cpu", torch.bfloat16)
    torch.library.register_autocast(name, "cuda", torch.float32)


def follows_channels_last(x: Tensor) -> bool:
    """Whether the result for ``x`` (B, C, N, H, W) is channels_last_3d rather than contiguous."""
    return (
        x.numel() > 0
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last_3d)
    )


def has_gradient_kernels(x: Tensor, grad: Tensor) -> bool:
    """Whether a backward pass runs on own kernels: on the CPU, in float32, contiguous ``x``."""
    return x.device.type == "cpu" and x.dtype == grad.dtype == torch.float32 and x.is_contiguous()


def stock_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    needs: tuple[bool, bool, bool],
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    transposed: bool = False,
) -> tuple[Tensor | None, ...]:
    """Gradients of input, weight and bias of a conv by stock ops, None where not needed.

    A transposed conv doubles H and W. In bfloat16 on the CPU oneDNN leaves parts of gradients of
    one or two frames unwritten in channels_last_3d (torch 2.13): there all tensors are contiguous.
    It takes none without elements.
    """
    channels = grad.shape[1]
    if grad.numel() == 0:
        zero = grad.sum()
        shapes = (x.shape, weight.shape, (channels,))
        return tuple(
            zero.expand(shape).contiguous() if need else None
            for shape, need in zip(shapes, needs, strict=True)
        )
    if grad.device.type == "cpu" and grad.dtype == torch.bfloat16 and grad.shape[2] <= 2:
        grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    return torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        [channels] if needs[2] else None,
        [1, stride, stride],
        [padding] * 3,
        [1, 1, 1],
        transposed,
        [0, 1, 1] if transposed else [0, 0, 0],
        groups,
        list(needs),
    )


def without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass that computes in the dtype of its tensors, wherever it is called."""

    @functools.wraps(backward)
    def run(ctx: Any, grad: Tensor) -> Any:
        if grad.device.type not in _AUTOCAST_DEVICES:  # e.g. of meta tensors
            return backward(ctx, grad)
        with torch.autocast(grad.device.type, enabled=False):
            return backward(ctx, grad)

    return run


def vmap_by_batch(
    op: Callable[..., Tensor],
    size: int,
    in_dims: tuple[int | None, ...],
    args: tuple[Any, ...],
    *,
    tensors: int,
    batched: tuple[int, ...],
) -> tuple[Tensor, int]:
    """vmap of an op: one call where only arguments with a batch axis are mapped, else a loop.

    Args:
        op: takes ``args``; its result has the batch axis first.
        size: number of samples.
        in_dims: mapped axis of each argument, or None.
        args: tensors or None first, then options.
        tensors: how many of ``args`` are tensors.
        batched: which of them have a batch axis first, which the mapped axis can join.

    Returns:
        The result with the mapped axis first, and 0.
    """
    options = args[tensors:]
    operands: list[Tensor | None] = []
    mapped: list[bool] = []
    for operand, dim in zip(args[:tensors], in_dims[:tensors], strict=True):
        is_mapped = operand is not None and dim is not None
        operands.append(operand.movedim(dim, 0) if is_mapped else operand)
        mapped.append(is_mapped)
    if any(m for i, m in enumerate(mapped) if i not in batched):
        results = [
            op(*(t[i] if m else t for t, m in zip(operands, mapped, strict=True)), *options)  # type: ignore[index]
            for i in range(size)
        ]
        return torch.stack(results), 0
    for i in batched:
        operand = operands[i]
        if operand is not None:
            every = operand if mapped[i] else operand.expand(size, *operand.shape)
            operands[i] = every.flatten(0, 1)
    return op(*operands, *options).unflatten(0, (size, -1)), 0
