"""Preview figure: shaded height map, a profile through it, and the all-in-focus image."""

from __future__ import annotations

import math
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gplws.data.focal_stack import checked_length
from gplws.files import new_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Percentiles of the heights between which the colours run; outliers saturate.
_COLOR_PERCENTILES = (0.5, 99.5)
_DISPLAY_PERCENTILES = (0.1, 99.9)

_DPI = 200
_COLORMAP = "viridis"
_INK = "#222222"
_ACCENT = "#d1495b"
_MISSING = "#d9d9d9"
_LABEL_SIZE = 8.0
_TITLE_SIZE = 9.0

# All lengths of the layout are in inches.
_MARGIN = 0.15
_TITLE_ROOM = 0.30
_BELOW_ROOM = 0.55
_LEFT_ROOM = 0.62
_BAR_GAP, _BAR_WIDTH, _BAR_ROOM = 0.10, 0.12, 0.68
_GUTTER = 0.10
_PANEL_AREA = 3.4 * 3.4
_PANEL_MIN, _PANEL_MAX = 0.7, 8.0
_PROFILE_WIDTH, _PROFILE_HEIGHT = 3.4, 1.7
_BORDER_SHARE = 20  # of all lines, on each side, where profiles are not drawn

# Panels wider than this are stacked, with the profile under the columns it belongs to.
_WIDE = 1.8
# Panels narrower than this show a column instead of a row, which would be too short to tell much.
_TALL = 1 / 3


def robust_limits(values: np.ndarray) -> tuple[float, float]:
    """Range of the finite values without outliers, never empty.

    Args:
        values: any shape, float; NaN is left out.

    Returns:
        Lower and upper limit, in the unit of ``values``; (0, 1) without any finite value.
    """
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(finite, _COLOR_PERCENTILES))
    if high - low <= 1e-6 * max(abs(low), abs(high), 1e-6):
        low, high = float(finite.min()), float(finite.max())
    if high - low <= 1e-6 * max(abs(low), abs(high), 1e-6):
        middle, half = (low + high) / 2, max(0.5, 1e-3 * abs(high))
        low, high = middle - half, middle + half
    return low, high


