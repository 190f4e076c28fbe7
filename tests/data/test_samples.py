import pytest
import torch

from gplws.data import DepthSample, collate


def sample(**changes):
    values = {
        "stack": torch.rand(1, 4, 3, 5),
        "focus_positions": torch.tensor([10.0, 20.0, 40.0, 50.0]),
        "depth": torch.full((3, 5), 30.0),
        "valid": torch.ones(3, 5, dtype=torch.bool),
        "unit": "um",
    }
    return DepthSample(**{**values, **changes})


def test_depth_index_of_a_batch_uses_each_samples_own_positions():
    other = sample(focus_positions=torch.tensor([0.0, 30.0, 40.0, 50.0]))
    batch = collate([sample(), other])
    assert batch.stack.shape == (2, 1, 4, 3, 5)
    assert batch.depth_index()[:, 0, 0].tolist() == [1.5, 1.0]


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("stack", torch.rand(4, 3, 5), ValueError),
        ("stack", torch.zeros(1, 4, 3, 5, dtype=torch.uint8), TypeError),
        ("depth", torch.zeros(3, 4), ValueError),
        ("valid", torch.ones(3, 5), TypeError),
        ("focus_positions", torch.zeros(3), ValueError),
    ],
)
def test_what_does_not_fit_is_named(field, value, error):
    with pytest.raises(error, match=field):
        sample(**{field: value})


def test_collate_refuses_other_shapes_and_units():
    small = sample(
        stack=torch.rand(1, 4, 3, 4), depth=torch.zeros(3, 4), valid=torch.ones(3, 4) > 0
    )
    with pytest.raises(ValueError, match="equal shapes"):
        collate([sample(), small])
    with pytest.raises(ValueError, match="unit"):
        collate([sample(), sample(unit="m")])
