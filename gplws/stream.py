"""Many focal stacks in a row: reading, copies and computing at the same time."""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from gplws.alignment import Alignment, requested_alignment
from gplws.data import FocalStack
from gplws.io import read_stack
from gplws.io.readers import Positions, StackSource
from gplws.reconstruct import (
    Engine,
    Precision,
    Reconstruction,
    StackSearch,
    ZDirection,
    check_direction,
    check_options,
    engine_of,
    metadata_of,
    reconstructed,
    resolve_device,
    surface,
)
from gplws.tiling import DEFAULT_MEMORY_MB

_logger = logging.getLogger(__name__)

_POLL = 1e-4  # s between looks at whether a result is there or another stack has come
_ALIGNMENT = 256  # bytes; maps begin at multiples of it
_WARM_UPS = 2  # runs before a CUDA graph is recorded: libraries choose their kernels in the first


def reconstruct_stream(
    stacks: Iterable[StackSource],
    *,
    z_step_um: float | None = None,
    focus_positions_um: Positions = None,
    pixel_size_um: float | None = None,
    z_direction: ZDirection = "up",
    axes: str | None = None,
    channel: int | None = None,
    image: int | str | None = None,
    align: str | Path | Alignment = "none",
    method: str | nn.Module = "auto",
    precision: Precision | None = None,
    device: str | torch.device = "auto",
    memory_mb: float = DEFAULT_MEMORY_MB,
    in_flight: int = 3,
) -> Iterator[Reconstruction]:
    """Height map after height map of stacks that come one after the other, as from a camera.

    Each result is what :func:`gplws.reconstruct` gives for the same frames on that device. They
    come in the order of the stacks, each as soon as it is there: none waits for the stack after it.
    While one stack is computed the next ones are asked for, read and checked, in a thread of its
    own. On a GPU that thread also copies them through page-locked memory to the device, results are
    copied back beside the computing, frames become floats on the device, and a network is replayed
    as one CUDA graph. All buffers are made for the first stack and used again for the others, so
    that memory does not grow, and the second stack on take the same time.

    At most ``in_flight`` stacks have been asked for whose results are not handed out: where results
    are taken slowly, stacks are asked for slowly.

    Args:
        stacks: what :func:`gplws.io.read_stack` takes, any number of it; all of one number of
            frames, one size, gray or RGB, and one dtype. Only one thread at a time asks for the
            next one, but not the caller's. Arrays must not be overwritten until their result is
            there. Frames in page-locked memory (``tensor.pin_memory()``) are copied from there;
            frames on the GPU are ready with the work of the caller's current stream, and their
            results are tensors there, ready likewise.
        z_step_um, focus_positions_um, pixel_size_um, z_direction, axes, channel, image, method,
            precision, memory_mb: as for :func:`gplws.reconstruct`.
        align: "none", or how the frames of all stacks lie to each other, as was found for one of
            the same lens: an :class:`~gplws.Alignment`, or info.json of its result or its folder.
            Stacks are aligned by the thread that reads them, on the host.
        device: "auto" (a GPU with compiled kernels, else the CPU) or any torch device.
        in_flight: stacks that may be on their way at a time, >= 1. 1 is the least memory; nothing
            overlaps then. 2 to 4 keep a GPU busy.

    Yields:
        One result for each stack; ``metadata`` also has its ``number``, counted from 0, and in
        ``seconds`` the ``latency`` from when the stack was there until its result was.

    Raises:
        ValueError: an argument is out of range, or ``align`` names a model, for which each stack
            would be cut to a size of its own; at once. In place of a result: a stack cannot be
            used, or has another shape or dtype than the first.
        AlignmentError: ``align`` cannot be used; at once. It is of other frames; in place of a
            result.
        TypeError: an argument or stack has the wrong type.
        FileNotFoundError: a path does not exist; in place of its result.

        Whatever ``stacks`` itself raises is raised in place of the result. Results of the stacks
        before come first, and there are none after.

    Example:
        >>> stacks = (np.random.default_rng(seed).random((5, 32, 40)) for seed in range(3))
        >>> [result.height.shape for result in reconstruct_stream(stacks, z_step_um=2.0)]
        [(32, 40), (32, 40), (32, 40)]
    """
    check_options(z_direction, memory_mb)
    if not isinstance(in_flight, int) or isinstance(in_flight, bool):
        raise TypeError(f"in_flight must be an integer, got {type(in_flight).__name__}")
    if in_flight < 1:
        raise ValueError(f"in_flight must be at least 1, got {in_flight}")
    if z_step_um is not None and focus_positions_um is not None:
        raise ValueError("z_step_um and focus_positions_um exclude each other; pass only one")
    if isinstance(stacks, str | bytes | FocalStack) or not isinstance(stacks, Iterable):
        raise TypeError(
            f"stacks must be an iterable of stacks, got {type(stacks).__name__}; "
            "gplws.reconstruct takes one stack"
        )
    alignment = requested_alignment(align)
    if isinstance(alignment, str):
        raise ValueError(
            f"a stream takes a known alignment, as each stack would be cut to a size of its own, "
            f"got align={alignment!r}; gplws.align_frames finds that of one stack"
        )
    place = _place(device)
    engine = engine_of(method, place, precision=precision)

    def read(source: StackSource) -> FocalStack:
        stack = read_stack(
            source,
            axes=axes,
            channel=channel,
            image=image,
            z_step_um=z_step_um,
            focus_positions_um=focus_positions_um,
            pixel_size_um=pixel_size_um,
        )
        check_direction(stack, z_direction)
        return stack if alignment is None else alignment.apply(stack)

    line = _line(engine, place, z_direction, memory_mb, in_flight)
    facts = {} if alignment is None else {"alignment": alignment.to_dict()}
    return _results(_Reader(stacks, read, line, in_flight), line, facts)


