"""Configuration of a training run, the presets that ship, and the data that a configuration names.

The dataclasses are what ``gplws train`` takes as options and as YAML. Batches come from sources
that are named by the import path of what makes them, so that a run can use any generator or data
set.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from gplws.data.samples import DepthSample, collate
from gplws.data.sources import (
    DatasetSource,
    GeneratorSource,
    MixedSource,
    Source,
    WorkerKind,
    seed_of,
)
from gplws.data.transforms import Augmentation
from gplws.losses import FocusLoss

_PRESETS = Path(__file__).with_name("presets")

Validation = Sequence[tuple[str, Sequence[DepthSample]]]
"""Names of sets, and their batched samples."""


@dataclass(frozen=True)
class ModelConfig:
    """The network.

    Attributes:
        name: one of :func:`gplws.models.model_names`.
        arguments: of its constructor.
        weights: safetensors file to start from; default: random weights. A run that goes on from
            a checkpoint does not read it again.
        head_gain: first weight of the batch norm that ends a GPLWSNet, so that the softmax over the
            frames is neither flat nor hard at the start; None: 1, as torch has it. Does not apply
            with ``weights``.

    Raises:
        ValueError: ``head_gain`` is not positive.
    """

    name: str = "gplws"
    arguments: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    head_gain: float | None = 3.5

    def __post_init__(self) -> None:
        _check_positive("model", self, "head_gain")


@dataclass(frozen=True)
class SourceConfig:
    """One source of samples.

    Attributes:
        factory: "package.module:name" of what is called with ``arguments``. It returns a generator
            (with a method ``batch``), a data set (with a length and indices) or a sequence of them,
            or a source (a function of the step); see :mod:`gplws.data.sources`.
        arguments: of the factory; ``{factory: ..., arguments: {...}}`` as a value is called as
            well, and its result is the argument. A generator that takes a ``seed`` and is given
            none gets one that depends on the run's seed and on its place among the sources.
        weight: share of the steps that use it.
        name: in messages and tables; default: the name of the factory, numbered where several
            sources have it.
        count: for validation: how many batches of a source or generator, or samples of a data set,
            are used; None: all samples of a data set, 8 batches of anything else.

    Raises:
        ValueError: ``weight`` is not positive, or ``count`` is below 1.
    """

    factory: str
    arguments: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    name: str | None = None
    count: int | None = None

    def __post_init__(self) -> None:
        _check_positive(self.factory, self, "weight")
        _check_least(self.factory, self, count=1)


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from.

    Attributes:
        sources: what is trained on.
        validation: what the error is measured on; fixed, never augmented.
        batch_size: samples per step and process.
        frames: (least, most) frames of a stack.
        crop: side of the images, pixels.
        workers: threads or processes that make batches ahead; 0: none.
        worker_kind: "thread" or "process".
        ahead: batches made ahead.
        steps_per_epoch: for sources that know no epochs; with several processes each takes a batch
            in every step.

    Raises:
        ValueError: a value is out of range.
    """

    sources: list[SourceConfig] = field(default_factory=list)
    validation: list[SourceConfig] = field(default_factory=list)
    batch_size: int = 4
    frames: tuple[int, int] = (10, 10)
    crop: int = 96
    workers: int = 1
    worker_kind: WorkerKind = "thread"
    ahead: int = 4
    steps_per_epoch: int | None = None

    def __post_init__(self) -> None:
        _check_choices("data", self)
        _check_least("data", self, batch_size=1, crop=1, workers=0, ahead=1, steps_per_epoch=1)
        least, most = self.frames
        if not 2 <= least <= most:
            raise ValueError(
                f"data.frames must be (least, most), least at least 2, got {self.frames}"
            )


@dataclass(frozen=True)
class OptimiserConfig:
    """How weights move.

    Attributes:
        kind: "adamw" or "adam".
        learning_rate: its peak.
        betas: decay of the averages of gradient and squared gradient.
        weight_decay: of conv weights; biases and batch norms go without.
        clip: largest norm of the gradient over all weights; None: no limit.
        average_decay: decay of the moving average of the weights, which is what is validated and
            exported; 0: no average. It starts lower, ``(1 + step) / (10 + step)``.

    Raises:
        ValueError: a value is out of range.
    """

    kind: Literal["adamw", "adam"] = "adamw"
    learning_rate: float = 2.5e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    clip: float | None = 5.0
    average_decay: float = 0.999

    def __post_init__(self) -> None:
        _check_choices("optimiser", self)
        _check_positive("optimiser", self, "clip")
        _check_least("optimiser", self, learning_rate=0, weight_decay=0)
        _check_shares("optimiser", self, "average_decay")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimiser.betas must be in 0..1, below 1, got {self.betas}")


