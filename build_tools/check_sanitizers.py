"""Runs the tests of the ops on kernels that AddressSanitizer and UndefinedBehaviorSanitizer watch.

    python build_tools/check_sanitizers.py [OPTION OF pip install]...

Compiles gplws instrumented into a folder of its own, makes sure that planted errors are caught,
and runs tests/ops under each instruction set that this CPU has; below three minutes on two cores.
Needs GCC with its sanitizer libraries, torch and what the tests need. Offline:
``--no-build-isolation``.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import toolchain

ROOT = Path(__file__).resolve().parent.parent
ISAS = ("baseline", "avx2", "avx512")
LIBRARIES = ("libasan.so", "libubsan.so", "libstdc++.so")
# The first three run no other C++ of this package, and call the compiler; the last starts itself
# under each instruction set.
LEFT_OUT = "not compile and not export and not opcheck and not every_instruction_set"

PLANTED = "--planted-errors"


def main() -> None:
    if sys.argv[1:] == [PLANTED]:
        check_that_planted_errors_are_caught()
        return
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), sys.argv[1:])
        print(f"==== built after {time.monotonic() - begin:.0f} s", flush=True)
        # Each runs in that folder: Python, and the processes that the tests start, look for modules
        # where they run, and in the source tree would find the package that is not instrumented.
        for isa in ISAS:
            environment = instrumented_environment(Path(folder), isa)
            script = "import gplws; print(gplws.__file__, gplws.build_info()['cpu_isa'])"
            shown = run([sys.executable, "-c", script], environment, folder, read=True).split()
            assert Path(shown[0]).is_relative_to(folder), shown
            if shown[1] != isa:
                print(f"==== this CPU has no {isa}")
                continue
            print(f"==== {isa}", flush=True)
            run([sys.executable, __file__, PLANTED], environment, folder)
            # What a sanitizer writes before it ends the process is not to be captured.
            pytest = [sys.executable, "-m", "pytest", "-q", "--capture=sys", "-k", LEFT_OUT]
            pytest += ["-p", "no:cacheprovider", str(ROOT / "tests/ops")]
            run(pytest, environment, folder)
        print(f"==== passed after {time.monotonic() - begin:.0f} s")


def build(folder: Path, options: list[str]) -> None:
    # They watch the CPU's kernels alone; nvcc does not take their options either.
    asked = {"GPLWS_SANITIZE": ",".join(toolchain.SANITIZERS), "GPLWS_CUDA": "0"}
    environment = {**os.environ, **asked}
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    run([*pip, *options, str(ROOT)], environment, ROOT)


def instrumented_environment(folder: Path, isa: str) -> dict[str, str]:
    """Variables for a Python that loads the instrumented kernels."""
    # The runtimes must come first in the process, the C++ library before they look for its throw.
    compiler = toolchain.find_cxx()
    paths = [
        subprocess.check_output([*compiler, f"-print-file-name={name}"], text=True).strip()
        for name in LIBRARIES
    ]
    missing = [path for path in paths if not os.path.isabs(path)]
    if missing:
        sys.exit(f"{compiler[0]} has no {', '.join(missing)}: GCC with its sanitizers is needed")
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(paths),
        "PYTHONPATH": str(folder),
        "GPLWS_CPU_ISA": isa,
        # Python itself leaves memory to the operating system when it ends.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def run(
    command: list[str], environment: dict[str, str], folder: str | Path, read: bool = False
) -> str:
    done = subprocess.run(
        command, env=environment, cwd=folder, text=True, stdout=subprocess.PIPE if read else None
    )
    if done.returncode != 0:
        sys.exit(done.returncode)
    return done.stdout if read else ""


def check_that_planted_errors_are_caught() -> None:
    """Ends with an error where a wrong access of any op goes unnoticed."""
    for name, expected, action in planted_errors():
        report = report_of_child(action)
        if expected not in report:
            sys.exit(f"planted error: {name} was not caught; the process said:\n{report}")
        print(f"caught: {name}", flush=True)


def planted_errors() -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Name, what the report must say, and a call that reads or writes where it must not."""
    import numpy as np
    import torch
    from numpy.lib.stride_tricks import as_strided

    from gplws.ops import (
        conv3d_input_gradient,
        conv3d_weight_gradient,
        fit_peak,
        focus_search,
        group_pointwise_conv3d,
        regularise_surface,
        sample_surface,
        second_differences,
        smooth_surface,
        spline_smooth,
        symmetric_filter,
        up_conv3d,
    )

    def one_too_short(*shape: int) -> torch.Tensor:
        """A tensor that claims one number more than its memory holds."""
        memory = np.zeros(int(np.prod(shape)) - 1, np.float32)
        return torch.from_numpy(as_strided(memory, shape))

    def misaligned(*shape: int) -> torch.Tensor:
        size = int(np.prod(shape))
        return torch.frombuffer(bytearray(4 * size + 1), dtype=torch.float32, offset=1).view(shape)

    overflow = "ERROR: AddressSanitizer: "
    size = (1, 4, 3, 10, 40)
    good, doubled = torch.zeros(size), (1, 2, 3, 20, 80)
    weight, up_weight = torch.zeros(4, 2, 3, 3, 3), torch.zeros(4, 1, 3, 3, 3)
    calls: dict[str, Callable[..., Any]] = {
        "group_pointwise_conv3d": lambda x: group_pointwise_conv3d(x, weight, groups=2),
        "up_conv3d": lambda x: up_conv3d(x, up_weight, groups=2),
        "conv3d_input_gradient": lambda x: conv3d_input_gradient(
            x, weight, size=(20, 80), groups=2, stride=2
        ),
        "conv3d_weight_gradient": lambda x: conv3d_weight_gradient(x, good, groups=2),
        "focus_search": lambda x: focus_search(x[0]),
        "spline_smooth": lambda x: spline_smooth(x[0, -1]),
        "symmetric_filter": lambda x: symmetric_filter(x[0, -1], [[1.0] * 3] * 3),
        "second_differences": lambda x: second_differences(x[0, -1], [(1, 2)]),
        "smooth_surface": lambda x: smooth_surface(x[0, -1, -1], limit=1),
        "sample_surface": lambda x: sample_surface(x[0, -1], good[0, 0, 0] + 2),
        "fit_peak": lambda x: fit_peak(x.view(-1)[-7 * 80 :].view(7, 8, 10)),
        "regularise_surface": lambda x: regularise_surface(
            x[0, -1, -1:],
            good[0, -1, -1:],
            good[0, -1, -1:],
            strength=1,
            data_scale=1,
            smoothness_scale=1,
            guide_scale=1,
            iterations=1,
        ),
    }
    for name, call in calls.items():
        short, odd = one_too_short(*size), misaligned(*size)
        yield f"{name} reads behind its input", overflow, partial(call, short)
        if name not in ("second_differences", "smooth_surface"):  # these copy lines byte by byte
            yield f"{name} reads misaligned", "runtime error: ", partial(call, odd)
    out = one_too_short(*size)
    yield (
        "group_pointwise_conv3d writes behind its result",
        overflow,
        lambda: group_pointwise_conv3d(good, weight, groups=2, out=out),
    )
    image = one_too_short(*size[2:])
    yield (
        "spline_smooth writes behind its result",
        overflow,
        lambda: spline_smooth(good[0, 0], out=image),
    )
    large = one_too_short(*doubled)
    yield (
        "up_conv3d writes behind its result",
        overflow,
        lambda: up_conv3d(good, up_weight, groups=2, out=large),
    )


def report_of_child(action: Callable[[], Any]) -> str:
    """What a fork of this process writes to stderr while it runs ``action``."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 2)
        try:
            action()
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, errors="replace") as stream:
        report = stream.read()
    os.waitpid(child, 0)
    return report


if __name__ == "__main__":
    main()
