"""The network, its layers and whole reconstructions on a CUDA GPU: against stock torch, and goals.

A process measures unit after unit (an op or the network in one precision, a published network, a
stream), each within a limit of time. Where one crashes, hangs or breaks the device, another process
goes on behind it: it costs its own rows and no others. Rows are written to gpu.json as soon as they
are measured. By default all ends within 7.5 minutes, with --quick within 4, with --brief within 100
seconds, the most important units first; what did not come to its turn is named.

torch.compile(mode="max-autotune") takes a minute or more. It is tried for the network in bfloat16
alone, in a process of its own, as long as --minutes leaves time for the rest; --compile tries the
other precisions and the published networks as well, and lifts the limit of the whole to 40 minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
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
SECONDS = {"ops": 0.6, "network": 4.0, "stream": 1.2, "peers": 2.5, "compile": 4.0}  # for each row
QUICK_SECONDS = {part: seconds / 2 for part, seconds in SECONDS.items()}
BRIEF_SECONDS = {"ops": 0.25, "network": 1.0, "stream": 0.4, "peers": 1.0, "compile": 1.0}
LIMITS = {"ops": 60.0, "network": 60.0, "stream": 60.0, "peers": 60.0}  # s, for each unit
LEAST = 10.0  # s, a unit with less left is not begun
ENDS = 7.0  # s, for the start of this process and the pictures
LEAST_COMPILE = 30.0  # s, torch.compile is not tried in less
TRIES = 5  # processes for one unit of layers


@dataclass(frozen=True)
class Pace:
    """How much of everything.

    Attributes:
        seconds: for the turns of each row of a part, roughly.
        minutes: for all of it.
        compile_minutes: at most, for each torch.compile.
        rest: s, for all but torch.compile, which gets no more than what is left.
    """

    seconds: dict[str, float]
    minutes: float
    compile_minutes: float
    rest: float


PACES = {
    "full": Pace(SECONDS, 7.5, 2.5, 240.0),
    "quick": Pace(QUICK_SECONDS, 4.0, 1.25, 150.0),
    "brief": Pace(BRIEF_SECONDS, 100 / 60, 1.25, 85.0),
}
COMPILE_MINUTES = 40.0

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
        subject: op, published network, or method of the stream.
        compile_: whether a published network is compiled as well.
        brief: only candidates that may be the fastest of their kind.
        first: row to begin with, of an op.
    """

    part: str
    precision: str
    shape: tuple[int, int, int]
    seconds: float
    limit: float
    subject: str = ""
    compile_: bool = False
    brief: bool = False
    first: int = 0

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
    pace = PACES[options.pace]
    compile_limit = 60 * options.compile_minutes
    if not options.compile and set(options.parts) != {"compile"}:
        compile_limit = min(compile_limit, 60 * options.minutes - pace.rest)
        compile_limit = 0.0 if compile_limit < LEAST_COMPILE else compile_limit
    brief = options.pace == "brief"

    def add(part: str, precision: str, shape: tuple[int, int, int], subject: str = "") -> None:
        if part not in options.parts or precision not in options.precision:
            return
        limit = LIMITS.get(part, compile_limit)
        also = options.compile and part == "peers"
        limit += compile_limit if also else 0
        unit = Unit(part, precision, shape, pace.seconds[part], limit, subject, also, brief)
        if unit not in found:
            found.append(unit)

    first = options.shapes[0]
    add("ops", "bfloat16", first, "group_pointwise_conv3d")
    add("ops", "bfloat16", first, "up_conv3d")
    add("network", "bfloat16", first)
    add("compile", "bfloat16", first)
    for name in options.networks:
        add("peers", options.precision[0], first, name)
    add("stream", "bfloat16", first, "network")
    add("ops", "float32", first, "group_pointwise_conv3d")
    add("ops", "float32", first, "focus_search")
    add("network", "float32", first)
    add("network", "float16", first)
    if not brief:
        add("ops", "float32", first, "up_conv3d")
        for subject in ("gplws", "rdf"):
            add("stream", "float32", first, subject)
    if options.pace == "full":
        add("ops", "float16", first, "group_pointwise_conv3d")
        add("ops", "float16", first, "up_conv3d")
    for shape in options.shapes[1:] if brief else options.shapes:
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


class DeviceLostError(RuntimeError):
    """A candidate of the row before broke the device for this process."""