@dataclass(frozen=True)
class ScheduleConfig:
    """How long, and how the learning rate goes.

    Attributes:
        steps: steps of the whole run.
        epochs: the same in epochs; exclusive with ``steps``. Several processes share the batches of
            an epoch.
        max_minutes: time budget. With ``follow_time`` of the whole run, earlier parts included;
            else of this part: it ends there with a checkpoint, and ``resume`` goes on.
        follow_time: the schedule goes by the share of ``max_minutes`` (or of the steps, where that
            is larger), so that the learning rate is down when the time is over.
        shape: "cosine" or "constant", after the warm-up.
        warm_up: share of the run over which the learning rate rises from 4% to its peak.
        final: share of the peak that a cosine ends at.
        freeze_after: share of the run after which batch norms keep their statistics and blocks run
            merged (see :func:`gplws.nn.freeze_statistics`), on the CPU on the kernels in float32:
            several times faster steps; None: never.

    Raises:
        ValueError: a value is out of range.
    """

    steps: int | None = 20_000
    epochs: int | None = None
    max_minutes: float | None = None
    follow_time: bool = False
    shape: Literal["cosine", "constant"] = "cosine"
    warm_up: float = 0.03
    final: float = 0.0
    freeze_after: float | None = None

    def __post_init__(self) -> None:
        _check_choices("schedule", self)
        _check_least("schedule", self, steps=0, epochs=0)
        _check_positive("schedule", self, "max_minutes")
        _check_shares("schedule", self, "warm_up", "final", "freeze_after")

    def factor(self, progress: float) -> float:
        """Share of the peak learning rate at ``progress`` (0..1) of the run."""
        progress = min(max(progress, 0.0), 1.0)
        if progress < self.warm_up:
            return 0.04 + 0.96 * progress / self.warm_up
        if self.shape == "constant" or self.warm_up == 1:
            return 1.0
        down = (progress - self.warm_up) / (1 - self.warm_up)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * down))


@dataclass(frozen=True)
class PrecisionConfig:
    """How the network is computed; weights and loss are always float32.

    Attributes:
        dtype: "float32", or "bfloat16" by autocast.
        channels_last: convs in the memory order of channels_last_3d, where they are stock ops.
        kernels: blocks of :mod:`gplws.nn` train on the kernels where these are faster: on the CPU
            in float32 (see :func:`gplws.nn.train_on_kernels`).
        compile: torch.compile: "off", "static" (once for each shape) or "dynamic".
        compile_backend: of torch.compile.

    Raises:
        ValueError: an unknown ``dtype`` or ``compile``.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    channels_last: bool = True
    kernels: bool = True
    compile: Literal["off", "static", "dynamic"] = "off"
    compile_backend: str = "inductor"

    def __post_init__(self) -> None:
        _check_choices("precision", self)


@dataclass(frozen=True)
class CheckpointConfig:
    """How often things are written.

    Attributes:
        every_minutes: between checkpoints.
        every_steps: between checkpoints, as well; None: by time only.
        log_steps: between lines of the log.
        validate_steps: between validations; there is one at the end as well, also when the time is
            over, but not when a signal ends the run.

    Raises:
        ValueError: a value is out of range.
    """

    every_minutes: float = 5.0
    every_steps: int | None = None
    log_steps: int = 20
    validate_steps: int = 500

    def __post_init__(self) -> None:
        least = {"every_minutes": 0, "every_steps": 1, "log_steps": 1, "validate_steps": 1}
        _check_least("checkpoints", self, **least)


@dataclass(frozen=True)
class TrainingConfig:
    """All of a training run.

    Attributes:
        model: the network.
        data: what it learns from.
        augmentation: random changes of the batches.
        loss: what it minimises.
        optimiser: how weights move.
        schedule: how long.
        precision: how the network is computed.
        checkpoints: how often things are written.
        seed: of weights, of augmentation, and of data whose sources are given no seed of their own.

    Raises:
        ValueError: ``seed`` is negative.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augmentation: Augmentation = field(default_factory=Augmentation)
    loss: FocusLoss = field(default_factory=FocusLoss)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")


