"""The network, its layers and whole reconstructions on a CUDA GPU: against stock torch, and goals.

Each unit of work (a part in one precision, or a published network) runs in a process of its own
with a limit of time: one that crashes, hangs or runs out of memory costs its own rows and no
others. Rows are written to gpu.json as soon as they are measured. By default all ends within 7.5
minutes, the most important units first; what did not come to its turn is named.

torch.compile(mode="max-autotune") takes minutes. By default it is tried for the network in bfloat16
alone, for at most --compile-minutes; --compile tries the other precisions and the published
networks as well, and lifts the limit of the whole to 40 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_parts, plots
from benchmarks.clocks import Clock, CudaClock, reason_of
from benchmarks.gpu_parts import PEERS, Row, Settings
from benchmarks.summary import NAMES_OF_NETWORKS, medians, shape_name, sizes
from benchmarks.timing import save, show

PARTS = ("ops", "network", "stream", "peers", "compile")
PRECISIONS = ("bfloat16", "float32", "float16")
STREAMS = {"network": PRECISIONS, "gplws": ("float32",), "rdf": ("float32",)}
SHAPE = (10, 512, 512)
MINUTES, QUICK_MINUTES, COMPILE_MINUTES = 7.5, 4.0, 40.0
SECONDS = {"ops": 0.6, "network": 4.0, "stream": 1.2, "peers": 2.5, "compile": 4.0}  # for each row
LIMITS = {"ops": 75.0, "network": 90.0, "stream": 60.0, "peers": 60.0}  # s, for each process
LEAST = 10.0  # s, a process with less left is not started
GOALS = {  # of the project, for one H200 at 10 x 512 x 512
    "stock": 4.0,
    "peers": 8.0,
    "milliseconds": 0.8,
    "stock, float32": 3.0,
    "stock with TF32, float32": 2.0,
    "fine layers, of the copy": 0.6,
    "coarse layers, of the roofline": 0.4,
    "focus_search, of the copy": 0.85,
    "stacks per second": 200.0,
}


@dataclass(frozen=True)
class Unit:
    """What one process measures.

    Attributes:
        part: one of PARTS.
        precision: of the row.
        shape: frames, height and width.
        seconds: for the turns of each row, roughly.
        limit: s, for the process.
        subject: published network, or method of the stream.
        compile_: whether a published network is compiled as well.
    """

    part: str
    precision: str
    shape: tuple[int, int, int]
    seconds: float
    limit: float
    subject: str = ""
    compile_: bool = False

    @property
    def title(self) -> str:
        """In one line."""
        names = (self.part, self.subject, self.precision, shape_name(self.shape))
        return " ".join(name for name in names if name)


Runner = Callable[[Unit, Callable[[Row], None], float], str]
"""Measures a unit, hands over its rows one by one, within so many seconds; says what went wrong."""


def clock_of_this_machine() -> Clock:
    """The GPU's.

    Raises:
        SystemExit: there is none.
    """
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = f"torch {torch.__version__} " + (
            f"was built for CUDA {built} but finds no GPU" if built else "was built without CUDA"
        )
        raise SystemExit(f"benchmarks.gpu needs a CUDA GPU: {why}.")
    return CudaClock()


def units_of(options: argparse.Namespace) -> list[Unit]:
    """What is to be measured, the most important first."""
    found: list[Unit] = []
    scale = 0.5 if options.quick else 1.0

    def add(part: str, precision: str, shape: tuple[int, int, int], subject: str = "") -> None:
        if part not in options.parts or precision not in options.precision:
            return
        limit = LIMITS.get(part, 60 * options.compile_minutes)
        also = options.compile and part == "peers"
        limit += 60 * options.compile_minutes if also else 0
        seconds = scale * SECONDS[part]
        unit = Unit(part, precision, shape, seconds, limit, subject, also)
        if unit not in found:
            found.append(unit)

    first = options.shapes[0]
    add("ops", "bfloat16", first)
    add("network", "bfloat16", first)
    add("stream", "bfloat16", first, "network")
    add("ops", "float32", first)
    add("network", "float32", first)
    for name in options.networks:
        add("peers", options.precision[0], first, name)
    if not options.quick or options.compile:
        add("compile", "bfloat16", first)
    for subject in ("gplws", "rdf"):
        add("stream", "float32", first, subject)
    add("network", "float16", first)
    add("ops", "float16", first)
    for shape in options.shapes:
        for precision in options.precision:
            add("network", precision, shape)
            if precision in STREAMS["network"]:
                add("stream", precision, shape, "network")
            if options.compile:
                add("compile", precision, shape)
            if options.all_peers:
                for name in options.networks:
                    add("peers", precision, shape, name)
    return found


def rows_of(clock: Clock, unit: Unit) -> Iterator[Row]:
    """Measure a unit in this process."""
    # Stock torch may choose its fastest kernels, as this package's were chosen.
    torch.backends.cudnn.benchmark = True
    settings = Settings(unit.shape, unit.precision, unit.seconds)
    with torch.inference_mode(unit.part != "stream"):
        if unit.part == "ops":
            yield from gpu_parts.ops(clock, settings)
        elif unit.part == "network":
            yield from gpu_parts.network(clock, settings)
        elif unit.part == "compile":
            yield from gpu_parts.compiled(clock, settings)
        elif unit.part == "peers":
            yield from gpu_parts.peer(clock, settings, unit.subject, compile_=unit.compile_)
        else:
            if unit.subject == "network":
                yield from gpu_parts.copies(clock, settings)
            yield from gpu_parts.stream(clock, settings, unit.subject)


def in_this_process(clock: Clock) -> Runner:
    """A runner that starts no process, and so cannot stop what takes too long."""

    def run(unit: Unit, take: Callable[[Row], None], limit: float) -> str:
        try:
            for row in rows_of(clock, unit):
                take(row)
        except Exception as error:  # the other units shall be measured all the same
            return reason_of(error)
        return ""

    return run


def in_a_process_of_its_own(
    unit: Unit,
    take: Callable[[Row], None],
    limit: float,
    command: Sequence[str] = (sys.executable, "-m", "benchmarks.gpu"),
) -> str:
    """Runs ``command --unit UNIT --rows FILE``, and stops it with all that it started."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.touch()
        arguments = [*command, "--unit", json.dumps(asdict(unit)), "--rows", str(path)]
        root = Path(__file__).resolve().parent.parent
        child = subprocess.Popen(arguments, cwd=root, start_new_session=True)
        deadline = time.monotonic() + limit
        with path.open(encoding="utf-8") as lines:
            pending = ""
            while True:
                code = child.poll()  # before the last look at its rows
                late = code is None and time.monotonic() > deadline
                if late:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
                pending += lines.read()
                *complete, pending = pending.split("\n")
                for line in complete:
                    take(json.loads(line))
                if late:
                    return f"stopped after {limit:.0f} s"
                if code is not None:
                    return "" if code == 0 else f"ended with exit status {code}"
                time.sleep(0.2)


