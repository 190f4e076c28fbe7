"""What 8-bit convs do to a depth map."""

import json

import torch
from torch import nn

from benchmarks import quantisation
from benchmarks.quantisation import inputs_rounded, rounded


def test_values_are_rounded_to_255_steps_and_inputs_only_where_asked():
    values = torch.randn(3, 5000) * torch.tensor([[1.0], [0.0], [1e3]])
    after = rounded(values, (1,))
    step = values.abs().amax(1, keepdim=True) / 127
    assert ((after - values).abs() <= 0.501 * step).all()
    assert 100 < after[0].unique().numel() <= 255 and not after[1].any()

    model = nn.Sequential(nn.Conv3d(1, 1, 1, bias=False), nn.Conv3d(1, 1, 1, bias=False))
    for part in model:
        nn.init.ones_(part.weight)
    x = torch.linspace(0, 1, 1000).view(1, 1, 10, 10, 10)
    with torch.no_grad(), inputs_rounded(model):
        assert model(x).unique().numel() == 128
    with torch.no_grad(), inputs_rounded(model, kept=("0", "1")):
        assert torch.equal(model(x), x)
    assert torch.equal(model(x), x)


def test_the_command_compares_int8_and_bfloat16_with_float32(call, tmp_path):
    assert call(quantisation, f"--levels few --count 1 --side 32 --out {tmp_path}") == ""
    rows = json.loads((tmp_path / "quantisation.json").read_text())["rows"]
    found = {row["candidate"]: row["mean_frames"] for row in rows}
    assert list(found) == ["int8", "int8 but first conv and head", "bfloat16"]
    assert all(0 < difference < 0.5 for difference in found.values())
