"""Tensors of one call lie on one device: wrappers, ops and kernels name the one that does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conv_cases import ConvCase
from torch import Tensor

from gplws.ops import (
    conv3d_input_gradient,
    conv3d_weight_gradient,
    fit_peak,
    focus_search,
    group_pointwise_conv3d,
    regularise_surface,
    sample_surface,
    spline_smooth,
    up_conv3d,
)

X, IMAGES, VOLUME = torch.rand(1, 4, 3, 5, 6), torch.rand(2, 5, 6), torch.rand(1, 3, 5, 6)
CONV_NAMES = "x weight bias pointwise_weight pointwise_bias residual".split()
CONV_CASE = ConvCase((1, 4, 3, 5, 6), 4, 6, groups=2, residual=True)
CONV: dict[str, Any] = dict(zip(CONV_NAMES, CONV_CASE.tensors(), strict=True))
CONV_OUT = {"out": torch.rand(1, 6, 3, 5, 6)}
UP: dict[str, Any] = {
    "x": X,
    "weight": torch.rand(4, 1, 3, 3, 3),
    "bias": torch.rand(2),
    "residual": torch.rand(1, 2, 3, 10, 12),
}
UP_OUT = {"out": torch.rand(1, 2, 3, 10, 12)}
INPUT_GRADIENT = {"grad": X, "weight": torch.rand(4, 3, 3, 3, 3)}
SEARCH: dict[str, Any] = {"volume": VOLUME, "focus_positions": torch.arange(3.0)}
SEARCH_OUT = {f"out.{name}": result for name, result in focus_search(VOLUME)._asdict().items()}
FILTER = {"images": IMAGES, "weights": torch.rand(3, 3)}
DIFFERENCES = {"images": IMAGES, "shifts": torch.tensor([[0, 1], [2, -1]])}
SURFACE = {"responses": VOLUME[0], "surface": torch.rand(5, 6)}
MAPS = dict(zip(("depth", "confidence", "guide"), torch.rand(3, 1, 5, 6), strict=True))
REGULARISATION = dict(
    strength=0.3, data_scale=1.0, smoothness_scale=4.0, guide_scale=0.1, iterations=2
)
PEAK = dict(zip(("values", "middle", "distances", "weights"), torch.rand(4, 7, 5, 6), strict=True))

WRAPPERS: dict[Any, dict[str, Any]] = {
    group_pointwise_conv3d: {**CONV, "groups": 2, **CONV_OUT},
    up_conv3d: {**UP, "groups": 2, **UP_OUT},
    conv3d_input_gradient: {**INPUT_GRADIENT, "size": (10, 12), "groups": 2, "stride": 2},
    conv3d_weight_gradient: {"x": X, "grad": X},
    spline_smooth: {"images": IMAGES, "out": torch.rand(2, 5, 6)},
    sample_surface: SURFACE,
    fit_peak: PEAK,
    regularise_surface: {**MAPS, **REGULARISATION},
}

# Arguments of the ops in the order of their schemas, where results to fill follow the options.
OPTIONS = {
    "group_pointwise_conv3d": (2, 1, True, True, False),
    "up_conv3d": (2,),
    "conv3d_input_gradient": (2, True, True),
    "conv3d_weight_gradient": (2, 1),
    "focus_search": (4, 1, 1, False),
    "spline_smooth": (1,),
    "symmetric_filter": (),
    "second_differences": (),
    "sample_surface": (1,),
    "fit_peak": (),
    "regularise_surface": tuple(REGULARISATION.values()),
}
OPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # tensors before, behind the options
    "group_pointwise_conv3d.default": (CONV, {}),
    "group_pointwise_conv3d.out": (CONV, CONV_OUT),
    "up_conv3d.default": (UP, {}),
    "up_conv3d.out": (UP, UP_OUT),
    "conv3d_input_gradient.default": (INPUT_GRADIENT, {}),
    "conv3d_weight_gradient.default": ({"x": X, "grad": X}, {}),
    "focus_search.default": (SEARCH, {}),
    "focus_search.out": (SEARCH, SEARCH_OUT),
    "spline_smooth.out": ({"images": IMAGES}, {"out": torch.rand(2, 5, 6)}),
    "symmetric_filter.default": (FILTER, {}),
    "second_differences.default": (DIFFERENCES, {}),
    "sample_surface.default": (SURFACE, {}),
    "fit_peak.default": (PEAK, {}),
    "regularise_surface.default": (MAPS, {}),
}


def names_but_the_first(arguments: dict[str, Any]) -> list[str]:
    return [name for name, value in arguments.items() if isinstance(value, Tensor)][1:]


def elsewhere(arguments: dict[str, Any], name: str) -> dict[str, Any]:
    """The same arguments, one of them on another device."""
    return {key: value.to("meta") if key == name else value for key, value in arguments.items()}


@pytest.mark.parametrize(
    ("wrapper", "name"),
    [(wrapper, name) for wrapper, a in WRAPPERS.items() for name in names_but_the_first(a)],
)
def test_a_wrapper_names_the_tensor_on_another_device(wrapper, name):
    wrapper(**WRAPPERS[wrapper])
    expected = rf"^{wrapper.__name__}: {name} must be on the device of \w+, cpu, got meta$"
    with pytest.raises(ValueError, match=expected):
        wrapper(**elsewhere(WRAPPERS[wrapper], name))


def test_focus_search_takes_positions_from_anywhere_but_results_from_its_device_only():
    out = focus_search(VOLUME)
    with pytest.raises(ValueError, match=r"^focus_search: out\.peak must be on the device of vol"):
        focus_search(VOLUME, out=out._replace(peak=out.peak.to("meta")))


@pytest.mark.parametrize(
    ("op", "name"),
    [(op, name) for op, (a, b) in OPS.items() for name in names_but_the_first({**a, **b})],
)
def test_an_op_names_the_tensor_on_another_device(op, name):
    packet, overload = op.split(".")
    kernel = getattr(getattr(torch.ops.gplws, packet), overload)
    before, behind = (elsewhere(tensors, name) for tensors in OPS[op])
    arguments = (*before.values(), *OPTIONS[packet], *behind.values())
    if overload == "default":
        # torch takes the kernel for meta tensors, which computes nothing.
        with pytest.raises(ValueError, match=f"^{packet}: {name} must be on the device of"):
            kernel(*arguments)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    with pytest.raises(RuntimeError, match=f"{packet}: {name} is on another device than"):
        kernel.redispatch(keys, *arguments)
