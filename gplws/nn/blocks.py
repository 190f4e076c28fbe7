"""The group parallel module and its re-parameterisable conv, on stock ops for training.

A block knows how to turn itself into its inference form: ``fuse()`` returns a new module and leaves
the block as it is. All forms of a block are built from the same attributes of one conv.

After `train_on_kernels` the convs of the branches are the kernels, with backward passes of their
own, where these are the faster way: on the CPU in float32.

Once batch norms keep their statistics, the branches of a block are linear and one conv equals them
at training as well: after `freeze_statistics` a block merges its weights in each forward pass, in a
differentiable way, and runs the merged convs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gplws.nn.fused import FusedConv3d, FusedGroupParallel3d, FusedUpConv3d
from gplws.nn.stock import any_hooks, has_hooks, is_stock
from gplws.ops import reference
from gplws.ops.group_pointwise_conv3d import group_pointwise_conv3d
from gplws.ops.up_conv3d import up_conv3d

ConvForm = Literal["reparameterised", "plain"]
ModuleType = TypeVar("ModuleType", bound=nn.Module)


def fold_bn(weight: Tensor, bias: Tensor | None, bn: nn.BatchNorm3d) -> tuple[Tensor, Tensor]:
    """Weight and bias of one conv that equals ``bn(conv(x))`` with ``bn`` in eval mode.

    Args:
        weight: (M, ..., kN, kH, kW) weight of the conv.
        bias: (M,) bias of the conv, or None.
        bn: batch norm over the M channels, with running statistics.

    Returns:
        The folded weight (same shape) and bias (M,), computed in float64, then rounded to the
        dtype of ``weight``.

    Raises:
        ValueError: ``bn`` keeps no running statistics.
    """
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("fold_bn: bn must keep running statistics (track_running_stats=True)")
    scale = (bn.running_var.double() + bn.eps).rsqrt()
    shift = -bn.running_mean.double() if bias is None else bias.double() - bn.running_mean.double()
    if bn.weight is not None:
        scale = scale * bn.weight.double()
    shift = shift * scale
    if bn.bias is not None:
        shift = shift + bn.bias.double()
    folded = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
    return folded.to(weight.dtype), shift.to(weight.dtype)


class RepConv3d(nn.Module):
    """Three branches at training, one 3x3x3 conv at inference; channels stay the same.

    ``BN(conv 3x3x3) + BN(conv 1x1x1) + BN(identity)``, both convs with the same groups and no bias.

    Args:
        channels: channels in and out.
        groups: groups of both convs; divides ``channels``.

    Source:
        The re-parameterisation of GPLWS-Net, Journal of Software, 2024, section 2, after
        Ding et al., "RepVGG", CVPR 2021, doi:10.1109/CVPR46437.2021.01352.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, 3, padding=1, groups=groups, bias=False)
        self.conv_bn = nn.BatchNorm3d(channels)
        self.pointwise = nn.Conv3d(channels, channels, 1, groups=groups, bias=False)
        self.pointwise_bn = nn.BatchNorm3d(channels)
        self.identity_bn = nn.BatchNorm3d(channels)
        self.on_kernels = False  # see train_on_kernels

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, N, H, W) -> (B, C, N, H, W)."""
        y, centre = (_convolved(c, x, self.on_kernels) for c in (self.conv, self.pointwise))
        return self.conv_bn(y) + self.pointwise_bn(centre) + self.identity_bn(x)

    def merged(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one conv that equals the branches in eval mode; differentiable."""
        channels, inputs = self.conv.weight.shape[:2]
        identity = torch.zeros_like(self.pointwise.weight)  # (C, C / groups, 1, 1, 1)
        every = torch.arange(channels, device=identity.device)
        identity[every, every % inputs] = 1

        weight, bias = fold_bn(self.conv.weight, None, self.conv_bn)
        for kernel, bn in (
            (self.pointwise.weight, self.pointwise_bn),
            (identity, self.identity_bn),
        ):
            centre, shift = fold_bn(kernel, None, bn)
            weight = weight + F.pad(centre, (1,) * 6)
            bias = bias + shift
        return weight, bias

    @torch.no_grad()
    def fuse(self) -> nn.Conv3d:
        """One 3x3x3 conv with bias, equal to the three branches in eval mode."""
        return _conv_like(self.conv, *self.merged())


