"""The benchmark for GPUs, rehearsed on the CPU: what it keeps, leaves out, stops and compares."""

import json
from pathlib import Path

import pytest
from repository_runs import run, run_main

PEERS = ("fvnet", "dfvnet", "aifdepthnet", "ddffnet", "defocusnet")
CUDA_OF_TORCH = "import torch; print(torch.cuda.is_available())"

# The clock of the host in the place of the GPU's; small candidates in the place of slow ones.
REHEARSED = """
import torch
from benchmarks.clocks import HostClock
module.clock_of_this_machine = HostClock
module.plots.gpu = lambda path: []
"""


def rehearse(repository: Path, folder: Path, arguments: str, before: str = "") -> dict:
    """The JSON of a run on the CPU in one process."""
    ended, ends = run_main(
        repository,
        "benchmarks.gpu",
        f"--in-this-process --quick --shapes 4x24x32 --out {folder} {arguments}",
        before=REHEARSED + before,
    )
    assert ends == [""], ended.stderr
    found = json.loads((folder / "gpu.json").read_text())
    found["printed"] = ended.stdout
    return found


def test_without_a_gpu_it_says_so_in_one_sentence(repository, tmp_path) -> None:
    if run(repository, "-c", CUDA_OF_TORCH).stdout.strip() == "True":
        pytest.skip("there is a GPU")
    _, ends = run_main(repository, "benchmarks.gpu", f"--out {tmp_path}")
    (said,) = ends
    assert said.startswith("benchmarks.gpu needs a CUDA GPU: torch ") and said.count("\n") == 0
    assert not list(tmp_path.iterdir())


FEWER_LAYERS = """
from benchmarks import gpu_parts
every = gpu_parts.conv_cases
gpu_parts.conv_cases = lambda *given: [case for case in every(*given) if "12" in case.what]
"""


def test_networks_and_layers_are_compared_timed_and_set_against_the_goals(
    repository, tmp_path
) -> None:
    found = rehearse(repository, tmp_path, "--parts ops network --precision float32", FEWER_LAYERS)
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
    assert "| network float32" in found["printed"]
    assert {"gpu", "driver", "cuda"} <= set(found["device"])
    assert found["machine"]["commit"] is None or isinstance(found["machine"]["commit"], str)


def test_stacks_per_second_come_with_their_latency(repository, tmp_path) -> None:
    found = rehearse(repository, tmp_path, "--parts stream --precision bfloat16")
    copies, row = found["rows"]
    assert copies["to_device_bytes_per_second"] > 0
    assert set(row["rates"]) == {"reconstruct", *(f"stream, {n} in flight" for n in (1, 2, 3, 4))}
    for rate in row["rates"].values():
        assert rate["stacks"] >= 10 and rate["stacks_per_second"] > 0
        assert 0 < rate["latency_median"] <= rate["latency_p99"] <= rate["latency_max"]
    (goal,) = found["goals"]
    assert goal["what"] == "stacks per second, network bfloat16" and goal["goal"] == 200


BROKEN_PEERS = """
from benchmarks import gpu_parts


class Peer(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name, self.weight = name, torch.nn.Parameter(torch.ones(1))

    def forward(self, stack):
        if self.name == "fvnet" and stack.is_contiguous(memory_format=torch.channels_last_3d):
            raise torch.OutOfMemoryError("out of memory\\nat line 3")
        # Only autocast lets this one go in half precision.
        if self.name == "dfvnet" and self.weight.dtype != torch.float32:
            raise TypeError("no such kernel")
        return (self.weight * stack).sum((1, 2))


gpu_parts.random_peer = lambda name, frames: Peer(name)
"""


def test_a_candidate_that_fails_is_left_out_with_its_reason(repository, tmp_path) -> None:
    found = rehearse(
        repository,
        tmp_path,
        "--parts peers --precision bfloat16 --networks fvnet dfvnet",
        BROKEN_PEERS,
    )
    first, second = found["rows"]
    assert set(first["seconds"]) == {"eager", "eager graph", "gplws graph"}
    assert first["left_out"]["eager channels_last"] == "OutOfMemoryError: out of memory"
    assert set(second["seconds"]) >= {"autocast", "autocast channels_last graph"}
    assert second["left_out"]["eager"] == "TypeError: no such kernel"
    assert "OutOfMemoryError: out of memory" in found["printed"]


