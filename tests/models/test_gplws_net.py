from __future__ import annotations

import pytest
import torch
from networks import randomise_bn, relative_error
from torch import nn

import gplws
from gplws.models import GPLWSNet


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_the_numbers_of_parameters_are_those_of_the_paper():
    model = GPLWSNet()
    assert parameters(model) == 555_513
    assert parameters(model.reparameterise()) == 540_273
    assert parameters(model.fuse()) == 538_951
    assert parameters(GPLWSNet(skip="concat").reparameterise()) == 546_321
    assert parameters(GPLWSNet(form="plain")) == 540_936


@pytest.mark.parametrize("skip", ["add", "concat"])
@pytest.mark.parametrize("form", ["reparameterised", "plain"])
def test_the_fused_network_agrees_with_its_training_form(skip, form):
    model = randomise_bn(GPLWSNet(skip=skip, form=form))
    stack = torch.rand(1, 3, 5, 24, 40)
    with torch.no_grad():
        expected = model(stack)
        assert relative_error(model.reparameterise()(stack), expected) < 1e-5
        assert relative_error(model.fuse()(stack), expected) < 1e-5


@pytest.mark.parametrize("groups", [1, "depthwise"])
def test_dense_and_depthwise_modules_fuse_as_well(groups):
    model = randomise_bn(GPLWSNet(groups=groups))
    convs = [module.grouped.conv for module in model.modules() if hasattr(module, "grouped")]
    assert len(convs) == 14 and model.config["groups"] == groups
    assert all(conv.groups == (1 if groups == 1 else conv.in_channels) for conv in convs)
    stack = torch.rand(1, 3, 5, 24, 40)
    with torch.no_grad():
        assert relative_error(model.fuse()(stack), model(stack)) < 1e-5


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 7, 9), (3, 8, 1), (2, 17, 33), (11, 5, 64)])
def test_any_number_of_frames_and_any_size_goes_through(size):
    model = randomise_bn(GPLWSNet())
    stack = torch.rand(2, 3, *size)
    with torch.no_grad():
        expected = model(stack)
        got = model.fuse()(stack)
    assert got.shape == (2, *size)
    assert relative_error(got, expected) < 1e-4


@pytest.mark.parametrize(
    ("channels", "expected"),
    [(3, r"\(B, 3, N, H, W\) or \(B, 1, N, H, W\) and"), (1, r"be \(B, 1, N, H, W\) and")],
)
def test_a_stack_of_another_shape_is_told_which_are_taken(channels, expected):
    with pytest.raises(ValueError, match=expected):
        GPLWSNet(in_channels=channels)(torch.rand(1, 2, 3, 8, 8))


def test_a_gray_stack_equals_its_three_equal_channels():
    model = randomise_bn(GPLWSNet()).fuse()
    gray = torch.rand(1, 1, 4, 16, 16)
    assert torch.equal(model(gray), model(gray.repeat(1, 3, 1, 1, 1)))


def test_predict_finds_depth_within_the_focus_positions():
    model = randomise_bn(GPLWSNet()).fuse()
    positions = torch.tensor([-3.0, 0.0, 1.0, 5.0])
    found = model.predict(torch.rand(2, 3, 4, 20, 12), positions)
    assert found.depth.shape == found.confidence.shape == (2, 20, 12)
    assert ((found.depth >= -3) & (found.depth <= 5)).all()
    assert ((found.confidence >= 0) & (found.confidence <= 1)).all()


@torch.no_grad()
def test_bfloat16_agrees_to_its_rounding():
    model = randomise_bn(GPLWSNet())
    stack = torch.rand(1, 3, 6, 32, 40)
    expected = model(stack)
    got = model.fuse().bfloat16()(stack.bfloat16())
    assert got.dtype == torch.bfloat16
    assert relative_error(got.float(), expected) < 0.05


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_equals_the_network_in_bfloat16(grad):
    fused = randomise_bn(GPLWSNet()).fuse()
    stack = torch.rand(1, 3, 3, 16, 24)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=torch.bfloat16):
        got = fused(stack)
    with torch.no_grad():
        expected = fused.bfloat16()(stack.bfloat16())
    assert torch.equal(got.detach(), expected)


