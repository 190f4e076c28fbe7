"""The benchmark for GPUs, rehearsed on the CPU: what it keeps, leaves out, stops and compares."""

import argparse
import contextlib
import gc
import itertools
import json
import math
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from host_clock import HostClock
from networks import small_gplws
from torch import Tensor, nn

from benchmarks import gpu, gpu_parts, plots
from benchmarks.clocks import Clock, CudaClock, sets_beyond, take_turns
from benchmarks.gpu import Unit, Worker, goals, measure
from benchmarks.gpu_parts import Row, Settings, _Compared

PEERS = ("fvnet", "dfvnet", "aifdepthnet", "ddffnet", "defocusnet")


@pytest.fixture(autouse=True)
def settings_of_torch_stay() -> Iterator[None]:
    """The benchmark chooses them for its process."""
    convs, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convs.benchmark, convs.allow_tf32, products.allow_tf32
    yield
    convs.benchmark, convs.allow_tf32, products.allow_tf32 = before


@pytest.fixture
def rehearse(call, tmp_path, monkeypatch) -> Callable[[str], dict]:
    """Measures on the CPU in this process, a small network and shortly; returns the JSON."""
    short = replace(gpu.PACES["quick"], seconds=dict.fromkeys(gpu.PARTS, 0.05))
    monkeypatch.setitem(gpu.PACES, "quick", short)
    monkeypatch.setattr(gpu, "clock_of_this_machine", HostClock)
    monkeypatch.setattr(gpu_parts, "random_gplws", small_gplws)
    monkeypatch.setattr(gpu_parts, "_known_limits", {})
    monkeypatch.setattr(plots, "gpu", lambda path: [])

    def rehearsed(arguments: str) -> dict:
        always = f"--in-this-process --quick --shapes 4x24x32 --out {tmp_path}"
        assert call(gpu, f"{always} {arguments}") == ""
        return json.loads((tmp_path / "gpu.json").read_text())

    return rehearsed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_sentence(call, tmp_path) -> None:
    said = call(gpu, f"--out {tmp_path}")
    assert said.startswith("benchmarks.gpu needs a CUDA GPU: torch ") and said.count("\n") == 0
    assert not list(tmp_path.iterdir())


def test_networks_and_layers_are_compared_timed_and_set_against_the_goals(
    rehearse, monkeypatch, capsys
) -> None:
    def fewer_layers(clock: Clock, settings: Settings) -> list[gpu_parts.OpCase]:
        return [case for case in every_layer(clock, settings) if "12" in case.what]

    every_layer = gpu_parts.conv_cases
    monkeypatch.setitem(gpu_parts.OPS, "group_pointwise_conv3d", fewer_layers)
    found = rehearse("--parts ops network --precision float32")
    network = next(row for row in found["rows"] if row["part"] == "network")
    names = {"gplws", "gplws graph", "eager", "eager graph"}
    assert names <= set(network["seconds"])
    assert {"eager channels_last graph tf32", "eager tf32"} <= set(network["seconds"])
    assert not network["left_out"] and network["errors"]["gplws"] < 1e-5
    layers = {row["case"]: row for row in found["rows"] if row["part"] == "ops"}
    pair = layers["12 channels + pointwise, 4x24x32"]
    assert pair["flop"] == 2 * (12 * 3 * 27 + 12 * 12) * 4 * 24 * 32
    assert pair["bytes"] == 2 * 4 * 12 * 4 * 24 * 32
    assert layers["12 -> 24, down, 4x24x32"]["bytes"] == 4 * (12 * 4 * 24 * 32 + 24 * 4 * 12 * 16)
    search = layers["4x24x32"]
    assert search["what"] == "focus_search" and search["share_of_copy"] > 0
    assert search["bytes"] == 4 * 4 * 24 * 32 + 20 * 24 * 32
    (limit,) = (row for row in found["rows"] if row["part"] == "limits")
    assert limit["flops"] > 0 and limit["bytes_per_second"] > 0
    goals = {goal["what"]: goal for goal in found["goals"]}
    assert goals["network float32"]["reached"] > 0
    assert not found["failed"]
    assert "| network float32" in capsys.readouterr().out
    assert {"gpu", "driver", "cuda"} <= set(found["device"])
    assert found["machine"]["commit"] is None or isinstance(found["machine"]["commit"], str)


