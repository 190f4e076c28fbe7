"""Layers for inference, which :func:`gplws.accelerate` puts in the place of stock ones.

Each computes what the layers computed that it stands for, to rounding. Where there are several ways
to do so it takes the one of a rule, or the one that was fastest in a trial of the same shape.
Weights are constants; gradients flow to the inputs.
"""

from __future__ import annotations

import itertools
import math
import operator
import time
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree

from gplws.ops.arguments import needs_stock
from gplws.ops.group_pointwise_conv3d import group_pointwise_conv3d
from gplws.ops.up_conv3d import up_conv3d

Engine = Literal["kernel", "onednn", "matmul", "stock"]
"""Who computes a conv: a kernel of this package; oneDNN, also where stock PyTorch would not ask it;
a product of matrices; or stock PyTorch."""

DTYPES = (torch.float32, torch.bfloat16)
"""What the layers have more than stock PyTorch for."""
PIXELS_AT_ONCE = 2**19
"""Pixels of the frames that pass a 2-D network together, so that its maps stay in cache."""
_TRIALS = 3
_CHANNELS_AT_ONCE = 128  # of the sums of 2-D convs
_NARROW = 4  # channels out
_NONE, _RELU = 1.0, 0.0  # slopes below zero: all activations that are fused


def takes_shortcuts(*tensors: Tensor | float | None) -> bool:
    """Whether tensors are changed in place, and ops used that neither compilers nor autograd know.

    They are where all tensors lie on the CPU in one of ``DTYPES``, and nothing looks at the graph.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    if needs_stock(*(tensor for tensor in tensors if isinstance(tensor, Tensor))):
        return False
    return all(
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.dtype in DTYPES
        and not (tensor.requires_grad and torch.is_grad_enabled())
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        for tensor in tensors
        if isinstance(tensor, Tensor)
    )


def stock_layout(results: Any, inputs: Any) -> Any:
    """Results as stock layers lay them out: contiguous, unless an input is channels_last.

    Args:
        results: tree of tensors and anything else.
        inputs: tree of what they were computed from.

    Returns:
        The tree, with contiguous copies of tensors where those are not contiguous.
    """
    if any(map(_is_channels_last, _pytree.tree_leaves(inputs))):
        return results
    return _pytree.tree_map(lambda x: x.contiguous() if _is_scattered(x) else x, results)


def _is_scattered(x: Any) -> bool:
    """Whether a value is a tensor that is not contiguous. Expanded ones are left out."""
    if not isinstance(x, Tensor) or x.layout is not torch.strided:
        return False
    return not x.is_contiguous() and 0 not in x.stride()


def _is_channels_last(x: Any) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if not _is_scattered(x) or x.dim() not in formats:
        return False
    if not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False  # vmap cannot say
    return x.is_contiguous(memory_format=formats[x.dim()])


def in_place(name: str, value: Any, other: Any) -> Any:
    """``value += other`` and the like by the name of the operator; changes tensors, not numbers."""
    return getattr(operator, name)(value, other)


def activated(x: Tensor, slope: float, *, own: bool) -> Tensor:
    """Leaky ReLU (ReLU for slope 0, nothing for 1), in place where ``x`` is nobody else's."""
    if slope == _NONE:
        return x
    if slope == _RELU:
        return x.relu_() if own else x.relu()
    return F.leaky_relu(x, slope, inplace=own)


def _constant(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor.detach().clone(), requires_grad=False)


