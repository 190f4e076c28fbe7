"""Stacks one after the other give what each gives by itself: in order, at once, within bounds."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time

import numpy as np
import pytest
import torch
from networks import randomise_bn
from stacks import textured_stack
from torch import Tensor, nn

import gplws
from gplws import stream
from gplws.alignment import AlignmentError
from gplws.data import FocalStack
from gplws.models import GPLWSNet

MAPS = ("height", "depth_index", "confidence", "valid", "all_in_focus")
ENDS_WITHIN = 20.0  # s, for what would otherwise wait for ever
SMALL = {"widths": (4, 8), "depths": (1, 1), "middle": 1, "decoder_depths": (1,)}


def stacks(count: int = 4, dtype: type = np.uint8, colour: bool = False) -> list[np.ndarray]:
    """Different stacks of 6 x 40 x 48."""
    made = []
    for seed in range(count):
        frames = textured_stack(2.0 + seed / 2, n_frames=6, size=(40, 48), noise=0.005, seed=seed)
        values = frames.clamp(0, 1).numpy()
        if np.dtype(dtype).kind == "u":
            values = values * np.iinfo(dtype).max
        values = np.stack([values, values[:, ::-1], values * 0.5], -1) if colour else values
        made.append(values.astype(dtype))
    return made


def small_network() -> nn.Module:
    return randomise_bn(GPLWSNet(**SMALL)).fuse()


def assert_same(result: gplws.Reconstruction, expected: gplws.Reconstruction) -> None:
    assert (result.units, result.pixel_size_um) == (expected.units, expected.pixel_size_um)
    for name in MAPS:
        got, wanted = getattr(result, name), getattr(expected, name)
        assert type(got) is type(wanted) and got.dtype == wanted.dtype, name
        if isinstance(got, Tensor):
            assert got.device == wanted.device
            got, wanted = got.cpu().numpy(), wanted.cpu().numpy()
        assert np.array_equal(got, wanted, equal_nan=got.dtype.kind == "f"), name


@pytest.mark.parametrize(
    ("dtype", "colour"), [(np.uint8, False), (np.uint16, True), (">f4", False)]
)
@pytest.mark.parametrize("in_flight", [1, 3])
def test_each_result_is_that_of_reconstruct_in_the_order_of_the_stacks(dtype, colour, in_flight):
    given = stacks(4, dtype, colour)
    options = {"z_step_um": 2.0, "pixel_size_um": 0.5, "z_direction": "down", "device": "cpu"}
    found = list(gplws.reconstruct_stream(given, in_flight=in_flight, **options))
    assert [result.metadata["number"] for result in found] == [0, 1, 2, 3]
    for result, frames in zip(found, given, strict=True):
        expected = gplws.reconstruct(frames, **options)
        assert_same(result, expected)
        for key in ("method", "parameters", "source", "versions"):
            assert str(result.metadata[key]) == str(expected.metadata[key])
        seconds = result.metadata["seconds"]
        assert seconds["latency"] >= seconds["reconstruct"] > 0


def test_files_are_read_with_what_they_say_of_themselves(tmp_path):
    import tifffile

    for number, frames in enumerate(stacks(3)):
        tifffile.imwrite(
            tmp_path / f"{number}.tif",
            frames,
            imagej=True,
            metadata={"axes": "ZYX", "spacing": 1.5 + number, "unit": "um"},
        )
    paths = sorted(tmp_path.glob("*.tif"))
    for result, path in zip(gplws.reconstruct_stream(paths, device="cpu"), paths, strict=True):
        assert_same(result, gplws.reconstruct(path, device="cpu"))
        assert result.metadata["source"]["path"] == str(path)


def moved_by(*columns: int) -> gplws.Alignment:
    """Frames of 40 x 48 that are displaced by whole columns."""
    transforms = np.tile(np.eye(2, 3), (len(columns), 1, 1))
    transforms[:, 0, 2] = columns
    count = len(columns)
    return gplws.Alignment(
        "translation", 0, (40, 48), transforms, np.ones(count), np.ones(count, bool)
    )


def test_a_known_alignment_serves_all_stacks(tmp_path):
    given, alignment = stacks(3), moved_by(0, 1, 2, 2, 3, 4)
    options = {"z_step_um": 2.0, "device": "cpu"}
    found = list(gplws.reconstruct_stream(given, align=alignment, **options))
    assert [result.height.shape for result in found] == [(40, 44)] * 3
    for result, frames in zip(found, given, strict=True):
        expected = gplws.reconstruct(frames, align=alignment, **options)
        assert_same(result, expected)
        assert result.metadata["alignment"] == expected.metadata["alignment"]
    found[0].save(tmp_path / "first")
    again = next(gplws.reconstruct_stream(given[:1], align=tmp_path / "first", **options))
    assert_same(again, found[0])


def test_stacks_that_an_alignment_is_not_of_are_an_error_in_place_of_the_result():
    given = stacks(2)
    results = gplws.reconstruct_stream([given[0], given[1][:5]], align=moved_by(*range(6)))
    next(results)
    with pytest.raises(AlignmentError, match="the alignment is of a stack of 6 x 40 x 48"):
        next(results)


def test_a_result_does_not_wait_for_the_stack_after_it():
    taken = threading.Event()

    def camera():
        yield stacks(1)[0]
        assert taken.wait(ENDS_WITHIN)
        yield stacks(1)[0]

    results = gplws.reconstruct_stream(camera(), device="cpu")
    next(results)
    taken.set()
    assert len(list(results)) == 1


def test_the_next_stack_is_read_while_one_is_computed():
    asked = threading.Event()

    class Slow(nn.Module):
        def forward(self, stack: Tensor) -> Tensor:
            assert asked.wait(ENDS_WITHIN)
            return stack[:, 0]

    def camera():
        yield from stacks(1)
        asked.set()
        yield from stacks(1)

    assert len(list(gplws.reconstruct_stream(camera(), method=Slow(), device="cpu"))) == 2


@pytest.mark.parametrize("in_flight", [1, 2, 4])
def test_stacks_are_asked_for_only_as_results_are_taken(in_flight):
    asked = []

    def camera():
        for number in range(9):
            asked.append(number)
            yield stacks(1)[0]

    results = gplws.reconstruct_stream(camera(), device="cpu", in_flight=in_flight)
    assert not asked  # nothing begins before the first result is wanted
    for taken, _ in enumerate(results, 1):
        time.sleep(0.02)  # time for the reading thread to go too far
        assert len(asked) <= taken + in_flight


def test_no_stacks_give_no_results():
    assert list(gplws.reconstruct_stream([], device="cpu")) == []


def threads_of_streams() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "gplws stream"]


def test_leaving_early_ends_the_reading_and_the_stacks_can_be_used_further():
    endless = (stacks(1)[0] for _ in itertools.count())
    for _ in gplws.reconstruct_stream(endless, device="cpu"):
        break
    until = time.monotonic() + ENDS_WITHIN
    while threads_of_streams() and time.monotonic() < until:
        time.sleep(0.01)
    assert not threads_of_streams()
    assert next(gplws.reconstruct_stream(endless, device="cpu")).valid.any()


def broken_after(count: int, error: Exception):
    yield from stacks(count)
    raise error


OTHER_SHAPE = np.zeros((6, 40, 47), np.uint8)


@pytest.mark.parametrize(
    ("last", "error", "message"),
    [
        (OTHER_SHAPE, ValueError, r"stack 2 .* shape \(6, 40, 48\) as the first one, got .*47"),
        (
            np.zeros((6, 40, 48), np.uint16),
            ValueError,
            r"stack 2 .*dtype torch.uint8 .* torch.uint",
        ),
        (np.full((6, 40, 48), np.nan), ValueError, "frames must be finite"),
        ("no/such/folder", FileNotFoundError, "no such file"),
        (3, TypeError, "source must be a path"),
    ],
    ids=["shape", "dtype", "nan", "path", "type"],
)
def test_a_stack_that_cannot_be_used_is_an_error_after_the_results_before_it(last, error, message):
    results = gplws.reconstruct_stream([*stacks(2), last, *stacks(1)], device="cpu")
    assert [next(results).metadata["number"], next(results).metadata["number"]] == [0, 1]
    with pytest.raises(error, match=message):
        next(results)
    assert list(results) == []


def test_falling_positions_that_would_be_turned_over_are_an_error_in_place_of_the_result():
    rising, falling = (
        FocalStack(frames, focus_positions_um=positions)
        for frames, positions in zip(stacks(2), (np.arange(6), np.arange(6)[::-1]), strict=True)
    )
    results = gplws.reconstruct_stream([rising, falling], z_direction="down", device="cpu")
    assert next(results).metadata["number"] == 0
    with pytest.raises(ValueError, match="z_direction must be 'up' where focus_positions_um fall"):
        next(results)


def test_what_the_stacks_raise_is_raised_in_place_of_the_result():
    results = gplws.reconstruct_stream(broken_after(2, OSError("no light")), device="cpu")
    next(results), next(results)
    with pytest.raises(OSError, match="no light"):
        next(results)


def test_an_error_of_the_method_ends_the_stream_and_its_thread():
    results = gplws.reconstruct_stream(stacks(5), method=nn.Identity(), device="cpu")
    with pytest.raises(ValueError, match="Identity must return a focus volume"):
        next(results)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"in_flight": 0}, ValueError, "in_flight must be at least 1, got 0"),
        ({"in_flight": 1.5}, TypeError, "in_flight must be an integer, got float"),
        ({"method": "magic"}, ValueError, "method must be one of"),
        ({"device": "warp"}, ValueError, "device 'warp' cannot be used"),
        ({"z_direction": "left"}, ValueError, "z_direction must be"),
        ({"memory_mb": 0}, ValueError, "memory_mb must be positive"),
        ({"z_step_um": 1.0, "focus_positions_um": [0, 1]}, ValueError, "exclude each other"),
        ({"align": "similarity"}, ValueError, "a known alignment, .* got align='similarity'"),
        ({"align": 3}, TypeError, "align must be a name, a path or an Alignment, got int"),
        ({"align": "nowhere"}, FileNotFoundError, "or a file that exists, got nowhere"),
        ({"stacks": "folder"}, TypeError, "stacks must be an iterable of stacks, got str"),
        ({"stacks": 7}, TypeError, "stacks must be an iterable of stacks, got int"),
    ],
)
def test_a_wrong_argument_is_named_at_once(options, error, message):
    given = {"stacks": [], **options}
    with pytest.raises(error, match=message):
        gplws.reconstruct_stream(given.pop("stacks"), **given)


def test_a_network_is_in_eval_mode_until_the_stream_ends():
    network = nn.Sequential(nn.Identity(), nn.Flatten(1, 2))
    network[1].eval()
    results = gplws.reconstruct_stream(stacks(3), method=network, device="cpu")
    next(results)
    assert not network.training
    results.close()
    assert [part.training for part in network.modules()] == [True, True, False]


class Done:
    """A place in a queue that is always reached."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class QueuesOnTheHost:
    """What a GPU does, in order: its copies are counted, its page-locked memory is plain."""

    device = torch.device("cpu")

    def __init__(self, records: bool = True) -> None:
        self.allocated: list[int] = []
        self.used: list[str] = []
        self.followed: list[str] = []
        self.records = records

    def pinned(self, size: int) -> Tensor:
        self.allocated.append(size)
        return torch.full((size,), 0xFF, dtype=torch.uint8)

    def empty(self, shape, dtype) -> Tensor:
        self.allocated.append(int(np.prod(shape)) * dtype.itemsize)
        return torch.zeros(tuple(shape), dtype=dtype)

    def hand_over(self, tensor: Tensor) -> None:
        pass

    @contextlib.contextmanager
    def after_caller(self):
        self.followed.append(threading.current_thread().name)
        yield

    @contextlib.contextmanager
    def on(self, name: str):
        self.used.append(name)
        yield

    def mark(self) -> Done:
        return Done()

    def wait_for(self, mark: Done) -> None:
        assert isinstance(mark, Done)

    def recorded(self, work):
        if not self.records:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        work()
        return work