def test_stacks_per_second_come_with_their_latency(rehearse) -> None:
    found = rehearse("--parts stream --precision bfloat16")
    copies, row = found["rows"]
    assert copies["to_device_bytes_per_second"] > 0
    assert set(row["rates"]) == {"reconstruct", *(f"stream, {n} in flight" for n in (1, 2, 3, 4))}
    for rate in row["rates"].values():
        assert rate["stacks"] >= 10 and rate["stacks_per_second"] > 0
        assert 0 < rate["latency_median"] <= rate["latency_p99"] <= rate["latency_max"]
    (goal,) = found["goals"]
    assert goal["what"] == "stacks per second, network bfloat16" and goal["goal"] == 200


class Peer(nn.Module):
    """A published network in whose place some candidates fail."""

    def __init__(self, name: str, n_frames: int) -> None:
        super().__init__()
        self.name, self.weight = name, nn.Parameter(torch.ones(1))

    def forward(self, stack: Tensor) -> Tensor:
        if self.name == "fvnet" and stack.is_contiguous(memory_format=torch.channels_last_3d):
            raise torch.OutOfMemoryError("out of memory\nat line 3")
        # Only autocast lets this one go in half precision.
        if self.name == "dfvnet" and self.weight.dtype != torch.float32:
            raise TypeError("no such kernel")
        return (self.weight * stack).sum((1, 2))


def test_a_candidate_that_fails_is_left_out_with_its_reason(rehearse, monkeypatch, capsys) -> None:
    monkeypatch.setattr(gpu_parts, "random_peer", Peer)
    found = rehearse("--parts peers --precision bfloat16 --networks fvnet dfvnet")
    first, second = found["rows"]
    assert set(first["seconds"]) == {"eager", "eager graph", "gplws graph"}
    assert first["left_out"]["eager channels_last"] == "OutOfMemoryError: out of memory"
    assert set(second["seconds"]) >= {"autocast", "autocast channels_last graph"}
    assert second["left_out"]["eager"] == "TypeError: no such kernel"
    assert "OutOfMemoryError: out of memory" in capsys.readouterr().out


def test_results_that_differ_and_runs_that_break_are_named_and_inputs_take_turns() -> None:
    seen: list[int] = []
    order = itertools.count()

    def late(number: int) -> Tensor:
        seen.append(number)
        if next(order) > 5:
            raise RuntimeError("broke while it was timed")
        return torch.tensor([1.0, 2.0])

    compared = _Compared(HostClock(), torch.tensor([1.0, 2.0]), 0.1, 3)
    compared.add("near", lambda: lambda number: torch.tensor([1.1, 2.0]))
    compared.add("far", lambda: lambda number: torch.tensor([1.5, 2.0]))
    compared.add("nan", lambda: lambda number: torch.tensor([math.nan, 2.0]))
    compared.add("late", lambda: late)
    row = compared.row({}, 0.01)
    assert "alone" not in row and list(row["seconds"]) == ["near"]
    left_out = row["left_out"]
    assert left_out["far"].startswith("result differs by 0.25")
    assert left_out["nan"].startswith("result differs by inf")
    assert left_out["late"] == "RuntimeError: broke while it was timed"
    assert seen[2:6] == [0, 1, 2, 0]


def test_inputs_are_so_many_that_the_cache_has_lost_one_when_it_comes_again() -> None:
    assert [sets_beyond(60, 7), sets_beyond(60, 1000), sets_beyond(10**9, 1)] == [10, 2, 256]


class StandIn:
    """Of a part of torch.cuda: whatever it is told, it does nothing."""

    def __init__(self, *given: object, **more: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *given: None


def test_the_inputs_of_a_graph_live_as_long_as_it(monkeypatch) -> None:
    for name in ("Stream", "CUDAGraph", "current_stream", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, StandIn)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *given, **more: contextlib.nullcontext())

    def recorded() -> tuple[Callable[[int], Tensor], weakref.ref]:
        x = torch.ones(3)
        return CudaClock.graph(StandIn(), [lambda: 2 * x]), weakref.ref(x)

    replay, x = recorded()
    gc.collect()
    assert x() is not None
    assert replay(0).tolist() == [2, 2, 2]
    del replay
    gc.collect()
    assert x() is None