class FoldedConv(nn.Module):
    """A conv with batch norm folded in, and what follows it.

    ``act(act(conv(x)) + residual)``, and with :meth:`append_pointwise` a second conv in between,
    where the activations are leaky ReLUs given by their slopes: 0 is ReLU, 1 is none.

    Args:
        conv: 2-D or 3-D conv, transposed or not, that pads with zeros; its geometry is taken.
        weight: its weight, batch norm folded in.
        bias: its bias, batch norm folded in, or None.
        slope: of the activation after the conv.
        residual_slope: of the activation after the sum.
        keeps_dtype: the sum has the dtype of the conv, as one in place, also where that of the
            residual is wider.

    Attributes:
        planar: 3-D results are contiguous, else channels_last_3d; those of 2-D convs are always
            channels_last.
        tuning: each new shape has a trial of all engines.
        chosen: what the trials found.
    """

    def __init__(
        self,
        conv: nn.Module,
        weight: Tensor,
        bias: Tensor | None,
        *,
        slope: float = _NONE,
        residual_slope: float = _NONE,
        keeps_dtype: bool = False,
    ) -> None:
        super().__init__()
        assert isinstance(conv, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d)
        self.axes = len(conv.kernel_size)
        self.kernel_size, self.stride, self.dilation = (
            tuple(conv.kernel_size),
            tuple(conv.stride),
            tuple(conv.dilation),
        )
        self.padding = conv.padding if isinstance(conv.padding, str) else tuple(conv.padding)
        self.output_padding = tuple(conv.output_padding)
        self.transposed, self.groups = conv.transposed, conv.groups
        # Nothing here reads these three; the Python of a network may.
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.padding_mode = conv.padding_mode
        self.slope, self.residual_slope, self.keeps_dtype = slope, residual_slope, keeps_dtype
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        if self.axes == 2 and not self.transposed:
            self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last)
        self.bias = _constant(bias)
        self.middle_slope = _NONE
        self.pointwise_weight: nn.Parameter | None = None
        self.pointwise_bias: nn.Parameter | None = None
        self.planar = True
        self.tuning = False
        self.chosen: dict[tuple[int, ...], Engine] = {}

    def append_pointwise(self, pointwise: FoldedConv) -> None:
        """Put a conv of one tap behind what was there; its activations become the last ones."""
        self.middle_slope = self.slope
        self.slope, self.residual_slope = pointwise.slope, pointwise.residual_slope
        self.keeps_dtype = pointwise.keeps_dtype
        self.pointwise_weight, self.pointwise_bias = pointwise.weight, pointwise.bias

    @property
    def fits_kernel(self) -> bool:
        """Whether a kernel of this package has this geometry."""
        if self.axes != 3 or self.kernel_size != (3, 3, 3) or self.padding != (1, 1, 1):
            return False
        if self.dilation != (1, 1, 1):
            return False
        if self.transposed:
            up = self.stride == (1, 2, 2) and self.output_padding == (0, 1, 1)
            return up and self.weight.shape[1] == 1
        return self.stride in ((1, 1, 1), (1, 2, 2))

    @property
    def is_pointwise(self) -> bool:
        """Whether it is a product of matrices for each pixel."""
        return (
            not self.transposed
            and self.groups == 1
            and math.prod(self.kernel_size) * math.prod(self.stride) == 1
            and self.padding in ("valid", "same", (0,) * self.axes)
        )

    def engines(self, x: Tensor) -> list[Engine]:
        """What can compute the conv for ``x`` without gradient, the choice of the rule first."""
        if x.dim() != self.axes + 2 or x.numel() == 0 or x.dtype != self.weight.dtype:
            return ["stock"]
        if self.fits_kernel:
            if self.transposed:
                return ["kernel", "stock"]
            # oneDNN cannot fill its vectors with few channels. Scratch of the kernel grows with
            # them, so that it is slower where they are many.
            narrow = self.groups > 1 or self.weight.shape[0] <= _NARROW
            inputs, pixels = x.shape[1] // self.groups, x.shape[3] * x.shape[4]
            wide = inputs > 128 or (inputs >= 96 and pixels <= 256)
            wide = wide and pixels <= 4096 and self.pointwise_weight is None
            if narrow or (self.planar and not wide):
                return ["kernel", "onednn"]
            return ["onednn", "kernel"]
        if self.axes == 2 or self.transposed or isinstance(self.padding, str):
            return ["stock"]
        if self.planar and self.is_pointwise:
            return ["matmul", "onednn"]
        return ["onednn"]

    def forward(self, x: Tensor, residual: Tensor | float | None = None) -> Tensor:
        """(B, C, ...) -> (B, K, ...), ``residual`` added: a tensor or a number.

        ``x`` is anything that the stock conv takes.
        """
        if not takes_shortcuts(x, residual):
            plain = x.device.type == "cpu" and x.dtype in DTYPES and x.dim() == 5
            plain = plain and not torch.is_autocast_enabled("cpu") and x.dtype == self.weight.dtype
            return self._compute("kernel" if plain and self.fits_kernel else "stock", x, residual)
        engines = self.engines(x)
        shape = tuple(x.shape)
        if self.tuning and len(engines) > 1 and shape not in self.chosen:
            self.chosen[shape] = self._fastest(engines, x, residual)
        return self._compute(self.chosen.get(shape, engines[0]), x, residual)

    def _fastest(self, engines: list[Engine], x: Tensor, residual: Tensor | float | None) -> Engine:
        """The choice of the rule, unless another one is faster by more than chance."""
        seconds = dict.fromkeys(engines, math.inf)
        for trial in range(1 + _TRIALS):
            for engine in engines:
                start = time.perf_counter()
                self._compute(engine, x, residual)
                if trial:
                    seconds[engine] = min(seconds[engine], time.perf_counter() - start)
        best = min(engines, key=seconds.__getitem__)
        return best if seconds[best] < 0.95 * seconds[engines[0]] else engines[0]

    def _compute(self, engine: Engine, x: Tensor, residual: Tensor | float | None) -> Tensor:
        own = takes_shortcuts(x, residual)
        if own and x.dim() == self.axes + 2:
            x = x.contiguous(memory_format=self._format)
        if engine == "kernel":
            y = self._by_kernel(x.contiguous(), residual, own=own)
            return y.contiguous(memory_format=self._format) if own else y
        if engine == "matmul":
            y = _product(x, self.weight, self.bias)
        elif engine == "onednn":
            y = torch.mkldnn_convolution(
                x,
                self.weight,
                self.bias,
                cast(Any, self.padding),
                self.stride,
                self.dilation,
                self.groups,
            )
        elif own and self.axes == 2 and not self.transposed and self.groups == 1:
            geometry = (self.stride, self.padding, self.dilation)
            y = _conv2d(x, self.weight, self.bias, *geometry)
        else:
            y = self._by_stock(x)
        if self.pointwise_weight is not None:
            y = activated(y, self.middle_slope, own=own)
            y = F.conv3d(y, self.pointwise_weight, self.pointwise_bias)
        return self._finish(y, residual, own=own)

    @property
    def _format(self) -> torch.memory_format:
        if self.axes == 2:
            return torch.channels_last
        return torch.contiguous_format if self.planar else torch.channels_last_3d

    def _by_stock(self, x: Tensor) -> Tensor:
        if not self.transposed:
            conv: Any = F.conv2d if self.axes == 2 else F.conv3d
            return conv(
                x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
            )
        conv = F.conv_transpose2d if self.axes == 2 else F.conv_transpose3d
        return conv(
            x,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.output_padding,
            self.groups,
            self.dilation,
        )

    def _by_kernel(self, x: Tensor, residual: Tensor | float | None, *, own: bool) -> Tensor:
        shape = self._output_shape(x)
        slopes = (self.slope, self.residual_slope)
        # The kernels know ReLU and residuals of their own shape and dtype; the rest is done after.
        taken = residual if isinstance(residual, Tensor) else None
        if taken is not None and (tuple(taken.shape) != shape or taken.dtype != x.dtype):
            taken = None
        if self.transposed:
            taken = taken if self.slope == _NONE else None
            y = up_conv3d(x, self.weight, self.bias, taken, groups=self.groups)
            if taken is not None:
                return activated(y, self.residual_slope, own=own)
            return self._finish(y, residual, own=own)
        fused = taken is residual and all(slope in (_NONE, _RELU) for slope in slopes)
        if residual is None and self.residual_slope == _RELU:
            slopes = (_RELU, _NONE)
        two = self.pointwise_weight is not None
        y = group_pointwise_conv3d(
            x,
            self.weight,
            self.bias,
            self.pointwise_weight,
            self.pointwise_bias,
            taken if fused else None,
            groups=self.groups,
            stride=self.stride[1],
            relu=self.middle_slope == _RELU if two else fused and slopes[0] == _RELU,
            pointwise_relu=two and fused and slopes[0] == _RELU,
            residual_relu=fused and residual is not None and slopes[1] == _RELU,
        )
        return y if fused else self._finish(y, residual, own=own)

    def _output_shape(self, x: Tensor) -> tuple[int, ...]:
        batch, _, frames, height, width = x.shape
        if self.transposed:
            return (batch, self.groups, frames, 2 * height, 2 * width)
        weight = self.weight if self.pointwise_weight is None else self.pointwise_weight
        step = self.stride[1]
        return (batch, weight.shape[0], frames, -(-height // step), -(-width // step))

    def _finish(self, y: Tensor, residual: Tensor | float | None, *, own: bool) -> Tensor:
        y = activated(y, self.slope, own=own)
        if residual is not None:
            alike = isinstance(residual, Tensor) and (
                residual.shape == y.shape and residual.dtype == y.dtype
            )
            total = y.add_(residual) if own and alike else y + residual
            y = total.to(y.dtype) if self.keeps_dtype else total
        return activated(y, self.residual_slope, own=own)

    def extra_repr(self) -> str:
        """Shapes and slopes."""
        text = f"{tuple(self.weight.shape)}, stride={self.stride}, groups={self.groups}"
        if self.pointwise_weight is not None:
            text += f", middle_slope={self.middle_slope:g}"
            text += f", pointwise={tuple(self.pointwise_weight.shape[:2])}"
        return text + f", slopes=({self.slope:g}, {self.residual_slope:g})"


def _conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...] = (1, 1),
    padding: str | tuple[int, ...] = (0, 0),
    dilation: tuple[int, ...] = (1, 1),
) -> Tensor:
    """``F.conv2d`` of an image or images in channels_last, as a sum over few channels at a time.

    In this layout oneDNN sums over all channels one after the other: over 512 channels the rounding
    error is twice that of the sum over parts, at no gain in time.
    """
    geometry = (cast(Any, stride), cast(Any, padding), cast(Any, dilation))
    if x.dim() != 4 or x.shape[1] != weight.shape[1] or x.shape[1] <= _CHANNELS_AT_ONCE:
        return F.conv2d(x, weight, bias, *geometry)
    parts = zip(x.split(_CHANNELS_AT_ONCE, 1), weight.split(_CHANNELS_AT_ONCE, 1), strict=True)
    first, kernel = next(parts)
    y = F.conv2d(first, kernel, bias, *geometry)
    for part, kernel in parts:
        y += F.conv2d(part, kernel, None, *geometry)
    return y


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Conv of one tap: (B, C, ...) -> (B, K, ...), contiguous."""
    flat = x.flatten(2)  # (B, C, P)
    matrix = weight.flatten(1).expand(x.shape[0], -1, -1)  # (B, K, C)
    y = torch.bmm(matrix, flat)
    if bias is not None:
        y += bias[:, None]
    return y.unflatten(2, x.shape[2:])


class JoinedUpConv3d(nn.Module):
    """Transposed 3x4x4 conv that doubles H and W, and the 3x3x3 conv behind it, as one 2-D conv.

    Nothing stands between the two, so that both together are linear: a pixel of the result sees
    5x3x3 pixels of the small map, with other weights for each of the four kinds of pixels. A 2-D
    conv of each frame computes all kinds for the five results that the frame takes part in, and
    what the frames beyond the ends, which the second conv takes as zeros, would have added to the
    first and the last result. Such pixels beyond the border concern one row or column on each side,
    which are computed one conv after the other.

    Args:
        up: the first conv, batch norm folded in.
        conv: the second one.
    """

    def __init__(self, up: FoldedConv, conv: FoldedConv) -> None:
        super().__init__()
        self.up, self.conv = up, conv
        weight, bias = self._kernels(up, conv)
        weight = weight.to(conv.weight.dtype).contiguous(memory_format=torch.channels_last)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)

    @staticmethod
    def suits(up: FoldedConv, conv: FoldedConv) -> bool:
        """Whether two convs are of these kinds, and together take fewer products."""
        if not up.transposed or conv.transposed or (up.axes, conv.axes) != (3, 3):
            return False
        first = (up.kernel_size, up.stride, up.padding, up.output_padding, up.dilation, up.groups)
        second = (conv.kernel_size, conv.stride, conv.dilation, conv.groups)
        if first != ((3, 4, 4), (1, 2, 2), (1, 1, 1), (0, 0, 0), (1, 1, 1), 1):
            return False
        if second != ((3, 3, 3), (1, 1, 1), (1, 1, 1), 1) or conv.padding not in (
            (1, 1, 1),
            "same",
        ):
            return False
        if (up.slope, up.residual_slope) != (_NONE, _NONE) or conv.pointwise_weight is not None:
            return False
        inputs, middle = up.weight.shape[:2]
        results = conv.weight.shape[0]
        apart = middle * (
            4 * 12 * inputs + 4 * 27 * results
        )  # products for a pixel of the small map
        return 2 * 9 * inputs * 7 * 4 * results < apart

    @staticmethod
    def _kernels(up: FoldedConv, conv: FoldedConv) -> tuple[Tensor, Tensor]:
        """Weights (7 4 K, C, 3, 3) and bias of the 2-D conv.

        Its channels are, for distances -2 to 2 of the frame from that of the result, then for the
        frame before the first and the one behind the last: the four kinds of pixels.
        """
        first, second = up.weight.detach().double(), conv.weight.detach().double()
        inputs, middle = first.shape[:2]
        results = second.shape[0]
        # Both along rows and columns, for each pair of taps along the frames.
        pairs = first.new_zeros(3, 3, results, inputs, 6, 6)
        for after, before, row, column in itertools.product(range(3), repeat=4):
            part = torch.einsum(
                "km,cmyx->kcyx", second[:, :, after, row, column], first[:, :, before]
            )
            pairs[after, before, :, :, 2 - row : 6 - row, 2 - column : 6 - column] += part
        frames = first.new_zeros(7, results, inputs, 6, 6)
        for after, before in itertools.product(range(3), repeat=2):
            frames[after - before + 2] += pairs[after, before]
        frames[5], frames[6] = pairs[0, 0], pairs[2, 2]
        kinds = [
            frames[..., y : y + 5 : 2, x : x + 5 : 2].flip(-2, -1)
            for y, x in itertools.product(range(2), repeat=2)
        ]
        weight = torch.stack(kinds, 1).flatten(0, 2)  # (7, 4, K, C, 3, 3) -> (7 4 K, C, 3, 3)

        bias = first.new_zeros(7, 4, results)
        if up.bias is not None:  # goes through the taps of the second conv
            taps = torch.einsum("kmnyx,m->nk", second, up.bias.detach().double())
            bias[2], bias[5], bias[6] = taps.sum(0), taps[0], taps[2]
        if conv.bias is not None:
            bias[2] += conv.bias.detach().double()
        return weight, bias.flatten()

    def forward(self, x: Tensor, residual: Tensor | float | None = None) -> Tensor:
        """(B, C, N, H, W) -> (B, K, N, 2 H, 2 W), ``residual`` added."""
        if not takes_shortcuts(x, residual) or x.dim() != 5 or x.numel() == 0:
            return self.conv(self.up(x), residual)
        batch, _, frames, height, width = x.shape
        results = self.conv.weight.shape[0]
        sums = x.new_zeros(batch, frames, 4 * results, height, width)
        for frame in range(frames):
            parts = F.conv2d(x[:, :, frame], self.weight, self.bias, padding=1)
            parts = parts.contiguous().unflatten(1, (7, 4 * results))
            for distance in range(-2, 3):
                if 0 <= frame - distance < frames:
                    sums[:, frame - distance] += parts[:, distance + 2]
            if frame == 0:
                sums[:, frame] -= parts[:, 5]
            if frame == frames - 1:
                sums[:, frame] -= parts[:, 6]
        kinds = sums.view(batch, frames, 2, 2, results, height, width)
        y = kinds.permute(0, 4, 1, 5, 2, 6, 3).reshape(
            batch, results, frames, 2 * height, 2 * width
        )
        y[..., :1, :] = self._apart(x[..., :2, :])[..., :1, :]
        y[..., -1:, :] = self._apart(x[..., -2:, :])[..., -1:, :]
        y[..., :1] = self._apart(x[..., :2])[..., :1]
        y[..., -1:] = self._apart(x[..., -2:])[..., -1:]
        return self.conv._finish(y, residual, own=True)

    def _apart(self, x: Tensor) -> Tensor:
        """Both convs, one after the other, without what follows."""
        conv = self.conv
        y = self.up._by_stock(x)
        return torch.mkldnn_convolution(
            y, conv.weight, conv.bias, cast(Any, (1, 1, 1)), conv.stride, conv.dilation, 1
        )


class UpsampledConv2d(nn.Module):
    """3x3 conv of a map whose pixels were doubled in H and W, without the doubled map.

    Of the nine taps of a doubled pixel several meet the same one: each of the four kinds of pixels
    sees a 2x2 conv of the small map, with sums of the weights.

    Args:
        conv: 3x3 conv with stride 1, padding 1; batch norm folded in.
    """

    def __init__(self, conv: FoldedConv) -> None:
        super().__init__()
        self.conv = conv
        weight = conv.weight.detach()  # (K, C, 3, 3)
        first, second, third = weight.double().unbind(2)
        rows = (torch.stack((first, second + third), 2), torch.stack((first + second, third), 2))
        kinds = []
        for row in rows:
            left, centre, right = row.unbind(3)
            kinds.append(torch.stack((left, centre + right), 3))
            kinds.append(torch.stack((left + centre, right), 3))
        sums = torch.cat(kinds).to(weight.dtype)  # (4 K, C, 2, 2)
        self.sums = nn.Parameter(
            sums.contiguous(memory_format=torch.channels_last), requires_grad=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K, 2 H, 2 W)."""
        conv = self.conv
        if not takes_shortcuts(x) or x.dim() != 4:
            return conv(F.interpolate(x, scale_factor=2.0))
        batch, _, height, width = x.shape
        bias = None if conv.bias is None else conv.bias.repeat(4)
        x = x.contiguous(memory_format=torch.channels_last)
        four = _conv2d(x, self.sums, bias, padding=(1, 1))  # (B, 4 K, H + 1, W + 1)
        four = activated(activated(four, conv.slope, own=True), conv.residual_slope, own=True)
        y = torch.empty(
            (batch, conv.weight.shape[0], 2 * height, 2 * width),
            dtype=x.dtype,
            memory_format=torch.channels_last,
        )
        for kind, (below, right) in enumerate(itertools.product((0, 1), repeat=2)):
            part = four[:, kind * y.shape[1] : (kind + 1) * y.shape[1]]
            y[:, :, below::2, right::2] = part[:, :, below : below + height, right : right + width]
        return y