def one_unit(text: str, path: Path) -> None:
    """What the process of a unit does."""
    given = json.loads(text)
    unit = Unit(**{**given, "shape": tuple(given["shape"])})
    clock = clock_of_this_machine()
    with path.open("a", encoding="utf-8") as file:
        for row in rows_of(clock, unit):
            file.write(json.dumps(row) + "\n")
            file.flush()


def measure(
    units: Sequence[Unit], runner: Runner, minutes: float, write: Callable[[Row], None]
) -> list[dict[str, str]]:
    """Measure unit after unit as long as there is time; returns which failed, and why."""
    begin = time.monotonic()
    failed: list[dict[str, str]] = []
    for unit in units:
        left = 60 * minutes - (time.monotonic() - begin)
        if left < LEAST:
            failed.append({"unit": unit.title, "reason": f"no time left of {minutes:g} minutes"})
            continue
        started = time.monotonic()
        reason = runner(unit, write, min(unit.limit, left))
        took = time.monotonic() - started
        print(f"{unit.title}: {reason or 'done'} ({took:.0f} s)", flush=True)
        if reason:
            failed.append({"unit": unit.title, "reason": reason})
    return failed


def _row_of(rows: Sequence[Row], **wanted: Any) -> Row | None:
    """The last row that has these values, as a later run replaces an earlier one."""
    found = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    return found[-1] if found else None