class ConvBN3d(nn.Module):
    """3x3x3 conv without bias, then batch norm; channels stay the same.

    Args:
        channels: channels in and out.
        groups: groups of the conv; divides ``channels``.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, 3, padding=1, groups=groups, bias=False)
        self.bn = nn.BatchNorm3d(channels)
        self.on_kernels = False  # see train_on_kernels

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, N, H, W) -> (B, C, N, H, W)."""
        return self.bn(_convolved(self.conv, x, self.on_kernels))

    def merged(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one conv that equals both in eval mode; differentiable."""
        return fold_bn(self.conv.weight, None, self.bn)

    @torch.no_grad()
    def fuse(self) -> nn.Conv3d:
        """One 3x3x3 conv with bias, equal in eval mode."""
        return _conv_like(self.conv, *self.merged())


class GroupParallel3d(nn.Module):
    """Group parallel module: grouped 3x3x3 conv, ReLU, 1x1x1 conv, BN, optional ReLU.

    The grouped conv looks for the focus maximum of each group; the 1x1x1 conv merges the groups.

    Args:
        in_channels: channels in, kept by the grouped conv.
        out_channels: channels out.
        groups: groups of the 3x3x3 conv; divides ``in_channels``.
        form: "reparameterised" (three branches at training) or "plain" (conv and BN).
        final_relu: apply ReLU to the result; a head goes without.

    Raises:
        ValueError: ``groups`` does not divide ``in_channels``, or ``form`` is unknown.

    Source:
        GPLWS-Net, Journal of Software, 2024, section 2.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        groups: int = 4,
        *,
        form: ConvForm = "reparameterised",
        final_relu: bool = True,
    ) -> None:
        super().__init__()
        if groups < 1 or in_channels % groups:
            raise ValueError(f"groups must divide in_channels = {in_channels}, got {groups}")
        forms: dict[ConvForm, type[RepConv3d] | type[ConvBN3d]] = {
            "reparameterised": RepConv3d,
            "plain": ConvBN3d,
        }
        if form not in forms:
            raise ValueError(f"form must be one of {tuple(forms)}, got {form!r}")
        self.grouped: nn.Module = forms[form](in_channels, groups)
        self.pointwise = nn.Conv3d(in_channels, out_channels, 1)
        self.bn = nn.BatchNorm3d(out_channels)
        self.groups = groups
        self.final_relu = final_relu
        self.on_kernels = False  # see train_on_kernels
        self.merges = False  # see freeze_statistics

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, N, H, W) -> (B, K, N, H, W)."""
        if self.merges:
            conv = group_pointwise_conv3d if _suits_kernels(x) else reference.group_pointwise_conv3d
            return conv(x, *self._merged(), groups=self.groups, pointwise_relu=self.final_relu)
        x = self.bn(_convolved(self.pointwise, self.grouped(x).relu(), self.on_kernels))
        return x.relu() if self.final_relu else x

    def _merged(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weights and biases of the two convs that equal the module in eval mode."""
        conv = self.grouped
        if isinstance(conv, RepConv3d | ConvBN3d):
            weight, bias = conv.merged()
        else:
            assert isinstance(conv, nn.Conv3d) and conv.bias is not None
            weight, bias = conv.weight, conv.bias
        return weight, bias, *fold_bn(self.pointwise.weight, self.pointwise.bias, self.bn)

    @torch.no_grad()
    def fuse(self) -> FusedGroupParallel3d:
        """The whole module as one kernel call, equal in eval mode."""
        return FusedGroupParallel3d(
            *(tensor.detach().clone() for tensor in self._merged()),
            groups=self.groups,
            pointwise_relu=self.final_relu,
        )


class DownConv3d(nn.Conv3d):
    """3x3x3 conv that halves H and W, rounded up.

    Args:
        in_channels: channels in.
        out_channels: channels out.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, stride=(1, 2, 2), padding=1)
        self.on_kernels = False  # see train_on_kernels

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, N, H, W) -> (B, K, N, ceil(H / 2), ceil(W / 2))."""
        if self.on_kernels and _suits_kernels(x):
            return group_pointwise_conv3d(x, self.weight, self.bias, stride=2, relu=False)
        return super().forward(x)