class Framewise(nn.Module):
    """A 2-D network that computes few frames at a time, so that its maps stay in cache.

    Args:
        network: maps (B, C, H, W) to tensors whose first axis is B, each from one image alone, and
            to constants.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *given: Tensor, **named: Tensor) -> Any:
        """What the network gives for its one argument, by place or by name."""
        (x,) = (*given, *named.values())
        if not takes_shortcuts(x) or x.dim() != 4 or x.numel() == 0:
            return self.network(*given, **named)
        count = max(1, PIXELS_AT_ONCE // (x.shape[2] * x.shape[3]))
        parts = -(-x.shape[0] // count)
        if parts == 1:
            return self.network(*given, **named)
        results = [_pytree.tree_flatten(self.network(part)) for part in x.tensor_split(parts)]
        leaves = [
            torch.cat(entries) if isinstance(entries[0], Tensor) else entries[0]
            for entries in zip(*(r[0] for r in results), strict=True)
        ]
        return _pytree.tree_unflatten(leaves, results[0][1])


class FoldedMaxPool3d(nn.Module):
    """:func:`max_pool3d` as a layer, with the same arguments."""

    def __init__(
        self,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0,
    ) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, N, H, W) -> (B, C, n, h, w)."""
        return max_pool3d(x, self.kernel_size, self.stride, self.padding)