def _check_choices(section: str, config: object) -> None:
    """Refuse values of which the type, a Literal, does not know."""
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(kind) is Literal and value not in get_args(kind):
            raise ValueError(f"{section}.{name} must be one of {get_args(kind)}, got {value!r}")


def _check_least(section: str, config: object, **least: float) -> None:
    """Refuse values below the least; None is no value."""
    for name, lowest in least.items():
        value = getattr(config, name)
        if value is not None and not value >= lowest:
            raise ValueError(f"{section}.{name} must be at least {lowest}, got {value}")


def _check_positive(section: str, config: object, name: str) -> None:
    value = getattr(config, name)
    if value is not None and not value > 0:
        raise ValueError(f"{section}.{name} must be positive, got {value}")


def _check_shares(section: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{section}.{name} must be in 0..1, got {value}")


def preset_names() -> tuple[str, ...]:
    """Configurations that ship with the package, for ``gplws train --config NAME``."""
    return tuple(sorted(path.stem for path in _PRESETS.glob("*.yaml")))


def preset_path(name: str) -> Path:
    """The YAML file of a preset.

    Raises:
        ValueError: there is no such preset.
    """
    if name not in preset_names():
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(preset_names())}")
    return _PRESETS / f"{name}.yaml"


def read_config(path: str | Path) -> TrainingConfig:
    """Configuration of a YAML file, as ``gplws train --config`` reads it; presets are such files.

    Args:
        path: what it leaves out is as in :class:`TrainingConfig`.

    Returns:
        The configuration.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has a key that no configuration has, or a value of another kind.

    Example:
        >>> read_config(preset_path("default")).schedule.steps
        20000
    """
    import yaml

    with open(path, encoding="utf-8") as file:
        return _configured(TrainingConfig, yaml.safe_load(file) or {}, "")