def telling_line(height: np.ndarray, axis: int = 0) -> int:
    """Row (or column) whose profile shows most of the relief.

    The line with the largest variance of its heights, weighted by its share of valid pixels. Where
    several neighbours are as good, the middle one. Near the borders heights are less certain: no
    line there is chosen where others show some relief.

    Args:
        height: (H, W) float, NaN where unknown.
        axis: 0 chooses a row, 1 a column.

    Returns:
        Index of the line; the middle one where nothing is valid.
    """
    lines = np.clip(height if axis == 0 else height.T, *robust_limits(height))
    valid = np.isfinite(lines)
    count = valid.sum(axis=1)
    safe = np.maximum(count, 1)
    filled = np.where(valid, lines, 0.0)
    mean = filled.sum(axis=1) / safe
    variance = np.where(valid, lines - mean[:, None], 0.0)
    score = (variance**2).sum(axis=1) / safe * (count / lines.shape[1])
    border = lines.shape[0] // _BORDER_SHARE
    inner = score[border : score.size - border]
    if inner.max() > 0:
        score[:border] = score[score.size - border :] = 0
    if not score.max() > 0:
        return lines.shape[0] // 2
    good = np.flatnonzero(score >= 0.98 * score.max())
    return int(good[good.size // 2])


def nice_length(limit: float) -> float:
    """Largest of 1, 2, 5 times a power of ten that does not exceed ``limit`` (> 0)."""
    power = 10.0 ** math.floor(math.log10(limit))
    # The tolerance keeps 1000 at 1000 when its logarithm rounds down.
    return max(f * power for f in (1.0, 2.0, 5.0, 10.0) if f * power <= limit * (1 + 1e-9))


def format_length(length_um: float) -> str:
    """Length with the unit that keeps the number short: 500 nm, 20 µm, 5 mm."""
    if length_um >= 1000:
        return f"{length_um / 1000:g} mm"
    return f"{length_um * 1000:g} nm" if length_um < 1 else f"{length_um:g} µm"


def display_uint8(image: np.ndarray) -> np.ndarray:
    """Image as 8 bits for the eye; 8-bit images are unchanged, others stretched robustly.

    Args:
        image: (H, W) or (H, W, 3), any integer or float dtype; NaN becomes black.

    Returns:
        uint8 array of the same shape.
    """
    if image.dtype == np.uint8:
        return image
    values = image.astype(np.float32)
    finite = values[np.isfinite(values)]
    low, high = np.percentile(finite, _DISPLAY_PERCENTILES) if finite.size else (0.0, 1.0)
    scaled = (values - low) / max(float(high - low), 1e-12)
    return (np.clip(np.nan_to_num(scaled), 0, 1) * 255 + 0.5).astype(np.uint8)


def preview_figure(
    height: np.ndarray,
    all_in_focus: np.ndarray | None = None,
    *,
    units: str = "um",
    pixel_size_um: float | None = None,
    valid: np.ndarray | None = None,
) -> Figure:
    """Figure with the hill-shaded height map, a profile and the all-in-focus image.

    Pixels without a height are hatched. With a pixel size the map carries a scale bar, else its
    axes count pixels. The colours run between robust percentiles. The profile runs along the most
    telling row (of very tall images: column), which is marked on the map. Strips with extreme
    aspect ratios are stretched, and say so.

    Args:
        height: (H, W) float, in ``units``, NaN where unknown.
        all_in_focus: (H, W) or (H, W, 3), any integer or float dtype.
        units: ``"um"`` or ``"frames"``.
        pixel_size_um: side of a pixel, um.
        valid: (H, W) bool; False hides a height.

    Returns:
        A matplotlib figure with an Agg canvas; no global state of matplotlib is touched.

    Raises:
        ValueError: shapes differ, or ``units`` is unknown.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = _checked_height(height, valid, units)
    if all_in_focus is not None and (
        all_in_focus.shape[:2] != shown.shape or all_in_focus.ndim not in (2, 3)
    ):
        raise ValueError(
            f"all_in_focus must be {shown.shape} or {(*shown.shape, 3)}, "
            f"got shape {all_in_focus.shape}"
        )
    if pixel_size_um is not None:
        pixel_size_um = checked_length(pixel_size_um, "pixel_size_um")

    layout = _Layout(
        shown.shape, with_image=all_in_focus is not None, with_ticks=pixel_size_um is None
    )
    figure = Figure(figsize=layout.size, dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axis = 1 if layout.tall else 0
    line = telling_line(shown, axis)
    letters = iter("abc")

    map_axes = _add_axes(figure, layout, layout.map)
    _title(map_axes, next(letters), "Height map")
    _draw_map(figure, map_axes, layout, shown, units)
    _mark_line(map_axes, line, axis)
    _lateral_scale(map_axes, layout, shown.shape, pixel_size_um)
    _note(map_axes, layout, shown, pixel_size_um)

    def draw_profile() -> None:
        axes = _add_axes(figure, layout, layout.profile)
        _draw_profile(axes, shown, line, axis, units, pixel_size_um, next(letters))

    def draw_image() -> None:
        if all_in_focus is not None:
            axes = _add_axes(figure, layout, layout.image)
            _title(axes, next(letters), "All in focus")
            _draw_image(axes, layout, all_in_focus)
            _lateral_scale(axes, layout, shown.shape, pixel_size_um)

    # Letters follow the reading order: side by side the profile is second, stacked it is last.
    for draw in (draw_image, draw_profile) if layout.wide else (draw_profile, draw_image):
        draw()
    return figure


def preview_png(
    height: np.ndarray,
    all_in_focus: np.ndarray | None = None,
    *,
    units: str = "um",
    pixel_size_um: float | None = None,
    valid: np.ndarray | None = None,
) -> bytes:
    """The figure of `preview_figure` as the content of a PNG file."""
    figure = preview_figure(
        height, all_in_focus, units=units, pixel_size_um=pixel_size_um, valid=valid
    )
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, facecolor="white")
    return buffer.getvalue()


def write_preview(
    path: str | Path,
    height: np.ndarray,
    all_in_focus: np.ndarray | None = None,
    *,
    units: str = "um",
    pixel_size_um: float | None = None,
    valid: np.ndarray | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the figure of `preview_figure` as PNG; the file appears complete or not at all.

    Args:
        path: file to write.
        height, all_in_focus, units, pixel_size_um, valid: see `preview_figure`.
        overwrite: whether an existing file is replaced.

    Raises:
        FileExistsError: the file exists and ``overwrite`` is False.
        OSError: the file cannot be written; an existing one is unchanged.
        ValueError: see `preview_figure`.
    """
    with new_file(Path(path), overwrite=overwrite) as file:
        picture = preview_png(
            height, all_in_focus, units=units, pixel_size_um=pixel_size_um, valid=valid
        )
        file.write(picture)


def _checked_height(height: np.ndarray, valid: np.ndarray | None, units: str) -> np.ndarray:
    if units not in ("um", "frames"):
        raise ValueError(f"units must be 'um' or 'frames', got {units!r}")
    if height.ndim != 2 or 0 in height.shape:
        raise ValueError(f"height must be (H, W) and not empty, got shape {height.shape}")
    shown = np.where(np.isfinite(height), height, np.nan).astype(np.float64)
    if valid is not None:
        if valid.shape != height.shape:
            raise ValueError(f"valid must have shape {height.shape}, got {valid.shape}")
        shown[~valid.astype(bool)] = np.nan
    return shown


class _Layout:
    """Places the panels, in inches from the lower left corner: (left, bottom, width, height)."""

    def __init__(self, shape: tuple[int, ...], *, with_image: bool, with_ticks: bool) -> None:
        aspect = shape[1] / shape[0]
        self.wide = aspect > _WIDE
        self.tall = aspect < _TALL
        width = min(math.sqrt(_PANEL_AREA * aspect), _PANEL_MAX if self.wide else _PANEL_MAX / 2)
        panel_height = width / aspect
        if panel_height > _PANEL_MAX / 2:
            panel_height = _PANEL_MAX / 2
            width = panel_height * aspect
        stretched = max(width, _PANEL_MIN), max(panel_height, _PANEL_MIN)
        self.stretch = (stretched[1] / stretched[0]) * aspect
        width, panel_height = stretched
        bar = _BAR_GAP + _BAR_WIDTH + _BAR_ROOM
        if self.wide:
            rows = [panel_height] * (2 if with_image else 1) + [_PROFILE_HEIGHT]
            total = _MARGIN + sum(rows) + len(rows) * (_TITLE_ROOM + _BELOW_ROOM)
            self.size = (_LEFT_ROOM + width + bar + _MARGIN, total)
            boxes, top = [], total - _MARGIN
            for row in rows:
                boxes.append((_LEFT_ROOM, top - _TITLE_ROOM - row, width, row))
                top -= _TITLE_ROOM + row + _BELOW_ROOM
            self.map, self.profile = boxes[0], boxes[-1]
            self.image = boxes[1]
        else:
            bottom = _BELOW_ROOM + _MARGIN / 2
            profile_height = min(panel_height, _PROFILE_WIDTH)
            # Without ticks, maps need no room for labels at their left.
            tick_room = _LEFT_ROOM if with_ticks else _MARGIN
            left = tick_room
            self.map = (left, bottom, width, panel_height)
            left += width + bar + _GUTTER + _LEFT_ROOM
            self.profile = (
                left,
                bottom + (panel_height - profile_height) / 2,
                _PROFILE_WIDTH,
                profile_height,
            )
            left += _PROFILE_WIDTH + 2 * _GUTTER
            if with_image:
                left += tick_room
                self.image = (left, bottom, width, panel_height)
                # The title of a narrow panel is wider than the panel.
                left += max(width, 1.0)
            self.size = (left + _MARGIN, bottom + panel_height + _TITLE_ROOM + _MARGIN)

    @property
    def bar(self) -> tuple[float, float, float, float]:
        left, bottom, width, height = self.map
        return left + width + _BAR_GAP, bottom, _BAR_WIDTH, height


def _add_axes(figure: Figure, layout: _Layout, box: tuple[float, float, float, float]) -> Axes:
    width, height = layout.size
    axes = figure.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height))
    axes.tick_params(labelsize=_LABEL_SIZE, colors=_INK, width=0.6, length=3)
    for spine in axes.spines.values():
        spine.set_linewidth(0.6)
        spine.set_color(_INK)
    return axes


