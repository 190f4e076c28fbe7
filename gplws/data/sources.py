"""Where training gets its batches: by step, so that a run that stops goes on with the same data.

A *source* is any callable ``source(step) -> DepthSample`` that returns a batch and depends on
nothing but ``step``. Generators and data sets become sources here; :class:`Prefetcher` makes their
batches ahead of time.
"""

from __future__ import annotations

import itertools
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np
import torch

from gplws.data.samples import DepthSample, collate
from gplws.data.transforms import Augmentation, crop, select_frames

Source = Callable[[int], DepthSample]
WorkerKind = Literal["thread", "process"]
Result = TypeVar("Result")


class Generator(Protocol):
    """What renders batches on the fly."""

    def batch(self, step: int, batch_size: int, frames: int, crop: int) -> DepthSample:
        """(batch_size, C, frames, crop, crop), a function of its arguments alone."""


class SampleSet(Protocol):
    """What holds samples, such as a ``torch.utils.data.Dataset``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> DepthSample: ...


def seed_of(*numbers: int) -> int:
    """One seed from several numbers >= 0, such as seed, step and rank.

    All of them matter, but zeros at the end do not: ``seed_of(5, 0) == seed_of(5)``.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def generator_of(*numbers: int) -> torch.Generator:
    """A random number generator seeded by :func:`seed_of`."""
    return torch.Generator().manual_seed(seed_of(*numbers))


class GeneratorSource:
    """Batches of a generator, with a number of frames drawn for each step.

    Args:
        generator: has ``batch(step, batch_size, frames, crop)``.
        batch_size: B.
        frames: (least, most) frames, uniform.
        crop: side of the images, pixels.
        seed: of the number of frames.
    """

    def __init__(
        self,
        generator: Generator,
        *,
        batch_size: int,
        frames: tuple[int, int],
        crop: int,
        seed: int = 0,
    ) -> None:
        self._generator, self._batch_size, self._crop = generator, batch_size, crop
        self._frames, self._seed = frames, seed

    def __call__(self, step: int) -> DepthSample:
        """The batch of a step."""
        least, most = self._frames
        frames = int(torch.randint(least, most + 1, (), generator=generator_of(self._seed, step)))
        return self._generator.batch(step, self._batch_size, frames, self._crop)


class DatasetSource:
    """Random batches of data sets, each sample once an epoch; a batch is of one data set.

    Samples of a batch are cut to a common size: a random part of at most ``crop`` pixels, at most
    ``frames[1]`` successive frames. Where their units differ depth is in frames, where gray is
    beside RGB it has three equal channels. Where a data set does not fill its last batch, other
    samples of it do.

    Args:
        datasets: samples that are not batched; none of them empty.
        batch_size: B.
        crop: largest side of the images, pixels.
        frames: (least, most) frames; stacks with fewer than ``least`` are used as they are.
        seed: of the order and of the parts.

    Raises:
        ValueError: no data set, or an empty one.
    """

    def __init__(
        self,
        datasets: Sequence[SampleSet],
        *,
        batch_size: int,
        crop: int,
        frames: tuple[int, int],
        seed: int = 0,
    ) -> None:
        if not datasets:
            raise ValueError("datasets: expected at least one")
        for dataset in datasets:
            if not len(dataset):
                raise ValueError(f"datasets: {_name(dataset)} is empty")
        self._datasets, self._batch_size, self._crop = list(datasets), batch_size, crop
        self._frames, self._seed = frames, seed
        self._batches = [
            (number, first)
            for number, dataset in enumerate(self._datasets)
            for first in range(0, len(dataset), batch_size)
        ]

    def __len__(self) -> int:
        """Steps of an epoch."""
        return len(self._batches)

    def __call__(self, step: int) -> DepthSample:
        """The batch of a step."""
        epoch, place = divmod(step, len(self._batches))
        order = torch.randperm(len(self._batches), generator=generator_of(self._seed, 0, epoch))
        number, first = self._batches[int(order[place])]
        dataset = self._datasets[number]
        members = torch.randperm(
            len(dataset), generator=generator_of(self._seed, 1, epoch, number)
        ).tolist()
        chosen = itertools.islice(itertools.cycle(members), first, first + self._batch_size)
        samples = _alike([dataset[index] for index in chosen])
        generator = generator_of(self._seed, 2, step)
        least, most = self._frames
        wanted = int(torch.randint(least, most + 1, (), generator=generator))
        frames = min(wanted, *(sample.stack.shape[-3] for sample in samples))
        height = min(self._crop, *(sample.depth.shape[-2] for sample in samples))
        width = min(self._crop, *(sample.depth.shape[-1] for sample in samples))
        batch = collate([_part(s, frames, height, width, generator) for s in samples])
        return replace(batch, name=_name(dataset))


