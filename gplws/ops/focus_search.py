"""Per-group argmax focus search with sub-frame refinement."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from gplws import _extension  # noqa: F401  (registers the schemas and kernels)
from gplws.ops import reference
from gplws.ops.arguments import (
    goes_to_reference,
    note_change,
    require_float32,
    require_frames,
    require_one_device,
    require_out,
    require_positive,
)
from gplws.ops.reference import FocusSearchResult, Refinement, refine_depth

_NAME = "gplws::focus_search"
_OP = torch.ops.gplws.focus_search
_REFINEMENTS: tuple[Refinement, ...] = get_args(Refinement)  # the op takes the place in this tuple


def focus_search(
    volume: Tensor,
    focus_positions: Tensor | None = None,
    *,
    groups: int = 4,
    refinement: Refinement = "parabola",
    radius: int = 1,
    log_scale: bool = False,
    out: FocusSearchResult | None = None,
) -> FocusSearchResult:
    """Find where each pixel is in focus: global maximum over the frames, refined below one frame.

    The frames are cut into groups; each group's highest peak is found in parallel, then the highest
    of all. The frame found equals ``argmax`` over all frames; ties go to the lowest frame, NaN
    never wins. A least-squares parabola through the responses around it gives the depth between the
    frames, which stays within the neighbouring frames. The confidence compares the winner with the
    runner-up: the highest local maximum in any other group.

    Args:
        volume: (B, N, H, W) focus responses, float32, on CUDA also bfloat16 or float16 (computed
            with in float32); 1 to 2^24 frames in focus order.
        focus_positions: (N,) or (B, N), strictly monotonic, which is not checked, in any unit, not
            necessarily evenly spaced; taken as float32. Default: the frame numbers 0 .. N-1.
        groups: number of groups, each of ceil(N / groups) consecutive frames.
        refinement: "parabola", "gaussian" (a parabola through the logarithms; for responses > 0
            with a Gaussian peak it is exact) or "none".
        radius: frames on each side of the winner that enter the fit. 1 interpolates; larger values
            average out noise where the peak is several frames wide.
        log_scale: ``volume`` holds logarithms, such as a network's logits; it changes the
            confidence only, and makes "parabola" a Gaussian fit.
        out: contiguous results of an earlier search of the same size on the CPU, to write into: at
            few frames, fresh memory costs more than the search; not differentiable.

    Returns:
        depth: (B, H, W) float32, unit of ``focus_positions``; NaN where all frames are NaN or -inf;
            differentiable with respect to ``volume`` and ``focus_positions``.
        index: (B, H, W) int64 in [0, N); not differentiable.
        peak: (B, H, W) float32, ``volume`` at ``index``; differentiable.
        confidence: (B, H, W) float32 in 0..1; ``1 - runner_up / peak``, or
            ``1 - exp(runner_up - peak)`` with ``log_scale``; 0 where the peak is not above 0 or not
            finite, 1 where there is no runner-up; not differentiable.

    Raises:
        ValueError: a shape, ``groups``, ``radius``, ``refinement`` or the device of ``out`` does
            not fit, or a tensor of ``out`` lies over another or over an input, or requires
            gradients.
        TypeError: ``volume`` has no such dtype, or a tensor of ``out`` another than its result.

    Source:
        The group query of GPLWS-Net, Journal of Software, 2024, section 2. Three-point Gaussian
        refinement: Nayar and Nakagawa, IEEE TPAMI 16(8), 1994, doi:10.1109/34.308479.

    Example:
        >>> frames = torch.arange(9.0).view(1, 9, 1, 1)
        >>> volume = torch.exp(-((frames - 4.3) ** 2))
        >>> round(gplws.ops.focus_search(volume, refinement="gaussian").depth.item(), 3)
        4.3
    """
    op = "focus_search"
    results: dict[str, Tensor] = {}
    require_float32(op, half_on_cuda=True, has_autocast=out is None, volume=volume)
    if out is not None:
        results = {f"out.{name}": result for name, result in out._asdict().items()}
        require_one_device(op, volume=volume, **results)
    if volume.dim() != 4:
        raise ValueError(f"{op}: volume must be (B, N, H, W), got shape {tuple(volume.shape)}")
    batch, frames = volume.shape[:2]
    require_frames(op, "volume", frames)
    require_positive(op, groups=groups, radius=radius)
    if refinement not in _REFINEMENTS:
        raise ValueError(f"{op}: refinement must be one of {_REFINEMENTS}, got {refinement!r}")
    if focus_positions is None:
        focus_positions = torch.arange(frames, device=volume.device, dtype=torch.float32)
    elif not isinstance(focus_positions, Tensor):
        raise TypeError(
            f"{op}: focus_positions must be a tensor, got {type(focus_positions).__name__}"
        )
    elif tuple(focus_positions.shape) not in ((frames,), (batch, frames)):
        raise ValueError(
            f"{op}: focus_positions must be (N,) or (B, N) with N = {frames}, "
            f"got shape {tuple(focus_positions.shape)}"
        )
    if goes_to_reference(op, volume, focus_positions, into=out):
        return reference.focus_search(
            volume.float(),
            focus_positions.to(volume.device, torch.float32),
            groups=groups,
            refinement=refinement,
            radius=radius,
            log_scale=log_scale,
        )
    arguments = (
        volume,
        focus_positions.to(volume.device, torch.float32),
        groups,
        _REFINEMENTS.index(refinement),
        radius,
        log_scale,
    )
    if out is None:
        return FocusSearchResult(*_OP.default(*arguments))
    shape = (batch, *volume.shape[2:])
    others = {"volume": volume, "focus_positions": arguments[1]}
    for name, result in results.items():
        dtype = torch.int64 if name == "out.index" else torch.float32
        require_out(op, result, shape, dtype, name=name, inputs=others)
        others[name] = result
    _OP.out(*arguments, *out)
    for result in out:
        note_change(result)
    return out


@torch.library.register_fake(_NAME)
def _fake(
    volume: Tensor,
    focus_positions: Tensor,
    groups: int,
    refinement: int,
    radius: int,
    log_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    require_one_device("focus_search", volume=volume, focus_positions=focus_positions)
    batch, _, height, width = volume.shape

    def result(dtype: torch.dtype) -> Tensor:
        return volume.new_empty((batch, height, width), dtype=dtype)

    floats = torch.float32
    return result(floats), result(torch.int64), result(floats), result(floats)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    volume, focus_positions, _, refinement, radius, _ = inputs
    _, index, peak, confidence = output
    ctx.mark_non_differentiable(index, confidence)
    ctx.save_for_backward(volume, focus_positions, index, peak)
    ctx.refinement, ctx.radius = _REFINEMENTS[refinement], min(radius, volume.shape[1])


def _backward(
    ctx: Any, grad_depth: Tensor, _index: None, grad_peak: Tensor, _confidence: None
) -> tuple[Tensor | None, ...]:
    """The winner is fixed; depth depends on the responses around it, peak on its own response."""
    volume, focus_positions, index, peak = ctx.saved_tensors
    needs_volume, needs_positions = ctx.needs_input_grad[:2]
    dtype, volume = volume.dtype, volume.float()
    frames = volume.shape[1]
    found = peak > -torch.inf
    grad_volume = grad_positions = None
    if needs_volume:
        of_peak = torch.where(found, grad_peak, 0).unsqueeze(1)
        grad_volume = torch.zeros_like(volume).scatter_add(1, index.unsqueeze(1), of_peak)
    if needs_positions or (ctx.refinement != "none" and frames >= 3):
        clean = torch.where(volume.isnan(), -torch.inf, volume)
        by_volume, by_positions = torch.func.vjp(
            lambda v, z: refine_depth(
                v,
                z,
                index,
                v.gather(1, index.unsqueeze(1)).squeeze(1),
                refinement=ctx.refinement,
                radius=ctx.radius,
            ),
            clean,
            focus_positions.expand(volume.shape[0], frames),
        )[1](torch.where(found, grad_depth, 0))
        if grad_volume is not None:
            grad_volume = grad_volume + by_volume
        if needs_positions:
            grad_positions = by_positions if focus_positions.dim() == 2 else by_positions.sum(0)
    if grad_volume is not None:
        grad_volume = grad_volume.to(dtype)
    return grad_volume, grad_positions, None, None, None, None


torch.library.register_autograd(_NAME, _backward, setup_context=_setup_context)
for _device in ("cpu", "cuda"):
    torch.library.register_autocast(_NAME, _device, torch.float32)


@torch.library.register_vmap(_NAME)
def _vmap(
    info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    volume, positions, *options = args
    size = info.batch_size
    volume = _mapped_first(volume, in_dims[0], size)
    if in_dims[1] is not None:
        positions = positions.movedim(in_dims[1], 0)
        if positions.dim() == 2:  # (size, N): one row for each image of a sample
            positions = positions.unsqueeze(1).expand(size, volume.shape[1], -1)
        positions = positions.flatten(0, 1)
    elif positions.dim() == 2:
        positions = positions.repeat(size, 1)
    results = _OP.default(volume.flatten(0, 1), positions, *options)
    return tuple(r.unflatten(0, (size, -1)) for r in results), (0,) * 4


def _mapped_first(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
