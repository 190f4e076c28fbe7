"""Methods against data sets with known depth: figures, one table, JSON, pictures of the errors."""

from __future__ import annotations

import json
import math
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gplws._extension import __version__
from gplws.checkpoints import model_of_checkpoint
from gplws.classical import METHODS, depth_from_focus
from gplws.data.samples import DepthSample, collate
from gplws.data.transforms import split
from gplws.devices import usable_device
from gplws.io.writers import jsonable
from gplws.luminance import luminance
from gplws.metrics import (
    DepthMetrics,
    FrameMetrics,
    Sparsification,
    depth_metrics,
    focus_uncertainty,
    frame_metrics,
    mean_metrics,
    mean_of_known,
    sparsification,
)
from gplws.models.gplws_net import GPLWSNet
from gplws.models.peer import FocusVolumeNetwork
from gplws.models.prediction import predicted
from gplws.models.registry import load_model, load_weights, model_names
from gplws.ops.focus_search import focus_search
from gplws.training_config import require_distinct

_COLUMNS = (
    ("mae_frames", "mean"),
    ("median_frames", "median"),
    ("rmse_frames", "rmse"),
    ("bias_frames", "bias"),
    ("off_by_1", "> 1"),
    ("off_by_2", "> 2"),
)


# Pixels of one stack that count in the figures of all pixels of a data set: what bounds memory.
_POOLED_PIXELS = 2**15


class Estimate(NamedTuple):
    """What a method says about one stack, (H, W) each, on the CPU."""

    depth: Tensor  # unit of the sample; NaN where the method gives none
    valid: Tensor  # bool; where the method trusts its depth
    confidence: Tensor | None  # higher is better
    uncertainty: Tensor | None = None  # unit of the sample
    logits: Tensor | None = None  # (N, H, W) on any device: the focus volume, where there is one


Method = Callable[[DepthSample], Estimate]
"""Depth of one sample that is not batched."""


@dataclass(frozen=True)
class Result:
    """One method on one sample.

    Attributes:
        method: its name.
        dataset: name of the data set.
        sample: name of the sample.
        unit: of ``depth``.
        frames: errors in frames, over all pixels whose depth is known.
        trusted: the same over those that the method itself calls valid.
        depth: errors in ``unit``, as papers print them; ``seconds`` is the time of this one call.
        ause: area under the sparsification error of the confidence; NaN without confidence.
        rmse_left: RMSE without the least confident 20% of the pixels, as a share of that of all;
            NaN without confidence.
        least_rmse_left: the same without the 20% that are most wrong: no confidence does better.
    """

    method: str
    dataset: str
    sample: str
    unit: str
    frames: FrameMetrics
    trusted: FrameMetrics
    depth: DepthMetrics
    ause: float
    rmse_left: float
    least_rmse_left: float


@dataclass(frozen=True)
class Pooled:
    """How the confidence of one method orders all pixels of a data set, whatever their stack.

    Attributes:
        method: its name.
        dataset: name of the data set.
        ause: area under the sparsification error; NaN without confidence, as the others.
        rmse_left: RMSE in frames without the least confident 20%, as a share of that of all pixels.
        least_rmse_left: the same without the 20% that are most wrong.
    """

    method: str
    dataset: str
    ause: float
    rmse_left: float
    least_rmse_left: float