class MixedSource:
    """Each step from one of several sources, drawn by their weights.

    Args:
        sources: at least one.
        weights: of each source, > 0.
        seed: of the choice.

    Raises:
        ValueError: no sources, or weights that do not fit.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], seed: int = 0) -> None:
        if not sources or len(sources) != len(weights) or min(weights) <= 0:
            raise ValueError(
                f"expected sources with a positive weight each, got {len(sources)} sources and "
                f"weights {list(weights)}"
            )
        self._sources, self._seed = list(sources), seed
        self._weights = torch.tensor(weights, dtype=torch.float64)

    def __call__(self, step: int) -> DepthSample:
        """The batch of a step."""
        generator = generator_of(self._seed, step)
        chosen = int(torch.multinomial(self._weights, 1, generator=generator))
        return self._sources[chosen](step)


class AugmentedSource:
    """A source whose batches are changed at random, by step.

    Args:
        source: where the batches come from.
        augmentation: what changes them.
        seed: of the changes.
    """

    def __init__(self, source: Source, augmentation: Augmentation, seed: int = 0) -> None:
        self._source, self._augmentation, self._seed = source, augmentation, seed

    def __call__(self, step: int) -> DepthSample:
        """The batch of a step."""
        return self._augmentation(self._source(step), generator_of(self._seed, step))


class Prefetcher(Generic[Result]):
    """Results of a function of the step, in order, made ahead by other threads or processes.

    Order and content do not depend on the number of workers. An error in a worker is raised where
    its result is asked for, a RuntimeError where the worker itself has ended. Use it as a context
    manager: leaving it ends the workers.

    Args:
        make: function of the step; for processes it is pickled once for each of them.
        steps: which steps, in which order; may be endless.
        workers: 0 makes each result when it is asked for.
        ahead: results that wait or are in the making.
        kind: "thread" suffices for what runs in torch and numpy, which let other threads run.

    Raises:
        ValueError: ``workers`` < 0, ``ahead`` < 1, or an unknown ``kind``.
    """

    def __init__(
        self,
        make: Callable[[int], Result],
        steps: Iterator[int],
        *,
        workers: int = 1,
        ahead: int = 4,
        kind: WorkerKind = "thread",
    ) -> None:
        if workers < 0 or ahead < 1:
            raise ValueError(
                f"workers must be at least 0 and ahead at least 1, got {workers} and {ahead}"
            )
        if kind not in ("thread", "process"):
            raise ValueError(f"kind must be 'thread' or 'process', got {kind!r}")
        self._make, self._steps, self._ahead = make, steps, ahead
        self._waiting: deque[Future[Result]] = deque()
        self._executor: Executor | None = None
        if workers and kind == "thread":
            self._executor = ThreadPoolExecutor(workers, thread_name_prefix="gplws-data")
        elif workers:
            # Not by fork: the parent has threads of torch, whose locks a fork would copy as held.
            self._executor = ProcessPoolExecutor(
                workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=(make,),
            )
            self._make = _make_in_worker

    def __enter__(self) -> Prefetcher[Result]:
        return self

    def __exit__(self, *error: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
        self._waiting.clear()

    def __iter__(self) -> Iterator[Result]:
        return self

    def __next__(self) -> Result:
        if self._executor is None:
            return self._make(next(self._steps))
        try:
            while len(self._waiting) < self._ahead:
                step = next(self._steps, None)
                if step is None:
                    break
                self._waiting.append(self._submitted(self._executor, step))
            if not self._waiting:
                raise StopIteration
            return self._waiting.popleft().result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a data worker ended: it was killed, ran out of memory, or could not start; fewer "
                "data.workers take less memory, and --resume goes on from the last checkpoint"
            ) from error

    def _submitted(self, executor: Executor, step: int) -> Future[Result]:
        if not isinstance(executor, ProcessPoolExecutor):
            return executor.submit(self._make, step)
        # This may start a worker, which inherits what is blocked: a signal to the whole process
        # group must not end it before it ignores such signals.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        try:
            return executor.submit(self._make, step)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_worker_make: Callable[[int], Any] | None = None


def _start_worker(make: Callable[[int], Any]) -> None:
    global _worker_make
    _worker_make = make
    # Signals that reach the whole process group are for the parent, which ends its workers itself.
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    torch.set_num_threads(1)  # the workers are many already


def _make_in_worker(step: int) -> Any:
    assert _worker_make is not None
    return _worker_make(step)


def _alike(samples: list[DepthSample]) -> list[DepthSample]:
    """The samples in one unit and with equally many channels."""
    if len({sample.unit for sample in samples}) > 1:
        samples = [_in_frames(sample) for sample in samples]
    channels = max(sample.stack.shape[0] for sample in samples)
    return [_spread(sample, channels) for sample in samples]


def _in_frames(sample: DepthSample) -> DepthSample:
    index = sample.depth_index()
    return replace(
        sample,
        focus_positions=torch.arange(sample.stack.shape[-3], dtype=torch.float32),
        depth=index,
        valid=sample.valid & index.isfinite(),
        unit="frames",
    )


def _spread(sample: DepthSample, channels: int) -> DepthSample:
    """The sample with its gray values in each of so many channels; RGB stays as it is."""
    image = sample.all_in_focus
    return replace(
        sample,
        stack=sample.stack.expand(channels, -1, -1, -1),
        all_in_focus=None if image is None else image.expand(channels, -1, -1),
    )


def _part(
    sample: DepthSample, frames: int, height: int, width: int, generator: torch.Generator
) -> DepthSample:
    available, rows, columns = sample.stack.shape[-3:]

    def integer(end: int) -> int:
        return int(torch.randint(end, (), generator=generator))

    if frames < available:
        sample = select_frames(sample, integer(available - frames + 1) + torch.arange(frames))
    return crop(sample, integer(rows - height + 1), integer(columns - width + 1), height, width)


def _name(dataset: object) -> str:
    return str(getattr(dataset, "name", "") or type(dataset).__name__)