@pytest.mark.cuda
def test_a_graph_reads_its_inputs_after_free_memory_was_handed_back() -> None:
    clock = CudaClock()

    def recorded() -> Callable[[int], Tensor]:
        x = torch.ones(2**24, device="cuda")
        return clock.graph([lambda: 2 * x])

    replay = recorded()
    torch.cuda.empty_cache()
    other = torch.zeros(2**24, device="cuda")
    assert float(replay(0).mean()) == 2 and not other.any()
    clock.wait()
    assert not clock.lost()


class FragileClock(HostClock):
    """Its device is lost from a certain call of ``breaks`` on."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.left = last

    def breaks(self, number: int) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("illegal memory access")
        return torch.ones(1)

    def lost(self) -> bool:
        return self.left <= 0


@pytest.mark.parametrize(("last", "expected"), [(1, {}), (5, {}), (15, {"ours": 14, "after": 13})])
def test_the_candidate_that_breaks_the_device_is_named_and_no_other(last, expected) -> None:
    clock = FragileClock(last)
    candidates = {"ours": lambda number: None, "bad": clock.breaks, "after": lambda number: None}
    times, left_out = take_turns(clock, candidates, sets=2, seconds=10.0)
    assert {name: len(values) for name, values in times.items()} == expected
    assert left_out == {"bad": "RuntimeError: illegal memory access"}


@pytest.mark.parametrize(
    ("last", "rounds", "left_out", "alone"),
    [
        (1, 10, {"stock graph": "not tried after stock broke the device"}, ["gplws"]),
        (4, 10, {"stock graph": "not timed before stock broke the device"}, ["gplws"]),
        (30, 27, {}, []),
    ],
    ids=["when it is built", "before it is timed enough", "later"],
)
def test_where_a_stock_candidate_breaks_the_device_the_row_keeps_ours(
    last, rounds, left_out, alone
) -> None:
    clock = FragileClock(last)
    compared = _Compared(clock, torch.ones(1), 0.1, 2)
    compared.add("gplws", lambda: lambda number: torch.ones(1))
    compared.add("gplws far", lambda: lambda number: torch.zeros(1))
    compared.add("stock", lambda: clock.breaks)
    compared.add("stock graph", lambda: lambda number: torch.ones(1))
    row = compared.row({"part": "ops"}, 10.0)
    assert len(row["seconds"]["gplws"]) == rounds
    assert row["left_out"] == {
        "gplws far": "result differs by 1 of the largest value",
        "stock": "RuntimeError: illegal memory access",
        **left_out,
    }
    assert row["alone"] == alone and row["device_lost"] == "stock"


# Rows of an op are numbers here; the process ends, or not, behind the second one.
CHILD = """
import json, os, sys, time
for line in sys.stdin:
    unit = json.loads(line)
    with open(sys.argv[-1], "a") as file:
        def say(**what):
            file.write(json.dumps(what) + "\\n")
            file.flush()
        for number in range(unit["first"], 4):
            how = unit["subject"] if number == 1 else ""
            if how == "raises":
                say(end="ValueError: no")
                break
            if how == "crashes":
                os.abort()
            if how == "hangs":
                time.sleep(60)
            say(row={"part": unit["part"], "number": number, "process": os.getpid()})
            if how == "loses":
                say(lost="")
                os._exit(1)
        else:
            say(end="")