@dataclass(frozen=True)
class Evaluation:
    """All results, sample by sample, and what only all pixels of a data set together tell."""

    results: tuple[Result, ...]
    pooled: tuple[Pooled, ...] = ()

    def grouped(self) -> dict[tuple[str, str], list[Result]]:
        """The results of each data set and method, in the order of the samples."""
        groups: dict[tuple[str, str], list[Result]] = {}
        for result in self.results:
            groups.setdefault((result.dataset, result.method), []).append(result)
        return groups

    def means(self) -> list[Result]:
        """One result for each method and data set: means over the samples, NaN left out."""
        return [
            Result(
                method=method,
                dataset=dataset,
                sample=f"mean of {len(group)}",
                unit=group[0].unit,
                frames=mean_metrics([r.frames for r in group]),
                trusted=mean_metrics([r.trusted for r in group]),
                depth=mean_metrics([r.depth for r in group]),
                ause=mean_of_known([r.ause for r in group]),
                rmse_left=mean_of_known([r.rmse_left for r in group]),
                least_rmse_left=mean_of_known([r.least_rmse_left for r in group]),
            )
            for (dataset, method), group in self.grouped().items()
        ]

    def table(self) -> str:
        """The means as text; errors in frames, shares in percent."""
        head = ["data", "method", *(title for _, title in _COLUMNS)]
        head += ["found", "trusted", "mean there", "ause", "rmse -20%", "pooled -20%", "unc", "s"]
        rows = [head]
        pooled = {(of.dataset, of.method): of.rmse_left for of in self.pooled}
        for result, group in zip(self.means(), self.grouped().values(), strict=True):
            cells = [result.dataset, result.method]
            for name, _ in _COLUMNS:
                value = getattr(result.frames, name)
                cells.append(_percent(value) if name.startswith("off") else _number(value))
            share = mean_of_known([_trusted_share(r) for r in group])
            cells += [_percent(result.frames.coverage), _percent(share)]
            cells += [_number(result.trusted.mae_frames)]
            cells += [_number(result.ause), _percent(result.rmse_left)]
            cells += [_percent(pooled.get((result.dataset, result.method), math.nan))]
            uncertainty = result.depth.mean_uncertainty
            unit = "" if math.isnan(uncertainty) else f" {result.unit}"
            cells += [_number(uncertainty) + unit, _number(result.depth.seconds)]
            rows.append(cells)
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = []
        for row in rows:
            names = [cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False)]
            figures = [c.rjust(w) for c, w in zip(row[2:], widths[2:], strict=True)]
            lines.append("  ".join([*names, *figures]))
        lines.insert(1, "-" * len(lines[0]))
        return "\n".join(lines)

    def as_json(self) -> str:
        """Versions, means and all results; figures that do not exist are null."""
        content = {
            "versions": {"gplws": __version__, "torch": str(torch.__version__)},
            "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
            "means": self.means(),
            "pooled": self.pooled,
            "results": self.results,
        }
        return json.dumps(jsonable(content), indent=2, allow_nan=False)


def evaluate(
    methods: Mapping[str, Method | nn.Module | str | Path],
    datasets: Iterable[tuple[str, Iterable[DepthSample]]],
    *,
    device: str | torch.device = "cpu",
    pictures: str | Path | None = None,
    progress: bool = False,
) -> Evaluation:
    """Run every method on every sample of every data set.

    Args:
        methods: what :func:`method_of` takes, or functions of a sample, by the names for the table.
        datasets: names and samples, single or batched; samples are read one by one.
        device: where networks run.
        pictures: folder for one picture of truth, depth and error for each sample and method.
        progress: show on stderr what is done.

    Returns:
        All figures.

    Raises:
        ValueError: no methods, no data, a data set without samples (known before any work where
            it has a length), two of one name, or an unknown method.
        WeightsError: weights are missing or foreign; a ValueError.
    """
    from tqdm import tqdm

    if not methods:
        raise ValueError("methods: expected at least one")
    datasets = list(datasets)
    if not datasets:
        raise ValueError("datasets: expected at least one")
    require_distinct([name for name, _ in datasets], "datasets")
    ready = {name: _ready(method, device) for name, method in methods.items()}
    sizes = [len(samples) if isinstance(samples, Sized) else None for _, samples in datasets]
    for (name, _), size in zip(datasets, sizes, strict=True):
        if size == 0:
            raise ValueError(f"datasets: {name} has no samples")
    total = None if None in sizes else sum(size or 0 for size in sizes)
    results: list[Result] = []
    pixels: dict[tuple[str, str], _Pixels] = defaultdict(_Pixels)
    seen: dict[str, int] = {}
    with tqdm(desc="gplws evaluate", total=total, disable=not progress, unit="sample") as bar:
        for dataset, samples in datasets:
            seen[dataset] = 0
            for given in samples:
                for sample in split(given):
                    label = sample.name or f"{seen[dataset]}"
                    for name, method in ready.items():
                        bar.set_postfix_str(f"{dataset} {label} {name}", refresh=False)
                        begun = time.perf_counter()
                        estimate = method(sample)  # its result is on the CPU, so the work is done
                        seconds = time.perf_counter() - begun
                        result = _result(name, dataset, label, sample, estimate, seconds)
                        results.append(result)
                        pixels[dataset, name].add(sample, estimate)
                        if pictures is not None:
                            file = _file_name(f"{dataset}_{seen[dataset]:03d}_{label}_{name}.png")
                            save_error_picture(Path(pictures) / file, sample, estimate, result)
                    seen[dataset] += 1
                bar.update()
    for dataset, count in seen.items():
        if not count:
            raise ValueError(f"datasets: {dataset} has no samples")
    pooled = tuple(of.pooled(dataset, name) for (dataset, name), of in pixels.items())
    return Evaluation(tuple(results), pooled)