@pytest.fixture
def queues(monkeypatch) -> QueuesOnTheHost:
    """Streams take the way over a device."""
    made = QueuesOnTheHost()

    def line(engine, place, z_direction, memory_mb, in_flight):
        return stream._DeviceLine(engine, place, z_direction, memory_mb, in_flight, made)

    monkeypatch.setattr(stream, "_line", line)
    return made


@pytest.mark.parametrize("method", ["rdf", "rr", "network", "gplws"])
def test_over_a_device_each_result_is_that_of_reconstruct(queues, method):
    method = small_network() if method == "network" else method
    given = stacks(4)
    found = list(gplws.reconstruct_stream(given, method=method, z_step_um=2.0, device="cpu"))
    for result, frames in zip(found, given, strict=True):
        expected = gplws.reconstruct(torch.from_numpy(frames), method=method, z_step_um=2.0)
        assert isinstance(result.height, np.ndarray)
        for name in MAPS:
            got, wanted = getattr(result, name), getattr(expected, name).numpy()
            assert got.dtype == wanted.dtype
            assert np.array_equal(got, wanted, equal_nan=got.dtype.kind == "f"), name


@pytest.mark.parametrize(("dtype", "colour"), [(np.uint16, False), (np.uint8, True), (">u2", True)])
def test_over_a_device_frames_keep_their_dtype_and_colour(queues, dtype, colour):
    given = stacks(3, dtype, colour)
    for result, frames in zip(gplws.reconstruct_stream(given, device="cpu"), given, strict=True):
        expected = gplws.reconstruct(frames, device="cpu")
        assert np.array_equal(result.all_in_focus, expected.all_in_focus)
        assert result.all_in_focus.dtype == expected.all_in_focus.dtype
        assert np.allclose(result.height, expected.height, atol=1e-4, equal_nan=True)