COMPARED = """
import itertools, json, math, torch
from benchmarks.clocks import HostClock, sets_beyond, take_turns
from benchmarks.gpu_parts import _Compared

clock = HostClock()
compared = _Compared(clock, torch.tensor([1.0, 2.0]), 0.1, 3)
compared.add("near", lambda: lambda number: torch.tensor([1.1, 2.0]))
compared.add("far", lambda: lambda number: torch.tensor([1.5, 2.0]))
compared.add("nan", lambda: lambda number: torch.tensor([math.nan, 2.0]))
seen, order = [], itertools.count()


def late(number):
    seen.append(number)
    if next(order) > 5:
        raise RuntimeError("broke while it was timed")
    return torch.tensor([1.0, 2.0])


compared.add("late", lambda: late)
row = compared.row({}, 0.01)
assert "alone" not in row
print(json.dumps([row["left_out"], list(row["seconds"]), seen[2:6], sets_beyond(60, 7),
                  sets_beyond(60, 1000), sets_beyond(10**9, 1)]))
"""


def test_results_that_differ_and_runs_that_break_are_named_and_inputs_take_turns(
    repository,
) -> None:
    ended = run(repository, "-c", COMPARED)
    assert ended.returncode == 0, ended.stderr
    left_out, timed, seen, several, two, most = json.loads(ended.stdout)
    assert timed == ["near"]
    assert left_out["far"].startswith("result differs by 0.25")
    assert left_out["nan"].startswith("result differs by inf")
    assert left_out["late"] == "RuntimeError: broke while it was timed"
    assert seen == [0, 1, 2, 0]
    assert (several, two, most) == (10, 2, 256)


GRAPH = """
import contextlib, gc, weakref
import torch
from benchmarks.clocks import CudaClock


class StandIn:
    def __init__(self, *given, **more):
        pass

    def __getattr__(self, name):
        return lambda *given: None


torch.cuda.Stream = torch.cuda.CUDAGraph = StandIn
for name in ("current_stream", "graph_pool_handle"):
    setattr(torch.cuda, name, StandIn)
for name in ("stream", "graph"):
    setattr(torch.cuda, name, lambda *given, **more: contextlib.nullcontext())


def recorded():
    x = torch.ones(3)
    return CudaClock.graph(None, [lambda: 2 * x]), weakref.ref(x)


replay, x = recorded()
gc.collect()
assert x() is not None
assert replay(0).tolist() == [2, 2, 2]
del replay
gc.collect()
assert x() is None
"""


def test_the_inputs_of_a_graph_live_as_long_as_it(repository) -> None:
    ended = run(repository, "-c", GRAPH)
    assert ended.returncode == 0, ended.stderr


FREED = """
import torch
from benchmarks.clocks import CudaClock

clock = CudaClock()


def recorded():
    x = torch.ones(2**24, device="cuda")
    return clock.graph([lambda: 2 * x])


replay = recorded()
torch.cuda.empty_cache()
other = torch.zeros(2**24, device="cuda")
assert float(replay(0).mean()) == 2
clock.wait()
assert not clock.lost()
"""


@pytest.mark.cuda
def test_a_graph_reads_its_inputs_after_free_memory_was_handed_back(repository) -> None:
    ended = run(repository, "-c", FREED)
    assert ended.returncode == 0, ended.stderr


LOST = """
import json, torch
from benchmarks.clocks import HostClock, take_turns


class Clock(HostClock):
    broken = False

    def lost(self):
        return self.broken


clock = Clock()


def breaks(number):
    breaks.turns += 1
    if breaks.turns == breaks.last:
        clock.broken = True
        raise RuntimeError("illegal memory access")


found = []
for breaks.last in (1, 5, 15):
    breaks.turns, clock.broken = 0, False
    candidates = {"ours": lambda number: None, "bad": breaks, "after": lambda number: None}
    times, left_out = take_turns(clock, candidates, sets=2, seconds=10.0)
    found.append([{name: len(values) for name, values in times.items()}, left_out])
print(json.dumps(found))
"""


def test_the_candidate_that_breaks_the_device_is_named_and_no_other(repository) -> None:
    ended = run(repository, "-c", LOST)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    named = {"bad": "RuntimeError: illegal memory access"}
    assert found == [[{}, named], [{}, named], [{"ours": 14, "after": 13}, named]]


