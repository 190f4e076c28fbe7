"""Depth from focus with the ring difference filter or another focus measure.

1. Response: the focus measure of each frame, frames brought to the same brightness.
2. Aggregation at three widths. Each pixel takes the narrowest window in which its focus peak stands
   clear of the noise, which is known from the stack itself: fine structure stays sharp, weak
   texture is averaged over more of its surroundings. Of several peaks that are nearly as high, the
   one that the surroundings share counts more.
3. Focus search over all frames: depth to about a fraction of a frame.
4. Refinement along the surface: the responses are averaged once more, not within a frame but along
   the surface just found, in a few samples on both sides of it, and the peak is fitted again. On a
   slope a window within one frame mixes pixels that are in focus in different frames, which widens
   and shifts the peak; along the surface all of them peak together.

"tft" does all of this with each octave of a time-frequency transform and fuses the depth maps; "rr"
does it with one measure and regularises the depth map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from gplws.classical.aggregation import aggregation_reach, smooth
from gplws.classical.focus_measures import chunks
from gplws.classical.focus_volume import MEASURES, FocusMeasure
from gplws.classical.regularisation import regularise_depth
from gplws.classical.statistics import StackStatistics, stack_statistics
from gplws.classical.time_frequency import (
    OCTAVES,
    agreement_of_octaves,
    fuse_by_texture,
    octave_measure,
    octave_reach,
)
from gplws.ops.focus_search import focus_search
from gplws.ops.reference import (
    SURFACE_REACH,
    SURFACE_SAMPLES,
    SurfaceSamples,
    frame_at,
    position_at,
)
from gplws.ops.surface_refinement import fit_peak, sample_surface, smooth_surface
from gplws.positions import rise_or_fall

METHODS = (*MEASURES, "rr", "tft")
"""Names of the classical methods that :func:`depth_from_focus` knows."""

LOCAL_PART = {"rr": "mdml"}
"""Methods that end with a pass over the whole depth map, and the method that comes before."""

PeakRefinement = Literal["surface", "gaussian", "parabola", "none"]

# Aggregation levels of the three windows: standard deviations of 2.2, 4.6 and 9.2 pixels.
_LEVELS = (2, 3, 4)
_STEP_OF_NOISE = 2 / math.sqrt(math.pi)  # mean distance of two normal numbers, in deviations
_EVEN_STEPS = 0.02  # focus positions may stray from even steps by this much, in steps
_TINY = 1e-7  # far below the response to one grey level of 16 bits
# Prominence of a peak, in deviations of the noise, at which a pixel turns half to the next wider
# window: against false peaks in the search, and against scatter in the refinement. Chosen on
# rendered stacks with easy, weak and noisy texture; the error changes little between half and twice
# these values.
_SEARCH_PROMINENCE = 8.0
_REFINE_PROMINENCE = 20.0

# Where two peaks of a pixel are nearly as high, the one that the surroundings share is likelier:
# each response counts up to twice as much (1 + this) the more of the pixels around vote for its
# frame. It takes much of the speckle (dust, glare, light that spills from bright edges) off real
# stacks, and moves edges little: across a step the wrong peak is far below the right one.
_CONSENSUS = 1.0

# The surface that refinement follows is smoothed over a few pixels, but not across depth
# differences beyond this many frames.
_SURFACE_LIMIT = 2.0
# The spacing of the samples along the surface is a whole number of frames, chosen so that they span
# the peak, whose half maximum is some 8 frames wide where every frame is sampled.
_WIDTH_PER_SPACING = 8.0
# Frames on each side of the winner that enter the fit of the search: up to half maximum, as the
# unweighted fit takes the floor beside a narrow peak for part of it.
_WIDTH_PER_RADIUS = 4.0
_LARGEST_RADIUS = 8

# Difference of neighbours beyond which the guide of "rr" has an edge, in deviations of the image:
# whatever its brightness and contrast.
_EDGE = 0.6

# What refines depth that other means found: "mdml" has the narrowest peaks. The second pass follows
# the better surface of the first (0.064 -> 0.053 frames on stacks with known depth); a third gains
# nothing.
_REFINING_MEASURE = "mdml"
_REFINING_PASSES = 2

# A pixel is valid where its peak rises above its lowest response by more than noise alone does
# among N frames, about 2 sqrt(2 ln N) deviations, by this many deviations more ...
_VALID_MARGIN = 4.0
# ... and by this share of the peak; a pattern that is equally sharp in all frames has no depth.
_VALID_CONTRAST = 0.1
# A fitted peak may lie this far beyond the first or last frame, in frames: peaks are no parabolas,
# and what is in focus in the end frame itself seems to peak 0.3 to 1.8 frames beyond. What lies
# half a frame beyond seems to lie 1 to 3. Depth that other means found is asked about that within
# so many frames of an end.
_VALID_OVERSHOOT = 1.0
_NEAR_END = 1.0
_AT_END = 0.5  # frames; from here on responses without a maximum rise towards the end


class DepthFromFocus(NamedTuple):
    """What :func:`depth_from_focus` finds for each pixel, (H, W) or (B, H, W) each."""

    depth: Tensor
    """float32, focus position of the surface, unit of ``focus_positions``."""
    depth_index: Tensor
    """float32, the same in frames, 0 .. N-1."""
    confidence: Tensor
    """float32 in 0..1: how far the peak stands out from the noise and from the runner-up; 0 where
    not valid."""
    valid: Tensor
    """bool; False where nothing comes into focus, and depth means nothing."""
    peak: Tensor
    """float32, highest aggregated response."""
    index: Tensor  # type: ignore[assignment]
    """int64, frame nearest to ``depth_index``."""


class _Shares(NamedTuple):
    """How far a pixel turns to the wider windows in the refinement, (H, W) in 0..1 each."""

    to_medium: Tensor  # share of the two wider windows
    to_wide: Tensor  # share of the widest among those two


class _Search(NamedTuple):
    """One stack (N, H, W) after steps 1 and 2."""

    response: Tensor  # (N, H, W), absolute
    volume: Tensor  # (N, H, W), aggregated
    shares: _Shares
    prominence: Tensor  # (H, W), of the peak in the medium window, in deviations of the noise
    contrast: Tensor  # (H, W) in 0..1, the same as share of the peak
    noise: float  # mean response of noise


def receptive_radius(method: str = "rdf") -> int:
    """How far away a pixel can influence the result of :func:`depth_from_focus`, in pixels.

    Tiles that overlap by this much give exactly the result of the whole image, if all of them are
    given the same statistics. Of "rr" it is the reach of what comes before the regularisation,
    which looks at the whole depth map: search tiles with ``LOCAL_PART["rr"]``, then call
    :func:`regularised`.

    Raises:
        ValueError: the method is unknown.
    """
    _check_method(method)
    if method == "tft":
        reach = octave_reach(OCTAVES - 1)
    else:
        reach = MEASURES[LOCAL_PART.get(method, method)].total_reach
    return reach + SURFACE_REACH + 2 * aggregation_reach(max(_LEVELS))


def rdf_volume(
    frames: Tensor,
    *,
    statistics: StackStatistics | Sequence[StackStatistics] | None = None,
) -> Tensor:
    """Focus volume: ring difference responses, aggregated as far as each pixel's noise demands.

    Args:
        frames: (N, H, W) or (B, N, H, W) float32 gray frames in 0..1, in focus order.
        statistics: of the stack, or one for each of the batch; default: of these frames.

    Returns:
        Non-negative responses, shape of ``frames``, for :func:`gplws.ops.focus_search`.
        Differentiable, the choice of window included.

    Raises:
        ValueError: a shape does not fit.
        TypeError: ``frames`` is not float32.
    """
    stacks, known = _check_frames(frames, statistics)
    rdf = MEASURES["rdf"]
    volumes = [_focus_volume(*pair, rdf).volume for pair in zip(stacks, known, strict=True)]
    return torch.stack(volumes) if frames.dim() == 4 else volumes[0]


def depth_from_focus(
    frames: Tensor,
    focus_positions: Tensor | None = None,
    *,
    method: str = "rdf",
    refinement: PeakRefinement = "surface",
    statistics: StackStatistics | Sequence[StackStatistics] | None = None,
) -> DepthFromFocus:
    """Depth, confidence and validity of each pixel of a focal stack, by a classical method.

    Memory: 0.5 KB for each pixel, or with more than 20 frames some four times that of ``frames``
    and 0.2 KB for each pixel. Larger stacks can be cut into tiles that overlap by
    :func:`receptive_radius`, with the sum of their :func:`part_statistics`.

    Args:
        frames: (N, H, W) or (B, N, H, W) float32 gray frames in 0..1, N >= 1, in focus order,
            registered.
        focus_positions: (N,), strictly monotonic, any unit; default: the frame numbers.
        method: a focus measure of :data:`gplws.classical.MEASURES` ("rdf", "sml", "mdml",
            "tenengrad", "glv", "wavelet", "shearlet"), "tft" (octaves of a time-frequency transform
            of the stack, fused by texture) or "rr" ("mdml", then :func:`regularised`).
        refinement: how the peak is found below one frame: "surface" (step 4 above), or a fit
            through the focus volume of :func:`gplws.ops.focus_search`: "gaussian", "parabola" or
            "none".
        statistics: of the whole stack, or one for each of the batch; default: of these frames.

    Returns:
        Maps (H, W), or (B, H, W) for a batch. Depth is finite everywhere, but means something only
        where ``valid``. Within a frame of the ends, where the peak is cut off, it is biased
        outwards by up to 0.25 frames. With two frames it is the sharper frame's position, but for
        a smooth passage from one to the other.

    Raises:
        ValueError: a shape does not fit, positions are not monotonic, or the method or refinement
            is unknown.
        TypeError: ``frames`` is not float32.

    Source:
        Focus measure and aggregation after Jeon et al., IEEE Transactions on Image Processing 29,
        2020, doi:10.1109/TIP.2019.2937064; choice of windows, refinement along the surface and
        validity are this package's.

    Example:
        >>> import torch
        >>> texture = torch.rand(48, 48, generator=torch.Generator().manual_seed(0))
        >>> sharpness = torch.exp(-((torch.arange(9.0) - 4.3) ** 2) / 8).view(9, 1, 1)
        >>> found = depth_from_focus(0.5 + 0.4 * sharpness * (texture - 0.5))
        >>> bool(found.valid.all()), round(float(found.depth_index.mean()), 1)
        (True, 4.3)
    """
    _check_method(method)
    if refinement not in get_args(PeakRefinement):
        raise ValueError(
            f"refinement: expected one of {get_args(PeakRefinement)}, got {refinement!r}"
        )
    stacks, known = _check_frames(frames, statistics)
    positions, first = _positions(focus_positions, frames)
    results = []
    for stack, one in zip(stacks, known, strict=True):
        found = _depth_of_stack(stack, positions, one, method, refinement)
        results.append(found._replace(depth=found.depth + first))
    if frames.dim() == 3:
        return results[0]
    return DepthFromFocus(*(torch.stack(maps) for maps in zip(*results, strict=True)))


def regularised(found: DepthFromFocus, guide: Tensor, focus_positions: Tensor) -> DepthFromFocus:
    """A depth map after :func:`gplws.classical.regularise_depth`: the last step of "rr".

    Confident pixels hold on to their depth, the others follow their neighbours across smooth parts
    of ``guide``. Confidence, validity and peak stay as they were.

    Args:
        found: maps (H, W) of a whole image, depth finite.
        guide: (H, W) float32 all-in-focus image in 0..1.
        focus_positions: (N,) as they were searched, float32.
    """
    # The square: an uncertain pixel is worth less than its confidence says, as it is often wrong
    # by many frames.
    guide = guide.nan_to_num(0)
    index = regularise_depth(
        found.depth_index,
        found.confidence**2,
        guide,
        guide_scale=max(_EDGE * float(guide.detach().std(correction=0)), _TINY),
    )
    index = index.clamp(0, focus_positions.numel() - 1)
    return found._replace(
        depth=position_at(focus_positions, index), depth_index=index, index=index.round().long()
    )


def refine_depth(
    frames: Tensor,
    depth_index: Tensor,
    focus_positions: Tensor | None = None,
    limit: Tensor | None = None,
    *,
    statistics: StackStatistics | Sequence[StackStatistics] | None = None,
    leave_out_beyond: bool = False,
) -> Tensor:
    """A depth map that other means found, refined below one frame along its own surface.

    Step 4 of the recipe above with responses of "mdml", twice. The depth is smoothed over a few
    pixels, never across steps, and moves by less than the spacing of the samples, the less the more
    noise hides the texture.

    Args:
        frames: (N, H, W) or (B, N, H, W) float32 gray frames in 0..1, in focus order.
        depth_index: (H, W) or (B, H, W) float32 finite, depth in frames, 0 .. N-1.
        focus_positions: (N,), strictly monotonic, any unit; default: the frame numbers.
        limit: shape of ``depth_index``, >= 0, frames: how far from it the result may lie; default:
            anywhere.
        statistics: of the whole stack, or one for each of the batch; default: of these frames.
        leave_out_beyond: NaN where the depth lies within a frame of an end and the responses, well
            above noise, say that the surface lies beyond it.

    Returns:
        Frames, shape of ``depth_index``, 0 .. N-1. Below three frames ``depth_index`` as it is.

    Raises:
        ValueError: a shape does not fit, or positions are not monotonic.
        TypeError: ``frames`` is not float32.
    """
    stacks, known = _check_frames(frames, statistics)
    positions, _ = _positions(focus_positions, frames)
    limit = torch.full_like(depth_index, torch.inf) if limit is None else limit
    for name, map_ in (("depth_index", depth_index), ("limit", limit)):
        if map_.shape != frames.shape[:-3] + frames.shape[-2:]:
            raise ValueError(
                f"{name}: expected {tuple(frames.shape[:-3] + frames.shape[-2:])} for frames "
                f"{tuple(frames.shape)}, got {tuple(map_.shape)}"
            )
    maps = depth_index if frames.dim() == 4 else [depth_index]
    found = [
        _refined(stack, map_, positions, one)
        for stack, map_, one in zip(stacks, maps, known, strict=True)
    ]
    refined, beyond = (torch.stack(parts).view_as(limit) for parts in zip(*found, strict=True))
    refined = refined.clamp(depth_index - limit, depth_index + limit)
    return refined.where(~beyond, torch.nan) if leave_out_beyond else refined


def refining_radius() -> int:
    """How far away a pixel can influence the result of :func:`refine_depth`, in pixels."""
    windows = 2 * aggregation_reach(max(_LEVELS)) + 2 * SURFACE_REACH
    return MEASURES[_REFINING_MEASURE].total_reach + _REFINING_PASSES * windows


def floats_per_pixel(n_frames: int) -> float:
    """Working memory of :func:`depth_from_focus` for each pixel, in float32 values."""
    return max(130.0, 40.0 + 4.2 * n_frames)  # measured with 4 to 100 frames


def focus_validity(prominence: Tensor, contrast: Tensor, vertex: Tensor, n_frames: int) -> Tensor:
    """Where a focus peak is real: above the noise, and within the stack.

    Args:
        prominence: (...) peak minus lowest response over the frames, in standard deviations of the
            noise.
        contrast: (...) the same as share of the peak, 0..1.
        vertex: (...) fitted peak position, frames, not confined to the stack; NaN where the
            responses rise towards an end without a maximum.
        n_frames: N.

    Returns:
        (...) bool. A single frame has nothing to compare with: all of it is valid.
    """
    if n_frames == 1:
        return torch.ones_like(prominence, dtype=torch.bool)
    expected = 2 * math.sqrt(2 * math.log(n_frames))
    clear = prominence > expected + _VALID_MARGIN
    inside = (vertex >= -_VALID_OVERSHOOT) & (vertex <= n_frames - 1 + _VALID_OVERSHOOT)
    return clear & inside & (contrast > _VALID_CONTRAST)


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")


def _check_frames(
    frames: Tensor, statistics: StackStatistics | Sequence[StackStatistics] | None
) -> tuple[Sequence[Tensor], Sequence[StackStatistics]]:
    """The stacks (N, H, W) of a batch, and the statistics of each."""
    if frames.dtype != torch.float32:
        raise TypeError(f"frames: expected float32, got {frames.dtype}")
    if frames.dim() not in (3, 4) or frames.numel() == 0:
        raise ValueError(
            f"frames: expected (N, H, W) or (B, N, H, W), not empty, got {tuple(frames.shape)}"
        )
    stacks = frames.unbind(0) if frames.dim() == 4 else (frames,)
    if statistics is None:
        known: Sequence[StackStatistics] = [stack_statistics(stack.detach()) for stack in stacks]
    elif isinstance(statistics, StackStatistics):
        known = [statistics]
    else:
        known = statistics
    if len(known) != len(stacks):
        raise ValueError(f"statistics: expected {len(stacks)}, one per stack, got {len(known)}")
    for one in known:
        if one.n_frames != frames.shape[-3]:
            raise ValueError(
                f"statistics: expected those of {frames.shape[-3]} frames, got {one.n_frames}"
            )
    return stacks, known


def _positions(focus_positions: Tensor | None, frames: Tensor) -> tuple[Tensor, float]:
    """Focus positions (N,) of ``frames`` (..., N, H, W) from the first, and the first.

    The positions are float32 on the device of the frames: small numbers wherever a stage stands.
    """
    n_frames = frames.shape[-3]
    if focus_positions is None:
        return torch.arange(n_frames, device=frames.device, dtype=torch.float32), 0.0
    if tuple(focus_positions.shape) != (n_frames,):
        raise ValueError(
            f"focus_positions: expected (N,) with N = {n_frames}, "
            f"got {tuple(focus_positions.shape)}"
        )
    exact = focus_positions.double()
    if not rise_or_fall(exact):
        raise ValueError("focus_positions: expected strictly rising or falling values")
    return (exact - exact[0]).to(frames.device, torch.float32), float(exact[0])


def _focus_volume(frames: Tensor, statistics: StackStatistics, measure: FocusMeasure) -> _Search:
    noise = measure.noise_gain * statistics.noise()
    gains = statistics.gains().to(frames.device).view(-1, 1, 1)
    response = measure(frames * gains)  # (N, H, W)
    volumes = _three_windows(response)
    peak = volumes[1].amax(0)
    fine_span = volumes[0].amax(0) - volumes[0].amin(0)
    medium_span = peak - volumes[1].amin(0)
    fine = fine_span / (measure.fine_deviation * noise + _TINY)
    medium = medium_span / (measure.medium_deviation * noise + _TINY)
    unrest = _unrest(volumes[1], peak)
    volume = _blend(volumes, _share(fine, _SEARCH_PROMINENCE), _share(medium, _SEARCH_PROMINENCE))
    _, medium_volume, wide_volume = volumes
    del volumes
    volume = _with_consensus(volume, medium_volume, peak, _reused(wide_volume))
    return _Search(
        response=response,
        volume=volume,
        shares=_Shares(_share(fine, _REFINE_PROMINENCE), _share(medium, _REFINE_PROMINENCE)),
        prominence=torch.minimum(medium, medium_span / (unrest + _TINY)),
        contrast=medium_span / peak.clamp(min=1e-12),
        noise=noise,
    )


def _with_consensus(volume: Tensor, responses: Tensor, peak: Tensor, shared: Tensor) -> Tensor:
    """``volume`` (N, H, W) weighted by the frames that the surroundings vote for.

    A pixel's votes are its ``responses`` (N, H, W) over their ``peak`` (H, W), so that strong
    texture has no more say than weak. Votes are collected in ``shared`` (N, H, W).
    """
    scale = peak.clamp(min=_TINY)
    for part in chunks(volume):
        smooth(responses[part] / scale, _LEVELS[1], _LEVELS[2], out=shared[part])
    weight = _CONSENSUS / shared.amax(0).clamp(min=_TINY)
    result = _reused(volume)
    for part in chunks(volume):
        result[part] = volume[part] * (1 + weight * shared[part]) / (1 + _CONSENSUS)
    return result


def _reused(volume: Tensor) -> Tensor:
    """Memory for another volume: that of one that is no longer needed, unless autograd does.

    Fresh memory takes the operating system as long as some of the steps here.
    """
    return torch.empty_like(volume) if volume.requires_grad else volume


def _unrest(volume: Tensor, peak: Tensor) -> Tensor:
    """Deviation (H, W) of the noise in each pixel's own responses (N, H, W) along the frames.

    Noise that one level cannot describe (compression, moving background, light) shows here. A curve
    with one peak rises once and falls once; what it moves up and down beyond that counts as noise.
    """
    n_frames = volume.shape[0]
    if n_frames < 3:
        return torch.zeros_like(peak)
    path = torch.zeros_like(peak)
    for here in range(n_frames - 1):
        path = path + (volume[here + 1] - volume[here]).abs()
    excess = (path - (2 * peak - volume[0] - volume[-1])).clamp(min=0)
    return excess / (_STEP_OF_NOISE * (n_frames - 1))


def _three_windows(response: Tensor) -> list[Tensor]:
    """Responses (N, H, W) aggregated with each of the three windows; each builds on the last."""
    windows = [torch.empty_like(response) for _ in _LEVELS]
    for part in chunks(response):
        seen, first = response[part], 0
        for window, last in zip(windows, _LEVELS, strict=True):
            seen, first = smooth(seen, first, last, out=window[part]), last
    return windows


def _share(prominence: Tensor, half: float) -> Tensor:
    """Share of the wider window: 1 without a peak, 1/2 at ``half``, towards 0 above it."""
    return 1 / (1 + (prominence / half) ** 2)


def _blend(windows: Sequence[Tensor], to_medium: Tensor, to_wide: Tensor) -> Tensor:
    """The three windows (N, H, W) by shares (H, W), in the memory of the first."""
    fine, medium, wide = windows
    result = _reused(fine)
    for part in chunks(fine):
        wider = torch.lerp(medium[part], wide[part], to_wide)
        result[part] = torch.lerp(fine[part], wider, to_medium)
    return result


def _depth_of_stack(
    frames: Tensor,
    positions: Tensor,
    statistics: StackStatistics,
    method: str,
    refinement: PeakRefinement,
) -> DepthFromFocus:
    def search(measure: FocusMeasure) -> DepthFromFocus:
        return _search(frames, positions, statistics, measure, refinement)

    if method == "tft":
        width = statistics.peak_width()
        return _fused([search(octave_measure(k, width)) for k in range(OCTAVES)], positions)
    found = search(MEASURES[LOCAL_PART.get(method, method)])
    if method in LOCAL_PART:
        return regularised(found, frames.gather(0, found.index[None])[0], positions)
    return found


def _fused(octaves: Sequence[DepthFromFocus], positions: Tensor) -> DepthFromFocus:
    """What several octaves, finest first, find together."""
    confidences = torch.stack([found.confidence for found in octaves])
    # The coarser octave has the wider peaks: half the say.
    shares = 0.5 ** torch.arange(len(octaves)).to(confidences)
    depths = torch.stack([found.depth_index for found in octaves])
    reliabilities = confidences * shares.view(-1, 1, 1)
    index = fuse_by_texture(depths, reliabilities)
    confidence, best = confidences.max(0, keepdim=True)
    return DepthFromFocus(
        depth=position_at(positions, index),
        depth_index=index,
        confidence=confidence[0] * agreement_of_octaves(depths, reliabilities, index),
        valid=torch.stack([found.valid for found in octaves]).any(0),
        peak=torch.stack([found.peak for found in octaves]).gather(0, best)[0],
        index=index.round().long(),
    )


def _search(
    frames: Tensor,
    positions: Tensor,
    statistics: StackStatistics,
    measure: FocusMeasure,
    refinement: PeakRefinement,
) -> DepthFromFocus:
    n_frames = frames.shape[0]
    search = _focus_volume(frames, statistics, measure)
    width = statistics.peak_width() or _WIDTH_PER_SPACING
    spacing = _spacing(statistics)
    radius = min(math.ceil(width / _WIDTH_PER_RADIUS), _LARGEST_RADIUS)
    places = _place(positions)
    along_surface = refinement == "surface"
    found = focus_search(
        search.volume[None],
        places,
        refinement="gaussian" if refinement == "surface" else refinement,
        radius=radius,
    )
    # NaN pixels end up as invalid ones; a NaN frame number could not be looked up.
    rough, peak, confidence = found.depth[0].nan_to_num(0), found.peak[0], found.confidence[0]
    if places is not None:
        rough = frame_at(places, rough)
    surface = smooth_surface(rough, limit=_SURFACE_LIMIT * spacing).clamp(0, n_frames - 1)
    if along_surface:
        samples = _samples(search.response, surface, spacing, places)
        values = _aggregate(samples.values, search.shares)
        vertex = _vertex(samples, values, search.shares, surface, spacing, places, n_frames)
    else:
        vertex = surface = rough
    index = torch.where(vertex.isnan(), surface, vertex).nan_to_num(0).clamp(0, n_frames - 1)
    valid = focus_validity(search.prominence, search.contrast, vertex, n_frames)
    return DepthFromFocus(
        depth=position_at(positions, index),
        depth_index=index,
        confidence=torch.where(valid, _confidence(confidence, peak, search), 0.0),
        valid=valid,
        peak=peak,
        index=index.round().long(),
    )


def _spacing(statistics: StackStatistics) -> int:
    """Frames from one sample of the refinement to the next."""
    width = statistics.peak_width() or _WIDTH_PER_SPACING
    return max(1, round(width / _WIDTH_PER_SPACING))


def _refined(
    frames: Tensor, index: Tensor, positions: Tensor, statistics: StackStatistics
) -> tuple[Tensor, Tensor]:
    """:func:`refine_depth` of one stack, and where the peak lies beyond an end."""
    n_frames = frames.shape[0]
    if n_frames < 3:
        return index, torch.zeros_like(index, dtype=torch.bool)
    at_end = (index < _NEAR_END) | (index > n_frames - 1 - _NEAR_END)
    measure = MEASURES[_REFINING_MEASURE]
    noise = measure.noise_gain * statistics.noise()
    response = measure(frames * statistics.gains().to(frames.device).view(-1, 1, 1))
    spacing, places = _spacing(statistics), _place(positions)
    for _ in range(_REFINING_PASSES):
        surface = smooth_surface(index, limit=_SURFACE_LIMIT * spacing).clamp(0, n_frames - 1)
        samples = _samples(response, surface, spacing, places)
        windows = _three_windows(samples.values)
        fine, medium, _ = (window.amax(0) - window.amin(0) for window in windows)
        fine = _share(fine / (measure.fine_deviation * noise + _TINY), _REFINE_PROMINENCE)
        medium = _share(medium / (measure.medium_deviation * noise + _TINY), _REFINE_PROMINENCE)
        shares = _Shares(fine, medium)
        values = _blend(windows, *shares)
        vertex = _vertex(samples, values, shares, surface, spacing, places, n_frames)
        shift = (1 - medium) * (vertex.clamp(0, n_frames - 1) - surface)
        index = surface + torch.where(shift.abs() < spacing, shift, 0.0)  # no shift for NaN
    inside = (vertex >= -_VALID_OVERSHOOT) & (vertex <= n_frames - 1 + _VALID_OVERSHOOT)
    return index.clamp(0, n_frames - 1), at_end & ~inside & (medium < 0.5)


def _confidence(searched: Tensor, peak: Tensor, search: _Search) -> Tensor:
    """``1 - runner_up / peak`` of the search with the noise taken off both, times that of noise."""
    above = (peak - search.noise).clamp(min=1e-12)
    runner_up = ((1 - searched) * peak - search.noise).clamp(min=0)
    distinct = (1 - runner_up / above).clamp(0, 1)
    return distinct * (1 - _share(search.prominence, _REFINE_PROMINENCE))


def _place(positions: Tensor) -> Tensor | None:
    """Focus positions (N,) in mean steps from the first, rising; None if the steps are even."""
    if positions.numel() < 3:
        return None
    places = (positions - positions[0]) * (positions.numel() - 1) / (positions[-1] - positions[0])
    frame = torch.arange(positions.numel(), device=positions.device)
    even = bool((places - frame).abs().max() < _EVEN_STEPS)
    return None if even else places


def _samples(
    response: Tensor, surface: Tensor, spacing: int, places: Tensor | None
) -> SurfaceSamples:
    """Samples whole frames before and behind a surface; uneven ``places`` give their distances.

    Flanks of a peak are no parabola. So each side has its say up to where the other ends, however
    close the frames of either are: samples weigh as the distance that they stand for.
    """
    samples = sample_surface(response, surface, spacing=spacing)
    if places is None:
        return samples
    distances = position_at(places, surface + spacing * samples.distances)
    distances = distances - position_at(places, surface)
    step = spacing * _local_step(places, surface)
    far = distances.abs() / step
    reach = torch.minimum(far[0], far[-1]).clamp(min=2)
    apart = torch.cat([distances[:1], distances, distances[-1:]])
    apart = apart[2:] - apart[:-2]
    apart[1:-1] /= 2
    weights = (2 * (reach + 0.5 - far)).clamp(0, 1) * (apart / step).clamp(max=1)
    return SurfaceSamples(samples.values * weights, distances, samples.weights * weights)


def _local_step(places: Tensor, surface: Tensor) -> Tensor:
    """The smaller step between frames at each place of a surface (H, W)."""
    steps = places.diff()
    smaller = torch.minimum(torch.cat([steps[:1], steps]), torch.cat([steps, steps[-1:]]))
    return position_at(smaller, surface)


def _vertex(
    samples: SurfaceSamples,
    values: Tensor,
    shares: _Shares,
    surface: Tensor,
    spacing: int,
    places: Tensor | None,
    n_frames: int,
) -> Tensor:
    """Peak position (H, W) in frames, from samples along ``surface`` (H, W).

    ``values`` are those of the samples, averaged over the windows that ``shares`` say. ``places``
    are the focus positions where their steps are uneven: the peak is symmetric over those, not over
    the frame numbers. The result is not confined to the stack; NaN where there is no maximum and
    the surface is at an end.
    """
    responses, distances, weights = samples
    reach = SURFACE_SAMPLES * spacing
    inside = (surface >= reach).all() & (surface <= n_frames - 1 - reach).all()
    if places is None and bool(inside):
        shift, concave = fit_peak(values)
    else:
        # Neighbours' samples differ in place, and near the ends in weight.
        middle = _aggregate(weights * responses[SURFACE_SAMPLES], shares)
        distances = _aggregate(distances * weights, shares)
        step = 1.0 if places is None else spacing * _local_step(places, surface)
        shift, concave = fit_peak(values, middle, distances / step, _aggregate(weights, shares))
    if places is None:
        vertex = surface + spacing * shift
    else:
        vertex = frame_at(places, position_at(places, surface) + step * shift)
    at_end = (surface < _AT_END) | (surface > n_frames - 1 - _AT_END)
    return torch.where(~concave & at_end & (n_frames >= 3), torch.nan, vertex)


def _aggregate(samples: Tensor, shares: _Shares) -> Tensor:
    """Samples (7, H, W) averaged over the three windows by their shares."""
    result = torch.empty_like(samples)
    for part in chunks(samples):
        result[part] = _blend(_three_windows(samples[part]), *shares)
    return result
