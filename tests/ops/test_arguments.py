"""Wrong kinds of arguments, as calls from other code have them."""

import pytest
import torch

from gplws import ops

X = torch.rand(1, 4, 3, 8, 8)
WEIGHT = torch.rand(4, 1, 3, 3, 3)
VOLUME = torch.rand(1, 3, 8, 8)


@pytest.mark.parametrize(
    ("op", "arguments", "error", "message"),
    [
        ("group_pointwise_conv3d", {"x": X.numpy(), "weight": WEIGHT}, TypeError, "x must be a"),
        ("group_pointwise_conv3d", {"x": X, "weight": WEIGHT.numpy()}, TypeError, "weight must be"),
        ("group_pointwise_conv3d", {"x": X, "weight": WEIGHT, "groups": 4.0}, TypeError, "integer"),
        ("group_pointwise_conv3d", {"x": X, "weight": WEIGHT, "groups": 0}, ValueError, "at least"),
        ("up_conv3d", {"x": X.numpy(), "weight": WEIGHT}, TypeError, "x must be a tensor"),
        ("up_conv3d", {"x": X, "weight": WEIGHT, "groups": "4"}, TypeError, "integer, got str"),
        ("focus_search", {"volume": VOLUME.numpy()}, TypeError, "volume must be a tensor, got nd"),
        ("focus_search", {"volume": VOLUME, "groups": 2.0}, TypeError, "groups must be an integer"),
        ("focus_search", {"volume": VOLUME, "radius": 1.5}, TypeError, "radius must be an integer"),
        ("spline_smooth", {"images": X.numpy()}, TypeError, "images must be a"),
    ],
)
def test_they_are_named(op, arguments, error, message):
    others = {
        "group_pointwise_conv3d": {
            "bias": None,
            "pointwise_weight": None,
            "pointwise_bias": None,
            "groups": 4,
        },
        "up_conv3d": {"bias": None, "groups": 4},
    }
    with pytest.raises(error, match=f"{op}: .*{message}"):
        getattr(ops, op)(**{**others.get(op, {}), **arguments})