def _title(axes: Axes, letter: str, text: str) -> None:
    axes.annotate(
        letter,
        (0, 1),
        xytext=(-1, 5),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=_TITLE_SIZE + 1,
        fontweight="bold",
        color=_INK,
    )
    axes.annotate(
        text,
        (0, 1),
        xytext=(12, 5),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=_TITLE_SIZE,
        color=_INK,
    )


def _draw_map(figure: Figure, axes: Axes, layout: _Layout, height: np.ndarray, units: str) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    low, high = robust_limits(height)
    small = _block_mean(height, _block_size(height.shape, layout))
    norm = Normalize(low, high)
    colors = colormaps[_COLORMAP](norm(np.nan_to_num(small, nan=low)))
    shade = _hill_shade(small)[..., None]
    # Shadows multiply, highlights screen: hues stay readable against the colour bar.
    rgb = colors[..., :3]
    dark = rgb * (2 * shade)
    light = 1 - (1 - rgb) * (2 - 2 * shade)
    colors[..., :3] = np.clip(np.where(shade < 0.5, dark, light), 0, 1)
    colors[..., 3] = np.isfinite(small)

    axes.add_patch(
        Rectangle(
            (-0.5, -0.5),
            height.shape[1],
            height.shape[0],
            facecolor=_MISSING,
            edgecolor="#8c8c8c",
            hatch="//////",
            linewidth=0,
            zorder=0,
        )
    )
    _show(axes, colors, height.shape)
    mappable = ScalarMappable(norm, colormaps[_COLORMAP])
    bar_axes = _add_axes(figure, layout, layout.bar)
    finite = height[np.isfinite(height)]
    below = finite.size > 0 and finite.min() < low
    above = finite.size > 0 and finite.max() > high
    extend = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[below, above]
    bar = figure.colorbar(mappable, cax=bar_axes, extend=extend, extendfrac=0.03)
    bar_axes.spines["outline"].set_linewidth(0.6)
    ticks = 3 if layout.map[3] < 1.2 else 6
    bar.locator = MaxNLocator(ticks)
    bar.update_ticks()
    bar_axes.tick_params(labelsize=_LABEL_SIZE, colors=_INK, width=0.6, length=2)
    bar_axes.set_ylabel(_height_label(units), fontsize=_LABEL_SIZE, color=_INK)