ALONE = """
import json, torch
from benchmarks.clocks import HostClock
from benchmarks.gpu_parts import _Compared


class Clock(HostClock):
    broken = False

    def lost(self):
        return self.broken


def breaks(number):
    breaks.left -= 1
    if breaks.left == 0:
        clock.broken = True
        raise RuntimeError("illegal memory access")
    return torch.ones(1)


found = []
for breaks.left in (1, 4, 30):  # built, timed for some rounds, timed for enough of them
    clock = Clock()
    compared = _Compared(clock, torch.ones(1), 0.1, 2)
    for name, run in {
        "gplws": lambda number: torch.ones(1),
        "gplws far": lambda number: torch.zeros(1),
        "stock": breaks,
        "stock graph": lambda number: torch.ones(1),
    }.items():
        compared.add(name, lambda run=run: run)
    row = compared.row({"part": "ops"}, 10.0)
    found.append([len(row["seconds"].get("gplws", [])), row["left_out"], row["alone"],
                  row["device_lost"]])
print(json.dumps(found))
"""


def test_where_a_stock_candidate_breaks_the_device_the_row_keeps_ours(repository) -> None:
    ended = run(repository, "-c", ALONE)
    assert ended.returncode == 0, ended.stderr
    built, early, late = json.loads(ended.stdout)
    broke = {
        "gplws far": "result differs by 1 of the largest value",
        "stock": "RuntimeError: illegal memory access",
    }
    untried = "not tried after stock broke the device"
    assert built == [10, {**broke, "stock graph": untried}, ["gplws"], "stock"]
    untimed = "not timed before stock broke the device"
    assert early == [10, {**broke, "stock graph": untimed}, ["gplws"], "stock"]
    assert late == [27, broke, [], "stock"]


RUNNER = """
import json, sys, time
from benchmarks.gpu import Unit, Worker, measure

# Rows of an op are numbers here; the process ends, or not, behind the second one.
child = '''
import json, os, sys, time
for line in sys.stdin:
    unit = json.loads(line)
    with open(sys.argv[-1], "a") as file:
        def say(**what):
            file.write(json.dumps(what) + "\\\\n")
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
'''
worker = Worker([sys.executable, "-c", child])
found = {}
for part in ("ops", "network"):
    for name in ("works", "works again", "raises", "crashes", "loses", "hangs"):
        rows = []
        unit = Unit(part, "bfloat16", (4, 8, 8), 1.0, 30.0, name)
        said = worker(unit, rows.append, 3.0 if name == "hangs" else 30.0)
        numbers = [row["number"] for row in rows]
        found[f"{part} {name}"] = [said, numbers, [row["process"] for row in rows]]
worker.close()


def runner(unit, take, limit):
    take({"limit": limit})
    return "broken" if unit.subject == "broken" else ""


units = [Unit("peers", "bfloat16", (4, 8, 8), 1.0, 30.0, name) for name in ("broken", "whole")]
rows = []
found["measured"] = [measure(units, runner, 1.0, rows.append), rows]
found["no time"] = [measure(units, runner, 0.01, rows.append), rows[2:]]
print(json.dumps(found))
"""


def test_a_process_that_crashes_or_hangs_costs_its_own_rows_only(repository) -> None:
    ended = run(repository, "-c", RUNNER)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    failed, rows = found.pop("measured")
    assert failed == [{"unit": "peers broken bfloat16 4x8x8", "reason": "broken"}]
    assert [row["limit"] for row in rows] == [30.0, 30.0]
    failed, rows = found.pop("no time")
    assert [one["reason"] for one in failed] == ["no time left of 0.01 minutes"] * 2 and not rows
    processes = {name: ids for name, (*_, ids) in found.items()}
    assert len({*processes["ops works"], *processes["ops works again"]}) == 1
    assert len({*processes["ops crashes"]}) == len({*processes["ops loses"]}) == 2
    assert {name: given[:2] for name, given in found.items()} == {
        "ops works": ["", [0, 1, 2, 3]],
        "ops works again": ["", [0, 1, 2, 3]],
        "ops raises": ["ValueError: no", [0]],
        "ops crashes": ["ended with exit status -6", [0, 2, 3]],
        "ops loses": ["", [0, 1, 2, 3]],
        "ops hangs": ["stopped after 3 s", [0]],
        "network works": ["", [0, 1, 2, 3]],
        "network works again": ["", [0, 1, 2, 3]],
        "network raises": ["ValueError: no", [0]],
        "network crashes": ["ended with exit status -6", [0]],
        "network loses": ["", [0, 1]],
        "network hangs": ["stopped after 3 s", [0]],
    }