"""


@pytest.fixture
def worker() -> Iterator[Worker]:
    """Runs units in processes of CHILD."""
    made = Worker([sys.executable, "-c", CHILD])
    yield made
    made.close()


def test_a_process_that_crashes_or_hangs_costs_its_own_rows_only(worker) -> None:
    found, processes = {}, {}
    for part in ("ops", "network"):
        for name in ("works", "works again", "raises", "crashes", "loses", "hangs"):
            rows: list[Row] = []
            unit = Unit(part, "bfloat16", (4, 8, 8), 1.0, 30.0, name)
            said = worker(unit, rows.append, 3.0 if name == "hangs" else 30.0)
            found[part, name] = said, [row["number"] for row in rows]
            processes[part, name] = {row["process"] for row in rows}
    assert len(processes["ops", "works"] | processes["ops", "works again"]) == 1
    assert len(processes["ops", "crashes"]) == len(processes["ops", "loses"]) == 2
    assert found == {
        ("ops", "works"): ("", [0, 1, 2, 3]),
        ("ops", "works again"): ("", [0, 1, 2, 3]),
        ("ops", "raises"): ("ValueError: no", [0]),
        ("ops", "crashes"): ("ended with exit status -6", [0, 2, 3]),
        ("ops", "loses"): ("", [0, 1, 2, 3]),
        ("ops", "hangs"): ("stopped after 3 s", [0]),
        ("network", "works"): ("", [0, 1, 2, 3]),
        ("network", "works again"): ("", [0, 1, 2, 3]),
        ("network", "raises"): ("ValueError: no", [0]),
        ("network", "crashes"): ("ended with exit status -6", [0]),
        ("network", "loses"): ("", [0, 1]),
        ("network", "hangs"): ("stopped after 3 s", [0]),
    }


def test_units_get_their_limit_and_none_is_begun_without_time() -> None:
    def runner(unit: Unit, take: Callable[[Row], None], limit: float) -> str:
        take({"limit": limit})
        return "broken" if unit.subject == "broken" else ""

    units = [Unit("peers", "bfloat16", (4, 8, 8), 1.0, 30.0, name) for name in ("broken", "whole")]
    rows: list[Row] = []
    failed = measure(units, runner, 1.0, rows.append)
    assert failed == [{"unit": "peers broken bfloat16 4x8x8", "reason": "broken"}]
    assert [row["limit"] for row in rows] == [30.0, 30.0]
    failed = measure(units, runner, 0.01, rows.append)
    assert [one["reason"] for one in failed] == ["no time left of 0.01 minutes"] * 2
    assert len(rows) == 2


# What the process of a worker does, on the clock of the host and with a small network.
WORK = """
import sys

sys.path += {folders}
import torch
from benchmarks import gpu, gpu_parts
from host_clock import HostClock
from networks import small_gplws