def _note(axes: Axes, layout: _Layout, height: np.ndarray, pixel_size_um: float | None) -> None:
    """Says below the map what is hatched and whether the picture is stretched."""
    texts = []
    missing = 1 - np.isfinite(height).mean()
    if missing > 0:
        texts.append(f"hatched: no height ({_percent(missing)})")
    if layout.stretch > 1.05:
        texts.append(f"stretched {layout.stretch:.2g}x in y")
    elif layout.stretch < 0.95:
        texts.append(f"stretched {1 / layout.stretch:.2g}x in x")
    narrow = layout.map[2] < 2.5
    # A narrow map has its scale bar or label in the way.
    below = -9 if pixel_size_um is not None and not narrow else -24
    axes.annotate(
        ("\n" if narrow else "; ").join(texts),
        (0 if narrow else 1, 0),
        xytext=(0, below),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=_LABEL_SIZE - 1.5,
        color="#666666",
        ha="left" if narrow else "right",
        va="top",
    )


def _percent(share: float) -> str:
    return "<0.1 %" if share < 1e-3 else f"{100 * share:.1f} %"


def _height_label(units: str) -> str:
    return "Height (µm)" if units == "um" else "Height (frames)"


def _block_size(shape: tuple[int, ...], layout: _Layout) -> int:
    """Pixels per side that share one dot of the figure."""
    return max(1, int(max(shape[0] / layout.map[3], shape[1] / layout.map[2]) / _DPI))


