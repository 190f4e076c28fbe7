"""All focus measures by name, and the focus volume of the textbooks: measure, then window."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from gplws.classical.focus_measures import (
    check_images,
    in_chunks,
    ring_difference_filter,
)
from gplws.classical.local_measures import (
    gray_level_deviation,
    multi_directional_modified_laplacian,
    sum_modified_laplacian,
    tenengrad,
)
from gplws.classical.transform_measures import (
    SHEARLET_REACH,
    shearlet_energy,
    wavelet_energy,
    wavelet_reach,
)
from gplws.luminance import luminance
from gplws.ops.local_filters import symmetric_filter
from gplws.ops.reference import mirror

_WINDOW_SIGMA = 4.0  # px; what served best on weak and clear texture alike
_NARROW_BLUR = 3  # px; up to this reach rows and columns at once take no longer than in turn


@dataclass(frozen=True)
class FocusMeasure:
    """A focus measure and what noise does to it.

    Attributes:
        respond: (..., H, W) frames -> magnitudes of the same shape, >= 0 and proportional to the
            contrast.
        reach: how far a response reaches, px, the pre-blur left out.
        pre_blur: deviation of the Gaussian that frames are blurred by before, px; 0: none.
        noise_gain: mean response to white noise, over that of the ring difference filter.
        fine_deviation: deviation of the response to white noise, over its mean, after
            :func:`gplws.classical.aggregate` with two levels; simulated, pre-blur included.
        medium_deviation: the same with three levels.
    """

    respond: Callable[[Tensor], Tensor]
    reach: int
    pre_blur: float
    noise_gain: float
    fine_deviation: float
    medium_deviation: float

    @property
    def total_reach(self) -> int:
        """How far a response reaches, px, with the pre-blur."""
        return self.reach + blur_reach(self.pre_blur)

    def __call__(self, frames: Tensor) -> Tensor:
        """Responses (..., H, W) to ``frames`` (..., H, W), pre-blur included."""
        return self.respond(gaussian_blur(frames, self.pre_blur))


def _absolute_ring_difference(frames: Tensor) -> Tensor:
    return ring_difference_filter(frames).abs()


# The pre-blur of each is the one that served best on stacks with known depth: noise rules what
# compares few pixels, and blur widens all focus peaks.
MEASURES: dict[str, FocusMeasure] = {
    "rdf": FocusMeasure(_absolute_ring_difference, 3, 0.0, 1.0, 0.134, 0.069),
    "sml": FocusMeasure(sum_modified_laplacian, 1, 1.0, 0.804, 0.137, 0.070),
    "mdml": FocusMeasure(multi_directional_modified_laplacian, 3, 0.5, 36.2, 0.088, 0.0456),
    "tenengrad": FocusMeasure(tenengrad, 1, 0.5, 8.05, 0.122, 0.062),
    "glv": FocusMeasure(gray_level_deviation, 2, 0.0, 2.43, 0.075, 0.041),
    "wavelet": FocusMeasure(wavelet_energy, wavelet_reach(), 0.0, 3.13, 0.089, 0.0453),
    "shearlet": FocusMeasure(shearlet_energy, SHEARLET_REACH, 0.0, 1.70, 0.091, 0.0516),
}
"""The focus measures by name."""


def focus_volume(
    stack: Tensor,
    measure: str = "rdf",
    *,
    pre_blur: float | None = None,
    window_sigma: float = _WINDOW_SIGMA,
    power: float = 1.0,
) -> Tensor:
    """Focus responses of a stack by the plain recipe: blur, measure, average over a window.

    Read it with :func:`gplws.ops.focus_search`. :func:`gplws.classical.depth_from_focus` chooses
    the window for each pixel and is more accurate.

    Args:
        stack: (N, H, W), (B, N, H, W) or, in colour, (B, 3, N, H, W) float32 or float64 frames in
            focus order; of colour the luminance is taken.
        measure: a name of :data:`MEASURES`: "rdf", "sml", "mdml", "tenengrad", "glv", "wavelet" or
            "shearlet".
        pre_blur: deviation of a Gaussian that the frames are blurred by before, px, >= 0; default:
            that of the measure (1 for "sml", 0.5 for "mdml" and "tenengrad", else 0).
        window_sigma: deviation of the Gaussian window, px, >= 0; 0 leaves the responses as they
            are.
        power: responses are raised to it before they are averaged, > 0; 2 turns magnitudes into
            energies, as in the Tenengrad and the gray level variance of the literature.

    Returns:
        (N, H, W) or (B, N, H, W) responses >= 0, differentiable.

    Raises:
        ValueError: an unknown measure, an option out of range or a shape that does not fit.
        TypeError: ``stack`` is not of a floating dtype.

    Example:
        >>> stack = torch.rand(2, 5, 16, 16)
        >>> focus_volume(stack, "sml", window_sigma=2).shape
        torch.Size([2, 5, 16, 16])
    """
    if measure not in MEASURES:
        raise ValueError(f"measure: expected one of {', '.join(MEASURES)}, got {measure!r}")
    check_images("stack", stack)
    if stack.dim() not in (3, 4, 5) or (stack.dim() == 5 and stack.shape[1] not in (1, 3)):
        raise ValueError(
            f"stack: expected (N, H, W), (B, N, H, W) or (B, 3, N, H, W), got {tuple(stack.shape)}"
        )
    known = MEASURES[measure]
    blur = known.pre_blur if pre_blur is None else pre_blur
    for name, value in (("pre_blur", blur), ("window_sigma", window_sigma)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected at least 0 px, got {value}")
    if not 0 < power < math.inf:
        raise ValueError(f"power: expected above 0, got {power}")
    frames = luminance(stack).squeeze(-4) if stack.dim() == 5 else stack
    responses = known.respond(gaussian_blur(frames, blur))
    if power != 1:
        responses = responses**power
    return gaussian_blur(responses, window_sigma)


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """(..., H, W) images, averaged with a Gaussian of deviation ``sigma`` px, mirrored borders."""
    reach = blur_reach(sigma)
    if reach == 0:
        return images
    weights = half_gaussian(sigma, reach)
    if reach <= _NARROW_BLUR:
        window = [[above * beside for beside in weights] for above in weights]
        return in_chunks(lambda chunk: symmetric_filter(chunk, window), images, by_kernel=True)

    def blur(chunk: Tensor) -> Tensor:
        for dim in (-1, -2):
            size = chunk.shape[dim]
            padded = mirror(chunk, reach, dim)
            result = padded.narrow(dim, reach, size) * weights[0]
            for k, weight in enumerate(weights[1:], 1):
                result.add_(padded.narrow(dim, reach + k, size), alpha=weight)
                result.add_(padded.narrow(dim, reach - k, size), alpha=weight)
            chunk = result
        return chunk

    return in_chunks(blur, images)


def half_gaussian(sigma: float, reach: int) -> list[float]:
    """Weights from the centre of a Gaussian window of 2 ``reach`` + 1, whose sum is 1, outwards."""
    weights = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(reach + 1)]
    total = weights[0] + 2 * sum(weights[1:])
    return [weight / total for weight in weights]


def blur_reach(sigma: float) -> int:
    """Where the Gaussian of :func:`gaussian_blur` is cut off, px."""
    return math.ceil(3 * sigma)
