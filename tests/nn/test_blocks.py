from __future__ import annotations

import copy

import pytest
import torch
from networks import randomise_bn, relative_error
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode

import gplws.nn as gnn

FORMS = [("reparameterised", 4), ("plain", 4), ("reparameterised", 1), ("plain", 1)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_a_folded_bn_equals_conv_then_bn(bias, affine):
    conv, bn = nn.Conv3d(4, 6, 3, groups=2, bias=bias), nn.BatchNorm3d(6, affine=affine).eval()
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.5, 2)
    if affine:
        bn.weight.data.uniform_(0.5, 2)
        bn.bias.data.normal_()
    x = torch.randn(1, 4, 5, 6, 7)
    weight, shift = gnn.fold_bn(conv.weight, conv.bias, bn)
    folded = nn.functional.conv3d(x, weight, shift, groups=2)
    torch.testing.assert_close(folded, bn(conv(x)), rtol=1e-5, atol=1e-5)


def test_a_bn_without_statistics_is_refused():
    bn = nn.BatchNorm3d(6, track_running_stats=False)
    with pytest.raises(ValueError, match="running statistics"):
        gnn.fold_bn(torch.rand(6, 2, 3, 3, 3), None, bn)


@pytest.mark.parametrize("block", [gnn.RepConv3d, gnn.ConvBN3d])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_a_fused_conv_equals_its_branches(block, groups):
    conv = randomise_bn(block(8, groups))
    x = torch.randn(2, 8, 4, 6, 5)
    fused = conv.fuse()
    assert isinstance(fused, nn.Conv3d) and fused.groups == groups
    assert relative_error(fused(x), conv(x)) < 1e-5


@pytest.mark.parametrize(("form", "groups"), FORMS)
@pytest.mark.parametrize("final_relu", [False, True])
def test_a_fused_group_parallel_module_equals_its_training_form(form, groups, final_relu):
    block = randomise_bn(gnn.GroupParallel3d(12, 20, groups, form=form, final_relu=final_relu))
    x = torch.randn(1, 12, 4, 9, 17)
    fused = block.fuse()
    assert isinstance(fused, gnn.FusedGroupParallel3d)
    assert relative_error(fused(x), block(x)) < 1e-5
    assert relative_error(gnn.reparameterise(block)(x), block(x)) < 1e-5
    assert (fused(x).min() >= 0).item() is final_relu


def test_a_reparameterised_module_still_fuses():
    block = randomise_bn(gnn.GroupParallel3d(8, 8))
    x = torch.randn(1, 8, 3, 5, 6)
    assert relative_error(gnn.reparameterise(block).fuse()(x), block(x)) < 1e-5


def test_fuse_replaces_what_fits_and_keeps_the_rest():
    model = nn.Sequential(
        nn.Conv3d(3, 8, 3, padding=1),
        gnn.GroupParallel3d(8, 8),
        nn.Conv3d(8, 8, 3, stride=(1, 2, 2), padding=1, groups=2),
        nn.Conv3d(8, 8, 3, padding=1, padding_mode="replicate"),
        nn.Conv3d(8, 4, 3),
        nn.Conv3d(4, 4, 3, stride=2, padding=1),
    )
    before = {k: v.clone() for k, v in randomise_bn(model).state_dict().items()}
    fused = gnn.fuse(model)
    kinds = [type(m).__name__ for m in fused]
    assert kinds == [
        "FusedConv3d",
        "FusedGroupParallel3d",
        "FusedConv3d",
        "Conv3d",
        "Conv3d",
        "Conv3d",
    ]
    x = torch.randn(1, 3, 5, 9, 10)
    assert relative_error(fused(x), model(x)) < 1e-5
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class ScalesItself(nn.Conv3d):
    def forward(self, x):
        return 3 * super().forward(x)


class ScalesModule(gnn.GroupParallel3d):
    def forward(self, x):
        return 3 * super().forward(x)


