"""Networks trained with one budget and one recipe, and how their depth is read and measured.

A run lives in a folder of its own and goes on where it was stopped. Errors are measured in one unit
for all data: the share of the focus range, 0.1 at the first frame and 1 at the last, so that what
divides by the true depth makes sense as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.networks import NETWORKS, frames_of
from benchmarks.summary import FEATURES
from gplws.checkpoints import CHECKPOINT, load_checkpoint, model_of_checkpoint
from gplws.data import DepthSample, collate
from gplws.data.transforms import Augmentation, split
from gplws.evaluation import Estimate, Method
from gplws.losses import FocusLoss, LossKind, expected_index
from gplws.metrics import focus_uncertainty
from gplws.models.prediction import index_of, known_positions, network_output
from gplws.ops import focus_search
from gplws.training import TrainingResult, train
from gplws.training_config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimiserConfig,
    ScheduleConfig,
    SourceConfig,
    TrainingConfig,
    plain,
    preset_path,
    read_config,
)

Reading = Literal["expectation", "search"]
NEAREST, FARTHEST = 0.1, 1.0
"""Depth of the first and of the last frame, in the unit of the figures."""

UNIT = "share of the focus range"
FOLDER = Path("build") / "benchmarks"
"""Where checkpoints go; git ignores it."""


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; the same for all that are compared.

    Attributes:
        steps: steps of the run; None: by ``minutes``.
        minutes: time for the run, in place of ``steps``.
        loss: see :class:`gplws.losses.FocusLoss`; what regresses depth has the depth terms only.
        learning_rate: peak of the cosine.
        batch_size: stacks of a step.
        frames: of each stack.
        crop: side of the images, pixels.
        seed: of weights and data.
        generator: arguments of :class:`gplws.data.generator.StackGenerator`.

    Raises:
        ValueError: neither or both of ``steps`` and ``minutes``.
    """

    steps: int | None
    minutes: float | None = None
    loss: LossKind = "l1"
    learning_rate: float = 1e-3
    batch_size: int = 4
    frames: int = 10
    crop: int = 96
    seed: int = 0
    generator: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError(f"expected steps or minutes, got {self.steps} and {self.minutes}")

    def config(self, model: ModelConfig) -> TrainingConfig:
        """The configuration of a run for a network."""
        data = {"seed": self.seed, **self.generator}
        source = SourceConfig("gplws.data.generator:StackGenerator", data)
        # The generator draws light, noise and exposure itself.
        still = Augmentation.none()
        return TrainingConfig(
            model=model,
            data=DataConfig(
                sources=[source],
                batch_size=self.batch_size,
                frames=(self.frames, self.frames),
                crop=self.crop,
            ),
            augmentation=replace(still, rotate=True, flip=True),
            loss=FocusLoss(self.loss, window=None if self.loss == "l1" else 2),
            optimiser=OptimiserConfig("adam", self.learning_rate, weight_decay=0.0),
            schedule=ScheduleConfig(
                steps=self.steps,
                max_minutes=self.minutes,
                follow_time=self.minutes is not None,
            ),
            checkpoints=CheckpointConfig(every_minutes=2.0),
            seed=self.seed,
        )


def model_configs(frames: int) -> dict[str, ModelConfig]:
    """The networks that can be trained on stacks of ``frames``, by name."""
    configs = {}
    for name in NETWORKS:
        takes_frames = frames_of(name)
        configs[name] = ModelConfig(name, {takes_frames: frames} if takes_frames else {})
    return {**configs, FEATURES: read_config(preset_path("default")).model}


def train_network(
    recipe: Recipe,
    folder: Path,
    model: ModelConfig,
    *,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train a network in a folder, or go on there; nothing is done where it has ended already.

    Args:
        recipe: how.
        folder: of this run; it may be used again with the same recipe only.
        model: which network.
        device: where it is trained.

    Returns:
        ``steps`` done and ``minutes`` taken.

    Raises:
        SystemExit: the folder holds a run with another recipe, or the run was interrupted.
    """
    config = recipe.config(model)
    path = folder / CHECKPOINT
    resume = path.is_file()
    if resume:
        state = load_checkpoint(path)
        if state["config"] != plain(asdict(config)):
            raise SystemExit(f"{folder} holds a run with another recipe: give another folder")
        if _has_ended(recipe, state):
            return _spent(state)
    result: TrainingResult = train(config, folder, resume=resume, device=device, progress=True)
    if result.reason == "interrupted":
        raise SystemExit(f"interrupted after {result.step} steps; the same command goes on")
    return _spent(load_checkpoint(path))


def trained_network(folder: Path) -> nn.Module:
    """The network of a run, ready to measure: moving average, on the kernels where it has them."""
    model = model_of_checkpoint(folder / CHECKPOINT)
    fuse: Any = getattr(model, "fuse", None)
    return model if fuse is None else fuse()


def in_focus_range(samples: Iterable[DepthSample]) -> Iterator[DepthSample]:
    """Single samples with depth and focus positions as share of the focus range, see above."""
    for sample in samples:
        for single in split(sample):
            frames = single.stack.shape[1]
            yield replace(
                single,
                depth=_share(single.depth_index(), frames),
                focus_positions=torch.linspace(NEAREST, FARTHEST, frames),
                unit=UNIT,
            )


def method_of_network(
    model: nn.Module, reading: Reading = "expectation", device: str = "cpu"
) -> Method:
    """How a network measures a sample of :func:`in_focus_range`.

    Args:
        model: a network of the package, in eval mode.
        reading: of a focus volume: "expectation" over the frames, as it was trained, or "search",
            as ``predict`` does. Depth that a network regresses is taken as it is.
        device: where the network runs.

    Returns:
        A function of the sample. Uncertainty is the standard deviation of the depth under the
        softmax over the frames, and what regresses depth has none.
    """
    model = model.to(device).eval()

    @torch.inference_mode()
    def run(sample: DepthSample) -> Estimate:
        frames = sample.stack.shape[1]
        batch = collate([sample])
        # As in training, where positions are frame numbers.
        batch = replace(batch, focus_positions=torch.arange(float(frames))[None]).to(device)
        positions = known_positions(model, batch.focus_positions)
        output = network_output(model, batch.stack, positions)
        volume = output if isinstance(output, Tensor) else getattr(output, "volume", None)
        if reading == "search" and volume is not None:
            found = focus_search(volume.float().contiguous(), log_scale=True)
            index = index_of(found.depth, batch.focus_positions)
        elif isinstance(output, Tensor):
            index = expected_index(output.float())
        else:
            index = index_of(output.depth.float(), positions)
        depth = _share(index[0].clamp(0, frames - 1), frames).cpu()
        if volume is None:
            return Estimate(depth, depth.isfinite(), None)
        deviation = focus_uncertainty(volume.float().softmax(1), batch.focus_positions)[0]
        uncertainty = deviation.cpu() * (FARTHEST - NEAREST) / (frames - 1)
        return Estimate(depth, depth.isfinite(), -uncertainty, uncertainty)

    return run


def _share(index: Tensor, frames: int) -> Tensor:
    """Frame numbers as share of the focus range."""
    return NEAREST + (FARTHEST - NEAREST) / max(frames - 1, 1) * index


def _has_ended(recipe: Recipe, state: dict[str, Any]) -> bool:
    if recipe.steps is not None:
        return state["step"] >= recipe.steps
    assert recipe.minutes is not None
    return state["seconds"] >= 60 * recipe.minutes


def _spent(state: dict[str, Any]) -> dict[str, Any]:
    return {"steps": state["step"], "minutes": state["seconds"] / 60}