def method_of(which: nn.Module | str | Path, device: str | torch.device = "cpu") -> Method:
    """A method, ready to run.

    Args:
        which: name of a classical method or of a network whose weights ship, a weights file
            (``.safetensors``), a training checkpoint (``.pt``), or a network.
        device: where a network runs.

    Raises:
        ValueError: an unknown name, or a checkpoint that is missing or damaged.
        WeightsError: weights are missing, damaged or foreign; a ValueError.
    """
    if isinstance(which, nn.Module):
        return _network(which, device)
    name = str(which)
    if name.endswith(".safetensors"):
        return _network(load_weights(name), device)
    if name.endswith(".pt"):
        model: Any = model_of_checkpoint(name)
        return _network(model.fuse() if hasattr(model, "fuse") else model, device)
    if name in METHODS:
        return _classical(name)
    if name in model_names():
        return _network(load_model(name), device)
    known = ", ".join([*METHODS, *model_names(), "a .safetensors or .pt file"])
    raise ValueError(f"method must be one of {known}; got {name!r}")


def save_error_picture(path: Path, sample: DepthSample, estimate: Estimate, result: Result) -> None:
    """Truth, depth and absolute error of one sample side by side, as PNG.

    Truth and depth share their colours; errors are shown from 0 to 2 frames. Unknown is white.

    Args:
        path: the file; its folder is made where it is missing.
        sample: not batched.
        estimate: what the method said.
        result: its figures, for the title.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    truth = sample.depth_index()
    truth = torch.where(sample.valid, truth, torch.nan)
    found = replace(sample, depth=_within(estimate.depth, sample)).depth_index()
    error = (found - truth).abs()
    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    frames = sample.stack.shape[-3]
    panels = (
        ("true depth", truth, "viridis", frames - 1),
        (result.method, found, "viridis", frames - 1),
        ("absolute error", error, "magma", 2),
    )
    for axes, (title, image, colours, top) in zip(
        figure.subplots(1, len(panels)), panels, strict=True
    ):
        shown = axes.imshow(image.numpy(), cmap=colours, vmin=0, vmax=top)
        axes.set_title(title)
        axes.set_axis_off()
        figure.colorbar(shown, ax=axes, shrink=0.8, label="frames")
    figure.suptitle(
        f"{result.dataset} {result.sample}: mean error {result.frames.mae_frames:.3f} frames, "
        f"{100 * result.frames.off_by_1:.1f}% off by more than 1"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def _ready(method: Method | nn.Module | str | Path, device: str | torch.device) -> Method:
    if isinstance(method, nn.Module | str | Path):
        return method_of(method, device)
    return method


def _classical(name: str) -> Method:
    def run(sample: DepthSample) -> Estimate:
        found = depth_from_focus(luminance(sample.stack)[0], sample.focus_positions, method=name)
        return Estimate(found.depth, found.valid, found.confidence)

    return run


def _network(model: nn.Module, device: str | torch.device) -> Method:
    place = usable_device(device)
    model = model.to(place).eval()

    @torch.inference_mode()
    def run(sample: DepthSample) -> Estimate:
        batch = collate([sample]).to(place)
        stack = batch.stack
        if getattr(model, "in_channels", stack.shape[1]) < stack.shape[1]:
            stack = luminance(stack)
        found, logits = _found_and_logits(model, replace(batch, stack=stack))
        depth = found.depth[0].float().cpu()
        valid = depth.isfinite()
        if isinstance(model, GPLWSNet):
            valid = model.valid(found, stack.shape[2])[0].cpu()
        said = getattr(found, "confidence", None)
        confidence = None if said is None else said[0].float().cpu()
        return Estimate(depth, valid, confidence, logits=logits)

    return run


def _found_and_logits(model: nn.Module, batch: DepthSample) -> tuple[Any, Tensor | None]:
    """What a network says, and the focus volume of all frames behind it, where there is one."""
    if isinstance(model, FocusVolumeNetwork):
        volume = model.focus_volume(batch.stack).float()
        return focus_search(volume, batch.focus_positions, log_scale=True), volume[0]
    outputs: list[Any] = []
    watched = model.register_forward_hook(lambda module, given, output: outputs.append(output))
    try:
        found = predicted(model, batch.stack, batch.focus_positions)
    finally:
        watched.remove()
    volumes = [one for one in outputs if isinstance(one, Tensor)]
    frames = batch.stack.shape[2]
    fitting = [volume[0] for volume in volumes if volume.dim() == 4 and volume.shape[1] == frames]
    return found, fitting[-1] if fitting else None


class _Pixels:
    """Errors and confidence of one method on the pixels of a data set."""

    def __init__(self) -> None:
        self._errors: list[Tensor] = []  # frames
        self._confidence: list[Tensor] = []

    def add(self, sample: DepthSample, estimate: Estimate) -> None:
        if estimate.confidence is None:
            return
        truth = sample.depth_index()
        found = replace(sample, depth=_within(estimate.depth, sample)).depth_index()
        known = sample.valid & truth.isfinite()
        errors = (found - truth)[known]
        step = max(1, math.ceil(len(errors) / _POOLED_PIXELS))
        self._errors.append(errors[::step].float())
        self._confidence.append(estimate.confidence[known][::step].float())

    def pooled(self, dataset: str, method: str) -> Pooled:
        if not self._errors:
            return Pooled(method, dataset, math.nan, math.nan, math.nan)
        errors, confidence = torch.cat(self._errors)[None], torch.cat(self._confidence)[None]
        found = sparsification(errors, torch.zeros_like(errors), confidence)
        return Pooled(method, dataset, found.ause, *_left(found))


def _left(found: Sparsification) -> tuple[float, float]:
    """RMSE without the least confident, and without the worst, 20%, as shares of that of all."""
    every = float(found.rmse[0])
    if not every > 0:
        return math.nan, math.nan
    return found.rmse_after_20_percent / every, found.oracle_rmse_after_20_percent / every


def _result(
    method: str,
    dataset: str,
    label: str,
    sample: DepthSample,
    estimate: Estimate,
    seconds: float,
) -> Result:
    # What lies beyond the focus positions cannot be found by any method.
    known = sample.valid & sample.depth_index().isfinite()
    given = (estimate.depth, sample.depth, sample.focus_positions)
    uncertainty = estimate.uncertainty
    if uncertainty is None and estimate.logits is not None:
        probabilities = estimate.logits.float().softmax(0)[None]
        uncertainty = focus_uncertainty(probabilities, sample.focus_positions)[0].cpu()
    ause = rmse_left = least_rmse_left = math.nan
    if estimate.confidence is not None:
        found = sparsification(estimate.depth, sample.depth, estimate.confidence, known)
        ause = found.ause
        rmse_left, least_rmse_left = _left(found)
    return Result(
        method=method,
        dataset=dataset,
        sample=label,
        unit=sample.unit,
        frames=frame_metrics(*given, known, unit=sample.unit),
        trusted=frame_metrics(*given, known & estimate.valid, unit=sample.unit),
        depth=depth_metrics(
            estimate.depth,
            sample.depth,
            known,
            uncertainty=uncertainty,
            seconds=seconds,
        ),
        ause=ause,
        rmse_left=rmse_left,
        least_rmse_left=least_rmse_left,
    )


def _trusted_share(result: Result) -> float:
    """Share of the pixels of known depth that the method gives a depth for and calls valid."""
    coverage = result.frames.coverage
    if not coverage > 0:
        return coverage  # 0, or NaN where no depth is known
    return result.trusted.pixels / result.frames.pixels * coverage


def _within(depth: Tensor, sample: DepthSample) -> Tensor:
    positions = sample.focus_positions
    return depth.clamp(positions.min(), positions.max())


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}%"


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in text)
