"""How far a depth map is from the truth, and whether its confidence knows it.

All functions take tensors or arrays of any real dtype and compute in float64. A pixel counts where
``valid`` is True and both truth and prediction are finite; a prediction that is NaN is no error but
a missing pixel, which ``coverage`` counts. Where no pixel counts, a figure is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from gplws.positions import frame_index, rise_or_fall

ArrayLike = Tensor | NDArray[np.generic]

# Clip of the Hessian norm, and factor, of the published bumpiness.
BUMPINESS_CLIP = 0.05
BUMPINESS_FACTOR = 100.0

_SCHARR_SMOOTHING = (3 / 16, 10 / 16, 3 / 16)
_SCHARR_DIFFERENCE = (-1.0, 0.0, 1.0)


@dataclass(frozen=True)
class DepthMetrics:
    """Error of depth maps against their truth, d (prediction) and t (truth) in one unit.

    Attributes:
        mse: mean of (d - t)^2, unit squared.
        mae: mean of abs(d - t), in the unit.
        rmse: root of ``mse``, in the unit.
        log_rmse: root of the mean of (ln d - ln t)^2, over pixels where both are above 0.
        abs_rel: mean of abs(d - t) / t, over pixels with t > 0.
        sq_rel: mean of (d - t)^2 / t, over pixels with t > 0, in the unit.
        a1, a2, a3: share (0..1) of pixels with max(d / t, t / d) < 1.25, 1.25^2, 1.25^3, among
            those with t > 0; d <= 0 is a miss.
        bumpiness: 100 times the mean of min(0.05, Hessian norm of d - t), see `bumpiness`.
        mean_uncertainty: mean of the uncertainty that came with the prediction, in the unit.
        seconds: time per stack, as measured by the caller.
        coverage: share (0..1) of pixels with a known truth that were predicted at all.
        pixels: how many pixels counted; a float, as it may be a mean over images.

    Source: Eigen, Puhrsch, Fergus, "Depth map prediction from a single image using a multi-scale
    deep network", NeurIPS 2014, section 4 (RMSE, log RMSE, AbsRel, SqRel, thresholds); Hazirbas et
    al., "Deep depth from focus", ACCV 2018, arXiv:1704.01085, section 5 (bumpiness); Yang, Huang,
    Zhou, "Deep depth from focus with differential focus volume", CVPR 2022, arXiv:2112.01712,
    section 4 (average uncertainty); the set that the GPLWS-Net paper prints is MSE, MAE, RMSE,
    AbsRel, SqRel, bumpiness and seconds.
    """

    mse: float
    mae: float
    rmse: float
    log_rmse: float
    abs_rel: float
    sq_rel: float
    a1: float
    a2: float
    a3: float
    bumpiness: float
    mean_uncertainty: float
    seconds: float
    coverage: float
    pixels: float


@dataclass(frozen=True)
class FrameMetrics:
    """Error of a depth map in frames, and in um where the focus positions are in um.

    Attributes:
        mae_frames, rmse_frames: mean and root mean square of the error, frames.
        bias_frames: mean of prediction minus truth, frames; not 0 where a method leans to one end.
        median_frames: median of the absolute error, frames (for an even count the mean of the two
            in the middle).
        off_by_1, off_by_2: share (0..1) of pixels whose error exceeds 1 and 2 frames.
        mae_um, rmse_um: the same in um; NaN where the unit of the focus positions is not um.
        coverage: share (0..1) of pixels with a known truth that were predicted at all.
        pixels: how many pixels counted; a float, as it may be a mean over images.
    """

    mae_frames: float
    rmse_frames: float
    bias_frames: float
    median_frames: float
    off_by_1: float
    off_by_2: float
    mae_um: float
    rmse_um: float
    coverage: float
    pixels: float


@dataclass(frozen=True, eq=False)
class Sparsification:
    """Error of what is left when the least confident pixels are dropped.

    Attributes:
        dropped: (K,) float64, share of pixels that were dropped, 0 .. below 1.
        rmse: (K,) float64, RMSE of the rest, in the unit of the error.
        oracle_rmse: (K,) float64, the same when the worst pixels are dropped first: no confidence
            can do better.
        ause: area between ``rmse`` and ``oracle_rmse``, both divided by the RMSE of all pixels; 0
            for a confidence that orders pixels as their errors do, NaN where no pixel is wrong.
        rmse_after_20_percent: RMSE after the least confident 20% were dropped.
        oracle_rmse_after_20_percent: RMSE after the worst 20% were dropped.

    Source: Ilg et al., "Uncertainty estimates and multi-hypotheses networks for optical flow", ECCV
    2018, arXiv:1802.07095, section 5.2.
    """

    dropped: NDArray[np.float64]
    rmse: NDArray[np.float64]
    oracle_rmse: NDArray[np.float64]
    ause: float
    rmse_after_20_percent: float
    oracle_rmse_after_20_percent: float


def depth_metrics(
    prediction: ArrayLike,
    truth: ArrayLike,
    valid: ArrayLike | None = None,
    *,
    uncertainty: ArrayLike | None = None,
    seconds: float | None = None,
) -> DepthMetrics:
    """Errors of a depth map as the papers print them; formulas at `DepthMetrics`.

    Relative errors, log RMSE and the thresholds ask for a truth above 0; with heights that cross 0
    they describe the part above 0 only.

    Args:
        prediction: (..., H, W) depth, any unit; NaN where the method gives none.
        truth: shape of ``prediction``, in its unit; NaN where unknown.
        valid: shape of ``prediction``, bool; pixels that may count. Default: all.
        uncertainty: shape of ``prediction``, in its unit, for ``mean_uncertainty``.
        seconds: time that the prediction took.

    Returns:
        The metrics; figures without any pixel are NaN.

    Raises:
        ValueError: shapes that differ, or less than two axes.
        TypeError: ``valid`` is not bool.

    Example:
        >>> metrics = depth_metrics(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 2.0]]))
        >>> metrics.mae, metrics.abs_rel, metrics.a1
        (0.5, 0.25, 0.5)
    """
    guess, true, known = _arguments(prediction, truth, valid)
    counts = known & guess.isfinite()
    d, t = guess[counts], true[counts]
    error = d - t
    positive = t > 0
    dp, tp = d[positive], t[positive]
    both = dp > 0
    ratio = torch.where(both, torch.maximum(dp / tp, tp / dp), torch.inf)
    mse = _mean(error.square())
    spread = math.nan
    if uncertainty is not None:
        values = _float64(uncertainty, "uncertainty")
        _check_shape("uncertainty", values, guess)
        spread = _mean(values[counts & values.isfinite()])
    return DepthMetrics(
        mse=mse,
        mae=_mean(error.abs()),
        rmse=math.sqrt(mse),
        log_rmse=math.sqrt(_mean((dp[both].log() - tp[both].log()).square())),
        abs_rel=_mean((dp - tp).abs() / tp),
        sq_rel=_mean((dp - tp).square() / tp),
        a1=_mean((ratio < 1.25).double()),
        a2=_mean((ratio < 1.25**2).double()),
        a3=_mean((ratio < 1.25**3).double()),
        bumpiness=bumpiness(guess, true, known),
        mean_uncertainty=spread,
        seconds=math.nan if seconds is None else float(seconds),
        coverage=_coverage(counts, known),
        pixels=float(counts.sum()),
    )


def bumpiness(prediction: ArrayLike, truth: ArrayLike, valid: ArrayLike | None = None) -> float:
    """100 times the mean of min(0.05, Frobenius norm of the Hessian of prediction - truth).

    Derivatives are Scharr's: smoothing (3, 10, 3) / 16 across, difference f(x+1) - f(x-1) along, so
    that the Hessian is four times that of calculus, as in the published implementations; borders
    are repeated. A pixel counts where the 5 x 5 pixels that enter its derivatives, repeated ones
    included, are known.

    Args:
        prediction: (..., H, W) depth.
        truth: shape of ``prediction``, in its unit.
        valid: shape of ``prediction``, bool; default: all.

    Returns:
        0 for an error that is constant, 5 at most; a plane bends only where borders are repeated.
        NaN where no pixel counts.

    Raises:
        ValueError: shapes that differ, or less than two axes.
        TypeError: ``valid`` is not bool.

    Source: Hazirbas et al., ACCV 2018, arXiv:1704.01085, section 5, after Honauer et al., "A
    dataset and evaluation methodology for depth estimation on 4D light fields", ACCV 2016, section
    3.3 (clip 0.05).
    """
    guess, true, known = _arguments(prediction, truth, valid)
    error = torch.where(known, guess - true, torch.nan)
    if error.numel() == 0:
        return math.nan
    planes = error.reshape(-1, 1, *error.shape[-2:])  # (B, 1, H, W)
    across, along = _scharr(planes, 3), _scharr(planes, 2)
    second = [_scharr(first, axis) for first in (across, along) for axis in (2, 3)]
    norm = sum(part.square() for part in second)
    assert isinstance(norm, Tensor)
    norm = norm.sqrt()
    return BUMPINESS_FACTOR * _mean(norm[norm.isfinite()].clamp(max=BUMPINESS_CLIP))


def frame_metrics(
    prediction: ArrayLike,
    truth: ArrayLike,
    focus_positions: ArrayLike,
    valid: ArrayLike | None = None,
    *,
    unit: str = "um",
) -> FrameMetrics:
    """Errors of a depth map in frames, and in um where its unit is um.

    Depths become frame numbers by interpolation between the focus positions. Truth outside the
    focus positions does not count; a prediction outside is taken at the nearest end.

    Args:
        prediction: (H, W) depth in ``unit``; NaN where the method gives none.
        truth: (H, W) in ``unit``; NaN where unknown.
        focus_positions: (N,) strictly monotonic, in ``unit``.
        valid: (H, W) bool; pixels that may count. Default: all.
        unit: "um" fills the figures in um; with any other they are NaN.

    Returns:
        The metrics; figures without any pixel are NaN.

    Raises:
        ValueError: shapes that differ, or focus positions that are not (N,), strictly monotonic.
        TypeError: ``valid`` is not bool.
    """
    guess, true, known = _arguments(prediction, truth, valid)
    positions = _float64(focus_positions, "focus_positions")
    if positions.dim() != 1 or not len(positions) or not rise_or_fall(positions):
        raise ValueError(
            "focus_positions: expected (N,), strictly monotonic, got "
            f"{tuple(positions.shape)}: {positions.tolist()}"
        )
    inside = guess.clamp(positions.min(), positions.max())
    guess_index, true_index = frame_index(inside, positions), frame_index(true, positions)
    known = known & true_index.isfinite()
    counts = known & guess.isfinite()
    frames = (guess_index - true_index)[counts]
    in_um = (guess - true)[counts] if unit == "um" else frames[:0]
    distance = frames.abs()
    return FrameMetrics(
        mae_frames=_mean(distance),
        rmse_frames=math.sqrt(_mean(frames.square())),
        bias_frames=_mean(frames),
        median_frames=_median(distance),
        off_by_1=_mean((distance > 1).double()),
        off_by_2=_mean((distance > 2).double()),
        mae_um=_mean(in_um.abs()),
        rmse_um=math.sqrt(_mean(in_um.square())),
        coverage=_coverage(counts, known),
        pixels=float(counts.sum()),
    )


def sparsification(
    prediction: ArrayLike,
    truth: ArrayLike,
    confidence: ArrayLike,
    valid: ArrayLike | None = None,
    *,
    points: int = 100,
) -> Sparsification:
    """RMSE against the share of least confident pixels that were dropped, and its oracle.

    Pixels of equal confidence count with their common mean square error, as if they were dropped in
    random order: the result does not depend on the order of pixels, and a constant confidence gives
    a flat curve.

    Args:
        prediction: (H, W) depth, any unit; any other shape is taken as one set of pixels.
        truth: shape of ``prediction``, in its unit.
        confidence: shape of ``prediction``, higher is better; pixels where it is NaN do not count.
        valid: shape of ``prediction``, bool; default: all.
        points: number K of shares, 0, 1/K, .. (K-1)/K.

    Returns:
        The curves with their summary; NaN where no pixel counts.

    Raises:
        ValueError: shapes that differ, or ``points`` below 2.
        TypeError: ``valid`` is not bool.
    """
    if points < 2:
        raise ValueError(f"points: expected at least 2, got {points}")
    guess, true, known = _arguments(prediction, truth, valid)
    trust = _float64(confidence, "confidence")
    _check_shape("confidence", trust, guess)
    counts = known & guess.isfinite() & ~trust.isnan()
    square = (guess - true)[counts].square()
    levels, group = trust[counts].unique(return_inverse=True)  # least confident first
    sums = torch.zeros(len(levels), dtype=torch.float64).index_add_(0, group, square)
    sizes = torch.bincount(group, minlength=len(levels))
    ordered = (sums / sizes).repeat_interleave(sizes)
    dropped = torch.arange(points, dtype=torch.float64) / points
    curve = _rest_rmse(ordered, dropped)
    worst_first = square.sort(descending=True).values
    oracle = _rest_rmse(worst_first, dropped)
    area = float(torch.trapezoid(curve - oracle, dropped) / curve[0]) if curve[0] > 0 else math.nan
    return Sparsification(
        dropped=dropped.numpy(),
        rmse=curve.numpy(),
        oracle_rmse=oracle.numpy(),
        ause=area,
        rmse_after_20_percent=_rmse_after(ordered, 0.2),
        oracle_rmse_after_20_percent=_rmse_after(worst_first, 0.2),
    )


def focus_uncertainty(probabilities: Tensor, focus_positions: Tensor) -> Tensor:
    """Standard deviation of the focus position under the probabilities of the frames.

    Args:
        probabilities: (B, N, H, W) float, >= 0, summing to 1 over N.
        focus_positions: (N,) or (B, N), any unit.

    Returns:
        (B, H, W), in the unit of ``focus_positions``, dtype of ``probabilities``; differentiable
        where it is above 0.

    Raises:
        ValueError: shapes that do not belong together.

    Source: Yang, Huang, Zhou, CVPR 2022, arXiv:2112.01712, section 3.3; its mean over the pixels is
    the "avgUnc." of their tables.
    """
    if probabilities.dim() != 4:
        raise ValueError(f"probabilities: expected (B, N, H, W), got {tuple(probabilities.shape)}")
    batch, frames = probabilities.shape[:2]
    if tuple(focus_positions.shape) not in ((frames,), (batch, frames)):
        raise ValueError(
            f"focus_positions: expected ({frames},) or ({batch}, {frames}), got "
            f"{tuple(focus_positions.shape)}"
        )
    positions = focus_positions.to(probabilities).reshape(-1, frames, 1, 1)  # (1 or B, N, 1, 1)
    mean = (probabilities * positions).sum(1, keepdim=True)
    return (probabilities * (positions - mean).square()).sum(1).sqrt()


def mean_metrics(metrics: Sequence[Any]) -> Any:
    """Mean of each figure over images, as the papers average; NaN figures are left out.

    Args:
        metrics: `DepthMetrics` or `FrameMetrics` of the images, all of one class.

    Returns:
        One of the same class; a figure that is NaN for all images stays NaN.

    Raises:
        ValueError: no metrics, or of several classes.
    """
    kinds = {type(item) for item in metrics}
    if len(kinds) != 1:
        names = sorted(kind.__name__ for kind in kinds)
        raise ValueError(f"metrics: expected some, of one class, got {names or 'none'}")
    kind = kinds.pop()
    names = [field.name for field in fields(kind)]
    return kind(**{name: mean_of_known([getattr(m, name) for m in metrics]) for name in names})


def mean_of_known(values: Sequence[float]) -> float:
    """Mean of the values that are not NaN; NaN where there is none."""
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


def _arguments(
    prediction: ArrayLike, truth: ArrayLike, valid: ArrayLike | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Prediction and truth in float64, and where the truth is known and may count."""
    guess, true = _float64(prediction, "prediction"), _float64(truth, "truth")
    if guess.dim() < 2:
        raise ValueError(f"prediction: expected (..., H, W), got {tuple(guess.shape)}")
    _check_shape("truth", true, guess)
    known = true.isfinite()
    if valid is not None:
        mask = _tensor(valid, "valid").cpu()
        if mask.dtype != torch.bool:
            raise TypeError(f"valid: expected bool, got {mask.dtype}")
        _check_shape("valid", mask, guess)
        known = known & mask
    return guess, true, known