WORKS = """
import json, sys
import benchmarks.gpu as gpu
from benchmarks.clocks import HostClock

if "--work" in sys.argv:
    gpu.clock_of_this_machine = HostClock
    gpu.main()
    sys.exit()
worker = gpu.Worker([sys.executable, __file__, "--work"])
found = []
for part, subject in (("network", ""), ("ops", "fly"), ("ops", "up_conv3d")):
    rows = []
    unit = gpu.Unit(part, "float32", (2, 16, 24), 0.01, 60.0, subject, brief=True)
    found.append([worker(unit, rows.append, 60.0), [row["part"] for row in rows]])
worker.close()
print(json.dumps(found))
"""


def test_one_process_measures_unit_after_unit(repository, tmp_path) -> None:
    script = tmp_path / "works.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(repository)!r})\n{WORKS}")
    ended = run(repository, str(script))
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1]) == [
        ["", ["network"]],
        ["KeyError: 'fly'", ["limits"]],
        ["", ["ops"] * 3],
    ]


UNITS = """
import argparse, json, sys
import benchmarks.gpu as gpu


def titles(pace, minutes, **more):
    options = argparse.Namespace(**{**dict(
        parts=list(gpu.PARTS), shapes=[gpu.SHAPE], precision=list(gpu.PRECISIONS),
        networks=list(gpu.PEERS), all_peers=False, pace=pace, minutes=minutes, compile=False,
        compile_minutes=gpu.PACES[pace].compile_minutes), **more})
    units = gpu.units_of(options)
    assert len(units) == len(set(units))
    (limit,) = {unit.limit for unit in units if unit.part == "compile" and unit.shape == gpu.SHAPE
                and unit.precision == "bfloat16"} or {None}
    return [limit, [unit.title for unit in units]]


print(json.dumps([titles(pace, pace_of.minutes) for pace, pace_of in gpu.PACES.items()]
                 + [titles("brief", 2.5), titles("brief", 1.0, parts=["compile"])]))
"""


def test_what_the_goals_speak_of_is_measured_first(repository) -> None:
    ended = run(repository, "-c", UNITS)
    assert ended.returncode == 0, ended.stderr
    full, quick, brief, longer, alone = json.loads(ended.stdout)
    names = [title.removesuffix(" 10x512x512") for title in brief[1]]
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
    for _, titles in (full, quick):
        assert titles[: len(brief[1])] == brief[1] and len(titles) > len(brief[1])
        assert "compile float32 10x512x512" not in titles
    # torch.compile gets what the rest leaves, and nothing where that is too little.
    assert [given[0] for given in (full, quick, brief, longer)] == [150, 75, 0, 65]
    assert alone == [75, ["compile bfloat16 10x512x512"]]


GOALS = """
import json, sys
from benchmarks.gpu import goals
print(json.dumps(goals(json.load(sys.stdin))))
"""


def test_ratios_are_to_the_fastest_stock_candidate_of_any_row(repository) -> None:
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
    ended = run(repository, "-c", GOALS, given=json.dumps(rows))
    assert ended.returncode == 0, ended.stderr
    found = [
        (one["what"], one["against"], pytest.approx(one["reached"]), one["met"])
        for one in json.loads(ended.stdout)
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


PICTURES = """
import json, sys
from pathlib import Path
from benchmarks import plots
print(json.dumps([str(path) for path in plots.gpu(Path(sys.argv[1]))]))
"""


def test_networks_and_shares_are_drawn(repository, tmp_path) -> None:
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
    ended = run(repository, "-c", PICTURES, str(tmp_path / "gpu.json"))
    assert ended.returncode == 0, ended.stderr
    drawn = [Path(path) for path in json.loads(ended.stdout)]
    assert [path.name for path in drawn] == ["gpu_network.png", "gpu_ops.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