def _block_mean(height: np.ndarray, block: int) -> np.ndarray:
    """Mean over blocks of pixels; NaN where less than half of a block is known."""
    if block == 1:
        return height
    rows, columns = (-(-n // block) for n in height.shape)
    pad = (rows * block - height.shape[0], columns * block - height.shape[1])
    padded = np.pad(height, ((0, pad[0]), (0, pad[1])), mode="edge")
    blocks = padded.reshape(rows, block, columns, block)
    known = np.isfinite(blocks)
    count = known.sum(axis=(1, 3))
    total = np.where(known, blocks, 0.0).sum(axis=(1, 3))
    return np.where(2 * count >= block * block, total / np.maximum(count, 1), np.nan)


def _hill_shade(height: np.ndarray) -> np.ndarray:
    """Brightness in 0..1 of the surface lit from the upper left; 0.5 where it is level.

    The relief is exaggerated so that its steeper slopes come to 45 degrees.
    """
    finite = np.isfinite(height)
    filled = np.where(finite, height, height[finite].mean() if finite.any() else 0.0)
    down, right = (
        np.gradient(filled, axis=axis) if filled.shape[axis] > 1 else np.zeros_like(filled)
        for axis in (0, 1)
    )
    # Beside a hole, a slope would compare a height with the filling.
    framed = np.pad(finite, 1, constant_values=True)
    known = finite & framed[:-2, 1:-1] & framed[2:, 1:-1] & framed[1:-1, :-2] & framed[1:-1, 2:]
    slope = np.hypot(down, right)
    typical = float(np.percentile(slope[known], 95)) if known.any() else 0.0
    if typical <= 0:
        return np.full(height.shape, 0.5)
    down, right = down / typical, right / typical
    # Unit vector to the light: from the left, the top, and 45 degrees above.
    left, up, above = 0.5, 0.5, math.sqrt(0.5)
    light = (right * left + down * up + above) / np.sqrt(1 + down**2 + right**2)
    # Level ground reflects `above`; the curve maps it to 0.5 and keeps both ends apart.
    shade = 0.5 + 0.5 * (light - above)
    return np.where(known, np.clip(shade, 0.08, 0.92), 0.5)


def _show(axes: Axes, image: np.ndarray, shape: tuple[int, ...], **options: Any) -> None:
    axes.imshow(
        image,
        extent=(-0.5, shape[1] - 0.5, shape[0] - 0.5, -0.5),
        aspect="auto",
        interpolation="antialiased",
        **options,
    )


def _mark_line(axes: Axes, line: int, axis: int) -> None:
    from matplotlib.patheffects import Normal, Stroke

    draw = axes.axhline if axis == 0 else axes.axvline
    drawn = draw(line, color="white", linewidth=1.0, dashes=(5, 3))
    drawn.set_path_effects([Stroke(linewidth=2.0, foreground=_ACCENT), Normal()])
    transform = axes.get_yaxis_transform() if axis == 0 else axes.get_xaxis_transform()
    ends: list[tuple[float, float, str]]
    ends = [(0, line, ">"), (1, line, "<")] if axis == 0 else [(line, 0, "^"), (line, 1, "v")]
    for x, y, marker in ends:
        axes.plot(
            [x],
            [y],
            marker,
            color=_ACCENT,
            markersize=5,
            transform=transform,
            clip_on=False,
            markeredgecolor="white",
            markeredgewidth=0.5,
        )


def _lateral_scale(
    axes: Axes, layout: _Layout, shape: tuple[int, ...], pixel_size_um: float | None
) -> None:
    from matplotlib.ticker import MaxNLocator
    from matplotlib.transforms import ScaledTranslation

    if pixel_size_um is None:
        axes.xaxis.set_major_locator(MaxNLocator(6 if layout.map[2] > 1.5 else 2, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(6 if layout.map[3] > 1.5 else 2, integer=True))
        axes.set_xlabel("x (px)", fontsize=_LABEL_SIZE, color=_INK, labelpad=2)
        axes.set_ylabel("y (px)", fontsize=_LABEL_SIZE, color=_INK, labelpad=2)
        return
    axes.set_xticks([])
    axes.set_yticks([])
    span_um = shape[1] * pixel_size_um
    length_um = nice_length(span_um * (0.3 if layout.map[2] > 1.5 else 0.9))
    share = length_um / span_um
    lowered = axes.transAxes + ScaledTranslation(0, -9 / 72, axes.figure.dpi_scale_trans)
    axes.plot(
        [0, share],
        [0, 0],
        color=_INK,
        linewidth=2.5,
        solid_capstyle="butt",
        transform=lowered,
        clip_on=False,
    )
    axes.annotate(
        format_length(length_um),
        (share / 2 if layout.map[2] > 1.5 else 0, 0),
        xytext=(0, -13),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=_LABEL_SIZE,
        color=_INK,
        ha="center" if layout.map[2] > 1.5 else "left",
        va="top",
    )


def _draw_profile(
    axes: Axes,
    height: np.ndarray,
    line: int,
    axis: int,
    units: str,
    pixel_size_um: float | None,
    letter: str,
) -> None:
    from matplotlib.ticker import MaxNLocator

    values = height[line] if axis == 0 else height[:, line]
    scale, unit = 1.0, "px"
    if pixel_size_um is not None:
        span_um = values.size * pixel_size_um
        factor, unit = (1e-3, "mm") if span_um >= 10000 else (1.0, "µm")
        if span_um < 2:
            factor, unit = 1e3, "nm"
        scale = pixel_size_um * factor
    along, across = ("x", "y") if axis == 0 else ("y", "x")
    position = np.arange(values.size) * scale
    marker = "." if np.isfinite(values).sum() < 40 else ""
    axes.plot(position, values, color=_ACCENT, linewidth=1.1, marker=marker, markersize=3)
    axes.set_xlim(-0.5 * scale, (values.size - 0.5) * scale)
    low, high = _profile_limits(values, height)
    pad = 0.08 * (high - low)
    axes.set_ylim(low - pad, high + pad)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(color="#e3e3e3", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(f"{along} ({unit})", fontsize=_LABEL_SIZE, color=_INK, labelpad=2)
    axes.set_ylabel(_height_label(units), fontsize=_LABEL_SIZE, color=_INK)
    where = f"{line} px" if pixel_size_um is None else f"{line * scale:.4g} {unit}"
    _title(axes, letter, f"Profile at {across} = {where}")


def _profile_limits(values: np.ndarray, height: np.ndarray) -> tuple[float, float]:
    """All of the profile, unless single outliers would flatten the rest."""
    low, high = robust_limits(height)
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return low, high
    lowest, highest = float(finite.min()), float(finite.max())
    return (lowest, highest) if 0 < highest - lowest < 4 * (high - low) else (low, high)


def _draw_image(axes: Axes, layout: _Layout, image: np.ndarray) -> None:
    block = _block_size(image.shape, layout)
    shown = display_uint8(image)
    if block > 1:
        import cv2

        size = (-(-shown.shape[1] // block), -(-shown.shape[0] // block))
        shown = cv2.resize(np.ascontiguousarray(shown), size, interpolation=cv2.INTER_AREA)
    limits = {"cmap": "gray", "vmin": 0, "vmax": 255} if shown.ndim == 2 else {}
    _show(axes, shown, image.shape, **limits)