def _with_hook(module):
    module.register_forward_hook(lambda module, given, result: 3 * result)
    return module


def _with_hook_inside(module):
    for child in module.children():
        _with_hook(child)
    return module


def _with_old_weight_norm():
    conv = nn.utils.weight_norm(nn.Conv3d(4, 4, 3, padding=1))
    with torch.no_grad():
        conv(torch.randn(1, 4, 1, 1, 1))  # else it cannot be copied
    conv.weight_g.data.mul_(3)  # the weight follows in the next forward pass
    return conv


@pytest.mark.parametrize(
    "module",
    [
        ScalesItself(4, 4, 3, padding=1),
        _with_hook(nn.Conv3d(4, 4, 3, padding=1)),
        _with_old_weight_norm(),
        ScalesModule(4, 4),
        _with_hook(gnn.GroupParallel3d(4, 4)),
        _with_hook_inside(gnn.GroupParallel3d(4, 4)),
        _with_hook(gnn.UpConv3d(4, 2)),
        _with_hook_inside(gnn.UpConv3d(4, 2)),
        _with_hook(gnn.RepConv3d(4, 2)),
        _with_hook_inside(gnn.ConvBN3d(4, 2)),
    ],
    ids=lambda module: type(module).__name__,
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_fuse_keeps_what_does_more_than_its_class_says(module):
    model = randomise_bn(nn.Sequential(module))
    x = torch.randn(1, 4, 3, 6, 6)
    with torch.no_grad():
        assert relative_error(gnn.fuse(model)(x), model(x)) < 1e-5
        assert relative_error(gnn.reparameterise(model)(x), model(x)) < 1e-5


def test_fuse_keeps_modules_with_other_layers_inside():
    block, norm = gnn.GroupParallel3d(4, 4), gnn.GroupParallel3d(4, 4)
    block.bn = nn.InstanceNorm3d(4)
    norm.bn = nn.BatchNorm3d(4, track_running_stats=False)
    model = randomise_bn(nn.Sequential(block)), nn.Sequential(norm).eval()
    for one in model:
        assert type(gnn.fuse(one)[0]) is gnn.GroupParallel3d
        assert type(gnn.fuse(one)[0].grouped) is gnn.FusedConv3d


class HoldsTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = gnn.GroupParallel3d(4, 4)
        self.second = self.first
        self.inner = nn.Sequential(self.first, nn.Conv3d(4, 4, 3, padding=1))
        self.register_module("nothing", None)

    def forward(self, x):
        return self.inner(self.second(self.first(x)))


def test_what_is_held_twice_is_fused_once_and_stays_shared():
    model = randomise_bn(nn.Sequential(HoldsTwice(), HoldsTwice()))
    model.append(model[0])
    fused = gnn.fuse(model)
    assert fused[2] is fused[0] and fused[1] is not fused[0]
    for one in fused[:2]:
        assert type(one.first) is gnn.FusedGroupParallel3d
        assert one.first is one.second is one.inner[0]
        assert type(one.inner[1]) is gnn.FusedConv3d
    x = torch.randn(1, 4, 3, 6, 8)
    assert relative_error(fused(x), model(x)) < 1e-5
    reparameterised = gnn.reparameterise(model)
    assert reparameterised[0].first is reparameterised[0].second
    assert type(reparameterised[0].first.grouped) is nn.Conv3d
    assert type(model[0].second) is gnn.GroupParallel3d


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@torch.no_grad()
def test_fused_modules_compute_in_dtypes_that_the_kernels_do_not_have(dtype):
    model = nn.Sequential(
        nn.Conv3d(4, 8, 3, stride=(1, 2, 2), padding=1),
        gnn.GroupParallel3d(8, 8),
        gnn.UpConv3d(8, 4),
    )
    randomise_bn(model)
    x = torch.randn(1, 4, 3, 6, 8)
    expected = model(x)
    tolerance = 1e-5 if dtype == torch.float64 else 0.01
    fused = gnn.fuse(model).to(dtype)
    for network in (fused, gnn.fuse(model.to(dtype))):
        assert not any(isinstance(m, nn.Conv3d | nn.ConvTranspose3d) for m in network.modules())
        got = network(x.to(dtype))
        assert got.dtype == dtype
        assert relative_error(got.float(), expected) < tolerance
    for module, channels in zip(fused, (4, 8, 8), strict=True):
        x = torch.randn(1, channels, 3, 6, 8, dtype=dtype)
        y = module(x)
        out = torch.empty_like(y)
        assert module(x, out=out) is out and torch.equal(out, y)


def test_the_training_form_learns_in_every_branch():
    block = gnn.GroupParallel3d(8, 8)
    block(torch.randn(2, 8, 3, 5, 6)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


def _gradients(model, x):
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.square().mean().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


def _blocks(form):
    return nn.Sequential(
        gnn.GroupParallel3d(8, 8, form=form),
        gnn.DownConv3d(8, 16),
        gnn.GroupParallel3d(16, 12, form=form, final_relu=False),
        gnn.UpConv3d(12, 6),
    )


class KernelCalls(TorchDispatchMode):
    """Notes the names of the ops of gplws that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, name = function.name().split("::")
        if namespace == "gplws":
            self.names.add(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", ["reparameterised", "plain"])
def test_with_frozen_statistics_merged_convs_train_as_the_branches_in_eval_mode(form):
    torch.manual_seed(0)
    model = _blocks(form)
    randomise_bn(model)
    x = torch.randn(2, 8, 4, 6, 10)
    expected = _gradients(model, x)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    gnn.freeze_statistics(model)
    for got, wanted in zip(_gradients(model, x), expected, strict=True):
        assert relative_error(got, wanted) < 2e-5
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(model(x).float(), expected[0]) < 0.03
    assert relative_error(gnn.fuse(model)(x), expected[0]) < 2e-5


@pytest.mark.parametrize("form", ["reparameterised", "plain"])
def test_blocks_train_on_kernels_as_on_stock_ops(form):
    torch.manual_seed(0)
    model = _blocks(form).train()
    randomise_bn(model)
    x = torch.randn(2, 8, 5, 7, 10)
    others = [copy.deepcopy(model) for _ in range(3)]
    expected = _gradients(model, x)
    kernels, again, autocast = others
    assert gnn.train_on_kernels(kernels)
    names = ["y", "x", *(name for name, _ in model.named_parameters())]
    expected_of = dict(zip(names, expected, strict=True))
    for name, got in zip(names, _gradients(kernels, x), strict=True):
        # The batch norm behind it takes the gradient of this bias away, to rounding.
        size = expected_of[name.replace("pointwise.bias", "pointwise.weight")].abs().max()
        assert (got - expected_of[name]).abs().max() < 1e-4 * size, name
    for name, value in model.state_dict().items():  # running statistics too
        torch.testing.assert_close(kernels.state_dict()[name], value, msg=name)
    gnn.train_on_kernels(again)
    gnn.train_on_kernels(again, enabled=False)
    assert all(map(torch.equal, _gradients(again, x), expected))
    gnn.train_on_kernels(autocast)
    with torch.autocast("cpu", torch.bfloat16):
        y = autocast(x)
    assert y.dtype == torch.bfloat16 and relative_error(y.float(), expected[0]) < 0.05


def test_blocks_leave_stock_ops_on_the_cpu_in_float32_only():
    model = _blocks("reparameterised")
    x = torch.randn(1, 8, 3, 6, 8)

    def kernels(module, x):
        with KernelCalls() as calls:
            module(x).sum().backward()
        return calls.names

    convs = {"group_pointwise_conv3d", "conv3d_weight_gradient"}
    assert not kernels(model, x)
    assert gnn.train_on_kernels(model)
    assert kernels(model, x) == {*convs, "up_conv3d", "conv3d_input_gradient"}
    assert not kernels(model[0], x.contiguous(memory_format=torch.channels_last_3d))
    assert not kernels(copy.deepcopy(model).double(), x.double())
    model[0].grouped.conv.register_forward_hook(lambda *_: None)
    assert not kernels(model[0], x)
    assert not gnn.train_on_kernels(nn.Conv3d(4, 4, 3))


def _in_a_sequence(block):
    block.pointwise = nn.Sequential(block.pointwise)
    return block


def _without_statistics(block):
    block.bn = nn.BatchNorm3d(4, track_running_stats=False)
    return block


def _pruned(block):
    prune.random_unstructured(block.grouped.conv, "weight", 0.5)
    return block


def _with_hook_on_inner_conv(block):
    _with_hook(block.grouped.pointwise)
    return block


@pytest.mark.parametrize(
    "change", [_in_a_sequence, _without_statistics, _pruned, _with_hook_on_inner_conv]
)
def test_blocks_that_cannot_be_fused_have_their_batch_norms_frozen_and_train_on(change):
    model = randomise_bn(nn.Sequential(gnn.GroupParallel3d(4, 4), gnn.GroupParallel3d(4, 4)))
    change(model[0])
    x = torch.randn(2, 4, 3, 6, 8)
    expected = _gradients(model.eval(), x)
    gnn.freeze_statistics(model.train())
    assert [block.merges for block in model] == [False, True]
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        for got, wanted in zip(_gradients(model, x), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_blocks_merge_once_their_hooks_are_gone():
    block = gnn.GroupParallel3d(4, 4)
    hook = block.grouped.conv.register_forward_hook(lambda *_: None)
    gnn.freeze_statistics(block)
    assert not block.merges
    hook.remove()
    gnn.freeze_statistics(block)
    assert block.merges


def _convs_of_blocks():
    """Blocks on kernels, each with the conv inside that is to be changed, and an input."""
    for block, conv in (
        (gnn.UpConv3d(4, 2), "conv"),
        (gnn.RepConv3d(4, 2), "pointwise"),
        (gnn.ConvBN3d(4, 2), "conv"),
        (gnn.GroupParallel3d(4, 4), "pointwise"),
    ):
        assert gnn.train_on_kernels(block)
        yield block, block.get_submodule(conv), torch.randn(2, 4, 3, 6, 8)


def test_hooks_on_convs_are_called_on_kernels_too():
    for block, conv, x in _convs_of_blocks():
        expected = block(x)
        conv.register_forward_hook(lambda *given: 0 * given[-1])
        assert not torch.equal(block(x), expected)


@pytest.mark.parametrize("change", [nn.utils.weight_norm, parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_normalised_weights_train_on_kernels_as_on_stock_ops(change):
    for block, conv, x in _convs_of_blocks():
        change(conv)
        magnitude = next(p for p in conv.parameters() if p.numel() == conv.weight.shape[0])
        for factor in (1, 3):
            with torch.no_grad():
                magnitude.mul_(factor)
            gnn.train_on_kernels(block, enabled=False)
            expected = _gradients(block, x)
            gnn.train_on_kernels(block)
            for got, wanted in zip(_gradients(block, x), expected, strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_pruned_convs_train_on_kernels():
    for block, conv, x in _convs_of_blocks():
        prune.random_unstructured(conv, "weight", 0.5)
        for _ in range(2):
            block(x).square().mean().backward()
        gradient = conv.weight_orig.grad
        assert gradient.any() and not gradient[conv.weight_mask == 0].any()


def test_freezing_reaches_batch_norms_of_any_model():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    gnn.freeze_statistics(model)
    model(torch.randn(2, 3, 8, 8))
    assert model[1].num_batches_tracked == 0 and not model[1].training


def test_wrong_groups_or_forms_are_named():
    with pytest.raises(ValueError, match="groups must divide in_channels = 6, got 4"):
        gnn.GroupParallel3d(6, 6)
    with pytest.raises(ValueError, match="form must be one of"):
        gnn.GroupParallel3d(8, 8, form="quick")
