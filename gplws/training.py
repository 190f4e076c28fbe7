"""Training of depth-from-focus networks: the loop, its checkpoints and its log.

A run lives in one folder: ``config.yaml`` (what was asked for), ``log.jsonl`` (what happened, one
JSON object a line) and ``checkpoint.pt`` (all that is needed to go on). On the CPU a run that stops
and goes on gives the same weights, bit for bit, as one that does not stop: batches depend on the
step alone, and all else is in the checkpoint.
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
import math
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, distributed, nn

from gplws.checkpoints import (
    CHECKPOINT,
    CheckpointError,
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from gplws.data.samples import DepthSample
from gplws.data.sources import AugmentedSource, Prefetcher, Source, seed_of
from gplws.devices import usable_device
from gplws.files import new_file
from gplws.io.writers import jsonable
from gplws.losses import FocusLoss, LossTerms
from gplws.models import GPLWSNet
from gplws.models.prediction import (
    index_of,
    known_positions,
    network_output,
    predicted_index,
)
from gplws.models.registry import build_model, load_model
from gplws.nn.blocks import freeze_statistics, train_on_kernels
from gplws.training_config import (
    ModelConfig,
    OptimiserConfig,
    PrecisionConfig,
    TrainingConfig,
    Validation,
    build_source,
    build_validation,
    plain,
    require_distinct,
)

_logger = logging.getLogger(__name__)

LOG = "log.jsonl"
_LOGGED_EVERY_S = 30.0  # progress, where it goes to a file


class TrainingResult(NamedTuple):
    """How a run ended."""

    step: int  # steps done, those before a resume included
    reason: Literal["done", "out of time", "interrupted"]
    validation: dict[str, float]  # mean absolute error of each set, frames
    checkpoint: Path


def train(
    config: TrainingConfig,
    out: str | Path,
    *,
    resume: bool = False,
    device: str | torch.device = "auto",
    progress: bool = False,
    model: nn.Module | None = None,
    source: Source | None = None,
    validation: Validation | None = None,
) -> TrainingResult:
    """Train a network, or go on with a run.

    Under ``torchrun`` each process trains on its own batches, and gradients are averaged so that
    the result is that of one process with all the batches (batch norms see their own batch only).
    SIGTERM and Ctrl-C end the run after the current step, with a checkpoint. Seeds the global
    random number generators.

    Args:
        config: see :class:`TrainingConfig`.
        out: folder of the run; made where it is missing.
        resume: go on from the checkpoint in ``out``; without it a folder with one is refused.
        device: "auto" (a GPU where there is one) or any torch device; under torchrun the GPU of
            each process.
        progress: show a progress bar on stderr.
        model: the network to train, in place of ``config.model``.
        source: what to train on, in place of ``config.data.sources``: batches by step.
        validation: in place of ``config.data.validation``: names and batched samples.

    Returns:
        How it ended.

    Raises:
        ValueError: the configuration does not fit together, or there are no data.
        FileExistsError: ``out`` has a checkpoint and ``resume`` is False.
        CheckpointError: the checkpoint is missing, damaged, or of another network; a ValueError.
        WeightsError: ``config.model.weights`` is missing or foreign; a ValueError. Not with
            ``resume``, which does not read it.
        FloatingPointError: the loss or its gradient is not finite; the last checkpoint stays.
    """
    folder = Path(out)
    path = folder / CHECKPOINT
    if path.exists() and not resume:
        raise FileExistsError(f"{path} exists: pass resume=True (--resume) to go on with it")
    state = load_checkpoint(path) if resume else None
    with _Processes() as processes:
        place = processes.device(device)
        _seed_everything(config.seed)
        if model is None:
            model = _fresh_model(config.model) if state is None else _model_of(state, config.model)
        if source is None:
            source = build_source(config.data, config.seed)
        if validation is None:
            validation = build_validation(config.data, config.seed)
        require_distinct([name for name, _ in validation], "validation")
        run = _Run(config, folder, model, source, validation, place, processes, progress)
        if state is not None:
            run.restore(state, path)
        return run.to_the_end()


class _Batch(NamedTuple):
    """What a step needs, made ahead by a worker."""

    stack: Tensor  # (B, C, N, H, W)
    focus_positions: Tensor  # (B, N)
    depth_index: Tensor  # (B, H, W) frames, NaN where unknown
    valid: Tensor  # (B, H, W), False where depth_index is NaN

    def to(self, device: torch.device) -> _Batch:
        if device.type != "cuda":
            return _Batch(*(tensor.to(device) for tensor in self))
        return _Batch(*(tensor.pin_memory().to(device, non_blocking=True) for tensor in self))


class _BatchSource:
    """Batches of a source, augmented, with their target; by step. A class, so that it pickles."""

    def __init__(self, source: Source, config: TrainingConfig) -> None:
        # Sources have seeds of two numbers, so this one is the seed of none of them.
        seed = seed_of(config.seed, 0, 1)
        self._source = AugmentedSource(source, config.augmentation, seed)

    def __call__(self, step: int) -> _Batch:
        sample = self._source(step)
        if sample.stack.dim() != 5:
            raise ValueError(
                f"the source must return batches (B, C, N, H, W), got {tuple(sample.stack.shape)}"
            )
        target = sample.depth_index()
        return _Batch(
            sample.stack, sample.focus_positions, target, sample.valid & target.isfinite()
        )


class _Run:
    """The state of a run, and the loop."""

    def __init__(
        self,
        config: TrainingConfig,
        folder: Path,
        model: nn.Module,
        source: Source,
        validation: Validation,
        device: torch.device,
        processes: _Processes,
        progress: bool,
    ) -> None:
        self.config, self.folder, self.device, self.processes = config, folder, device, processes
        self.source, self.validation, self.progress = source, validation, progress
        self.steps = _total_steps(config, source, processes.world)
        self.model = model.to(device)
        self.trains_on_kernels = _put_on_kernels(self.model, config.precision, device)
        self.channels_last = config.precision.channels_last and not self.trains_on_kernels
        if device.type == "cpu" and config.precision.dtype == "bfloat16":
            # Gradients of two frames are wrong there: see gplws.ops.arguments.stock_backward.
            self.channels_last &= min(config.data.frames) > 2
        if self.channels_last:
            _channels_last(self.model)
        processes.agree(self.model)
        decay = config.optimiser.average_decay
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False) if decay else None
        self.optimiser = _optimiser(self.model, config.optimiser)
        if config.precision.compile != "off":
            self.model.compile(
                backend=config.precision.compile_backend,
                dynamic=config.precision.compile == "dynamic",
            )
        self.objective = _Objective(self.model, config.loss)
        # With several processes: the objective wrapped, once a batch is there to tell how.
        self.parallel: nn.Module | None = None
        self.step = 0
        self.frozen = False  # batch norms keep their statistics
        self.seconds_before = 0.0
        self.started = time.monotonic()
        self.errors: dict[str, float] = {}
        self.validated: int | None = None  # step of the errors
        self.waited = 0.0  # for data, since the last line of the log

    @property
    def seconds(self) -> float:
        """Time that the run took so far, earlier parts included."""
        return self.seconds_before + time.monotonic() - self.started

    def to_the_end(self) -> TrainingResult:
        config = self.config
        if self.processes.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write_config()
        with (
            _StopSignals() as signals,
            Prefetcher(
                _BatchSource(self.source, config),
                self._own_steps(),
                workers=config.data.workers,
                ahead=config.data.ahead,
                kind=config.data.worker_kind,
            ) as batches,
            _Log(self.folder / LOG, self.step, self.processes.first) as log,
            self._bar() as bar,
        ):
            reason = self._loop(batches, signals, log, bar)
            if reason != "interrupted" and self.validated != self.step:
                self._validate(log)
        if self.processes.first:
            self.save()
        return TrainingResult(self.step, reason, self.errors, self.folder / CHECKPOINT)

    def _own_steps(self) -> Iterator[int]:
        rank, world = self.processes.rank, self.processes.world
        if self.steps is None:
            return itertools.count(self.step * world + rank, world)
        return iter(range(self.step * world + rank, self.steps * world, world))

    def _loop(
        self, batches: Prefetcher[_Batch], signals: _StopSignals, log: _Log, bar: Any
    ) -> Literal["done", "out of time", "interrupted"]:
        config, schedule = self.config, self.config.schedule
        saved_at, saved_step = time.monotonic(), self.step
        while self.steps is None or self.step < self.steps:
            asked = time.monotonic()
            batch = next(batches)
            self.waited += time.monotonic() - asked
            # One exchange tells all processes the same, so that they stop at the same step.
            spent = self.seconds if schedule.follow_time else time.monotonic() - self.started
            count, stop, spent = self.processes.sum(
                [
                    float(batch.valid.sum()),
                    float(signals.received),
                    spent / self.processes.world,
                ]
            )
            share = 0.0
            if schedule.max_minutes is not None:
                share = spent / (60 * schedule.max_minutes)
            if stop:
                return "interrupted"
            if share >= 1:
                return "done" if schedule.follow_time else "out of time"
            progress = 0.0 if self.steps is None else self.step / self.steps
            if schedule.follow_time:
                progress = max(progress, share)
            if schedule.freeze_after is not None and progress >= schedule.freeze_after:
                self._freeze()
            rate = config.optimiser.learning_rate * schedule.factor(progress)
            loss, parts, norm = self._update(batch, count / self.processes.world, rate)
            self.step += 1
            bar.update()
            if self.step % config.checkpoints.log_steps == 0 or self.step == self.steps:
                shown = self._log_line(log, batch, loss, parts, norm, rate)
                bar.set_postfix({"loss": f"{shown:.4f}", **self._shown(share)}, False)
            if self.validation and self.step % config.checkpoints.validate_steps == 0:
                self._validate(log)
                bar.set_postfix({"loss": f"{float(loss):.4f}", **self._shown(share)}, False)
            every = config.checkpoints.every_steps
            due = every is not None and self.step - saved_step >= every
            due |= time.monotonic() - saved_at >= 60 * config.checkpoints.every_minutes
            if due and self.processes.first:
                self.save()
            if due:
                saved_at, saved_step = time.monotonic(), self.step
        return "done"

    def _update(
        self, batch: _Batch, count: float, rate: float
    ) -> tuple[Tensor, dict[str, Tensor], float]:
        """One step; ``count`` valid pixels are what sums are divided by."""
        config = self.config
        batch = batch.to(self.device)
        self.model.train()
        if self.frozen:  # train() has undone it
            freeze_statistics(self.model)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        stack = batch.stack
        if self.channels_last and not self._on_kernels:
            stack = stack.contiguous(memory_format=torch.channels_last_3d)
        positions = known_positions(self.model, batch.focus_positions)
        seen = (stack, positions, batch.depth_index, batch.valid, count, self._autocast())
        terms = self._averaging_objective(*seen)(*seen)
        self.optimiser.zero_grad(set_to_none=True)
        terms.total.backward()
        clip = math.inf if config.optimiser.clip is None else config.optimiser.clip
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), clip))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient is not finite at step {self.step} (loss {terms.total.item():g}); "
                f"the last checkpoint in {self.folder} is unchanged"
            )
        self.optimiser.step()
        if self.average is not None:
            decay = min(config.optimiser.average_decay, (1 + self.step) / (10 + self.step))
            _follow(self.average, self.model, decay)
        return terms.total.detach(), terms.parts, norm

    def _averaging_objective(self, *seen: Any) -> nn.Module:
        """The objective; with several processes its gradient is their average."""
        if self.processes.world == 1:
            return self.objective
        if self.parallel is None:
            ids = [self.device.index] if self.device.type == "cuda" else None
            (misses,) = self.processes.sum([float(self._misses_some(*seen))])
            self.parallel = nn.parallel.DistributedDataParallel(
                self.objective,
                device_ids=ids,
                # Looking for parameters without a gradient takes time in each step, but must be
                # where there are any. All processes look, or none does.
                find_unused_parameters=misses > 0,
            )
        return self.parallel

    def _misses_some(self, *seen: Any) -> bool:
        """Whether the loss of a batch does not reach all parameters."""
        # Neither statistics of batch norms nor random numbers are to count this batch twice.
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            loss = self.objective(*seen).total
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        return any(gradient is None for gradient in gradients)

    def _freeze(self) -> None:
        """Batch norms keep their statistics from here on: the averaged ones, where there are."""
        if self.frozen:
            return
        self.frozen = True
        if self.average is not None:
            freeze_statistics(self.average)
            averaged = dict(self.average.named_buffers())
            for name, buffer in self.model.named_buffers():
                buffer.copy_(averaged[name])

    @property
    def _on_kernels(self) -> bool:
        return self.trains_on_kernels or (self.frozen and self.device.type == "cpu")

    def _autocast(self) -> AbstractContextManager[object]:
        if self.config.precision.dtype == "float32" or self._on_kernels:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _log_line(
        self,
        log: _Log,
        batch: _Batch,
        loss: Tensor,
        parts: dict[str, Tensor],
        norm: float,
        rate: float,
    ) -> float:
        world = self.processes.world
        names = ["loss", *parts]
        values = self.processes.sum([float(v) / world for v in (loss, *parts.values())])
        log.write(
            {
                "step": self.step,
                **dict(zip(names, values, strict=True)),
                "gradient_norm": norm,
                "learning_rate": rate,
                "seconds": round(self.seconds, 3),
                "waited_for_data": round(self.waited, 3),
                "shape": list(batch.stack.shape),
            }
        )
        self.waited = 0.0
        return values[0]

    @torch.no_grad()
    def _validate(self, log: _Log) -> None:
        if not self.validation:
            return
        begun = time.monotonic()
        model = self.model if self.average is None else self.average
        model.eval()
        rank, world = self.processes.rank, self.processes.world
        self.processes.agree(model)

        def predict(sample: DepthSample) -> Tensor:
            with self._autocast():
                seen = sample.to(self.device)
                return predicted_index(model, seen.stack, seen.focus_positions).cpu()

        self.errors, self.validated = {}, self.step
        for name, samples in self.validation:
            total, count = self.processes.sum([*error_sum(predict, samples[rank::world])])
            self.errors[name] = total / count if count else math.nan
        mean = sum(self.errors.values()) / len(self.errors)
        log.write(
            {
                "step": self.step,
                "validation": dict(self.errors),
                "mean": mean,
                "seconds": round(self.seconds, 3),
                "validation_seconds": round(time.monotonic() - begun, 3),
            }
        )

    def _shown(self, share_of_time: float) -> dict[str, str]:
        """Errors, and how much of the time is over, for the progress bar."""
        shown = {name: f"{error:.3f}" for name, error in self.errors.items()}
        if self.config.schedule.max_minutes is not None:
            shown["time"] = f"{share_of_time:.0%}"
        return shown

    def _bar(self) -> Any:
        from tqdm import tqdm

        hidden = not (self.progress and self.processes.first)
        return tqdm(
            desc="gplws train",
            total=self.steps,
            initial=self.step,
            disable=hidden,
            file=sys.stderr,
            unit="step",
            dynamic_ncols=True,
            # Each update is a line of a log file.
            mininterval=0.1 if sys.stderr.isatty() else _LOGGED_EVERY_S,
        )

    def _write_config(self) -> None:
        import yaml

        with new_file(self.folder / "config.yaml", overwrite=True) as file:
            file.write(yaml.safe_dump(plain(asdict(self.config)), sort_keys=False).encode())

    def save(self) -> None:
        """Write the checkpoint of this moment."""
        save_checkpoint(
            self.folder / CHECKPOINT,
            {
                "step": self.step,
                "seconds": self.seconds,
                "model": {
                    "name": self.config.model.name,
                    "class": type(self.model).__name__,
                    "arguments": plain(getattr(self.model, "config", self.config.model.arguments)),
                },
                "config": plain(asdict(self.config)),
                "weights": self.model.state_dict(),
                "average": None if self.average is None else self.average.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "random": random_state(),
                "validation": dict(self.errors),
                "validated": self.validated,
                "torch": str(torch.__version__),
            },
        )

    def restore(self, state: dict[str, Any], path: Path) -> None:
        """Go back to the moment of a checkpoint.

        Raises:
            CheckpointError: it is of another network or another optimiser.
        """
        arguments = plain(getattr(self.model, "config", self.config.model.arguments))
        of = state["model"]
        if of["class"] != type(self.model).__name__ or of["arguments"] != arguments:
            raise CheckpointError(
                f"checkpoint: {path} is of {of['class']} with {of['arguments']}, "
                f"not of {type(self.model).__name__} with {arguments}"
            )
        kind = state["config"]["optimiser"]["kind"]
        if kind != self.config.optimiser.kind or (state["average"] is None) != (
            self.average is None
        ):
            raise CheckpointError(
                f"checkpoint: {path} was trained with optimiser.kind {kind!r} and "
                f"{'no' if state['average'] is None else 'an'} average of the weights; "
                f"the configuration asks for another"
            )
        try:
            self.model.load_state_dict(state["weights"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            settings = [
                {k: v for k, v in group.items() if k != "params"}
                for group in self.optimiser.param_groups
            ]
            self.optimiser.load_state_dict(state["optimiser"])
            # The state is that of the checkpoint, the settings are those of the configuration.
            for group, setting in zip(self.optimiser.param_groups, settings, strict=True):
                group.update(setting)
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"checkpoint: {path} does not fit the network: {error}"
            ) from error
        self.step, self.seconds_before = state["step"], state["seconds"]
        self.errors = dict(state["validation"])
        self.validated = state.get("validated")  # older checkpoints do not say
        if self.processes.world == 1:
            restore_random_state(state["random"])
        else:
            _seed_everything(seed_of(self.config.seed, self.step, self.processes.rank))


class _Objective(nn.Module):
    """A network and its loss.

    As one module, since DistributedDataParallel takes all that reaches an output for used, and a
    network may have outputs that its loss ignores. It does not know the run: the circle would keep
    the wrapper alive beyond the group of processes.

    Args:
        model: the network.
        loss: of a focus volume or a depth.
    """

    def __init__(self, model: nn.Module, loss: FocusLoss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(
        self,
        stack: Tensor,
        positions: Tensor,
        depth_index: Tensor,
        valid: Tensor,
        count: float,
        autocast: AbstractContextManager[object],
    ) -> LossTerms:
        """Loss of a batch; ``count`` valid pixels are what sums are divided by.

        The network is computed within ``autocast``, the loss outside.
        """
        with autocast:
            output = network_output(self.model, stack, positions)
        if isinstance(output, Tensor):
            return self.loss(output.float(), depth_index, valid, count=count)
        depth = index_of(output.depth.float(), positions)
        return self.loss.of_depth(depth, depth_index, valid, count=count)


class _Processes:
    """This process among those that ``torchrun`` started; alone without it."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self._local = int(os.environ.get("LOCAL_RANK", "0"))
        self._group: distributed.ProcessGroup | None = None
        self._ours = False

    @property
    def first(self) -> bool:
        return self.rank == 0

    def __enter__(self) -> _Processes:
        if self.world > 1:
            if not distributed.is_initialized():
                cuda = torch.cuda.is_available() and distributed.is_nccl_available()
                distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
                self._ours = True
            # Small exchanges run on the CPU: they do not wait for the work of the GPU.
            self._group = distributed.new_group(backend="gloo")
        return self

    def __exit__(self, *error: object) -> None:
        if self._ours:
            distributed.destroy_process_group()

    def device(self, wanted: str | torch.device) -> torch.device:
        """The device of this process.

        Raises:
            ValueError: it cannot be used.
        """
        if str(wanted) == "auto":
            wanted = "cuda" if torch.cuda.is_available() else "cpu"
        if str(wanted) == "cuda":
            wanted = f"cuda:{self._local}"
        device = usable_device(wanted)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device

    def agree(self, model: nn.Module) -> None:
        """Give all processes the weights and statistics of the first."""
        if self.world > 1:
            for tensor in model.state_dict().values():
                distributed.broadcast(tensor, 0)

    def sum(self, values: list[float]) -> list[float]:
        """The sum of each value over all processes."""
        if self._group is None:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(tensor, group=self._group)
        return tensor.tolist()