class UpConv3d(nn.Module):
    """Transposed 3x3x3 conv that doubles H and W, one channel out per group, plus a skip.

    Args:
        in_channels: channels in; a multiple of ``out_channels``.
        out_channels: channels out, and groups of the conv.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose3d(
            in_channels,
            out_channels,
            3,
            stride=(1, 2, 2),
            padding=1,
            output_padding=(0, 1, 1),
            groups=out_channels,
        )
        self.on_kernels = False  # see train_on_kernels

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """(B, C, N, H, W) -> (B, K, N, 2 H, 2 W), plus ``skip`` of that shape."""
        conv = self.conv
        if self.on_kernels and _suits_kernels(x) and _is_untouched(conv, nn.ConvTranspose3d):
            return up_conv3d(x, conv.weight, conv.bias, skip, groups=conv.groups)
        y = conv(x)
        return y if skip is None else y + skip

    @torch.no_grad()
    def fuse(self) -> FusedUpConv3d:
        """The conv and the addition as one kernel call."""
        bias = self.conv.bias
        return FusedUpConv3d(
            self.conv.weight.detach().clone(),
            None if bias is None else bias.detach().clone(),
            groups=self.conv.groups,
        )


def train_on_kernels(model: nn.Module, enabled: bool = True) -> bool:
    """Let the blocks of a network train on the kernels, in place, or on stock ops again.

    The branches of blocks stay apart, and so do their batch norms; the convs among them run on the
    kernels, whose gradients equal those of stock ops within 1e-5 of the largest one. This is for
    the CPU, in float32, without autocast, and contiguous. There a step takes some 40% of what it
    takes with contiguous stock ops, half of what it takes in channels_last_3d, and 60% of that with
    autocast to bfloat16. Everything else goes by stock ops, as without this.

    Args:
        model: any module; of its blocks, those of this module.
        enabled: False: stock ops, whatever the input is.

    Returns:
        Whether there is a block.
    """
    blocks = [m for m in model.modules() if isinstance(m, _BLOCKS)]
    for block in blocks:
        block.on_kernels = enabled
    return bool(blocks)


def freeze_statistics(model: nn.Module) -> None:
    """Let batch norms keep their statistics from now on, in place; the model can train on.

    All batch norms go to eval mode, and blocks of this module run merged from then on: as one conv
    or two each, whose weights gradients reach through. That is several times faster to train on
    the CPU, where the merged convs are the kernels (float32, without autocast; contiguous is
    fastest). ``model.train()`` puts batch norms back to training mode, but blocks stay merged: call
    this again after it.

    Args:
        model: any module; of what is not of this module, and of blocks that :func:`fuse` leaves as
            they are, only the batch norms are frozen. Hooks that are attached to the inside of a
            block afterwards are not called before this is called again.

    Source:
        Merging branches while they train: Hu et al., "Online Convolutional Re-parameterization",
        CVPR 2022, doi:10.1109/CVPR52688.2022.00065.
    """
    train_on_kernels(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
        elif isinstance(module, GroupParallel3d):
            module.merges = not why_not_fused(module)


_BLOCKS = (RepConv3d, ConvBN3d, GroupParallel3d, DownConv3d, UpConv3d)


def _convolved(conv: nn.Module, x: Tensor, on_kernels: bool) -> Tensor:
    """``conv(x)``, where wanted and possible on the kernels; ``conv`` keeps the size of ``x``."""
    if not (on_kernels and isinstance(conv, nn.Conv3d) and x.is_contiguous()):
        return conv(x)
    if not _suits_kernels(x) or not _is_untouched(conv, nn.Conv3d):
        return conv(x)
    if conv.kernel_size == (1, 1, 1):
        return reference.pointwise_conv3d(x, conv.weight, conv.bias, groups=conv.groups)
    return group_pointwise_conv3d(x, conv.weight, conv.bias, groups=conv.groups, relu=False)


def _is_untouched(conv: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a conv only does what its class says, so that something equal may do it."""
    return is_stock(conv, (kind,)) and not has_hooks(conv)