def _float64(values: ArrayLike, name: str) -> Tensor:
    tensor = _tensor(values, name).detach()
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name}: expected real numbers, got {tensor.dtype}")
    return tensor.to("cpu", torch.float64)


def _tensor(values: ArrayLike, name: str) -> Tensor:
    if isinstance(values, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected no masked array; pass valid= for what counts")
    if isinstance(values, np.ndarray):  # torch takes neither negative strides nor foreign bytes
        return torch.from_numpy(np.array(values, values.dtype.newbyteorder("="), order="C"))
    return torch.as_tensor(values)


def _check_shape(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.shape != like.shape:
        raise ValueError(
            f"{name}: expected {tuple(like.shape)} as prediction, got {tuple(tensor.shape)}"
        )


def _mean(values: Tensor) -> float:
    return float(values.mean()) if values.numel() else math.nan


def _median(values: Tensor) -> float:
    return float(np.median(values.numpy())) if values.numel() else math.nan


def _coverage(counts: Tensor, known: Tensor) -> float:
    total = int(known.sum())
    return int(counts.sum()) / total if total else math.nan


def _scharr(planes: Tensor, axis: int) -> Tensor:
    """Scharr derivative of (B, 1, H, W) along an axis, borders repeated; NaN spreads."""
    along = planes.new_tensor(_SCHARR_DIFFERENCE)
    across = planes.new_tensor(_SCHARR_SMOOTHING)
    rows, columns = (along, across) if axis == 2 else (across, along)
    padded = F.pad(planes, (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, (rows[:, None] * columns)[None, None])


def _rmse_after(ordered: Tensor, dropped: float) -> float:
    """:func:`_rest_rmse` of a single share."""
    return float(_rest_rmse(ordered, torch.tensor([dropped], dtype=torch.float64))[0])


def _rest_rmse(squares: Tensor, dropped: Tensor) -> Tensor:
    """RMSE of what is left of ordered squares (M,) when shares (K,) are dropped from the front."""
    count = len(squares)
    if count == 0:
        return torch.full_like(dropped, torch.nan)
    # Summed from the back, so that what is left is not the difference of two large sums.
    rest = squares.flip(0).cumsum(0).flip(0)
    first = (dropped * count).round().long().clamp(max=count - 1)
    return (rest[first] / (count - first)).sqrt()