def _place(device: str | torch.device) -> torch.device:
    """Device of a stream; "auto" does not look at the stacks, of which none is there yet."""
    place = resolve_device(device, None)
    if place.type == "cuda" and place.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return place


@dataclass
class _Item:
    """A stack on its way."""

    number: int
    source: StackSource
    stack: FocalStack
    arrived: float  # when the iterable handed it over
    read_seconds: float
    slot: _Slot | None = None  # on a GPU, for frames that come from the host
    ready: _Mark | None = None  # on a GPU, where its frames are on the device
    launched: float = math.nan


class _Line(Protocol):
    """Where stacks are computed."""

    engine: Engine
    device: torch.device
    z_direction: ZDirection
    limit: int
    """Stacks that may be launched at a time."""

    def after_caller(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, a thread sees frames on the device as the present one does."""

    def accept(self, item: _Item) -> None:
        """Begin to move a stack to where it is computed; called by the reading thread."""

    def launch(self, item: _Item) -> Callable[[], bool]:
        """Begin to compute a stack; returns what tells whether it is done."""

    def collect(self, item: _Item) -> dict[str, Tensor]:
        """Wait for the maps of a stack, which nothing overwrites any more."""

    def close(self) -> None:
        """Wait until no buffer is in use."""


def _line(
    engine: Engine, place: torch.device, z_direction: ZDirection, memory_mb: float, in_flight: int
) -> _Line:
    if place.type == "cuda":
        return _DeviceLine(engine, place, z_direction, memory_mb, in_flight, _CudaQueues(place))
    return _HostLine(engine, place, z_direction, memory_mb)


def _results(reader: _Reader, line: _Line, facts: Mapping[str, Any]) -> Iterator[Reconstruction]:
    """The results in order, with ``facts``; launches stacks while earlier ones are under way."""
    launched: deque[tuple[_Item, Callable[[], bool]]] = deque()
    failure: BaseException | None = None
    item: _Item | _End | None
    more = True
    reader.start()
    try:
        while more or launched:
            done = bool(launched) and launched[0][1]()
            if more and not done and len(launched) < line.limit:
                try:
                    item = reader.items.get(timeout=_POLL if launched else None)
                except queue.Empty:
                    continue
                if isinstance(item, _End):
                    more, failure = False, item.failure
                    continue
                item.launched = time.perf_counter()
                try:
                    launched.append((item, line.launch(item)))
                except Exception as error:  # results of the stacks before come first
                    more, failure = False, error
                    reader.stop()
            else:
                item, _ = launched.popleft()
                result = _result(item, line.collect(item), line)
                result.metadata.update(facts)
                item = None  # its frames: whoever takes the result may take long
                reader.one_done()
                yield result
                del result
            item = None
        if failure is not None:
            raise failure
    finally:
        reader.stop()
        line.close()
        line.engine.release()


def _result(item: _Item, maps: dict[str, Tensor], line: _Line) -> Reconstruction:
    now = time.perf_counter()
    seconds = {
        "read": item.read_seconds,
        "reconstruct": now - item.launched,
        "latency": now - item.arrived,
    }
    metadata = metadata_of(
        item.source, item.stack, line.engine, line.device, line.z_direction, seconds
    )
    metadata["number"] = item.number
    return surface(maps, item.stack, metadata, tensors=isinstance(item.source, Tensor))


class _End(NamedTuple):
    """No stack comes any more."""

    failure: BaseException | None


class _Reader:
    """Asks for stacks, reads and checks them, in a thread of its own, as long as there is room."""

    def __init__(
        self,
        stacks: Iterable[StackSource],
        read: Callable[[StackSource], FocalStack],
        line: _Line,
        in_flight: int,
    ) -> None:
        self.items: queue.SimpleQueue[_Item | _End] = queue.SimpleQueue()
        self._stacks, self._read, self._line = stacks, read, line
        self._room = threading.Semaphore(in_flight)
        self._stopped = False
        self._first: FocalStack | None = None
        self._after_caller: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        # A camera may let its next stack wait for ever; that must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name="gplws stream", daemon=True)

    def start(self) -> None:
        """Begin to ask for stacks."""
        self._after_caller = self._line.after_caller()
        self._thread.start()

    def one_done(self) -> None:
        """One more stack may come."""
        self._room.release()

    def stop(self) -> None:
        """Ask for no further stack; the thread ends once the iterable has given the present one."""
        self._stopped = True
        self._room.release()

    def _run(self) -> None:
        failure: BaseException | None = None
        try:
            with self._after_caller:  # frames on the device are looked at
                iterator = iter(self._stacks)
                number = 0
                while self._has_room():
                    try:
                        source = next(iterator)
                    except StopIteration:
                        break
                    if self._stopped:
                        break
                    self.items.put(self._item(number, source))
                    number += 1
                    del source
        except BaseException as error:  # raised again in the thread that takes the results
            failure = error
        self.items.put(_End(failure))

    def _has_room(self) -> bool:
        self._room.acquire()
        return not self._stopped

    def _item(self, number: int, source: StackSource) -> _Item:
        arrived = time.perf_counter()
        stack = self._read(source)
        if self._first is None:
            self._first = _without_frames(stack)
        _require_same(stack, self._first, number)
        item = _Item(number, source, stack, arrived, 0.0)
        self._line.accept(item)
        item.read_seconds = time.perf_counter() - arrived
        return item


def _without_frames(stack: FocalStack) -> FocalStack:
    """A stack of the same shape and dtype that keeps no pixels alive."""
    frames = stack.frames
    if isinstance(frames, Tensor):
        return FocalStack(frames.new_zeros(()).expand(frames.shape))
    return FocalStack(np.broadcast_to(frames.dtype.type(0), frames.shape))


def _require_same(stack: FocalStack, first: FocalStack, number: int) -> None:
    for what, got, expected in (
        ("frames of shape", tuple(stack.frames.shape), tuple(first.frames.shape)),
        ("dtype", _dtype_of(stack), _dtype_of(first)),
    ):
        if got != expected:
            raise ValueError(
                f"stacks: stack {number} (counted from 0) must have {what} {expected} as the "
                f"first one, got {got}"
            )


def _dtype_of(stack: FocalStack) -> torch.dtype:
    """Dtype of the frames as tensors, in the byte order of this machine."""
    if isinstance(stack.frames, Tensor):
        return stack.frames.dtype
    dtype = stack.frames.dtype.newbyteorder("=")
    return torch.from_numpy(np.empty(0, dtype)).dtype


class _HostLine:
    """Computes where the caller is, one stack after the other."""

    limit = 1

    def __init__(
        self, engine: Engine, device: torch.device, z_direction: ZDirection, memory_mb: float
    ) -> None:
        self.engine, self.device, self.z_direction = engine, device, z_direction
        self._memory_mb = memory_mb
        self._maps: dict[str, Tensor] = {}

    def after_caller(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def accept(self, item: _Item) -> None:
        pass

    def launch(self, item: _Item) -> Callable[[], bool]:
        self._maps = reconstructed(
            item.stack, self.engine, self.device, self.z_direction, self._memory_mb
        )
        return lambda: True

    def collect(self, item: _Item) -> dict[str, Tensor]:
        maps, self._maps = self._maps, {}
        return maps

    def close(self) -> None:
        self._maps = {}


class _Queues(Protocol):
    """A device that works beside the host: three queues of work, and memory for copies."""

    device: torch.device

    def pinned(self, size: int) -> Tensor:
        """(size,) uint8 on the host, from which copies run beside the host."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of the device that all queues may use."""

    def hand_over(self, tensor: Tensor) -> None:
        """Let the queue of the caller use a tensor that is made on another one."""

    def after_caller(self) -> contextlib.AbstractContextManager[Any]:
        """What a thread begins inside goes to the queue of the one that calls this."""

    def on(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """What is begun inside goes to the queue "upload", "compute" or "download"."""

    def mark(self) -> _Mark:
        """The place that the present queue has reached."""

    def wait_for(self, mark: _Mark) -> None:
        """Whatever is begun on the present queue from here on waits for ``mark``."""

    def recorded(self, work: Callable[[], None]) -> Callable[[], None]:
        """Does ``work`` and gives what does the same again, with one call where that is possible.

        Raises:
            RuntimeError: it cannot be recorded.
        """


class _Mark(Protocol):
    """A place in a queue of work."""

    def query(self) -> bool:
        """Whether all before it is done."""

    def synchronize(self) -> None:
        """Wait for that."""


class _CudaQueues:
    """CUDA streams, events, page-locked memory and graphs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._streams = {
            name: torch.cuda.Stream(device) for name in ("upload", "compute", "download")
        }
        # Weights may still be on their way.
        self._streams["compute"].wait_stream(torch.cuda.current_stream(device))

    def pinned(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        made = torch.empty(tuple(shape), dtype=dtype, device=self.device)
        for stream in self._streams.values():
            made.record_stream(stream)
        return made

    def hand_over(self, tensor: Tensor) -> None:
        tensor.record_stream(torch.cuda.current_stream(self.device))

    def after_caller(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(torch.cuda.current_stream(self.device))

    @contextlib.contextmanager
    def on(self, name: str) -> Iterator[None]:
        with torch.cuda.device(self.device), torch.cuda.stream(self._streams[name]):
            yield

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait_for(self, mark: _Mark) -> None:
        assert isinstance(mark, torch.cuda.Event)
        torch.cuda.current_stream(self.device).wait_event(mark)

    def recorded(self, work: Callable[[], None]) -> Callable[[], None]:
        for _ in range(_WARM_UPS):
            work()
        stream = torch.cuda.current_stream(self.device)
        stream.synchronize()
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            # Other threads may go on copying, this one may not.
            with torch.cuda.graph(
                graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            ):
                work()
        except RuntimeError:
            self._leave_pool(pool)
            raise
        return graph.replay

    def _leave_pool(self, pool: Any) -> None:
        """After a recording that failed: torch would take it to be under way for ever.

        Its allocator would then give memory that several streams used back to none of them.
        """
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            leave = getattr(torch._C, name, None)  # not public
            if leave is not None:
                with contextlib.suppress(RuntimeError):
                    leave(self.device.index, pool)


class _Layout:
    """Maps of a result, one after the other in one block of memory."""

    def __init__(self, maps: dict[str, Tensor]) -> None:
        self._places: dict[str, tuple[int, torch.Size, torch.dtype]] = {}
        self.size = 0
        for name, value in maps.items():
            self._places[name] = (self.size, value.shape, value.dtype)
            length = value.numel() * value.element_size()
            self.size += -(-length // _ALIGNMENT) * _ALIGNMENT

    def views(self, block: Tensor) -> dict[str, Tensor]:
        """The maps as views of a block (size,) uint8."""
        return {
            name: block[first : first + shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for name, (first, shape, dtype) in self._places.items()
        }


class _Slot:
    """Memory of one stack on its way: frames and maps, on the host and on the device."""

    def __init__(self, queues: _Queues, shape: Sequence[int], dtype: torch.dtype) -> None:
        block = queues.pinned(math.prod(shape) * dtype.itemsize)
        self.host_frames = block.view(dtype).view(tuple(shape))
        self.device_frames = queues.empty(shape, dtype)
        self.host_maps: Tensor | None = None  # (size,) uint8; their size is known later
        self.device_maps: Tensor | None = None


class _DeviceLine:
    """Computes on a device that works beside the host, with copies there and back on the side.

    The frames of the present stack always lie in the same place, where a recorded search finds
    them; from there maps are copied to the slot of the stack, and from the slot to the host.
    """

    def __init__(
        self,
        engine: Engine,
        device: torch.device,
        z_direction: ZDirection,
        memory_mb: float,
        in_flight: int,
        queues: _Queues,
    ) -> None:
        self.engine, self.device, self.z_direction = engine, device, z_direction
        self._memory_mb, self._in_flight, self._queues = memory_mb, in_flight, queues
        # Where the host waits for intermediate results, a second stack would only delay the first.
        self.limit = in_flight if engine.capturable and not engine.last_steps else 1
        self._free: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        self._slots: list[_Slot] = []
        self._search: StackSearch | None = None
        self._frames: Tensor | None = None
        self._positions: np.ndarray | None = None
        self._levels = (0.0, 1.0)
        self._searches: dict[int, Callable[[], None]] = {}  # by their plan
        self._layout: _Layout | None = None
        self._on_device: dict[int, tuple[dict[str, Tensor], _Mark]] = {}
        self._marks: dict[int, _Mark] = {}

    def after_caller(self) -> contextlib.AbstractContextManager[Any]:
        return self._queues.after_caller()

    def accept(self, item: _Item) -> None:
        frames = item.stack.frames
        if isinstance(frames, Tensor) and frames.device != torch.device("cpu"):
            if frames.device != self._queues.device:
                raise ValueError(
                    f"stacks: frames of stack {item.number} must be on the CPU or on "
                    f"{self._queues.device}, got {frames.device}"
                )
            item.ready = self._queues.mark()  # of the reading thread, which may have made them
            return
        if not self._slots:
            self._make_slots(item.stack)
        # There is one: as many as stacks may be on their way.
        slot = item.slot = self._free.get()
        if isinstance(frames, Tensor) and frames.is_pinned() and frames.is_contiguous():
            source = frames
        else:
            source = slot.host_frames
            if isinstance(frames, Tensor):
                source.copy_(frames)
            else:
                np.copyto(source.numpy(), frames)  # any strides and byte order
        with self._queues.on("upload"):
            slot.device_frames.copy_(source, non_blocking=True)
            item.ready = self._queues.mark()

    def launch(self, item: _Item) -> Callable[[], bool]:
        frames = item.stack.frames if item.slot is None else item.slot.device_frames
        assert isinstance(frames, Tensor)
        assert item.ready is not None
        caller = self._queues.mark()
        with self._queues.on("compute"):
            self._queues.wait_for(item.ready)
            if item.slot is None:
                self._queues.wait_for(caller)
            with torch.inference_mode():
                maps = self._maps(item.stack, frames)
            if item.slot is not None:
                return self._to_host(item, item.slot, maps)
            copies = {name: value.clone() for name, value in maps.items()}
            mark = self._queues.mark()
            self._on_device[item.number] = copies, mark
            return mark.query

    def _maps(self, stack: FocalStack, frames: Tensor) -> dict[str, Tensor]:
        """Maps of a stack, computed on the present queue."""
        if self._frames is None:
            self._frames = frames.clone(memory_format=torch.contiguous_format)
        else:
            self._frames.copy_(frames)
        positions, levels = stack.focus_positions_um, stack.levels
        if self._search is None:
            own = FocalStack(self._frames, focus_positions_um=positions)
            self._search = StackSearch(own, self.engine, self.device, self._memory_mb)
        elif levels != self._levels or not _same_positions(positions, self._positions):
            self._search.set_scales(positions, levels)
        self._positions, self._levels = positions, levels
        self._search.prepare()
        if self._search.plan not in self._searches:
            self._searches[self._search.plan] = self._recorded(self._search)
        self._searches[self._search.plan]()
        self._search.finish()
        return self._search.maps(self.z_direction)

    def _recorded(self, search: StackSearch) -> Callable[[], None]:
        """The search of all tiles, as a graph where the method allows it."""
        if not self.engine.capturable:
            return search.search
        try:
            return self._queues.recorded(search.search)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # a network of the caller's may ask for values on the host
            _logger.warning(
                "method %s runs without a CUDA graph: %s",
                self.engine.name,
                str(error).strip().partition("\n")[0],
            )
            self.limit = 1
            return search.search

    def _to_host(self, item: _Item, slot: _Slot, maps: dict[str, Tensor]) -> Callable[[], bool]:
        if self._layout is None:
            self._layout = _Layout(maps)
        if slot.device_maps is None or slot.host_maps is None:
            slot.host_maps = self._queues.pinned(self._layout.size)
            slot.device_maps = self._queues.empty((self._layout.size,), torch.uint8)
        for name, view in self._layout.views(slot.device_maps).items():
            view.copy_(maps[name])
        computed = self._queues.mark()
        with self._queues.on("download"):
            self._queues.wait_for(computed)
            slot.host_maps.copy_(slot.device_maps, non_blocking=True)
            mark = self._marks[item.number] = self._queues.mark()
        return mark.query

    def collect(self, item: _Item) -> dict[str, Tensor]:
        if item.slot is None:
            maps, mark = self._on_device.pop(item.number)
            mark.synchronize()
            for value in maps.values():
                self._queues.hand_over(value)
            return maps
        slot, layout = item.slot, self._layout
        assert layout is not None
        assert slot.host_maps is not None
        self._marks.pop(item.number).synchronize()
        # Copies: page-locked memory is scarce, and the slot is used again.
        maps = {name: view.clone() for name, view in layout.views(slot.host_maps).items()}
        item.slot = None
        self._free.put(slot)
        return maps

    def _make_slots(self, stack: FocalStack) -> None:
        """As many as stacks may be on their way; the reading thread makes them, for the first."""
        with self._queues.on("upload"):
            for _ in range(self._in_flight):
                self._slots.append(_Slot(self._queues, stack.frames.shape, _dtype_of(stack)))
        for slot in self._slots:
            self._free.put(slot)

    def close(self) -> None:
        for name in ("upload", "compute", "download"):
            with self._queues.on(name):
                mark = self._queues.mark()
            mark.synchronize()


def _same_positions(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b))
