"""Dense convs become group parallel modules of the same shapes."""

import pytest
import torch
from torch import nn

from gplws.models import AiFDepthNet, FVNet
from gplws.nn import GroupParallel3d, to_group_parallel


def block() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(8, 16, 3, padding=1),
        nn.BatchNorm3d(16),
        nn.ReLU(),
        nn.Conv3d(16, 12, 3, stride=(1, 2, 2), padding=1),
        nn.ReLU(),
        nn.Conv3d(12, 3, 3, padding=1),
        nn.Conv3d(3, 3, 3, padding=1),
        nn.Conv3d(3, 4, 5, padding=2),
    )


def test_convs_take_norm_and_relu_along_and_shapes_stay() -> None:
    model = block()
    lighter, report = to_group_parallel(model)
    x = torch.randn(2, 8, 3, 9, 12)
    assert lighter(x).shape == model(x).shape
    assert len(lighter) == len(model)
    first, strided = lighter[0], lighter[3][1]
    assert isinstance(first, GroupParallel3d) and first.final_relu
    assert isinstance(strided, GroupParallel3d) and strided.final_relu
    assert isinstance(lighter[1], nn.Identity) and isinstance(lighter[2], nn.Identity)
    assert not lighter[5].final_relu
    notes = {layer.name: layer.note for layer in report.layers}
    assert notes["0"] == "GroupParallel3d with 4 groups + batch norm + relu"
    assert notes["3"].endswith("+ relu behind a mean over (1, 2, 2) pixels")
    assert notes["6"].startswith("GroupParallel3d with 1 groups")
    assert [layer.name for layer in report.kept] == ["7"]
    assert isinstance(model[0], nn.Conv3d)


def test_the_result_can_be_trained_and_fused() -> None:
    lighter, _ = to_group_parallel(block())
    assert lighter.training
    x = torch.randn(2, 8, 3, 8, 8)
    lighter(x).square().mean().backward()
    assert all(p.grad is not None for p in lighter.parameters())


@pytest.mark.parametrize("kind", [FVNet, AiFDepthNet])
def test_peers_keep_their_interface(kind: type) -> None:
    lighter, report = to_group_parallel(kind().eval(), groups=4)
    assert len(report.swapped) > 10
    with torch.no_grad():
        assert lighter(torch.rand(1, 3, 3, 64, 64)).depth.shape == (1, 64, 64)
    assert not any(module.training for module in lighter.modules())


def test_a_shared_conv_stays_shared() -> None:
    conv = nn.Conv3d(4, 4, 3, padding=1)
    lighter, report = to_group_parallel(nn.ModuleList([conv, conv]))
    assert lighter[0] is lighter[1]
    assert len(report.swapped) == 1


def test_a_conv_by_itself_is_replaced() -> None:
    lighter, report = to_group_parallel(nn.Conv3d(4, 6, 3, padding=1), groups=2)
    assert isinstance(lighter, GroupParallel3d)
    assert report.swapped[0].name == ""


def test_groups_must_be_positive() -> None:
    with pytest.raises(ValueError, match="groups must be at least 1, got 0"):
        to_group_parallel(block(), groups=0)


class Centred(nn.Conv3d):
    """A conv that does something else as well."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - x.mean())


def test_what_does_more_than_its_class_says_stays() -> None:
    watched, own = nn.Conv3d(4, 4, 3, padding=1), nn.Conv3d(4, 4, 3, padding=1)
    watched.register_forward_pre_hook(lambda module, given: None)
    own.forward = lambda x: x  # type: ignore[method-assign]
    _, report = to_group_parallel(nn.Sequential(Centred(4, 4, 3, padding=1), watched, own))
    notes = [layer.note for layer in report.layers]
    assert notes == ["a class of its own", "a hook is attached", "a hook is attached"]


def test_layers_behind_a_conv_that_somebody_listens_to_stay() -> None:
    norm = nn.BatchNorm3d(4)
    norm.register_forward_pre_hook(lambda module, given: None)
    lighter, report = to_group_parallel(nn.Sequential(nn.Conv3d(4, 4, 3, padding=1), norm))
    assert isinstance(lighter[1], nn.BatchNorm3d)
    assert report.swapped[0].note == "GroupParallel3d with 4 groups"
