"""Losses of depth-from-focus networks; all depths are in frames, all means are over valid pixels.

A pixel counts where ``valid`` is True and its true depth is finite; elsewhere depths may be NaN:
neither the loss nor its gradient sees them. Sums are divided by ``count``, by default the number of
pixels that count: with the number of a larger batch in its place, the losses of its parts add up to
the loss of the whole. Without such pixels a loss is 0, and so is its gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

LossKind = Literal["soft_target", "l1", "mse"]


class LossTerms(NamedTuple):
    """A loss and what it is the sum of."""

    total: Tensor  # (), differentiable
    parts: dict[str, Tensor]  # (), unweighted, detached


@dataclass(frozen=True)
class FocusLoss:
    """The training loss, as a weighted sum of the functions of this module.

    Attributes:
        kind: "soft_target" (cross-entropy over the frames plus ``depth_weight`` times smooth L1 of
            the depth), "l1" or "mse" (of the depth alone, as supervised "by the depth map" in the
            paper of GPLWS-Net, which does not print its loss).
        sigma: width of the soft target, frames.
        depth_weight: weight of the smooth L1 beside the cross-entropy.
        beta: where smooth L1 turns from square to linear, frames.
        window: frames on each side of the highest response that the depth is the expectation over;
            None: over all frames.
        gradient_weight: weight of :func:`gradient_error`.

    Raises:
        ValueError: a value is out of range.
    """

    kind: LossKind = "soft_target"
    sigma: float = 0.7
    depth_weight: float = 0.4
    beta: float = 0.5
    window: int | None = 2
    gradient_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(LossKind):
            raise ValueError(f"loss.kind must be one of {get_args(LossKind)}, got {self.kind!r}")
        for name in ("sigma", "beta"):
            if not getattr(self, name) > 0:
                raise ValueError(f"loss.{name} must be positive, got {getattr(self, name)}")
        for name in ("depth_weight", "gradient_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"loss.{name} must not be negative, got {getattr(self, name)}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"loss.window must be at least 1, or None, got {self.window}")

    def __call__(
        self, volume: Tensor, depth_index: Tensor, valid: Tensor, *, count: float | None = None
    ) -> LossTerms:
        """Loss of a focus volume.

        Args:
            volume: (B, N, H, W) logits over the frames; float32 or wider, whatever the network
                computes in.
            depth_index: (B, H, W) true depth, frames.
            valid: (B, H, W) bool.
            count: what sums are divided by; see the head of this module.
        """
        depth = expected_index(volume, self.window)
        if self.kind != "soft_target":
            return self.of_depth(depth, depth_index, valid, count=count)
        entropy = soft_cross_entropy(volume, depth_index, valid, sigma=self.sigma, count=count)
        rest = self.of_depth(depth, depth_index, valid, count=count)
        parts = {"cross_entropy": entropy.detach(), **rest.parts}
        return LossTerms(entropy + rest.total, parts)

    def of_depth(
        self, depth: Tensor, depth_index: Tensor, valid: Tensor, *, count: float | None = None
    ) -> LossTerms:
        """Loss of a depth map (B, H, W) in frames: all terms but the cross-entropy."""
        weight = 1.0
        if self.kind == "l1":
            name, error = "l1", absolute_error(depth, depth_index, valid, count=count)
        elif self.kind == "mse":
            name, error = "mse", squared_error(depth, depth_index, valid, count=count)
        else:
            name, weight = "smooth_l1", self.depth_weight
            error = smooth_l1(depth, depth_index, valid, beta=self.beta, count=count)
        total = weight * error
        parts = {name: error.detach()}
        if self.gradient_weight:
            gradient = gradient_error(depth, depth_index, valid, count=count)
            total = total + self.gradient_weight * gradient
            parts["gradient"] = gradient.detach()
        return LossTerms(total, parts)


def soft_target(depth_index: Tensor, frames: int, sigma: float = 0.7) -> Tensor:
    """Distribution over the frames that peaks at the true depth.

    ``t[n] = exp(-(n - d)^2 / (2 sigma^2)) / sum over n`` with ``d`` the depth. Where ``d`` is not
    finite, ``d`` counts as 0.

    Args:
        depth_index: (B, H, W) depth, frames.
        frames: N.
        sigma: width, frames, > 0.

    Returns:
        (B, N, H, W) non-negative, sums to 1 over the frames; dtype of ``depth_index``.
    """
    depth = torch.where(depth_index.isfinite(), depth_index, 0.0)
    positions = torch.arange(frames, device=depth.device, dtype=depth.dtype)
    distance = positions[:, None, None] - depth[:, None]  # (B, N, H, W)
    # softmax divides by the sum after taking out the largest exponent: no 0 / 0 far from the depth
    return (-0.5 * (distance / sigma) ** 2).softmax(1)


def soft_cross_entropy(
    volume: Tensor,
    depth_index: Tensor,
    valid: Tensor,
    *,
    sigma: float = 0.7,
    count: float | None = None,
) -> Tensor:
    """Cross-entropy of the softmax over the frames against a soft target.

    ``mean of -sum_n t[n] log p[n]`` with ``p = softmax(volume)`` and ``t`` of :func:`soft_target`.
    Its least value is the entropy of ``t``, not 0.

    Args:
        volume: (B, N, H, W) logits; differentiable.
        depth_index: (B, H, W) true depth, frames.
        valid: (B, H, W) bool.
        sigma: width of the target, frames.
        count: see the head of this module.

    Source:
        Label distributions in place of one-hot labels: Szegedy et al., CVPR 2016,
        doi:10.1109/CVPR.2016.308, section 7; Gaussian over ordered classes: Diaz and Marathe, CVPR
        2019, doi:10.1109/CVPR.2019.00487.
    """
    _check_shapes(volume[:, 0], depth_index, valid)
    target = soft_target(depth_index.to(volume.dtype), volume.shape[1], sigma)
    return _masked_mean(-(target * volume.log_softmax(1)).sum(1), depth_index, valid, count)


def expected_index(volume: Tensor, window: int | None = None) -> Tensor:
    """Expectation of the frame number under the softmax over frames (soft-argmax).

    With ``window``, over the frames ``a - window .. a + window`` that exist, ``a`` being the frame
    of the highest logit (the lowest on ties): a second peak far away then pulls the depth no more.
    The gradient flows through the logits in the window; ``a`` counts as fixed.

    Args:
        volume: (B, N, H, W) logits.
        window: frames on each side, or None for all frames.

    Returns:
        (B, H, W) frames, dtype of ``volume``; differentiable.

    Source:
        Kendall et al., "End-to-end learning of geometry and context for deep stereo regression",
        ICCV 2017, doi:10.1109/ICCV.2017.17, section 3.4; the window: Tulyakov et al., "Practical
        deep stereo", NeurIPS 2018, arXiv:1806.01677.
    """
    positions = torch.arange(volume.shape[1], device=volume.device, dtype=volume.dtype)
    positions = positions[:, None, None]
    if window is not None:
        winner = volume.detach().argmax(1, keepdim=True)
        volume = volume.masked_fill((positions - winner).abs() > window, -torch.inf)
    return (volume.softmax(1) * positions).sum(1)


def smooth_l1(
    depth: Tensor,
    depth_index: Tensor,
    valid: Tensor,
    *,
    beta: float = 0.5,
    count: float | None = None,
) -> Tensor:
    """Mean of ``e^2 / (2 beta)`` where the error ``|e| < beta``, of ``|e| - beta / 2`` elsewhere.

    Args:
        depth: (B, H, W) estimate, frames; differentiable.
        depth_index: (B, H, W) true depth, frames.
        valid: (B, H, W) bool.
        beta: frames, > 0.
        count: see the head of this module.

    Source:
        Girshick, "Fast R-CNN", ICCV 2015, doi:10.1109/ICCV.2015.169, equation 3.
    """
    error = _error(depth, depth_index, valid)
    return _masked_mean(
        F.smooth_l1_loss(error, torch.zeros_like(error), reduction="none", beta=beta),
        depth_index,
        valid,
        count,
    )


def absolute_error(
    depth: Tensor, depth_index: Tensor, valid: Tensor, *, count: float | None = None
) -> Tensor:
    """Mean of ``|depth - depth_index|``, frames; arguments of :func:`smooth_l1`."""
    return _masked_mean(_error(depth, depth_index, valid).abs(), depth_index, valid, count)


def squared_error(
    depth: Tensor, depth_index: Tensor, valid: Tensor, *, count: float | None = None
) -> Tensor:
    """Mean of ``(depth - depth_index)^2``, frames squared; arguments of :func:`smooth_l1`."""
    return _masked_mean(_error(depth, depth_index, valid).square(), depth_index, valid, count)


def gradient_error(
    depth: Tensor, depth_index: Tensor, valid: Tensor, *, count: float | None = None
) -> Tensor:
    """Sum of ``|e(x+1, y) - e(x, y)| + |e(x, y+1) - e(x, y)|`` over pairs that count, by ``count``.

    ``e`` is the error of the depth, frames. A pair counts where both its pixels do. Steps that are
    smeared or displaced cost more than a constant offset, which costs nothing.

    Args:
        depth: (B, H, W) estimate, frames; differentiable.
        depth_index: (B, H, W) true depth, frames.
        valid: (B, H, W) bool.
        count: see the head of this module; pixels, not pairs.

    Source:
        Eigen and Fergus, ICCV 2015, doi:10.1109/ICCV.2015.304, section 4, in the L1 form of Hu et
        al., WACV 2019, doi:10.1109/WACV.2019.00116.
    """
    error = _error(depth, depth_index, valid)
    mask = valid & depth_index.isfinite()
    across = (error.diff(dim=2).abs() * (mask[:, :, 1:] & mask[:, :, :-1])).sum()
    down = (error.diff(dim=1).abs() * (mask[:, 1:] & mask[:, :-1])).sum()
    return (across + down) / _divisor(mask, count)


def _error(depth: Tensor, depth_index: Tensor, valid: Tensor) -> Tensor:
    """(B, H, W) error in frames, 0 with gradient 0 where a pixel does not count."""
    _check_shapes(depth, depth_index, valid)
    mask = valid & depth_index.isfinite()
    # Before the subtraction: a NaN that is masked only afterwards leaves NaN in the gradient.
    depth = torch.where(mask, depth, 0.0)
    return depth - torch.where(mask, depth_index, 0.0).to(depth.dtype)


def _masked_mean(values: Tensor, depth_index: Tensor, valid: Tensor, count: float | None) -> Tensor:
    mask = valid & depth_index.isfinite()
    return torch.where(mask, values, 0.0).sum() / _divisor(mask, count)


def _divisor(mask: Tensor, count: float | None) -> Tensor | float:
    return mask.sum().clamp(min=1) if count is None else max(count, 1.0)


def _check_shapes(depth: Tensor, depth_index: Tensor, valid: Tensor) -> None:
    for name, tensor in (("depth_index", depth_index), ("valid", valid)):
        if tensor.shape != depth.shape:
            raise ValueError(
                f"{name}: expected (B, H, W) = {tuple(depth.shape)}, got {tuple(tensor.shape)}"
            )
    if valid.dtype != torch.bool:
        raise TypeError(f"valid: expected bool, got {valid.dtype}")