class _StopSignals:
    """Turns SIGTERM and the first Ctrl-C into a flag; a second Ctrl-C interrupts as usual."""

    def __init__(self) -> None:
        self.received = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _StopSignals:
        # Only the main thread may set handlers; elsewhere the caller keeps its own.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
        _logger.warning("stopping after this step, with a checkpoint")


class _Log:
    """Lines of JSON; what a run wrote after the checkpoint it goes on from is dropped."""

    def __init__(self, path: Path, step: int, writes: bool) -> None:
        self._path, self._step, self._writes = path, step, writes

    def __enter__(self) -> _Log:
        if self._writes:
            kept = []
            if self._path.exists() and self._step:
                lines = self._path.read_text(encoding="utf-8").splitlines()
                kept = [line for line in lines if _step_of(line) <= self._step]
            with new_file(self._path, overwrite=True) as file:
                file.write("".join(line + "\n" for line in kept).encode())
            self._file = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *error: object) -> None:
        if self._writes:
            self._file.close()

    def write(self, entry: dict[str, Any]) -> None:
        if self._writes:
            self._file.write(json.dumps(jsonable(entry), allow_nan=False) + "\n")
            self._file.flush()


def _step_of(line: str) -> float:
    """Step of a line of the log; infinite for one that was cut off."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


@torch.no_grad()
def error_sum(
    predict: Callable[[DepthSample], Tensor], samples: Sequence[DepthSample]
) -> tuple[float, float]:
    """Sum of the absolute errors, frames, and number of pixels whose depth is known.

    Args:
        predict: batched sample -> (B, H, W) depth, frames; NaN counts as the largest error, N - 1.
        samples: batched.
    """
    total = count = 0.0
    for sample in samples:
        target = sample.depth_index()
        valid = sample.valid & target.isfinite()
        error = (predict(sample).to(target) - target).abs()
        error = error.nan_to_num(nan=sample.stack.shape[2] - 1.0)
        total += float(error[valid].double().sum())
        count += float(valid.sum())
    return total, count


def _put_on_kernels(model: nn.Module, precision: PrecisionConfig, device: torch.device) -> bool:
    """Let blocks train on the kernels where these are faster; whether there are any."""
    wanted = precision.kernels and precision.dtype == "float32" and device.type == "cpu"
    return wanted and train_on_kernels(model)


def _channels_last(model: nn.Module) -> None:
    """Weights of 3-D convs in that order; Module.to would refuse those of 2-D convs."""
    for weight in model.parameters():
        if weight.dim() == 5:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last_3d)


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the average towards the model; what is no float (counters) is copied."""
    pairs = zip(average.state_dict().values(), model.state_dict().values(), strict=True)
    for kept, new in pairs:
        if kept.is_floating_point():
            kept.lerp_(new, 1 - decay)
        else:
            kept.copy_(new)


