"""Errors of an observer who knows all of the scene but its depth, to set those of methods against.

    python -m benchmarks.oracle --surfaces FILES --textures FILES

The observer has the all-in-focus image and the lens. For each depth, in quarters of a frame, it
blurs that image as if all of the scene lay there, and takes the squared difference to the frames:

    window  mean of the differences over a Gaussian window, depth where it is least
    smooth  the depth map of least differences plus total variation

The width of the window and the weight of the total variation are those that err least on a level,
found with the truth at hand. What the observer does not know is that light from surfaces at another
depth mixes with that of its own: near steps it is no bound. "better" takes, stack by stack, the
better of it and the network, again with the truth at hand.

Stacks are those of `benchmarks.accuracy` without fall-off, drift, displacement and gamma, which the
observer does not know either; a border as wide as most blur does not count.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from benchmarks.accuracy import LEVELS, SEED, Level, drawn_from, level_samples
from benchmarks.timing import introduce, save, show
from gplws.classical.focus_volume import gaussian_blur
from gplws.data import DepthSample
from gplws.data.generator import Geometry, draw_geometry
from gplws.data.randomness import Draw, radial_frequency
from gplws.data.transforms import split
from gplws.evaluation import Method, method_of

CANDIDATES_PER_FRAME = 4
WINDOWS_PX = (1.5, 3.0, 5.0, 8.0)
WEIGHTS = (0.3, 1.0, 3.0)
BORDER_PX = 10

# Frames squared: how far the smooth map and the one that fits may part, ever less.
_COUPLINGS = (4.0, 2.0, 1.0, 0.5, 0.2, 0.1)
_DENOISING_STEPS = 60
# Deviation of the window that joins the differences before total variation, pixels.
_SMOOTH_WINDOW_PX = 0.8
_PADDING_PX = 32


class Scene(NamedTuple):
    """A stack with what the observer knows of it."""

    sample: DepthSample
    geometry: Geometry


def scenes(level: Level, count: int, *arguments: Any) -> Iterator[Scene]:
    """Stacks of a level with their lens; arguments as for `benchmarks.accuracy.level_samples`."""
    settings = replace(
        level.settings, vignetting=0.0, gain_drift=0.0, jitter=0.0, magnification=0.0, gamma=0.0
    )
    known = replace(level, settings=settings)
    for step, sample in enumerate(level_samples(known, count, *arguments)):
        geometry = draw_geometry(settings, sample.stack.shape[-3], Draw(SEED, step))
        yield Scene(sample, geometry)


def differences(scene: Scene) -> tuple[Tensor, Tensor]:
    """Squared difference of the frames to those of a scene that lies at one depth.

    Returns:
        candidates: (Z,) depths, frames.
        differences: (Z, H, W), sum over the frames.
    """
    sample, (lens, focus_um) = scene
    stack = sample.stack[0, 0]
    assert sample.all_in_focus is not None
    sharp = F.pad(sample.all_in_focus[:, :1], (_PADDING_PX,) * 4, "reflect")[0, 0]
    frames = len(stack)
    candidates = torch.linspace(0, frames - 1, CANDIDATES_PER_FRAME * (frames - 1) + 1)
    below = candidates.long().clamp(max=frames - 2)
    depth_um = torch.lerp(focus_um[below], focus_um[below + 1], candidates - below)
    widest_um = float(focus_um.max() - focus_um.min())
    frequency = radial_frequency((sharp.shape[0], sharp.shape[1]), torch.device("cpu"))
    spectrum = torch.fft.rfft2(sharp)
    inner = slice(_PADDING_PX, -_PADDING_PX)
    total = torch.zeros(len(candidates), *stack.shape[1:])
    for image, at_um in zip(stack, focus_um, strict=True):
        transfer = lens.transfer_on_grid((depth_um - at_um).abs(), frequency, widest_um=widest_um)
        blurred = torch.fft.irfft2(transfer * spectrum, s=sharp.shape)[:, inner, inner]
        total += (image - blurred).square_()
    return candidates, total


def by_window(candidates: Tensor, total: Tensor, deviation_px: float) -> Tensor:
    """(H, W) depth, frames: least mean difference in a Gaussian window."""
    return candidates[gaussian_blur(total, deviation_px).argmin(0)]


def by_total_variation(candidates: Tensor, total: Tensor, frames: int, weight: float) -> Tensor:
    """(H, W) depth, frames: differences plus total variation, by quadratic relaxation.

    Source: F. Steinbruecker, T. Pock, D. Cremers, ICCV 2009, doi:10.1109/ICCV.2009.5459364.
    """
    noise = total.amin(0).median() / frames
    misfit = gaussian_blur(total, _SMOOTH_WINDOW_PX) / (2 * noise.clamp(min=1e-12))
    smooth = by_window(candidates, total, 5.0)
    for coupling in _COUPLINGS:
        apart = (candidates[:, None, None] - smooth).square_().div_(2 * coupling)
        fitting = candidates[apart.add_(misfit).argmin(0)]
        smooth = denoised(fitting, weight * coupling)
    return smooth


def denoised(image: Tensor, weight: float) -> Tensor:
    """Minimum of ``|u - image|^2 / 2 + weight TV(u)`` over u.

    Source: A. Chambolle, J. Math. Imaging Vis. 20 (2004), 89-97,
    doi:10.1023/B:JMIV.0000011325.36760.1e.
    """
    down, right = torch.zeros_like(image), torch.zeros_like(image)
    step = 0.24

    def divergence() -> Tensor:
        total = down + right
        total[1:] -= down[:-1]
        total[:, 1:] -= right[:, :-1]
        return total

    for _ in range(_DENOISING_STEPS):
        inner = divergence() - image / weight
        slope_down = F.pad(inner.diff(dim=0), (0, 0, 0, 1))
        slope_right = F.pad(inner.diff(dim=1), (0, 1))
        length = 1 + step * torch.hypot(slope_down, slope_right)
        down = (down + step * slope_down) / length
        right = (right + step * slope_right) / length
    return image - weight * divergence()


def errors(scene: Scene, methods: Mapping[str, Method]) -> dict[str, float]:
    """Mean error in frames of the methods and of all readings of the observer."""
    sample = scene.sample
    truth, frames = sample.depth_index()[0], sample.stack.shape[-3]
    known = sample.valid[0] & truth.isfinite()
    inner = torch.zeros_like(known)
    inner[BORDER_PX:-BORDER_PX, BORDER_PX:-BORDER_PX] = True
    counts = known & inner
    candidates, total = differences(scene)
    (single,) = split(sample)
    found = {name: method(single).depth for name, method in methods.items()}
    for width in WINDOWS_PX:
        found[f"window {width:g} px"] = by_window(candidates, total, width)
    for weight in WEIGHTS:
        found[f"smooth {weight:g}"] = by_total_variation(candidates, total, frames, weight)
    return {name: float((d - truth)[counts].abs().nanmean()) for name, d in found.items()}


def summary(rows: Sequence[dict[str, float]], network: str) -> dict[str, Any]:
    """Means over stacks, the best reading of each kind, and the better of it and the network."""
    means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    best = {
        kind: min((name for name in means if name.startswith(kind)), key=means.__getitem__)
        for kind in ("window", "smooth")
    }
    oracle = min(best.values(), key=means.__getitem__)
    better = sum(min(row[oracle], row[network]) for row in rows) / len(rows)
    return {"means": means, "best": best, "better": better}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--levels", nargs="+", choices=LEVELS, default=["easy", "weak", "noisy"])
    add("--network", default="gplws", help="name or weights file")
    add("--methods", nargs="+", default=["rr"], help="classical methods")
    add("--count", type=int, default=48, help="stacks of each level")
    add("--side", type=int, default=160, help="of simulated images, pixels")
    add("--frames", type=int, default=10)
    add("--surfaces", nargs="*", type=Path, default=[], help="files, folders")
    add("--textures", nargs="*", type=Path, default=[], help="files, folders")
    add("--out", type=Path, help="folder of the result; benchmarks/results")
    options = parser.parse_args()
    introduce()
    rows, table = [], []
    methods = {name: method_of(name) for name in [options.network, *options.methods]}
    drawn = (options.count, options.side, options.frames, options.surfaces, options.textures)
    with torch.inference_mode():
        for name in options.levels:
            bar = tqdm(scenes(LEVELS[name], *drawn), desc=name, total=options.count, unit="stack")
            stacks = [errors(scene, methods) for scene in bar]
            found = summary(stacks, options.network)
            rows.append({"level": name, **found, "stacks": stacks})
            means, best = found["means"], found["best"]
            table.append(
                [
                    name,
                    *(f"{means[method]:.3f}" for method in methods),
                    *(f"{means[of]:.3f} ({of})" for of in best.values()),
                    f"{found['better']:.3f}",
                ]
            )
    print("\nmean errors, frames")
    show(["level", *methods, "window", "smooth", "better"], table)
    content = {**drawn_from(options), "rows": rows}
    print(f"\n{save('oracle', content, options.out)}")


if __name__ == "__main__":
    main()
