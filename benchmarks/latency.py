"""Seconds for one stack on the CPU: the network on the kernels, on stock torch, on other engines.

Shapes: Figure 1 of the paper (10 frames of 128 to 1024 pixels squared), its Table 7, 5 to 100
frames of 256 pixels squared, and 10 frames of 256 to 2048 pixels squared. The engines get the same
network with BN folded; their results are compared with the kernels' before they are timed.
Published networks (--networks) run on stock torch in either memory format (bfloat16: by autocast)
and on OpenVINO, in turns with GPLWS-Net on the kernels. --paper takes all six networks through the
shapes of Figure 1, Table 7 and 5 to 100 frames in float32, and shows what Table 7 prints beside it.
DDFFNet is made for one number of frames; it is built anew for each, and so not one network over all
of them.

Each shape is written to the JSON as soon as it is measured, with commit and date; --resume goes on
from there, --again measures anew what is asked for and keeps the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import logging
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import paper, plots
from benchmarks.networks import (
    NETWORKS,
    ToDepth,
    frames_of,
    in_channels_last,
    random_gplws,
    random_peer,
)
from benchmarks.summary import (
    BESIDE,
    NAMES_OF_NETWORKS,
    fastest,
    gplws_beside,
    lower_by,
    medians,
    shape_name,
    sizes,
    times_gplws,
    voxels,
)
from benchmarks.timing import introduce, resumed_rows, save, show, when
from gplws.benchmark import FEWEST_ROUNDS, take_turns

SHAPES = {
    "one": [(10, 512, 512)],
    "figure 1": [(10, s, s) for s in (128, 256, 512, 1024)],
    "table 7": [(5, 256, 256), (10, 512, 512), (15, 540, 960), (10, 600, 800)],
    "frames": [(n, 256, 256) for n in (5, 10, 20, 50, 100)],
    "sizes": [(10, s, s) for s in (256, 512, 1024, 2048)],
}
PAPER_SHAPES = ("figure 1", "table 7", "frames")
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}  # of the largest result
# Random weights leave the softmax of a deep network undecided: bfloat16 results of the peers differ
# from engine to engine by more than any sensible bound, so only float32 is compared there.
UNCHECKED = math.inf
MOST_VOXELS_OF_OTHERS = 1.1e7  # beyond, the slow candidates take minutes and many GB
ENGINES = ("eager", "compile", "onnxruntime", "openvino")

Candidate = Callable[[], Any]


def available() -> list[str]:
    """The engines that are installed."""
    engines = ["eager", "compile"]
    if importlib.util.find_spec("onnxscript"):
        engines += [e for e in ("onnxruntime", "openvino") if importlib.util.find_spec(e)]
    return engines


class Engines:
    """One network for each engine, built once for a precision and a number of frames."""

    def __init__(self, network: str, precision: str, engines: list[str], n_frames: int) -> None:
        self.precision = precision
        self.dtype: torch.dtype = getattr(torch, precision)
        self.kernels = random_gplws().fuse().to(self.dtype)
        self.on_kernels = network == "gplws"
        if self.on_kernels:
            self.engines = list(engines)
            self._build: Callable[[], nn.Module] = lambda: random_gplws().reparameterise()
        else:
            self.engines = [engine for engine in engines if engine in ("eager", "openvino")]
            self._build = lambda: random_peer(network, n_frames)
        # Stock torch lacks some bfloat16 kernels that peers need; autocast goes round them.
        self.autocast = network != "gplws" and self.dtype != torch.float32
        dtype = torch.float32 if self.autocast else self.dtype
        self.contiguous = self._build().to(dtype)
        self.last = in_channels_last(self._build().to(dtype))

    def candidates(self, stack: Tensor) -> tuple[dict[str, Candidate], dict[str, str], float]:
        """Functions that run the network on ``stack`` by name, and why others are left out.

        Each has run once; the last value is how long that took, all of them together.
        """
        once = 0.0
        found: dict[str, Candidate] = {}
        left_out: dict[str, str] = {}
        expected: Tensor | None = None
        for name, build in self._builders(stack.to(self.dtype)):
            if name != "gplws" and stack[0, 0].numel() > MOST_VOXELS_OF_OTHERS:
                left_out[name] = "too large"
                continue
            # Exporters and engines fail in many ways; the others shall be measured all the same.
            try:
                run = build()
                start = time.perf_counter()
                got = torch.as_tensor(run()).float()
                seconds = time.perf_counter() - start
            except Exception as error:
                reason = str(error).strip().partition("\n")[0]
                left_out[name] = f"{type(error).__name__}: {reason}"
                continue
            expected = got if expected is None else expected
            error_share = (got.view_as(expected) - expected).abs().max() / expected.abs().max()
            tolerance = UNCHECKED if self.autocast else TOLERANCE[self.precision]
            if error_share > tolerance:
                left_out[name] = f"result differs by {error_share:.2g} of the largest value"
                continue
            found[name] = run
            once += seconds
        return found, left_out, once

    def beside(self, stack: Tensor) -> Candidate:
        """GPLWS-Net on the kernels, for the turns of another network."""
        stack = stack.to(self.dtype)
        to_depth = ToDepth(self.kernels)
        return lambda: to_depth(stack)

    def _builders(self, stack: Tensor) -> Iterator[tuple[str, Callable[[], Candidate]]]:
        last = stack.contiguous(memory_format=torch.channels_last_3d)
        if self.on_kernels:
            yield "gplws", lambda: lambda: self.kernels(stack)
        if "eager" in self.engines:
            yield "eager", lambda: lambda: self._eager(self.contiguous, stack)
            yield "eager channels_last", lambda: lambda: self._eager(self.last, last)
        builders: dict[str, Callable[[], Candidate]] = {
            "compile": lambda: self._compiled(last),
            "onnxruntime": lambda: self._onnxruntime(stack),
            "openvino": lambda: self._openvino(stack),
        }
        for engine in self.engines:
            if engine not in builders:
                continue
            if engine == "onnxruntime" and self.precision != "float32":
                continue  # its CPU kernels have no bfloat16 conv
            yield engine, builders[engine]

    def _eager(self, model: nn.Module, stack: Tensor) -> Tensor:
        if not self.autocast:
            return model(stack)
        with torch.autocast("cpu", self.dtype):
            return model(stack.float())

    def _compiled(self, last: Tensor) -> Candidate:
        torch._dynamo.reset()
        compiled = torch.compile(self.last, dynamic=False)
        return lambda: compiled(last)

    def _onnx(self, stack: Tensor) -> bytes:
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            path = Path(folder) / "network.onnx"
            torch.onnx.export(
                self._build(), (stack.float(),), path, dynamo=True, external_data=False
            )
            return path.read_bytes()

    def _onnxruntime(self, stack: Tensor) -> Candidate:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(
            self._onnx(stack), options, providers=["CPUExecutionProvider"]
        )
        feed = {session.get_inputs()[0].name: stack.float().numpy()}
        return lambda: session.run(None, feed)[0]

    def _openvino(self, stack: Tensor) -> Candidate:
        import openvino

        core = openvino.Core()
        kind = {"float32": openvino.Type.f32, "bfloat16": openvino.Type.bf16}[self.precision]
        compiled = core.compile_model(
            core.read_model(self._onnx(stack)),
            "CPU",
            {
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": kind,
            },
        )
        request, feed = compiled.create_infer_request(), stack.float().numpy()
        return lambda: request.infer([feed])[compiled.output(0)]


def shapes_of(text: str) -> list[tuple[int, int, int]]:
    """The shapes of a set by its name, or the one that ``text`` says."""
    if text in SHAPES:
        return SHAPES[text]
    try:
        return [sizes(text)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"expected one of {', '.join(SHAPES)} or NxHxW, got {text!r}"
        ) from error


def measure(
    network: str,
    precision: str,
    size: tuple[int, int, int],
    engines: list[str],
    seconds: float,
    rounds: int = FEWEST_ROUNDS,
) -> dict[str, Any]:
    """One row: the times of each candidate, and what was left out and why."""
    torch.manual_seed(1)
    stack = torch.rand(1, 3, *size)
    with torch.inference_mode():
        built = Engines(network, precision, engines, size[0])
        candidates, left_out, once = built.candidates(stack)
        if candidates and not built.on_kernels:
            candidates[BESIDE] = built.beside(stack)
            candidates[BESIDE]()
        # Where a round takes longer than all of the row should, the one just run warms up.
        warm = once if once > seconds else None
        times = {}
        if candidates:
            times = take_turns(candidates, seconds=seconds, fewest=rounds, once=warm)
    beside = times.pop(BESIDE, None)
    row: dict[str, Any] = {
        "network": network,
        "precision": precision,
        "shape": shape_name(size),
        "seconds": times,
        "left_out": left_out,
        **when(),
    }
    if beside:
        row[BESIDE] = beside
    if frames_of(network):
        row["made_for_frames"] = size[0]
    return row


def describe(row: dict[str, Any], ours: float | None) -> str:
    """One line for a row; ratios are to ``ours``, the seconds of gplws for the same work."""
    found = medians(row["seconds"])
    columns = [
        f"{name} {seconds:.3f}" + (f" ({seconds / ours:.1f})" if ours else "")
        for name, seconds in found.items()
    ]
    columns += [f"{name}: {reason}" for name, reason in row["left_out"].items()]
    return f"| {row['network']} | {row['precision']} | {row['shape']} | {' | '.join(columns)} |"


def key_of(row: dict[str, Any]) -> tuple[str, str, str]:
    """What a row is of: there is one for each network, precision and shape."""
    return row["network"], row["precision"], row["shape"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=shapes_of,
        metavar="SHAPE",
        help=f"{', '.join(SHAPES)}, or NxHxW",
    )
    parser.add_argument("--precision", nargs="+", choices=list(TOLERANCE))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS)
    parser.add_argument(
        "--paper", action="store_true", help="what the paper measures, unless said otherwise"
    )
    parser.add_argument(
        "--engines", nargs="*", choices=ENGINES, default=available(), help="beside the kernels"
    )
    parser.add_argument("--seconds", type=float, default=40.0, help="for each row, roughly")
    parser.add_argument("--rounds", type=int, default=FEWEST_ROUNDS, help="at least")
    parser.add_argument("--resume", action="store_true", help="keep the rows of an earlier run")
    parser.add_argument(
        "--again", action="store_true", help="as --resume, but replace the rows that are asked for"
    )
    parser.add_argument("--out", type=Path, help="folder of the results; benchmarks/results")
    options = parser.parse_args()
    networks = options.networks or (NETWORKS if options.paper else ["gplws"])
    precisions = options.precision or (["float32"] if options.paper else list(TOLERANCE))
    titles = PAPER_SHAPES if options.paper else [title for title in SHAPES if title != "one"]
    sets = options.shapes or [SHAPES[title] for title in titles]
    logging.disable(logging.WARNING)
    introduce()
    absent = [engine for engine in ENGINES if engine not in options.engines]
    if absent:
        print(f"left out: {', '.join(absent)}")

    for network in networks:
        if frames_of(network):
            print(f"{network}: made for one number of frames, built anew for each")

    resumed = options.resume or options.again
    rows = {key_of(row): row for row in resumed_rows("latency", options.out)} if resumed else {}
    # Every shape once, in the order of the sets.
    shapes = list(dict.fromkeys(size for one in sets for size in one))
    for network in networks:
        for precision in precisions:
            for size in shapes:
                if (network, precision, shape_name(size)) in rows and not options.again:
                    continue
                row = measure(
                    network, precision, size, options.engines, options.seconds, options.rounds
                )
                rows[key_of(row)] = row
                write(list(rows.values()), options.out)
                print(describe(row, gplws_beside(list(rows.values()), row)))
                sys.stdout.flush()
    path = write(list(rows.values()), options.out)
    report(list(rows.values()))
    plots.latency(path)
    print(f"\n{path}")


def write(rows: list[dict[str, Any]], folder: Path | None) -> Path:
    """The rows as JSON."""
    return save("latency", {"rows": rows}, folder)


def report(rows: list[dict[str, Any]]) -> None:
    """The networks side by side, and the paper's Table 7 with what was measured."""
    measured = fastest(rows, "float32")
    if any(set(found) - {"gplws"} for found in measured.values()):
        print("\nseconds of the networks, float32, each in its fastest setting")
        show(*networks_table(measured))
        print("\nTable 7: percent that GPLWS-Net needs less; printed figures in brackets")
        show(*table_7(measured, times_gplws(rows, "float32")))
        print(f"{paper.DIFFERENCES['latency']}")