torch.set_num_threads(1)
gpu.clock_of_this_machine, gpu_parts.random_gplws = HostClock, small_gplws
gpu.main()
"""


def test_one_process_measures_unit_after_unit(repository) -> None:
    script = WORK.format(folders=[str(repository), str(repository / "tests")])
    worker = Worker([sys.executable, "-c", script, "--work"])
    found = []
    for part, subject in (("network", ""), ("ops", "fly"), ("ops", "up_conv3d")):
        rows: list[Row] = []
        unit = Unit(part, "float32", (2, 16, 24), 0.01, 60.0, subject, brief=True)
        found.append((worker(unit, rows.append, 60.0), [row["part"] for row in rows]))
    worker.close()
    assert found == [
        ("", ["network"]),
        ("KeyError: 'fly'", ["limits"]),
        ("", ["ops"] * 3),
    ]


def units_of(pace: str, minutes: float, parts: Sequence[str] = gpu.PARTS) -> list[Unit]:
    """What is measured by default."""
    options = argparse.Namespace(
        parts=list(parts),
        shapes=[gpu.SHAPE],
        precision=list(gpu.PRECISIONS),
        networks=list(gpu.PEERS),
        all_peers=False,
        pace=pace,
        minutes=minutes,
        compile=False,
        compile_minutes=gpu.PACES[pace].compile_minutes,
    )
    units = gpu.units_of(options)
    assert len(units) == len(set(units))
    return units


def test_what_the_goals_speak_of_is_measured_first() -> None:
    full, quick, brief = (
        [unit.title for unit in units_of(name, pace.minutes)] for name, pace in gpu.PACES.items()
    )
    names = [title.removesuffix(" 10x512x512") for title in brief]
    assert names == [
        "ops group_pointwise_conv3d bfloat16",
        "ops up_conv3d bfloat16",
        "network bfloat16",
        "compile bfloat16",
        *(f"peers {name} bfloat16" for name in PEERS),
        "stream network bfloat16",
        "ops group_pointwise_conv3d float32",
        "ops focus_search float32",
        "network float32",
        "network float16",
    ]
    for titles in (full, quick):
        assert titles[: len(brief)] == brief and len(titles) > len(brief)
        assert "compile float32 10x512x512" not in titles


def test_torch_compile_gets_what_the_rest_leaves_and_nothing_where_that_is_too_little() -> None:
    def limit(pace: str, minutes: float, parts: Sequence[str] = gpu.PARTS) -> float:
        (found,) = {unit.limit for unit in units_of(pace, minutes, parts) if unit.part == "compile"}
        return found

    assert [limit(name, pace.minutes) for name, pace in gpu.PACES.items()] == [150, 75, 0]
    assert limit("brief", 2.5) == 65
    assert limit("brief", 1.0, ["compile"]) == 75
    (alone,) = units_of("brief", 1.0, ["compile"])
    assert alone.title == "compile bfloat16 10x512x512"


def test_ratios_are_to_the_fastest_stock_candidate_of_any_row() -> None:
    same = {"shape": "10x512x512", "left_out": {}}
    half = {**same, "precision": "bfloat16"}
    exact = {**same, "precision": "float32"}
    network = {"gplws": [9e-4], "gplws graph": [5e-4], "eager": [4e-3], "eager graph": [3e-3]}
    layer = {**half, "part": "ops", "what": "group_pointwise_conv3d", "seconds": {}}
    rows = [
        {**half, "part": "network", "what": "gplws", "seconds": network},
        {
            **half,
            "part": "compile",
            "what": "gplws",
            "seconds": {"gplws graph": [1e-3], "compile max-autotune": [2e-3]},
        },
        {
            **half,
            "part": "peers",
            "what": "fvnet",
            "seconds": {"eager": [9e-3], "autocast": [7e-3]},
        },
        {**half, "part": "peers", "what": "dfvnet", "seconds": {"eager graph": [5e-3]}},
        {**half, "part": "peers", "what": "ddffnet", "seconds": {}},
        {
            **exact,
            "part": "network",
            "what": "gplws",
            "seconds": {"gplws": [1e-3], "eager": [4e-3], "eager tf32": [1.5e-3]},
        },
        {
            **layer,
            "case": "12 channels + pointwise, 10x512x512",
            "share_of_copy": 0.7,
            "share_of_roofline": 0.7,
        },
        {
            **layer,
            "case": "96 channels + pointwise, 10x64x64",
            "share_of_copy": 0.1,
            "share_of_roofline": 0.3,
        },
        {**layer, "case": "12 -> 24, down", "share_of_copy": 0.1, "share_of_roofline": 0.3},
        {
            **half,
            "part": "stream",
            "what": "network",
            "seconds": {},
            "rates": {
                "reconstruct": {"stacks_per_second": 90.0},
                "stream, 3 in flight": {"stacks_per_second": 450.0},
            },
        },
    ]
    found = [
        (one["what"], one["against"], pytest.approx(one["reached"]), one["met"])
        for one in goals(rows)
    ]
    assert found == [
        ("network bfloat16", "stock: compile max-autotune", 2.0, False),
        ("network bfloat16", "DFVNet: eager graph", 10.0, True),
        ("network bfloat16, ms", "absolute", 0.5, True),
        ("network float32", "stock: eager", 4.0, True),
        ("network float32", "stock: eager tf32", 1.5, False),
        (
            "group_pointwise_conv3d bfloat16, 12 channels + pointwise, 10x512x512",
            "share of copy",
            0.7,
            True,
        ),
        (
            "group_pointwise_conv3d bfloat16, 96 channels + pointwise, 10x64x64",
            "share of roofline",
            0.3,
            False,
        ),
        ("stacks per second, network bfloat16", "stream, 3 in flight", 450.0, True),
    ]


def test_networks_and_shares_are_drawn(tmp_path) -> None:
    row = {"precision": "bfloat16", "shape": "10x512x512", "left_out": {}}
    content = {
        "machine": {"torch": "2", "commit": "abc", "date": "today"},
        "device": {"gpu": "Z80", "driver": "1", "cuda": "13"},
        "shape": "10x512x512",
        "rows": [
            {
                **row,
                "part": "network",
                "what": "gplws",
                "seconds": {"gplws": [1.0], "eager": [2.0]},
            },
            {**row, "part": "peers", "what": "fvnet", "seconds": {"eager": [3.0, 4.0]}},
            {
                **row,
                "part": "ops",
                "what": "up_conv3d",
                "case": "24 -> 12",
                "seconds": {},
                "share_of_copy": 0.5,
                "share_of_roofline": 0.6,
            },
        ],
    }
    (tmp_path / "gpu.json").write_text(json.dumps(content))
    drawn = plots.gpu(tmp_path / "gpu.json")
    assert [path.name for path in drawn] == ["gpu_network.png", "gpu_ops.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
