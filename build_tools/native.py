"""The build commands of gplws: one build.ninja for all C++ and CUDA files.

What is compiled follows from where a file lies:

    csrc/ops/bind.cpp        the Python module; sees pybind11, but no torch header
    csrc/ops/*.cpp           torch's stable ABI, into gplws/_C
    csrc/ops/*_cuda.cpp      torch's stable ABI and CUDA's runtime headers, into gplws/_cuda.so
    csrc/cpu/*.cpp           no torch; instruction set after the suffix of the name, into gplws/_C
    csrc/cuda/*.cu           no torch; all CUDA architectures, into gplws/_cuda.so

torch's own CUDAExtension is not used: it imports torch, fails with a CPU-only torch, and compiles
for the GPU of the build machine.
"""

import contextlib
import fcntl
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import toolchain
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from toolchain import BuildError, CudaToolchain
from torch_headers import MINIMUM, TorchHeaders

ROOT = Path(__file__).resolve().parent.parent
MACOS = sys.platform == "darwin"
X86 = platform.machine().lower() in ("x86_64", "amd64")

_AVX2 = ["-mavx2", "-mfma"]
_AVX512 = [
    *_AVX2,
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"),
    "-Wno-uninitialized",  # gcc's own AVX-512 headers trip over it
]
ISA_FLAGS = {
    "baseline": [],
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512bf16": [*_AVX512, "-mavx512bf16"],
}
"""Flags by the suffix of a file's name; all but the baseline exist on x86-64 only."""

# The kernels write a * b + c on vectors and count on the fused instruction.
_HOST_FLAGS = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-ffp-contract=fast"]


def isa_of(source: Path) -> str:
    """Instruction set that a file of csrc/cpu is compiled for, e.g. avx2 for focus_search_avx2."""
    suffix = source.stem.rpartition("_")[2]
    return suffix if suffix in ISA_FLAGS else "baseline"


def cpu_sources() -> list[Path]:
    """The files that become gplws/_C on this machine."""
    ops = [path for path in _glob("csrc/ops/*.cpp") if not path.stem.endswith("_cuda")]
    kernels = [p for p in _glob("csrc/cpu/*.cpp") if X86 or isa_of(p) == "baseline"]
    return ops + kernels


def cuda_sources() -> list[Path]:
    """The files that become gplws/_cuda.so."""
    return _glob("csrc/cuda/*.cu") + _glob("csrc/ops/*_cuda.cpp")


def _glob(pattern: str) -> list[Path]:
    return sorted(ROOT.glob(pattern))


class BuildPy(build_py):
    """Copies the Python files anew: none stays that an earlier build left and the tree has lost."""

    def run(self) -> None:
        built = Path(self.build_lib, "gplws")
        if not self.editable_mode and built.resolve() != ROOT / "gplws":
            for path in built.rglob("*"):
                # build_ext sees to its own files; ninja needs not link again where they are.
                if path.is_file() and path.suffix != ".so":
                    path.unlink()
        super().run()