def _suits_kernels(x: Tensor) -> bool:
    """Whether the kernels, with a backward pass of their own, are the faster way to train on x."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    return not torch.is_autocast_enabled("cpu")


def reparameterise(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in which each :class:`RepConv3d` is one conv, still on stock ops.

    This is the inference form whose parameters the paper counts: the BN after the 1x1x1 conv stays.
    A conv of a derived class, with a hook or with other layers inside stays as it is.

    Args:
        model: any module; it is not changed.

    Returns:
        The copy, in eval mode, on the same device.
    """
    return _replaced(
        model, lambda m: m.fuse() if isinstance(m, RepConv3d) and not why_not_fused(m) else None
    )


def fuse(model: nn.Module) -> nn.Module:
    """A copy of ``model`` for inference, on the kernels, equal in eval mode to rounding.

    Each :class:`GroupParallel3d` becomes one kernel call with all BN folded, and so does each 3x3x3
    ``nn.Conv3d`` with padding 1 and stride 1 or (1, 2, 2). Other modules stay as they are, among
    them those with a ``forward`` of their own, with hooks or with other layers inside.

    Args:
        model: any module; it is not changed.

    Returns:
        The copy, in eval mode, on the same device.
    """

    def fused(module: nn.Module) -> nn.Module | None:
        if isinstance(module, GroupParallel3d | UpConv3d | RepConv3d | ConvBN3d):
            if why_not_fused(module):
                return None
            if isinstance(module, GroupParallel3d | UpConv3d):
                return module.fuse()
            module = module.fuse()
        if not is_stock(module, (nn.Conv3d, DownConv3d)) or has_hooks(module):
            return None
        if isinstance(module, nn.Conv3d) and _fits_kernel(module):
            return FusedConv3d(
                module.weight.detach().clone(),
                None if module.bias is None else module.bias.detach().clone(),
                groups=module.groups,
                stride=module.stride[1],
                relu=False,
            )
        return None

    return _replaced(model, fused)


class _DetachedCopies(TorchFunctionMode):
    """Lets ``deepcopy`` take tensors that hang in a graph of autograd, without that graph."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            args = (args[0].detach(), *args[1:])
        return func(*args, **(kwargs or {}))


def copied(model: ModuleType) -> ModuleType:
    """A deep copy; results of autograd that modules keep, such as normed weights, are detached."""
    with _DetachedCopies():
        return copy.deepcopy(model)


def why_not_fused(block: nn.Module) -> str:
    """Why a block cannot give way to what its ``fuse()`` returns; empty: it can.

    Args:
        block: :class:`GroupParallel3d`, :class:`UpConv3d`, :class:`RepConv3d` or
            :class:`ConvBN3d`.
    """
    if not is_stock(block, (GroupParallel3d, UpConv3d, RepConv3d, ConvBN3d)):
        return "a class of its own"
    if any_hooks(block):
        return "a hook is attached"
    for name, part in block.named_children():
        if isinstance(part, RepConv3d | ConvBN3d):
            if why := why_not_fused(part):
                return why
        elif not is_stock(part, (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d)):
            return f"its {name} is a {type(part).__name__}"
        elif isinstance(part, nn.BatchNorm3d) and part.running_mean is None:
            return f"its {name} keeps no statistics"
    return ""


def _fits_kernel(conv: nn.Conv3d) -> bool:
    return (
        conv.kernel_size == (3, 3, 3)
        and conv.padding == (1, 1, 1)
        and conv.dilation == (1, 1, 1)
        and conv.stride in ((1, 1, 1), (1, 2, 2))
        and conv.padding_mode == "zeros"
    )


def _conv_like(conv: nn.Conv3d, weight: Tensor, bias: Tensor) -> nn.Conv3d:
    new = nn.utils.skip_init(
        nn.Conv3d, conv.in_channels, conv.out_channels, 3, padding=1, groups=conv.groups
    )
    new.weight = nn.Parameter(weight)
    new.bias = nn.Parameter(bias)
    return new


def _replaced(model: nn.Module, replace: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """A deep copy in eval mode, each module replaced by ``replace(module)``, or kept for None."""
    new = replace(model)
    if new is not None:
        return new.eval()
    model = copied(model)
    done: dict[nn.Module, nn.Module] = {model: model}  # a module may be held under several names

    def walk(parent: nn.Module) -> None:
        for name, child in parent._modules.items():
            if child is None:
                continue
            if child not in done:
                new = replace(child)
                done[child] = child if new is None else new
                if new is None:
                    walk(child)
            parent._modules[name] = done[child]

    walk(model)
    return model.eval()