def _best(row: Row | None, *, stock: bool, tf32: bool = False) -> tuple[str, float] | None:
    """Fastest candidate of a row, by name and seconds: of gplws, or of stock torch."""
    if row is None:
        return None
    found = [
        (name, seconds)
        for name, seconds in medians(row["seconds"]).items()
        if name.startswith("gplws") != stock and (tf32 or not name.endswith("tf32"))
    ]
    return min(found, key=lambda pair: pair[1], default=None)


def goals(rows: Sequence[Row], shape: str = shape_name(SHAPE)) -> list[dict[str, Any]]:
    """Each goal, what was reached and against what; goals without figures are left out."""
    found: list[dict[str, Any]] = []

    def add(what: str, goal: float, reached: float, against: str, at_most: bool = False) -> None:
        met = reached <= goal if at_most else reached >= goal
        found.append(
            {"what": what, "against": against, "goal": goal, "reached": reached, "met": met}
        )

    for precision in ("bfloat16", "float16"):
        row = _row_of(rows, part="network", precision=precision, shape=shape)
        ours, theirs = _best(row, stock=False), _best(row, stock=True)
        compiled = _row_of(rows, part="compile", precision=precision, shape=shape)
        ours_beside, fast = _best(compiled, stock=False), _best(compiled, stock=True)
        ratios = []
        if ours and theirs:
            ratios.append((theirs[1] / ours[1], theirs[0]))
        if ours_beside and fast:
            ratios.append((fast[1] / ours_beside[1], fast[0]))
        if ratios:
            ratio, name = min(ratios)
            add(f"network {precision}", GOALS["stock"], ratio, f"stock: {name}")
        if ours:
            peers = [
                (best[1], f"{NAMES_OF_NETWORKS[peer]}: {best[0]}")
                for peer in PEERS
                if (
                    best := _best(
                        _row_of(rows, part="peers", what=peer, precision=precision, shape=shape),
                        stock=True,
                    )
                )
            ]
            if peers:
                seconds, name = min(peers)
                add(f"network {precision}", GOALS["peers"], seconds / ours[1], name)
            limit = GOALS["milliseconds"]
            add(f"network {precision}, ms", limit, 1e3 * ours[1], "absolute", at_most=True)
    row = _row_of(rows, part="network", precision="float32", shape=shape)
    ours = _best(row, stock=False)
    for tf32, key in ((False, "stock, float32"), (True, "stock with TF32, float32")):
        theirs = _best(row, stock=True, tf32=tf32)
        if ours and theirs:
            add("network float32", GOALS[key], theirs[1] / ours[1], f"stock: {theirs[0]}")
    for row in rows:
        if row["part"] != "ops" or row["share_of_copy"] is None:
            continue
        what = f"{row['what']} {row['precision']}, {row['case']}"
        if row["what"] == "focus_search":
            key, share = "focus_search, of the copy", "share_of_copy"
        elif "pointwise," in row["case"] and row["precision"] == "bfloat16":
            fine = row["case"].startswith(("12 ", "24 "))
            key = "fine layers, of the copy" if fine else "coarse layers, of the roofline"
            share = "share_of_copy" if fine else "share_of_roofline"
        else:
            continue
        add(what, GOALS[key], row[share], share.replace("_", " "))
    for row in rows:
        if row["part"] == "stream" and row["shape"] == shape and row["rates"]:
            name, rate = max(row["rates"].items(), key=lambda item: item[1]["stacks_per_second"])
            reached = rate["stacks_per_second"]
            what = f"stacks per second, {row['what']} {row['precision']}"
            add(what, GOALS["stacks per second"], reached, name)
    return found