def max_pool3d(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
) -> Tensor:
    """``torch.nn.functional.max_pool3d``, one axis after the other; NaN wins.

    Args:
        x: (B, C, N, H, W) or (C, N, H, W).
        kernel_size: pixels of a window, along N, H and W.
        stride: step of the windows; default: ``kernel_size``.
        padding: on each side; at most half of ``kernel_size``.

    Returns:
        The largest value of each window; differentiable.
    """
    sizes = _triple(kernel_size)
    steps = sizes if stride is None or stride == () or stride == [] else _triple(stride)
    margins = _triple(padding)
    small = any(
        size > 2 * step + 1 or 2 * margin > size
        for size, step, margin in zip(sizes, steps, margins, strict=True)
    )
    if small or not takes_shortcuts(x) or x.dim() not in (4, 5) or x.numel() == 0:
        return F.max_pool3d(x, sizes, steps, margins)
    # Whole rows first, then within the rows, when there are fewer of them.
    for axis, size, step, margin in zip(
        (-2, -1, -3), *_reordered(sizes, steps, margins), strict=True
    ):
        if size > 1 or step > 1 or margin:
            x = _pool_axis(x, axis, size, step, margin)
    return x


def _reordered(*triples: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [(triple[1], triple[2], triple[0]) for triple in triples]


def _pool_axis(x: Tensor, axis: int, size: int, step: int, margin: int) -> Tensor:
    """Largest of ``size`` neighbours along one axis."""
    length = x.shape[axis]
    count = (length + 2 * margin - size) // step + 1
    if count < 1:
        raise ValueError(f"max_pool3d: windows of {size} do not fit {length} pixels")

    def neighbours(tap: int) -> tuple[int, int]:
        """Windows whose pixel ``tap`` exists, first and behind the last."""
        first = max(0, -(-(margin - tap) // step))
        return first, min(count, (length - 1 + margin - tap) // step + 1)

    def pixels(tap: int, first: int, last: int) -> Tensor:
        begin = first * step - margin + tap
        index: list[slice] = [slice(None)] * x.dim()
        index[axis] = slice(begin, begin + (last - first - 1) * step + 1, step)
        return x[tuple(index)]

    # A tap that all windows have comes first, then the others in place.
    taps = sorted(range(size), key=lambda tap: neighbours(tap) != (0, count))
    if neighbours(taps[0]) != (0, count):
        lowest = torch.full_like(x.narrow(axis, 0, 1), -math.inf)
        y = lowest.expand(*x.shape[: x.dim() + axis], count, *x.shape[x.dim() + axis + 1 :]).clone()
    elif size > 1 and neighbours(taps[1]) == (0, count):
        y = torch.maximum(pixels(taps[0], 0, count), pixels(taps[1], 0, count))
        taps = taps[1:]
    else:
        y = pixels(taps[0], 0, count).clone()
    for tap in taps[1:]:
        first, last = neighbours(tap)
        if first < last:
            part = y.narrow(axis, first, last - first)
            torch.maximum(part, pixels(tap, first, last), out=part)
    return y


def _triple(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) * 3 if isinstance(value, int) else tuple(value)