Seconds = dict[str, dict[str, float]]


def networks_table(measured: Seconds) -> tuple[list[str], list[list[str]]]:
    """Head and rows: seconds of each network at each shape, by number of voxels."""
    shapes = sorted(measured, key=voxels)
    names = [name for name in NETWORKS if any(name in found for found in measured.values())]
    rows = [
        [shape, *(_number(measured[shape].get(name), "{:.3f}") for name in names)]
        for shape in shapes
    ]
    return ["shape", *(NAMES_OF_NETWORKS[name] for name in names)], rows


def table_7(measured: Seconds, ratios: Seconds) -> tuple[list[str], list[list[str]]]:
    """Head and rows: the paper's Table 7 with what was measured, as far as it was."""
    rows = []
    for shape, printed in paper.TABLE_7.items():
        found = measured.get(shape, {})
        for name in NETWORKS:
            cells = [_number(found.get(name), "{:.3f}"), f"({printed[name].seconds:.3f})"]
            if name == "gplws":
                cells += ["", ""]
            else:
                ratio = ratios.get(shape, {}).get(name)
                percent = None if ratio is None else lower_by(ratio)
                cells += [_number(percent, "{:.2f}"), f"({printed[name].lower_by:.2f})"]
            rows.append([shape, NAMES_OF_NETWORKS[name], *cells])
    return ["shape", "network", "s", "(s)", "% less", "(% less)"], rows


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


if __name__ == "__main__":
    main()
