"""GPLWS-Net: a U-shaped 3-D conv network over the whole focal stack."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gplws import nn as gnn
from gplws.classical import StackStatistics, position_at, stack_statistics
from gplws.luminance import luminance
from gplws.models.classical_steps import CLASSICAL_STEPS
from gplws.models.focus_features import FEATURES, features_reach, focus_features
from gplws.models.frame_bins import FrameBins
from gplws.models.frame_bins import bin_size as bin_size_of
from gplws.nn.blocks import ConvForm, DownConv3d, GroupParallel3d, UpConv3d
from gplws.nn.fused import FusedConv3d, FusedGroupParallel3d, FusedUpConv3d
from gplws.nn.inference import takes_shortcuts
from gplws.nn.readout import (
    batch_positions,
    confidence_of,
    is_known,
    median_and_deviation,
)
from gplws.nn.stock import has_hooks, is_stock
from gplws.nn.symmetry import make_symmetric
from gplws.nn.workspace import MemoryPlan, Recorder, Runner, WorkspacePool
from gplws.ops.focus_search import focus_search
from gplws.ops.reference import FocusSearchResult

Skip = Literal["add", "concat"]
Stem = Literal["frames", "features"]
Groups = int | Literal["depthwise"]

# First weights of the two focus responses in the logits, and how much faster than other weights
# they learn.
_PRIOR, _PRIOR_RATE = 3.0, 10.0


class GPLWSNet(nn.Module):
    """Grouping parallelism lightweight network: focal stack -> focus volume.

    The contracting path halves H and W at each level and never touches the number of frames; the
    expanding path adds the skip connections (or concatenates them). The result holds one logit for
    each pixel and frame: their softmax says how likely the pixel is in focus there.

    Args:
        in_channels: channels of the stack; a gray stack is spread over them.
        widths: channels of the levels, fine to coarse; each divides the next.
        depths: group parallel modules of each encoder level.
        middle: group parallel modules between encoder and decoder.
        decoder_depths: group parallel modules of each decoder level, coarse to fine.
        groups: groups of the 3x3x3 convs; divides each of ``widths``. 1 makes them dense convs,
            "depthwise" gives each channel a group of its own.
        skip: "add", or "concat" followed by a 1x1x1 conv.
        form: "reparameterised" or "plain" convs in the group parallel modules.
        stem: what the first conv sees: "frames" (as in the paper) or "features": gray frames,
            locally normalised, and the logarithms of their classical focus response at two scales
            (:func:`gplws.models.focus_features.focus_features`). The responses are also added to
            the logits with learnt weights, so that the network starts from a classical method and
            learns what to change about it.
        symmetric: all kernels are symmetric along the frames, so that a reversed stack gives
            exactly the reversed focus volume: no bias towards either end can be learnt.

    Raises:
        ValueError: numbers of levels that do not match, or unknown ``groups``, ``skip``, ``form``
            or ``stem``.

    Notes:
        The defaults have 555,513 parameters in training form and 540,273 after
        :meth:`reparameterise`, as printed in the paper; with ``skip="concat"`` 546,321 after
        :meth:`reparameterise`, with ``form="plain"`` 540,936. :meth:`fuse` leaves 538,951, since
        the batch norms of the 1x1x1 convs are folded as well. The paper does not print the layout;
        this one is an exact fit with natural operations.

    Source:
        "GPLWS-Net: grouping parallelism lightweight real-time microscopic 3D shape reconstruction",
        Journal of Software, 2024, section 2 and Tables 1 and 3.

    Example:
        >>> model = GPLWSNet().eval()
        >>> model.predict(torch.rand(1, 3, 10, 64, 64)).depth.shape
        torch.Size([1, 64, 64])
    """

    def __init__(
        self,
        in_channels: int = 3,
        widths: Sequence[int] = (12, 24, 48, 96),
        depths: Sequence[int] = (2, 1, 2, 2),
        middle: int = 2,
        decoder_depths: Sequence[int] = (2, 1, 1),
        groups: Groups = 4,
        skip: Skip = "add",
        form: ConvForm = "reparameterised",
        stem: Stem = "frames",
        symmetric: bool = False,
    ) -> None:
        super().__init__()
        if len(depths) != len(widths) or len(decoder_depths) != len(widths) - 1:
            raise ValueError(
                f"expected {len(widths)} depths and {len(widths) - 1} decoder_depths for "
                f"{len(widths)} widths, got {len(depths)} and {len(decoder_depths)}"
            )
        if any(coarse % fine for fine, coarse in itertools.pairwise(widths)):
            raise ValueError(f"each of widths must divide the next one, got {tuple(widths)}")
        if groups != "depthwise" and not isinstance(groups, int):
            raise ValueError(f"groups must be a number or 'depthwise', got {groups!r}")
        if skip not in ("add", "concat"):
            raise ValueError(f"skip must be 'add' or 'concat', got {skip!r}")
        if stem not in ("frames", "features"):
            raise ValueError(f"stem must be 'frames' or 'features', got {stem!r}")
        if stem == "features" and in_channels != FEATURES:
            raise ValueError(f"stem 'features' needs in_channels = {FEATURES}, got {in_channels}")
        self.config: dict[str, Any] = {
            "in_channels": in_channels,
            "widths": list(widths),
            "depths": list(depths),
            "middle": middle,
            "decoder_depths": list(decoder_depths),
            "groups": groups,
            "skip": skip,
            "form": form,
            "stem": stem,
            "symmetric": symmetric,
        }
        self.in_channels = in_channels
        self.coarsest = 2 ** (len(widths) - 1)  # H and W are padded to multiples of it

        def groups_of(channels: int) -> int:
            return channels if groups == "depthwise" else groups

        def blocks(width: int, count: int) -> list[nn.Module]:
            per_conv = groups_of(width)
            return [GroupParallel3d(width, width, per_conv, form=form) for _ in range(count)]

        first_groups = groups_of(in_channels)
        first = GroupParallel3d(
            in_channels, widths[0], 1 if in_channels % first_groups else first_groups, form=form
        )
        encoders = [[first, *blocks(widths[0], depths[0] - 1)]]
        encoders += [blocks(w, n) for w, n in zip(widths[1:], depths[1:], strict=True)]
        self.encoders = nn.ModuleList(nn.Sequential(*level) for level in encoders)
        self.downs = nn.ModuleList(
            DownConv3d(fine, coarse) for fine, coarse in itertools.pairwise(widths)
        )
        self.middle = nn.Sequential(*blocks(widths[-1], middle))
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))  # (coarse, fine)
        self.ups = nn.ModuleList(
            UpConv3d(coarse, fine) if skip == "add" else UpConcat3d(coarse, fine)
            for coarse, fine in pairs
        )
        self.decoders = nn.ModuleList(
            nn.Sequential(*blocks(fine, n))
            for (_, fine), n in zip(pairs, decoder_depths, strict=True)
        )
        self.head = GroupParallel3d(widths[0], 1, groups_of(widths[0]), form=form, final_relu=False)
        if stem == "features":
            weights = torch.full((FEATURES - 1,), _PRIOR / _PRIOR_RATE)
            self.prior: nn.Parameter | None = nn.Parameter(weights)
        else:
            self.prior = None
        if symmetric:
            make_symmetric(self)
        self._workspaces = WorkspacePool()

    @property
    def reach(self) -> int:
        """Pixels on each side that a pixel of :meth:`predict` without refinement depends on."""
        config = self.config
        levels = len(config["widths"])
        modules = list(config["depths"])
        modules[-1] += config["middle"]
        for level, count in zip(range(levels - 2, -1, -1), config["decoder_depths"], strict=True):
            modules[level] += count
        modules[0] += 1  # the head
        # A 3x3x3 conv at level l reaches 2^l pixels; so does the conv down from it, and the conv up
        # to level l reaches as far as one of the coarser level.
        reach = sum(count << level for level, count in enumerate(modules))
        reach += sum((1 << level) + (2 << level) for level in range(levels - 1))
        return reach + (features_reach() if self.refines else 0)

    @property
    def floats_per_voxel(self) -> float:
        """Memory that one pass takes, in floats for each voxel of the stack."""
        outside = 2  # the stack and the focus volume
        if self.prior is not None:
            outside += FEATURES + 1  # and a sum while the focus volume is made
        if self._is_planned():
            side = 16 * self.coarsest
            stack = torch.empty(1, 1, 1, side, side, device="meta")
            return self._plan(stack).size / 4 / side**2 + outside
        # Two tensors of each level, and stock convs and batch norms keep as much again.
        widths = self.config["widths"]
        tensors = 4 * sum(width / 4**level for level, width in enumerate(widths))
        return tensors + self.in_channels + outside

    def forward(self, stack: Tensor) -> Tensor:
        """Focus volume of a stack.

        Args:
            stack: (B, C, N, H, W) with C = ``in_channels`` or 1; any B, N, H, W >= 1.

        Returns:
            (B, N, H, W) logits over the frames; differentiable.

        Raises:
            ValueError: ``stack`` is not 5-D, empty, or has another number of channels.
        """
        self._check(stack)
        if self.prior is None:
            return self._logits(stack)
        features = focus_features(luminance(stack.float())[:, 0])
        logits = self._logits(features.channels.to(self._dtype)).float()
        weights = (_PRIOR_RATE * self.prior.float()).unbind()
        for weight, response in zip(weights, features.responses.unbind(1), strict=True):
            logits = torch.addcmul(logits, weight, response)
        return logits

    def _check(self, stack: Tensor) -> None:
        if stack.dim() != 5 or stack.shape[1] not in (1, self.in_channels) or 0 in stack.shape:
            shapes = (
                f"(B, {channels}, N, H, W)" for channels in dict.fromkeys((self.in_channels, 1))
            )
            raise ValueError(
                f"stack must be {' or '.join(shapes)} and not empty, got shape {tuple(stack.shape)}"
            )

    @property
    def input_dtype(self) -> torch.dtype:
        """Dtype in which stacks are expected: that of the weights, but float32 for features."""
        return self._dtype if self.prior is None else torch.float32

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def _logits(self, x: Tensor) -> Tensor:
        """(B, C, N, H, W) in the dtype of the weights -> (B, N, H, W)."""
        height, width = x.shape[-2:]
        reuses = self._may_reuse_memory(x)
        margins = (0, -width % self.coarsest, 0, -height % self.coarsest, 0, 0)
        if any(margins):
            x = F.pad(x, margins, "replicate")
        x = x.expand(-1, self.in_channels, -1, -1, -1)
        if reuses:
            with self._workspaces.borrow() as workspace:
                key = (tuple(x.shape), x.dtype, x.is_contiguous())  # else dense() takes memory
                workspace.begin(key, lambda: self._plan(x))
                volume = self._focus_volume(x, Runner(workspace))
        else:
            volume = self._focus_volume(x, Runner(None))
        return volume[:, 0, :, :height, :width]

    def _focus_volume(self, x: Tensor, run: Runner) -> Tensor:
        """(B, C, N, H, W) with H and W multiples of ``coarsest`` -> (B, 1, N, H, W)."""
        levels = iter(self.encoders)
        if x.device.type == "cuda" and x.dtype != torch.float32:
            x = self._channels_last(next(levels), x)
        else:
            x = run.chain(next(levels), run.dense(x))
        skips = []
        for down, level in zip(self.downs, levels, strict=True):
            skips.append(x)
            x = run.chain(level, run(down, x, keep=True))
        x = run.chain(self.middle, x)
        for up, decoder in zip(self.ups, self.decoders, strict=True):
            x = run.chain(decoder, run.onto(up, x, skips.pop()))
        return run.last(self.head, x)

    def _channels_last(self, level: nn.Module, x: Tensor) -> Tensor:
        """``level(x)`` with channels side by side, as the kernels on tensor cores read and write.

        What follows keeps that layout.
        """
        plain = not (
            torch.is_grad_enabled()
            or torch.is_autocast_enabled(x.device.type)
            or torch.compiler.is_compiling()
        )
        if plain and _is_plain_sequence(level):
            first, *others = level
            if isinstance(first, FusedGroupParallel3d) and _is_fused(first):
                # The kernel reads planes of channels as they lie; no need to lay them out anew.
                shape = first.output_shape(x)
                y = torch.empty(
                    shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d
                )
                return Runner(None).all(others, first(x, out=y))
        return level(x.contiguous(memory_format=torch.channels_last_3d))

    def _plan(self, x: Tensor) -> MemoryPlan:
        """Where the activations of a pass over ``x`` go."""
        recorder = Recorder()
        shapes = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        self._focus_volume(shapes, Runner(recorder))
        return recorder.plan()

    def _is_planned(self) -> bool:
        """Whether all modules can write into given memory, and nobody looks at what they give."""
        levels = [*self.encoders, self.middle, *self.decoders]
        return all(
            _is_plain_sequence(level) and all(map(_is_fused, level)) for level in levels
        ) and all(map(_is_fused, (*self.downs, *self.ups, self.head)))

    def _may_reuse_memory(self, x: Tensor) -> bool:
        """Whether activations can go to memory of earlier passes: fused, and nobody keeps them."""
        return (
            not torch.is_grad_enabled()
            and takes_shortcuts(x, *self.parameters())
            and self._is_planned()
        )

    def release_memory(self) -> None:
        """Free the memory that a fused network on the CPU keeps from one call to the next."""
        self._workspaces.clear()

    @property
    def refines(self) -> bool:
        """Whether :meth:`predict` refines depth in the frames: with ``stem="features"``."""
        return self.prior is not None

    @torch.inference_mode()
    def predict(
        self,
        stack: Tensor,
        focus_positions: Tensor | None = None,
        *,
        groups: int = 4,
        radius: int = 1,
        refine: bool = True,
        bin_size: int | None = None,
    ) -> FocusSearchResult:
        """Depth and confidence from the focus volume.

        By focus search, as in the paper. With ``stem="features"``, where the softmax over the
        frames is trained to be the probability of each of them, depth is its median instead, and
        confidence falls with the deviation from it (:func:`gplws.nn.median_and_deviation`).
        Classical methods then have their say where the network hesitates between frames, and about
        where the depth lies between two of them (:mod:`gplws.models.classical_steps`). Where focus
        moves by little from frame to frame, the network is shown averages of several
        (:mod:`gplws.models.frame_bins`).

        Args:
            stack: as for :meth:`forward`.
            focus_positions: (N,) or (B, N), any unit; default: frame numbers.
            groups: groups of the focus search; nothing to the median.
            radius: frames on each side of the maximum that refine it in the focus search.
            refine: False leaves the classical steps out; :attr:`reach` holds without them.
            bin_size: frames that are averaged; default: by the width of the focus peaks in the
                whole stack. 1: none.

        Returns:
            What :func:`gplws.ops.focus_search` returns, (B, H, W) each.
        """
        self._check(stack)
        if not self.refines:
            options: dict[str, Any] = {"groups": groups, "radius": radius, "log_scale": True}
            volume = self(stack)
            if volume.device.type != "cuda":  # there the search reads 16 bits as well
                volume = volume.float()
            return focus_search(volume, focus_positions, **options)
        gray = luminance(stack.float())[:, 0]
        positions = batch_positions(focus_positions, gray, name="predict")
        statistics: list[StackStatistics] = []
        if refine or bin_size is None:
            statistics = [stack_statistics(one) for one in gray]
        if bin_size is None:
            bin_size = min(map(bin_size_of, statistics))
        bins = FrameBins(gray.shape[1], bin_size)
        volume = self(bins.average(gray)[:, None]).float()
        median, deviation = median_and_deviation(volume)
        found = median.nan_to_num(0)
        peak = volume.gather(1, found.round().long()[:, None])[:, 0]
        del volume
        found = bins.frame_number(found)
        confidence = confidence_of(bin_size * deviation)
        if refine:
            for step in CLASSICAL_STEPS:
                stacks = zip(gray, found, confidence, positions, statistics, strict=True)
                found = torch.stack([step.apply(*one) for one in stacks])
        known = median.isfinite() & found.isfinite()
        index = found.nan_to_num(0)
        depth = torch.stack([position_at(*one) for one in zip(positions, index, strict=True)])
        return FocusSearchResult(
            depth.where(known, torch.nan), index.round().long(), peak, confidence.where(known, 0)
        )

    def valid(self, found: FocusSearchResult, n_frames: int) -> Tensor:
        """Where the depth of a result of :meth:`predict` means anything.

        Args:
            found: the result.
            n_frames: N of the stack.

        Returns:
            (B, H, W) bool: where depth is finite and, with ``stem="features"``,
            :func:`gplws.nn.is_known`.
        """
        valid = found.depth.isfinite()
        return valid & is_known(found.confidence, n_frames) if self.refines else valid

    def reparameterise(self) -> nn.Module:
        """See :func:`gplws.nn.reparameterise`."""
        return gnn.reparameterise(self)

    def fuse(self) -> nn.Module:
        """See :func:`gplws.nn.fuse`."""
        return gnn.fuse(self)


def _is_fused(module: nn.Module) -> bool:
    """Whether a module is one kernel call, and nobody looks at what it gives."""
    fused = (FusedConv3d, FusedGroupParallel3d, FusedUpConv3d)
    return is_stock(module, fused) and not has_hooks(module)


def _is_plain_sequence(module: nn.Module) -> TypeGuard[nn.Sequential]:
    return is_stock(module, (nn.Sequential,)) and not has_hooks(module)


class UpConcat3d(nn.Module):
    """Transposed conv, concatenation of the skip, then a 1x1x1 conv back to the width."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.up = UpConv3d(in_channels, out_channels)
        self.merge = nn.Conv3d(2 * out_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """(B, C, N, H, W) and (B, K, N, 2 H, 2 W) -> (B, K, N, 2 H, 2 W)."""
        return self.merge(torch.cat([self.up(x), skip], 1))