def rows_of(clock: Clock, unit: Unit) -> Iterator[Row]:
    """Measure a unit in this process.

    Raises:
        DeviceLostError: after a row that broke the device.
    """
    # Stock torch may choose its fastest kernels, as this package's were chosen.
    torch.backends.cudnn.benchmark = True
    with torch.inference_mode(unit.part != "stream"):
        for row in _rows_of(clock, unit):
            yield row
            if row.get("device_lost"):
                raise DeviceLostError(f"{row['device_lost']} broke the device")


def _rows_of(clock: Clock, unit: Unit) -> Iterator[Row]:
    settings = Settings(unit.shape, unit.precision, unit.seconds, unit.brief)
    if unit.part == "ops":
        yield from gpu_parts.ops(clock, settings, unit.subject, unit.first)
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


class Worker:
    """A runner: units in one other process, and in a new one where that ended.

    The process is given units as lines of its input. It appends lines to a file: each row as soon
    as it is measured, and behind the last one that the unit ended, or that the device is lost.
    """

    def __init__(
        self, command: Sequence[str] = (sys.executable, "-m", "benchmarks.gpu", "--work")
    ) -> None:
        self._command = command
        self._child: subprocess.Popen[str] | None = None
        self._folder = tempfile.TemporaryDirectory()
        self._path = Path(self._folder.name) / "rows.jsonl"
        self._read = 0

    def start(self) -> None:
        """Start the process, unless it runs."""
        if self._child is not None and self._child.poll() is None:
            return
        self._path.write_text("", encoding="utf-8")
        self._read = 0
        root = Path(__file__).resolve().parent.parent
        self._child = subprocess.Popen(
            [*self._command, str(self._path)],
            cwd=root,
            start_new_session=True,
            stdin=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        """End the process."""
        self._stop()
        self._folder.cleanup()

    def __call__(self, unit: Unit, take: Callable[[Row], None], limit: float) -> str:
        deadline = time.monotonic() + limit
        reasons = []
        for _ in range(TRIES):
            rows, end, reason = self._measure(unit, take, deadline)
            if reason:
                reasons.append(reason)
            if end == "late":
                reasons.append(f"stopped after {limit:.0f} s")
            if end in ("end", "late") or unit.part != "ops":
                break
            # The layers after the one that broke the process are measured by the next one. A row
            # that names what broke the device is there already.
            unit = replace(unit, first=unit.first + rows + (1 if reason else 0))
        return "; ".join(reasons)

    def _measure(
        self, unit: Unit, take: Callable[[Row], None], deadline: float
    ) -> tuple[int, str, str]:
        """Number of the layers that were measured, how it ended, and what went wrong."""
        self.start()
        assert self._child is not None and self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its exit status says what there is to say
            self._child.stdin.write(json.dumps(asdict(unit)) + "\n")
            self._child.stdin.flush()
        layers = 0
        while True:
            code = self._child.poll()  # before the last look at its rows
            late = code is None and time.monotonic() > deadline
            if late:
                self._stop()
            for said in self._lines():
                if "row" in said:
                    layers += said["row"]["part"] == "ops"
                    take(said["row"])
                else:
                    ((end, reason),) = said.items()
                    if end == "lost":
                        self._stop()
                    return layers, end, reason
            if late:
                return layers, "late", ""
            if code is not None:
                return layers, "ended", f"ended with exit status {code}"
            time.sleep(0.05)

    def _lines(self) -> list[dict[str, Any]]:
        """What the process has said since the last call."""
        with self._path.open("rb") as file:
            file.seek(self._read)
            complete, newline, _ = file.read().rpartition(b"\n")
        self._read += len(complete) + len(newline)
        return [json.loads(line) for line in complete.splitlines()]

    def _stop(self) -> None:
        """The process, and all that it started."""
        if self._child is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        if self._child.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._child.stdin.close()
        self._child = None


class Workers:
    """A runner: one process for all units, and one of its own for each that compiles."""

    def __init__(self) -> None:
        self._shared = Worker()
        self._shared.start()

    def __call__(self, unit: Unit, take: Callable[[Row], None], limit: float) -> str:
        if unit.part != "compile" and not unit.compile_:
            return self._shared(unit, take, limit)
        own = Worker()
        try:
            return own(unit, take, limit)
        finally:
            own.close()

    def close(self) -> None:
        """End the process."""
        self._shared.close()


def work(path: Path) -> None:
    """What the process of a worker does."""
    clock = clock_of_this_machine()
    with path.open("a", encoding="utf-8") as file:

        def say(what: str, content: object) -> None:
            file.write(json.dumps({what: content}) + "\n")
            file.flush()

        for line in sys.stdin:
            given = json.loads(line)
            unit = Unit(**{**given, "shape": tuple(given["shape"])})
            reason = ""
            try:
                for row in rows_of(clock, unit):
                    say("row", row)
            except DeviceLostError:
                pass  # the row says it
            except Exception as error:  # the other units shall be measured all the same
                traceback.print_exc()
                reason = reason_of(error)
                error.__traceback__ = None  # it holds tensors
            gc.collect()
            if clock.lost():
                say("lost", reason)
                os._exit(1)  # nothing can be tidied up on a device that is lost
            clock.forget()
            say("end", reason)


def measure(
    units: Sequence[Unit], runner: Runner, minutes: float, write: Callable[[Row], None]
) -> list[dict[str, str]]:
    """Measure unit after unit as long as there is time; returns which failed, and why."""
    begin = time.monotonic()
    failed: list[dict[str, str]] = []
    for unit in units:
        left = min(unit.limit, 60 * minutes - (time.monotonic() - begin))
        if left < LEAST:
            failed.append({"unit": unit.title, "reason": f"no time left of {minutes:g} minutes"})
            continue
        started = time.monotonic()
        reason = runner(unit, write, left)
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
            peers = []
            for peer in PEERS:
                row = _row_of(rows, part="peers", what=peer, precision=precision, shape=shape)
                best, to_depth = _best(row, stock=True), _best(row, stock=False)
                if best:
                    name = f"{NAMES_OF_NETWORKS[peer]}: {best[0]}"
                    peers.append((best[1] / (to_depth or ours)[1], name))
            if peers:
                add(f"network {precision}", GOALS["peers"], *min(peers))
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
    reasons = []
    for row in rows:
        what = f"{row['what']} {row['precision']} {row.get('case', '')}"
        given = {**row["left_out"], **dict.fromkeys(row.get("alone", ()), "timed by itself")}
        reasons += [[row["part"], what, name, reason] for name, reason in given.items()]
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
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument(
        "--quick",
        dest="pace",
        action="store_const",
        const="quick",
        default="full",
        help="half the time for each row",
    )
    pace.add_argument(
        "--brief",
        dest="pace",
        action="store_const",
        const="brief",
        help="least time for each row, only what the goals speak of",
    )
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile for all precisions and networks"
    )
    parser.add_argument("--compile-minutes", type=float, help="for each, at most")
    parser.add_argument(
        "--minutes",
        type=float,
        help="for all of it; default: 7.5, quick 4, brief 100 s, with --compile 40",
    )
    parser.add_argument("--out", type=Path, help="folder of the results; benchmarks/results")
    parser.add_argument("--in-this-process", action="store_true", help="start no processes")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        work(options.work)
        return
    if options.precision is None:
        options.precision = list(PRECISIONS)
    if options.minutes is None:
        options.minutes = COMPILE_MINUTES if options.compile else PACES[options.pace].minutes
    if options.compile_minutes is None:
        full = "full" if options.compile else options.pace
        options.compile_minutes = PACES[full].compile_minutes
    clock = clock_of_this_machine()
    workers = None if options.in_this_process else Workers()
    facts = clock.facts()
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    content: dict[str, Any] = {
        "device": facts,
        "shape": shape_name(options.shapes[0]),
        "rows": [],
        "failed": [],
        "goals": [],
    }

    def write() -> Path:
        content["goals"] = goals(content["rows"], content["shape"])
        return save("gpu", content, options.out)

    def take(row: Row) -> None:
        content["rows"].append(row)
        write()

    units = units_of(options)
    runner = in_this_process(clock) if workers is None else workers
    try:
        minutes = options.minutes - ENDS / 60
        content["failed"] = measure(units, runner, minutes, take)
    finally:
        if workers is not None:
            workers.close()
    path = write()
    report(content)
    drawn = plots.gpu(path)
    print(f"\n{path}", *drawn)


if __name__ == "__main__":
    main()