class BuildExt(build_ext):
    """Compiles gplws/_C and, where nvcc is found, gplws/_cuda.so beside it."""

    def build_extension(self, ext: object) -> None:
        module = Path(self.get_ext_fullpath("gplws._C")).resolve()
        cuda_library = module.parent / "_cuda.so"
        torch, cxx, cuda = toolchain.require_torch(), toolchain.find_cxx(), toolchain.find_cuda()
        print("gplws: torch {}.{}.{} in {}".format(*torch.version, torch.root))
        if isinstance(cuda, CudaToolchain):
            print(f"gplws: nvcc {cuda.version} ({cuda.nvcc}) for {' '.join(cuda.archs)}")
        else:
            print(f"gplws: no CUDA kernels: {cuda}")

        module.parent.mkdir(parents=True, exist_ok=True)
        # Fixed, so that editable installs, for which setuptools builds in a temporary folder,
        # compile only what changed.
        target = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        sanitizers = toolchain.sanitizers()
        if sanitizers:
            print(f"gplws: instrumented by {', '.join(sanitizers)}: for tests only")
        kind = "-".join(["instrumented", *sanitizers]) if sanitizers else "native"
        folder = ROOT / "build" / f"{kind}-{target}"
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            _write_if_changed(folder / "build_facts.h", self._facts_header(torch, cuda))
            ninja = NinjaFile()
            linked = _add_module(ninja, folder / module.name, torch, cxx)
            if isinstance(cuda, CudaToolchain):
                _add_cuda_library(ninja, cuda_library, torch, cxx, cuda)
            else:
                cuda_library.unlink(missing_ok=True)  # of an earlier build
            _write_if_changed(folder / "build.ninja", ninja.text())
            self._run_ninja(folder, with_cuda=isinstance(cuda, CudaToolchain))
            # The copy is made anew each time: what lies there may be that of an instrumented build.
            module.unlink(missing_ok=True)
            shutil.copy2(linked, module)

    def get_outputs(self) -> list[str]:
        outputs = super().get_outputs()
        cuda_libraries = [Path(output).parent / "_cuda.so" for output in outputs]
        return outputs + [str(path) for path in cuda_libraries if path.exists()]

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        built, installed = Path(self.build_lib, "gplws/_cuda.so"), ROOT / "gplws/_cuda.so"
        if built.exists():
            self.copy_file(str(built), str(installed))
        else:
            installed.unlink(missing_ok=True)

    def _facts_header(self, torch: TorchHeaders, cuda: CudaToolchain | str) -> str:
        absent, built = (cuda, None) if isinstance(cuda, str) else ("", cuda)
        isas = {isa_of(path) for path in _glob("csrc/cpu/*.cpp")} if X86 else {"baseline"}
        facts = {
            "VERSION": self.distribution.get_version(),
            "COMMIT": _git_commit(),
            "TORCH_HEADERS": "{}.{}.{}".format(*torch.version),
            "TORCH_TARGET": "{}.{}".format(*MINIMUM),
            "CPU_ISAS": " ".join(isa for isa in ISA_FLAGS if isa in isas),
            "CUDA_ABSENT": absent,
            "CUDA_ARCHS": " ".join(built.archs) if built else "",
            "NVCC": built.version if built else "",
        }
        lines = [f"#define GPLWS_{name} {json.dumps(fact)}" for name, fact in facts.items()]
        return "\n".join(["// Written by build_tools/native.py.", "#pragma once", *lines, ""])

    def _run_ninja(self, folder: Path, with_cuda: bool) -> None:
        command = [toolchain.find_ninja(), "-C", str(folder)]
        jobs = os.environ.get("MAX_JOBS", "")
        if jobs:
            if not jobs.isdecimal() or int(jobs) < 1:
                raise BuildError(f"MAX_JOBS must be a positive number, not {jobs!r}.")
            command += ["-j", jobs]
        environment = dict(os.environ)
        if with_cuda:
            # Not in the command line: ninja compiles again when that changes. There the user's
            # flags are already.
            cores = int(jobs) if jobs else os.cpu_count() or 1
            threads = max(1, cores // len(cuda_sources()))
            environment["NVCC_APPEND_FLAGS"] = f"--threads {threads}"
            environment.pop("NVCC_PREPEND_FLAGS", None)
        sys.stdout.flush()
        if subprocess.run(command, env=environment).returncode != 0:
            hint = "; GPLWS_CUDA=0 builds for the CPU only" if with_cuda else ""
            raise BuildError(f"compiling failed, the compiler's message is above{hint}.")


class NinjaFile:
    """Collects rules and build statements."""

    def __init__(self) -> None:
        self._lines = ["ninja_required_version = 1.5"]

    def rule(self, name: str, command: str, depfile: bool) -> None:
        self._lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if depfile:
            self._lines += ["  depfile = $out.d", "  deps = gcc"]

    def build(self, output: Path, rule: str, inputs: list[Path], flags: list[str]) -> Path:
        paths = " ".join(_escape_path(path) for path in inputs)
        self._lines.append(f"build {_escape_path(output)}: {rule} {paths}")
        self._lines.append("  flags = " + shlex.join(flags).replace("$", "$$"))
        return output

    def text(self) -> str:
        return "\n".join(self._lines) + "\n"


def _add_module(ninja: NinjaFile, module: Path, torch: TorchHeaders, cxx: list[str]) -> Path:
    compiler = _command(cxx)
    ninja.rule("cxx", f"{compiler} -MD -MF $out.d $flags -c $in -o $out", depfile=True)
    ninja.rule("link", f"{compiler} $in -o $out $flags", depfile=False)
    python = ["-isystem", toolchain.python_include()]
    python += ["-isystem", toolchain.pybind11_include(torch)]
    python += ["-I."]  # build_facts.h; ninja runs in the folder that holds it
    objects = []
    for source in cpu_sources():
        flags = shlex.split(os.environ.get("CXXFLAGS", "")) + _cxx_flags()
        if source.name == "bind.cpp":
            flags += python
        elif source.parent.name == "ops":
            flags += _torch_flags(torch)
        else:
            flags += ISA_FLAGS[isa_of(source)]
        objects.append(ninja.build(_object(source), "cxx", [source], flags))
    return ninja.build(module, "link", objects, _link_flags(torch))


def _add_cuda_library(
    ninja: NinjaFile, library: Path, torch: TorchHeaders, cxx: list[str], cuda: CudaToolchain
) -> None:
    for path in (ROOT, torch.include):
        if "," in str(path):
            raise BuildError(
                f"nvcc takes the comma in {path} for the end of a path; move that folder, or set "
                "GPLWS_CUDA=0 to build for the CPU only."
            )
    # nvcc drives the host compiler and the linker as well: it alone knows where its headers and
    # its static runtime are (what is found as nvcc may be a script that calls the real one).
    # A compiler with arguments or a launcher cannot be handed on; nvcc then takes its own choice.
    nvcc = _command([cuda.nvcc, "-ccbin", *cxx] if len(cxx) == 1 else [cuda.nvcc])
    ninja.rule("nvcc", f"{nvcc} -MD -MF $out.d $flags -c $in -o $out", depfile=True)
    ninja.rule("nvlink", f"{nvcc} $in -o $out $flags", depfile=False)
    # nvcc would read these itself, but ninja would not compile again when they change.
    prepended = shlex.split(os.environ.get("NVCC_PREPEND_FLAGS", ""))
    appended = shlex.split(os.environ.get("NVCC_APPEND_FLAGS", ""))
    # No path may be among these: nvcc divides them at commas, its shell at blanks.
    common = [*prepended, "-Xcompiler", ",".join(_HOST_FLAGS)]
    common += ["-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", "-cudart=static"]
    objects = []
    for source in cuda_sources():
        if source.suffix == ".cu":
            flags = [*common, "--expt-relaxed-constexpr", *cuda.gencode_flags]
        else:
            flags = [*common, "-DUSE_CUDA", *_torch_flags(torch)]
        objects.append(ninja.build(_object(source), "nvcc", [source], flags + appended))
    # nvcc moves every -Xlinker flag before the libraries, so --as-needed cannot be switched back.
    link = [*prepended, "-shared", "-cudart=static", "-Xlinker", "--no-as-needed"]
    link += ["-Xlinker", "-rpath", "-Xlinker", "$ORIGIN/../torch/lib"]
    link += [f"-L{torch.lib}", "-lstdc++", "-ltorch", "-ltorch_cpu", *appended]
    ninja.build(library, "nvlink", objects, link)


def _cxx_flags() -> list[str]:
    return [
        *("-std=c++20", "-O3", *_HOST_FLAGS),
        f"-ffile-prefix-map={ROOT}=.",
        f"-I{ROOT / 'csrc'}",
        *_sanitizer_flags(),
    ]


def _sanitizer_flags() -> list[str]:
    """Instrumentation of the C++ files, asked for by ``GPLWS_SANITIZE``."""
    names = toolchain.sanitizers()
    if not names:
        return []
    # -O1: at -O3 the checks take GCC three minutes. The first finding ends the run.
    flags = [f"-fsanitize={','.join(names)}", "-fno-sanitize-recover=all"]
    return [*flags, "-fno-omit-frame-pointer", "-g1", "-O1"]


def _torch_flags(torch: TorchHeaders) -> list[str]:
    target = (MINIMUM[0] << 56) | (MINIMUM[1] << 48)
    return [f"-DTORCH_TARGET_VERSION=0x{target:016x}", "-isystem", str(torch.include)]


def _link_flags(torch: TorchHeaders) -> list[str]:
    libraries = [f"-L{torch.lib}", "-ltorch", "-ltorch_cpu"]
    if MACOS:
        flags = ["-bundle", "-undefined", "dynamic_lookup", *libraries]
        flags += ["-Wl,-rpath,@loader_path/../torch/lib"]
    else:
        # The C++ runtime before torch, whose libraries answer for parts of it.
        flags = ["-shared", "-Wl,--no-as-needed", "-lstdc++", *libraries, "-Wl,--as-needed"]
        flags += ["-Wl,-rpath,$ORIGIN/../torch/lib"]
    return flags + _sanitizer_flags() + shlex.split(os.environ.get("LDFLAGS", ""))


def _object(source: Path) -> Path:
    """Name of the object file, relative to the folder that ninja runs in."""
    return Path("_".join(source.relative_to(ROOT).parts) + ".o")


def _command(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _escape_path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def _write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps two builds out of the same folder; ninja itself does not."""
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _git_commit() -> str:
    """Commit of the source tree, with ``-dirty`` if files differ from it; empty if unknown."""
    if not (ROOT / ".git").exists():
        return ""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return shown.stdout.strip() if shown.returncode == 0 else ""