def test_over_a_device_positions_may_change_from_stack_to_stack(queues):
    frames = stacks(6)
    positions = [None, [0.0, 1, 2, 3, 4, 5], [0.0, 2, 4, 8, 9, 10], [5.0, 4, 3, 2, 1, 0]]
    positions += [[1e6 + 0.01 * index for index in range(6)], None]
    given = [FocalStack(f, focus_positions_um=p) for f, p in zip(frames, positions, strict=True)]
    method = small_network()
    for result, one in zip(gplws.reconstruct_stream(given, method=method), given, strict=True):
        expected = gplws.reconstruct(one, method=method)
        assert result.units == expected.units
        assert np.allclose(result.height, expected.height, atol=1e-5)
        assert np.allclose(result.depth_index, expected.depth_index, atol=1e-5)


@pytest.mark.parametrize("method", ["rdf", "gplws"])
def test_over_a_device_each_stack_has_its_own_levels(queues, method):
    first, second, third = stacks(3, np.float32)
    given = [first, second * 4095, third - 0.5]
    for result, frames in zip(
        gplws.reconstruct_stream(given, method=method, device="cpu"), given, strict=True
    ):
        expected = gplws.reconstruct(torch.from_numpy(frames), method=method)
        assert np.array_equal(result.height, expected.height.numpy(), equal_nan=True)
        assert result.valid.mean() > 0.9


