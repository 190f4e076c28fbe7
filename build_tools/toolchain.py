"""Finds the compilers and says in one sentence what is missing.

Every function that raises ``BuildError`` puts the remedy into the message: it is the last line that
pip shows of a failed build.
"""

import importlib.metadata
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch_headers import MINIMUM, TorchHeaders, find_torch, installed_torches

CUDA_ARCHS = ("7.5", "8.0", "8.6", "9.0", "10.0", "11.0", "12.0")
"""Architectures that are compiled by default, as far as nvcc knows them.

Machine code runs on later minor versions of its major version, so this serves 8.7, 8.9, 10.3 and
12.1 too; PTX for the newest serves what comes after.
"""

MINIMUM_NVCC = (12, 0)
"""The first nvcc that compiles C++20."""

SANITIZERS = ("address", "undefined")
"""Checks at run time that can be compiled in."""

MINIMUM_SETUPTOOLS = 77
"""The first setuptools that understands the licence expression in pyproject.toml."""

_CXX_NAMES = ("g++", "c++", "clang++")
_CXX_REMEDY = (
    "install one (`apt-get install g++`, `conda install -c conda-forge gxx`, or on macOS "
    "`xcode-select --install`) or name it in CXX"
)
_CPP20_PROBE = """
#include <concepts>
#include <cstdint>
#include <span>
template <std::integral T> constexpr T twice(T value) { return 2 * value; }
static_assert(twice(21) == 42 && __cplusplus > 201703L);
std::size_t length(std::span<const std::int64_t> values) { return values.size(); }
"""


class BuildError(SystemExit):
    """Ends the build with one sentence.

    A ``SystemExit``, because setuptools and pip let it through without a traceback.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(f"gplws: {sentence}")


@dataclass(frozen=True)
class CudaToolchain:
    """An nvcc, and the architectures to compile for."""

    nvcc: str
    version: str
    archs: tuple[str, ...]

    @property
    def gencode_flags(self) -> list[str]:
        flags = []
        for arch in self.archs:
            number = arch.removesuffix("+PTX").replace(".", "")
            codes = [f"sm_{number}"] + ([f"compute_{number}"] if arch.endswith("+PTX") else [])
            flags += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
        return flags


def require_platform() -> None:
    """Raises on Windows."""
    if sys.platform == "win32":
        raise BuildError("Windows is not supported; build it inside WSL 2.")


def require_setuptools() -> None:
    """Raises where setuptools is too old to read pyproject.toml (a build without isolation)."""
    version = importlib.metadata.version("setuptools")
    if int(version.partition(".")[0]) < MINIMUM_SETUPTOOLS:
        raise BuildError(
            f"setuptools {MINIMUM_SETUPTOOLS} or newer is needed to build without isolation, found "
            f'{version}; install it with `pip install "setuptools>={MINIMUM_SETUPTOOLS}"`.'
        )


def require_torch() -> TorchHeaders:
    torch = find_torch()
    if torch:
        return torch
    minimum = "{}.{}".format(*MINIMUM)
    old = next(installed_torches(), None)
    found = "found torch {}.{}.{} in {}".format(*old.version, old.root) if old else "found none"
    raise BuildError(
        f"torch {minimum} or newer is needed to build, {found}; install it with "
        f'`pip install "torch>={minimum}"`, or build without --no-build-isolation.'
    )


def find_cxx() -> list[str]:
    """The C++ compiler as the beginning of a command line; it is known to compile C++20."""
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        if not shutil.which(command[0]):
            raise BuildError(f"CXX={os.environ['CXX']} names no program; {_CXX_REMEDY}.")
    else:
        path = next(filter(None, map(shutil.which, _CXX_NAMES)), None)
        if path is None:
            raise BuildError(
                f"no C++ compiler was found (looked for {', '.join(_CXX_NAMES)} on PATH); "
                f"{_CXX_REMEDY}."
            )
        command = [path]
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.cpp"
        probe.write_text(_CPP20_PROBE)
        arguments = ["-std=c++20", "-c", str(probe), "-o", str(probe.with_suffix(".o"))]
        tried = subprocess.run([*command, *arguments], capture_output=True, text=True)
    if tried.returncode != 0:
        shown = tried.stderr.strip()
        print(shown, flush=True)
        raise BuildError(
            f"the C++ compiler {shlex.join(command)} ({_first_version(command)}) cannot compile "
            "C++20 (its message is above); gcc 11, clang 12 or newer can: "
            "`apt-get install g++` or `conda install -c conda-forge gxx`, or name another in CXX."
        )
    return command


def _first_version(command: Sequence[str]) -> str:
    shown = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    return shown.strip().partition("\n")[0] or "no version shown"


def find_ninja() -> str:
    try:
        import ninja
    except ImportError:
        path = shutil.which("ninja")
    else:
        path = str(Path(ninja.BIN_DIR) / "ninja")
    if path is None:
        raise BuildError(
            "ninja is needed to build without isolation; install it with `pip install ninja`."
        )
    return path


def python_include() -> str:
    """Folder of Python.h; distributions pack it apart from the interpreter."""
    folder = sysconfig.get_path("include")
    if not Path(folder, "Python.h").is_file():
        raise BuildError(
            f"Python's C headers are missing ({folder}/Python.h); install them with "
            "`apt-get install python3-dev` or `dnf install python3-devel`."
        )
    return folder


def pybind11_include(torch: TorchHeaders) -> str:
    """Folder of pybind11's headers; torch ships a copy, which serves an offline machine."""
    try:
        import pybind11
    except ImportError:
        return str(torch.include)
    return str(pybind11.get_include())