def _optimiser(model: nn.Module, config: OptimiserConfig) -> torch.optim.Optimizer:
    weights = [p for p in model.parameters() if p.requires_grad]
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.kind]
    return kind(
        [
            {"params": [p for p in weights if p.dim() > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in weights if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=config.betas,
    )


def _total_steps(config: TrainingConfig, source: Source, world: int) -> int | None:
    """Steps of a run, None where only time ends it; in each, every process takes one batch."""
    schedule, data = config.schedule, config.data
    if schedule.steps is not None and schedule.epochs is not None:
        raise ValueError("schedule: give steps or epochs, not both")
    if schedule.follow_time and schedule.max_minutes is None:
        raise ValueError("schedule.follow_time needs schedule.max_minutes")
    if schedule.epochs is not None:
        if data.steps_per_epoch is not None:
            return schedule.epochs * data.steps_per_epoch
        if not hasattr(source, "__len__"):
            raise ValueError("schedule.epochs needs data.steps_per_epoch with this source")
        return math.ceil(schedule.epochs * len(source) / world)
    if schedule.steps is None and not schedule.follow_time:
        raise ValueError("schedule: give steps, epochs, or max_minutes with follow_time")
    return schedule.steps


def _fresh_model(config: ModelConfig) -> nn.Module:
    if config.weights is not None:
        model = load_model(config.name, weights=config.weights, fused=False)
        if config.arguments:
            wanted = _built(config)
            if wanted.config != model.config:
                raise ValueError(
                    f"model.weights: {config.weights} holds a network with {model.config}, "
                    f"model.arguments ask for {wanted.config}"
                )
        return model
    model = _built(config)
    if config.head_gain is not None and isinstance(model, GPLWSNet):
        nn.init.constant_(model.head.bn.weight, config.head_gain)
    return model


def _model_of(state: dict[str, Any], config: ModelConfig) -> nn.Module:
    """The network that goes on from a checkpoint, which has its weights; others are not read."""
    of = state["model"]
    if config.weights is not None and not config.arguments and config.name == of["name"]:
        config = replace(config, arguments=of["arguments"])  # those of the file of weights
    return _built(config)


def _built(config: ModelConfig) -> nn.Module:
    """The network with random weights."""
    try:
        return build_model(config.name, config.arguments)
    except TypeError as error:
        raise ValueError(
            f"model.arguments: {error}; a preset has those of its own network, "
            "--model.arguments '{}' takes none"
        ) from error


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