def test_over_a_device_buffers_are_made_once_and_used_again(queues):
    results = gplws.reconstruct_stream(
        (stacks(1)[0] for _ in range(12)), method=small_network(), in_flight=2, device="cpu"
    )
    kept = [next(results) for _ in range(4)]
    before = len(queues.allocated)
    assert before == 2 * 4  # frames and maps of two stacks, on both sides
    heights = [result.height.copy() for result in kept]
    assert len(list(results)) == 8
    assert len(queues.allocated) == before
    for result, height in zip(kept, heights, strict=True):
        assert np.array_equal(result.height, height)  # not overwritten by later stacks
    assert set(queues.used) == {"upload", "compute", "download"}


def test_over_a_device_results_come_before_the_error_of_a_later_stack(monkeypatch, queues):
    launch, launched = stream._DeviceLine.launch, []

    def failing(line, item):
        launched.append(item.number)
        if item.number == 2:
            raise torch.OutOfMemoryError("no memory for stack 2")
        launch(line, item)
        return lambda: False  # never done before it is waited for

    monkeypatch.setattr(stream._DeviceLine, "launch", failing)
    results = gplws.reconstruct_stream(stacks(5), method=small_network(), device="cpu")
    assert [next(results).metadata["number"], next(results).metadata["number"]] == [0, 1]
    with pytest.raises(torch.OutOfMemoryError, match="stack 2"):
        next(results)
    assert launched == [0, 1, 2]


def test_a_network_that_cannot_be_recorded_runs_without(monkeypatch, queues, caplog):
    queues.records = False
    method = small_network()
    given = stacks(3)
    with caplog.at_level(logging.WARNING, "gplws"):
        found = list(gplws.reconstruct_stream(given, method=method, device="cpu"))
    assert "GPLWSNet runs without a CUDA graph: operation not permitted" in caplog.text
    assert len(caplog.records) == 1
    for result, frames in zip(found, given, strict=True):
        expected = gplws.reconstruct(frames, method=method, device="cpu")
        assert np.array_equal(result.height, expected.height)


def test_over_a_device_the_reading_thread_follows_the_queue_of_the_caller(queues):
    list(gplws.reconstruct_stream(stacks(2), device="cpu"))
    assert queues.followed == ["gplws stream"]