def test_the_training_form_learns_in_every_parameter():
    model = GPLWSNet()
    model(torch.rand(2, 3, 4, 16, 16)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_fused_network_compiles_and_exports():
    model = randomise_bn(GPLWSNet()).fuse()
    stack = torch.rand(1, 3, 3, 16, 24)
    with torch.no_grad():
        expected = model(stack)
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        torch.testing.assert_close(compiled(stack), expected)
        program = torch.export.export(model, (stack,))
        torch.testing.assert_close(program.module()(stack), expected)
    assert "gplws.group_pointwise_conv3d" in str(program.graph)


HOOKED = ("encoders.0", "encoders.0.0", "encoders.1", "downs.0", "middle", "decoders.0.0", "ups.0")


@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_hooks_see_what_modules_give_without_gradients_as_well(fused):
    model = randomise_bn(GPLWSNet(widths=(4, 8, 16), depths=(2, 1, 1), decoder_depths=(1, 1)))
    model = model.fuse() if fused else model
    seen = {}
    for name in HOOKED:
        model.get_submodule(name).register_forward_hook(
            lambda module, given, result, name=name: seen.update({name: result})
        )
    stack = torch.rand(1, 3, 3, 16, 20)
    model(stack)
    without = dict(seen)
    assert without.keys() == set(HOOKED)
    with torch.enable_grad():
        model(stack)
    assert all(relative_error(without[name], seen[name]) < 1e-6 for name in HOOKED)


@torch.no_grad()
def test_fused_networks_work_with_other_modules_in_place_of_their_own():
    stack = torch.rand(1, 3, 3, 16, 20)
    model = randomise_bn(GPLWSNet())
    model.middle[1] = nn.Identity()
    model.decoders[0] = nn.Identity()
    model.downs[0] = nn.Conv3d(12, 24, 3, (1, 2, 2), 1, padding_mode="replicate")
    expected = model(stack)
    for fast in (model.fuse(), gplws.accelerate(model)[0]):
        assert relative_error(fast(stack), expected) < 1e-5
        assert fast.floats_per_voxel > 0


@torch.no_grad()
def test_a_fused_network_computes_in_float64():
    model = randomise_bn(GPLWSNet())
    stack = torch.rand(1, 3, 3, 16, 20)
    expected = model(stack)
    got = model.fuse().double()(stack.double())
    assert got.dtype == torch.float64
    assert relative_error(got.float(), expected) < 1e-5


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="stack must be"):
        GPLWSNet()(torch.rand(1, 2, 4, 16, 16))
    with pytest.raises(ValueError, match="stack must be"):
        GPLWSNet()(torch.rand(3, 4, 16, 16))
    with pytest.raises(ValueError, match="skip must be"):
        GPLWSNet(skip="sum")
    with pytest.raises(ValueError, match="groups must be"):
        GPLWSNet(groups="dense")
    with pytest.raises(ValueError, match="widths must divide"):
        GPLWSNet(widths=(12, 20, 40, 80))
    with pytest.raises(ValueError, match="decoder_depths"):
        GPLWSNet(widths=(12, 24))


@pytest.mark.parametrize("size", [(32, 40), (33, 41)])
def test_the_layout_of_the_stack_does_not_matter(size):
    model = randomise_bn(GPLWSNet()).fuse()
    stack = torch.rand(1, 3, 4, *size)
    wide = torch.rand(1, 3, 4, size[0], size[1] + 8)
    wide[..., 4:-4] = stack
    layouts = [
        stack,
        stack.contiguous(memory_format=torch.channels_last_3d),
        wide[..., 4:-4],
        stack,
        stack.transpose(3, 4).contiguous().transpose(3, 4),
    ]
    gray = stack[:, :1]
    with torch.no_grad():
        expected = model(stack)
        model.release_memory()
        for given in layouts:
            assert relative_error(model(given), expected) < 1e-6
        expected = model(gray)
        assert torch.equal(model(gray.expand(-1, 3, -1, -1, -1)), expected)


def test_predict_says_which_stacks_it_takes():
    for model in (gplws.load_model("gplws"), GPLWSNet().eval()):
        for shape in ((6, 32, 32), (1, 2, 6, 32, 32)):
            with pytest.raises(ValueError, match=r"stack must be \(B, 3, N, H, W\)"):
                model.predict(torch.rand(shape))