def report(content: dict[str, Any]) -> None:
    """Tables of all rows, and the goals."""
    rows = content["rows"]
    print("\nlayers: ms, shares of the limits of this run")
    show(
        ["op", "precision", "case", "ms", "stock, ms", "of copy", "of roofline", "bound"],
        [_op_line(row) for row in rows if row["part"] == "ops"],
    )
    for row in rows:
        if row["part"] == "limits":
            print(
                f"{row['precision']}: matrix product {row['flops'] / 1e12:.0f} TFLOP/s, "
                f"copy {row['bytes_per_second'] / 1e12:.2f} TB/s"
            )
    print("\nnetworks: ms of each candidate")
    table = []
    for row in rows:
        if row["part"] in ("network", "compile", "peers"):
            name = f"{NAMES_OF_NETWORKS[row['what']]} {row['precision']} {row['shape']}"
            ordered = sorted(medians(row["seconds"]).items(), key=lambda pair: pair[1])
            table += [[name, what, f"{1e3 * seconds:.3f}"] for what, seconds in ordered]
    show(["network", "candidate", "ms"], table)
    print("\nreconstructions, host to host")
    show(
        ["method", "how", "stacks/s", "latency, ms: median", "99%", "most"],
        [
            [
                f"{row['what']} {row['precision']} {row['shape']}",
                name,
                f"{rate['stacks_per_second']:.0f}",
                *(f"{1e3 * rate[f'latency_{q}']:.2f}" for q in ("median", "p99", "max")),
            ]
            for row in rows
            if row["part"] == "stream"
            for name, rate in row["rates"].items()
        ],
    )
    reasons = [
        [row["part"], f"{row['what']} {row['precision']} {row.get('case', '')}", name, reason]
        for row in rows
        for name, reason in row["left_out"].items()
    ]
    reasons += [["", one["unit"], "all", one["reason"]] for one in content["failed"]]
    if reasons:
        print("\nleft out")
        show(["part", "row", "candidate", "reason"], reasons)
    print("\ngoals")
    show(
        ["what", "against", "reached", "goal", ""],
        [
            [
                one["what"],
                one["against"],
                f"{one['reached']:.3g}",
                f"{one['goal']:.3g}",
                "met" if one["met"] else "missed",
            ]
            for one in content["goals"]
        ],
    )


def _op_line(row: Row) -> list[str]:
    found = medians(row["seconds"])

    def least(ours: bool) -> str:
        values = [v for name, v in found.items() if name.startswith("gplws") == ours]
        return f"{1e3 * min(values):.4f}" if values else ""

    shares = [row["share_of_copy"], row["share_of_roofline"]]
    return [
        row["what"],
        row["precision"],
        row["case"],
        least(True),
        least(False),
        *("" if share is None else f"{100 * share:.0f}%" for share in shares),
        row["bound"],
    ]


def _shape(text: str) -> tuple[int, int, int]:
    try:
        return sizes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected NxHxW, got {text!r}") from error


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shapes", nargs="+", type=_shape, default=[SHAPE], metavar="NxHxW")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS)
    parser.add_argument("--networks", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument(
        "--all-peers", action="store_true", help="published networks in every precision and shape"
    )
    parser.add_argument("--quick", action="store_true", help="half the time, less of everything")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile for all precisions and networks"
    )
    parser.add_argument("--compile-minutes", type=float, default=2.5, help="for each")
    parser.add_argument(
        "--minutes", type=float, help="for all of it; default: 7.5, quick 4, with --compile 40"
    )
    parser.add_argument("--out", type=Path, help="folder of the results; benchmarks/results")
    parser.add_argument("--in-this-process", action="store_true", help="start no processes")
    parser.add_argument("--unit", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.unit is not None:
        one_unit(options.unit, options.rows)
        return
    if options.precision is None:
        options.precision = list(PRECISIONS[:2] if options.quick else PRECISIONS)
    if options.minutes is None:
        options.minutes = QUICK_MINUTES if options.quick else MINUTES
        options.minutes = COMPILE_MINUTES if options.compile else options.minutes
    clock = clock_of_this_machine()
    facts = clock.facts()
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    content: dict[str, Any] = {
        "device": facts,
        "shape": shape_name(options.shapes[0]),
        "rows": [],
        "failed": [],
        "goals": [],
    }

    def write(row: Row | None = None) -> Path:
        if row is not None:
            content["rows"].append(row)
        content["goals"] = goals(content["rows"], content["shape"])
        return save("gpu", content, options.out)

    runner = in_this_process(clock) if options.in_this_process else in_a_process_of_its_own
    units = units_of(options)
    content["failed"] = measure(units, runner, options.minutes, lambda row: write(row) and None)
    path = write()
    report(content)
    drawn = plots.gpu(path)
    print(f"\n{path}", *drawn)


if __name__ == "__main__":
    main()
