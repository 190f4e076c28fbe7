"""Seconds for one stack on the CPU: the network on the kernels, on stock torch, on other engines.

Shapes: Figure 1 of the paper (10 frames of 128 to 1024 pixels squared), its Table 7, and 5 to 100
frames of 256 pixels squared. The engines get the same network with BN folded; their results are
compared with the kernels' before they are timed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import machine, medians, save, take_turns
from gplws.models import GPLWSNet

SHAPES = {
    "one": [(10, 512, 512)],
    "figure 1": [(10, s, s) for s in (128, 256, 512, 1024)],
    "table 7": [(5, 256, 256), (10, 512, 512), (15, 540, 960), (10, 600, 800)],
    "frames": [(n, 256, 256) for n in (5, 10, 20, 50, 100)],
}
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}  # of the largest logit
MOST_VOXELS_OF_OTHERS = 8e6  # beyond, the slow candidates take minutes


def network() -> GPLWSNet:
    """The paper's configuration with random but lively weights and statistics."""
    torch.manual_seed(0)
    model = GPLWSNet()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return model.eval()


def available() -> list[str]:
    """The engines that are installed."""
    engines = ["compile"]
    if importlib.util.find_spec("onnxscript"):
        engines += [e for e in ("onnxruntime", "openvino") if importlib.util.find_spec(e)]
    return engines


class Engines:
    """The same network for each engine, built once for a shape."""

    def __init__(self, precision: str, engines: list[str]) -> None:
        self.precision, self.engines = precision, engines
        self.dtype = dtype = getattr(torch, precision)
        model = network()
        folded = model.reparameterise()
        self.kernels = model.fuse().to(dtype)
        self.contiguous = folded.to(dtype)
        self.last = network().reparameterise().to(dtype, memory_format=torch.channels_last_3d)

    def candidates(self, stack: Tensor) -> dict[str, Callable[[], Any]]:
        """Functions that compute the focus volume of ``stack``, by name."""
        stack = stack.to(self.dtype)
        last = stack.contiguous(memory_format=torch.channels_last_3d)
        found: dict[str, Callable[[], Any]] = {"gplws": lambda: self.kernels(stack)}
        if stack[0, 0].numel() > MOST_VOXELS_OF_OTHERS:
            return found
        found["eager"] = lambda: self.contiguous(stack)
        found["eager channels_last"] = lambda: self.last(last)
        builders = {
            "compile": lambda: self._compiled(last),
            "onnxruntime": lambda: self._onnxruntime(stack),
            "openvino": lambda: self._openvino(stack),
        }
        for engine in self.engines:
            if engine == "onnxruntime" and self.precision != "float32":
                continue  # its CPU kernels have no bfloat16 conv
            found[engine] = builders[engine]()
        expected = found["gplws"]().float()
        for name, run in found.items():
            got = torch.as_tensor(run()).float().view_as(expected)
            error = ((got - expected).abs().max() / expected.abs().max()).item()
            if error > TOLERANCE[self.precision]:
                raise RuntimeError(f"{name} differs from gplws by {error:.2g} at {stack.shape}")
        return found

    def _compiled(self, last: Tensor) -> Callable[[], Any]:
        torch._dynamo.reset()
        compiled = torch.compile(self.last, dynamic=False)
        return lambda: compiled(last)

    def _onnx(self, stack: Tensor) -> bytes:
        plain = network().reparameterise()
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            path = Path(folder) / "network.onnx"
            torch.onnx.export(plain, (stack.float(),), path, dynamo=True, external_data=False)
            return path.read_bytes()

    def _onnxruntime(self, stack: Tensor) -> Callable[[], Any]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(
            self._onnx(stack), options, providers=["CPUExecutionProvider"]
        )
        feed = {session.get_inputs()[0].name: stack.float().numpy()}
        return lambda: session.run(None, feed)[0]

    def _openvino(self, stack: Tensor) -> Callable[[], Any]:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, default=["figure 1", "table 7", "frames"]
    )
    parser.add_argument("--precision", nargs="+", choices=list(TOLERANCE), default=list(TOLERANCE))
    parser.add_argument("--engines", nargs="*", default=available(), help="beside eager torch")
    parser.add_argument("--seconds", type=float, default=40.0, help="for each row, roughly")
    parser.add_argument("--out", type=Path, help="folder for the JSON; default: benchmarks/results")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    print(", ".join(f"{k} {v}" for k, v in machine().items()))
    missing = {"compile", "onnxruntime", "openvino"} - set(options.engines)
    if missing:
        print(f"left out: {', '.join(sorted(missing))}")
    rows: list[dict[str, Any]] = []
    for precision in options.precision:
        engines = Engines(precision, options.engines)
        for title in options.shapes:
            print(f"\n{title}, {precision}: seconds (times the kernels)")
            for frames, height, width in SHAPES[title]:
                stack = torch.rand(1, 3, frames, height, width)
                with torch.inference_mode():
                    times = take_turns(engines.candidates(stack), seconds=options.seconds)
                shape = f"{frames}x{height}x{width}"
                rows.append({"precision": precision, "shape": shape, "seconds": times})
                save("latency", {"rows": rows}, options.out)  # a long run may be stopped
                found = medians(times)
                ours = found["gplws"]
                columns = [f"{name} {t:.3f} ({t / ours:.1f})" for name, t in found.items()]
                voxels = frames * height * width
                print(f"| {shape} | {1e9 * ours / voxels:.0f} ns/voxel | {' | '.join(columns)} |")
                sys.stdout.flush()
    print(f"\n{save('latency', {'rows': rows}, options.out)}")


if __name__ == "__main__":
    main()