def plain(config: Any) -> Any:
    """Lists for tuples and text for paths, nested, as YAML, JSON and checkpoints have them."""
    if isinstance(config, dict):
        return {str(key): plain(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [plain(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def _configured(kind: Any, value: Any, key: str) -> Any:
    """``value``, as YAML has it, as an object of a type such as ``list[SourceConfig]``."""
    origin, inside = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _made(kind, value, key)
    if origin is list and isinstance(value, list):
        return [_configured(inside[0], one, f"{key}[{i}]") for i, one in enumerate(value)]
    if origin is tuple and isinstance(value, list) and len(value) == len(inside):
        pairs = zip(inside, value, strict=True)
        return tuple(_configured(one, two, f"{key}[{i}]") for i, (one, two) in enumerate(pairs))
    if origin is Literal and value in inside:
        return value
    if origin is dict and isinstance(value, dict):
        return value
    if origin in (Union, UnionType):
        for one in inside:
            with contextlib.suppress(ValueError):
                return _configured(one, value, key)
    if kind is float and not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError):
            return float(value)  # YAML takes 2.5e-3 for a number, but 1e-3 for text
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise ValueError(f"{key}: expected {getattr(kind, '__name__', kind)}, got {value!r}")


def _made(kind: Any, values: Any, key: str) -> Any:
    """A dataclass from a mapping."""
    if not isinstance(values, dict):
        raise ValueError(f"{key or 'configuration'}: expected keys with values, got {values!r}")
    types = get_type_hints(kind)
    known = {one.name for one in fields(kind) if one.init}
    unknown = [name for name in values if name not in known]
    prefix = f"{key}." if key else ""
    if unknown:
        raise ValueError(f"unknown key {prefix}{unknown[0]}; known: {', '.join(sorted(known))}")
    return kind(
        **{name: _configured(types[name], one, prefix + name) for name, one in values.items()}
    )


def build_source(config: DataConfig, seed: int = 0) -> Source:
    """The source of batches that a configuration describes, before augmentation.

    Raises:
        ValueError: there are no sources, or one is empty or cannot be made.
    """
    if not config.sources:
        raise ValueError("data.sources: expected at least one source of samples")
    sources = []
    for number, entry in enumerate(config.sources):
        own = seed_of(seed, number)
        made = _make(entry, f"data.sources[{number}]", own)
        sources.append(_as_source(made, entry, config, own))
    if len(sources) == 1:
        return sources[0]
    return MixedSource(sources, [entry.weight for entry in config.sources], seed)


def build_validation(config: DataConfig, seed: int = 0) -> Validation:
    """The validation sets that a configuration describes, in memory.

    Raises:
        ValueError: a set is empty or cannot be made, or two have been given one name.
    """
    sets = []
    names = source_names(config.validation, "data.validation")
    for number, (name, entry) in enumerate(zip(names, config.validation, strict=True)):
        samples = list(samples_of(entry, config, seed_of(seed, 2**20 + number)))
        if not samples:
            raise ValueError(f"data.validation[{number}]: {entry.factory} has no samples")
        sets.append((name, samples))
    return sets


def source_names(entries: Sequence[SourceConfig], what: str = "sources") -> list[str]:
    """A name for each source: the one given, or that of its factory, numbered where it is shared.

    Raises:
        ValueError: a name is given twice; the message begins with ``what``.
    """
    require_distinct([entry.name for entry in entries if entry.name], what)
    wanted = [entry.name or entry.factory.rpartition(":")[2] for entry in entries]
    names: list[str] = []
    for entry, name in zip(entries, wanted, strict=True):
        if not entry.name and wanted.count(name) > 1:
            numbered = (f"{name}_{number}" for number in itertools.count(1))
            name = next(new for new in numbered if new not in (*wanted, *names))
        names.append(name)
    return names


def require_distinct(names: Sequence[str], what: str) -> None:
    """Refuse names of which two are the same: the figures of one would replace the other's.

    Raises:
        ValueError: it says ``what``, and names the name.
    """
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{what}: several have the name {name!r}")


@dataclass(frozen=True)
class FixedSamples:
    """Batched samples that are made one by one as they are asked for.

    Attributes:
        count: how many.
        make: the sample of a number from 0 on.
    """

    count: int
    make: Callable[[int], DepthSample]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[DepthSample]:
        return map(self.make, range(self.count))


def samples_of(entry: SourceConfig, config: DataConfig, seed: int = 0) -> FixedSamples:
    """Fixed samples of one source.

    Args:
        entry: which source, and how many samples of a data set or batches of anything else.
        config: size of batches of a generator.
        seed: of what is drawn.

    Raises:
        ValueError: the source cannot be made.
    """
    made = _make(entry, entry.name or "data", seed)
    if _is_dataset(made):
        count = len(made) if entry.count is None else min(entry.count, len(made))
        return FixedSamples(count, lambda index: _batched(made[index]))
    source = _as_source(made, entry, config, seed)
    return FixedSamples(8 if entry.count is None else entry.count, source)


def _make(entry: SourceConfig, what: str, seed: int) -> Any:
    """Call the factory of a source."""
    try:
        return _called(entry.factory, entry.arguments, seed)
    except (ImportError, AttributeError, ValueError, TypeError, OSError) as error:
        raise ValueError(f"{what}: {entry.factory} cannot be used: {error}") from error


def _called(factory: str, arguments: dict[str, Any], seed: int | None = None) -> Any:
    """Call what ``factory`` names; arguments that are factories themselves are made first.

    A class of generators that takes a seed and is given none gets ``seed``.
    """
    module, colon, name = factory.partition(":")
    if not colon:
        raise ValueError(f"factory: expected package.module:name, got {factory!r}")
    called: Any = importlib.import_module(module)
    for part in name.split("."):
        called = getattr(called, part)
    values = {
        key: _called(value["factory"], value.get("arguments", {}))
        if isinstance(value, dict) and "factory" in value
        else value
        for key, value in arguments.items()
    }
    takes_seed = hasattr(called, "batch") and "seed" in inspect.signature(called).parameters
    if takes_seed and seed is not None:
        values.setdefault("seed", seed)
    return called(**values)


def _as_source(made: Any, entry: SourceConfig, config: DataConfig, seed: int) -> Source:
    shape: dict[str, Any] = {
        "batch_size": config.batch_size,
        "crop": config.crop,
        "frames": config.frames,
    }
    if hasattr(made, "batch"):
        return GeneratorSource(made, seed=seed, **shape)
    if isinstance(made, list | tuple) or _is_dataset(made):
        datasets = list(made) if isinstance(made, list | tuple) else [made]
        return DatasetSource(datasets, seed=seed, **shape)
    if callable(made):
        return made
    raise ValueError(
        f"{entry.factory} returned a {type(made).__name__}; expected something with batch(), a "
        f"data set, or a function of the step"
    )


def _is_dataset(made: Any) -> bool:
    return hasattr(made, "__getitem__") and hasattr(made, "__len__") and not callable(made)


def _batched(sample: DepthSample) -> DepthSample:
    return sample if sample.stack.dim() == 5 else replace(collate([sample]), name=sample.name)
