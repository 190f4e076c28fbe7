"""What ``python -m benchmarks.gpu`` measures: each part yields rows, as soon as each is measured.

All candidates of a row do the same work on the same inputs in the same precision. Their results are
compared with stock torch in float32 before they are timed; one that fails or differs is left out,
and the row says why. What gplws does is built, compared and timed for ten rounds before stock torch
runs in this precision: should a candidate break the device, the row keeps those times and says so.
"""

from __future__ import annotations

import copy
import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import gplws
from benchmarks.clocks import Clock, Run, reason_of, sets_beyond, take_turns
from benchmarks.networks import NETWORKS, ToDepth, in_channels_last, random_gplws, random_peer
from benchmarks.summary import medians, quantile, shape_name
from gplws.ops import (
    focus_search,
    group_pointwise_conv3d,
    pack_weights,
    reference,
    up_conv3d,
)

Row = dict[str, Any]
PEERS = tuple(name for name in NETWORKS if name != "gplws")
# Share of the largest result by which a result may differ from stock torch in float32.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}
TOLERANCE_TF32 = 2e-2
TOLERANCE_OPS = {"float32": 1e-4, "bfloat16": 0.03, "float16": 5e-3}  # of one layer
LAST = torch.channels_last_3d
COMPILE_MODE = "max-autotune"


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        shape: frames, height and width of a stack.
        precision: "float32", "bfloat16" or "float16".
        seconds: for the turns of one row, roughly.
        brief: only candidates that may be the fastest of their kind.
    """

    shape: tuple[int, int, int]
    precision: str
    seconds: float
    brief: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The precision as torch has it."""
        return getattr(torch, self.precision)

    def row(self, part: str, network_or_op: str) -> Row:
        """The beginning of a row."""
        return {
            "part": part,
            "what": network_or_op,
            "precision": self.precision,
            "shape": shape_name(self.shape),
        }


class _Compared:
    """Candidates of one row: built one by one, and compared before they are timed.

    Those of gplws are timed by themselves as soon as they are built, shortly: these times count
    where another candidate breaks the device before enough turns are taken.
    """

    def __init__(self, clock: Clock, expected: Tensor, tolerance: float, sets: int) -> None:
        self._clock, self._expected, self._tolerance = clock, expected, tolerance
        self._sets = sets
        self._alone: dict[str, list[float]] = {}
        self.broke = ""  # the device, by this candidate
        self.runs: dict[str, Run] = {}
        self.left_out: dict[str, str] = {}
        self.errors: dict[str, float] = {}

    def add(self, name: str, build: Callable[[], Run], tolerance: float | None = None) -> None:
        """Take part, unless it fails or differs."""
        if self.broke:
            self.left_out[name] = f"not tried after {self.broke} broke the device"
            return
        try:
            run = build()
            self._clock.wait()
            got = run(0)
            got = run(0).detach().float()  # what is recorded may differ from what was first run
            self._clock.wait()
            error = _difference(got, self._expected)
            del got
        except Exception as failure:  # engines fail in many ways
            self.left_out[name] = reason_of(failure)
            failure.__traceback__ = None  # it holds the tensors of the frames it went through
            gc.collect()
            if self._clock.lost():
                self.broke = name
            else:
                self._clock.forget()
            return
        limit = self._tolerance if tolerance is None else tolerance
        if not error <= limit:
            self.left_out[name] = f"result differs by {error:.2g} of the largest value"
            return
        self.runs[name], self.errors[name] = run, error
        if name.startswith("gplws"):
            times, failed = take_turns(self._clock, {name: run}, sets=self._sets, seconds=0.0)
            self._alone.update(times)
            if failed and self._clock.lost():
                self.left_out.update(failed)
                self.broke = name

    def row(self, row: Row, seconds: float) -> Row:
        """The row with the times; "device_lost" names the candidate that broke the device."""
        times: dict[str, list[float]] = {}
        if not self.broke:
            times, failed = take_turns(self._clock, self.runs, sets=self._sets, seconds=seconds)
            self.left_out.update(failed)
            if failed and self._clock.lost():
                self.broke = next(reversed(failed))
        alone = []
        if self.broke:
            for name in self.runs:
                if name in times or name in self.left_out:
                    continue
                if name in self._alone:
                    times[name] = self._alone[name]
                    alone.append(name)
                else:
                    self.left_out[name] = f"not timed before {self.broke} broke the device"
        return {
            **row,
            "seconds": times,
            "left_out": self.left_out,
            "errors": {n: e if math.isfinite(e) else None for n, e in self.errors.items()},
            "input_sets": self._sets,
            **({"device_lost": self.broke, "alone": alone} if self.broke else {}),
        }