def test_a_tensor_comes_back_as_tensors_that_can_be_changed(queues):
    given = [torch.from_numpy(frames) for frames in stacks(2)]
    for result in gplws.reconstruct_stream(given, method=small_network(), device="cpu"):
        assert isinstance(result.height, Tensor)
        result.height.add_(1)  # tensors of inference mode would refuse it
        result.confidence.add_(1)


cuda = pytest.mark.cuda


@cuda
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("method", ["rdf", "network", "gplws"])
def test_on_a_gpu_each_result_is_that_of_reconstruct_there(method, dtype):
    method = small_network().cuda() if method == "network" else method
    given = stacks(7, dtype)
    found = list(gplws.reconstruct_stream(given, method=method, z_step_um=2.0, device="cuda"))
    for result, frames in zip(found, given, strict=True):
        expected = gplws.reconstruct(torch.from_numpy(frames).cuda(), method=method, z_step_um=2.0)
        for name in MAPS:
            got, wanted = getattr(result, name), getattr(expected, name).cpu().numpy()
            assert np.array_equal(got, wanted, equal_nan=got.dtype.kind == "f"), name


@cuda
def test_on_a_gpu_pinned_frames_and_frames_on_the_gpu_are_taken_from_where_they_are():
    method = small_network().cuda()
    arrays = stacks(5)
    expected = [gplws.reconstruct(a, method=method, device="cuda").height for a in arrays]
    for given in (
        [torch.from_numpy(frames).pin_memory() for frames in arrays],
        [torch.from_numpy(frames).cuda() for frames in arrays],
    ):
        results = gplws.reconstruct_stream(given, method=method, device="cuda")
        for result, frames, height in zip(results, given, expected, strict=True):
            assert result.height.device == frames.device
            assert np.allclose(result.height.cpu().numpy(), height, atol=1e-3, equal_nan=True)


@cuda
def test_on_a_gpu_frames_are_awaited_on_the_stream_that_made_them():
    """Also where results are taken on another one."""
    method, arrays = small_network().cuda(), stacks(4)
    expected = [gplws.reconstruct(a, method=method, device="cuda").height for a in arrays]

    def made():
        for frames in arrays:
            late = torch.zeros(frames.shape, dtype=torch.uint8, device="cuda")
            torch.cuda._sleep(100_000_000)
            yield late.copy_(torch.from_numpy(frames).cuda())

    results = gplws.reconstruct_stream(made(), method=method, device="cuda")
    found = [next(results)]
    with torch.cuda.stream(torch.cuda.Stream()):
        found += list(results)
    for result, height in zip(found, expected, strict=True):
        assert np.allclose(result.height.cpu().numpy(), height, atol=1e-3, equal_nan=True)


@cuda
def test_on_a_gpu_a_network_is_replayed_as_one_graph(monkeypatch):
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda self: (replays.append(self), replay(self))[1]
    )
    method = small_network().cuda()
    assert len(list(gplws.reconstruct_stream(stacks(6), method=method, device="cuda"))) == 6
    assert len(replays) == 6 and len(set(map(id, replays))) == 1


@cuda
def test_on_a_gpu_a_network_that_asks_the_host_runs_without_a_graph(caplog):
    class Asks(nn.Module):
        def forward(self, stack: Tensor) -> Tensor:
            return stack[:, 0] / max(float(stack.max()), 1e-3)

    given = stacks(4)
    with caplog.at_level(logging.WARNING, "gplws"):
        found = list(gplws.reconstruct_stream(given, method=Asks(), device="cuda"))
    assert "Asks runs without a CUDA graph" in caplog.text
    for result, frames in zip(found, given, strict=True):
        expected = gplws.reconstruct(frames, method=Asks(), device="cuda")
        assert np.allclose(result.height, expected.height, atol=1e-3)
    torch.cuda.synchronize()  # nothing broken is left behind
    assert float(torch.ones(3, device="cuda").sum()) == 3
    side = torch.cuda.Stream()
    reserved = []
    for _ in range(20):  # memory that two streams used comes back
        torch.empty(64 << 20, dtype=torch.uint8, device="cuda").record_stream(side)
        torch.cuda.synchronize()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] == reserved[3]


@cuda
def test_on_a_gpu_memory_does_not_grow():
    method = small_network().cuda()
    levels = []
    for number, _ in enumerate(
        gplws.reconstruct_stream((stacks(1)[0] for _ in range(60)), method=method, device="cuda")
    ):
        if number in (10, 59):
            levels.append(torch.cuda.memory_reserved())
    assert levels[0] == levels[1]