def sanitizers() -> list[str]:
    """The sanitizers that ``GPLWS_SANITIZE`` asks for; none is the usual build."""
    names = [name.strip() for name in os.environ.get("GPLWS_SANITIZE", "").split(",")]
    names = sorted({name for name in names if name})
    unknown = [name for name in names if name not in SANITIZERS]
    if unknown:
        raise BuildError(
            f"GPLWS_SANITIZE must hold some of {', '.join(SANITIZERS)}, divided by commas, "
            f"not {unknown[0]!r}."
        )
    return names


def find_cuda() -> CudaToolchain | str:
    """The CUDA toolchain to build with, or the reason why no CUDA kernels are built."""
    mode = os.environ.get("GPLWS_CUDA", "").strip().lower() or "auto"
    if mode not in ("auto", "0", "1"):
        raise BuildError(f"GPLWS_CUDA must be 0, 1 or auto, not {mode!r}.")
    if mode == "0":
        return "GPLWS_CUDA=0 was set"
    if mode == "auto" and sanitizers():
        return "GPLWS_SANITIZE was set"
    problem, nvcc = "", _nvcc_path()
    if nvcc is None:
        problem = "nvcc was not found"
    else:
        version = _nvcc_version(nvcc)
        if version is None:
            problem = f"{nvcc} did not run"
        elif tuple(map(int, version.split(".")[:2])) < MINIMUM_NVCC:
            problem = "nvcc {} is too old, {}.{} or newer is needed".format(version, *MINIMUM_NVCC)
        else:
            return CudaToolchain(nvcc, version, _cuda_archs(nvcc, version))
    if mode == "1":
        raise BuildError(
            f"GPLWS_CUDA=1, but {problem}; install the CUDA toolkit and put nvcc on PATH or its "
            "folder into CUDA_HOME, or set GPLWS_CUDA=0 to build for the CPU only."
        )
    return problem


def _nvcc_path() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=str(Path(home) / "bin"))
    installed = sorted(Path("/usr/local").glob("cuda*/bin/nvcc"), reverse=True)
    return shutil.which("nvcc") or next(map(str, installed), None)


def _nvcc_version(nvcc: str) -> str | None:
    try:
        shown = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return None
    found = re.search(r"\bV(\d+\.\d+(?:\.\d+)?)", shown)
    return found.group(1) if found else None


def _cuda_archs(nvcc: str, version: str) -> tuple[str, ...]:
    shown = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = [f"{int(n) // 10}.{int(n) % 10}" for n in re.findall(r"compute_(\d+)\b", shown)]
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if wanted.strip(f";,{string.whitespace}"):
        return parse_arch_list(wanted, known, version)
    archs = [arch for arch in CUDA_ARCHS if arch in known]
    if not archs:
        raise BuildError(
            f"nvcc {version} knows none of the CUDA architectures {', '.join(CUDA_ARCHS)}; name "
            "one in TORCH_CUDA_ARCH_LIST, or set GPLWS_CUDA=0."
        )
    return (*archs[:-1], archs[-1] + "+PTX")


def parse_arch_list(wanted: str, known: Sequence[str], version: str) -> tuple[str, ...]:
    """The entries of a ``TORCH_CUDA_ARCH_LIST``, each checked against what nvcc knows.

    Those older than 7.5, which lists for other packages hold as well, are left out and printed.

    Args:
        wanted: entries such as ``9.0``, ``9.0a`` or ``9.0+PTX``, divided by blanks, commas or
            semicolons.
        known: architectures that nvcc compiles, such as ``9.0``.
        version: version of that nvcc, for messages.

    Raises:
        BuildError: an entry is malformed or unknown to nvcc, or all are older than 7.5.
    """
    archs: list[str] = []
    too_old: list[str] = []
    for entry in filter(None, re.split(r"[;,\s]+", wanted)):
        found = re.fullmatch(r"(\d+\.\d)([af]?)(?:\+PTX)?", entry)
        if not found:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST holds {entry!r}, expected numbers such as 8.6, 9.0a or "
                "9.0+PTX (names of GPU generations are not understood)."
            )
        number = found.group(1)
        if tuple(map(int, number.split("."))) < tuple(map(int, CUDA_ARCHS[0].split("."))):
            too_old.append(entry)
        elif number not in known:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST holds {entry!r}, which nvcc {version} does not know; it "
                f"knows {', '.join(known)}."
            )
        elif entry not in archs:
            archs.append(entry)
    if not archs:
        raise BuildError(
            f"TORCH_CUDA_ARCH_LIST={wanted} holds no architecture that the CUDA kernels run on, "
            f"{CUDA_ARCHS[0]} or newer; set GPLWS_CUDA=0 to build for the CPU only."
        )
    if too_old:
        print(
            f"gplws: {', '.join(too_old)} of TORCH_CUDA_ARCH_LIST left out: the CUDA kernels need "
            f"{CUDA_ARCHS[0]} or newer"
        )
    return tuple(archs)