def _difference(got: Tensor, expected: Tensor) -> float:
    """Largest difference as share of the largest expected value; infinite where one is NaN."""
    difference = (got.to(expected).view_as(expected) - expected).abs().max()
    share = float(difference / expected.abs().max().clamp(min=1e-30))
    return share if math.isfinite(share) else math.inf


def _inputs(clock: Clock, shape: Sequence[int], dtype: torch.dtype, count: int) -> list[Tensor]:
    generator = torch.Generator(clock.device).manual_seed(1)
    size = tuple(shape)
    return [
        torch.rand(size, generator=generator, device=clock.device).to(dtype) for _ in range(count)
    ]


def _set_tf32(allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


def _exactly(network_or_op: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """What is expected: stock torch in float32, without a search for the fastest kernels."""
    chosen = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    _set_tf32(False)
    try:
        return network_or_op(*(x.float() for x in inputs)).float()
    finally:
        torch.backends.cudnn.benchmark = chosen


def limits(clock: Clock, settings: Settings) -> Iterator[Row]:
    """Bytes per second of a large copy, FLOP per second of a large matrix product."""
    _set_tf32(False)
    small = clock.device.type == "cpu"
    side, length = (256, 2**16) if small else (8192, 2**30)
    generator = torch.Generator(clock.device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=clock.device)

    a, b = (normal(side, side).to(settings.dtype) for _ in range(2))
    source = normal(length // 4)
    target = torch.empty_like(source)
    runs: dict[str, Run] = {
        "matrix product": lambda number: a @ b,
        "copy": lambda number: target.copy_(source),
    }
    times, left_out = take_turns(clock, runs, sets=1, seconds=settings.seconds)
    found = medians(times)
    yield {
        **settings.row("limits", "limits"),
        "shape": "",
        "seconds": times,
        "left_out": left_out,
        "flops": 2 * side**3 / found["matrix product"],
        "bytes_per_second": 2 * length / found["copy"],
    }


@dataclass(frozen=True)
class OpCase:
    """One layer: its inputs, what gplws and stock torch make of them, and the work in it.

    Attributes:
        op: its name.
        what: layer and shape.
        shapes: of the inputs that take turns; weights stay.
        ours: inputs -> result.
        stock: the same on stock torch, in the precision of the inputs.
        flop: floating-point operations.
        values: that are read and written, inputs and outputs once each.
        extra_bytes: written beside them.
    """

    op: str
    what: str
    shapes: list[tuple[int, ...]]
    ours: Callable[..., Tensor]
    stock: Callable[..., Tensor]
    flop: float
    values: int
    extra_bytes: int = 0


def conv_cases(clock: Clock, settings: Settings) -> Iterator[OpCase]:
    """The convs of the network but those up."""
    frames, height, width = settings.shape
    for level, channels in enumerate((12, 24, 48, 96)):
        size = (frames, height >> level, width >> level)
        yield _conv_case(clock, settings, channels, channels, size, 4)
        if channels < 96:
            yield _conv_case(clock, settings, channels, 2 * channels, size, 1)


def up_cases(clock: Clock, settings: Settings) -> Iterator[OpCase]:
    """The convs up."""
    frames, height, width = settings.shape
    for level, channels in enumerate((24, 48, 96), 1):
        yield _up_case(clock, settings, channels, (frames, height >> level, width >> level))


def _weights(clock: Clock, settings: Settings, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in shapes:
        values = torch.randn(shape, generator=generator) / math.sqrt(max(math.prod(shape[1:]), 1))
        made.append(values.to(clock.device, settings.dtype))
    return made


def _conv_case(
    clock: Clock,
    settings: Settings,
    channels: int,
    results: int,
    size: tuple[int, int, int],
    groups: int,
) -> OpCase:
    """Grouped conv and pointwise conv where the channels stay, the conv down where they double."""
    pair = results == channels
    weight, bias, pointwise = _weights(
        clock,
        settings,
        (results, channels // groups, 3, 3, 3),
        (results,),
        (results, results, 1, 1, 1),
    )
    options: dict[str, Any] = {"groups": groups, "stride": 1 if pair else 2, "relu": pair}
    arguments = (weight, bias, pointwise, bias) if pair else (weight, bias, None, None)
    packed = None
    if clock.device.type == "cuda" and settings.dtype != torch.float32:
        # As fused layers do, once for all calls.
        packed = pack_weights(*arguments, groups=groups, stride=options["stride"])

    def stock(x: Tensor) -> Tensor:
        kernel, *others = (None if given is None else given.to(x.dtype) for given in arguments)
        assert kernel is not None
        return reference.group_pointwise_conv3d(x, kernel, *others, **options)

    frames, height, width = size
    out = size if pair else (frames, -(-height // 2), -(-width // 2))
    per_voxel = weight.numel() + (pointwise.numel() if pair else 0)
    name = f"{channels} channels + pointwise" if pair else f"{channels} -> {results}, down"
    return OpCase(
        "group_pointwise_conv3d",
        f"{name}, {shape_name(size)}",
        [(1, channels, *size)],
        lambda x: group_pointwise_conv3d(x, *arguments, **options, packed=packed),
        stock,
        2.0 * per_voxel * math.prod(out),
        channels * math.prod(size) + results * math.prod(out),
    )


def _up_case(clock: Clock, settings: Settings, channels: int, size: tuple[int, int, int]) -> OpCase:
    groups = channels // 2
    weight, bias = _weights(clock, settings, (channels, 1, 3, 3, 3), (groups,))
    frames, height, width = size
    out = (frames, 2 * height, 2 * width)
    return OpCase(
        "up_conv3d",
        f"{channels} -> {groups} + skip, {shape_name(out)}",
        [(1, channels, *size), (1, groups, *out)],
        lambda x, skip: up_conv3d(x, weight, bias, skip, groups=groups),
        lambda x, skip: reference.up_conv3d(
            x, weight.to(x.dtype), bias.to(x.dtype), skip, groups=groups
        ),
        2.0 * 27 * channels * math.prod(size),
        channels * math.prod(size) + 2 * groups * math.prod(out),
    )


def search_cases(clock: Clock, settings: Settings) -> Iterator[OpCase]:
    """The focus search, with the frames of a stack, ten times as many, and larger images."""
    frames, height, width = settings.shape
    for size in (
        settings.shape,
        (10 * frames, height, width),
        (frames, 4 * height, 4 * width),
    ):
        yield OpCase(
            "focus_search",
            shape_name(size),
            [(1, *size)],
            lambda volume: focus_search(volume).depth,
            lambda volume: reference.focus_search(volume).depth,
            0.0,
            math.prod(size),
            20 * size[1] * size[2],  # depth, index (int64), peak, confidence
        )


OPS: dict[str, Callable[[Clock, Settings], Iterator[OpCase]]] = {
    "group_pointwise_conv3d": conv_cases,
    "up_conv3d": up_cases,
    "focus_search": search_cases,
}
_known_limits: dict[str, Row] = {}  # of this process, by precision


def ops(clock: Clock, settings: Settings, op: str, first: int = 0) -> Iterator[Row]:
    """Layers of the network by themselves, against their share of the limits of this run."""
    limit = _known_limits.get(settings.precision)
    if limit is None:
        (limit,) = limits(clock, settings)
        _known_limits[settings.precision] = limit
        yield limit
    for case in itertools.islice(OPS[op](clock, settings), first, None):
        yield _op_row(clock, settings, case, limit)
        clock.forget()


def _op_row(clock: Clock, settings: Settings, case: OpCase, limit: Row) -> Row:
    data = case.values * settings.dtype.itemsize + case.extra_bytes
    sets = sets_beyond(clock.cache_bytes, data)
    inputs = list(zip(*(_inputs(clock, s, settings.dtype, sets) for s in case.shapes), strict=True))
    expected = _exactly(case.stock, *inputs[0])
    compared = _Compared(clock, expected, _op_tolerance(case, settings), 1)

    def recorded(op: Callable[..., Tensor], layout: torch.memory_format) -> Run:
        """All inputs one after the other in one graph: launches cost nothing then."""
        laid = [[_laid_out(x, layout) for x in one] for one in inputs]
        kept: list[Tensor] = []

        def all_of_them() -> Tensor:
            kept[:] = [op(*one) for one in laid]  # kept, so that each result has its own memory
            return kept[0]

        return clock.graph([all_of_them])

    layouts = {"": torch.contiguous_format, " channels_last": LAST}
    if case.op == "focus_search":
        compared.add("gplws", lambda: recorded(case.ours, torch.contiguous_format))
        # The slow reference of the search is no candidate; its largest part is.
        compared.add("torch.max alone", lambda: recorded(lambda v: v.max(1).values, LAST), math.inf)
    else:
        for who, op in (("gplws", case.ours), ("stock", case.stock)):
            for name, layout in layouts.items():
                compared.add(f"{who}{name}", partial(recorded, op, layout))
    row = compared.row(settings.row("ops", case.op), settings.seconds)
    row["seconds"] = {
        name: [value / sets for value in values] for name, values in row["seconds"].items()
    }
    ours = [value for name, value in medians(row["seconds"]).items() if name.startswith("gplws")]
    memory = data / limit["bytes_per_second"]
    arithmetic = case.flop / limit["flops"]
    shares: Row = {"share_of_copy": None, "share_of_roofline": None}
    if ours:
        best = min(ours)
        shares = {
            "share_of_copy": memory / best,
            "share_of_roofline": max(memory, arithmetic) / best,
        }
    return {
        **row,
        "case": case.what,
        "flop": case.flop,
        "bytes": data,
        "bound": "arithmetic" if arithmetic > memory else "memory",
        "input_sets": sets,
        **shares,
    }


def _op_tolerance(case: OpCase, settings: Settings) -> float:
    # A nearly flat fit of the search magnifies rounding: 0.01 frames of N - 1.
    return 1e-2 if case.op == "focus_search" else TOLERANCE_OPS[settings.precision]


def _laid_out(x: Tensor, layout: torch.memory_format) -> Tensor:
    return x.contiguous(memory_format=layout) if x.dim() == 5 else x


def network(clock: Clock, settings: Settings) -> Iterator[Row]:
    """The whole network: gplws, and the same network on stock torch in its best settings."""
    yield _network_row(clock, settings, compiled=False)


def compiled(clock: Clock, settings: Settings) -> Iterator[Row]:
    """The same against torch.compile(mode="max-autotune"), which takes minutes to build."""
    yield _network_row(clock, settings, compiled=True)


def _network_row(clock: Clock, settings: Settings, *, compiled: bool) -> Row:
    dtype, device = settings.dtype, clock.device
    _set_tf32(False)
    shape = (1, 3, *settings.shape)
    sets = sets_beyond(clock.cache_bytes, math.prod(shape) * dtype.itemsize)
    inputs = _inputs(clock, shape, dtype, sets)
    last = [x.contiguous(memory_format=LAST) for x in inputs]
    expected = _exactly(random_gplws().reparameterise().to(device), inputs[0])
    contiguous = random_gplws().reparameterise().to(device, dtype)
    in_last = in_channels_last(random_gplws().reparameterise().to(device, dtype))
    with torch.inference_mode(False):  # as users make it; so it may keep its weights packed
        fused = random_gplws().fuse().to(device, dtype)
    compared = _Compared(clock, expected, TOLERANCE[settings.precision], sets)
    compared.add("gplws graph", lambda: _graph(clock, fused, inputs))
    if compiled:
        compared.add(f"compile {COMPILE_MODE}", lambda: _compiled(in_last, last))
    else:
        compared.add("gplws", lambda: _eager(fused, inputs))
        stock = [(in_last, last, "eager channels_last")]  # so far the faster one
        if not settings.brief:
            stock.append((contiguous, inputs, "eager"))
        for model, given, name in stock:
            compared.add(name, partial(_eager, model, given))
            compared.add(f"{name} graph", partial(_graph, clock, model, given))
            if settings.precision != "float32":
                continue
            compared.add(
                f"{name} graph tf32",
                partial(_recorded_with_tf32, clock, model, given),
                TOLERANCE_TF32,
            )
            if not settings.brief:
                compared.add(
                    f"{name} tf32",
                    partial(_eager_with_tf32, model, given),
                    TOLERANCE_TF32,
                )
    if compiled and settings.precision == "float32":
        compared.add(
            f"compile {COMPILE_MODE} tf32",
            lambda: _with_tf32(_compiled(in_last, last)),
            TOLERANCE_TF32,
        )
    part = "compile" if compiled else "network"
    return compared.row(settings.row(part, "gplws"), settings.seconds)


def _eager(model: nn.Module, inputs: list[Tensor]) -> Run:
    return lambda number: model(inputs[number])


def _graph(clock: Clock, model: nn.Module, inputs: list[Tensor]) -> Run:
    return clock.graph([partial(model, x) for x in inputs])


def _compiled(model: nn.Module, inputs: list[Tensor]) -> Run:
    torch._dynamo.reset()
    fast = torch.compile(model, mode=COMPILE_MODE, dynamic=False)

    def run(number: int) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return fast(inputs[number])

    for _ in range(3):  # compiles, tunes, records
        run(0)
    return run


def _with_tf32(run: Run) -> Run:
    """A candidate whose convs may round to TF32; the others may not."""

    def allowed(number: int) -> Tensor:
        _set_tf32(True)
        try:
            return run(number)
        finally:
            _set_tf32(False)

    return allowed


def _eager_with_tf32(model: nn.Module, inputs: list[Tensor]) -> Run:
    return _with_tf32(_eager(model, inputs))


def _recorded_with_tf32(clock: Clock, model: nn.Module, inputs: list[Tensor]) -> Run:
    _set_tf32(True)
    try:
        return _graph(clock, model, inputs)  # what is recorded stays as it was
    finally:
        _set_tf32(False)


def peer(clock: Clock, settings: Settings, name: str, *, compile_: bool = False) -> Iterator[Row]:
    """A published network on stock torch in all settings, and gplws beside it, random weights.

    Random weights leave the softmax of a deep network undecided, so only float32 is compared. Where
    nothing runs in the precision as it is, autocast takes its place.
    """
    _set_tf32(False)
    shape = (1, 3, *settings.shape)
    half = settings.dtype != torch.float32
    sets = sets_beyond(clock.cache_bytes, math.prod(shape) * settings.dtype.itemsize)
    inputs = _inputs(clock, shape, settings.dtype, sets)
    exact = random_peer(name, settings.shape[0]).to(clock.device)
    expected = _exactly(exact, inputs[0])
    tolerance = math.inf if half else TOLERANCE["float32"]
    compared = _Compared(clock, expected, tolerance, sets)
    for autocast in (False, True) if half else (False,):
        if compared.runs:
            break
        given = [x.float() for x in inputs] if autocast else inputs
        dtype = torch.float32 if autocast else settings.dtype
        for in_last in (False, True):
            model = copy.deepcopy(exact).to(dtype)
            if in_last:
                model = in_channels_last(model)
                given = [x.contiguous(memory_format=LAST) for x in given]
            call = _Autocast(model, settings.dtype) if autocast else model
            title = "autocast" if autocast else "eager"
            title += " channels_last" if in_last else ""
            compared.add(f"{title} graph", partial(_graph, clock, call, given))
            if not settings.brief or f"{title} graph" not in compared.runs:
                compared.add(title, partial(_eager, call, given))
            if not half:
                compared.add(
                    f"{title} graph tf32",
                    partial(_recorded_with_tf32, clock, call, given),
                    math.inf,
                )
            if compile_ and in_last:
                compared.add(f"compile {COMPILE_MODE}", partial(_compiled, call, given))
    with torch.inference_mode(False):  # as users make it; so it may keep its weights packed
        fused = random_gplws().fuse().to(clock.device, settings.dtype)
    ours = ToDepth(fused)  # what it gives is another depth: nothing to compare
    compared.add("gplws graph", lambda: _graph(clock, ours, inputs), math.inf)
    yield compared.row(settings.row("peers", name), settings.seconds)


class _Autocast(nn.Module):
    """A network whose convs run in another precision."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self._model, self._dtype = model, dtype

    def forward(self, stack: Tensor) -> Tensor:
        # Weights cast for one recorded pass would not exist in the next.
        with torch.autocast(stack.device.type, self._dtype, cache_enabled=False):
            return self._model(stack)


def stream(clock: Clock, settings: Settings, method: str) -> Iterator[Row]:
    """Stacks per second from frames on the host to a height map on the host, and their latency.

    ``method`` "network" is the network of the paper with random weights, else as for
    :func:`gplws.reconstruct`.
    """
    network = random_gplws().fuse().to(clock.device, settings.dtype)
    if method == "gplws":
        network = gplws.load_model("gplws").to(clock.device, settings.dtype)
    chosen: Any = method if method not in ("network", "gplws") else network
    stacks = _host_stacks(clock, settings)
    expected = gplws.reconstruct(
        stacks[0].to(clock.device), method=chosen, device=clock.device, z_step_um=1.0
    )
    row = settings.row("stream", method)
    options: Row = {"method": chosen, "device": clock.device, "z_step_um": 1.0}
    rates: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name, run in (
        ("reconstruct", lambda: _one_by_one(stacks, options)),
        *(
            (
                f"stream, {n} in flight",
                lambda n=n: gplws.reconstruct_stream(
                    itertools.cycle(stacks), in_flight=n, **options
                ),
            )
            for n in ((2, 3) if settings.brief else (1, 2, 3, 4))
        ),
    ):
        try:
            rates[name] = _rate(run(), expected, settings.seconds)
        except Exception as failure:  # the others shall be measured all the same
            left_out[name] = reason_of(failure)
            failure.__traceback__ = None
        clock.forget()
    yield {**row, "rates": rates, "seconds": {}, "left_out": left_out}


def _host_stacks(clock: Clock, settings: Settings) -> list[Tensor]:
    """Different stacks of 8 bits, in page-locked memory where there is a GPU."""
    generator = np.random.default_rng(0)
    count = sets_beyond(clock.cache_bytes, math.prod(settings.shape))
    made = []
    for _ in range(count):
        frames = torch.from_numpy(generator.integers(0, 256, settings.shape, np.uint8))
        made.append(frames.pin_memory() if clock.device.type == "cuda" else frames)
    return made


def _one_by_one(stacks: list[Tensor], options: Row) -> Iterator[gplws.Reconstruction]:
    """What a loop over ``reconstruct`` does: to the device, computed, back."""
    for frames in itertools.cycle(stacks):
        begin = time.perf_counter()
        result = gplws.reconstruct(frames.to(options["device"]), **options)
        torch.as_tensor(result.height).cpu()
        result.metadata["seconds"]["latency"] = time.perf_counter() - begin
        yield result


def _rate(
    results: Iterator[gplws.Reconstruction], expected: gplws.Reconstruction, seconds: float
) -> Row:
    """Stacks per second once all is warm, and the spread of their latency."""
    first = torch.as_tensor(next(results).height).cpu()
    error = (first - torch.as_tensor(expected.height).cpu()).abs()
    # Not one bit should differ, but another tile size may round otherwise.
    if not float(error.nan_to_num(0).mean()) < 1e-2:
        raise ValueError(f"heights differ by {float(error.mean()):.2g} frames from reconstruct")
    for _ in range(8):
        next(results)
    latencies: list[float] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(latencies) < 10:
        latencies.append(next(results).metadata["seconds"]["latency"])
    passed = time.perf_counter() - begin
    close = getattr(results, "close", None)
    if close is not None:
        close()
    return {
        "stacks_per_second": len(latencies) / passed,
        "latency_median": quantile(latencies, 0.5),
        "latency_p99": quantile(latencies, 0.99),
        "latency_max": max(latencies),
        "stacks": len(latencies),
        "first_error": float(error.nan_to_num(0).max()),
    }


def copies(clock: Clock, settings: Settings) -> Iterator[Row]:
    """Bytes per second of copies between host and device, which bound any stream."""
    frames = _host_stacks(clock, settings)[0]
    there = torch.empty_like(frames, device=clock.device)
    maps = torch.empty(settings.shape[1:], device=clock.device)
    back = torch.empty(settings.shape[1:], pin_memory=clock.device.type == "cuda")
    runs: dict[str, Run] = {
        "to the device": lambda number: there.copy_(frames, non_blocking=True),
        "to the host": lambda number: back.copy_(maps, non_blocking=True),
    }
    times, left_out = take_turns(clock, runs, sets=1, seconds=settings.seconds)
    found = medians(times)
    yield {
        **settings.row("copies", "copies"),
        "seconds": times,
        "left_out": left_out,
        "to_device_bytes_per_second": frames.numel() / found["to the device"],
        "to_host_bytes_per_second": 4 * maps.numel() / found["to the host"],
    }
