"""Each op against stock torch, and against the limits of the machine, on the CPU.

The limits are taken in the same run: arithmetic from a large matrix product and a large dense conv
(the faster of both), memory from a copy that does not fit into the caches, and from a sum, which
reads only. The focus search, which memory limits and which reads much more than it writes, takes
turns with both: all see the same machine, and the copy leaves nothing of the search in the caches.

Results are compared before they are timed, that of torch.max by the frame it finds. "gplws" writes
into results that are used again, as layers of the network do; "gplws, fresh results" allocates them
in each turn, as stock torch does. Gradients are always fresh; they are those of a batch of four
crops, as in training.

--isa measures all of it, stock torch and the limits included, on an older instruction set; float32
only, as torch takes minutes for a bfloat16 product there.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.grad import conv3d_input, conv3d_weight

from benchmarks import plots
from benchmarks.summary import medians
from benchmarks.timing import introduce, save, show
from gplws.benchmark import take_turns
from gplws.ops import (
    conv3d_input_gradient,
    conv3d_weight_gradient,
    fit_peak,
    focus_search,
    group_pointwise_conv3d,
    reference,
    regularise_surface,
    sample_surface,
    second_differences,
    smooth_surface,
    spline_smooth,
    symmetric_filter,
    up_conv3d,
)

FRESH = "gplws, fresh results"
COPY = "copy of 256 MiB"
COPY_BYTES = 2 * 256 * 2**20  # read and written
READ = "sum of 256 MiB"
READ_BYTES = 256 * 2**20
# What keeps torch and the libraries below it to an instruction set.
OLDER = {
    "avx2": {
        "GPLWS_CPU_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }
}
OPS = (
    "group_pointwise_conv3d",
    "up_conv3d",
    "focus_search",
    "spline_smooth",
    "symmetric_filter",
    "second_differences",
    "smooth_surface",
    "sample_surface",
    "fit_peak",
    "regularise_surface",
    "conv3d_input_gradient",
    "conv3d_weight_gradient",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# By how much results of two may differ, as share of the largest value: stock torch rounds bfloat16
# between the two convs of a block.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def limits(dtype: torch.dtype) -> dict[str, float]:
    """FLOP per second of a matrix product and of a dense conv, bytes per second of a copy."""
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    x = torch.randn(1, 128, 10, 64, 64).to(dtype).contiguous(memory_format=torch.channels_last_3d)
    w = torch.randn(128, 128, 3, 3, 3).to(dtype)
    found = medians(
        take_turns(
            {
                "matrix product": lambda: a @ b,
                "dense conv": lambda: F.conv3d(x, w, padding=1),
                "copy": large_copy(),
                "sum": large_sum(),
            }
        )
    )
    return {
        "matrix_product_flops": 2 * 2048**3 / found["matrix product"],
        "dense_conv_flops": 2 * x.numel() * 128 * 27 / found["dense conv"],
        "copy_bytes": COPY_BYTES / found["copy"],
        "read_bytes": READ_BYTES / found["sum"],
    }


def large_copy() -> Callable[[], Any]:
    """A copy of 256 MiB that can be repeated."""
    source = _large()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def large_sum() -> Callable[[], Any]:
    """A sum over 256 MiB that can be repeated: nothing but reading."""
    return _large().sum


def _large() -> torch.Tensor:
    # Written to: fresh zeros are all one page of the operating system, which stays in the caches.
    return torch.ones(64 * 2**20)


Candidates = dict[str, Callable[[], Any]]


class Case:
    """One shape of one op: candidates that give the same result, and the work they do."""

    def __init__(
        self, op: str, what: str, flop: float, data: float, candidates: Candidates
    ) -> None:
        self.op, self.what, self.flop, self.data = op, what, flop, data
        self.candidates = candidates


def compare(results: dict[str, Any]) -> None:
    """Refuse to time what does not do the same work.

    Raises:
        RuntimeError: a result differs from that of gplws; the message names it.
    """
    ours = results["gplws"]
    for name, result in results.items():
        if name in (COPY, READ):
            continue
        if isinstance(result, torch.return_types.max):
            found, expected = result.indices, ours.index
        elif isinstance(ours, tuple):
            found, expected = result[0], ours[0]
        else:
            found = torch.cat(result) if isinstance(result, list) else result
            expected = ours
        difference = (found.double() - expected.double()).abs().max()
        if not difference <= TOLERANCE[ours[0].dtype] * expected.abs().max():
            raise RuntimeError(f"{name}: the result differs by up to {float(difference):.3g}")


Op = Callable[..., Any]


@torch.inference_mode()
def conv_cases(dtype: torch.dtype, frames: int, side: int) -> Iterator[Case]:
    """The layers of the network at ``frames`` x ``side`` x ``side``."""
    for level, channels in enumerate((12, 24, 48, 96)):
        size = side >> level
        x = torch.randn(1, channels, frames, size, size).to(dtype)
        weight = torch.randn(channels, channels // 4, 3, 3, 3).to(dtype) / channels
        pointwise = torch.randn(channels, channels, 1, 1, 1).to(dtype) / channels
        bias = torch.randn(channels).to(dtype)
        yield _conv_case(f"{channels} channels, 4 groups + pointwise", x, weight, bias, pointwise)
        if channels < 96:
            weight = torch.randn(2 * channels, channels, 3, 3, 3).to(dtype) / channels
            bias = torch.randn(2 * channels).to(dtype)
            yield _conv_case(f"{channels} -> {2 * channels}, down", x, weight, bias, None)


def _conv_case(
    what: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    pointwise: torch.Tensor | None,
) -> Case:
    groups = x.shape[1] // weight.shape[1]
    options: dict[str, Any] = {"groups": groups, "stride": 1 if pointwise is not None else 2}
    options["relu"] = pointwise is not None
    arguments = (weight, bias, pointwise, None if pointwise is None else bias)
    last = x.contiguous(memory_format=torch.channels_last_3d)
    out = group_pointwise_conv3d(x, *arguments, **options)
    per_voxel = weight[0].numel() * weight.shape[0] + (
        0 if pointwise is None else pointwise.numel()
    )
    flop = 2 * per_voxel * out[0, 0].numel() * out.shape[0]
    data = (x.numel() + out.numel()) * x.element_size()
    return Case(
        "group_pointwise_conv3d",
        f"{what}, {x.shape[2]}x{x.shape[3]}x{x.shape[4]}",
        flop,
        data,
        {
            "gplws": lambda: group_pointwise_conv3d(x, *arguments, **options, out=out),
            FRESH: lambda: group_pointwise_conv3d(x, *arguments, **options),
            "stock": lambda: reference.group_pointwise_conv3d(x, *arguments, **options),
            "stock channels_last": lambda: reference.group_pointwise_conv3d(
                last, *arguments, **options
            ),
        },
    )


def _smoothed_by_image(images: torch.Tensor, spacing: int) -> list[torch.Tensor]:
    return [reference.spline_smooth(image[None], spacing=spacing) for image in images]


@torch.inference_mode()
def other_cases(dtype: torch.dtype, frames: int, side: int) -> Iterator[Case]:
    """The way up, the focus search and the smoothing."""
    for channels in (24, 48, 96):
        size = side * 6 // channels  # 24 channels come from half the side
        x = torch.randn(1, channels, frames, size, size).to(dtype)
        weight = torch.randn(channels, 1, 3, 3, 3).to(dtype)
        bias = torch.randn(channels // 2).to(dtype)
        skip = torch.randn(1, channels // 2, frames, 2 * size, 2 * size).to(dtype)
        out = torch.empty_like(skip)
        arguments, groups = (x, weight, bias, skip), channels // 2
        yield Case(
            "up_conv3d",
            f"{channels} -> {groups} + skip, {frames}x{2 * size}x{2 * size}",
            2 * 27 * x.numel(),
            (x.numel() + 2 * skip.numel()) * x.element_size(),
            {
                "gplws": partial(up_conv3d, *arguments, groups=groups, out=out),
                FRESH: partial(up_conv3d, *arguments, groups=groups),
                "stock": partial(reference.up_conv3d, *arguments, groups=groups),
            },
        )
    if dtype != torch.float32:
        return
    copy, read = large_copy(), large_sum()
    for count in (frames, 10 * frames):
        volume = torch.rand(1, count, side, side)
        found = focus_search(volume)
        for refinement in ("none", "parabola", "gaussian"):
            yield Case(
                "focus_search",
                f"refinement {refinement}, {count}x{side}x{side}",
                0,
                volume.numel() * 4 + 20 * side * side,
                {
                    "gplws": partial(focus_search, volume, refinement=refinement, out=found),
                    FRESH: partial(focus_search, volume, refinement=refinement),
                    "torch.max alone": partial(torch.max, volume, 1),
                    COPY: copy,
                    READ: read,
                },
            )
    images = torch.rand(frames, side, side)
    smoothed = torch.empty_like(images)
    for spacing in (1, 8):
        yield Case(
            "spline_smooth",
            f"spacing {spacing}, {frames}x{side}x{side}",
            16 * images.numel(),
            8 * images.numel(),
            {
                "gplws": partial(spline_smooth, images, spacing=spacing, out=smoothed),
                FRESH: partial(spline_smooth, images, spacing=spacing),
                "stock": partial(reference.spline_smooth, images, spacing=spacing),
                # What fits into the caches better: one image at a time.
                "stock, by image": partial(_smoothed_by_image, images, spacing),
                COPY: copy,
                READ: read,
            },
        )


@torch.inference_mode()
def classical_cases(dtype: torch.dtype, frames: int, side: int) -> Iterator[Case]:
    """Filters of focus measures, and refinement and regularisation of a slope."""
    if dtype != torch.float32:
        return
    stack, image, pixels = f"{frames}x{side}x{side}", f"{side}x{side}", side * side
    images = torch.rand(frames, side, side)
    weights = torch.rand(4, 4).tolist()
    shifts = [(y * s, x * s) for s in (1, 2, 3) for y, x in ((0, 1), (1, 1), (1, -1))]
    x = torch.linspace(0, frames - 1, side).expand(side, side)
    surface = (x + 0.1 * torch.rand(side, side)).clamp(0, frames - 1)
    places = torch.arange(frames).view(-1, 1, 1)
    responses = torch.exp(-0.1 * (places - surface) ** 2) + 0.01 * images
    values, distances, weighted = sample_surface(responses, surface)
    samples = (values, weighted * values[3], distances * weighted, weighted)
    count = len(values)
    cases: list[tuple[Op, Op, str, tuple[Any, ...], dict[str, Any], float, float]] = [
        (
            symmetric_filter,
            reference.symmetric_filter,
            f"7 x 7 taps, {stack}",
            (images, weights),
            {},
            (4 + 3 * 16) * frames,
            2 * frames,
        ),
        (
            second_differences,
            reference.second_differences,
            f"{len(shifts)} shifts, {stack}",
            (images, shifts),
            {},
            5 * len(shifts) * frames,
            2 * frames,
        ),
        (
            smooth_surface,
            reference.smooth_surface,
            image,
            (surface,),
            {"limit": 2.0},
            8 * 49,
            2,
        ),
        (
            sample_surface,
            reference.sample_surface,
            stack,
            (responses, surface),
            {},
            14 * count,
            frames + 1 + 3 * count,
        ),
        (fit_peak, reference.fit_peak, image, samples, {}, 45 * count, 4 * count + 1),
        (
            regularise_surface,
            reference.regularise_surface,
            image,
            (surface[None], images[:1], 0.3 * images[1:2]),
            {
                "strength": 0.3,
                "data_scale": 1.0,
                "smoothness_scale": 4.0,
                "guide_scale": 0.1,
                "iterations": 12,
            },
            12 * (5 * 20 + 60 + 12 * 45),  # the majorant, and steps of conjugate gradients
            4,
        ),
    ]
    for ours, stock, what, arguments, options, flop, floats in cases:
        yield Case(
            ours.__name__,
            what,
            flop * pixels,
            4 * floats * pixels,
            {
                "gplws": partial(ours, *arguments, **options),
                "stock": partial(stock, *arguments, **options),
            },
        )


@torch.inference_mode()
def gradient_cases(dtype: torch.dtype, frames: int, side: int) -> Iterator[Case]:
    """Gradients of the network's convs, of crops of ``side`` * 5 / 32 pixels."""
    if dtype != torch.float32:
        return
    for level, channels in enumerate((12, 24, 48, 96)):
        size = max(side * 5 // 32 >> level, 4)
        layers = [(channels, 4, 1, f"{channels} channels, 4 groups")]
        if channels < 96:
            layers.append((2 * channels, 1, 2, f"{channels} -> {2 * channels}, down"))
        for channels_out, groups, stride, what in layers:
            x = torch.randn(4, channels, frames, size, size)
            grad = torch.randn(4, channels_out, frames, -(-size // stride), -(-size // stride))
            weight = torch.randn(channels_out, channels // groups, 3, 3, 3)
            last = [t.contiguous(memory_format=torch.channels_last_3d) for t in (x, grad, weight)]
            last_x, last_grad, last_weight = last
            conv = {"groups": groups, "stride": stride}
            stock = {"padding": 1, "groups": groups, "stride": (1, stride, stride)}
            gradients: dict[str, Candidates] = {
                "conv3d_input_gradient": {
                    "gplws": partial(
                        conv3d_input_gradient, grad, weight, size=(size, size), **conv
                    ),
                    "stock": partial(conv3d_input, x.shape, weight, grad, **stock),
                    "stock channels_last": partial(
                        conv3d_input, x.shape, last_weight, last_grad, **stock
                    ),
                },
                "conv3d_weight_gradient": {
                    "gplws": partial(conv3d_weight_gradient, x, grad, **conv),
                    "stock": partial(conv3d_weight, x, weight.shape, grad, **stock),
                    "stock channels_last": partial(
                        conv3d_weight, last_x, weight.shape, last_grad, **stock
                    ),
                },
            }
            shape = f"4 x {frames}x{size}x{size}"
            flop = 2 * 27 * (channels // groups) * grad.numel()
            data = 4 * (x.numel() + grad.numel())
            for op, candidates in gradients.items():
                yield Case(op, f"{what}, {shape}", flop, data, candidates)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=10)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=6.0, help="for each row, roughly")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS, help="no rows of others")
    parser.add_argument("--isa", choices=OLDER, help="results go to ops_<isa>.json")
    parser.add_argument("--out", type=Path, help="folder for the JSON; default: benchmarks/results")
    options = parser.parse_args()
    wanted = OLDER[options.isa] if options.isa else {}
    if any(os.environ.get(key) != value for key, value in wanted.items()):
        # Libraries read these when they are loaded: once more from the beginning.
        command = [sys.executable, "-m", "benchmarks.ops", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **wanted})
    introduce()
    clear_caches = large_sum()  # no candidate finds what the one before it has read
    rows: list[dict[str, Any]] = []
    found_limits: dict[str, dict[str, float]] = {}
    dtypes = {"float32": torch.float32} if options.isa else DTYPES
    for name, dtype in dtypes.items():
        found_limits[name] = limit = limits(dtype)
        print(f"\n{name}: " + ", ".join(f"{k} {v / 1e9:.0f} G/s" for k, v in limit.items()))
        arithmetic = max(limit["matrix_product_flops"], limit["dense_conv_flops"])
        table = []
        size = (dtype, options.frames, options.side)
        kinds = (conv_cases, other_cases, classical_cases, gradient_cases)
        for case in (case for kind in kinds for case in kind(*size)):
            if case.op not in options.ops:
                continue
            with torch.inference_mode():
                times = take_turns(
                    case.candidates, seconds=options.seconds, check=compare, between=clear_caches
                )
            middle = medians(times)
            ours = middle["gplws"]
            copied, read = limit["copy_bytes"], limit["read_bytes"]
            if COPY in middle:
                copied, read = COPY_BYTES / middle.pop(COPY), READ_BYTES / middle.pop(READ)
            best = min(v for k, v in middle.items() if not k.startswith("gplws"))
            compute, memory = case.flop / ours / arithmetic, case.data / ours / copied
            reading = case.data / ours / read
            rows.append(
                {
                    "dtype": name,
                    "op": case.op,
                    "case": case.what,
                    "flop": case.flop,
                    "bytes": case.data,
                    "seconds": times,
                    "share_of_arithmetic": compute,
                    "share_of_copy": memory,
                    "share_of_read": reading,
                }
            )
            table.append(
                [
                    case.op,
                    case.what,
                    f"{1e3 * ours:.2f}",
                    f"{1e3 * middle[FRESH]:.2f}" if FRESH in middle else "",
                    f"{1e3 * best:.2f}",
                    f"{best / ours:.1f}",
                    f"{100 * compute:.0f}%" if case.flop else "",
                    f"{100 * memory:.0f}%",
                    f"{100 * reading:.0f}%",
                ]
            )
        head = ["op", "case", "ms", "fresh results, ms", "best other, ms", "ratio"]
        show([*head, "of arithmetic", "of copy", "of read"], table)
    name = f"ops_{options.isa}" if options.isa else "ops"
    path = save(name, {"limits": found_limits, "rows": rows}, options.out)
    plots.ops(path)
    print(f"\n{path}")


if __name__ == "__main__":
    main()
